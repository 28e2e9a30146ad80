"""What attack.py attacks: a tiny run through all stages, and scripts that run in processes of their own."""

import functools
import importlib
import json
import multiprocessing
import os
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from runs.files import remove  # noqa: E402
from runs.terminal import run_main  # noqa: E402


class Step(NamedTuple):
    """A stage of the run."""

    script: str
    makes: str  # folder
    reads: tuple
    flags: dict


CPU = {"--device": "cpu"}
STUDENTS = ("student_human_labels", "student")
STEPS = (
    Step("01_build_features", "features", (), {"--shard-rows": "88", "--caption-tokens": "4", **CPU}),
    Step("02_train_teacher", "teacher", ("features",), {"--epochs": "1", "--rows": "32", **CPU}),
    Step("03_label", "labels", ("features", "teacher"), CPU),
    Step("04_train_student", STUDENTS[0], ("features",), {"--labels": "human", "--epochs": "1", **CPU}),
    Step("04_train_student", STUDENTS[1], ("features", "labels"), {"--epochs": "1", **CPU}),
    Step(
        "05_evaluate",
        "report",
        ("features", "labels", "teacher", *STUDENTS),
        {"--resamples": "20", "--search-pages": "1"},
    ),
)
STAGES = {step.script[:2]: step for step in STEPS}  # of 04 the main student


# ------------------------------------------------------------------------------------------------------------
# Scripts in processes of their own

server = multiprocessing.get_context("forkserver")
MODELS = [f"transformers.models.{kind}.modeling_{kind}" for kind in ("bert", "blip", "llama")]
IMPORTED = [*(step.script for step in STEPS), "runs.search", *MODELS, "accelerate", "bitsandbytes", "peft"]


def prepare_server(modules=IMPORTED):
    """The server of processes imports once what the scripts import."""
    os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1", OMP_NUM_THREADS="1")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    server.set_forkserver_preload(list(modules))


class Ended(NamedTuple):
    """How a script ended. code: None if it was still at work after the time it had."""

    code: int | None
    out: str
    err: str

    def last_line(self):
        """The end of what it printed."""
        said = (self.err or self.out).splitlines() or ["nothing"]
        return f"{said[-1][:200]} (exit status {self.code})"


def work(script, argv, folder):
    """main(argv) of a script, as its command would run it in `folder`; what it prints goes into two files."""
    os.chdir(folder)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    torch.set_num_threads(1)
    run_main(functools.partial(importlib.import_module(script).main, argv))


def start(script, argv, folder, limit=None):
    """Runs a script with its output in `folder`, made anew, `limit` seconds at most."""
    remove(folder)
    folder.mkdir()
    argv = [str(word) for word in argv]
    child = server.Process(target=work, args=(script, argv, folder))
    child.start()
    child.join(limit)
    code = child.exitcode
    child.kill()
    child.join()
    out, err = ((folder / name).read_text(errors="replace") for name in ("out", "err"))
    return Ended(code, out, err)


def refusal(ended, names, lines=1):
    """How a script ended that did not end well: "clear" (a line, or `lines`, with one of the names in it),
    "unclear", or "traceback", as which a signal counts too."""
    if "Traceback" in ended.err or (ended.code or 0) < 0:
        return "traceback"
    whole_word = (rf"(?<![\w.]){re.escape(name)}(?!\w)" for name in names)
    named = any(re.search(word, ended.err) for word in whole_word)
    return "clear" if named and len(ended.err.splitlines()) <= lines else "unclear"


# ------------------------------------------------------------------------------------------------------------
# The run, and what is in it


def command(step, run, flags=()):
    """A step's script and argv. flags: {flag: its value; None: a switch}."""
    told = {"--run": run, **step.flags, **dict(flags)}
    argv = []
    for flag, value in told.items():
        argv += [flag] if value is None else [flag, value]
    return step.script, argv


def make(root, script, argv):
    """Runs a script that must succeed; returns what it prints."""
    ended = start(script, argv, root / "here")
    if ended.code:
        raise SystemExit(f"error: {script}: {ended.last_line()}")
    return ended.out


def make_run(root, scale):
    """The toy dataset root/data, and a run of it through all stages, root/whole. At scale 0.02 the
    shards are full: in one that grows, labels made with other rows beside them differ in their last bits."""
    make(root, "data.make_toy", ["--scale", scale, "--out", root / "data"])
    for step in STEPS:
        flags = {"--data": root / "data"} if step.makes == "features" else {}
        make(root, *command(step, root / "whole", flags))
    return root / "whole"


def copied(source, target):
    """A copy of a run in the place of an older one."""
    remove(target)
    return shutil.copytree(source, target)


def contents(folder):
    """{file: its bytes} of a folder, hidden files left out; of stage.json and report.md without the time."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not name.startswith("."):
            found[name] = untimed(path.name, path.read_bytes())
    return found


def untimed(name, content):
    """A file's content without when it was made, and how long that took."""
    if name == "report.md":
        return [line for line in content.split(b"\n") if not line.startswith(b"- made: ")]
    if name == "stage.json":
        try:
            about = dict(json.loads(content))
        except (ValueError, TypeError):  # damaged
            return content
        return {key: value for key, value in about.items() if key not in ("seconds", "digest")}
    return content
