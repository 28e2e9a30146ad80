"""The days of a shop on the tiny toy dataset, each as raw tables of its own."""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from helpers import TOY_MODELS, stage

from lib.stages.files import write_parquet
from lib.tables.raw import RawTables

# Pins that no training label is of: one goes, one gets another title, one another picture.
GONE, RETITLED, REPAINTED = "p00028", "p00067", "p00088"


def read_tables(folder):
    """{name: table, all of it text but the events}"""
    raw = RawTables(folder)
    tables = {name: raw.table(f"SELECT * FROM file_{name}") for name in raw.files}
    raw.db.close()
    return tables


def write_tables(tables, images, folder):
    """A dataset of these tables and pictures."""
    for name, table in tables.items():
        write_parquet(folder / f"{name}.parquet", table)
    shutil.copytree(images, folder / "images", dirs_exist_ok=True)
    return folder


def without(table, pin):
    return table.filter(pc.not_equal(table["pin_id"], pin))


def with_value(table, key, row, column, value):
    """A table in which the row whose `key` column is `row` has another value."""
    values = table[column].to_pylist()
    values[table[key].to_pylist().index(row)] = value
    return table.set_column(table.column_names.index(column), column, pa.array(values, table[column].type))


def with_rows(table, rows):
    return pa.concat_tables([table, pa.Table.from_pylist(rows, schema=table.schema)])


def shuffled(tables, seed=0):
    """The same rows, as after a compaction: labels too, for a teacher learns rows in an order of its own."""
    rng = np.random.default_rng(seed)
    return {name: table.take(rng.permutation(len(table))) for name, table in tables.items()}


def tuesday(monday):
    """One pin of a hundred gone, one with another title, two pins and a query new, today's impressions
    alone."""
    tables = dict(monday)
    for name in ("pins", "labels", "boards", "link_visits", "engagements"):
        tables[name] = without(tables[name], GONE)
    tables["pins"] = with_value(tables["pins"], "pin_id", RETITLED, "title", "Blue velvet armchair")
    new = [
        {"pin_id": f"new{n}", "title": f"Oak desk {n}", "description": "small", "image": None} for n in (1, 2)
    ]
    tables["pins"] = with_rows(tables["pins"], new)
    new = {"query_id": "new", "query": "small oak desk", "language": "en", "interest": "home decor"}
    tables["queries"] = with_rows(tables["queries"], [new])
    impressions = without(monday["impressions"], GONE)
    some = impressions.slice(0, 150).to_pylist()
    some += impressions.filter(pc.equal(impressions["pin_id"], RETITLED)).to_pylist()
    some += [
        {"query_id": query, "pin_id": pin} for query in ("new", "q0001") for pin in ("new1", "new2", "p00001")
    ]
    tables["impressions"] = pa.Table.from_pylist([*some, *some[:5], *some[-3:]], schema=impressions.schema)
    return tables


def wednesday(monday):
    """Tuesday's pins and queries in another order, with all of Monday's impressions again; engagement on an
    old pin, a new column, a new picture."""
    tables = shuffled(tuesday(monday))
    impressions = pa.concat_tables([tables["impressions"], without(monday["impressions"], GONE)])
    tables["impressions"] = impressions.take(np.random.default_rng(1).permutation(len(impressions)))
    pins = tables["pins"]
    tables["pins"] = pins.append_column("price", pa.array(np.arange(len(pins)) % 7 + 1.0))
    event = {**tables["engagements"].to_pylist()[0], "query": "armchair", "pin_id": RETITLED, "count": 99}
    tables["engagements"] = with_rows(tables["engagements"], [event])
    return tables


def flags(data, run, encoder, *more):
    """Stage 01's, for the dataset of a day."""
    where = ["--data", data, "--run", run, "--caption-model", TOY_MODELS / "blip", "--text-encoder", encoder]
    return [str(a) for a in (*where, "--shard-rows", "300", "--device", "cpu", *more)]


def build(data, run, *more):
    """Stage 01 on the dataset of a day."""
    stage("01").main(flags(data, run, *more))
    return run / "features"
