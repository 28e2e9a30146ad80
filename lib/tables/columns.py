"""Columns of a user's tables beyond the contract: which of them become features, and what is said of them."""

import re
from types import SimpleNamespace
from typing import NamedTuple

from lib.tables.files import NAMELESS, NUMERIC, quoted

# Names that programs give to row numbers; those of the second list only if row numbers stand there.
ROW_NUMBERS = re.compile(rf"__index_level_\d+__|unnamed: ?\d+(_level_\d+)?|\.\.\.\d+|.*{NAMELESS}")
ROW_NAMES = {"index", "level_0", "rowid", "row_id", "rownames", "row_names", "row_number", "row.names"}
DATE = r"\d{1,4}[./-]\d{1,2}[./-]\d{1,4}"
AMOUNT = r"[\p{Sc}\s+-]*[0-9][0-9.,''\s]*[\p{Sc}\s%]*"  # in SQL: a number as people write it: € 1,234.50
ENOUGH_ROWS, SOME_ROWS = 20, 10_000  # that all values differ is asked of so many rows, at least and at most
AT_ONCE = 500  # columns in one query


def as_text(column, stored):
    """SQL of a column, stored as this type, as text: of a list of texts all of them; of 1.0 it is 1."""
    if stored == "VARCHAR[]":
        return f"array_to_string({quoted(column)}, ' ')"
    if stored == "JSON":
        return f"words({quoted(column)})"
    is_fraction = re.match("FLOAT|DOUBLE|DECIMAL", stored)
    return f"digits({quoted(column)})" if is_fraction else f"CAST({quoted(column)} AS VARCHAR)"


def nested_in(column, stored, one=False):
    """SQL: does a cell of a column hold more than a text or a list of texts? one: more than one value?"""
    if stored == "JSON":
        return f"holds_more({quoted(column)})" + f" OR json_type({quoted(column)}) = 'ARRAY'" * one
    if re.match(r"STRUCT|MAP|UNION|.*\]", stored) and (one or stored != "VARCHAR[]"):
        return f"{quoted(column)} IS NOT NULL"
    return "false"


class Column(NamedTuple):
    """role: "number", "category" or "left out"; why it is left out, or what is odd about it (text, or None);
    differs: (nearly) all of its values differ, and they are no measurements."""

    role: str
    odd: str | None = None
    differs: bool = False


def survey(raw, table, names):
    """{name: Column} of columns of a table. The number of queries does not grow with theirs."""
    found, stored = {}, raw.types[table]
    for start in range(0, len(names), AT_ONCE):
        some = names[start : start + AT_ONCE]
        texts = ", ".join(f"{as_text(column, stored[column])} AS {quoted(column)}" for column in some)
        texts = f"SELECT {texts} FROM file_{table}"
        facts = {row["name"]: SimpleNamespace(**row) for row in raw.table(facts_of(texts)).to_pylist()}
        differ = f"count(DISTINCT t) >= 0.99 * greatest(count(t), {ENOUGH_ROWS})"
        differ = dict(
            raw.ask(f"SELECT name, {differ} FROM {cells_of(f'{texts} LIMIT {SOME_ROWS}')} GROUP BY 1")
        )
        nested = ", ".join(f"bool_or({nested_in(column, stored[column])})" for column in some)
        nested = raw.ask(f"SELECT {nested} FROM file_{table}")[0]
        for column, is_nested in zip(some, nested):
            found[column] = judge(column, stored[column], facts[column], is_nested, differ[column])
    return found


def cells_of(texts):
    """SQL of all cells of a query `texts`: name of the column, t."""
    return f"({texts}) UNPIVOT INCLUDE NULLS (t FOR name IN (*))"


def facts_of(texts):
    """SQL: what is counted of each column of a query `texts`: cells with something in them, numbers within
    fp32, cells written as numbers, numbers beyond fp32, cells that are no number, of these the amounts; the
    least and the largest number, are all whole. Its plan does not grow with the number of columns."""
    return f"""
        SELECT name, count(*) FILTER (filled) AS filled, count(number(d)) AS numbers,
            count(*) FILTER (is_number(t)) AS written,
            count(*) FILTER (beyond) AS beyond, first(t) FILTER (beyond) AS first_beyond,
            count(*) FILTER (odd) AS odd, first(t) FILTER (odd) AS first_odd,
            count(*) FILTER (odd AND regexp_full_match(t, '{AMOUNT}') AND NOT regexp_full_match(t, '{DATE}'))
                AS amounts, min(d) AS least, max(d) AS largest, bool_and(d = floor(d)) AS whole
        FROM (SELECT *, filled AND d IS NULL AS odd, NOT isnan(d) AND number(d) IS NULL AS beyond
            FROM (SELECT *, NOT is_blank(t) AS filled, TRY_CAST(t AS DOUBLE) AS d FROM {cells_of(texts)}))
        GROUP BY name"""


def judge(column, stored, about, nested, differs):
    """What becomes of a column, stored as this type: a Column. about: of facts_of(); nested: does a cell hold
    more than texts; differs: do (nearly) all values."""
    run = about.whole and about.least in (0, 1) and about.largest - about.least + 1 == about.filled
    if ROW_NUMBERS.fullmatch(column.lower()) or (column.lower() in ROW_NAMES and run):
        return Column("left out", "row numbers, or without a name")
    if nested:
        return Column("left out", f"nested values ({stored})")
    is_number = NUMERIC.fullmatch(stored) or (stored == "CSV" and about.filled == about.written)
    if not (about.numbers if is_number else about.filled):
        return Column("left out", "nothing in it")
    odd = None
    if is_number and about.beyond:
        many = f"{about.beyond:,} of {about.filled:,} cells are infinite or beyond 1e30"
        odd = f"{many}, the first: {about.first_beyond}: they count as unknown"
    elif about.odd and 2 * (about.filled - about.odd + about.amounts) > about.filled:
        many = f"a category, for {about.odd:,} of {about.filled:,} cells are no plain number"
        advice = "written as 1299.95 they are numbers, left empty they are unknown"
        odd = f"{many}, the first: {about.first_odd[:80]!r}: {advice}"
    is_measured = is_number and not about.whole
    return Column("number" if is_number else "category", odd, differs and not is_measured)


def oddities(raw, table):
    """Lines on what is odd about the further columns of a table."""
    columns = raw.columns(table)
    for name, about in columns.items():
        if about.odd and about.odd != "nothing in it":
            yield f"{table}.{name}: {'left out: ' * (about.role == 'left out')}{about.odd}"
    names = [repr(name) for name, about in columns.items() if about.differs]
    if names:
        named = ", ".join(names)
        yield f"{table}: (next to) no two rows share a value of {named}: an id, a time? It teaches nothing"
