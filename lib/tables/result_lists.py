"""Judgment lists and result lists of a search, as Arrow tables. TREC's `.qrels` and `.run`, or a table with
query_id or query, pin_id (or docid, as Quepid calls it), and rating, score or rank."""

import numpy as np
import pyarrow as pa

from lib.stages.terminal import Stop
from lib.tables.database import Database
from lib.tables.files import one_line, plain_names, quoted, reader
from lib.tables.splits import query_key

TREC = {
    ".qrels": ("query_id", "0", "pin_id", "rating"),
    ".run": ("query_id", "Q0", "pin_id", "rank", "score", "tag"),
}


def read_trec(path):
    """A file of TREC as an Arrow table of texts: its fields stand between spaces, or between tabs, and then
    ids may hold spaces. Lines that begin with # are comments."""
    names, rows = TREC[path.suffix.lower()], []
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip() or line[0] == "#":
                continue
            fields = line.split("\t") if line.count("\t") == len(names) - 1 else line.split()
            if len(fields) != len(names):
                raise Stop(f"{path}: line {number} is not {' '.join(names).upper()}: {line[:80]!r}")
            rows.append(dict(zip(names, map(str.strip, fields))))
    return pa.Table.from_pylist(rows, pa.schema(dict.fromkeys(names, pa.string())))


def read_columns(path, more):
    """A list with query_id or query, and those of the columns `more` ({name: kind}) that it has: Arrow; the
    absent one of the two is null. A number that is none is null. Stop without any of the two."""
    db, arrow = Database(path.parent), {}
    contract = {"query_id": "id", "query": "text", "docid": "id", **more}
    try:
        with one_line(path):
            if path.suffix.lower() in TREC:
                arrow["listed"] = read_trec(path)
                sql, types = "FROM listed", dict.fromkeys(arrow["listed"].column_names, "VARCHAR")
            else:
                sql, types = reader(db.db, [path], path, contract, -1)
            names = plain_names(types, contract)
    except UnicodeDecodeError as error:
        raise Stop(f"{path}: not UTF-8 ({error})") from None
    values = {"query_id": "NULL::VARCHAR", "query": "NULL::VARCHAR"}
    for column, name in names.items():
        if name not in contract:
            continue
        value = f"CAST({quoted(column)} AS VARCHAR)"
        if types[column] in ("FLOAT", "DOUBLE"):
            value = f"digits({quoted(column)})"
        if contract[name] == "number":
            value = f"TRY_CAST({value} AS DOUBLE)"
        values["pin_id" if name == "docid" else name] = value
    if {"query_id", "query"}.isdisjoint(names.values()) or values.keys().isdisjoint(more):
        wanted = f"query_id or query, and {', '.join(more)}"
        raise Stop(f"{path}: the columns are {', '.join(types)}; wanted: {wanted}")
    columns = [f"{value} AS {name}" for name, value in values.items()]
    return db.table(f"SELECT {', '.join(columns)} {sql}", **arrow)


def read_list(path, values):
    """A list as an Arrow table: query_id or query (the other one null), pin_id, and the first of the columns
    `values` that it has; of a rank its negative, as score: higher is better."""
    table = read_columns(path, {"pin_id": "id", **dict.fromkeys(values, "number")})
    found = table.column_names
    value = next((name for name in values if name in found), None)
    if value is None or "pin_id" not in found:
        raise Stop(f"{path}: a list has pin_id, and {' or '.join(values)}; it has {', '.join(found)}")
    numbers = table[value]
    if value == "rank":
        value, numbers = "score", pa.array(-numbers.to_numpy(), from_pandas=True)
    return table.select(["query_id", "query", "pin_id"]).append_column(value, numbers)


def read_results(path):
    """A result list: read_list() with a score in every row."""
    table = read_list(path, ("score", "rank"))
    bad = np.flatnonzero(~np.isfinite(table["score"].to_numpy()))
    if len(bad):
        raise Stop(f"{path}: {len(bad):,} rows without rank or score, the first: row {bad[0] + 1}")
    return table


def rows_of_queries(table, ids, keys):
    """Row of a run's query for each row of a table with query_id or query [N], -1: unknown. ids, keys: of the
    run's queries (query_key); a query is known by its id, or by its text."""
    by_id, by_key, found = {}, {}, []
    for row, (query_id, key) in enumerate(zip(ids, keys)):
        by_id.setdefault(query_id, row)
        by_key.setdefault(key, row)
    for query_id, text in zip(table["query_id"].to_pylist(), table["query"].to_pylist()):
        row = by_id.get(query_id, -1)
        if row < 0 and text is not None:
            row = by_key.get(query_key(text), -1)
        found.append(row)
    return np.array(found, np.int64)
