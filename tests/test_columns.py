"""Columns of a user's tables beyond the contract: what becomes a feature, and what is said of the others."""

import ast
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import ROOT, own_embeddings, small_dataset, stage, stop_line, write_dataset, write_table

from lib.tables.columns import AMOUNT, oddities
from lib.tables.database import Database
from lib.tables.raw import RawTables

build = stage("01")


def dataset(folder, n=30, kind="parquet", **pins):
    """A dataset of n pins with further columns."""
    tables = small_dataset()
    ids = [*tables["pins"]["pin_id"], *(f"x{i}" for i in range(3, n))]
    tables["pins"] = {"pin_id": ids, "title": ["a title"] * n, **pins}
    return write_dataset(folder, tables, kind)


def judged(folder):
    """{column: role} of the pins' further columns, and the lines on what is odd."""
    raw = RawTables(folder)
    raw.check()
    return {name: about.role for name, about in raw.columns("pins").items()}, list(oddities(raw, "pins"))


N = 30
RUN = list(range(N))
ROW_NUMBERS = {  # name of a column: its values, what becomes of it
    "__index_level_0__": ([0, 1] * 15, "left out"),
    "Unnamed: 0": (RUN, "left out"),
    "Unnamed: 0_level_1": (RUN, "left out"),
    "...1": (RUN, "left out"),
    "index": (RUN, "left out"),
    "Level_0": ([i + 1 for i in RUN], "left out"),
    "rownames": (RUN[::-1], "left out"),
    "rank": (RUN, "number"),  # may be meant
    "row_id": ([3] * N, "number"),
    "index_of_refraction": (RUN, "number"),
}


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_row_numbers_are_no_feature(tmp_path, kind):
    """What pandas, readr and others leave in a table."""
    columns = {name: values for name, (values, _) in ROW_NUMBERS.items()}
    roles, lines = judged(dataset(tmp_path, kind=kind, **columns))
    assert roles == {name: role for name, (_, role) in ROW_NUMBERS.items()}
    for name, (_, role) in ROW_NUMBERS.items():
        assert any(f"pins.{name}: left out" in line for line in lines) == (role == "left out")


def test_a_column_without_a_name_is_left_out(tmp_path):
    """A comma at the end of a header; in Parquet empty names. A column2 of the user's stays."""
    folder = dataset(tmp_path, column2=RUN)
    table = pq.read_table(folder / "pins.parquet")
    for name in ("", " ", ""):
        table = table.append_column(name, pa.array(RUN))
    pq.write_table(table, folder / "pins.parquet")
    roles, lines = judged(folder)
    assert roles == {"column2": "number"} | {f"column {n} without a name": "left out" for n in (4, 5, 6)}
    assert sum("without a name: left out" in line for line in lines) == 3
    (folder / "pins" / "kind=a").mkdir(parents=True)
    (folder / "pins.parquet").rename(folder / "pins" / "kind=a" / "a.parquet")
    assert judged(folder)[0] == roles | {"kind": "category"}
    (folder / "pins" / "kind=a" / "a.parquet").rename(folder / "pins.parquet")
    (folder / "pins" / "kind=a").rmdir()
    (folder / "pins.parquet").unlink()
    (folder / "pins.csv").write_text(
        "pin_id,,column2,\n" + "".join(f"{i},{i},{i},\n" for i in ["007", "p2", "p3"])
    )
    roles, lines = judged(folder)
    nameless = dict.fromkeys(["column 2 without a name", "column 4 without a name"], "left out")
    assert roles == {"column2": "category", **nameless}
    assert any("column 4 without a name: left out" in line for line in lines)


def test_columns_all_of_whose_values_differ_are_named_in_one_line(tmp_path):
    times = pa.array([10**15 + i for i in RUN], pa.timestamp("us"))
    columns = {"id": [f"i{i}" for i in RUN], "session": [7 * i for i in RUN], "at": times}
    columns |= {"price": [i + 0.5 for i in RUN], "word": ["a", "b"] * 15}
    roles, lines = judged(dataset(tmp_path, **columns))
    (line,) = (line for line in lines if "share a value" in line)
    assert "'at', 'id', 'session'" in line and "price" not in line and roles["price"] == "number"
    assert not any("share a value" in line for line in judged(dataset(tmp_path / "few", 3, id=[1, 2, 3]))[1])
    twice = [f"t{max(i, 1)}" for i in range(200)]  # two of two hundred times are the same
    assert any("'time'" in line for line in judged(dataset(tmp_path / "many", 200, time=twice))[1])


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
@pytest.mark.parametrize("cell", ["\\N", "NULL", "None", "NA", "n/a", "-", "1,234.50", "€ 12", "12,5", "abc"])
def test_one_odd_cell_in_a_column_of_numbers_is_named(tmp_path, kind, cell):
    numbers = [f"{i}.5" for i in range(N - 1)]
    roles, lines = judged(dataset(tmp_path, kind=kind, price=[*numbers, cell]))
    (line,) = (line for line in lines if "pins.price: a category" in line)
    assert roles["price"] == "category" and "1 of 30 cells" in line and repr(cell) in line


