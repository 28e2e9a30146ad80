"""MSRD (Movie Search Ranking Dataset, Metarank Labs, CC BY-SA 4.0) -> raw tables.

    python data/from_msrd.py SOURCE_DIR --out data/msrd

SOURCE_DIR holds `movies-corpus.jsonl` and `movies-judgments.tsv`, each may be gzipped, the form adapted by
Elastic: github.com/elastic/elasticsearch-labs, notebooks/search/sample_data/learning-to-rank/. The data is
share-alike and not part of this project.

    title, overview                 title, description
    tags, genres                    boards: one save a tag, one a genre
    director, actors, characters    link_visits: one visit of 60 s
    grade 0, 1                      label 1, 5

Queries are dealt by a hash of their id: some train, some evaluate, the labels of the others are hidden: they
are impressions. Judgments whose movie is not in the corpus are listed in skipped_judgments.csv.
"""

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import conversion  # the project's folder is on the path with it
from tyro.conf import Positional

from lib.stages.settings import ROOT, flags_read
from lib.stages.terminal import Stop, run_main
from lib.tables.splits import query_key

LEVEL = {"0": 1, "1": 5}  # grade -> level
SOURCE = "github.com/elastic/elasticsearch-labs, notebooks/search/sample_data/learning-to-rank/"


@dataclass(frozen=True)
class Settings:
    """What of the movies is used, and as what."""

    source: Positional[Path]  # folder with the two files
    out: Path = ROOT / "data" / "msrd"  # dataset folder
    train_share: float = 0.1  # of the queries, for the teacher
    eval_share: float = 0.1  # of the queries, to evaluate
    max_impressions: int | None = None  # keep the first of them (default: all)


def movie_tables(movies):
    """The corpus -> pins, boards and link_visits: {table: rows}."""
    pins, boards, visits = [], [], []
    for movie in movies:
        pin_id = str(movie["id"])
        pins.append((pin_id, movie.get("title"), movie.get("overview")))
        boards += [(pin_id, board) for key in ("tags", "genres") for board in movie.get(key) or []]
        names = [", ".join((movie.get(key) or [])[:5]) for key in ("actors", "characters")]
        cast = "; ".join(filter(None, names)) or None
        visits.append((pin_id, 60.0, movie.get("director"), cast))
    return {"pins": pins, "boards": boards, "link_visits": visits}


def judgment_tables(judgments, movies, settings):
    """The judgments, dicts of text -> queries, labels and impressions, and the rows that are skipped. movies:
    known ids."""
    queries, first_id, labels, impressions, skipped = {}, {}, [], [], []
    for row in judgments:
        query, pin, grade = row["query_id"], row["doc_id"], row["grade"]
        if grade not in LEVEL:
            of = f"query {query!r}, movie {pin!r}"
            raise Stop(f"{settings.source}: grade {grade!r} of {of}: neither 0 nor 1")
        if pin not in movies:
            skipped.append((query, pin, grade, "no such movie"))
            continue
        queries[query] = row["query"]
        dealt = first_id.setdefault(query_key(row["query"]), query)  # one text, one side
        side = conversion.side_of(dealt, settings.train_share, settings.eval_share, "msrd")
        if side == "hidden":
            impressions.append((query, pin))
        else:
            labels.append((query, pin, LEVEL[grade], side))
    queries = [(*query, "en") for query in queries.items()]
    impressions = impressions[: settings.max_impressions]
    return {"queries": queries, "labels": labels, "impressions": impressions}, skipped


def main(argv=None):
    settings = flags_read(Settings, None, argv, __doc__.split("\n")[0])
    with conversion.open_text(settings.source / "movies-corpus.jsonl", SOURCE) as file:
        movies = [json.loads(line) for line in file if line.strip()]
    with conversion.open_text(settings.source / "movies-judgments.tsv", SOURCE) as file:
        judgments = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        judged, skipped = judgment_tables(judgments, {str(movie["id"]) for movie in movies}, settings)
    tables = movie_tables(movies) | judged
    columns = ("query_id", "doc_id", "grade")
    conversion.write_dataset(settings.out, tables, "skipped_judgments.csv", columns, skipped)


if __name__ == "__main__":
    run_main(main)
