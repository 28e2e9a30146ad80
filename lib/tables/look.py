"""A first look at a user's tables, in seconds: what becomes of each column, how far raters agree, and what is
odd without being wrong."""

from typing import NamedTuple

import numpy as np
from sklearn.metrics import cohen_kappa_score

from lib.stages.terminal import Stop
from lib.tables.files import quoted
from lib.tables.images import load_images
from lib.tables.indexed import is_numeric
from lib.tables.raw import kinds_of

ROWS, COLUMNS = 100_000, 40  # of a table's first rows and columns
FEW = 20  # values that all differ say nothing yet
PICTURES = 200  # opened for a check
SOUGHT = {"pins": ("title", "description", "image"), "queries": ("query", "language"), "labels": ("label",)}
NOTATION = "[€$£¥]? ?[+-]?[0-9][0-9., \u00a0\u2019]*( ?([€$£¥%]|[A-Z]{3}))?"  # and not as SQL writes it
ODD = {  # what nine of ten values v are like: in SQL, and what to do
    "numbers in another notation": (
        f"regexp_full_match(trim(v), '{NOTATION}') AND TRY_CAST(v AS DOUBLE) IS NULL",
        "written as 1299.95 they are numbers",
    ),
    "JSON": ("ltrim(v)[1] IN ('{', '[')", "a column of its own for each thing in it says more"),
}


class Column(NamedTuple):
    """What becomes of a column: its role in words, an example, and what is odd (text, or None)."""

    name: str
    role: str
    example: str
    odd: str | None


def look_at(raw):
    """The Columns of the tables, ids and logs left out."""
    for name in ("pins", "queries", "labels", "impressions"):
        if raw.types[name] and name not in raw.broken:
            contract = [column for column in SOUGHT.get(name, ()) if column in raw.types[name]]
            yield from look_at_table(raw, name, [*contract, *raw.further(name)][:COLUMNS])


def look_at_table(raw, table, columns):
    """Likewise of some columns of one table, from its first ROWS rows."""
    tests = ["NOT is_blank(v)", *(test for test, _ in ODD.values())]
    counts = ", ".join(f"count(*) FILTER ({test})" for test in tests)
    sql = f"SELECT {counts}, count(DISTINCT v), min(v) FILTER (NOT is_blank(v)) FROM"
    for column in columns:
        some = f"(SELECT {quoted(column)}::VARCHAR AS v FROM raw_{table} LIMIT {ROWS})"
        filled, *odd, values, example = raw.ask(f"{sql} {some}")[0]
        role, is_category = role_of(raw, table, column, values)
        say = odd_of(filled, values, odd) if is_category else None
        yield Column(f"{table}.{column}", role, " ".join((example or "").split())[:40], say)


def role_of(raw, table, column, values):
    """What becomes of a column, in words, and whether it is a category of the student's."""
    if column in kinds_of(table):
        return {"image": "picture", "label": "level"}.get(column, "text"), False
    if table in ("labels", "impressions"):
        other = {"labels": "impressions", "impressions": "labels"}[table]
        both = {name.lower() for name in raw.further(other)}
        if column.lower() in both and is_numeric(raw, table, column):
            return "number of the pair", False
        return f"left out: no number that {other} has too", False
    numeric = is_numeric(raw, table, column)
    if numeric is None:
        return "left out: nothing in it", False
    return ("number", False) if numeric else (f"category, {values:,} values", True)


def odd_of(filled, values, odd):
    """What is odd about a category's values, or None. odd: how many are like each of ODD."""
    for (what, (_, advice)), count in zip(ODD.items(), odd):
        if count >= 0.9 * filled:
            return f"{what}: {advice}"
    if filled == values >= FEW:
        return "all values differ: as a category it says nothing; leave it out, or into description"
    return None


