"""MSRD (Movie Search Ranking Dataset, Metarank Labs, CC BY-SA 4.0) -> raw tables.

    python data/from_msrd.py SOURCE_DIR --out data/msrd

SOURCE_DIR holds `movies-corpus.jsonl.gz` and `movies-judgments.tsv.gz` (or the same names without .gz), the form adapted by Elastic:
github.com/elastic/elasticsearch-labs, notebooks/search/sample_data/learning-to-rank/. The data is share-alike and not part of this project.

    title, overview                 title, description
    tags, genres                    boards: one save a tag, one a genre
    director, actors, characters    link_visits: one visit of 60 s
    grade 0, 1                      label 1, 5

Queries are dealt by a hash of their id: 10 % to human labels for training, 10 % to evaluation, and of the other 80 % the labels are hidden: they are
the unlabelled impressions. A judgment whose movie is not in the corpus cannot be used: counted, and written to skipped_judgments.csv.
"""

import argparse
import csv
import gzip
import json
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402


LEVEL = {"0": 1, "1": 5}  # grade -> level


def open_text(folder, name):
    """A text file of the source folder, gzipped or not."""
    for path in (folder / f"{name}.gz", folder / name):
        if path.exists():
            return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8")
    raise common.Stop(f"{folder / name}.gz: missing; get it from github.com/elastic/elasticsearch-labs, notebooks/search/sample_data/learning-to-rank/")


def convert(source, out, train_share=0.1, eval_share=0.1, max_impressions=None):
    """Writes the raw tables into `out`. Returns the number of rows a table."""
    with open_text(source, "movies-corpus.jsonl") as f:
        movies = [json.loads(line) for line in f if line.strip()]
    have = {str(m["id"]) for m in movies}
    pins = {"pin_id": [], "title": [], "description": []}
    boards = {"pin_id": [], "board_title": []}
    links = {"pin_id": [], "link_title": [], "link_description": [], "dwell_seconds": []}
    for m in movies:
        key = str(m["id"])
        for column, value in zip(pins, (key, m.get("title"), m.get("overview"))):
            pins[column].append(value)
        for board in (m.get("tags") or []) + (m.get("genres") or []):
            boards["pin_id"].append(key)
            boards["board_title"].append(board)
        people = ", ".join((m.get("actors") or [])[:5])
        roles = ", ".join((m.get("characters") or [])[:5])
        links["pin_id"].append(key)
        links["link_title"].append(m.get("director"))
        links["link_description"].append("; ".join(x for x in (people, roles) if x) or None)
        links["dwell_seconds"].append(60.0)

    queries = {}
    labels = {"query_id": [], "pin_id": [], "label": [], "split": []}
    impressions = {"query_id": [], "pin_id": []}
    skipped = []
    with open_text(source, "movies-judgments.tsv") as f:
        for row in csv.DictReader(f, delimiter="\t", quoting=csv.QUOTE_NONE):
            query, pin = row["query_id"], row["doc_id"]
            if row["grade"] not in LEVEL:
                raise common.Stop(f"{source / 'movies-judgments.tsv'}: grade {row['grade']!r} of query {query!r} and movie {pin!r} is neither 0 nor 1")
            if pin not in have:
                skipped.append((query, pin, row["grade"], "no such movie"))
                continue
            queries[query] = row["query"]
            if common.in_validation([query], train_share, "msrd")[0]:
                split = "train"
            elif common.in_validation([query], train_share + eval_share, "msrd")[0]:
                split = "eval"
            else:
                impressions["query_id"].append(query)
                impressions["pin_id"].append(pin)
                continue
            for column, value in zip(labels, (query, pin, LEVEL[row["grade"]], split)):
                labels[column].append(value)
    if max_impressions:
        impressions = {column: values[:max_impressions] for column, values in impressions.items()}
    tables = {"pins": pins, "queries": {"query_id": list(queries), "query": list(queries.values()), "language": ["en"] * len(queries)},
              "labels": labels, "impressions": impressions, "boards": boards, "link_visits": links}
    for name, columns in tables.items():
        common.write_parquet(out / f"{name}.parquet", pa.table(columns))
    with common.atomic(out / "skipped_judgments.csv") as tmp, open(tmp, "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([("query_id", "doc_id", "grade", "reason"), *skipped])
    counts = {name: len(next(iter(columns.values()))) for name, columns in tables.items()}
    print(f"{out}: " + ", ".join(f"{n:,} {name}" for name, n in counts.items()) + f"; {len(skipped):,} judgments skipped, see {out / 'skipped_judgments.csv'}")
    print("labels: " + ", ".join(f"{split} {label}: {n:,}" for (split, label), n in sorted(Counter(zip(labels["split"], labels["label"])).items())))
    return counts


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("source", type=Path, metavar="SOURCE_DIR")
    p.add_argument("--out", type=Path, default=common.ROOT / "data" / "msrd", metavar="DIR", help="dataset folder to write (default: data/msrd)")
    p.add_argument("--train-share", type=float, default=0.1, help="share of the queries whose labels train the teacher (default: 0.1)")
    p.add_argument("--eval-share", type=float, default=0.1, help="share of the queries whose labels evaluate (default: 0.1)")
    p.add_argument("--max-impressions", type=int, metavar="N", help="keep only the first N impressions (default: all)")
    args = p.parse_args(argv)
    convert(args.source, args.out, args.train_share, args.eval_share, args.max_impressions)


if __name__ == "__main__":
    common.run(main)
