"""Wikimedia Commons image search, results rated by people -> raw tables.

    python data/from_commons.py SOURCE --out data/commons
    python data/from_commons.py SOURCE --out data/commons --images PICTURES

Reads   SOURCE: the dump sql/ratedSearchResult_20211207.sql of github.com/cormacparle/media-search-signal-test
        (MIT licence), or a table of it as CSV with the columns id, search_term, language, file_name, rating;
        either may be gzipped
        PICTURES: a folder with pictures under their Commons names. Each has its own licence, which its page
        on commons.wikimedia.org names. Without pictures a file's name is all that is known of it
Writes  OUT/pins, queries, labels, impressions .parquet, skipped_ratings.csv, images/

    file name without ending, underscores as spaces     title
    rating -1 (bad), 0 (passable), 1 (good)             label 1, 3, 5
    no rating                                           an unlabelled impression

Only searches that people typed are used, the rows up to id 10,690. The later ones are titles of articles,
most of them Vietnamese, Bengali, Czech, Cebuano or Arabic, whose pictures were rated as illustrations of the
article: nobody searched for these. `language` is the one a search was made in; its words may be another's.

A query is its text, `lower(trim(NFC(text)))`. Queries are dealt by a hash of it: the ratings of 40 % train,
those of 40 % evaluate, and those of the other 20 % are hidden: they become impressions. Evaluation leaves out
queries whose ratings are all of one kind, which no order of the results can get wrong: they go to training.

What was shown is little: a student learns from more pairs than these. So every query that does not evaluate
is crossed with results of others (--cross), as candidates a search engine would look at: half of them share
its rarest words, the others are drawn at random. These pairs are made here, Commons has not logged them.
"""

import argparse
import csv
import gzip
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lib.stages.files import link_or_copy, write_parquet  # noqa: E402
from lib.stages.settings import ROOT  # noqa: E402
from lib.stages.terminal import Stop, run_main  # noqa: E402
from lib.tables.additions import list_skipped  # noqa: E402
from lib.tables.splits import in_hash_split, query_key  # noqa: E402

HOME = "github.com/cormacparle/media-search-signal-test, sql/ratedSearchResult_20211207.sql"
LAST_TYPED = 10_690  # id of the last search that somebody typed
LEVEL = {"-1": 1, "0": 3, "1": 5}  # rating -> level
COLUMNS = ("id", "search_term", "wikidata_id", "language", "file_name", "rating")

# A row of the dump, as MySQL writes it: (1,'Big Ben','Q41225','en','Big Ben.jpg',1)
TEXT = r"(NULL|'(?:[^'\\]|\\.)*')"
SQL_ROW = re.compile(rf"\((\d+),{TEXT},{TEXT},{TEXT},{TEXT},(NULL|-?\d+)\)")


# ------------------------------------------------------------------------------------------------------------
# The source


def read_source(path):
    """The rows of the dump or the CSV, as dicts of text; nothing is ''."""
    if not path.is_file():
        raise Stop(f"{path}: missing; get it from {HOME}")
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8", newline="") as f:
        if path.name.removesuffix(".gz").endswith(".sql"):
            rows = [sql_row(match.groups()) for match in SQL_ROW.finditer(f.read())]
        else:
            rows = list(csv.DictReader(f))
    needed = {*COLUMNS} - {"wikidata_id"}
    if not rows or not needed <= rows[0].keys():
        raise Stop(f"{path}: no rows with the columns {', '.join(sorted(needed))}; get it from {HOME}")
    for row in rows:
        bad_rating = row["rating"] not in ("", *LEVEL)
        if bad_rating or not row["id"].isdecimal() or not query_key(row["search_term"]):
            raise Stop(f"{path}: a row is not as expected: {dict(row)}; a rating is -1, 0, 1 or nothing")
    return rows


