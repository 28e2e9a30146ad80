"""A first look at a user's tables, in seconds: what becomes of each column, how far raters agree, and what is
odd without being wrong."""

from typing import NamedTuple

import numpy as np
from sklearn.metrics import cohen_kappa_score

from lib.stages.terminal import Stop
from lib.tables import columns as further
from lib.tables.files import quoted
from lib.tables.images import load_images
from lib.tables.raw import REQUIRED, kinds_of

ROWS, COLUMNS = 100_000, 40  # of a table's first rows and columns
PICTURES = 200  # opened for a check
LONG = 40  # characters of a category's value, mean
SOUGHT = {"pins": ("title", "description", "image"), "queries": ("query", "language"), "labels": ("label",)}
URL = "regexp_matches(image, '^\\s*(https?|ftp)://')"
HTML = "regexp_matches(v, '</?[a-zA-Z][^>]*>')"  # in SQL, of a value v
JSON = "ltrim(v)[1] IN ('{', '[')"


class Column(NamedTuple):
    """What becomes of a column: its role in words, an example, and what is odd (text, or None)."""

    name: str
    role: str
    example: str
    odd: str | None


def look_at(raw):
    """The Columns of the tables, ids and logs left out."""
    for name in ("pins", "queries", "labels", "impressions"):
        if raw.types[name] and raw.whole(name):
            contract = [column for column in SOUGHT.get(name, ()) if column in raw.types[name]]
            yield from look_at_table(raw, name, [*contract, *raw.further(name)][:COLUMNS])


def look_at_table(raw, table, columns):
    """Likewise of some columns of one table, from its first ROWS rows."""
    shares = f"count(*) FILTER ({JSON}), count(*) FILTER ({HTML})"
    counts = f"count(*) FILTER (NOT is_blank(v)), {shares}, avg(length(v))"
    texts = ", ".join(f"{quoted(column)}::VARCHAR AS {quoted(column)}" for column in columns)
    some = f"UNPIVOT (SELECT {texts} FROM raw_{table} LIMIT {ROWS}) ON * INTO NAME name VALUE v"
    sql = (
        f"SELECT name, {counts}, count(DISTINCT v), min(v) FILTER (NOT is_blank(v)) FROM ({some}) GROUP BY 1"
    )
    found = {name: facts for name, *facts in raw.ask(sql)} if columns else {}
    for column in columns:
        filled, json, html, length, values, example = found.get(column, (0, 0, 0, 0, 0, None))
        example = raw.labels_found() if column == "label" and table == "labels" else example
        role, is_category = role_of(raw, table, column, values)
        odd = None
        if is_category and json >= 0.9 * filled:
            odd = "JSON: a column of its own for each thing in it says more"
        elif is_category and length > LONG:
            odd = "long texts as a category: nobody reads them; into title or description, or leave them out"
        elif role == "text" and html > 0.1 * filled:
            odd = f"HTML in {html:,} of {filled:,} cells: tags are read as words; take them out"
        yield Column(f"{table}.{column}", role, " ".join((example or "").split())[:40], odd)


def role_of(raw, table, column, values):
    """What becomes of a column, in words, and whether it is a category of the student's."""
    if column in kinds_of(table):
        return {"image": "picture", "label": "level"}.get(column, "text"), False
    if table in ("labels", "impressions"):
        other = {"labels": "impressions", "impressions": "labels"}[table]
        about = raw.columns(table).get(column)
        if about and about.role == "number":
            return "number of the pair", False
        return f"left out: no number that {other} has too", False
    about = raw.columns(table)[column]
    if about.role == "category":
        return f"category, {values:,} values", True
    return about.role + f": {about.odd}" * (about.role == "left out"), False


def lines_of(columns):
    """Columns as a table of text, then a line for each that is odd."""
    head = Column("column", "is", "for example", None)
    widths = [max(len(column[place]) for column in [head, *columns]) for place in (0, 1)]
    for column in [head, *columns] if columns else ():
        yield f"  {column.name:<{widths[0]}}  {column.role:<{widths[1]}}  {column.example}".rstrip()


