"""Result lists of a search: a TREC run file, or a table with query_id or query, pin_id, and rank or score."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lib.stages.terminal import Stop
from lib.tables.columns import as_text
from lib.tables.database import Database
from lib.tables.files import format_of, one_line, plain_names, reader
from lib.tables.judgment_files import read_judgments
from lib.tables.splits import query_key

JUDGED = {"query_id": pa.string(), "query": pa.string(), "pin_id": pa.string(), "rating": pa.float64()}


def read_columns(path, more):
    """A table with query_id or query, and those of the columns `more` ({name: kind}) that it has: Arrow; the
    absent one of the two is null. A number that is none is null. Stop without any of the two."""
    db = Database(path.parent)
    contract = {"query_id": "id", "query": "text", **more}
    with one_line(path):
        sql, types = reader(db.db, [path], path, contract)
        names = plain_names(types, contract)
    values = {"query_id": "NULL::VARCHAR", "query": "NULL::VARCHAR"}
    found = {name for name in names.values() if name in contract}
    if found.isdisjoint(values) or found.isdisjoint(more):
        wanted = f"query_id or query, and {', '.join(more)}"
        raise Stop(f"{path}: the columns are {', '.join(types)}; wanted: {wanted}")
    for column, name in names.items():
        if name in contract:
            value = as_text(column, types[column])
            values[name] = f"TRY_CAST({value} AS DOUBLE)" if contract[name] == "number" else value
    columns = [f"{value} AS {name}" for name, value in values.items()]
    return db.table(f"SELECT {', '.join(columns)} {sql}")


def read_results(path):
    """A result list as an Arrow table: query_id or query (the other one null), pin_id, score: higher is
    better."""
    names = ["query_id", "query", "pin_id", "score"]
    if format_of(path) is None:
        rows = [judgment._asdict() for judgment in read_judgments(path)]
        table = pa.Table.from_pylist(rows, pa.schema(JUDGED))
        return table.rename_columns(names)
    table = read_columns(path, {"pin_id": "id", "rank": "number", "score": "number"})
    found = table.column_names
    order = "score" if "score" in found else "rank"
    if not {"pin_id", order} <= {*found}:
        raise Stop(f"{path}: a result list has pin_id, and rank or score; it has {', '.join(found)}")
    score = table[order].to_numpy()
    bad = np.flatnonzero(~np.isfinite(score))
    if len(bad):
        raise Stop(f"{path}: {len(bad):,} rows whose {order} is no number, the first: row {bad[0] + 1}")
    if order == "rank":
        score = -score
    return table.select(names[:3]).append_column("score", pa.array(score))


def rows_of_queries(table, ids, keys):
    """Row of a run's query for each row of a table with query_id or query [N], -1: unknown. ids, keys: of the
    run's queries (query_key); a query is known by its id, or by its text."""
    keys_of = [text and query_key(text) for text in table["query"].to_pylist()]
    ids, keys = pa.array(ids, pa.string()), pa.array(keys, pa.string())
    by_id = pc.index_in(table["query_id"], ids)
    by_key = pc.index_in(pa.array(keys_of, pa.string()), keys)
    found = pc.coalesce(by_id, by_key, -1)
    return found.to_numpy().astype(np.int64)