def sql_row(values):
    """The values of a row as they stand in the dump -> a dict of text."""
    row = {}
    for column, value in zip(COLUMNS, values):
        text = "" if value == "NULL" else value
        if text.startswith("'"):
            text = re.sub(r"\\(.)", r"\1", text[1:-1])  # \' and \" and \\
        row[column] = text
    return row


def title_of(file_name):
    """'Big_Ben_(8921228937).jpg' -> 'Big Ben (8921228937)'"""
    return file_name.replace("_", " ").rpartition(".")[0] or file_name


def words_of(text):
    """The set of a text's words."""
    return set(re.findall(r"\w+", query_key(text.replace("_", " "))))


# ------------------------------------------------------------------------------------------------------------
# Ratings -> labels and impressions


def side_of_queries(ratings, train_share, eval_share):
    """{query: 'train', 'eval' or 'hidden'} from {query: set of its levels}."""
    queries = sorted(ratings)
    training = in_hash_split(queries, train_share, "commons")
    dealt = in_hash_split(queries, train_share + eval_share, "commons")
    sides = {}
    for query, train, labelled in zip(queries, training, dealt):
        sides[query] = "train" if train else "eval" if labelled else "hidden"
        if sides[query] == "eval" and len(ratings[query]) < 2:
            sides[query] = "train"
    return sides


def select_rows(rows):
    """(rows to use, rows to list as skipped with a reason). A pair of query and file is used once."""
    used, skipped, seen = [], [], set()
    for row in rows:
        pair = (query_key(row["search_term"]), row["file_name"])
        if int(row["id"]) > LAST_TYPED:
            skipped.append((*row.values(), "an article's title, no typed search"))
        elif pair in seen:
            skipped.append((*row.values(), "this search and file stand in an earlier row"))
        else:
            seen.add(pair)
            used.append(row)
    return used, skipped


