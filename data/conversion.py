"""What the converters of public sets share: a source is opened, queries are dealt, a dataset is written."""

import gzip
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lib.stages.files import write_parquet  # noqa: E402
from lib.stages.terminal import Stop  # noqa: E402
from lib.tables.files import list_skipped  # noqa: E402
from lib.tables.splits import hash_position  # noqa: E402

NUMBERS = {"label": pa.int64(), "dwell_seconds": pa.float64()}  # types of columns; any other is text


def open_text(path, home):
    """A text file, gzipped or not: the path, or NAME.gz in its place. home: where to get it."""
    if not path.is_file():
        path = path.with_name(f"{path.name}.gz")
    if not path.is_file():
        raise Stop(f"{path.with_suffix('')}: missing, with or without .gz; get it from {home}")
    opened = gzip.open if path.suffix == ".gz" else open
    return opened(path, "rt", encoding="utf-8", newline="")


def side_of(query, train_share, eval_share, salt):
    """Where a hash of the query deals it: 'train', 'eval', or 'hidden', whose labels become impressions."""
    position = hash_position(query, salt)
    if position < train_share:
        return "train"
    return "eval" if position < train_share + eval_share else "hidden"


def write_dataset(folder, tables, listed, skipped_columns, skipped):
    """{table: (names of its columns, rows)} -> Parquet files. listed: the CSV that names the rows that cannot
    be used, with their reasons."""
    for name, (columns, rows) in tables.items():
        values = zip(*rows) if rows else [()] * len(columns)
        arrays = {}
        for column, of_column in zip(columns, values):
            arrays[column] = pa.array(of_column, NUMBERS.get(column, pa.string()))
        write_parquet(folder / f"{name}.parquet", arrays)
    list_skipped(folder / listed, (*skipped_columns, "reason"), skipped)
    counts = ", ".join(f"{len(rows):,} {name}" for name, (_, rows) in tables.items())
    print(f"wrote {folder}: {counts}; left out {len(skipped):,}, see {listed}")
    print_levels(tables["queries"][1], tables["labels"][1])


def print_levels(queries, labels):
    """Labels by split, language and level."""
    language = {query: language for query, _, language in queries}
    counts = Counter()
    for query, _, level, split in labels:
        counts[f"{split} {language[query]}", level] += 1
    for group in sorted({group for group, _ in counts}):
        levels = sorted(level for other, level in counts if other == group)
        shown = ", ".join(f"level {level} {counts[group, level]:,}" for level in levels)
        print(f"  {group}: {shown}")
