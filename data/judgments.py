"""Judgment lists and result lists of search teams -> tables of a dataset that holds its pins.

    python data/judgments.py ratings.csv data/mine       ratings -> labels/, and queries that are new there
    python data/judgments.py bm25.run data/mine          a result list -> impressions/

Files: lib/tables/result_lists.py. What the dataset has no pin or no query for, and what has no rating, is
listed in its skipped_judgments.csv.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pyarrow as pa
from tyro.conf import Positional, arg

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lib.stages.settings import flags_read  # noqa: E402
from lib.stages.terminal import Stop, run_main  # noqa: E402
from lib.tables.additions import TEXTS, add_tables  # noqa: E402
from lib.tables.files import list_skipped  # noqa: E402
from lib.tables.raw import RawTables, levels_of  # noqa: E402
from lib.tables.result_lists import read_list  # noqa: E402


@dataclass(frozen=True)
class Settings:
    """What is added, and as what."""

    source: Positional[Annotated[Path, arg(metavar="FROM")]]  # .qrels, .run, or a table
    target: Positional[Annotated[Path, arg(metavar="TO")]]  # dataset folder, with pins
    levels: str = ""  # what ratings mean, such as 100=5,10=4,1=3,0=1 (default: they are levels)
    split: Literal["train", "eval"] | None = None  # of the labels (default: by a hash of the query)
    language: str = "en"  # of queries that are new


SEARCHES = """
    CREATE TABLE searches AS
    SELECT row_number() OVER () AS place, query_id, nullif(trim(pin_id), '') AS pin_id,
        CASE WHEN NOT is_blank(query) THEN trim(query) END AS text, query_key(text) AS key, {value} AS value
    FROM listed"""
# A query is its text; where the list has none, its id must be one of the dataset's.
FOUND = """
    CREATE TABLE found AS
    SELECT place, coalesce(texts.query_id, known.query_id) AS query_id, searches.pin_id, value,
        coalesce(searches.text, searches.query_id) AS query, CASE
        WHEN NOT coalesce(isfinite(value), false) THEN 'no rating'
        WHEN coalesce(texts.query_id, known.query_id) IS NULL THEN 'no such query'
        WHEN searches.pin_id IS NULL OR raw_pins.pin_id IS NULL THEN 'no such pin' END AS problem
    FROM searches LEFT JOIN texts USING (key) LEFT JOIN raw_pins USING (pin_id)
    LEFT JOIN raw_queries known ON searches.key IS NULL AND known.query_id = searches.query_id"""
SKIPPED = """
    SELECT coalesce(query, ''), coalesce(pin_id, ''), coalesce(digits(value), ''), problem FROM found
    WHERE problem IS NOT NULL ORDER BY place"""
USED = """
    SELECT query_id, pin_id, value FROM found WHERE problem IS NULL GROUP BY ALL ORDER BY min(place)"""
NEW = """
    SELECT query_id, text AS query FROM texts WHERE old IS NULL AND query_id IN
    (SELECT query_id FROM found WHERE problem IS NULL) ORDER BY ALL"""


def as_levels(ratings, text):
    """Ratings [N] -> levels [N], as --levels says."""
    try:
        meaning = {float(rating): level for rating, level in (levels_of(text) or {}).items()}
    except ValueError as error:
        raise Stop(f"--levels {text}: ratings are numbers ({error})") from None
    for rating in ratings if meaning else ():
        if rating not in meaning:
            raise Stop(f"--levels {text}: says nothing of {rating:g}")
    return [meaning.get(rating, rating) for rating in ratings]


def main(argv=None):
    settings = flags_read(Settings, None, argv, __doc__.split("\n")[0])
    folder, raw = settings.target, RawTables(settings.target, required=("pins",))

    # 1. Each row of the list with a query of the dataset, or a new one
    listed = read_list(settings.source, ("rating", "score", "rank"))
    value = listed.column_names[-1]
    raw.ask(SEARCHES.format(value=value), listed=listed)
    raw.ask(TEXTS)
    raw.ask(FOUND)

    # 2. What cannot be used
    skipped, skips = raw.ask(SKIPPED), folder / "skipped_judgments.csv"
    if skipped:
        list_skipped(skips, ("query", "pin_id", "rating", "reason"), skipped)
    used = raw.table(USED)
    if not len(used):
        raise Stop(f"{settings.source}: none of {len(skipped):,} rows can be used in {folder}, see {skips}")

    # 3. Labels or impressions, and queries
    name, pairs = "impressions", used.drop_columns(["value"])
    if value == "rating":
        levels = as_levels(used["value"].to_pylist(), settings.levels)
        split = pa.array([settings.split] * len(used), pa.string())
        name, pairs = "labels", pairs.append_column("label", [levels]).append_column("split", split)
    tables, new = {name: pairs}, raw.table(NEW)
    if len(new):
        tables["queries"] = new.append_column("language", [[settings.language] * len(new)])
    rows = add_tables(folder, settings.source.stem, tables)
    print(f"{folder}: {rows[name]:,} {name}, {len(new):,} new queries; {len(skipped):,} judgments skipped")


if __name__ == "__main__":
    run_main(main)
