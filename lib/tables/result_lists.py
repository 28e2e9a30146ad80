"""Result lists of a search: a TREC run file, or a table with query_id or query, pin_id, and rank or score."""

import numpy as np
import pyarrow as pa

from lib.stages.terminal import Stop
from lib.tables.database import Database
from lib.tables.files import format_of, one_line, plain_names, quoted, reader
from lib.tables.judgment_files import read_judgments
from lib.tables.splits import query_key


def read_columns(path, more):
    """A table with query_id or query, and those of the columns `more` ({name: kind}) that it has: Arrow; the
    absent one of the two is null. A number that is none is null. Stop without any of the two."""
    db, contract = Database(path.parent), {"query_id": "id", "query": "text", **more}
    with one_line(path):
        sql, types = reader(db.db, [path], path, contract, -1)
        names = {plain: stored for stored, plain in plain_names(types, contract).items() if plain in contract}
    if not names.keys() & {"query_id", "query"} or not names.keys() & more.keys():
        wanted = f"query_id or query, and {', '.join(more)}"
        raise Stop(f"{path}: the columns are {', '.join(types)}; wanted: {wanted}")
    columns = [f"NULL::VARCHAR AS {name}" for name in ("query_id", "query") if name not in names]
    for name, stored in names.items():
        value = f"CAST({quoted(stored)} AS VARCHAR)"
        if types[stored] in ("FLOAT", "DOUBLE"):
            value = f"digits({quoted(stored)})"
        columns.append(
            f"TRY_CAST({value} AS DOUBLE) AS {name}" if contract[name] == "number" else f"{value} AS {name}"
        )
    return db.table(f"SELECT {', '.join(columns)} {sql}")


def read_results(path):
    """A result list as an Arrow table: query_id or query (the other one null), pin_id, score: higher is
    better."""
    if format_of(path) is None:
        found = [(j.query_id, j.query, j.pin_id, j.rating) for j in read_judgments(path)]
        kinds = {"query_id": pa.string(), "query": pa.string(), "pin_id": pa.string(), "score": pa.float64()}
        return pa.table([pa.array(x, kind) for x, kind in zip(zip(*found), kinds.values())], [*kinds])
    table = read_columns(path, {"pin_id": "id", "rank": "number", "score": "number"})
    order = [name for name in ("score", "rank") if name in table.column_names]
    if not order or "pin_id" not in table.column_names:
        raise Stop(
            f"{path}: a result list has pin_id, and rank or score; it has {', '.join(table.column_names)}"
        )
    score = table[order[0]].to_numpy() * (1 if order[0] == "score" else -1)
    bad = np.flatnonzero(~np.isfinite(score))
    if len(bad):
        first = f"the first: row {bad[0] + 1}"
        raise Stop(f"{path}: {len(bad):,} rows whose {order[0]} is no number, {first}")
    return table.select(["query_id", "query", "pin_id"]).append_column("score", pa.array(score))


def rows_of_queries(table, ids, keys):
    """Row of a run's query for each row of a table with query_id or query [N], -1: unknown. ids, keys: of the
    run's queries (query_key); a query is known by its id, or by its text."""
    by_id, by_key = ({name: row for row, name in reversed([*enumerate(names)])} for names in (ids, keys))
    found = []
    for query_id, text in zip(table["query_id"].to_pylist(), table["query"].to_pylist()):
        row = by_id.get(query_id, -1)
        found.append(by_key.get(query_key(text), -1) if row < 0 and text is not None else row)
    return np.array(found, np.int64)
