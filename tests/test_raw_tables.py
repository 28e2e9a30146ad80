"""Raw tables: what is right is read exactly, what is wrong is said in one line."""

import csv
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import own_embeddings, small_dataset, stage, stop_line, write_dataset, write_table
from hypothesis import given
from hypothesis import strategies as st

from data.tables import RawTables
from runs.stage import Stop

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
    assert not raw.has("boards")
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
    assert "make_toy.py" in stop_line(opened, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "pins.parquet" in stop_line(opened, tmp_path / "empty")


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
    assert "labels.parquet" in line and "'eval'" in line


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
