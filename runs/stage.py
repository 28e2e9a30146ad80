"""What makes a stage resumable: folder, lock, identity, checkpoints, one-line errors.

No method of the paper is in this file: a reader of the paper may skip it.

A stage writes into a hidden folder, RUN/.NAME.unfinished-ID, which takes the place of RUN/NAME once it is
complete. ID is the hash of the stage's settings and of the content of what it reads. So a killed stage
continues its own work and no other's, and RUN/NAME is always whole: what --overwrite replaces stays until
then.
"""

import contextlib
import dataclasses
import errno
import fnmatch
import importlib.metadata
import json
import os
import sqlite3
import sys
import time
import warnings
from pathlib import Path

import filelock
import torch
from tqdm import tqdm

from runs.files import (
    fingerprint,
    hashed,
    link_or_copy,
    list_files,
    read_json,
    remove,
    whole_file,
    write_json,
)


class Stop(Exception):
    """Ends a stage with one line: what is wrong, where, and what to do."""


# ------------------------------------------------------------------------------------------------------------
# The folder of a stage

# Neither can change a result: these are not part of a folder's identity …
WITHOUT_EFFECT = {
    "preset",
    "run",
    "overwrite",
    "update",
    "device",
    "workers",
    "memory",
    "batch_tokens",
    "checkpoint_steps",
    "long_queries",
}
# … and of these it is the content that counts, which stands among the inputs.
PLACES = {"data", "model", "caption_model", "text_encoder", "precision"}


