"""Judgment lists and result lists of search teams <-> raw tables; labels out of a run.

    python data/judgments.py ratings.csv data/mine           ratings -> labels, and queries that are new there
    python data/judgments.py bm25.run data/mine              a result list -> impressions
    python data/judgments.py outputs/toy teacher.json        03's labels -> a file; --labels human: people's
    python data/judgments.py data/mine ratings.qrels         labels of a dataset -> a file
    python data/judgments.py ratings.csv ratings.txt         a file -> another

data/README.md has the formats. A dataset must hold its pins; judgments that it has no pin or no query for are
listed in its skipped_judgments.csv.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import conversion  # the project's folder is on the path with it
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from tyro.conf import Positional, arg

from common import expected_level
from lib.inputs.inherited import require_pairs
from lib.inputs.pairs import read_labels
from lib.stages.files import whole_file
from lib.stages.settings import flags_read
from lib.stages.terminal import Stop, run_main, stop_on_error
from lib.tables.files import list_skipped
from lib.tables.judgment_files import FORMATS, Judgment, format_of, plain, read_judgments
from lib.tables.raw import RawTables, levels_of
from lib.tables.splits import query_key

PAIR = ["query_index", "pin_index"]
READS = ("pins.parquet", "queries.parquet", "labelled.parquet", "impressions/*")  # of features/ and labels/


@dataclass(frozen=True)
class Settings:
    """What is converted, and how."""

    source: Positional[Annotated[Path, arg(metavar="FROM")]]  # a file, a run, or a dataset with labels
    target: Positional[Annotated[Path, arg(metavar="TO")]]  # a file, or a dataset with pins
    format: Literal[tuple(FORMATS)] | None = None  # of a file whose name does not say it; of two: the source
    labels: Literal["teacher", "human"] = "teacher"  # of a run: 03's, or people's
    levels: str = ""  # what ratings in a file mean, such as 100=5,10=4,1=3,0=1 (default: they are levels)
    queries: Path | None = None  # dataset by which queries in a file have their ids and texts
    split: Literal["train", "eval"] | None = None  # of labels in a dataset (default: by a hash of the query)
    language: str = "en"  # of queries that are new in a dataset


def of_run(run, which, expected):
    """Judgments of a run, each pair once, best first: people's labels, or 03's of every labelled and shown
    pair, its most probable level or its expected one."""
    made = require_pairs(run, READS, labels=which == "teacher")
    features, parts = run / "features", []
    paths = [features / "labelled.parquet"]
    if which != "human" and not made.get("labels", {"arguments": {}})["arguments"].get("only_labelled"):
        paths += sorted(features.glob("impressions/part-*.parquet"))
    for path in paths:
        rows = pd.read_parquet(path, columns=[*PAIR, "label"] if which == "human" else PAIR)
        if which != "human":
            p = read_labels(run / "labels" / path.relative_to(features))
            rows["label"] = expected_level(p) if expected else p.argmax(1) + 1
        parts.append(rows)
    rows = pd.concat(parts).drop_duplicates(PAIR)
    print(f"{run}: {len(rows):,} pairs of {rows['query_index'].nunique():,} queries")
    queries = pq.read_table(features / "queries.parquet", columns=["query_id", "query"]).to_pylist()
    pins = pq.read_table(features / "pins.parquet", columns=["pin_id", "title"])
    order = ["query_index", "label", "pin_index"]
    for row in rows.sort_values(order, ascending=[True, False, True]).itertuples():
        pin_id, title = (pins[name][row.pin_index].as_py() for name in ("pin_id", "title"))
        yield Judgment(*queries[row.query_index].values(), pin_id, float(row.label), title)


def of_dataset(folder):
    """The labels of a dataset as Judgments."""
    raw = RawTables(folder, required=("pins", "queries", "labels"))
    raw.check()
    sql = """
        SELECT query_id, query, pin_id, label, coalesce(title, '') FROM raw_labels
        JOIN raw_queries USING (query_id) JOIN raw_pins USING (pin_id) ORDER BY query_id, pin_id"""
    return (Judgment(*row) for row in raw.ask(sql))


def known_queries(judgments, raw):
    """Judgments under the ids and texts that a dataset gives their queries; those it does not have as they
    are."""
    texts = dict(raw.ask("SELECT query_id, query FROM raw_queries ORDER BY query_id DESC"))
    ids = {query_key(text): query_id for query_id, text in texts.items()}
    for found in judgments:
        if found.query is not None and query_key(found.query) in ids:
            found = found._replace(query_id=ids[query_key(found.query)])
        elif found.query is not None and found.query_id in texts:
            known = texts[found.query_id]
            raise Stop(f"{raw.folder}: query {found.query_id!r} is {known!r}, not {found.query!r}")
        yield found._replace(query=texts.get(found.query_id, found.query))


def translated(judgments, levels, back):
    """Ratings of a file -> levels as --levels says; back: levels -> ratings."""
    levels_found = levels_of(levels).items()
    with stop_on_error(f"--levels {levels}: ratings are numbers"):
        meaning = {float(rating): level for rating, level in levels_found}
    if back:
        meaning = {level: rating for rating, level in meaning.items()}
    for found in judgments:
        if found.rating not in meaning:
            raise Stop(f"--levels {levels}: says nothing of {found.rating:g}, of query {found.query_id!r}")
        yield found._replace(rating=meaning[found.rating])


def add_judgments(judgments, table, settings):
    """Judgments -> labels or impressions of a dataset, and queries that it does not have yet."""
    folder, raw = settings.target, RawTables(settings.target, required=("pins",))
    judgments = list(known_queries(judgments, raw))
    asked = pa.table({"pin_id": [found.pin_id for found in judgments]})
    known = raw.ask("SELECT pin_id FROM raw_pins SEMI JOIN asked USING (pin_id)", asked=asked)
    pins, used, skipped = {pin for (pin,) in known}, [], []
    for found in judgments:
        problem = "no such pin" if found.pin_id not in pins else "no such query" if not found.query else None
        if problem:
            skipped.append((found.query or found.query_id, found.pin_id, plain(found.rating), problem))
        else:
            used.append(found)
    if skipped:
        list_skipped(folder / "skipped_judgments.csv", ("query", "pin_id", "rating", "reason"), skipped)
    if not used:
        raise Stop(f"{settings.source}: no pin or no query in {folder} for all {len(skipped):,} judgments")
    query_id, query, pin_id, rating, _ = zip(*used)
    tables = {table: {"query_id": query_id, "pin_id": pin_id}}
    if table == "labels":
        tables[table] |= {"label": rating, "split": pa.array([settings.split] * len(used), pa.string())}
    old = {query for (query,) in raw.ask("SELECT query_id FROM raw_queries")}
    new = {key: text for key, text in zip(query_id, query) if key not in old}
    if new:
        languages = [settings.language] * len(new)
        tables["queries"] = {"query_id": list(new), "query": list(new.values()), "language": languages}
    rows = conversion.add_tables(folder, settings.source.stem, tables)
    print(f"{folder}: {rows[table]:,} {table}, {len(new):,} new queries; {len(skipped):,} judgments skipped")


def write_judgments(path, judgments, name):
    """Judgments, those of a query together -> a file of the format `name`."""
    wrong = stop_on_error(f"{path}: not written as {name}")
    with whole_file(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file, wrong:
        FORMATS[name][2](file, judgments)
    print(f"wrote {path}, {name}")


def main(argv=None):
    settings = flags_read(Settings, None, argv, __doc__.split("\n")[0])
    source, target = settings.source, settings.target
    to_file, from_file = not target.is_dir(), not source.is_dir()
    read_as = format_of(source, settings.format) if from_file else None
    write_as = format_of(target, None if from_file else settings.format) if to_file else None

    # 1. Judgments
    if from_file:
        judgments = read_judgments(source, read_as)
    elif (source / "features").is_dir():
        judgments = of_run(source, settings.labels, expected=write_as == "run")
    else:
        judgments = of_dataset(source)
    if settings.queries:
        judgments = known_queries(judgments, RawTables(settings.queries, required=("queries",)))
    if settings.levels and from_file != to_file and "run" not in (read_as, write_as):
        judgments = translated(judgments, settings.levels, back=to_file)

    # 2. Into a file or a dataset
    if to_file:
        write_judgments(target, judgments, write_as)
    else:
        add_judgments(judgments, "impressions" if read_as == "run" else "labels", settings)


if __name__ == "__main__":
    run_main(main)
