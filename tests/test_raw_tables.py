"""Raw tables: what is right is read exactly, what is wrong is said in one line."""

import csv
import gzip
import json
import os
import time
import unicodedata
from datetime import UTC, datetime
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import own_embeddings, small_dataset, stage, stop_line, write_dataset, write_table
from hypothesis import given
from hypothesis import strategies as st

from common import FIELDS
from lib.inputs.match import MATCH_FEATURES
from lib.stages.files import read_json, write_parquet
from lib.stages.terminal import Stop
from lib.tables.database import Database
from lib.tables.indexed import number_rows
from lib.tables.names import is_spoken
from lib.tables.raw import RawTables
from lib.tables.splits import split_of

build = stage("01")


def opened(folder):
    """The checked tables of a dataset."""
    raw = RawTables(folder, spill=folder / ".spill")
    raw.check()
    return raw


def rows(raw, name, columns):
    return raw.db.execute(f"SELECT {columns} FROM raw_{name}").fetchall()


# ------------------------------------------------------------------------------------------------------------
# Right input


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
@pytest.mark.parametrize("as_folder", [False, True], ids=["file", "folder"])
def test_every_format_gives_the_same_rows(tmp_path, kind, as_folder):
    tables = small_dataset()
    for name, columns in tables.items():
        if as_folder:  # two files, one row in the first
            write_table(tmp_path / name, "part-0", {k: v[:1] for k, v in columns.items()}, kind)
            if len(next(iter(columns.values()))) > 1:
                write_table(tmp_path / name, "part-1", {k: v[1:] for k, v in columns.items()}, kind)
        else:
            write_table(tmp_path, name, columns, kind)
    raw = opened(tmp_path)
    assert rows(raw, "pins", "pin_id, title, description") == list(zip(*tables["pins"].values()))
    assert rows(raw, "queries", "query_id, query, language") == list(zip(*tables["queries"].values()))
    assert rows(raw, "labels", "query_id, pin_id, label, split") == list(zip(*tables["labels"].values()))
    assert rows(raw, "impressions", "query_id, pin_id") == list(zip(*tables["impressions"].values()))
    assert rows(raw, "engagements", "query, pin_id, date::VARCHAR, count") == list(
        zip(*tables["engagements"].values())
    )
    assert rows(raw, "link_visits", "pin_id, link_title, link_description, dwell_seconds") == list(
        zip(*tables["link_visits"].values())
    )


def test_optional_tables_and_columns_may_be_absent(tmp_path):
    tables = small_dataset()
    for name in ("engagements", "boards", "link_visits"):
        del tables[name]
    del tables["labels"]["split"], tables["queries"]["language"], tables["pins"]["description"]
    raw = opened(write_dataset(tmp_path, tables))
    assert "boards" not in raw.files
    assert rows(raw, "labels", "DISTINCT split") == [(None,)]


def test_ids_as_numbers_in_jsonl(tmp_path):
    tables = small_dataset()
    tables["pins"] |= {"pin_id": [7, 8, 9_007_199_254_740_993]}  # beyond 2**53: no detour through a float
    tables["labels"] |= {"pin_id": [7, 8, 9_007_199_254_740_993]}
    tables["impressions"] |= {"pin_id": [8, 7, 7]}
    write_dataset(tmp_path, tables, "jsonl")
    assert [r[0] for r in rows(opened(tmp_path), "pins", "pin_id")] == ["7", "8", "9007199254740993"]


def test_leading_zeros_stay(tmp_path):
    tables = small_dataset()
    tables["pins"]["pin_id"] = tables["labels"]["pin_id"] = ["007", "07", "7"]
    tables["impressions"]["pin_id"] = ["7", "07", "007"]
    raw = opened(write_dataset(tmp_path, tables, "csv"))
    assert [r[0] for r in rows(raw, "impressions", "pin_id")] == ["7", "07", "007"]


def test_jsonl_text_that_looks_like_something_else_stays_text(tmp_path):
    titles = [
        "2024-01-05T10:00:00Z",
        "007",
        "true",
        "1e5",
        "12:30",
        '{"a": 1}',
        "null",
        "00000000-0000-0000-0000-00000000000A",
    ]
    tables = small_dataset()
    tables["pins"] = {"pin_id": ["007", "p2", "p3", *"abcde"], "title": titles}
    write_dataset(tmp_path, tables, "jsonl")
    assert [r[0] for r in rows(opened(tmp_path), "pins", "title")] == titles
    only = small_dataset()  # the same where every row of the column looks alike
    only["pins"] = {"pin_id": ["007", "p2", "p3"], "title": ["2024-01-05T10:00:00Z"] * 3}
    write_dataset(tmp_path / "alike", only, "jsonl")
    assert rows(opened(tmp_path / "alike"), "pins", "title") == [("2024-01-05T10:00:00Z",)] * 3


def test_jsonl_column_that_begins_late(tmp_path):
    """A column that only rows far down have is not lost."""
    n = 30_000
    tables = small_dataset()
    write_dataset(tmp_path, tables, "jsonl")
    with open(tmp_path / "pins.jsonl", "a") as f:
        f.writelines(json.dumps({"pin_id": f"x{i}"}) + "\n" for i in range(n))
        f.write(
            json.dumps({"pin_id": "late", "title": "late", "image": "images/late.png", "material": "wood"})
            + "\n"
        )
    raw = opened(tmp_path)
    assert rows(raw, "pins", "title, image, material")[-1] == ("late", "images/late.png", "wood")


# ------------------------------------------------------------------------------------------------------------
# Wrong input. Each case: how the small dataset is changed, and what its line must name


def setting(table, **columns):
    def change(tables):
        tables[table] |= columns

    return change


def without(table, column):
    def change(tables):
        del tables[table][column]

    return change


def emptied(table):
    def change(tables):
        tables[table] = {c: pa.array([], pa.string()) for c in tables[table]}

    return change


