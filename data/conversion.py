"""What the converters share: a source is opened, queries are dealt, a dataset is written, or added to."""

import gzip
import sys
from pathlib import Path

import pyarrow as pa

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lib.stages.files import write_parquet  # noqa: E402
from lib.stages.streams import write_stream  # noqa: E402
from lib.stages.terminal import Stop  # noqa: E402
from lib.tables.files import list_skipped  # noqa: E402
from lib.tables.raw import RawTables, kinds_of  # noqa: E402
from lib.tables.splits import hash_position  # noqa: E402

NUMBERS = {"label": pa.int64(), "dwell_seconds": pa.float64()}  # types of columns; any other is text


def source_file(path, home):
    """The path, or NAME.gz in its place; Stop if neither is there. home: where to get it."""
    for found in (path, path.with_name(f"{path.name}.gz")):
        if found.is_file():
            return found
    raise Stop(f"{path}: missing, with or without .gz; get it from {home}")


def open_text(path, home):
    """A text file, gzipped or not."""
    path = source_file(path, home)
    opened = gzip.open if path.suffix == ".gz" else open
    return opened(path, "rt", encoding="utf-8", newline="")


def side_of(query, train_share, eval_share, salt):
    """Where a hash of the query deals it: 'train', 'eval', or 'hidden', whose labels become impressions."""
    position = hash_position(query, salt)
    if position < train_share:
        return "train"
    return "eval" if position < train_share + eval_share else "hidden"


def write_dataset(folder, tables, listed, skipped_columns, skipped):
    """{table: rows, in the order of the contract's columns} -> Parquet files; Stop if no label trains or
    none evaluates. listed: the CSV that names the rows that cannot be used, with their reasons."""
    lacking = {"train", "eval"} - {split for _, _, _, split, *_ in tables["labels"]}
    list_skipped(folder / listed, (*skipped_columns, "reason"), skipped)
    if lacking:
        sides = " and ".join(sorted(lacking))
        why = f"left out {len(skipped):,}, see {listed}"
        raise Stop(f"{folder}: no label for {sides}, stage 01 needs both; {why}")
    for name, rows in tables.items():
        columns = list(kinds_of(name))
        values = zip(*rows) if rows else [()] * len(columns)
        kinds = (NUMBERS.get(column, pa.string()) for column in columns)
        arrays = {column: pa.array(*typed) for column, *typed in zip(columns, values, kinds)}
        write_parquet(folder / f"{name}.parquet", arrays)
    counts = ", ".join(f"{len(rows):,} {name}" for name, rows in tables.items())
    print(f"wrote {folder}: {counts}; left out {len(skipped):,}, see {listed}")


def add_tables(folder, name, tables):
    """{table: its columns, or a stream of Arrow batches} -> files TABLE/NAME.parquet of a dataset folder.
    Stop, and none of them stays, if one is there already, or if the dataset would not hold what
    data/README.md promises; its labels and impressions may still be missing. Returns {table: rows}."""
    paths = {table: folder / table / f"{name}.parquet" for table in tables}
    for path in paths.values():
        if path.exists():
            raise Stop(f"{path}: is there already; remove it, or rename what it is made from")
    try:
        for table, rows in tables.items():
            write = write_parquet if isinstance(rows, dict) else write_stream
            write(paths[table], rows)
        raw = RawTables(folder, required=("pins", "queries"))
        raw.check()
    except BaseException:
        for path in paths.values():
            path.unlink(missing_ok=True)
        raise
    for line in raw.remarks():
        print(line)
    return {table: raw.ask(f"SELECT count(*) FROM '{path}'")[0][0] for table, path in paths.items()}
