"""The raw tables of a dataset: how they are opened, and what must hold of them. data/README.md is the
contract in words. Nothing that is read is trusted: what does not hold ends in one line (Stop) that names the
file, the column, the number of rows and the first of them.
"""

import contextlib
import re
from pathlib import Path

from lib.stages.files import fingerprint, hashed, stamps
from lib.stages.settings import refuse
from lib.stages.terminal import Stop, progress_bar
from lib.tables.columns import as_text, nested_in, survey
from lib.tables.database import Database
from lib.tables.files import (
    NUMERIC,
    find_table,
    one_line,
    other_files,
    plain_names,
    quoted,
    reader,
    table_name,
    text_literal,
)
from lib.tables.names import near

TABLES = {  # table: columns that it must have, columns that it may have, each with its kind
    "pins": ({"pin_id": "id"}, {"title": "text", "description": "text", "image": "word"}),
    "queries": ({"query_id": "id", "query": "text"}, {"language": "word"}),
    "labels": ({"query_id": "id", "pin_id": "id", "label": "level"}, {"split": "word", "rater": "word"}),
    "impressions": ({"query_id": "id", "pin_id": "id"}, {}),
    "engagements": ({"query": "text", "pin_id": "id", "date": "date", "count": "whole number"}, {}),
    "boards": ({"pin_id": "id", "board_title": "text"}, {}),
    "link_visits": (
        {"pin_id": "id", "dwell_seconds": "number"},
        {"link_title": "text", "link_description": "text"},
    ),
}
REQUIRED = ("pins", "queries", "labels", "impressions")
LOGS = ("engagements", "boards", "link_visits")

# What must hold beyond types: (table, column, SQL that finds the rows that break it, what is wrong with them)
TWICE = "SELECT {1} FROM raw_{0} WHERE {1} IS NOT NULL GROUP BY {1} HAVING count(*) > 1"
UNKNOWN = "SELECT {1} FROM raw_{0} ANTI JOIN raw_{2} USING ({1}) WHERE {1} IS NOT NULL"
PAIRS = "SELECT query_id, pin_id FROM raw_labels GROUP BY query_id, pin_id HAVING count({}) > 1"
SPLITS = """SELECT first(l.query_id), query_key(q.query)
    FROM rated_labels l JOIN raw_queries q ON l.query_id = q.query_id
    GROUP BY query_key(q.query) HAVING count(DISTINCT coalesce(l.split, '')) > 1"""
DATES = "SELECT date FROM raw_engagements WHERE date NOT BETWEEN '1970-01-01' AND today() + 1"
DWELL = "SELECT dwell_seconds FROM raw_link_visits WHERE NOT isfinite(dwell_seconds)"
LEVELS = "--levels says what other labels mean"
OUTSIDE, NO_SPLIT = f"outside 1, 2, 3, 4, 5 ({LEVELS})", "neither 'train' nor 'eval'"
DIFFERENT = "(pairs) labelled twice with different labels (by several raters? A column 'rater' names them)"
LINE = r"(?<=\.[ct]sv), line \d+(?=: )"  # of a CSV file, in a fault
IDS = (("queries", "query_id"), ("pins", "pin_id"))
RULES = [
    *((table, key, TWICE.format(table, key), "with an id that stands more than once") for table, key in IDS),
    ("labels", "label", "SELECT label FROM rated_labels WHERE label NOT IN (1, 2, 3, 4, 5)", OUTSIDE),
    ("labels", "split", "SELECT split FROM rated_labels WHERE split NOT IN ('train', 'eval')", NO_SPLIT),
    *(
        (table, key, UNKNOWN.format(table, key, other), f"with an id that {{{other}}} does not have")
        for table in ("labels", "impressions")
        for other, key in IDS
    ),
    ("labels", "label", PAIRS.format("DISTINCT label"), DIFFERENT),
    ("labels", "label", PAIRS.format("*"), "(pairs of query and pin) labelled twice"),
    ("labels", "split", SPLITS, "(texts of queries) with labels in more than one split"),
    ("engagements", "count", "SELECT count FROM raw_engagements WHERE count < 0", "below 0"),
    ("engagements", "date", DATES, "in the future, or before 1970"),
    ("link_visits", "dwell_seconds", DWELL, "not finite"),
]