def test_codes_that_a_cast_would_make_numbers_of(tmp_path):
    """DuckDB takes 32_34 for 3234, and 007 after a space for 7."""
    columns = {"size": ["32_34", "30_32", "31"] * 10, "code": [" 007", "12", "13"] * 10}
    roles, _ = judged(dataset(tmp_path, kind="csv", **columns))
    assert roles == dict.fromkeys(columns, "category")


def test_columns_of_words_and_of_amounts(tmp_path):
    """A word among words is not odd; a whole column of amounts is."""
    words = {"size": ["A4", "12 cm", "7"] * 10, "day": ["2024-01-05"] * N, "zip": ["01234", "5", "6"] * 10}
    amounts = {"euro": ["€ 12", "1.234,50 €"] * 15, "share": ["12 %"] * N, "comma": ["12,5"] * N}
    roles, lines = judged(dataset(tmp_path, **words, **amounts))
    assert set(roles.values()) == {"category"}
    odd = {
        column
        for column in roles
        for line in lines
        if "no plain number" in line and f"pins.{column}:" in line
    }
    assert odd == amounts.keys()
    assert Database(tmp_path).ask(f"SELECT regexp_full_match('12 cm', '{AMOUNT}')") == [(False,)]


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_numbers_beyond_fp32_are_unknown_and_named(tmp_path, kind):
    """04 trained on them to a loss of 1e36, or blamed --lr."""
    prices = [1e308, 2.5, 1e39] + [float(i) for i in range(3, N)]
    folder = dataset(tmp_path / "data", kind=kind, price=prices)
    roles, lines = judged(folder)
    (line,) = (line for line in lines if "pins.price: " in line and "beyond" in line)
    assert roles["price"] == "number" and "2 of 30 cells" in line and "308" in line
    build.main(["--data", str(own_embeddings(folder)), "--run", str(tmp_path / "run"), "--device", "cpu"])
    made = pq.read_table(tmp_path / "run" / "features" / "pins.parquet")["price"].to_pylist()
    assert made[:4] == [None, 2.5, None, 3.0]


def test_numbers_of_pairs_beyond_fp32(tmp_path):
    tables = small_dataset()
    tables["labels"]["bid"], tables["impressions"]["bid"] = [1e39, 1.0, 2.0], [1.0, np.inf, 2.0]
    tables["impressions"]["__index_level_0__"] = tables["labels"]["__index_level_0__"] = [0, 1, 2]
    raw = RawTables(write_dataset(tmp_path, tables))
    lines = "\n".join([*oddities(raw, "labels"), *oddities(raw, "impressions")])
    assert "labels.bid: 1 of 3" in lines and "impressions.bid: 1 of 3" in lines
    assert list(build.pair_numbers(raw, ())) == ["bid"]
    assert raw.ask(f"SELECT {build.pair_numbers(raw, ())['bid']} FROM raw_labels") == [
        (None,),
        (1.0,),
        (2.0,),
    ]


# ------------------------------------------------------------------------------------------------------------
# Nested values


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_list_of_texts_is_its_texts(tmp_path, kind):
    """Search engines export so. The text was ["red chair","sale"], and a query of the log matched nothing."""
    tables = small_dataset()
    tables["pins"] |= {"title": [["red chair", "sale"], ["one"], []], "tags": [["a", "b"], None, []]}
    tables["boards"]["board_title"] = [["Kitchen", "old"]]
    tables["engagements"]["query"] = [["red chair"]]
    raw = RawTables(write_dataset(tmp_path, tables, kind))
    raw.check()
    assert raw.ask("SELECT title FROM raw_pins") == [("red chair sale",), ("one",), ("",)]
    assert raw.ask("SELECT board_title FROM raw_boards") == [("Kitchen old",)]
    assert raw.ask("SELECT query FROM raw_engagements") == [("red chair",)]
    assert raw.columns("pins")["tags"].role == "category"


def test_texts_and_lists_in_one_column(tmp_path):
    """Also texts that look like a list, and those that JSON escapes."""
    tables = small_dataset()
    titles = ["red chair", ["red", "chair"], '["no list"]']
    tables["pins"]["title"], tables["pins"]["note"] = titles, ["caf\u00e9\n", ["x"], 'say "so"']
    raw = RawTables(write_dataset(tmp_path, tables, "jsonl"))
    raw.check()
    found = raw.ask("SELECT title FROM raw_pins")
    assert found == [("red chair",), ("red chair",), ('["no list"]',)]
    build.number_rows(raw, "pins", "pin")
    assert raw.ask("SELECT note FROM pin_rows") == [("caf\u00e9\n",), ("x",), ('say "so"',)]


