"""Folders that stages have finished: found, checked against what was written, and locked while they are read.
Their stage.json holds the hash of every file, and one of its own."""

import contextlib
import fnmatch
import json
import os
import shlex
import sqlite3
from pathlib import Path

import filelock

from lib.stages.files import UNFINISHED, fingerprint, hashed, is_plain_file, read_json
from lib.stages.terminal import Stop, first_line, stop_on_error

READ_ALL = (".parquet", ".npy")  # stages read whatever lies in a folder under such a name
NOT_AS_WRITTEN = "not what its stage wrote"


class Finished(dict):
    """stage.json of a finished stage; holds a lock on its folder as long as it lives."""


def require_finished(folder, command, reads=("*",)):
    """stage.json of an earlier stage. Stop, naming `command`, if it is missing or unfinished, or if one of
    its files whose name fits a pattern of `reads` is not what the stage wrote."""
    about = Finished(read_about(folder, damaged_is_fine=True))
    if not about:
        wrong = f"{folder}: missing or unfinished"
        if os.path.lexists(folder / "stage.json"):
            wrong = f"{folder / 'stage.json'}: {NOT_AS_WRITTEN}"
        raise Stop(f"{wrong}; make it with: {remake(folder, command)}")
    about.lock = hold(folder, "read")
    if os.environ.get("RANK", "0") == "0":  # of several processes the first one checks
        check_files(folder, about, reads, command)
    return about


def check_files(folder, about, reads, command=None):
    """Stop, naming `command`, if a file of a finished folder (`about`: its stage.json) whose name fits a
    pattern of `reads` is not as it was written. Without a command: the stage itself was asked again."""
    again = f"make it again with: {remake(folder, command)}" if command else "--overwrite rebuilds all of it"
    made, found = about["outputs"], [path for path in folder.rglob("[!.]*.*") if path.suffix in READ_ALL]
    for name in sorted({path.relative_to(folder).as_posix() for path in found} | made.keys()):
        path = folder / name
        if not any(fnmatch.fnmatch(name, pattern) for pattern in reads):
            continue
        if name not in made:
            raise Stop(f"{path}: its stage did not write this file; remove it, or {again}")
        if not is_as_made(path, made[name]):
            wrong = NOT_AS_WRITTEN if path.is_file() else "missing"
            raise Stop(f"{path}: {wrong}; {again}")


def command_of_student(folder):
    """The command that makes a student's folder, if nobody has begun."""
    labels = " --labels human" * (folder.name == "student_human_labels")
    return f"04_train_student.py --run {folder.parent} --name {folder.name}{labels}"


def remake(folder, command, without=()):
    """The command that makes a folder with the least work: unfinished work goes on with its flags,
    --overwrite stands only where a finished folder is replaced. command: SCRIPT --run RUN …, if nobody has
    begun. without: flags to leave out."""
    finished, about = os.path.lexists(folder / "stage.json"), read_about(folder, damaged_is_fine=True)
    begun = [] if finished else folder.parent.glob(f".{folder.name}{UNFINISHED}*/stage.json")
    for path in sorted(begun, key=lambda path: path.lstat().st_mtime):
        with contextlib.suppress(ValueError, TypeError, OSError, RecursionError):
            about = dict(read_json(path))
    if {"command", "stage"} <= about.keys():
        flags = [word for word in about["command"] if word not in without]
        if about["stage"] != folder.name:  # renamed since, or copied
            flags = [*flags, *command.partition(str(folder.parent))[2].split()]
        command = shlex.join([command.split()[0], "--run", str(folder.parent), *flags])
    return f"python {command}" + " --overwrite" * finished


def is_as_made(path, made):
    """Is a file what its stage wrote? made: {"bytes", "hash"}."""
    return path.is_file() and path.stat().st_size == made["bytes"] and fingerprint(path) == made["hash"]


def read_about(folder, damaged_is_fine=False):
    """stage.json of a finished folder, checked. damaged_is_fine: {} if it is damaged or not there."""
    path = Path(folder) / "stage.json"
    errors = (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError, RecursionError)
    with contextlib.suppress(*errors):
        about = dict(read_json(path))
        kinds = {"finished": bool, "identity": str, "arguments": dict, "inputs": dict, "outputs": dict}
        whole = about.get("digest") in (None, sealed(about)["digest"])
        for name, made in about["outputs"].items():
            inside = not Path(name).is_absolute() and ".." not in Path(name).parts
            whole &= inside and {"bytes", "hash"} <= dict(made).keys()
        if whole and about["finished"] and all(isinstance(about[key], kinds[key]) for key in kinds):
            return about
    if damaged_is_fine:
        return {}
    raise Stop(f"{path}: {NOT_AS_WRITTEN}; --overwrite makes {folder} again")


def sealed(about):
    """A finished stage.json with the hash of everything that stands in it."""
    about = {key: value for key, value in about.items() if key != "digest"}
    return {**about, "digest": hashed(json.loads(json.dumps(about)))}


def hold(folder, mode):
    """A lock on a stage's folder: 'write' for the one that makes it, 'read' for those that read it. Released
    when the returned object goes. None where no lock can be written: such a folder is read only."""
    with stop_on_error(f"--run {folder.parent}: no folder can be made there"):
        folder = folder.resolve()
        folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f".{folder.name}.lock")
    if os.path.lexists(path) and not is_plain_file(path):
        raise Stop(f"{path}: no lock of ours (not a regular file); remove it")
    if mode == "read" and not os.access(folder.parent, os.W_OK):
        return None
    lock = filelock.ReadWriteLock(path, timeout=0, blocking=False, is_singleton=False)
    try:
        (lock.acquire_write if mode == "write" else lock.acquire_read)()
    except filelock.Timeout:
        other = "is at work here or reads it" if mode == "write" else "is rebuilding it"
        raise Stop(f"{folder}: another process {other}; wait for it, or use another --run") from None
    except (sqlite3.DatabaseError, ValueError) as error:  # filelock's file is a database, nothing is in it
        raise Stop(f"{path}: no lock of ours ({first_line(error)}); remove this file") from None
    return lock