class Stage:
    """A stage's folder while it is made. Attributes: `done`: finished before, nothing to do; `work`: where to
    write; `old`: the finished folder that is going to be replaced, or None.

    stage.json holds `arguments` and `inputs` (fingerprints of what is read): together the folder's identity.
    Started again, a finished stage of the same identity is `done`, an unfinished one continues, and another
    identity is refused, naming what changed, unless --overwrite. `grows`: inputs and arguments that may
    change (where there is a flag --update: with it): the folder is then made anew, and the stage takes from
    `old` what still holds."""

    def __init__(self, folder, settings, inputs, main=True, grows=()):
        self.folder, self.main, self.grows, self.start = Path(folder), main, grows, time.time()
        self.about = self.describe(settings, inputs)
        self.done, self.old, self.old_outputs, self.intermediate = False, None, {}, set()
        unfinished = f".{self.folder.name}.unfinished-"
        self.work = self.folder.with_name(unfinished + self.about["identity"][:8])
        if not main:  # another process of the same launch holds the lock and has checked
            return
        self.refuse_strangers(settings)
        self.lock = hold(self.folder, "write")
        try:
            self.begin(settings)
        except BaseException:
            self.lock = None
            raise

    def begin(self, settings):
        """Finds out whether anything is left to do, and makes the work folder ready for it."""
        self.recover()
        if self.folder.exists():
            self.compare(read_about(self.folder, settings.overwrite), settings)
            if self.done:
                return
        for temporary in list(self.work.rglob(".*")):  # half-written by a killed process
            remove(temporary)
        write_json(self.work / "stage.json", self.about)

    def describe(self, settings, inputs):
        """The first part of stage.json."""
        told = sorted(dataclasses.asdict(settings).items())
        told = {name: value for name, value in told if name not in WITHOUT_EFFECT}
        arguments = json.loads(json.dumps(told, default=str))
        packages = ("torch", "transformers", "numpy", "duckdb")
        return {
            "stage": self.folder.name,
            "finished": False,
            "arguments": arguments,
            "inputs": inputs,
            "identity": identity(arguments, inputs),
            "seed": arguments.get("seed"),
            "versions": {p: importlib.metadata.version(p) for p in packages},
        }

    def refuse_strangers(self, settings):
        """Stop if the folder is a link to another run's, or somebody's own."""
        if self.folder.is_symlink() and settings.overwrite:
            owner = self.folder.resolve()
            raise Stop(f"{self.folder} is a link to {owner}: make it anew there (--run {owner.parent})")
        if self.folder.exists() and not (self.folder / "stage.json").exists() and any(self.folder.iterdir()):
            raise Stop(f"{self.folder} is there and no stage made it: move it away, or use another --run")

    def recover(self):
        """Completes what a process left that was killed while it put a finished folder into its place."""
        if (self.work / "stage.json").exists():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                if read_json(self.work / "stage.json")["finished"]:
                    self.move_into_place()
        bring_back(self.folder)
        remove(aside_of(self.folder))

    def compare(self, before, settings):
        """The folder is there: is it what is asked for?"""
        if settings.overwrite:
            self.old, self.old_outputs = self.folder, before.get("outputs", {})
            return
        if before["identity"] == self.about["identity"]:
            check_files(self.folder, before, ["*"])
            self.done = True
            same = "finished before with the same arguments and inputs, nothing to do"
            print(f"{self.folder}: {same} (--overwrite makes it anew)")
            return
        was, now = (
            identity(about["arguments"], about["inputs"], self.grows) for about in (before, self.about)
        )
        update = getattr(settings, "update", None)  # None: a stage without this flag
        if was != now or update is False:
            changes = "; ".join(self.changes(before, without=self.grows if update else ()))
            offer = "--update takes in what is new, " if was == now else ""
            raise Stop(
                f"{self.folder} was made with other settings or inputs ({changes}); "
                f"{offer}--overwrite makes it anew, another --run keeps both"
            )
        print(f"{self.folder}: the {self.grown(before)} have changed; what still holds is kept")
        self.old, self.old_outputs = self.folder, before["outputs"]

    def changes(self, before, without=()):
        """What differs from the stage.json `before`, in words."""
        found = []
        for group, prefix in (("arguments", "--"), ("inputs", "")):
            for key in sorted({*before[group], *self.about[group]}.difference(without)):
                was, now = before[group].get(key), self.about[group].get(key)
                if was != now and not (group == "arguments" and (was or None) == (now or None)):
                    name = key.replace("_", "-") if prefix else key
                    found.append(f"{prefix}{name} was {was!r}, is {now!r}")
        return found

    def grown(self, before):
        """What has changed and may, in words."""
        was, now = ({**about["arguments"], **about["inputs"]} for about in (before, self.about))
        return ", ".join(name for name in self.grows if was.get(name) != now.get(name))

    def reuse(self, name):
        """Brings old/NAME (a cache keyed by content) into the work folder, by hard links if possible; without
        files that are not what the stage wrote."""
        if self.old is None or (self.work / name).exists():
            return
        temporary = self.work / f".{name}.tmp"
        for file, made in self.old_outputs.items():
            if file.startswith(f"{name}/") and is_as_made(self.old / file, made):
                target = temporary / Path(file).relative_to(name)
                target.parent.mkdir(parents=True, exist_ok=True)
                link_or_copy(self.old / file, target)
        if temporary.exists():
            os.replace(temporary, self.work / name)

    def discard(self, *names):
        """Marks files or folders of the work folder as intermediate results: finish() removes them."""
        self.intermediate |= set(names)

    def finish(self, **facts):
        """Writes the final stage.json, `facts` and the hash of every file in it; puts the folder into its
        place."""
        if not self.main:
            return
        outputs = list_files(self.work, self.intermediate)
        seconds = round(time.time() - self.start, 1)
        finished = {**self.about, **facts, "finished": True, "seconds": seconds, "outputs": outputs}
        write_json(self.work / "stage.json", sealed(finished))
        self.move_into_place()
        self.lock = None
        print(f"wrote {self.folder}  ({seconds:.0f} s)")

    def move_into_place(self):
        """The finished work folder, less its intermediate results, takes the place of what was there."""
        listed = {"stage.json", *read_json(self.work / "stage.json")["outputs"]}
        for path in sorted(self.work.rglob("*"), reverse=True):  # a folder comes after what is in it
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
            elif path.is_file() and str(path.relative_to(self.work)) not in listed:
                path.unlink()
        aside = aside_of(self.folder)
        if self.folder.exists():
            remove(aside)
            os.replace(self.folder, aside)
        os.replace(self.work, self.folder)
        remove(aside)
        for other in self.folder.parent.glob(f".{self.folder.name}.unfinished-*"):
            remove(other)


