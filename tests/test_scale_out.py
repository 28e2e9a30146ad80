"""01 to 03 in two processes, and on two machines: the same features, labels and training as in one, and a
restart continues."""

import contextlib
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
from types import SimpleNamespace

import kill_child
import numpy as np
import pytest
import torch
from helpers import ROOT, STAGES, TOY_MODELS, environment, stage, stop_line
from safetensors.torch import load_file
from test_kill import content

from common import Teacher
from lib.inputs.known import FILE, LabelTable
from lib.inputs.pairs import read_labels
from lib.stages import processes
from lib.stages.files import list_files

labeller = stage("03")

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["kill_child"])
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # where the fork server looks for it


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def launch(tmp_path, launcher, *script):
    """A launcher at work; communicate() has its output."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": tmp_path}
    argv = [sys.executable, "-m", *launcher, *map(str, script)]
    return subprocess.Popen(argv, env=environment(threads=1), **options)


def two_processes(tmp_path, number, argv, die_at=0):
    """Exit codes and output of a stage in two processes, as a launcher starts them, without its overhead."""
    port, log = free_port(), tmp_path / "log"
    log.unlink(missing_ok=True)
    children = []
    for rank in range(2):
        arguments = (rank, port, number, [str(a) for a in argv], str(log), die_at if rank == 0 else 0)
        children.append(server.Process(target=kill_child.work_as, args=arguments))
        children[-1].start()
    children[0].join()
    children[1].join(2 if children[0].exitcode else None)
    if children[1].is_alive():  # a launcher ends the others
        children[1].kill()
        children[1].join()
    return [child.exitcode for child in children], log.read_text()


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


def test_two_processes_make_the_features_of_one(toy, models, tmp_path, monkeypatch):
    """Killed within the captions and within the embeddings, continued by one process."""
    argv = ["--data", toy, "--caption-model", TOY_MODELS / "blip", "--text-encoder", models["bert"]]
    one, two, parts = tmp_path / "one", tmp_path / "two", []
    for die_at in (2, 5):  # of 7 chunks of captions, 3 of queries' texts, 7 of pins' texts, in both processes
        codes, log = two_processes(tmp_path, "01", ["--run", two, *argv], die_at)
        [work] = two.glob(".features.unfinished-*")
        assert codes[0] == 9 and codes[1] and "Traceback" not in log, log
        parts.append({p.relative_to(work): p.stat().st_mtime_ns for p in work.rglob("part-*.parquet")})
    assert parts[0].items() < parts[1].items() and {p.parts[0] for p in parts[1]} == {"captions", "work"}
    monkeypatch.setattr(stage("01"), "CHUNK", 16)
    for run in (one, two):
        alone(monkeypatch, "01", ["--run", run, *argv])
    assert content(two / "features") == content(one / "features")
    made = {path: (two / "features" / path).stat().st_mtime_ns for path in parts[0]}
    assert made == parts[0]  # not one picture was captioned twice


TRAIN = ["--rows", "96", "--epochs", "2", "--batch-size", "16", "--batch-tokens", "256"]
TRAIN += ["--max-tokens", "48", "--checkpoint-steps", "2"]


def shards(run):
    return {p.relative_to(run).as_posix(): read_labels(p) for p in sorted(run.glob("labels/**/*.parquet"))}


@pytest.fixture(scope="module")
def labelled(features, models, tmp_path_factory):
    """A run labelled by one process."""
    run = new_run(tmp_path_factory.mktemp("labelled") / "one", features)
    with pytest.MonkeyPatch.context() as patch:
        alone(patch, "02", ["--run", run, "--model", models["llama"], *TRAIN, "--epochs", "1"])
        alone(patch, "03", ["--run", run, "--device", "cpu"])
    return run


MACHINE = """
import importlib, json, sys
sys.path.insert(0, {root!r})
from common import Teacher
Teacher.__init__.__defaults__ = (*Teacher.__init__.__defaults__[:-1], 0.0)  # dropout is drawn per process
for script, argv in json.loads({stages!r}):
    importlib.import_module(script).main(argv)
