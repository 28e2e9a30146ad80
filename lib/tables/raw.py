"""The raw tables of a dataset: how they are opened, and what must hold of them. data/README.md is the
contract in words; files.py reads files, database.py asks them, images.py reads pictures, embeddings.py users'
own vectors, indexed.py numbers the rows.

It trusts nothing that it reads: what does not hold ends in one line
(Stop) that names the file, the column, the number of rows and the first of them.
"""

from pathlib import Path

from lib.stages.files import fingerprint, hashed
from lib.stages.terminal import Stop
from lib.tables.database import Database
from lib.tables.files import find_table, one_line, other_files, plain_names, quoted, reader, text_literal

TABLES = {  # table: columns that it must have, columns that it may have, each with its kind
    "pins": ({"pin_id": "id"}, {"title": "text", "description": "text", "image": "text"}),
    "queries": ({"query_id": "id", "query": "text"}, {"language": "text"}),
    "labels": ({"query_id": "id", "pin_id": "id", "label": "level"}, {"split": "text"}),
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
TWICE = "SELECT {1} FROM raw_{0} GROUP BY {1} HAVING count(*) > 1"
UNKNOWN = "SELECT {1} FROM raw_{0} ANTI JOIN raw_{2} USING ({1})"
PAIRS = "SELECT query_id, pin_id FROM raw_labels GROUP BY ALL HAVING count({}) > 1"
SPLITS = """SELECT first(query_id), query_key(query) FROM raw_labels JOIN raw_queries USING (query_id)
    GROUP BY query_key(query) HAVING count(DISTINCT coalesce(split, '')) > 1"""
DATES = "SELECT date FROM raw_engagements WHERE date > current_date + 1 OR NOT isfinite(date)"
DWELL = "SELECT dwell_seconds FROM raw_link_visits WHERE NOT isfinite(dwell_seconds)"
LEVELS = "--levels says what other labels mean"
OUTSIDE = f"outside 1, 2, 3, 4, 5 ({LEVELS})"
NO_SPLIT = "neither 'train' nor 'eval'"
NO_QUERY, NO_PIN = "with an id that {queries} does not have", "with an id that {pins} does not have"
REPEATED = "with an id that stands more than once"
RULES = [
    ("pins", "pin_id", TWICE.format("pins", "pin_id"), REPEATED),
    ("queries", "query_id", TWICE.format("queries", "query_id"), REPEATED),
    ("labels", "label", "SELECT label FROM raw_labels WHERE label NOT IN (1, 2, 3, 4, 5)", OUTSIDE),
    ("labels", "split", "SELECT split FROM raw_labels WHERE split NOT IN ('train', 'eval')", NO_SPLIT),
    ("labels", "query_id", UNKNOWN.format("labels", "query_id", "queries"), NO_QUERY),
    ("labels", "pin_id", UNKNOWN.format("labels", "pin_id", "pins"), NO_PIN),
    ("impressions", "query_id", UNKNOWN.format("impressions", "query_id", "queries"), NO_QUERY),
    ("impressions", "pin_id", UNKNOWN.format("impressions", "pin_id", "pins"), NO_PIN),
    ("labels", "label", PAIRS.format("DISTINCT label"), "(pairs) labelled twice with different labels"),
    ("labels", "label", PAIRS.format("*"), "(pairs of query and pin) labelled twice"),
    ("labels", "split", SPLITS, "(texts of queries) with labels in more than one split"),
    ("engagements", "count", "SELECT count FROM raw_engagements WHERE count < 0", "below 0"),
    ("engagements", "date", DATES, "in the future, or without end"),
    ("link_visits", "dwell_seconds", DWELL, "not finite"),
]

SQL_TYPES = {"id": "VARCHAR", "text": "VARCHAR", "whole number": "BIGINT", "date": "DATE"}  # others: DOUBLE


def kinds_of(name):
    """{column: kind} of a table's contract."""
    must, may = TABLES[name]
    return {**must, **may}


class RawTables(Database):
    """The raw tables of a dataset folder as DuckDB views `raw_NAME`: every column of the contract under its
    name and as its type, further columns as they are stored. Logs are never read into memory: DuckDB scans
    them. levels: {label as it stands in the table: 1 to 5}, or None if labels are 1 to 5; required: names of
    the tables that must be there."""

    def __init__(self, folder, memory="4GB", levels=None, spill=None, required=REQUIRED):
        if not Path(folder).is_dir():
            raise Stop(
                f"{folder}: no such dataset folder; make the toy one with: python data/toy/make_toy.py"
            )
        super().__init__(folder, memory, spill)
        self.levels, self.required, self.files, self.name = levels, required, {}, {}
        self.types = {name: {} for name in TABLES}  # of the columns as stored
        self.not_read = other_files(self.folder, TABLES)
        for name in TABLES:
            self.open(name)

    def has(self, name):
        """Is this table there?"""
        return name in self.files

    def open(self, name):
        """Makes the views file_NAME (as stored) and raw_NAME (as the contract says)."""
        files, base, others = find_table(self.folder, name)
        self.not_read += others
        if not files:
            self.open_missing(name)
            return
        contract = kinds_of(name)
        self.files[name] = files
        self.name[name] = base.name + "/" * base.is_dir()
        sample = 20_480 if name in ("impressions", *LOGS) else -1  # of a log not every row is read for it
        with one_line(files[0]):
            sql, stored = reader(self.db, files, base, contract, sample)
            names = plain_names(stored, contract)
            self.types[name] = {names[column]: stored[column] for column in stored}
            for column in TABLES[name][0]:
                if column not in self.types[name]:
                    found = ", ".join(map(repr, sorted(self.types[name]))) or "none"
                    raise Stop(f"{files[0]}: column {column!r} is missing; it has {found}")
            columns = [f"{quoted(old)} AS {quoted(new)}" for old, new in names.items()]
            self.db.execute(f"CREATE VIEW file_{name} AS SELECT {', '.join(columns)} {sql}")
            columns = [f"{self.typed(name, column)} AS {column}" for column in contract]
            columns += [quoted(column) for column in self.further(name)]
            self.db.execute(f"CREATE VIEW raw_{name} AS SELECT {', '.join(columns)} FROM file_{name}")

    def open_missing(self, name):
        """An empty view of a table that is not there, or Stop. An empty log says nothing."""
        if name in self.required:
            other = f" ({', '.join(self.not_read)} cannot be read)" if self.not_read else ""
            where = f"{self.folder / name}.parquet (or .csv, .jsonl, or a folder {name}/)"
            raise Stop(f"{where}: missing{other}; data/README.md says what it holds")
        columns = [f"{self.typed(name, column)} AS {column}" for column in kinds_of(name)]
        self.db.execute(f"CREATE VIEW raw_{name} AS SELECT {', '.join(columns)} LIMIT 0")

    def typed(self, name, column):
        """SQL of a column of the contract as its kind; null where it is not of that kind."""
        kind, stored = kinds_of(name)[column], self.types[name].get(column)
        if stored is None:
            return f"NULL::{SQL_TYPES.get(kind, 'DOUBLE')}"
        text = f"CAST({column} AS VARCHAR)"
        if kind == "text":
            return text
        if stored in ("FLOAT", "DOUBLE") or stored.startswith("DECIMAL"):  # an id 1.0 is the id 1
            text = f"digits({column})"
        if kind == "id":
            return text
        if kind == "level" and self.levels:
            cases = [f"WHEN {text_literal(label)} THEN {level}" for label, level in self.levels.items()]
            return f"(CASE trim({text}) {' '.join(cases)} END)::DOUBLE"
        if kind == "whole number":  # a cast alone would round
            whole = f"TRY_CAST({column} AS BIGINT)"
            return f"CASE WHEN TRY_CAST({column} AS DOUBLE) = {whole} THEN {whole} END"
        return f"TRY_CAST({column} AS {SQL_TYPES.get(kind, 'DOUBLE')})"

    def further(self, name):
        """Names of the columns of a table that the contract does not name."""
        return sorted(set(self.types[name]) - set(kinds_of(name)))

    def fingerprints(self):
        """{"table NAME": hash of its files' content and of the folders of the dataset that they stand in}."""
        found = {}
        for name, files in self.files.items():
            parts = [[str(path.parent.relative_to(self.folder)), fingerprint(path)] for path in files]
            found[f"table {name}"] = hashed(parts)
        return found

    def count_rows(self):
        """{table: its number of rows}"""
        return {name: self.ask(f"SELECT count(*) FROM raw_{name}")[0][0] for name in self.files}

    def remarks(self):
        """Lines on what is not used: how many rows of a log have a pin of ours; files that are not read."""
        for name in filter(self.has, LOGS):
            known = "count(*) FILTER (pin_id IN (SELECT pin_id FROM raw_pins))"
            rows, used = self.ask(f"SELECT count(*), {known} FROM raw_{name}")[0]
            nothing = "" if used else f": nothing of it is used! Are these the ids of {self.name['pins']}?"
            yield f"{self.name[name]}: {used:,} of {rows:,} rows have a known pin{nothing}"
        if self.not_read:
            yield f"not read: {', '.join(self.not_read)}"

    # Checks

    def check(self):
        """Everything that data/README.md promises, or Stop."""
        for name in self.files:
            if not self.ask(f"SELECT 1 FROM file_{name} LIMIT 1", self.name[name]):
                raise Stop(f"{self.name[name]}: the table is empty")
            for column, kind in kinds_of(name).items():
                if column in self.types[name]:
                    self.check_kind(name, column, kind)
        for name, column, sql, problem in RULES:
            if self.has(name):
                self.reject_rows(name, column, sql, problem.format(**self.name))

    def check_kind(self, name, column, kind):
        """Stop if a value is not of its column's kind, or null or blank where it must be there."""
        what = {"level": f"a number ({LEVELS})", "id": "text"}.get(kind, kind)
        if kind == "level" and self.levels:
            what = f"one of {', '.join(self.levels)}"
        value = self.typed(name, column)
        if column in TABLES[name][0]:
            problem = f"empty or not {what}"
            bad = f"{value} IS NULL OR is_blank(CAST({column} AS VARCHAR))"
        else:
            problem = f"not {what}"
            bad = f"{column} IS NOT NULL AND {value} IS NULL"
        self.reject_rows(name, column, f"SELECT {column} FROM file_{name} WHERE {bad}", problem)

    def reject_rows(self, name, column, bad_rows, problem):
        """Stop if the query `bad_rows` returns any row: file, column, how many rows, the first of them."""
        sql = f"SELECT count(*), first(COLUMNS(*)::VARCHAR) FROM ({bad_rows})"
        count, *first = self.ask(sql, self.name[name])[0]
        if count:
            rows = "1 row" if count == 1 else f"{count:,} rows"
            shown = ", ".join(repr(value)[:80] for value in first)
            raise Stop(f"{self.name[name]}: column {column!r}: {rows} {problem}, the first: {shown}")


def levels_of(text):
    """'E=5,S=4,C=3,I=1' -> {"E": 5, "S": 4, "C": 3, "I": 1}; '': None."""
    levels = {}
    for part in text.split(",") if text else ():
        label, equals, level = part.strip().rpartition("=")
        if not label or level not in ("1", "2", "3", "4", "5") or label.strip() in levels:
            rule = "write LABEL=LEVEL,…, each label once, levels 1 to 5: E=5,S=4,C=3,I=1"
            raise Stop(f"--levels {text}: {rule}")
        levels[label.strip()] = int(level)
    return levels or None