def cross_pairs(shown, titles, crossing, count, seed):
    """Pairs of a query with results of others: (query, file). shown: {query: files shown for it}; titles:
    {file: title}; crossing: the queries to cross; count: pairs a query, half of them near, half random."""
    rng = np.random.default_rng(seed)
    files = sorted(titles)
    files_with = defaultdict(list)
    for file in files:
        for word in words_of(titles[file]):
            files_with[word].append(file)
    pairs = []
    for query in crossing:
        near = nearest(query, files_with, shown[query], count // 2)
        drawn = [files[i] for i in rng.permutation(len(files))[: count + len(shown[query])]]
        others = [file for file in drawn if file not in shown[query] and file not in near]
        for file in (near + others)[:count]:
            pairs.append((query, file))
    return pairs


def nearest(query, files_with, without, count):
    """At most `count` files whose titles share words with the query, by the sum of 1 / (files with the word),
    so that rare words count most. `without`: files that do not count. Ties by name."""
    score = Counter()
    for word in sorted(words_of(query)):
        for file in files_with.get(word, ()):
            score[file] += 1 / len(files_with[word])
    ranked = sorted((-value, file) for file, value in score.items() if file not in without)
    return [file for _, file in ranked[:count]]


# ------------------------------------------------------------------------------------------------------------
# Pictures


def place_image(file_name, pictures, out):
    """Brings a picture into the dataset, by a hard link if possible; its path there, or None."""
    if pictures is None or Path(file_name).name != file_name:
        return None
    for name in (file_name, file_name.replace(" ", "_")):  # a download from Commons has underscores
        if (pictures / name).is_file():
            target = out / "images" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            link_or_copy(pictures / name, target)
            return f"images/{name}"
    return None


# ------------------------------------------------------------------------------------------------------------


def make_tables(rows, args):
    """The rows to use -> {table: {column: values}}."""
    texts, languages, ratings, shown = {}, {}, defaultdict(set), defaultdict(set)
    for row in rows:
        query = query_key(row["search_term"])
        texts.setdefault(query, row["search_term"].strip())
        languages.setdefault(query, row["language"] or "en")
        shown[query].add(row["file_name"])
        if row["rating"]:
            ratings[query].add(LEVEL[row["rating"]])
    sides = side_of_queries({query: ratings[query] for query in texts}, args.train_share, args.eval_share)
    numbers = {query: f"q{number:05d}" for number, query in enumerate(texts)}

    labels, impressions = [], []
    for row in rows:
        query, file = query_key(row["search_term"]), row["file_name"]
        if row["rating"] and sides[query] != "hidden":
            labels.append((numbers[query], file, LEVEL[row["rating"]], sides[query]))
        else:
            impressions.append((numbers[query], file))
    titles = {row["file_name"]: title_of(row["file_name"]) for row in rows}
    crossing = [query for query in texts if sides[query] != "eval"]
    for query, file in cross_pairs(shown, titles, crossing, args.cross, args.seed):
        impressions.append((numbers[query], file))

    pins = {"pin_id": list(titles), "title": list(titles.values())}
    pins["description"] = pa.nulls(len(titles), pa.string())
    if args.images:
        images = [place_image(file, args.images, args.out) for file in titles]
        pins["image"] = pa.array(images, pa.string())
    return {
        "pins": pins,
        "queries": {
            "query_id": list(numbers.values()),
            "query": list(texts.values()),
            "language": list(languages.values()),
        },
        "labels": as_columns(("query_id", "pin_id", "label", "split"), labels),
        "impressions": as_columns(("query_id", "pin_id"), impressions),
    }


def as_columns(names, rows):
    """Tuples -> {name: values}."""
    return dict(zip(names, (list(values) for values in zip(*rows)))) if rows else {name: [] for name in names}


def summary(tables):
    """Rows a table; labels and queries of each split."""
    lines = [", ".join(f"{len(next(iter(columns.values()))):,} {name}" for name, columns in tables.items())]
    labels = tables["labels"]
    for split in ("train", "eval"):
        of_split = [row for row in zip(*labels.values()) if row[3] == split]
        counts = Counter(row[2] for row in of_split)
        levels = ", ".join(f"level {level} {n:,}" for level, n in sorted(counts.items()))
        lines.append(
            f"{split}: {len(of_split):,} labels of {len({row[0] for row in of_split}):,} queries: {levels}"
        )
    if "image" in tables["pins"]:
        images = tables["pins"]["image"]
        lines.append(f"pictures: {len(images) - images.null_count:,} of {len(images):,} pins")
    return lines


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument(
        "source", type=Path, metavar="SOURCE", help="the dump (.sql) or a CSV of it; may be gzipped"
    )
    p.add_argument(
        "--out", type=Path, default=ROOT / "data" / "commons", metavar="DIR", help="dataset folder"
    )
    p.add_argument(
        "--images", type=Path, metavar="DIR", help="folder with pictures under their Commons names"
    )
    p.add_argument("--train-share", type=float, default=0.4, help="share of the queries that train (0.4)")
    p.add_argument("--eval-share", type=float, default=0.4, help="share of the queries that evaluate (0.4)")
    p.add_argument(
        "--cross", type=int, default=20, metavar="N", help="other results a query is crossed with (20)"
    )
    p.add_argument("--seed", type=int, default=0, help="of the random cross pairs (0)")
    args = p.parse_args(argv)
    if args.images and not args.images.is_dir():
        raise Stop(f"--images {args.images}: no such folder")
    return args


def main(argv=None):
    args = parse_args(argv)
    rows = read_source(args.source)
    used, skipped = select_rows(rows)
    if not used:
        raise Stop(f"{args.source}: no row with an id up to {LAST_TYPED:,}, a typed search")
    tables = make_tables(used, args)
    for name, columns in tables.items():
        write_parquet(args.out / f"{name}.parquet", columns)
    listed = args.out / "skipped_ratings.csv"
    list_skipped(listed, (*rows[0], "reason"), skipped)
    print(f"wrote {args.out}: " + "\n  ".join(summary(tables)))
    print(f"  {len(rows):,} rows in, {len(used):,} used, {len(skipped):,} listed in {listed.name}")


if __name__ == "__main__":
    run_main(main)
