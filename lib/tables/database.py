"""A DuckDB connection on a dataset: SQL, what it is lent and spills, its errors in one line."""

import contextlib
from pathlib import Path

import duckdb

from lib.stages.settings import refuse
from lib.stages.terminal import first_line
from lib.tables.files import one_line, text_literal

# Characters that are not seen: spaces, control and format characters, fillers, variation selectors.
INVISIBLE = (
    r"[\s\pZ\pC\x{34F}\x{115F}\x{1160}\x{17B4}\x{17B5}\x{180B}-\x{180F}\x{2800}\x{3164}"
    r"\x{FE00}-\x{FE0F}\x{FFA0}]*"
)
SPACES = "".join(filter(str.isspace, map(chr, range(0x3001))))
MACROS = f"""
    CREATE MACRO is_blank(t) AS regexp_full_match(t, '{INVISIBLE}');
    CREATE MACRO query_key(t) AS replace(lower(trim(nfc_normalize(t), '{SPACES}')), 'ς', 'σ');
    CREATE MACRO number(t) AS CASE WHEN abs(TRY_CAST(t AS DOUBLE)) <= 1e30 THEN TRY_CAST(t AS DOUBLE) END;
    CREATE MACRO plain_tag(t) AS nullif(lower(replace(
        regexp_replace(t, '^{INVISIBLE}|{INVISIBLE}$', '', 'g'), '_', '-')), '');
    CREATE MACRO words(j) AS CASE json_type(j) WHEN 'NULL' THEN NULL WHEN 'DOUBLE' THEN digits(j::VARCHAR)
        WHEN 'ARRAY' THEN array_to_string(j->>'$[*]', ' ') WHEN 'VARCHAR' THEN j->>'$' ELSE j::VARCHAR END;
    CREATE MACRO holds_more(j) AS json_type(j) = 'OBJECT'
        OR NOT list_has_all(['VARCHAR', 'NULL'], json_type(j, '$[*]'));
    CREATE MACRO is_number(t) AS
        TRY_CAST(t AS DOUBLE) IS NOT NULL AND NOT regexp_matches(t, '^ *[+-]?0[0-9]|_');
    CREATE MACRO digits(n) AS CASE WHEN regexp_full_match(n::VARCHAR, '-?[0-9]+([.]0+)?|.*[eE].*')
        AND TRY_CAST(n AS DOUBLE) = TRY_CAST(n AS HUGEINT) THEN TRY_CAST(n AS HUGEINT)::VARCHAR
        ELSE regexp_replace(nullif(n::VARCHAR, 'nan'), '([.][0-9]*[1-9])0+$', '\\1') END;
"""


class Database:
    """DuckDB in memory on the files of a folder; beyond `memory` it spills to a folder (spill_to).

    SQL macros: is_blank(text); query_key(text): queries with equal keys are one query; number(value): far
    within fp32, or null; plain_tag(text): a language's, bare; words(JSON): its text, of a list of texts all
    of them; holds_more(JSON): is it nested otherwise; is_number(text): written as a number, without leading
    zeros or _; digits(number): as a text, the same for equal numbers of any type (1, 1.0; 1.5, 1.50; 1e18).
    """

    def __init__(self, folder, memory="4GB", spill=None):
        self.folder = Path(folder)
        try:
            self.db = duckdb.connect(config={"memory_limit": memory, "temp_directory": ""})
            with contextlib.suppress(duckdb.InvalidInputException):  # a notebook that cannot show a bar
                self.db.execute("SET enable_progress_bar = false")
            self.db.execute(f"SET GLOBAL TimeZone = 'UTC'; {MACROS}")  # else a day would be the machine's
        except duckdb.Error as error:  # no size, or too small a one
            refuse(f"--memory {memory}: give a size such as 4GB ({first_line(error)})")
        if spill:
            self.spill_to(spill)

    def spill_to(self, folder):
        """What does not fit into memory goes to this folder."""
        Path(folder).mkdir(parents=True, exist_ok=True)  # DuckDB makes the last folder of a path only
        self.db.execute(f"SET temp_directory = {text_literal(folder)}")

    def ask(self, sql, where="", **arrow):
        """All rows of a query, which may name the Arrow tables `arrow`. What DuckDB finds wrong with a file
        (`where`: its name) or the machine becomes one line."""
        with one_line(self.folder / where):
            return self.lend(self.db, arrow).execute(sql).fetchall()

    def table(self, sql, **arrow):
        """Likewise as an Arrow table."""
        with one_line(self.folder):
            return self.lend(self.db, arrow).sql(sql).to_arrow_table()

    def batches(self, sql, rows=100_000, **arrow):
        """Likewise in order, as a stream of Arrow batches of about `rows` rows."""
        with one_line(self.folder):
            yield from self.lend(self.db.cursor(), arrow).sql(sql).to_arrow_reader(rows)

    @staticmethod
    def lend(connection, arrow):
        """Arrow tables that SQL can name from now on. Returns the connection."""
        for name, table in arrow.items():
            connection.register(name, table)
        return connection
