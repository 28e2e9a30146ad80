"""02 and 03 in two processes under `accelerate launch`: the same labels, the same training, and a restart continues."""

import json
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import common
from helpers import ROOT, environment, stage

# Runs a stage without dropout, which is drawn per process; dies at the n-th checkpoint if n is not 0.
CHILD = """
import importlib, os, sys
sys.path.insert(0, {root!r})
import common
common.Teacher.__init__.__defaults__ = (0.0,)
left, save = int(sys.argv[2]), common.save_checkpoint
def counted(path, model, optimiser, position):
    global left
    save(path, model, optimiser, position)
    left -= optimiser is not None
    if left == 0 and optimiser is not None:
        os._exit(9)
common.save_checkpoint = counted
common.run(lambda: importlib.import_module(sys.argv[1]).main(sys.argv[3:]))
"""


def two_processes(tmp_path, module, argv, die_at=0):
    """Exit code and output of a stage in two processes, launched as on two GPUs (with --cpu, `accelerate launch` starts one, or asks
    for MPI); the stage's own --device cpu then makes them talk over gloo."""
    script = tmp_path / "child.py"
    script.write_text(CHILD.format(root=str(ROOT)))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    done = subprocess.run([sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
                           "--dynamo_backend", "no", "--main_process_port", str(port), str(script), module, str(die_at), *map(str, argv)],
                          capture_output=True, text=True, env=environment(threads=1), cwd=tmp_path, timeout=240)
    return done.returncode, done.stdout + done.stderr


def alone(monkeypatch, number, argv):
    """A stage in this process, with as many threads and as little dropout as the two have."""
    monkeypatch.setattr(common.Teacher.__init__, "__defaults__", (0.0,))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        stage(number).main([str(a) for a in argv])
    finally:
        torch.set_num_threads(before)


def new_run(folder, features):
    folder.mkdir()
    (folder / "features").symlink_to(features)
    return folder


TRAIN = ["--rows", "96", "--epochs", "2", "--batch-rows", "16", "--batch-tokens", "256", "--max-tokens", "48", "--checkpoint-steps", "2", "--device", "cpu"]


def shards(run):
    return {p.relative_to(run).as_posix(): p.read_bytes() for p in sorted((run / "labels").rglob("*.parquet"))}


@pytest.fixture
def labelled(features, models, tmp_path, monkeypatch):
    """A run labelled by one process."""
    run = new_run(tmp_path / "one", features)
    alone(monkeypatch, "02", ["--run", run, "--model", models["llama"], *TRAIN, "--epochs", "1"])
    alone(monkeypatch, "03", ["--run", run, "--device", "cpu"])
    return run


def test_two_processes_label_as_one_and_another_number_continues(labelled, tmp_path, monkeypatch):
    other = tmp_path / "two"
    shutil.copytree(labelled, other, symlinks=True, ignore=shutil.ignore_patterns("labels"))
    code, log = two_processes(tmp_path, "03_label", ["--run", other, "--device", "cpu"])
    assert code == 0, log
    assert "2 process(es)" in log
    one = shards(labelled)
    assert len(one) > 4 and shards(other) == one

    # as if killed: some shards are there, the stage is not finished
    kept = list(one)[::3]
    for name in set(one) - set(kept):
        (other / name).unlink()
    about = common.read_json(other / "labels" / "stage.json")
    common.write_json(other / "labels" / "stage.json", {**about, "finished": False})
    times = {name: (other / name).stat().st_mtime_ns for name in kept}
    alone(monkeypatch, "03", ["--run", other, "--device", "cpu"])
    assert shards(other) == one
    assert times == {name: (other / name).stat().st_mtime_ns for name in kept}


def test_two_processes_train_as_one_and_continue(features, models, tmp_path, monkeypatch):
    argv = ["--model", models["llama"], *TRAIN]
    one, two = (new_run(tmp_path / name, features) for name in ("one", "two"))
    alone(monkeypatch, "02", ["--run", one, *argv])
    code, log = two_processes(tmp_path, "02_train_teacher", ["--run", two, *argv], die_at=2)
    assert code != 0 and (two / "teacher" / "checkpoint.safetensors").exists() and not (two / "teacher" / "teacher.json").exists(), log
    code, log = two_processes(tmp_path, "02_train_teacher", ["--run", two, *argv])
    assert code == 0, log
    assert "continuing at step 4" in log and "2 process(es)" in log
    losses = [[line.get("loss", line.get("held_out_loss")) for line in map(json.loads, (run / "teacher" / "training_log.jsonl").read_text().splitlines())] for run in (one, two)]
    assert len(losses[0]) == 14  # 2 epochs of 6 steps, and an evaluation after each
    np.testing.assert_allclose(losses[1], losses[0], atol=2e-4)
    a, b = (load_file(run / "teacher" / "adapter" / "adapter_model.safetensors") for run in (one, two))
    assert a.keys() == b.keys() and max((a[k] - b[k]).abs().max() for k in a) < 1e-3