WRONG = {  # name: (change, parts of the line: file, column, number of rows, the first)
    "missing table": (lambda t: t.pop("impressions"), ["impressions.parquet", "missing"]),
    "missing column": (without("labels", "label"), ["labels.parquet", "'label'", "missing", "pin_id"]),
    "missing optional table's column": (
        without("engagements", "date"),
        ["engagements.parquet", "'date'", "missing"],
    ),
    "empty table": (emptied("pins"), ["pins.parquet", "empty"]),
    "empty log": (emptied("boards"), ["boards.parquet", "empty"]),
    "unknown pin in labels": (
        setting("labels", pin_id=["007", "nowhere", "elsewhere"]),
        ["labels.parquet", "'pin_id'", "2 rows", "pins.parquet", "'nowhere'"],
    ),
    "unknown query in labels": (
        setting("labels", query_id=["q1", "q1", "q9"]),
        ["labels.parquet", "'query_id'", "1 row ", "queries.parquet", "'q9'"],
    ),
    "unknown pin in impressions": (
        setting("impressions", pin_id=["p3", "p4", "p4"]),
        ["impressions.parquet", "'pin_id'", "2 rows", "'p4'"],
    ),
    "unknown query in impressions": (
        setting("impressions", query_id=["q0", "q2", "q2"]),
        ["impressions.parquet", "'query_id'", "1 row ", "'q0'"],
    ),
    "duplicate pin": (
        setting("pins", pin_id=["007", "p2", "p2"]),
        ["pins.parquet", "'pin_id'", "1 row ", "more than once", "'p2'"],
    ),
    "duplicate query": (
        setting("queries", query_id=["q1", "q1"]),
        ["queries.parquet", "'query_id'", "1 row ", "more than once", "'q1'"],
    ),
    "labels that disagree": (
        setting("labels", query_id=["q1", "q1", "q2"], pin_id=["007", "007", "p3"]),
        ["labels.parquet", "'label'", "1 ", "different labels", "'q1', '007'"],
    ),
    "labels that agree": (
        setting("labels", query_id=["q1", "q1", "q2"], pin_id=["007", "007", "p3"], label=[5, 5, 4]),
        ["labels.parquet", "'label'", "1 ", "twice", "'q1', '007'"],
    ),
    "label 0": (
        setting("labels", label=[5, 0, 4]),
        ["labels.parquet", "'label'", "1 row ", "outside", "0.0"],
    ),
    "label 6": (
        setting("labels", label=[6, 6, 4]),
        ["labels.parquet", "'label'", "2 rows", "outside", "6.0"],
    ),
    "label 2.5": (
        setting("labels", label=[5, 1, 2.5]),
        ["labels.parquet", "'label'", "1 row ", "outside", "2.5"],
    ),
    "label NaN": (
        setting("labels", label=[5.0, 1.0, float("nan")]),
        ["labels.parquet", "'label'", "1 row ", "outside", "nan"],
    ),
    "label no number": (
        setting("labels", label=["5", "good", "4"]),
        ["labels.parquet", "'label'", "1 row ", "number", "'good'"],
    ),
    "label null": (
        setting("labels", label=[5, None, 4]),
        ["labels.parquet", "'label'", "1 row ", "empty", "None"],
    ),
    "empty query": (
        setting("queries", query=["red chair", "  "]),
        ["queries.parquet", "'query'", "1 row ", "empty", "'  '"],
    ),
    "null query": (
        setting("queries", query=[None, None]),
        ["queries.parquet", "'query'", "2 rows", "empty", "None"],
    ),
    "null id": (
        setting("pins", pin_id=["007", None, "p3"]),
        ["pins.parquet", "'pin_id'", "1 row ", "empty", "None"],
    ),
    "bad split": (
        setting("labels", split=["train", "test", "eval"]),
        ["labels.parquet", "'split'", "1 row ", "'train'", "'eval'", "'test'"],
    ),
    "query in two splits": (
        setting("labels", split=["train", "eval", "eval"]),
        ["labels.parquet", "'split'", "1 ", "more than one split", "'q1'"],
    ),
    "dwell NaN": (
        setting("link_visits", dwell_seconds=[float("nan")]),
        ["link_visits.parquet", "'dwell_seconds'", "1 row ", "finite", "nan"],
    ),
    "dwell infinite": (
        setting("link_visits", dwell_seconds=[float("inf")]),
        ["link_visits.parquet", "'dwell_seconds'", "1 row ", "finite", "inf"],
    ),
    "dwell no number": (
        setting("link_visits", dwell_seconds=["long"]),
        ["link_visits.parquet", "'dwell_seconds'", "1 row ", "number", "'long'"],
    ),
    "negative count": (
        setting("engagements", count=[-3]),
        ["engagements.parquet", "'count'", "1 row ", "below 0", "-3"],
    ),
    "count no number": (
        setting("engagements", count=["many"]),
        ["engagements.parquet", "'count'", "1 row ", "whole number", "'many'"],
    ),
    "date no date": (
        setting("engagements", date=["30 June"]),
        ["engagements.parquet", "'date'", "1 row ", "date", "'30 June'"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line(tmp_path, case):
    change, parts = WRONG[case]
    tables = small_dataset()
    opened(write_dataset(tmp_path / "right", tables))
    change(tables)
    line = stop_line(opened, write_dataset(tmp_path / "wrong", tables))
    for part in parts:
        assert part in line, line


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_wrong_label_in_text_formats(tmp_path, kind):
    tables = small_dataset()
    tables["labels"]["label"] = ["5", "good", "4"]
    line = stop_line(opened, write_dataset(tmp_path, tables, kind))
    assert f"labels.{kind}" in line and "'label'" in line and "1 row " in line and "good" in line


def test_no_folder_and_no_table(tmp_path):
    assert "no such dataset folder; data/README.md" in stop_line(opened, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "pins.parquet" in stop_line(opened, tmp_path / "empty")
    (tmp_path / "empty" / "pins.csv").mkdir()
    assert "empty/pins.csv/: no table is in this folder" in stop_line(opened, tmp_path / "empty")


def test_table_in_two_formats_or_a_folder_of_two_kinds(tmp_path):
    tables = small_dataset()
    write_dataset(tmp_path, tables)
    write_table(tmp_path, "pins", tables["pins"], "csv")
    line = stop_line(opened, tmp_path)
    assert "pins.parquet" in line and "pins.csv" in line
    (tmp_path / "pins.csv").unlink()
    (tmp_path / "pins.parquet").unlink()
    write_table(tmp_path / "pins", "a", tables["pins"], "csv")
    write_table(tmp_path / "pins", "b", tables["pins"], "jsonl")
    assert "different kinds" in stop_line(opened, tmp_path)


@pytest.mark.parametrize(
    "name,content",
    [
        ("pins.parquet", b""),
        ("pins.parquet", b"PAR1 this is no parquet file PAR1"),
        ("pins.csv", b""),
        ("pins.jsonl", b'{"pin_id": "a"\n'),
        ("pins.csv", b"pin_id,title\n007,\xff\xfe\np2,a\np3,b\n"),
        ("pins.csv", b'pin_id,title\n007,"never closed\np2,a\np3,b\n'),
        ("pins.csv", b"pin_id,title\n007,a,one,too,many\np2,b\np3,c\n"),
        ("pins.jsonl", b'{"pin_id": "007"}\n[1, 2]\nnonsense\n'),
    ],
)
def test_broken_file_is_one_line_that_names_it(tmp_path, name, content):
    write_dataset(tmp_path, small_dataset())
    (tmp_path / "pins.parquet").unlink()
    (tmp_path / name).write_bytes(content)
    assert name in stop_line(opened, tmp_path)


def test_column_named_like_a_text_field(tmp_path):
    tables = small_dataset()
    tables["pins"]["caption"] = ["a", "b", "c"]
    line = stop_line(
        build.main, arguments(own_embeddings(write_dataset(tmp_path / "data", tables)), tmp_path / "run")
    )
    assert "pins.parquet" in line and "'caption'" in line


def test_no_row_in_a_split(tmp_path):
    tables = small_dataset()
    tables["labels"]["split"] = ["train"] * 3
    line = stop_line(
        build.main, arguments(own_embeddings(write_dataset(tmp_path / "data", tables)), tmp_path / "run")
    )
    assert "labels.parquet" in line and "'eval'" in line and "leave the column 'split' out" in line
    assert "a larger --eval-share" in stop_line(split_of, ["a", "b"], [None, None], 0.0, "labels")
    assert "a smaller --eval-share" in stop_line(split_of, ["a", "b"], [None, None], 0.999999, "labels")


# ------------------------------------------------------------------------------------------------------------
# Anything at all: the right number of rows, or one line

ugly = st.one_of(
    st.none(),
    st.just(""),
    st.just(" \t"),
    st.text(max_size=8),
    st.sampled_from(
        [
            "a\x00b",
            "\x1b[31m",
            "\u202eright to left",
            "🪑" * 3,
            "e\u0301",
            "'",
            '"',
            "a,b\nc",
            "\ufeff",
            "x" * 100_000,
        ]
    ),
)
ids = st.one_of(
    st.sampled_from(["a", "b", "c"]), st.sampled_from([None, "", "007", "A", " a", "a\n", "é", "\x01"])
)
numbers = st.one_of(
    st.sampled_from([1, 2, 3, 4, 5]),
    st.sampled_from([0, 6, -1, 2.5, float("nan"), float("inf"), 10**18, None]),
)


@st.composite
def tables(draw):
    """Small random raw tables: mostly right, with some of everything that goes wrong."""
    tidy = draw(st.booleans())
    key = st.sampled_from(["a", "b", "c"]) if tidy else ids
    text = st.text(min_size=1, max_size=8) if tidy else ugly
    n = lambda: draw(st.integers(0 if not tidy else 1, 5))
    column = lambda strategy, size: draw(st.lists(strategy, min_size=size, max_size=size))
    pins = ["a", "b", "c"] if tidy else column(key, n())
    queries = ["a", "b", "c"] if tidy else column(key, n())
    out = {
        "pins": {
            "pin_id": pins,
            "title": column(text, len(pins)),
            "description": column(ugly, len(pins)),
            "image": [None] * len(pins),
        },
        "queries": {
            "query_id": queries,
            "query": column(text, len(queries)),
            "interest": column(ugly, len(queries)),
        },
    }
    size = 3 if tidy else n()
    out["labels"] = {
        "query_id": ["a", "b", "c"] if tidy else column(key, size),
        "pin_id": column(key, size),
        "label": column(st.sampled_from([1, 5]) if tidy else numbers, size),
        "split": ["train", "eval", "train"]
        if tidy
        else column(st.sampled_from(["train", "eval", None]), size),
    }
    size = n()
    out["impressions"] = {"query_id": column(key, size), "pin_id": column(key, size)}
    for name, columns in (
        (
            "engagements",
            {
                "query": ugly,
                "pin_id": ids,
                "date": st.sampled_from(
                    ["2024-06-30", "2021-01-01", "0001-01-01", "9999-12-31"] + ["soon", None] * (not tidy)
                ),
                "count": st.integers(0, 9) if tidy else numbers,
            },
        ),
        ("boards", {"pin_id": ids, "board_title": ugly}),
        (
            "link_visits",
            {
                "pin_id": ids,
                "link_title": ugly,
                "link_description": ugly,
                "dwell_seconds": st.sampled_from([0, 9.99, 10, 1e300]) if tidy else numbers,
            },
        ),
    ):
        if draw(st.booleans()):
            size = n()
            out[name] = {k: column(v, size) for k, v in columns.items()}
    if draw(st.booleans()) and not tidy:
        table = draw(st.sampled_from(sorted(out)))
        out[table].pop(draw(st.sampled_from(sorted(out[table]))))
    return out, draw(st.sampled_from(["parquet", "csv", "jsonl"]))


def write_any(folder, name, columns, kind):
    """A table with whatever values: mixed types become text, except in JSONL, which keeps them."""
    if kind == "jsonl":
        size = len(next(iter(columns.values()), []))
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps({k: v[i] for k, v in columns.items()}) + "\n" for i in range(size)),
            encoding="utf-8",
        )
    elif kind == "csv":
        with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8") as f:
            csv.writer(f).writerows([list(columns), *zip(*columns.values())])
    else:
        array = lambda v: (
            pa.array(v, pa.string())
            if any(isinstance(x, str) for x in v)
            else pa.array([None if x is None else float(x) for x in v], pa.float64())
        )
        pq.write_table(pa.table({k: array(v) for k, v in columns.items()}), folder / f"{name}.parquet")


def arguments(data, run):
    return ["--data", str(data), "--run", str(run), "--device", "cpu"]


@given(tables())
def test_any_tables(tmp_path_factory, drawn):
    tables, kind = drawn
    folder = tmp_path_factory.mktemp("any")
    data, run = folder / "data", folder / "run"
    data.mkdir()
    for name, columns in tables.items():
        write_any(data, name, columns, kind)
    try:
        build.main(arguments(own_embeddings(data), run))
    except Stop as e:
        line = str(e)
        del e
        assert line and line.isprintable(), repr(line)
        return
    size = {name: len(next(iter(columns.values()))) for name, columns in tables.items()}
    assert pq.read_metadata(run / "features" / "pins.parquet").num_rows == size["pins"]
    assert pq.read_metadata(run / "features" / "queries.parquet").num_rows == size["queries"]
    assert pq.read_metadata(run / "features" / "labelled.parquet").num_rows == size["labels"]
    assert (
        sum(pq.read_metadata(p).num_rows for p in (run / "features" / "impressions").glob("*.parquet"))
        == size["impressions"]
    )
    made = pq.read_table(run / "features" / "pins.parquet")
    assert made["pin_id"].to_pylist() == tables["pins"]["pin_id"]
    if kind != "csv":  # in a CSV file null and "" are the same
        assert made["title"].to_pylist() == [t or "" for t in tables["pins"]["title"]]
    assert np.load(run / "features" / "pin_text_embedding.npy").shape == (size["pins"], 4)


# ------------------------------------------------------------------------------------------------------------
# However tables are written: read as they are meant, or named


def features(data, run, *flags):
    """Stage 01 on a dataset, with text embeddings of the user's own. Returns its folder."""
    build.main([*arguments(own_embeddings(data), run), *flags])
    return run / "features"


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_names_of_columns_in_other_letters_and_with_spaces(tmp_path, kind):
    tables = small_dataset()
    tables["pins"] = {"Pin_ID": tables["pins"]["pin_id"], "Title": ["a", "b", "c"], " COLOR": ["x", "y", "z"]}
    tables["queries"]["Language"] = ["de", "fr"]
    del tables["queries"]["language"]
    write_dataset(tmp_path / "data", tables, kind)
    folder = features(tmp_path / "data", tmp_path / "run")
    pins, queries = (pq.read_table(folder / f"{name}.parquet") for name in ("pins", "queries"))
    assert pins["title"].to_pylist() == ["a", "b", "c"] and queries["language"].to_pylist() == ["de", "fr"]
    assert pins.column_names[-1] == "COLOR" and queries.column_names == ["query_id", "query", "language"]


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_two_columns_that_differ_in_case_alone(tmp_path, kind):
    tables = small_dataset()
    tables["pins"]["Title"] = ["a", "b", "c"]
    line = stop_line(opened, write_dataset(tmp_path, tables, kind))
    assert f"pins.{kind}" in line and "title" in line.lower()


def packed(path, kind):
    """Packs a file: NAME -> NAME.gz or NAME.zst."""
    packing = {"gz": "gzip", "zst": "zstd"}[kind.lower()]
    with pa.output_stream(f"{path}.{kind}", compression=packing) as stream:
        stream.write(path.read_bytes())
    path.unlink()


@pytest.mark.parametrize(
    "kind, name",
    [
        ("jsonl", "boards.ndjson"),
        ("jsonl", "BOARDS.JSONL"),
        ("parquet", "Boards.parquet"),
        ("parquet", "boards/2024-01-01/a.parquet"),
        ("csv", "boards/deep/er/a.CSV"),
        ("parquet", "boards.parquet/part-0.snappy.parquet"),
        ("csv", "boards/two\nlines.csv"),
    ],
)
def test_other_names_of_files(tmp_path, kind, name):
    tables = small_dataset()
    boards = tables.pop("boards")
    path = write_table(write_dataset(tmp_path, tables), "somewhere", boards, kind)
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    path.rename(tmp_path / name)
    raw = opened(tmp_path)
    assert rows(raw, "boards", "pin_id, board_title") == [("007", "Kitchen")] and raw.not_read == []


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("packing", ["gz", "zst", "GZ"])
def test_packed_files(tmp_path, kind, packing):
    tables = small_dataset()
    write_dataset(tmp_path, tables, kind)
    for name in tables:
        packed(tmp_path / f"{name}.{kind}", packing)
    assert rows(opened(tmp_path), "pins", "pin_id, title") == list(zip(*list(tables["pins"].values())[:2]))


def test_tab_semicolon_and_bar(tmp_path):
    write_dataset(tmp_path, small_dataset())
    (tmp_path / "pins.parquet").unlink()
    for name, sign in (("pins.tsv", "\t"), ("pins.csv", "\t"), ("pins.csv", ";"), ("pins.csv", "|")):
        text = "pin_id,title\n007,'one; two\tthree|\"\np2,b\np3,c\n".replace("'", '"').replace(",", sign)
        (tmp_path / name).write_text(text)
        assert rows(opened(tmp_path), "pins", "title")[0] == ("one; two\tthree|",)
        (tmp_path / name).unlink()


def test_files_of_one_table_with_other_columns_in_another_order(tmp_path):
    write_dataset(tmp_path, small_dataset())
    (tmp_path / "pins.parquet").unlink()
    (tmp_path / "pins").mkdir()
    (tmp_path / "pins" / "a.csv").write_text("pin_id,title\n007,a\n")
    (tmp_path / "pins" / "b.csv").write_text("\r\n\r\nTITLE;pin_id;color\r\nb;p2;red\r\n")
    (tmp_path / "pins" / "c.csv").write_text("")
    (tmp_path / "pins" / "d.csv").write_text("pin_id,title\np3,c\n")
    found = rows(opened(tmp_path), "pins", "pin_id, title, color")
    assert sorted(found) == [("007", "a", None), ("p2", "b", "red"), ("p3", "c", None)]


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_hive_folders_are_columns_below_the_table_alone(tmp_path, kind):
    data = tmp_path / "label=3" / "split=eval" / "pin_id=9"
    tables = small_dataset()
    log = tables.pop("engagements")
    for day, market in (("30", "a%20b"), ("29", "__HIVE_DEFAULT_PARTITION__"), ("28", "")):
        some = {name: values for name, values in log.items() if name != "date"}
        folder = data / "engagements" / f"date=2024-06-{day}" / f"market={market}" / "COUNT=9"
        write_table(folder, "part-0", some, kind)
    write_dataset(data, tables)
    raw = opened(data)
    found = rows(raw, "engagements", "query, pin_id, date::VARCHAR, count, market")
    expected = [("28", None), ("29", None), ("30", "a b")]
    expected = [("red chair", "007", f"2024-06-{day}", 3, market) for day, market in expected]
    assert found == expected and raw.types["engagements"]["market"] == "CSV"
    assert rows(raw, "labels", "label, split") == [(5, "train"), (1, "train"), (4, "eval")]


def test_names_of_folders_above_the_table_change_nothing(tmp_path):
    plain = features(write_dataset(tmp_path / "plain", small_dataset()), tmp_path / "run")
    data = write_dataset(tmp_path / "label=3" / "split=eval" / "pin_id=9", small_dataset())
    other = features(data, tmp_path / "lr=0.1")
    for path in plain.rglob("*.parquet"):
        assert path.read_bytes() == (other / path.relative_to(plain)).read_bytes()


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_signs_in_the_path_stand_for_themselves(tmp_path, kind):
    for name in ("a*", "ab"):
        write_dataset(tmp_path / name, small_dataset(), kind)
    (tmp_path / "ab" / f"pins.{kind}").unlink()
    write_table(tmp_path / "ab", "pins", {"pin_id": ["other"], "title": ["other"]}, kind)
    assert len(rows(opened(tmp_path / "a*"), "pins", "*")) == 3
    write_dataset(tmp_path / "it's [a] {b} ?", small_dataset(), kind)
    opened(tmp_path / "it's [a] {b} ?")


def test_what_is_not_read_is_named(tmp_path, capsys):
    data = write_dataset(tmp_path / "data", small_dataset())
    write_table(data, "engagement", small_dataset()["engagements"])  # the plural is missing
    (data / "boards.xlsx").write_bytes(b"")
    (data / "notes.txt").write_text("nothing of a table")
    (data / "link_visits.parquet").rename(tmp_path / "visits")
    (data / "link_visits").mkdir()
    (tmp_path / "visits").rename(data / "link_visits" / "a.parquet")
    for name in ("_SUCCESS", ".a.parquet.crc", "readme.md"):
        (data / "link_visits" / name).write_text("")
    features(data, tmp_path / "run")
    line = "not read: engagement.parquet, boards.xlsx, link_visits/readme.md\n"
    assert line in capsys.readouterr().out
    (data / "pins.parquet").rename(data / "pins.xlsx")
    assert "pins.xlsx" in stop_line(opened, data)


def test_a_folder_of_tables_that_is_not_read_is_named(tmp_path):
    """It is as much a table as a file is; a folder of pictures is none."""
    tables = small_dataset()
    engagements = tables.pop("engagements")
    write_dataset(tmp_path, tables)
    write_table(tmp_path / "engagement" / "date=2024-06-30", "a", engagements)
    write_table(tmp_path / ".cache", "a", engagements)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"")
    assert list(opened(tmp_path).remarks())[-1] == "not read: engagement/ (engagements?)"
    write_table(tmp_path / "products", "a", tables["pins"])
    (tmp_path / "pins.parquet").unlink()
    assert "(products/: a table of pins? Then rename it)" in stop_line(opened, tmp_path)


def test_vectors_that_are_not_read_are_named(tmp_path):
    data = own_embeddings(write_dataset(tmp_path, small_dataset()))
    assert list(opened(data).remarks())[-1].startswith("link_visits")
    (data / "embeddings").rename(data / "Embeddings")
    np.save(data / "pin_text.npy", np.ones((1, 2), np.float32))
    assert list(opened(data).remarks())[-1] == "not read: Embeddings/, pin_text.npy"


def test_a_link_to_a_folder_of_files_of_a_table_is_named(tmp_path):
    """Its files are not read: they may lie outside of the dataset, or in a circle."""
    tables = small_dataset()
    write_dataset(tmp_path, tables)
    (tmp_path / "boards.parquet").unlink()
    for day in ("boards/monday", "days/tuesday"):
        write_table(tmp_path / day, "a", tables["boards"])
    (tmp_path / "boards" / "tuesday").symlink_to(tmp_path / "days" / "tuesday")
    assert list(opened(tmp_path).remarks())[-1] == "not read: days/, boards/tuesday"


def test_spaces_around_the_name_of_a_table_do_not_count(tmp_path):
    data = write_dataset(tmp_path, small_dataset(), "csv")
    for old, new in (("boards.csv", "Boards .csv"), ("pins.csv", " pins.csv")):
        (data / old).rename(data / new)
    raw = opened(data)
    assert raw.name["boards"] == "Boards .csv" and raw.count_rows()["pins"] == 3 and not raw.not_read


def test_a_folder_of_two_kinds_one_of_them_packed(tmp_path):
    tables = small_dataset()
    boards = tables.pop("boards")
    write_dataset(tmp_path, tables)
    write_table(tmp_path / "boards", "a", boards)
    packed(write_table(tmp_path / "boards", "b", boards, "csv"), "gz")
    assert "different kinds" in stop_line(opened, tmp_path)


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_an_id_is_the_same_as_a_whole_number_and_as_a_float(tmp_path, kind, capsys):
    tables = small_dataset()
    tables["pins"]["pin_id"] = [1, 20, 300]
    for name in ("labels", "impressions"):
        tables[name]["pin_id"] = ["1", "20", "300"]
    for name in ("engagements", "boards", "link_visits"):
        tables[name]["pin_id"] = [1.0]
    features(write_dataset(tmp_path / "data", tables, kind), tmp_path / "run")
    said = capsys.readouterr().out
    assert f"boards.{kind}: 1 of 1 rows have a known pin\n" in said and "nothing" not in said


@pytest.mark.parametrize(
    "stored",
    [
        pa.array([Decimal("1.00"), Decimal("1.50"), Decimal(10**18)], pa.decimal128(30, 2)),
        pa.array([1.0, 1.5, 1e18], pa.float64()),
        pa.array([1.0, 1.5, 2.0**60], pa.float32()),
    ],
)
def test_an_id_is_its_digits_whatever_number_it_is_stored_as(tmp_path, stored):
    """Not 1.00, 1.50 and 1e+18, which the ids of another table, stored as text, would not equal."""
    tables = small_dataset()
    large = str(2**60 if stored.type == pa.float32() else 10**18)
    names = dict(zip(tables["pins"]["pin_id"], ["1", "1.5", large], strict=True))
    for name in ("labels", "impressions"):
        tables[name]["pin_id"] = [names[pin] for pin in tables[name]["pin_id"]]
    tables["pins"]["pin_id"] = stored
    for name in ("engagements", "boards", "link_visits"):
        tables[name]["pin_id"] = [names.get(pin, pin) for pin in tables[name]["pin_id"]]
    features(write_dataset(tmp_path / "data", tables, "parquet"), tmp_path / "run")
    pins = pq.read_table(tmp_path / "run" / "features" / "pins.parquet")
    assert pins["pin_id"].to_pylist() == [*names.values()]


def test_an_id_is_its_digits_though_another_file_stores_it_as_text(tmp_path):
    tables, days = small_dataset(), tmp_path / "a[1]" / "boards"
    write_dataset(days.parent, tables)
    (days.parent / "boards.parquet").unlink()
    titles = {"board_title": ["a", "b", "c"]}
    write_table(days, "a", {"pin_id": ["007", "7", "x"], **titles})
    write_table(days, "b", {"Pin_ID": [7.0, 2.5, 1e18], **titles})
    write_table(days, "c", {"pin_id": pa.array([Decimal("7.00"), Decimal("2.50"), None]), **titles})
    write_table(days, "d", {"pin_id": [7, 8, 9], **titles})
    stored = "007 7 x 7 2.5 1000000000000000000 7 2.5 None 7 8 9"
    assert " ".join(str(row[0]) for row in rows(RawTables(days.parent), "boards", "pin_id")) == stored


@pytest.mark.parametrize(
    "stored, digits",
    [
        ([1.5, 2.5, 3.0], ["1.5", "2.5", "3"]),
        ([1e-07, 1e18, 2**60 + 1], ["1e-07", "1000000000000000000", str(2**60 + 1)]),
        ([7.0, "x", 1e3], ["7", "x", "1000"]),  # numbers beside a text
    ],
)
def test_a_number_in_jsonl_is_its_digits(tmp_path, stored, digits):
    """An id of 1.5 is not rounded to 2, nor 7.0 another id because of its neighbours."""
    tables = small_dataset()
    names = dict(zip(tables["pins"]["pin_id"], digits, strict=True))
    for table in ("labels", "impressions", "engagements", "boards", "link_visits"):
        tables[table]["pin_id"] = [names[pin] for pin in tables[table]["pin_id"]]
    tables["pins"]["pin_id"] = stored
    assert [
        pin for (pin,) in rows(opened(write_dataset(tmp_path, tables, "jsonl")), "pins", "pin_id")
    ] == digits


def test_a_fraction_among_the_labels_of_jsonl_is_no_other_label(tmp_path):
    tables = small_dataset()
    tables["labels"]["label"] = [1, 0.5, 0.0]
    for kind in ("jsonl", "parquet"):
        data = write_dataset(tmp_path / kind, tables, kind)
        raw = RawTables(data, levels={"1": 5, "0.5": 3, "0": 1})
        raw.check()
        assert rows(raw, "labels", "label") == [(5,), (3,), (1,)]


def test_a_log_of_unknown_pins_is_named(tmp_path, capsys):
    tables = small_dataset()
    tables["boards"] = {"pin_id": ["1.0", "2.0"], "board_title": ["a", "b"]}
    features(write_dataset(tmp_path / "data", tables), tmp_path / "run")
    said = capsys.readouterr().out
    assert "boards.parquet: 0 of 2 rows have a known pin: nothing of it is used!" in said
    assert "engagements.parquet: 1 of 1 rows" in said


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
@pytest.mark.parametrize("count", ["2.5", "-0.4", "1e300", "nan", "9223372036854775808"])
def test_a_count_that_is_no_whole_number(tmp_path, kind, count):
    tables = small_dataset()
    tables["engagements"]["count"] = [count if kind != "parquet" else float(count)]
    line = stop_line(opened, write_dataset(tmp_path, tables, kind))
    assert f"engagements.{kind}" in line and "'count'" in line and "1 row " in line


def test_counts_whose_sum_is_beyond_64_bit(tmp_path):
    tables = small_dataset()
    tables["engagements"] = {k: v * 2 for k, v in tables["engagements"].items()} | {"count": [2**63 - 1] * 2}
    folder = features(write_dataset(tmp_path / "data", tables), tmp_path / "run")
    made = pq.read_table(folder / "labelled.parquet")["engagement"].to_pylist()
    np.testing.assert_allclose(made, [64 * np.log(2), 0, 0], rtol=1e-6)


@pytest.mark.parametrize("date", ["infinity", "-infinity", "9999-12-31", "2999-01-01", "30-06-24"])
def test_a_date_in_the_future_or_long_ago(tmp_path, date):
    tables = small_dataset()
    tables["engagements"]["date"] = [date]
    line = stop_line(opened, write_dataset(tmp_path, tables))
    assert "engagements.parquet" in line and "'date'" in line and date in line


def test_a_moment_is_a_day_in_utc_wherever_the_machine_stands(tmp_path, monkeypatch):
    tables = small_dataset()
    late = datetime(2024, 6, 30, 23, 30, tzinfo=UTC)
    tables["engagements"]["date"] = [late]
    tables["pins"]["listed"] = [late, late, None]
    write_dataset(tmp_path, tables)
    for place in ("Asia/Tokyo", "America/New_York"):
        monkeypatch.setenv("TZ", place)
        time.tzset()
        raw = opened(tmp_path)
        number_rows(raw, "pins", "pin")
        assert rows(raw, "engagements", "date") == [(late.date(),)]
        assert raw.ask("SELECT listed FROM pin_rows")[0] == ("2024-06-30 23:30:00+00",)
    monkeypatch.undo()
    time.tzset()


def test_text_stored_as_bytes(tmp_path):
    tables = small_dataset()
    tables["pins"] |= {
        "pin_id": pa.array([b"007", b"p2", b"p3"]),
        "title": pa.array([b"caf\xc3\xa9", b"b", None]),
    }
    assert rows(opened(write_dataset(tmp_path, tables)), "pins", "pin_id, title")[0] == ("007", "café")
    tables["pins"]["title"] = pa.array([b"caf\xe9", b"b", None])
    line = stop_line(build.main, arguments(own_embeddings(write_dataset(tmp_path, tables)), tmp_path / "run"))
    assert "pins.parquet" in line and "not UTF-8: decode it as text" in line


@pytest.mark.parametrize(
    "table, column", [("pins", "pin_index"), ("pins", "Caption"), ("queries", "Query_Index")]
)
def test_a_column_with_a_name_of_ours(tmp_path, table, column):
    tables = small_dataset()
    tables[table][column] = ["x", "y", "z"][
        : len(tables[table]["query_id" if table == "queries" else "pin_id"])
    ]
    line = stop_line(features, write_dataset(tmp_path / "data", tables), tmp_path / "run")
    assert f"{table}.parquet" in line and repr(column) in line


CSV = {  # content of pins.csv; the reason
    "Latin-1": ("pin_id,title\n007,café\np2,a\np3,b\n".encode("latin-1"), ["line 2: not UTF-8: save"]),
    "unclosed quote": (b'pin_id,title\n007,a\np2,"never\np3,b\n', ["line 3", "unterminated quote"]),
    "short row": (b"pin_id,title\n007,a\np2\np3,b\n", ["line 3", "Expected Number of Columns: 2 Found: 1"]),
    "long row": (
        b"pin_id,title\n007,a\np2,b,c\np3,b\n",
        ["line 3", "Expected Number of Columns: 2 Found: 3"],
    ),
    "UTF-16": ("pin_id,title\n007,a\n".encode("utf-16"), ["UTF-16"]),
    "UTF-16 without a mark": ("pin_id,title\n007,a\n".encode("utf-16-be"), ["UTF-16"]),
    "LF after CRLF": (b"pin_id,title\r\n007,a\r\np2,b\np3,c\n", ["lines end in different ways"]),
    "one name twice": (b"pin_id,title,title\n007,a,b\np2,b,c\np3,b,c\n", ["'title' stands there more than"]),
    "gzip": (gzip.compress(b"pin_id,title\n007,a\n"), ["packed by gzip: name it pins.csv.gz"]),
    "Parquet": (b"PAR1\x15\4\x15\0", ["Parquet: name it pins.parquet"]),
    "workbook": (b"PK\3\4\x14\0\0", ["workbook", "CSV"]),
    "cut gzip": (None, ["pins.csv.gz"]),
}


@pytest.mark.parametrize("case", CSV)
def test_what_is_wrong_with_a_csv_file_is_in_the_line(tmp_path, case):
    content, parts = CSV[case]
    write_dataset(tmp_path, small_dataset())
    (tmp_path / "pins.parquet").unlink()
    if content is None:
        text = "pin_id,title\n" + "".join(f"{i},{i * 7919 % 1000}\n" for i in range(9_999))
        packed(write(tmp_path / "pins.csv", text.encode()), "gz")
        write(tmp_path / "pins.csv.gz", (tmp_path / "pins.csv.gz").read_bytes()[:-2_000])
    else:
        write(tmp_path / "pins.csv", content)
    line = stop_line(opened, tmp_path)
    for part in ["pins.csv", *parts]:
        assert part in line, line


def write(path, content):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_title_of_megabytes(tmp_path, kind):
    tables = small_dataset()
    tables["pins"]["title"] = ["x" * 2_400_000, "a", "b"]
    assert len(rows(opened(write_dataset(tmp_path, tables, kind)), "pins", "title")[0][0]) == 2_400_000


@pytest.mark.parametrize("blank", ["\t", "\u200b", "\u00a0", "\u3164", "\u00ad \ufe0f", "\n\u2060"])
def test_what_nobody_sees_is_blank(tmp_path, blank):
    for table, column in (("pins", "pin_id"), ("queries", "query")):
        tables = small_dataset()
        tables[table][column][0] = blank
        line = stop_line(opened, write_dataset(tmp_path / table, tables))
        assert f"{table}.parquet" in line and f"'{column}'" in line and "empty" in line


def test_a_link_without_text_does_not_count(tmp_path):
    tables = small_dataset()
    tables["link_visits"] = {
        "pin_id": ["007"] * 6,
        "link_title": [None, None, "", " ", "\u200b", "real"],
        "link_description": [None, None, None, "", None, None],
        "dwell_seconds": [50, 50, 50, 50, 50, 10],
    }
    folder = features(write_dataset(tmp_path / "data", tables), tmp_path / "run")
    assert pq.read_table(folder / "pins.parquet")["links"].to_pylist() == ["real", "", ""]


# ------------------------------------------------------------------------------------------------------------
# Numbers, empty columns, levels, one query one text


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_numeric_columns_stay_numbers(tmp_path, kind):
    tables = small_dataset()
    numbers = {"price": [1.5, None, -3.0], "stars": [1, 2, 3], "zero": [0.5, 0.25, 100.0]}
    tables["pins"] |= {**numbers, "zip": ["01234", "5", "6"], "word": ["1", "2", "x"]}
    tables["queries"]["length"] = [2.5, 7.0]
    folder = features(write_dataset(tmp_path / "data", tables, kind), tmp_path / "run")
    pins, queries = (pq.read_table(folder / f"{name}.parquet") for name in ("pins", "queries"))
    assert {name: pins[name].to_pylist() for name in numbers} == numbers
    assert all(pins.schema.field(name).type == pa.float64() for name in numbers)
    assert pins["zip"].to_pylist() == ["01234", "5", "6"] and pins["word"].to_pylist() == ["1", "2", "x"]
    assert queries["length"].to_pylist() == [2.5, 7.0]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_text_of_digits_is_a_category(tmp_path, kind):
    tables = small_dataset()
    tables["pins"]["model"] = ["1", "2", "3"]
    folder = features(write_dataset(tmp_path / "data", tables, kind), tmp_path / "run")
    assert pq.read_table(folder / "pins.parquet")["model"].to_pylist() == ["1", "2", "3"]


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_numeric_columns_of_pairs_follow_the_match_features(tmp_path, kind):
    tables = small_dataset()
    tables["impressions"] |= {"clicks": [5, 6, 7], "position": [1, 2, 3], "device": ["a", "b", "c"]}
    tables["labels"] |= {"Clicks": [1.5, None, 3.0], "device": ["a", "b", "c"]}
    folder = features(write_dataset(tmp_path / "data", tables, kind), tmp_path / "run", "--shard-rows", "2")
    shards = [pq.read_table(path) for path in sorted((folder / "impressions").iterdir())]
    expected = ["query_index", "pin_index", *MATCH_FEATURES, "clicks"]
    assert all(shard.column_names == expected for shard in shards)
    assert [value for shard in shards for value in shard["clicks"].to_pylist()] == [5, 6, 7]
    labelled = pq.read_table(folder / "labelled.parquet")
    assert labelled["clicks"].to_pylist() == [1.5, None, 3] and labelled.column_names[-1] == "clicks"
    assert labelled["clicks"].type == pa.float32()


@pytest.mark.parametrize("column", ["BM25", "expected_level"])
def test_a_numeric_column_of_pairs_with_a_name_of_ours(tmp_path, column):
    tables = small_dataset()
    for name in ("impressions", "labels"):
        tables[name][column] = [1, 2, 3]
    line = stop_line(features, write_dataset(tmp_path / "data", tables), tmp_path / "run")
    assert "impressions.parquet" in line and repr(column) in line


TWICE = {  # table, its column, what else would have the student's name for it
    "text": ("pins", "text", "'text': an embedding has its name, pin_text: rename it"),
    "graph": ("pins", "Graph", "pin_Graph"),
    "a query's text": ("queries", "text", "query_text"),
    "an own embedding": ("pins", "mine", "pin_mine"),
    "a number of pairs": ("pins", "price", "'price': the column 'pin_price' of impressions.parquet has"),
}


@pytest.mark.parametrize("case", TWICE)
def test_two_inputs_of_the_student_with_one_name(tmp_path, capsys, case):
    """Of which one would stand for both: stage 04 would end in a traceback, after the teacher's labels."""
    table, column, said = TWICE[case]
    tables = small_dataset()
    tables[table][column] = ["x", "y", "z"][
        : len(tables[table]["query_id" if table == "queries" else "pin_id"])
    ]
    for name in ("impressions", "labels"):
        tables[name]["pin_price"] = [1.5, 2.5, 3.5]
    data = own_embeddings(write_dataset(tmp_path / "data", tables))
    np.save(data / "embeddings" / "pin_mine.npy", np.ones((1, 2), np.float32))
    (data / "embeddings" / "pin_mine.ids").write_text("007\n")
    line = stop_line(features, data, tmp_path / "run")
    assert line.startswith(f"{table}.parquet: column {column!r}: ") and said in line
    stop_line(build.main, ["--check", "--data", str(data)])
    assert f"wrong: {line}\n" in capsys.readouterr().out


def test_columns_of_nothing_are_left_out(tmp_path):
    tables = small_dataset()
    none = pa.array([None] * 3, pa.string())
    tables["pins"] |= {"kind": none, "blank": ["", " ", None], "price": pa.array([None, np.nan, np.inf])}
    tables["queries"] |= {"interest": pa.array([None] * 2, pa.string()), "shopping_interest": ["a", None]}
    folder = features(write_dataset(tmp_path / "data", tables), tmp_path / "run")
    assert pq.read_schema(folder / "pins.parquet").names == ["pin_id", *FIELDS, "image"]
    queries = ["query_id", "query", "language", "shopping_interest"]
    assert pq.read_schema(folder / "queries.parquet").names == queries


LEVELS = {  # the labels of the table, --levels, what they become
    "ESCI": (["E", " I ", "S"], "E=5,S=4,C=3,I=1", [5, 1, 4]),
    "whole numbers": ([1, 0, 1], "0=1,1=5", [5, 1, 5]),
    "floats": ([1.0, 0.0, 1.0], "0=1, 1=5", [5, 1, 5]),
    "words": (["very good", "a=b", "bad"], "very good=5,bad=1,a=b=2", [5, 2, 1]),
}


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
@pytest.mark.parametrize("case", LEVELS)
def test_levels_of_ones_own(tmp_path, case, kind):
    labels, flag, expected = LEVELS[case]
    if kind == "csv" and case == "floats":
        return  # a CSV file has no floats: 1.0 is a text
    tables = small_dataset()
    tables["labels"]["label"] = labels
    folder = features(write_dataset(tmp_path / "data", tables, kind), tmp_path / "run", "--levels", flag)
    assert pq.read_table(folder / "labelled.parquet")["label"].to_pylist() == expected
    assert read_json(folder / "stage.json")["levels"] == sorted(set(expected))


def test_levels_that_do_not_fit(tmp_path, capsys):
    tables = small_dataset()
    tables["labels"]["label"] = ["E", "X", "I"]
    data = write_dataset(tmp_path / "data", tables)
    line = stop_line(features, data, tmp_path / "run", "--levels", "E=5,I=1")
    assert "labels.parquet" in line and "one of E, I" in line and "'X'" in line
    assert "--levels" in stop_line(features, data, tmp_path / "run")
    for wrong in ("E", "E=6", "E=5,E=4", "=5", "E=5,,I=1", "E:5"):
        with pytest.raises(SystemExit) as end:
            features(data, tmp_path / "run", "--levels", wrong)
        assert end.value.code == 2 and f"error: --levels {wrong}: write" in capsys.readouterr().err
    assert not (tmp_path / "run" / "features").exists()


SAME = ["red chair 7", "Red Chair 7", " RED chair 7\t", "re\u0301d", "r\u00e9d"]  # three texts and two


def test_a_text_stands_on_one_side_whatever_its_ids(tmp_path):
    tables = small_dataset()
    texts = [text.replace("7", str(i)) for i in range(60) for text in SAME[:3]] + SAME[3:]
    ids = [f"q{i}" for i in range(len(texts))]
    tables["queries"] = {"query_id": ids, "query": texts}
    tables["labels"] = {"query_id": ids, "pin_id": ["007"] * len(ids), "label": [3] * len(ids)}
    tables["impressions"] = {"query_id": ["q1"], "pin_id": ["007"]}
    folder = features(write_dataset(tmp_path / "data", tables), tmp_path / "run")
    table = pq.read_table(folder / "labelled.parquet")
    sides = {}
    for query, split in zip(table["query_index"].to_pylist(), table["split"].to_pylist()):
        key = unicodedata.normalize("NFC", texts[query]).strip().lower()
        sides.setdefault(key, set()).add(split)
    assert len(sides) == 61 and all(len(split) == 1 for split in sides.values())
    assert set.union(*sides.values()) == {"train", "eval"}


def test_given_splits_that_leak(tmp_path):
    for i, (one, other) in enumerate([SAME[:2], SAME[1:3], SAME[3:]]):
        tables = small_dataset()
        tables["queries"]["query"] = [one, other]
        line = stop_line(opened, write_dataset(tmp_path / str(i), tables))
        assert "labels.parquet" in line and "'split'" in line and "more than one split" in line


# ------------------------------------------------------------------------------------------------------------
# Tables of other programs, and values of another kind


@pytest.mark.parametrize(
    "sign, name",
    [
        ("_delta_log/00000.json", "Delta Lake"),
        ("metadata/v2.metadata.json", "Iceberg"),
        (".hoodie/hoodie.properties", "Hudi"),
        ("_spark_metadata/0", "Spark"),
        ("day=1/_delta_log/00000.json", "Delta Lake"),
        ("snapshot/snapshot-1", "Paimon"),
    ],
)
def test_a_table_whose_log_says_which_files_count_is_refused(tmp_path, sign, name):
    """Rows that a later file of the log replaced were taken for live ones."""
    tables = small_dataset()
    impressions = tables.pop("impressions")
    write_dataset(tmp_path, tables)
    write_table(tmp_path / "impressions", "part-0", impressions)
    assert opened(tmp_path)
    write_table((tmp_path / "impressions" / sign).parent, "x", {"a": [1]}).rename(
        tmp_path / "impressions" / sign
    )
    line = stop_line(opened, tmp_path)
    assert str(tmp_path / "impressions") in line and name in line and "export" in line


def test_labels_that_are_true_and_false(tmp_path):
    tables = small_dataset()
    tables["labels"]["label"] = [True, False, True]
    data = write_dataset(tmp_path, tables)
    line = stop_line(opened, data)
    assert "labels.parquet" in line and "'label'" in line and "--levels" in line and "'true'" in line
    raw = RawTables(data, levels={"true": 5, "false": 1})
    raw.check()
    assert rows(raw, "labels", "label") == [(5,), (1,), (5,)]


@pytest.mark.parametrize(
    "table, column, value",
    [
        ("engagements", "count", True),
        ("link_visits", "dwell_seconds", True),
        ("engagements", "date", 20240630),
        ("engagements", "date", 1.7e9),
    ],
)
def test_a_value_that_a_cast_would_make_another_of(tmp_path, table, column, value):
    tables = small_dataset()
    tables[table][column] = [value]
    line = stop_line(opened, write_dataset(tmp_path, tables))
    assert f"{table}.parquet" in line and f"'{column}'" in line and "1 row " in line


def test_a_cell_of_more_than_a_line_may_hold(tmp_path):
    """It was called an unterminated quote."""
    write_dataset(tmp_path, small_dataset())
    (tmp_path / "pins.parquet").unlink()
    cell = "x" * 40_000_000
    (tmp_path / "pins.csv").write_text(f'pin_id,title\n007,"{cell}"\np2,a\np3,b\n')
    line = stop_line(opened, tmp_path)
    assert "pins.csv" in line and "over 16 MiB" in line


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("packing", [None, "gz"])
def test_lines_of_json_after_a_byte_order_mark(tmp_path, packing, folder):
    """As Windows writes them. A CSV file with one was read already."""
    tables = small_dataset()
    boards, mark = tables.pop("boards"), "\ufeff".encode()
    data = write_dataset(tmp_path, tables, "jsonl")
    below = data / "boards" / "day=2024-01-05" if folder else data
    path = write_table(below, "boards", boards, "jsonl")
    path.write_bytes(mark + path.read_bytes())
    if packing:
        packed(path, packing)
    if folder:
        write_table(
            data / "boards" / "day=2024-01-06", "b", {"pin_id": ["p2"], "board_title": ["Bath"]}, "jsonl"
        )
        assert rows(opened(data), "boards", "pin_id, board_title, day") == [
            ("007", "Kitchen", "2024-01-05"),
            ("p2", "Bath", "2024-01-06"),
        ]
    else:
        assert rows(opened(data), "boards", "pin_id, board_title") == [("007", "Kitchen")]


def test_a_small_file_of_very_many_rows_is_never_read_whole(tmp_path, monkeypatch):
    """632 kB of Parquet can be 200 million rows: they are counted and checked in SQL, a rule at a time."""
    folder, rows = write_dataset(tmp_path / "d", small_dataset()), 1_000_000
    same = {"pin_id": ["p2"], "board_title": ["Red"]}
    write_parquet(folder / "boards.parquet", pa.table(same).take(pa.array(np.zeros(rows, np.int32))))
    assert (folder / "boards.parquet").stat().st_size < 10_000
    raw, largest = RawTables(folder), []
    ask = raw.ask
    monkeypatch.setattr(raw, "ask", lambda *args: largest.append(len(found := ask(*args))) or found)
    raw.check()
    assert raw.count_rows()["boards"] == rows and max(largest) == 1
    (folder / "boards.parquet").rename(folder / "pins.parquet")
    assert "stands more than once, the first: 'p2'" in stop_line(RawTables(folder).check)


@pytest.mark.parametrize("content", ["{", "[", "x", '"'])
def test_lines_of_json_that_are_one_byte_are_no_empty_table(tmp_path, content):
    folder = write_dataset(tmp_path / "d", small_dataset(), "jsonl")
    (folder / "boards.jsonl").rename(folder / "rows.jsonl")
    (folder / "boards").mkdir()
    (folder / "rows.jsonl").rename(folder / "boards" / "a.jsonl")
    (folder / "boards" / "b.jsonl").write_text(content)
    line = stop_line(RawTables, folder)
    assert "b.jsonl" in line and ("Malformed JSON" in line or "Missing closing brace" in line)


@pytest.mark.parametrize("content", ["", "\n", "\ufeff"])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "jsonl.gz"])
def test_files_of_a_folder_with_nothing_in_them_are_left_out(tmp_path, content, kind):
    tables = small_dataset()
    boards = tables.pop("boards")
    folder = write_dataset(tmp_path, tables)
    (write_table(folder / "boards", "b", boards, kind[:5].rstrip("."))).with_name(f"a.{kind}").write_bytes(
        gzip.compress(content.encode()) if kind.endswith("gz") else content.encode()
    )
    assert rows(opened(folder), "boards", "pin_id, board_title") == [("007", "Kitchen")]