def aside_of(folder):
    """Where a finished folder is put while another one takes its place."""
    return folder.with_name(f".{folder.name}.old")


def bring_back(folder):
    """Puts a folder back that was put aside by a process that was killed before the new one was in place."""
    if aside_of(folder).exists() and not folder.exists():
        os.replace(aside_of(folder), folder)


def identity(arguments, inputs, without=()):
    """Hash of what decides a stage's result: its arguments, and the content of what it reads."""
    counted = {k: v for k, v in arguments.items() if k not in PLACES and k not in without and v is not False}
    return hashed([counted, {name: value for name, value in inputs.items() if name not in without}])


def start_processes(device):
    """The Accelerator: this process and those that were launched with it, which on CPUs talk over gloo."""
    from accelerate import Accelerator

    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        launch = "torchrun --nproc_per_node N -- SCRIPT --run RUN"
        raise Stop(f"accelerate launch --cpu starts one process where N were asked for; on CPUs: {launch}")
    return Accelerator(cpu=device.type == "cpu")


def sealed(about):
    """A finished stage.json with the hash of everything that stands in it."""
    about = {key: value for key, value in about.items() if key != "digest"}
    return {**about, "digest": hashed(json.loads(json.dumps(about)))}


def start_stage(accelerator, folder, settings, inputs, grows=()):
    """Stage for several processes: the main one takes the lock and decides for all. None: nothing to do."""
    from accelerate.utils import broadcast_object_list

    stage, verdict = None, ["go"]
    if accelerator.is_main_process:
        try:
            stage = Stage(folder, settings, inputs, grows=grows)
            verdict = ["done" if stage.done else "go"]
        except (Stop, OSError) as error:
            stage, verdict = error, ["stopped"]
    broadcast_object_list(verdict)
    if isinstance(stage, Exception):
        try:
            raise stage
        finally:
            stage = None  # its traceback names this frame: a circle that would keep the locks of all frames
    if verdict[0] == "stopped":
        sys.exit(1)  # the main process says why
    if verdict[0] == "done":
        return None
    return stage or Stage(folder, settings, inputs, main=False)


class Finished(dict):
    """stage.json of a finished stage; holds a lock on its folder as long as it lives."""


def require_finished(folder, command, reads=("*",)):
    """stage.json of an earlier stage. Stop, naming `command`, if it is missing or unfinished, or if one of
    its files whose name fits a pattern of `reads` is not what the stage wrote."""
    folder = Path(folder)
    if not (folder / "stage.json").exists():
        raise Stop(f"{folder}: missing or unfinished; make it with: python {command}")
    about = Finished(read_about(folder))
    about.lock = hold(folder, "read")
    if os.environ.get("RANK", "0") == "0":  # of several processes the first one checks
        check_files(folder, about, reads, command)
    return about


def check_files(folder, about, reads, command=None):
    """Stop, naming `command`, if a file of a finished folder (`about`: its stage.json) whose name fits a
    pattern of `reads` is not what the stage wrote. Without a command: the stage itself was asked again."""
    again = f"make it again with: python {command} --overwrite"
    if command is None:
        again = "--overwrite makes all of it anew"
    for name, made in about["outputs"].items():
        if any(fnmatch.fnmatch(name, pattern) for pattern in reads):
            path = folder / name
            if not path.is_file():
                raise Stop(f"{path}: missing; {again}")
            if not is_as_made(path, made):
                raise Stop(f"{path}: not what its stage wrote; {again}")


def is_as_made(path, made):
    """Is a file what its stage wrote? made: {"bytes", "hash"}."""
    return path.is_file() and path.stat().st_size == made["bytes"] and fingerprint(path) == made["hash"]


