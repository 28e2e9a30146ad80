"""Rows of the raw tables under their numbers, query_index and pin_index, which name them after stage 01."""

from lib.levels import OUTPUTS
from lib.stages.streams import slices
from lib.stages.terminal import Stop
from lib.tables.columns import as_text
from lib.tables.embeddings import NAMES
from lib.tables.files import quoted
from lib.tables.raw import kinds_of

RESERVED = ("query_index", "pin_index", "engaged", "label", "split", "the row")  # columns of pairs


def refuse_names(raw, table, reserved, columns=None):
    """Stop if a further column of a table, or one of `columns`, has a name of ours."""
    for column in raw.further(table) if columns is None else columns:
        if column.lower() in reserved:
            raise Stop(f"{raw.name[table]}: column {column!r} has a name of ours: rename it")


def number_rows(raw, table, side, reserved=()):
    """Makes the table SIDE_rows: the rows of raw_TABLE with SIDE_index, their row number; columns of the
    contract, then further ones that are features, numeric ones as DOUBLE and others as text. reserved: names
    of ours that no further column may have."""
    refuse_names(raw, table, (f"{side}_index", *reserved))
    columns = [f"(row_number() OVER () - 1)::INTEGER AS {side}_index", *kinds_of(table)]
    for column, about in raw.columns(table).items():
        if about.role != "left out":
            text = as_text(column, raw.types[table][column])
            value = f"number({quoted(column)})" if about.role == "number" else text
            columns.append(f"{value} AS {quoted(column)}")
    raw.ask(f"CREATE TABLE {side}_rows AS SELECT {', '.join(columns)} FROM raw_{table}")


def pair_numbers(raw, reserved):
    """Numeric columns beyond the contract that impressions and labels both have -> their SQL, null where it
    is no number."""
    found = {}
    labels = {column.lower(): about.role for column, about in raw.columns("labels").items()}
    for column, about in raw.columns("impressions").items():
        if about.role == labels[column.lower()] == "number":
            found[column] = f"number({quoted(column)})::FLOAT"
    refuse_names(raw, "impressions", (*RESERVED, *OUTPUTS, *reserved), found)
    return found


def refuse_twice(raw, own, numbers):
    """Stop if two inputs of the student would have one name, which is SIDE_COLUMN of columns of queries and
    pins. own: names of the user's embeddings; numbers: of the numbers of pairs."""
    taken = dict.fromkeys(map(str.lower, (*NAMES, *own)), "an embedding")
    columns = [("impressions", "", column) for column in numbers]
    for table, side in (("queries", "query_"), ("pins", "pin_")):
        kept = [column for column, about in raw.columns(table).items() if about.role != "left out"]
        columns += [(table, side, column) for column in kept]
    for table, side, column in columns:
        name = f"{side}{column}"
        if other := taken.get(name.lower()):
            raise Stop(f"{raw.name[table]}: column {column!r}: {other} has its name, {name}: rename it")
        taken[name.lower()] = f"the column {column!r} of {raw.name[table]}"


def index_pairs(raw, table, columns, chunk=500_000):
    """The rows of raw_labels or raw_impressions in their order, as a stream of Arrow tables: query_index,
    pin_index, engaged (events in the window, from the table `engaged`), and `columns` {name: SQL}. Joined
    `chunk` rows at a time: a join does not keep the order, and to sort all rows afterwards would take memory
    that grows with them."""
    raw.ask("""
        CREATE TABLE IF NOT EXISTS engaged_pairs AS SELECT query_index, pin_index, n AS engaged FROM engaged
        JOIN (SELECT query_key(query) AS text, query_index FROM query_rows) USING (text)
        JOIN (SELECT pin_id, pin_index FROM pin_rows) USING (pin_id)""")
    made = "".join(f", {sql} AS {quoted(name)}" for name, sql in columns.items())
    names = "".join(f", {quoted(name)}" for name in columns)
    ordered = f'SELECT row_number() OVER () AS "the row", query_id, pin_id{made} FROM raw_{table}'
    indexed = f"""
        SELECT query_index, pin_index, coalesce(engaged, 0) AS engaged{names} FROM listed
        JOIN (SELECT query_id, query_index FROM query_rows) USING (query_id)
        JOIN (SELECT pin_id, pin_index FROM pin_rows) USING (pin_id)
        LEFT JOIN engaged_pairs USING (query_index, pin_index) ORDER BY "the row" """
    for rows in slices(raw.batches(ordered, chunk), chunk):
        yield raw.table(indexed, listed=rows)