# Kinds: a text may be a list of texts, a word is one. Others than these are DOUBLE.
SQL_TYPES = dict.fromkeys(("id", "text", "word"), "VARCHAR") | {"whole number": "BIGINT", "date": "DATE"}


def kinds_of(name):
    """{column: kind} of a table's contract."""
    must, may = TABLES[name]
    return {**must, **may}


class RawTables(Database):
    """The raw tables of a dataset folder as DuckDB views `raw_NAME`: every column of the contract under its
    name and as its type, further columns as they are stored. Logs are never read into memory: DuckDB scans
    them. Of several raters' labels raw_labels has the median, the lower of two; rated_labels has all.
    levels: {label as it stands in the table: 1 to 5}, or None if labels are 1 to 5; required: names of the
    tables that must be there; faults: a list that takes what is wrong, a line each; without it the first ends
    in Stop."""

    def __init__(self, folder, memory="4GB", levels=None, spill=None, required=REQUIRED, faults=None):
        if not Path(folder).is_dir():
            raise Stop(f"{folder}: no such dataset folder; data/README.md says what it holds")
        super().__init__(folder, memory, spill)
        self.faults, self.broken = faults, set()  # broken: tables that cannot be asked
        self.levels, self.required, self.files, self.name = levels, required, {}, {}
        self.types = {name: {} for name in TABLES}  # of the columns as stored
        self.surveyed = {}
        self.not_read = other_files(self.folder, TABLES)
        for name in TABLES:
            with self.noting(name):
                self.open(name)

    @contextlib.contextmanager
    def noting(self, table=""):
        """A Stop inside the block becomes a line of `faults`, where these are collected. table: one that then
        cannot be asked."""
        try:
            yield
        except Stop as fault:
            if self.faults is None:
                raise
            said, but_for_line = str(fault), [re.sub(LINE, "", known) for known in self.faults]
            if re.sub(LINE, "", said) not in but_for_line:  # what cannot be read says so to every check
                self.faults.append(said)
            self.broken.add(table)

    def whole(self, *names):
        """Are these tables there, and can be asked?"""
        return self.files.keys() >= set(names) and self.broken.isdisjoint(names)

    def open(self, name):
        """Makes the views file_NAME (as stored) and raw_NAME (as the contract says)."""
        files, base, others = find_table(self.folder, name)
        self.not_read += others
        contract, source = kinds_of(name), "LIMIT 0"
        if not files:
            self.refuse_missing(name)
        with one_line(base or self.folder):
            if files:
                self.files[name], self.name[name] = files, base.name + "/" * base.is_dir()
                sql, stored = reader(self.db, files, base, contract)
                names = plain_names(stored, contract)
                self.types[name] = {names[column]: stored[column] for column in stored}
                columns = [f"{quoted(old)} AS {quoted(new)}" for old, new in names.items()]
                self.db.execute(f"CREATE VIEW file_{name} AS SELECT {', '.join(columns)} {sql}")
                source = f"FROM file_{name}"
            columns = [f"{self.typed(name, column)} AS {column}" for column in contract]
            columns += [quoted(column) for column in self.further(name)]
            view = "rated_labels" if name == "labels" else f"raw_{name}"
            self.db.execute(f"CREATE VIEW {view} AS SELECT {', '.join(columns)} {source}")
            if name == "labels":
                self.merge_raters()
            if files:
                self.require_columns(name)

    def merge_raters(self):
        """Makes raw_labels of rated_labels: one row of each pair."""
        sql = "SELECT * EXCLUDE (rater) FROM rated_labels"
        if "rater" in self.types["labels"]:
            others = ["split", *map(quoted, self.further("labels"))]
            merged = ["quantile_disc(label, 0.5) AS label", *(f"min({name}) AS {name}" for name in others)]
            sql = f"SELECT query_id, pin_id, {', '.join(merged)} FROM rated_labels GROUP BY ALL ORDER BY 1, 2"
        self.db.execute(f"CREATE VIEW raw_labels AS {sql}")

    def require_columns(self, name):
        """Stop, with the columns that look like them, if any that a table must have are missing."""
        missing = [column for column in TABLES[name][0] if column not in self.types[name]]
        if missing:
            further, found = self.further(name), ", ".join(map(repr, sorted(self.types[name]))) or "none"
            alike = [f"; is {other!r} {column!r}?" for column in missing for other in near(column, further)]
            named = ", ".join(map(repr, missing))
            are = f"column {named} is" if len(missing) == 1 else f"columns {named} are"
            raise Stop(f"{self.files[name][0]}: {are} missing; it has {found}{''.join(alike)}")

    def refuse_missing(self, name):
        """Stop, with the file that may be meant, if a table that must be there is not."""
        if name in self.required:
            for path in sorted(self.folder.iterdir()):
                if path.is_dir() and table_name(path) == name:
                    raise Stop(f"{path}/: no table is in this folder (.parquet, .csv or .jsonl)")
            alike, known = near(name, self.not_read), ", ".join(self.not_read)
            other = f" ({known}: not the name of a table)" if known else ""
            other = f" ({alike[0]}: a table of {name}? Then rename it)" if alike else other
            where = f"{self.folder / name}.parquet (or .csv, .jsonl, or a folder {name}/)"
            raise Stop(f"{where}: missing{other}; data/README.md says what it holds")

    def typed(self, name, column):
        """SQL of a column of the contract as its kind; null where it is not of that kind."""
        kind, stored = kinds_of(name)[column], self.types[name].get(column)
        sql_type = SQL_TYPES.get(kind, "DOUBLE")
        if stored is None:
            return f"NULL::{sql_type}"
        text, nested = as_text(column, stored), nested_in(column, stored, one=kind != "text")
        source = column if NUMERIC.fullmatch(stored) and kind != "date" else text  # true, as a text, is no 1
        value = f"TRY_CAST({source} AS {sql_type})"
        if sql_type == "VARCHAR":
            value = text
        elif kind == "level" and self.levels:
            cases = [f"WHEN {text_literal(label)} THEN {level}" for label, level in self.levels.items()]
            value = f"(CASE trim({text}) {' '.join(cases)} END)::DOUBLE"
        elif kind == "whole number":  # a cast alone would round
            value = f"CASE WHEN TRY_CAST({source} AS DOUBLE) = {value} THEN {value} END"
        return value if nested == "false" else f"CASE WHEN NOT coalesce({nested}, false) THEN {value} END"

    def further(self, name):
        """Names of the columns of a table that the contract does not name."""
        return sorted(set(self.types[name]) - set(kinds_of(name)))

    def columns(self, name):
        """{name: Column} of a table's further columns; of labels and impressions those that both have."""
        if name not in self.surveyed:
            wanted, other = self.further(name), {"labels": "impressions", "impressions": "labels"}.get(name)
            if other:
                shared = {column.lower() for column in self.further(other)}
                wanted = [column for column in wanted if column.lower() in shared]
            self.surveyed[name] = survey(self, name, wanted)
        return self.surveyed[name]

    def fingerprints(self):
        """{"table NAME": hash of its files' content and of the folders of the dataset that they stand in}."""
        found = {}
        for name, files in self.files.items():
            content = [[str(path.parent.relative_to(self.folder)), fingerprint(path)] for path in files]
            found[f"table {name}"] = hashed(content)
        return found

    def stamps(self):
        """Stamps of all files of tables and embeddings."""
        own = sorted((self.folder / "embeddings").glob("*.*"))
        return stamps(self.folder, [path for files in self.files.values() for path in files] + own)

    def count_rows(self):
        """{table: its number of rows}"""
        return {name: self.ask(f"SELECT count(*) FROM raw_{name}")[0][0] for name in self.files}

    def remarks(self):
        """Lines on what is not used: how many rows of a log have a pin of ours; files that are not read."""
        for name in LOGS:
            if not self.whole(name, "pins"):
                continue
            known = "count(*) FILTER (pin_id IN (SELECT pin_id FROM raw_pins))"
            rows, used = self.ask(f"SELECT count(*), {known} FROM raw_{name}")[0]
            nothing = "" if used else f": nothing of it is used! Are these the ids of {self.name['pins']}?"
            yield f"{self.name[name]}: {used:,} of {rows:,} rows have a known pin{nothing}"
        if self.not_read:
            absent = TABLES.keys() - self.files.keys()
            guess = {file: name for name in sorted(absent) for file in near(name, self.not_read)}
            named = [f"{file} ({guess[file]}?)" if file in guess else file for file in self.not_read]
            yield f"not read: {', '.join(named)}"

    # Checks

    def check(self):
        """Everything that data/README.md promises, or Stop."""
        there = [name for name in self.files if self.types[name]]
        for name in progress_bar(iterable=there, desc="tables read", unit=" tables"):
            with self.noting(name):
                if not self.ask(f"SELECT 1 FROM file_{name} LIMIT 1", self.name[name]):
                    raise Stop(f"{self.name[name]}: the table is empty")
            for column, kind in kinds_of(name).items():
                if column in self.types[name]:
                    with self.noting():
                        self.check_kind(name, column, kind)
        for name, column, sql, problem in progress_bar(iterable=RULES, desc="tables checked", unit=" rules"):
            read = re.findall(r"\b(?:raw|rated)_(\w+)", sql)
            if name in self.files and self.broken.isdisjoint(read):
                with self.noting():
                    self.reject_rows(name, column, sql, problem.format(**self.name))

    def check_kind(self, name, column, kind):
        """Stop if a value is not of its column's kind, or null or blank where it must be there."""
        what = {"level": f"a number ({LEVELS})", "id": "text", "word": "one text"}.get(kind, kind)
        if kind == "level" and self.levels:
            what = f"one of {', '.join(self.levels)}"
        value, must = self.typed(name, column), column in TABLES[name][0]
        blank = f"{value} IS NULL OR is_blank({as_text(column, self.types[name][column])})"
        bad = blank if must else f"{column} IS NOT NULL AND {value} IS NULL"
        problem = "empty or " * must + f"not {what}"
        self.reject_rows(name, column, f"SELECT {column} FROM file_{name} WHERE {bad}", problem)

    def reject_rows(self, name, column, bad_rows, problem):
        """Stop if the query `bad_rows` returns any row: file, column, how many rows, the first of them."""
        sql = f"SELECT count(*), first(COLUMNS(*)::VARCHAR) FROM ({bad_rows})"
        count, *first = self.ask(sql, self.name[name])[0]
        if count:
            rows = "1 row" if count == 1 else f"{count:,} rows"
            shown = ", ".join(repr(value)[:80] for value in first)
            labels = f"; there are {self.labels_found()}" if LEVELS in problem else ""
            raise Stop(f"{self.name[name]}: column {column!r}: {rows} {problem}, the first: {shown}{labels}")

    def labels_found(self, most=8):
        """The different labels as they stand in the table, in words."""
        found = self.ask(f"SELECT DISTINCT label::VARCHAR AS l FROM file_labels ORDER BY l LIMIT {most + 1}")
        return ", ".join(str(label)[:20] for (label,) in found[:most]) + ", …" * (len(found) > most)


def levels_of(text):
    """'E=5,S=4,C=3,I=1' -> {"E": 5, "S": 4, "C": 3, "I": 1}; '': None."""
    pairs = [re.fullmatch(r"\s*(\S.*?)\s*=([1-5])\s*", part) for part in text.split(",")] if text else []
    if not all(pairs) or len({pair[1] for pair in pairs}) < len(pairs):
        rule = "write LABEL=LEVEL,…, each label once, levels 1 to 5: E=5,S=4,C=3,I=1"
        refuse(f"--levels {text}: {rule}")
    return {pair[1]: int(pair[2]) for pair in pairs} or None
