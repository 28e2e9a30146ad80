"""02 and 03 in two processes under `accelerate launch`: the same labels, the same training, and a restart
continues."""

import json
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT, environment, stage
from safetensors.torch import load_file

from common import Teacher

labeller = stage("03")

# Runs a stage without dropout, which is drawn per process; dies at the n-th checkpoint if n is not 0.
CHILD = """
import importlib, os, sys
sys.path.insert(0, {root!r})
from common import Teacher
from runs import stage
Teacher.__init__.__defaults__ = (*Teacher.__init__.__defaults__[:-1], 0.0)
left, save = int(sys.argv[2]), stage.save_checkpoint
def counted(path, model, optimizer, train_state):
    global left
    save(path, model, optimizer, train_state)
    left -= optimizer is not None
    if left == 0 and optimizer is not None:
        os._exit(9)
stage.save_checkpoint = counted
stage.run_main(lambda: importlib.import_module(sys.argv[1]).main(sys.argv[3:]))
"""


def two_processes(tmp_path, module, argv, die_at=0):
    """Exit code and output of a stage in two processes, launched as on two GPUs (with --cpu, `accelerate
    launch` starts one, or asks for MPI); the stage's own --device cpu then makes them talk over gloo."""
    script = tmp_path / "child.py"
    script.write_text(CHILD.format(root=str(ROOT)))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--main_process_port", str(port), str(script), module, str(die_at), *map(str, argv)]
    options = {"capture_output": True, "text": True, "cwd": tmp_path, "timeout": 240}
    done = subprocess.run(launch, env=environment(threads=1), **options)
    return done.returncode, done.stdout + done.stderr


def alone(monkeypatch, number, argv):
    """A stage in this process, with as many threads and as little dropout as the two have."""
    defaults = Teacher.__init__.__defaults__
    monkeypatch.setattr(Teacher.__init__, "__defaults__", (*defaults[:-1], 0.0))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        stage(number).main([str(a) for a in argv])
    finally:
        torch.set_num_threads(before)


def losses_of(path):
    """Training and held-out losses in their order."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line.get("loss", line.get("held_out_loss")) for line in lines]


def new_run(folder, features):
    folder.mkdir()
    (folder / "features").symlink_to(features)
    return folder


TRAIN = ["--rows", "96", "--epochs", "2", "--batch-size", "16", "--batch-tokens", "256"]
TRAIN += ["--max-tokens", "48", "--checkpoint-steps", "2", "--device", "cpu"]


def shards(run):
    return {
        p.relative_to(run).as_posix(): p.read_bytes() for p in sorted((run / "labels").rglob("*.parquet"))
    }


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

    # killed after its fourth shard, continued by one process
    shutil.rmtree(other / "labels")
    written, write = [], labeller.write_labels

    def counted(path, labels):
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(path)
        write(path, labels)

    monkeypatch.setattr(labeller, "write_labels", counted)
    with pytest.raises(KeyboardInterrupt):
        alone(monkeypatch, "03", ["--run", other, "--device", "cpu"])
    monkeypatch.setattr(labeller, "write_labels", write)
    assert not (other / "labels").exists()
    times = {path.name: path.stat().st_mtime_ns for path in written}
    code, log = two_processes(tmp_path, "03_label", ["--run", other, "--device", "cpu"])
    assert code == 0 and f"of which {len(one) - 4} to label" in log, log
    assert shards(other) == one
    made = {p.name: p.stat().st_mtime_ns for p in (other / "labels").rglob("*.parquet")}
    assert times.items() <= made.items()


def test_two_processes_train_as_one_and_continue(features, models, tmp_path, monkeypatch):
    argv = ["--model", models["llama"], *TRAIN]
    one, two = (new_run(tmp_path / name, features) for name in ("one", "two"))
    alone(monkeypatch, "02", ["--run", one, *argv])
    code, log = two_processes(tmp_path, "02_train_teacher", ["--run", two, *argv], die_at=2)
    [work] = two.glob(".teacher.unfinished-*")
    assert code != 0 and (work / "checkpoint.pt").exists() and not (two / "teacher").exists(), log
    code, log = two_processes(tmp_path, "02_train_teacher", ["--run", two, *argv])
    assert code == 0, log
    assert "continuing at step 4" in log and "2 process(es)" in log
    losses = [losses_of(run / "teacher" / "training_log.jsonl") for run in (one, two)]
    assert len(losses[0]) == 14  # 2 epochs of 6 steps, and an evaluation after each
    np.testing.assert_allclose(losses[1], losses[0], atol=2e-4)
    a, b = (load_file(run / "teacher" / "adapter" / "adapter_model.safetensors") for run in (one, two))
    assert a.keys() == b.keys() and max((a[k] - b[k]).abs().max() for k in a) < 1e-3
