"""A first look at a user's tables, in seconds: what becomes of each column, how far raters agree, and what is
odd without being wrong."""

from lib.stages.terminal import Stop
from lib.tables import columns as further
from lib.tables.files import quoted
from lib.tables.images import load_image
from lib.tables.raw import REQUIRED, kinds_of

# A tag of a language as BCP 47 says it is written, in lower case: en, zh-hant-tw, x-mine
TAG = "([a-z]{2,3}|[ix])(-[a-z0-9]{1,8})*"
ROWS, COLUMNS = 100_000, 40  # of a table's first rows and columns
PICTURES = 200  # opened for a check
URL = "regexp_matches(image, '^\\s*(https?|ftp)://')"
IS_JSON, IS_HTML = "ltrim(v)[1] IN ('{', '[')", "regexp_matches(v, '</?[a-zA-Z][^>]*>')"
NOBODY = "long texts, in a category that nobody reads: into title or description, or leave them out"
ODD = (  # role, SQL of an odd value v, the share of cells from which on it is said, and what: the last counts
    ("category", "length(v) > 40", 0.5, NOBODY),
    ("category", IS_JSON, 0.9, "JSON: a column of its own for each thing in it says more"),
    ("text", IS_HTML, 0.1, "HTML: tags are read as words; take them out"),
)


def look_at(raw):
    """What becomes of the columns of the tables, ids and logs left out: name, role in words, an example, and
    what is odd (text, or None)."""
    for table in REQUIRED:
        if raw.types[table] and raw.whole(table):
            shown = [name for name, kind in kinds_of(table).items() if kind != "id" and name != "rater"]
            shown = [name for name in shown if name in raw.types[table]]
            shown += raw.further(table)
            yield from look_at_table(raw, table, shown[:COLUMNS])
            if more := len(shown[COLUMNS:]):
                yield f"{table}.…", f"{more:,} further columns, not shown", "", None


def look_at_table(raw, table, columns):
    """Likewise of some columns of one table, from its first ROWS rows."""
    odd = ", ".join(f"count(*) FILTER ({sql})" for _, sql, *_ in ODD)
    counts = f"count(DISTINCT v), count(*) FILTER (filled), min(v) FILTER (filled), {odd}"
    texts = ", ".join(f"{quoted(column)}::VARCHAR AS {quoted(column)}" for column in columns)
    some = f"UNPIVOT (SELECT {texts} FROM raw_{table} LIMIT {ROWS}) ON * INTO NAME name VALUE v"
    sql = f"SELECT name, {counts} FROM (SELECT *, NOT is_blank(v) AS filled FROM ({some})) GROUP BY 1"
    found = {name: facts for name, *facts in raw.ask(sql)} if columns else {}
    for column in columns:
        values, cells, example, *odd = found.get(column, (0, 0, None))
        role, said = role_of(raw, table, column), None
        example = raw.labels_found() if role == "level" else example
        for (kind, _, share, what), count in zip(ODD, odd):
            if role == kind and count and count >= share * cells:
                said = f"{count:,} of {cells:,} cells are {what}"
        role += f", {values:,} values" * (role == "category")
        example = " ".join((example or "").split())
        yield f"{table}.{column}", role, example[:40], said


def role_of(raw, table, column):
    """What becomes of a column, in words."""
    if column in kinds_of(table):
        kind = kinds_of(table)[column]
        return column if kind == "word" else kind
    about = raw.columns(table).get(column)
    other = {"labels": "impressions", "impressions": "labels"}.get(table)
    if other:
        is_number = about and about.role == "number"
        return "number of the pair" if is_number else f"left out: no number that {other} has too"
    return about.role + f": {about.odd}" * (about.role == "left out")


def lines_of(columns):
    """Columns as a table of text."""
    rows = [("column", "is", "for example", None), *columns]
    widths = [max(len(row[place]) for row in rows) for place in (0, 1)]
    for name, role, example, _ in rows if columns else ():
        yield f"  {name:<{widths[0]}}  {role:<{widths[1]}}  {example}".rstrip()


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
        bad = f"NOT regexp_full_match(plain_tag(language), '{TAG}')"
        rows, first = raw.ask(f"SELECT count(*), first(language) FROM raw_queries WHERE {bad}")[0]
        if rows:
            are = "1 row is" if rows == 1 else f"{rows:,} rows are"
            what = f"{are} no BCP 47 tag such as en or zh-Hant, the first: {first[:80]!r}"
            yield f"odd: {raw.name['queries']}: column 'language': {what}"
    yield from (f"odd: {name}: {odd}" for name, _, _, odd in columns if odd)
    for table in filter(raw.whole, REQUIRED):
        yield from (f"odd: {line}" for line in further.oddities(raw, table))


def agreement(raw):
    """A line on how far raters agree, where several rated a pair: on each two ratings of a pair, in either
    order. Kappa: Cohen, 1968, with quadratic weights."""
    if "rater" not in raw.types["labels"] or not raw.whole("labels"):
        return
    counts = "count(DISTINCT rater), count(*), count(DISTINCT (query_id, pin_id))"
    raters, ratings, pairs = raw.ask(f"SELECT {counts} FROM rated_labels")[0]
    line = f"raters: {raters}, {ratings:,} ratings of {pairs:,} pairs, of which the median counts, ties down"
    equal, kappa = raw.ask("""
        SELECT avg((a.label = b.label)::INT), 1 - avg((a.label - b.label) ** 2) / (2 * var_pop(a.label))
        FROM rated_labels a JOIN rated_labels b USING (query_id, pin_id)
        WHERE a.rater <> b.rater AND a.label + b.label IS NOT NULL""")[0]
    if equal is not None:
        line += f"; two of one pair agree in {equal:.0%}, weighted kappa {kappa:.2f}"
    yield line


def try_pictures(raw):
    """A line on pictures that cannot be read, of the first PICTURES; or none."""
    sql = f"SELECT image FROM raw_pins WHERE NOT is_blank(image) AND NOT {URL} LIMIT {PICTURES}"
    images, bad = raw.ask(sql) if raw.whole("pins") else [], []
    for (image,) in images:
        try:
            load_image(raw.folder, image)
        except ValueError as error:
            bad.append(f"{image!r} ({error})")
    if bad:
        yield f"odd: pictures: {len(bad):,} of {len(images):,} tried cannot be read, the first: {bad[0]}"


def show(raw):
    """Prints what is known of the tables: what is odd, what is used of the logs, how far raters agree, what
    becomes of each column."""
    columns = list(look_at(raw))
    for lines in (oddities(raw, columns), raw.remarks(), agreement(raw), lines_of(columns)):
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
    for name in filter(raw.whole, raw.files):  # bytes that are no UTF-8, in columns and rows not asked so far
        with raw.noting(name):
            raw.ask(f"SELECT sum(length(COLUMNS(*)::VARCHAR)) FROM file_{name}", raw.name[name])
    for line in (*(f"wrong: {fault}" for fault in raw.faults), *try_pictures(raw)):
        print(line)
    show(raw)
    if raw.faults:
        raise Stop(f"{raw.folder}: {len(raw.faults)} thing(s) wrong, said above")
    print(f"{raw.folder}: nothing is wrong")
