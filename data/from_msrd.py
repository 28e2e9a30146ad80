"""MSRD (Movie Search Ranking Dataset, Metarank Labs, CC BY-SA 4.0) -> raw tables.

    python data/from_msrd.py SOURCE_DIR --out data/msrd

SOURCE_DIR holds `movies-corpus.jsonl.gz` and `movies-judgments.tsv.gz` (or the same names without .gz), the
form adapted by Elastic: github.com/elastic/elasticsearch-labs, in its folder
notebooks/search/sample_data/learning-to-rank/. The data is share-alike and not part of this project.

    title, overview                 title, description
    tags, genres                    boards: one save a tag, one a genre
    director, actors, characters    link_visits: one visit of 60 s
    grade 0, 1                      label 1, 5

Queries are dealt by a hash of their id: 10 % to human labels for training, 10 % to evaluation, and of the
other 80 % the labels are hidden: they are the unlabelled impressions. A judgment whose movie is not in the
corpus cannot be used: counted, and written to skipped_judgments.csv.
"""

import argparse
import csv
import gzip
import json
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lib.stages.files import write_parquet  # noqa: E402
from lib.stages.settings import ROOT  # noqa: E402
from lib.stages.terminal import Stop, run_main  # noqa: E402
from lib.tables.additions import list_skipped  # noqa: E402
from lib.tables.splits import in_hash_split  # noqa: E402

LEVEL = {"0": 1, "1": 5}  # grade -> level
SOURCE = "github.com/elastic/elasticsearch-labs, notebooks/search/sample_data/learning-to-rank/"


def open_text(folder, name):
    """A text file of the source folder, gzipped or not."""
    if (folder / f"{name}.gz").exists():
        return gzip.open(folder / f"{name}.gz", "rt", encoding="utf-8")
    if (folder / name).exists():
        return open(folder / name, encoding="utf-8")
    raise Stop(f"{folder / name}.gz: missing; get it from {SOURCE}")


def movie_tables(movies):
    """The corpus -> pins, boards and link_visits."""
    pins = {"pin_id": [], "title": [], "description": []}
    boards = {"pin_id": [], "board_title": []}
    links = {"pin_id": [], "link_title": [], "link_description": [], "dwell_seconds": []}
    for movie in movies:
        pin_id = str(movie["id"])
        append(pins, pin_id, movie.get("title"), movie.get("overview"))
        for board in (movie.get("tags") or []) + (movie.get("genres") or []):
            append(boards, pin_id, board)
        people = ", ".join((movie.get("actors") or [])[:5])
        roles = ", ".join((movie.get("characters") or [])[:5])
        cast = "; ".join(text for text in (people, roles) if text) or None
        append(links, pin_id, movie.get("director"), cast, 60.0)
    return {"pins": pins, "boards": boards, "link_visits": links}


def append(table, *row):
    """Adds a row to a dict of columns."""
    for column, value in zip(table.values(), row):
        column.append(value)


def judgment_tables(source, movies, train_share, eval_share):
    """The judgments -> queries, labels and impressions, and the rows that are skipped. movies: known ids."""
    queries, first_id, skipped = {}, {}, []
    labels = {"query_id": [], "pin_id": [], "label": [], "split": []}
    impressions = {"query_id": [], "pin_id": []}
    with open_text(source, "movies-judgments.tsv") as file:
        for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            query, pin, grade = row["query_id"], row["doc_id"], row["grade"]
            if grade not in LEVEL:
                where = (
                    f"{source / 'movies-judgments.tsv'}: grade {grade!r} of query {query!r} and movie {pin!r}"
                )
                raise Stop(f"{where} is neither 0 nor 1")
            if pin not in movies:
                skipped.append((query, pin, grade, "no such movie"))
                continue
            queries[query] = row["query"]
            dealt = first_id.setdefault(row["query"].strip().lower(), query)  # one text, one side
            if in_hash_split([dealt], train_share, "msrd")[0]:
                append(labels, query, pin, LEVEL[grade], "train")
            elif in_hash_split([dealt], train_share + eval_share, "msrd")[0]:
                append(labels, query, pin, LEVEL[grade], "eval")
            else:
                append(impressions, query, pin)
    texts = {"query_id": list(queries), "query": list(queries.values()), "language": ["en"] * len(queries)}
    return {"queries": texts, "labels": labels, "impressions": impressions}, skipped


def convert(source, out, train_share=0.1, eval_share=0.1, max_impressions=None):
    """Writes the raw tables into `out`. Returns the number of rows a table."""
    with open_text(source, "movies-corpus.jsonl") as file:
        movies = [json.loads(line) for line in file if line.strip()]
    known = {str(movie["id"]) for movie in movies}
    judged, skipped = judgment_tables(source, known, train_share, eval_share)
    tables = movie_tables(movies) | judged
    for column, values in tables["impressions"].items():
        tables["impressions"][column] = values[:max_impressions]
    for name, columns in tables.items():
        write_parquet(out / f"{name}.parquet", columns)
    list_skipped(out / "skipped_judgments.csv", ("query_id", "doc_id", "grade", "reason"), skipped)
    counts = {name: len(next(iter(columns.values()))) for name, columns in tables.items()}
    print(f"{out}: {', '.join(f'{n:,} {name}' for name, n in counts.items())}; "
          f"{len(skipped):,} judgments skipped, see {out / 'skipped_judgments.csv'}")  # fmt: skip
    by_split = Counter(zip(tables["labels"]["split"], tables["labels"]["label"]))
    print("labels: " + ", ".join(f"{split} {label}: {n:,}" for (split, label), n in sorted(by_split.items())))
    return counts


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("source", type=Path, metavar="SOURCE_DIR")
    p.add_argument(
        "--out", type=Path, default=ROOT / "data" / "msrd", help="dataset folder (default: data/msrd)"
    )
    p.add_argument(
        "--train-share", type=float, default=0.1, help="of the queries, for the teacher (default: 0.1)"
    )
    p.add_argument("--eval-share", type=float, default=0.1, help="of the queries, to evaluate (default: 0.1)")
    p.add_argument("--max-impressions", type=int, metavar="N", help="keep the first N (default: all)")
    args = p.parse_args(argv)
    convert(args.source, args.out, args.train_share, args.eval_share, args.max_impressions)


if __name__ == "__main__":
    run_main(main)
