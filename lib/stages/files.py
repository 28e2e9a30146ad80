"""Files that are whole or absent, and their fingerprints."""

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

UNFINISHED = ".unfinished-"  # stands in the name of a folder in which a stage is at work
MAX_JSON = 1 << 30  # bytes
JOURNAL = ".made-"  # begins the names of files there that say what was written whole: name, bytes, hash


@contextlib.contextmanager
def whole_file(path):
    """Yields a temporary name beside `path`, renamed when the block ends well: `path` is whole or absent."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    yield temporary
    with open(temporary, "rb+") as f:
        os.fsync(f.fileno())
    note_made(path, temporary)
    os.replace(temporary, path)


def note_made(path, content):
    """Notes what is written to a path of an unfinished folder (work_folder), in a journal beside it."""
    work = next((folder for folder in path.parents if UNFINISHED in folder.name), None)
    if work is not None:
        made = [path.relative_to(work).as_posix(), content.stat().st_size, fingerprint(content)]
        with open(work / f"{JOURNAL}{os.environ.get('RANK', '0')}", "a", encoding="utf-8") as journal:
            journal.write(json.dumps(made) + "\n")


def drop_damaged(work):
    """Removes from an unfinished folder all that is not as it was written: half a file, a damaged or a
    strange one. A damaged one is named."""
    known = set()
    for journal in filter(is_plain_file, work.glob(f"{JOURNAL}*")):
        for line in journal.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, TypeError):  # a last line that was cut
                known.add(tuple(json.loads(line)))
    names = {name for name, *_ in known}
    for path in sorted(work.rglob("*")):
        name, plain = path.relative_to(work).as_posix(), is_plain_file(path)
        folder = path.is_dir() and not path.is_symlink() and name not in names
        if folder or (plain and name.startswith(JOURNAL)):
            continue
        if not (plain and (name, path.stat().st_size, fingerprint(path)) in known):
            if name in names:
                print(f"{path}: not as it was written, it is made again")
            remove(path)


def stamps(folder, paths):
    """[[path below the folder, inode, bytes, time of the last write]] of files: other stamps, other content,
    perhaps only for a while."""
    found = []
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            state = os.stat(path)
            found.append([str(path.relative_to(folder)), state.st_ino, state.st_size, state.st_mtime_ns])
    return found


def is_plain_file(path):
    """Is it a regular file, and no link to one?"""
    return path.is_file() and not path.is_symlink()


def write_json(path, value):
    """A value -> a JSON file; an object as the dict of its attributes."""
    text = json.dumps(value, indent=1, ensure_ascii=False, default=vars)
    with whole_file(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def write_jsonl(path, rows):
    """A list of values -> a file of one JSON value a line."""
    with whole_file(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_parquet(path, columns, **options):
    """A dict of columns, or an Arrow table -> a Parquet file."""
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    with whole_file(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", **options)


def read_json(path):
    """The value of a JSON file. ValueError if it is none, or no regular file of a size that one may have."""
    path = Path(path)
    if path.exists() and not (path.is_file() and path.stat().st_size < MAX_JSON):
        raise ValueError(f"{path}: no file of JSON")
    return json.loads(path.read_text(encoding="utf-8"))


def fingerprint(path):
    """Hash of a file's content."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def hashed(value):
    """Hash of a JSON value, whatever the order of its keys."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def list_files(folder, without=()):
    """{name: {"bytes", "hash"; of Parquet "rows"}} of a folder's files but stage.json; `without`: top-level
    names."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name.split("/")[0] not in without and not name.startswith(("stage.json", JOURNAL)):
            found[name] = {"bytes": path.stat().st_size, "hash": fingerprint(path)}
            if path.suffix == ".parquet":
                found[name]["rows"] = pq.read_metadata(path).num_rows
    return found


def link_or_copy(source, target):
    """A hard link, or a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def link_whole(source, target):
    """Likewise; `target` is whole or absent."""
    temporary = target.with_name(f".{target.name}.tmp")
    remove(temporary)
    target.parent.mkdir(parents=True, exist_ok=True)
    link_or_copy(source, temporary)
    os.replace(temporary, target)
    remove(temporary)  # replace() leaves it where both are one file


def remove(path):
    """Removes a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def public_name(model):
    """A hub id as it is, a model folder by its last name, without its path."""
    return Path(model).name if Path(model).is_absolute() or Path(model).is_dir() else model
