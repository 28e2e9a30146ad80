"""Files that are whole or absent, and their fingerprints."""

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


@contextlib.contextmanager
def whole_file(path):
    """Yields a temporary name beside `path`, renamed when the block ends well: `path` is whole or absent."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    yield temporary
    with open(temporary, "rb+") as f:
        os.fsync(f.fileno())
    os.replace(temporary, path)


def write_json(path, value):
    """A value -> a JSON file."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


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
    """The value of a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def fingerprint(path):
    """Hash of a file's content, or of a folder's files with their names."""
    path = Path(path)
    if path.is_file():
        with open(path, "rb") as f:
            return hashlib.file_digest(f, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    files = sorted(p for p in path.rglob("*") if p.is_file())
    return hashed([[str(p.relative_to(path)), fingerprint(p)] for p in files])


def hashed(value):
    """Hash of a JSON value, whatever the order of its keys."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def list_files(folder, without=()):
    """{name: {"bytes", "hash"; of Parquet "rows"}} of a folder's files but stage.json; `without`: top-level
    names."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder)
        if name.parts[0] not in without and str(name) != "stage.json":
            found[name.as_posix()] = {"bytes": path.stat().st_size, "hash": fingerprint(path)}
            if path.suffix == ".parquet":
                found[name.as_posix()]["rows"] = pq.read_metadata(path).num_rows
    return found


def link_or_copy(source, target):
    """A hard link, or a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def remove(path):
    """Removes a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
