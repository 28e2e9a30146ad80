"""Each stage killed with SIGKILL at random moments and at renames of files, then finished: the same files as
an undisturbed run's.

    KILL_ENDS=20 python -m pytest tests/test_kill.py   an end after every kill: 100 of each
"""

import multiprocessing
import os
import shutil
import signal
import sys
import time

import kill_child
import numpy as np
import pytest
from helpers import TOY_MODELS, synthetic

from lib.stages.files import read_json

KILLS, ENDS = 10, 1  # kills before an end, ends a stage
if "KILL_ENDS" in os.environ:
    KILLS, ENDS = 1, int(os.environ["KILL_ENDS"])
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["kill_child"])
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # where the fork server looks for it


@pytest.fixture(scope="module", autouse=True)
def warm():
    """The fork server has imported everything before the first time is taken."""
    child = server.Process(target=time.time)
    child.start()
    child.join()


def start(number, argv, log, rename=None, after=None):
    """Runs a stage in a child; `after`: killed so many seconds later. Returns its exit code."""
    child = server.Process(target=kill_child.work, args=(number, [str(a) for a in argv], str(log), rename))
    child.start()
    child.join(after)
    if child.is_alive():
        child.kill()
    child.join()
    return child.exitcode


def content(folder):
    """{file: bytes} of what a stage made, hidden files of the run directory included; of stage.json all but
    the time it took."""
    files = {}
    for path in sorted(folder.parent.rglob("*")):
        name = path.relative_to(folder.parent).as_posix()
        ours = name.startswith((folder.name + "/", f".{folder.name}."))
        if path.is_file() and ours:
            files[name] = path.read_bytes() if ".lock" not in name else b""
    about = read_json(folder / "stage.json")
    assert about["finished"]
    timed = ("seconds", "digest")
    files[f"{folder.name}/stage.json"] = {k: v for k, v in about.items() if k not in timed}
    return files


def killed_and_finished(number, argv, undisturbed, disturbed, folder, tmp_path, seed):
    """Kills the stage on `disturbed` again and again, lets it end, and compares."""
    rng, log = np.random.default_rng(seed), tmp_path / "log"
    begin = time.time()
    assert start(number, ["--run", undisturbed, *argv], log) == 0, log.read_text()
    seconds, renames = time.time() - begin, int(log.read_text().rsplit("renames: ", 1)[1])
    one = content(undisturbed / folder)
    for end in range(ENDS):
        if end:
            shutil.rmtree(disturbed / folder)
        done = 0
        while done < KILLS:
            if (done + end) % 2:
                how = {"after": rng.uniform(0.1, 0.9) * seconds}
            else:
                which = int(rng.integers(1, max(2, renames // min(KILLS, 2))))
                how = {"rename": (which, ["before", "after"][rng.integers(2)])}
            code = start(number, ["--run", disturbed, *argv], log, **how)
            assert code in (0, -signal.SIGKILL), log.read_text()
            done += code != 0
            if code == 0:  # it was done before the moment came: once more from the beginning
                shutil.rmtree(disturbed / folder)
        assert start(number, ["--run", disturbed, *argv], log) == 0, log.read_text()
        other = content(disturbed / folder)
        assert one.keys() == other.keys()
        assert [name for name in one if one[name] != other[name]] == []


def two_runs(tmp_path, make):
    for name in ("undisturbed", "disturbed"):
        (tmp_path / name).mkdir()
        make(tmp_path / name)
    return tmp_path / "undisturbed", tmp_path / "disturbed"


def test_01_killed(toy, models, tmp_path):
    models_of_01 = ["--caption-model", TOY_MODELS / "blip", "--text-encoder", models["bert"]]
    argv = ["--data", toy, *models_of_01, "--shard-rows", "250", "--image-batch", "16", "--device", "cpu"]
    killed_and_finished("01", argv, *two_runs(tmp_path, lambda run: None), "features", tmp_path, seed=1)


@pytest.fixture(scope="module")
def trained(features, models, tmp_path_factory):
    """02 on an undisturbed and on a killed run, compared."""
    folder = tmp_path_factory.mktemp("killed")
    runs = two_runs(folder, lambda run: (run / "features").symlink_to(features))
    argv = [
        "--model",
        models["llama"],
        "--rows",
        "64",
        "--epochs",
        "3",
        "--batch-size",
        "8",
        "--max-tokens",
        "48",
    ]
    argv += ["--checkpoint-steps", "2", "--lora-dropout", "0.1", "--device", "cpu"]
    killed_and_finished("02", argv, *runs, "teacher", folder, seed=2)
    return runs


def test_02_killed(trained):
    assert all((run / "teacher" / "head.safetensors").exists() for run in trained)


@pytest.fixture(scope="module")
def labelled(trained, tmp_path_factory):
    killed_and_finished(
        "03", ["--device", "cpu"], *trained, "labels", tmp_path_factory.mktemp("labels"), seed=3
    )
    return trained


def test_03_killed(labelled):
    assert all((run / "labels" / "labelled.parquet").exists() for run in labelled)


def test_05_killed(labelled, tmp_path):
    for run in labelled:
        argv = ["--run", run, "--epochs", "1", "--device", "cpu"]
        assert start("04", argv, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    killed_and_finished("05", ["--resamples", "100"], *labelled, "report", tmp_path, seed=5)


def test_04_killed(tmp_path):
    runs = two_runs(tmp_path, lambda run: synthetic(run, shards=6, shard_rows=300))
    argv = ["--epochs", "4", "--batch-size", "32", "--shuffle-window", "2", "--checkpoint-steps", "3"]
    argv += ["--device", "cpu"]
    killed_and_finished("04", argv, *runs, "student", tmp_path, seed=4)