def read_about(folder, damaged_is_fine=False):
    """stage.json of a finished folder, checked. damaged_is_fine: it is going to be replaced."""
    path = Path(folder) / "stage.json"
    with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):
        about = dict(read_json(path))
        kinds = {"finished": bool, "identity": str, "arguments": dict, "inputs": dict, "outputs": dict}
        whole = about.get("digest") in (None, sealed(about)["digest"])  # earlier versions wrote none
        for name, made in about["outputs"].items():
            inside = not Path(name).is_absolute() and ".." not in Path(name).parts
            whole &= inside and {"bytes", "hash"} <= dict(made).keys()
        if whole and about["finished"] and all(isinstance(about[key], kinds[key]) for key in kinds):
            return about
    if damaged_is_fine:
        return {}
    raise Stop(f"{path}: not what its stage wrote; make {folder} again with --overwrite")


def hold(folder, mode):
    """A lock on a stage's folder: 'write' for the one that makes it, 'read' for those that read it. Released
    when the returned object goes. None where no lock can be written: such a folder is read only."""
    try:
        folder = Path(folder).resolve()
        folder.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        raise Stop(f"--run {folder.parent}: no folder can be made there ({first_line(error)})") from None
    path = folder.with_name(f".{folder.name}.lock")
    if mode == "read" and not os.access(folder.parent, os.W_OK):
        return None
    lock = filelock.ReadWriteLock(path, timeout=0, blocking=False, is_singleton=False)
    try:
        (lock.acquire_write if mode == "write" else lock.acquire_read)()
    except filelock.Timeout:
        other = "is at work here or reads it" if mode == "write" else "is making it anew"
        raise Stop(f"{folder}: another process {other}; wait for it, or use another --run") from None
    except (sqlite3.DatabaseError, ValueError) as error:  # filelock's file is a database, nothing is in it
        raise Stop(f"{path}: no lock of ours ({first_line(error)}); remove this file") from None
    return lock


# ------------------------------------------------------------------------------------------------------------
# Checkpoints


def save_checkpoint(path, model, optimizer, train_state):
    """Trainable weights, the optimizer's state (or None) and `train_state` (plain values) in one file."""
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    moments = optimizer.state_dict() if optimizer is not None else None
    with whole_file(path) as temporary, open(temporary, "wb") as f:
        torch.save({"weights": weights, "optimizer": moments, "train_state": train_state}, f)


@torch.no_grad()
def load_checkpoint(path, model, optimizer=None):
    """Puts a checkpoint's weights (and moments) in place; returns its train_state."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.copy_(saved["weights"][name])
    if optimizer is not None:
        optimizer.load_state_dict(saved["optimizer"])
    return saved["train_state"]


# ------------------------------------------------------------------------------------------------------------
# At the terminal


def run_main(main):
    """Runs a stage's main(). What went wrong: one line on stderr and exit status 1 (interrupted: 130)."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        main()
    except Stop as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        number = getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
            sys.exit("error: the disk is full; what was finished is whole, the same command continues")
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
            sys.exit(f"error: not enough memory ({first_line(error)}): smaller batches or models need less")
        if number in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
            sys.exit(f"error: {error.filename}: cannot be written ({error.strerror})")
        if number in (errno.ENAMETOOLONG, errno.ELOOP):
            sys.exit(f"error: {error.filename}: no usable path ({error.strerror})")
        raise


def first_line(error):
    """The first line of an exception's text, without control characters."""
    text = str(error).strip().split("\n")[0] or type(error).__name__
    return "".join(c for c in text if c.isprintable())[:300]


def progress_bar(**options):
    """tqdm; where nobody watches (output into a file), a line every half minute."""
    if not sys.stderr.isatty():
        line = "{desc}: {n_fmt} of {total_fmt}{unit}, {elapsed}, {rate_fmt}{postfix}\n"
        options = {"mininterval": 30, "maxinterval": 60, "bar_format": line, **options}
    return tqdm(**options)
