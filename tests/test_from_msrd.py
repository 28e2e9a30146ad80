"""The MSRD converter on a miniature of its two files."""

import csv
import gzip
import json

import from_msrd
import pyarrow.parquet as pq
import pytest
from helpers import stop_line

from lib.tables.raw import RawTables

MOVIES = [
    {
        "id": 11,
        "title": "Star “Wars”",
        "overview": "A long\ntime ago",
        "tags": ["space", "robots"],
        "genres": ["Adventure"],
        "director": "Lucas",
        "actors": ["A", "B", "C", "D", "E", "F"],
        "characters": ["Luke"],
    },
    {
        "id": "12",
        "title": "Finding Nemo",
        "overview": None,
        "tags": None,
        "genres": [],
        "director": None,
        "actors": None,
        "characters": [],
    },
    {"id": "13", "title": None},
]
JUDGMENTS = [
    (f"q{i}", f'query "{i}', movie, grade) for i in range(200) for movie, grade in (("11", "1"), ("12", "0"))
] + [("q0", 'query "0', "99", "1")]


def source(folder, zipped):
    folder.mkdir()
    movies = "".join(json.dumps(m) + "\n" for m in MOVIES) + "\n"
    judgments = "query_id\tquery\tdoc_id\tgrade\n" + "".join("\t".join(row) + "\n" for row in JUDGMENTS)
    for name, text in (("movies-corpus.jsonl", movies), ("movies-judgments.tsv", judgments)):
        if zipped:
            with gzip.open(folder / f"{name}.gz", "wt", encoding="utf-8") as f:
                f.write(text)
        else:
            (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("zipped", [True, False])
def test_tables(tmp_path, zipped):
    from_msrd.main([str(source(tmp_path / "source", zipped)), "--out", str(tmp_path / "out")])
    read = lambda name: pq.read_table(tmp_path / "out" / f"{name}.parquet").to_pylist()
    assert read("pins") == [
        {"pin_id": "11", "title": "Star “Wars”", "description": "A long\ntime ago"},
        {"pin_id": "12", "title": "Finding Nemo", "description": None},
        {"pin_id": "13", "title": None, "description": None},
    ]
    assert [(r["pin_id"], r["board_title"]) for r in read("boards")] == [
        ("11", "space"),
        ("11", "robots"),
        ("11", "Adventure"),
    ]
    links = read("link_visits")
    assert links[0] == {
        "pin_id": "11",
        "link_title": "Lucas",
        "link_description": "A, B, C, D, E; Luke",
        "dwell_seconds": 60.0,
    }
    assert links[1]["link_title"] is None and links[1]["link_description"] is None

    labels, impressions = read("labels"), read("impressions")
    assert len(labels) + len(impressions) == 400 and len(read("queries")) == 200
    assert {(r["pin_id"], r["label"]) for r in labels} == {("11", 5), ("12", 1)}
    sides = {"train": set(), "eval": set(), "hidden": {r["query_id"] for r in impressions}}
    for r in labels:
        sides[r["split"]].add(r["query_id"])
    assert sum(map(len, sides.values())) == 200 == len(set().union(*sides.values()))  # a query is on one side
    assert 8 < len(sides["train"]) < 36 and 8 < len(sides["eval"]) < 36  # 10 % of 200 each
    assert read("queries")[0]["query"] == 'query "0'
    with open(tmp_path / "out" / "skipped_judgments.csv", newline="") as f:
        assert list(csv.reader(f)) == [
            ["query_id", "doc_id", "grade", "reason"],
            ["q0", "99", "1", "no such movie"],
        ]
    RawTables(tmp_path / "out", spill=tmp_path / "spill").check()  # stage 01 takes it


def convert(source, out, *flags):
    from_msrd.main([str(source), "--out", str(out), *flags])


def test_shares_and_limit(tmp_path):
    shares = ("--train-share", "0.5", "--eval-share", "0.25", "--max-impressions", "7")
    convert(source(tmp_path / "source", True), tmp_path / "out", *shares)
    rows = lambda name: pq.read_table(tmp_path / "out" / f"{name}.parquet").num_rows
    assert rows("impressions") == 7 and 0.6 * 400 < rows("labels") < 0.9 * 400


def test_missing_file_is_one_line(tmp_path):
    (source(tmp_path / "source", True) / "movies-corpus.jsonl.gz").unlink()
    line = stop_line(convert, tmp_path / "source", tmp_path / "out")
    assert "movies-corpus.jsonl: missing" in line and "elasticsearch-labs" in line


def test_other_grades_are_one_line(tmp_path):
    folder = source(tmp_path / "source", False)
    (folder / "movies-judgments.tsv").write_text("query_id\tquery\tdoc_id\tgrade\nq1\tx\t11\t2\n")
    assert "'2'" in stop_line(convert, folder, tmp_path / "out")