def test_tags_of_languages_compare_without_case_and_regions_belong_to_their_language():
    tags = [" EN", "en_US", "zh-Hant-TW"]
    found = Database(".").ask(f"SELECT {', '.join(f'plain_tag({tag!r})' for tag in tags)}")
    assert found == [("en", "en-us", "zh-hant-tw")]
    for tag, language in (("en-us", "EN"), ("en-us", "en_US"), ("zh-hant-tw", " zh-Hant")):
        assert is_spoken(tag, [language])
    assert not is_spoken("en", ["en-US"]) and not is_spoken("eng", ["en"])


def test_languages_in_features(tmp_path):
    tables = small_dataset()
    tables["queries"]["language"] = ["en_US", " "]
    folder = features(write_dataset(tmp_path / "data", tables), tmp_path / "run")
    assert pq.read_table(folder / "queries.parquet")["language"].to_pylist() == ["en-us", "en"]


@pytest.mark.parametrize("killed", [False, True])
def test_a_table_that_is_replaced_meanwhile_and_put_back(tmp_path, monkeypatch, killed):
    """Features of other rows stood under the fingerprint of those that were put back: nothing to do."""
    data = own_embeddings(write_dataset(tmp_path / "data", small_dataset()))
    others = small_dataset()
    others["impressions"] = {"query_id": ["q1"], "pin_id": ["p2"]}
    write_dataset(tmp_path / "others", others)
    right = (data / "impressions.parquet").read_bytes()
    write_labelled = build.write_labelled

    def replaced(*args):  # when all is checked and numbered
        (data / "impressions.parquet").write_bytes((tmp_path / "others" / "impressions.parquet").read_bytes())
        os.utime(data / "impressions.parquet", (1, 1))
        return write_labelled(*args)

    def put_back(*args):
        (data / "impressions.parquet").write_bytes(right)
        if killed:
            raise KeyboardInterrupt
        return about_dataset(*args)

    about_dataset = build.about_dataset
    flags = arguments(data, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(build, "write_labelled", replaced)
        patch.setattr(build, "about_dataset", put_back)
        if killed:
            with pytest.raises(KeyboardInterrupt):
                build.main(flags)
        else:
            assert "impressions.parquet: written while" in stop_line(build.main, flags)
    build.main(flags)
    shard = tmp_path / "run" / "features" / "impressions" / "part-00000.parquet"
    assert pq.read_metadata(shard).num_rows == 3


def test_of_a_long_text_no_more_is_tokenized_than_is_read():
    """40 titles of 1 MB took minutes."""
    from lib.inputs.encoders import TextEncoder

    seen = []
    encoder = TextEncoder.__new__(TextEncoder)
    encoder.name, encoder.max_tokens = "a/model", 64
    encoder.tokenizer = lambda texts, **options: seen.extend(texts) or 1 / 0
    stop_line(encoder, ["x" * 1_000_000])
    assert [len(text) for text in seen] == [6_400]
