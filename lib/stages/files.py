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
JOURNAL = ".made-"  # begins the names of files there that say what was written whole: hash and name


@contextlib.contextmanager
def whole_file(path):
    """Yields a temporary name beside `path`, renamed when the block ends well; an unfinished folder's journal
    notes it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    yield temporary
    with open(temporary, "rb+") as f:
        os.fsync(f.fileno())
    for work in [folder for folder in path.parents if UNFINISHED in folder.name]:
        with open(work / f"{JOURNAL}{os.environ.get('RANK', '0')}", "a", encoding="utf-8") as journal:
            journal.write(f"{fingerprint(temporary)} {json.dumps(path.relative_to(work).as_posix())}\n")
    os.replace(temporary, path)


def drop_damaged(work):
    """Removes from an unfinished folder all that is not as it was written, or strange. A damaged file is
    named."""
    journals = list(filter(is_plain_file, work.glob(f"{JOURNAL}*")))
    made = {line for journal in journals for line in journal.read_text(errors="replace").splitlines()}
    names = {line.partition(" ")[2] for line in made}
    for path in sorted(work.rglob("*")):
        name = json.dumps(path.relative_to(work).as_posix())
        folder = path.is_dir() and not path.is_symlink() and name not in names
        if folder or path in journals or (is_plain_file(path) and f"{fingerprint(path)} {name}" in made):
            continue
        if name in names:
            print(f"{path}: not as it was written, it is made again")
        remove(path)


def stamps(folder, paths):
    """[[path below the folder, inode, bytes, time of the last write]] of files: others, other content, if for
    a while."""
    states = [(str(path.relative_to(folder)), path.stat()) for path in paths if path.exists()]
    return [[name, state.st_ino, state.st_size, state.st_mtime_ns] for name, state in states]


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
    """{name: {"bytes", "hash"; of Parquet "rows"}} of a folder's files; `without`: top-level names."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name.split("/")[0] not in without and not name.startswith(("stage.json", JOURNAL)):
            found[name] = {"bytes": path.stat().st_size, "hash": fingerprint(path)}
            if path.suffix == ".parquet":
                found[name]["rows"] = pq.read_metadata(path).num_rows
    return found


def link(source, target):
    """A hard link, or a copy where the file system has none; `target` is whole or absent."""
    temporary = target.with_name(f".{target.name}.tmp")
    remove(temporary)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copy2(source, temporary)
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
