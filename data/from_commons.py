"""Wikimedia Commons image search, results rated by people -> raw tables.

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

Only searches that people typed are used: the later rows are titles of articles that nobody searched for. A
query is its text; by a hash of it the ratings of 40 % train, those of 40 % evaluate, and those of the other
20 % become impressions. Queries whose ratings are all of one kind, which no order can get wrong, evaluate
nothing: they train. Every query that does not evaluate is crossed with results of others (--cross), half of
which share its rarest words, the others at random: pairs made here, Commons has not logged them.
"""

import csv
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import conversion  # the project's folder is on the path with it
import numpy as np
from tyro.conf import Positional

from lib.stages.files import link
from lib.stages.settings import ROOT, flags_read
from lib.stages.terminal import Stop, run_main
from lib.tables.splits import query_key

HOME = "github.com/cormacparle/media-search-signal-test, sql/ratedSearchResult_20211207.sql"
LAST_TYPED = 10_690  # id of the last search that somebody typed
LEVEL = {"-1": 1, "0": 3, "1": 5}  # rating -> level
SHARES = (0.4, 0.4)  # of the queries: train, evaluate
COLUMNS = ("id", "search_term", "wikidata_id", "language", "file_name", "rating")

TEXT = r"(NULL|'(?:[^'\\]|\\.)*')"
# A row of the dump, as MySQL writes it: (1,'Big Ben','Q41225','en','Big Ben.jpg',1)
SQL_ROW = re.compile(rf"\((\d+),{TEXT},{TEXT},{TEXT},{TEXT},(NULL|-?\d+)\)")


@dataclass(frozen=True)
class Settings:
    """What is converted."""

    source: Positional[Path]  # the dump (.sql) or a CSV of it; may be gzipped
    out: Path = ROOT / "data" / "commons"  # dataset folder
    images: Path | None = None  # folder with pictures under their Commons names
    cross: int = 20  # other results that a query is crossed with


def read_source(path):
    """The rows of the dump or the CSV, as dicts of text; nothing is ''."""
    with conversion.open_text(path, HOME) as file:
        if ".sql" in path.suffixes:
            rows = [dict(zip(COLUMNS, map(plain_text, found))) for found in SQL_ROW.findall(file.read())]
        else:
            rows = list(csv.DictReader(file))
    needed = {*COLUMNS} - {"wikidata_id"}
    if not rows or not needed <= rows[0].keys():
        raise Stop(f"{path}: no rows with the columns {', '.join(sorted(needed))}; get it from {HOME}")
    for row in rows:
        bad_rating = row["rating"] not in ("", *LEVEL)
        if bad_rating or not row["id"].isdecimal() or not query_key(row["search_term"]):
            raise Stop(f"{path}: a row is not as expected: {dict(row)}; a rating is -1, 0, 1 or nothing")
    return rows


def plain_text(value):
    r"""A value of the dump -> its text: 'It\'s' -> It's; NULL -> nothing."""
    return re.sub(r"\\(.)", r"\1", value[1:-1]) if value[0] == "'" else value.replace("NULL", "")


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


def words_of(text):
    """The set of a text's words."""
    return set(re.findall(r"\w+", query_key(text.replace("_", " "))))


def cross_pairs(shown, titles, crossing, count):
    """Pairs of a query with results of others: (query, file). shown: {query: files shown for it}; titles:
    {file: title}; crossing: the queries to cross; count: pairs a query, half of them near, half random."""
    rng = np.random.default_rng(0)
    files = sorted(titles)
    files_with = defaultdict(list)
    for file in files:
        for word in words_of(titles[file]):
            files_with[word].append(file)
    for query in crossing:
        near = nearest(query, files_with, shown[query], count // 2)
        drawn = [files[i] for i in rng.permutation(len(files))[: count + len(shown[query])]]
        others = [file for file in drawn if file not in shown[query] and file not in near]
        yield from ((query, file) for file in (near + others)[:count])


def nearest(query, files_with, without, count):
    """At most `count` files whose titles share words with the query, by the sum of 1 / (files with the word),
    so that rare words count most. `without`: files that do not count. Ties by name."""
    score = Counter()
    for word in sorted(words_of(query)):
        for file in files_with.get(word, ()):
            score[file] += 1 / len(files_with[word])
    ranked = sorted((-value, file) for file, value in score.items() if file not in without)
    return [file for _, file in ranked[:count]]


def make_tables(rows, cross):
    """The rows to use -> {table: rows}; pins without pictures. cross: pairs to make a query."""
    queries, ratings, shown = {}, defaultdict(set), defaultdict(set)
    for row in rows:
        key = query_key(row["search_term"])
        number = f"q{len(queries):05d}"
        queries.setdefault(key, (number, row["search_term"].strip(), row["language"] or "en"))
        shown[key].add(row["file_name"])
        ratings[key] |= {row["rating"]} - {""}
    sides = {key: conversion.side_of(key, *SHARES, "commons") for key in queries}
    sides |= {key: "train" for key, side in sides.items() if side == "eval" and len(ratings[key]) < 2}

    labels, pairs = [], []
    for row in rows:
        key, file = query_key(row["search_term"]), row["file_name"]
        if row["rating"] and sides[key] != "hidden":
            labels.append((queries[key][0], file, LEVEL[row["rating"]], sides[key]))
        else:
            pairs.append((key, file))
    # 'Big_Ben_(8921228937).jpg': 'Big Ben (8921228937)'
    names = {row["file_name"]: row["file_name"].replace("_", " ") for row in rows}
    titles = {file: name.rpartition(".")[0] or name for file, name in names.items()}
    crossing = [key for key in queries if sides[key] != "eval"]
    pairs += cross_pairs(shown, titles, crossing, cross)
    return {
        "pins": [(*pin, None) for pin in titles.items()],
        "queries": [*queries.values()],
        "labels": labels,
        "impressions": [(queries[key][0], file) for key, file in pairs],
    }


def place_image(file_name, pictures, out):
    """Brings a picture into the dataset, by a hard link if possible; its path there, or None."""
    for name in (file_name, file_name.replace(" ", "_")):  # a download from Commons has underscores
        if Path(name).name == name and (pictures / name).is_file():
            link(pictures / name, out / "images" / name)
            return f"images/{name}"
    return None


def main(argv=None):
    settings = flags_read(Settings, None, argv, __doc__.split("\n")[0])
    if settings.images and not settings.images.is_dir():
        raise Stop(f"--images {settings.images}: no such folder")
    rows = read_source(settings.source)
    used, skipped = select_rows(rows)
    tables = make_tables(used, settings.cross)
    if settings.images:
        pins = [(*pin, place_image(pin[0], settings.images, settings.out)) for pin in tables["pins"]]
        print(f"pictures: {sum(bool(pin[-1]) for pin in pins):,} of {len(pins):,} pins")
        tables["pins"] = pins
    conversion.write_dataset(settings.out, tables, "skipped_ratings.csv", rows[0], skipped)


if __name__ == "__main__":
    run_main(main)
