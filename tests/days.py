"""The tiny toy dataset on two days: on the second one with new pins, queries and impressions."""

import functools
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from helpers import TOY_MODELS, stage

from lib.stages.files import write_parquet
from lib.tables.raw import RawTables

NEW = {"query_id": ["q0016", "q0022"], "pin_id": ["p00008", "p00011", "p00018", "p00031", "p00044"]}


def is_new(table):
    """Which rows name a new query or a new pin [N]."""
    new = np.zeros(len(table), bool)
    for column, ids in NEW.items():
        if column in table.column_names:
            new |= pc.is_in(table[column].cast(pa.string()), pa.array(ids)).to_numpy()
    return new


def write_day(toy, folder, day):
    """The dataset on day 1 or 2. On day 2 new pins and queries stand before the old ones, new impressions
    behind them, and no label is new."""
    raw = RawTables(toy)
    for name in raw.files:
        table = raw.table(f"SELECT * FROM file_{name}")
        new = is_new(table)
        old, rest = table.filter(pa.array(~new)), table.filter(pa.array(new))
        if day == 2 and name == "impressions":
            old = pa.concat_tables([old, rest])
        elif day == 2 and name != "labels":
            old = pa.concat_tables([rest, old])
        write_parquet(folder / f"{name}.parquet", old)
    raw.db.close()
    shutil.copytree(toy / "images", folder / "images", dirs_exist_ok=True)
    return folder


def build(data, run, *more):
    """Stage 01 on the dataset of a day."""
    where = ["--data", str(data), "--run", str(run), "--caption-model", str(TOY_MODELS / "blip")]
    stage("01").main([*where, "--shard-rows", "300", "--device", "cpu", *map(str, more)])
    return run / "features"


@functools.cache
def two_days(toy, bert):
    """Folder of the datasets day1 and day2, and of runs with their features, run1 and run2 (updated), made
    once a test session."""
    root = toy.parent.parent / "days"
    shutil.rmtree(root, ignore_errors=True)
    encoder = ["--text-encoder", bert]
    for day in (1, 2):
        write_day(toy, root / f"day{day}", day)
    build(root / "day1", root / "run1", *encoder)
    shutil.copytree(root / "run1", root / "run2", ignore=shutil.ignore_patterns(".*"))
    build(root / "day2", root / "run2", *encoder, "--update")
    return root