NESTED = {  # table, column: values of the first row
    "title": ("pins", "title", {"en": "chair"}),
    "numbers": ("pins", "title", [1, 2]),
    "lists": ("pins", "description", [["a"]]),
    "image": ("pins", "image", {"bytes": "x", "path": "a.png"}),
    "images": ("pins", "image", ["a.png", "b.png"]),
    "language": ("queries", "language", ["en", "de"]),
    "id": ("boards", "pin_id", ["007"]),
    "count": ("engagements", "count", [3]),
}


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
@pytest.mark.parametrize("case", NESTED)
def test_other_nested_values_are_refused_in_one_line(tmp_path, case, kind):
    table, column, value = NESTED[case]
    tables = small_dataset()
    size = len(next(iter(tables[table].values())))
    tables[table][column] = [value] * size
    line = stop_line(lambda: RawTables(write_dataset(tmp_path, tables, kind)).check())
    assert f"{table}.{kind}" in line and f"'{column}'" in line and "row" in line


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_nested_columns_of_the_users_are_left_out(tmp_path, kind):
    columns = {"vector": [[0.5, 1.0]] * N, "seller": [{"name": "a"}] * N}
    roles, lines = judged(dataset(tmp_path, kind=kind, **columns))
    assert roles == {"vector": "left out", "seller": "left out"}
    assert sum("nested values" in line for line in lines) == 2


# ------------------------------------------------------------------------------------------------------------
# Names, and very many


def words_of_our_sql():
    """Every word that stands in the SQL of stage 01: what a user's column may be called."""
    found = set()
    for path in [ROOT / "01_build_features.py", *ROOT.glob("lib/*/*.py")]:
        for part in ast.walk(ast.parse(path.read_text())):
            if isinstance(part, ast.Constant) and re.search(r"\b(SELECT|FROM|JOIN)\b", str(part.value)):
                found |= {word.lower() for word in re.findall(r"[A-Za-z_]\w*", part.value)}
    return sorted(found)


def test_columns_may_have_any_name_that_stands_in_our_sql(tmp_path):
    """Labels with a column `query`, queries with a column `split` ended with: Ambiguous reference."""
    tables, words = small_dataset(), words_of_our_sql()
    refused = {"query_index", "pin_index", *build.FIELDS, *build.MATCH_FEATURES, "engaged", "label", "split"}
    of_student = {"pins": {"text", "visual", "graph"}, "queries": {"text"}}  # inputs pin_text … there are
    of_student["impressions"] = {f"{side}_{word}" for side in ("query", "pin") for word in words}
    for table, columns in tables.items():
        size = len(next(iter(columns.values())))
        taken = refused | of_student.get(table, set()) | columns.keys()
        more = [word for word in words if word not in taken]
        columns |= dict.fromkeys(more, list(range(size)))
    tables["queries"] |= {"split": ["a", "b"], "label": [1, 2], "pin_id": ["x", "y"], "title": ["a", "b"]}
    tables["pins"] |= {"label": [1, 2, 3], "query": ["a", "b", "c"], "query_id": [1, 2, 3]}
    data = own_embeddings(write_dataset(tmp_path / "data", tables))
    build.main(["--data", str(data), "--check"])
    build.main(["--data", str(data), "--run", str(tmp_path / "run"), "--device", "cpu"])
    made = pq.read_table(tmp_path / "run" / "features" / "labelled.parquet")
    assert {"query", "text", "n", "board"} <= {*words}
    assert made["label"].to_pylist() == [5, 1, 4] and made["engagement"].to_pylist()[0] > 1


def test_thousands_of_columns_are_counted_in_a_few_passes(tmp_path, monkeypatch):
    """Of ids and lists one query a column was asked: 3,000 of them had no end."""
    kinds = [1, 2] * (N // 2), [f"id {row}" for row in range(N)], [{"a": 1}] * N
    columns = {f"c{i}": kinds[i % 3] for i in range(450)}
    raw, asked = RawTables(dataset(tmp_path, **columns)), []
    ask = raw.ask
    monkeypatch.setattr(raw, "ask", lambda *args: asked.append(args) or ask(*args))
    found = raw.columns("pins")
    assert len(found) == 450 and sum(about.differs for about in found.values()) == 150 and len(asked) == 2


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_a_zero_byte_in_a_name_is_one_line(tmp_path, kind):
    """DuckDB saw two columns `a`."""
    folder = dataset(tmp_path)
    table = {"pin_id": ["007", "p2", "p3"], "a\0b": [1, 2, 3], "a\0c": [1, 2, 3]}
    (folder / "pins.parquet").unlink()
    if kind == "csv":
        (folder / "pins.csv").write_text("pin_id,a\0b\n007,1\np2,2\np3,3\n")
    elif kind == "jsonl":
        rows = (dict(zip(table, row)) for row in zip(*table.values()))
        (folder / "pins.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        write_table(folder, "pins", table)
    assert f"pins.{kind}" in stop_line(RawTables, folder)