def oddities(raw, columns):
    """Lines on what is odd: URLs as pictures, one text of several queries, and what look_at() has found."""
    if raw.whole("pins"):
        count, images = raw.ask(f"SELECT count(*) FILTER ({URL}), count(image) FROM raw_pins")[0]
        if count:
            what = f"{count:,} of {images:,} are URLs, which are not fetched"
            advice = "leave the column out, or download the files and give their paths"
            yield f"odd: {raw.name['pins']}: column 'image': {what}: {advice}"
    if raw.whole("queries"):
        rows, texts = raw.ask("SELECT count(*), count(DISTINCT query_key(query)) FROM raw_queries")[0]
        if texts < rows:
            name = raw.name["queries"]
            yield f"odd: {name}: {rows:,} rows, {texts:,} texts (but for case and spaces): one query each"
    for column in columns:
        if column.odd:
            yield f"odd: {column.name}: {column.odd}"
    for table in REQUIRED:
        if raw.whole(table):
            yield from (f"odd: {line}" for line in further.oddities(raw, table))


def agreement(raw):
    """A line on how far raters agree, where several rated a pair: on each two ratings of a pair, in either
    order. Kappa: Cohen, 1968, with quadratic weights."""
    if "rater" not in raw.types["labels"] or not raw.whole("labels"):
        return
    two = raw.table("""
        SELECT a.label AS one, b.label AS other FROM rated_labels a
        JOIN rated_labels b USING (query_id, pin_id)
        WHERE a.rater < b.rater AND a.label + b.label IS NOT NULL""")
    counts = "count(DISTINCT rater), count(*), count(DISTINCT (query_id, pin_id))"
    raters, ratings, pairs = raw.ask(f"SELECT {counts} FROM rated_labels")[0]
    line = f"raters: {raters}, {ratings:,} ratings of {pairs:,} pairs, of which the median counts, ties down"
    if len(two):
        first = np.concatenate([two["one"], two["other"]])
        second = np.concatenate([two["other"], two["one"]])
        levels = list(range(1, 6))
        kappa = cohen_kappa_score(first, second, labels=levels, weights="quadratic")
        line += f"; two of one pair agree in {(first == second).mean():.0%}, weighted kappa {kappa:.2f}"
    yield line


def try_pictures(raw):
    """A line on pictures that cannot be read, of the first PICTURES; or none."""
    if not raw.whole("pins"):
        return
    sql = f"SELECT image FROM raw_pins WHERE NOT is_blank(image) AND NOT {URL} LIMIT {PICTURES}"
    images = raw.ask(sql)
    found = load_images(raw.folder, [image for (image,) in images])
    bad = [(image, why) for (image,), why in zip(images, found) if isinstance(why, str)]
    if bad:
        first = f"the first: {bad[0][0]!r} ({bad[0][1]})"
        yield f"odd: pictures: {len(bad):,} of {len(images):,} tried cannot be read, {first}"


def show(raw, *first):
    """Prints what is known of the tables after `first`, lines of heavier weight: what is odd, what is used of
    the logs, how far raters agree, what becomes of each column."""
    columns = list(look_at(raw))
    for lines in (first, oddities(raw, columns), raw.remarks(), agreement(raw), lines_of(columns)):
        for line in lines:
            print(line)


def check(raw, checks):
    """Everything that is wrong or odd in the tables, printed, the heaviest first; Stop where something is
    wrong. raw: with `faults`; checks: {names of tables that must be whole: a call that may end in Stop}."""
    raw.check()
    for tables, call in checks.items():
        if raw.whole(*tables.split()):
            with raw.noting():
                call()
    show(raw, *(f"wrong: {fault}" for fault in raw.faults), *try_pictures(raw))
    if raw.faults:
        raise Stop(f"{raw.folder}: {len(raw.faults)} thing(s) wrong, said above")
    print(f"{raw.folder}: nothing is wrong")