"""


def test_two_machines_with_a_shared_folder(labelled, toy, models, tmp_path):
    """Two launches on the loopback address, 01 to 03 in each."""
    run, bert, blip = ["--run", str(tmp_path / "run")], str(models["bert"]), str(TOY_MODELS / "blip")
    build = ["--data", str(toy), "--caption-model", blip, "--text-encoder", bert, "--shard-rows", "300"]
    train = ["--model", str(models["llama"]), *TRAIN, "--epochs", "1"]
    flags = {"01": build, "02": train, "03": []}
    stages = [(STAGES[number], [*run, *flags[number], "--device", "cpu"]) for number in flags]
    script, port = tmp_path / "machine.py", free_port()
    script.write_text(MACHINE.format(root=str(ROOT), stages=json.dumps(stages)))
    machines = []
    for rank in ("0", "1"):
        argv = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "2"]
        argv += ["--machine_rank", rank, "--main_process_ip", "127.0.0.1", "--main_process_port", port]
        argv += ["--mixed_precision", "no", "--dynamo_backend", "no"]
        machines.append(launch(tmp_path, argv, script))
    logs = [machine.communicate()[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], logs
    assert logs[0].count("wrote ") == 3 and "2 process(es)" in logs[0] and "wrote " not in logs[1], logs
    ours, theirs = (list_files(folder / "features") for folder in (tmp_path / "run", labelled))
    assert ours == theirs
    one, two = shards(labelled), shards(tmp_path / "run")
    assert two.keys() == one.keys()
    for name in one:
        np.testing.assert_allclose(two[name], one[name], atol=2e-3)


def test_two_processes_continue_what_one_began_to_label(labelled, tmp_path, monkeypatch):
    """Killed after its fourth shard, continued by two: the labels of one alone."""
    other = tmp_path / "two"
    shutil.copytree(labelled, other, symlinks=True, ignore=shutil.ignore_patterns("labels", ".*"))
    written, write = [], labeller.write_labels

    def counted(path, labels, key):
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(path)
        write(path, labels, key)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(labeller, "write_labels", counted)
        alone(monkeypatch, "03", ["--run", other])
    assert not (other / "labels").exists()
    times = {path.name: path.stat().st_mtime_ns for path in written}
    codes, log = two_processes(tmp_path, "03", ["--run", other])
    one = shards(labelled)
    assert codes == [0, 0] and f"of which {len(one) - 4} to label" in log and "2 process(es)" in log, log
    two = shards(other)
    assert len(one) > 6 and two.keys() == one.keys()
    for name in one:  # a pair of two shards has one pass a process, in other company
        np.testing.assert_allclose(two[name], one[name], atol=1e-6)
    assert LabelTable(other / "labels" / FILE).rows == LabelTable(labelled / "labels" / FILE).rows
    made = {p.name: p.stat().st_mtime_ns for p in (other / "labels").rglob("*.parquet")}
    assert times.items() <= made.items()


def test_two_processes_look_labels_up_in_the_same_tables(labelled, tmp_path):
    """A table of an earlier run that is damaged serves neither, not the main process alone."""
    earlier, run = tmp_path / "earlier", tmp_path / "run"
    shutil.copytree(labelled, earlier, symlinks=True, ignore=shutil.ignore_patterns(".*"))
    shutil.copytree(labelled, run, symlinks=True, ignore=shutil.ignore_patterns("labels", ".*"))
    table = earlier / "labels" / FILE
    content = bytearray(table.read_bytes())
    (_, labels), *_ = LabelTable(table).between(b"", b"\xff" * 16)
    place = content.index(labels.tobytes())
    content[place : place + labels.nbytes] = (labels[:, ::-1]).tobytes()
    table.write_bytes(content)
    codes, log = two_processes(tmp_path, "03", ["--run", run, "--known", earlier])
    assert codes == [0, 0] and log.count(f"not looked up: {table}: not what its stage wrote") == 1, log
    assert json.loads((run / "labels" / "stage.json").read_text())["labels"]["looked_up"] == {}
    table.unlink()
    codes, log = two_processes(tmp_path, "03", ["--run", run, "--known", earlier, "--overwrite"])
    assert codes == [0, 0] and "missing" in log and "Traceback" not in log, log


def test_a_launch_that_starts_one_process_is_refused(monkeypatch, tmp_path):
    """`accelerate launch --cpu --num_processes 2` sets an address and starts one process."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for number in ("02", "03"):
        assert "torchrun --nproc_per_node" in stop_line(stage(number).main, ["--run", str(tmp_path)])