def lines_of(columns):
    """Columns as a table of text, then a line for each that is odd."""
    head = Column("column", "is", "for example", None)
    widths = [max(len(column[place]) for column in [head, *columns]) for place in (0, 1)]
    for column in [head, *columns] if columns else ():
        yield f"  {column.name:<{widths[0]}}  {column.role:<{widths[1]}}  {column.example}".rstrip()


def oddities(raw, columns):
    """Lines on what is odd: URLs as pictures, one text of several queries, and what look_at() has found."""
    if raw.broken.isdisjoint({"pins"}):
        urls = "count(*) FILTER (regexp_matches(image, '^\\s*(https?|ftp)://'))"
        count, images = raw.ask(f"SELECT {urls}, count(image) FROM raw_pins")[0]
        if count:
            what = f"{count:,} of {images:,} are URLs, which are not fetched"
            advice = "leave the column out, or download the files and give their paths"
            yield f"odd: {raw.name['pins']}: column 'image': {what}: {advice}"
    if raw.broken.isdisjoint({"queries"}):
        rows, texts = raw.ask("SELECT count(*), count(DISTINCT query_key(query)) FROM raw_queries")[0]
        if texts < rows:
            name = raw.name["queries"]
            yield f"odd: {name}: {rows:,} rows, {texts:,} texts (but for case and spaces): one query each"
    for column in columns:
        if column.odd:
            yield f"odd: {column.name}: {column.odd}"


def agreement(raw):
    """A line on how far raters agree, where several rated a pair: on each two ratings of a pair, in either
    order. Kappa: Cohen, 1968, with quadratic weights."""
    if "rater" not in raw.types["labels"] or not raw.broken.isdisjoint({"labels"}):
        return
    two = raw.table("""
        SELECT a.label AS first, b.label AS second FROM rated_labels a
        JOIN rated_labels b USING (query_id, pin_id)
        WHERE a.rater < b.rater AND a.label + b.label IS NOT NULL""")
    raters, ratings, pairs = raw.ask(
        "SELECT count(DISTINCT rater), count(*), count(DISTINCT (query_id, pin_id)) FROM rated_labels"
    )[0]
    line = (
        f"raters: {raters}, {ratings:,} ratings of {pairs:,} pairs; a pair's label is their median, ties down"
    )
    if len(two):
        first, second = (
            np.concatenate([two[a], two[b]]) for a, b in (("first", "second"), ("second", "first"))
        )
        kappa = cohen_kappa_score(first, second, weights="quadratic")
        line += f"; two of one pair agree in {(first == second).mean():.0%}, weighted kappa {kappa:.2f}"
    yield line


def try_pictures(raw):
    """A line on pictures that cannot be read, of the first PICTURES; or none."""
    if not raw.broken.isdisjoint({"pins"}):
        return
    images = raw.ask(f"SELECT image FROM raw_pins WHERE NOT is_blank(image) LIMIT {PICTURES}")
    found = load_images(raw.folder, [image for (image,) in images])
    bad = [(image, why) for (image,), why in zip(images, found) if isinstance(why, str)]
    if bad:
        first = f"the first: {bad[0][0]!r} ({bad[0][1]})"
        yield f"odd: pictures: {len(bad):,} of {len(images):,} tried cannot be read, {first}"


def check(raw, checks):
    """Everything that is wrong or odd in the tables, printed, the heaviest first; Stop where something is
    wrong. raw: with `faults`; checks: {table, or "": a further call that may end in Stop}."""
    raw.check()
    for name, call in checks.items():
        if name not in raw.broken and (raw.has(name) or not name):
            with raw.noting():
                call()
    columns = list(look_at(raw))
    wrong = [f"wrong: {fault}" for fault in raw.faults]
    odd = [*oddities(raw, columns), *try_pictures(raw)]
    for line in [*wrong, *odd, *raw.remarks(), *agreement(raw), *lines_of(columns)]:
        print(line)
    if raw.faults:
        raise Stop(f"{raw.folder}: {len(raw.faults)} thing(s) wrong, said above")
    print(f"{raw.folder}: nothing is wrong")