def test_torchrun_takes_run_for_its_own_option_unless_dashes_stand_before(tmp_path):
    """The line for CPUs in runs/paper.sh."""
    script = tmp_path / "script.py"
    script.write_text("import sys; print(sys.argv[1:])")
    log = launch(tmp_path, ["torch.distributed.run"], "--", script, "--run", "X").communicate()[0]
    assert "['--run', 'X']" in log


def test_two_processes_train_as_one_and_continue(features, models, tmp_path, monkeypatch):
    argv = ["--model", models["llama"], *TRAIN]
    one, two = (new_run(tmp_path / name, features) for name in ("one", "two"))
    alone(monkeypatch, "02", ["--run", one, *argv])
    codes, log = two_processes(tmp_path, "02", ["--run", two, *argv], die_at=2)
    [work] = two.glob(".teacher.unfinished-*")
    assert codes[0] == 9 and (work / "checkpoint.pt").exists() and not (two / "teacher").exists(), log
    codes, log = two_processes(tmp_path, "02", ["--run", two, *argv])
    assert codes == [0, 0], log
    assert "continuing at step 4" in log and "2 process(es)" in log
    losses = [losses_of(run / "teacher" / "training_log.jsonl") for run in (one, two)]
    assert len(losses[0]) == 14  # 2 epochs of 6 steps, and an evaluation after each
    np.testing.assert_allclose(losses[1], losses[0], atol=2e-4)
    a, b = (load_file(run / "teacher" / "adapter" / "adapter_model.safetensors") for run in (one, two))
    assert a.keys() == b.keys() and max((a[k] - b[k]).abs().max() for k in a) < 1e-3


def process(number):
    """An Accelerator of two, without another process."""
    return SimpleNamespace(is_main_process=number == 0, process_index=number, num_processes=2)


def test_all_end_as_the_main_process_ends(monkeypatch):
    sent = []
    monkeypatch.setattr(processes, "of_main", lambda order: sent.append(order) or order)
    monkeypatch.setattr(processes, "wait_for_all", lambda *_: None)

    def work(share):
        assert share("a", 5) == [(0, 2), 5]
        share("wrong", 5)

    jobs = {"a": lambda *args: [*args], "wrong": lambda *args: 1 / 0}
    with pytest.raises(ZeroDivisionError):
        processes.lead(process(0), work, jobs)
    assert sent == [("a", (5,)), ("wrong", (5,))]  # the others are at work, and wait for no order
    sent.clear()
    with pytest.raises(ZeroDivisionError):
        processes.lead(process(0), lambda share: 1 / 0, jobs)
    assert sent == [(None, "failed")]


def test_the_others_do_what_the_main_process_shares(monkeypatch):
    done, jobs = [], {"a": lambda *args: done.append(args) or []}
    monkeypatch.setattr(processes, "wait_for_all", lambda *_: None)
    for end, ends in (("well", contextlib.nullcontext()), ("failed", pytest.raises(SystemExit))):
        orders = iter([("a", (5,)), (None, end)])
        monkeypatch.setattr(processes, "of_main", lambda value, orders=orders: next(orders))
        with ends:
            processes.lead(process(1), None, jobs)
    assert done == [((1, 2), 5)] * 2


def test_a_folder_that_is_not_shared_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "SEEN", 0)
    here = SimpleNamespace(wait_for_everyone=lambda: None)
    processes.wait_for_all(here, [tmp_path])
    assert "shared folder" in stop_line(processes.wait_for_all, here, [tmp_path, tmp_path / "part"])
