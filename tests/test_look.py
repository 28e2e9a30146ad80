"""What a user sees in the first seconds: all faults of the tables at once, what becomes of each column, how
far raters agree."""

import re
from dataclasses import replace

import numpy as np
import pytest
from helpers import own_embeddings, small_dataset, stage, stop_line, write_dataset, write_table

from lib.inputs import encoders
from lib.stages.terminal import Stop
from lib.tables import look
from lib.tables.names import near
from lib.tables.raw import RawTables, levels_of
from lib.tables.splits import split_of

build = stage("01")


def check(folder, *flags):
    build.main(["--check", "--data", str(folder), *flags])


def lines(capsys):
    return capsys.readouterr().out.splitlines()


def many(columns, n=40):
    """The small dataset with n pins more, which have these columns."""
    tables = small_dataset()
    pins = {name: [*values, *[None] * n] for name, values in tables["pins"].items()}
    pins["pin_id"][3:] = [f"m{i}" for i in range(n)]
    tables["pins"] = pins | {
        name: [None] * 3 + [value(i) for i in range(n)] for name, value in columns.items()
    }
    return tables


# ------------------------------------------------------------------------------------------------------------
# --check


def test_all_faults_of_all_tables_at_once(tmp_path, capsys):
    tables = small_dataset()
    tables["pins"] = {"sku": ["007"], "titel": ["red chair"]}
    tables["labels"]["label"] = ["5", "good", "9"]
    tables["labels"]["split"] = ["train", "test", "eval"]
    tables["queries"]["query_id"] = ["q1", "q1"]
    tables["engagements"]["date"] = ["30.06.2024"]
    tables["products"] = tables.pop("impressions")
    write_dataset(tmp_path, tables, "csv")
    assert "9 thing(s) wrong" in stop_line(check, tmp_path)
    wrong = [line for line in lines(capsys) if line.startswith("wrong")]
    said = [
        "'pin_id' is missing; it has 'sku', 'titel'; is 'sku' 'pin_id'?",
        "impressions.parquet (or .csv, .jsonl, or a folder impressions/): missing",
        "label': 1 row empty or not a number",
        "date': 1 row empty or not date",
        "query_id': 1 row with an id that stands more than once",
        "label': 1 row outside 1, 2, 3, 4, 5",
        "split': 1 row neither",
        "query_id': 1 row with an id that queries.csv does not have",
        "split': 2 rows (texts of queries) with labels in more than one split",
    ]
    for part, line in zip(said, wrong, strict=True):
        assert part in line, line


@pytest.mark.parametrize("gone", ["pins", "queries", "labels", "impressions"])
def test_a_table_that_is_not_there_hides_no_fault_of_another(tmp_path, capsys, gone):
    tables = {**small_dataset(), "boards": {"pin_id": ["007"], "title": ["x"]}}
    for name in ("labels", "impressions"):
        tables[name]["position"] = list(range(3))
    del tables[gone]
    assert "2 thing(s) wrong" in stop_line(check, write_dataset(tmp_path, tables))
    missing, column = (line for line in lines(capsys) if line.startswith("wrong"))
    assert f"{gone}.parquet" in missing and "'board_title' is missing; it has 'pin_id', 'title'" in column


def wrong(folder, capsys):
    """The lines on faults of --check, which must end in a Stop."""
    stop_line(check, folder)
    return [line for line in lines(capsys) if line.startswith("wrong")]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_bytes_that_are_no_text_hide_no_other_fault(tmp_path, capsys, kind):
    tables = small_dataset()
    tables["labels"]["label"] = [5, 6, 4]
    write_dataset(tmp_path, tables, kind)
    if kind == "csv":
        (tmp_path / "pins.csv").write_bytes("pin_id,title,note\n007,a,é\np2,é,b\np3,é,b\n".encode("latin-1"))
    else:
        write_table(tmp_path, "pins", {**tables["pins"], "note": [b"a", b"\xff\xfe", b"b"]})
    found = sorted(wrong(tmp_path, capsys), key=lambda line: "label" in line)
    for part, line in zip(("not UTF-8: ", "1 row outside 1, 2, 3, 4, 5"), found, strict=True):
        assert part in line, line


@pytest.mark.parametrize("rows", ["007,5\np2,5,x", "007\np2,5", '007,"5\np2,5'])
def test_what_cannot_be_read_is_said_once(tmp_path, capsys, rows):
    write_dataset(tmp_path, small_dataset(), "csv")
    (tmp_path / "boards.csv").write_text(f"pin_id,board_title\n{rows}\n")
    [line] = wrong(tmp_path, capsys)
    assert "boards.csv, line " in line


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_columns_missing_in_one_table_are_one_line(tmp_path, kind):
    tables = small_dataset()
    tables["labels"] = {"term": ["q1"], "sku": ["007"], "rating": [3]}
    line = stop_line(RawTables, write_dataset(tmp_path, tables, kind))
    assert "columns 'query_id', 'pin_id', 'label' are missing" in line
    assert "is 'sku' 'pin_id'?" in line and "is 'rating' 'label'?" in line
    assert near("pin_id", ["title", "article_id"]) == ["article_id"] and near("label", ["id"]) == []


def test_names_that_tables_have_elsewhere(tmp_path):
    tables = small_dataset()
    tables["products"] = tables.pop("pins")
    tables["orders"] = tables.pop("engagements")
    line = stop_line(RawTables, write_dataset(tmp_path, tables))
    assert "products.parquet: a table of pins? Then rename it" in line
    write_table(tmp_path, "pins", tables["products"])
    assert "not read: orders.parquet (engagements?), products.parquet" in list(RawTables(tmp_path).remarks())


def test_check_reads_no_model_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(build.models, "load_config", None)
    write_dataset(tmp_path / "data", small_dataset())
    check(tmp_path / "data", "--run", str(tmp_path / "run"), "--preset", "small")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    out = lines(capsys)
    assert out[-1] == f"{tmp_path / 'data'}: nothing is wrong"
    assert not [line for line in out if line.startswith(("odd", "wrong"))]


def test_ids_of_vectors_that_do_not_fit_are_found_by_the_check(tmp_path, capsys):
    """Not hours later, when pictures have been captioned."""
    data = own_embeddings(write_dataset(tmp_path, small_dataset()))
    for name, ids in (("pin_short", "007\n"), ("pin_twice", "007\n007\n")):
        np.save(data / "embeddings" / f"{name}.npy", np.ones((2, 3), np.float32))
        (data / "embeddings" / f"{name}.ids").write_text(ids)
        assert "1 thing(s) wrong" in stop_line(check, data)
        assert f"wrong: {data}/embeddings/{name}.ids: 1 ids " in capsys.readouterr().out
        (data / "embeddings" / f"{name}.npy").unlink()


def test_columns_that_are_not_shown_are_counted_and_a_base_is_not_looked_at(tmp_path, capsys):
    tables = small_dataset()
    tables["pins"] |= {f"c{n:02}": ["x", "y", "y"] for n in range(45)}
    check(write_dataset(tmp_path, tables), "--base", str(tmp_path / "run"))
    said = capsys.readouterr().out
    assert "pins.c37" in said and "pins.c38" not in said
    assert re.search(r"\n  pins\.… +7 further columns, not shown\n", said) and said.count("not shown") == 1
    assert f"--base {tmp_path / 'run'}: not looked at" in said


def test_vectors_that_are_no_numbers_are_found_by_the_check(tmp_path, capsys):
    data = own_embeddings(write_dataset(tmp_path, small_dataset()))
    np.save(data / "embeddings" / "pin_bad.npy", np.array([[1, 2], [np.nan, 3]], np.float32))
    (data / "embeddings" / "pin_bad.ids").write_text("007\np2\n")
    assert "1 thing(s) wrong" in stop_line(check, data)
    assert f"wrong: {data}/embeddings/pin_bad.npy: 1 rows " in capsys.readouterr().out


def test_tables_are_checked_before_a_model_is_looked_for(tmp_path):
    tables = small_dataset()
    tables["labels"]["label"] = [5, 1, 0]
    tables["pins"]["image"] = ["https://shop.example/1.jpg", None, None]
    write_dataset(tmp_path / "data", tables)
    missing = ["--caption-model", str(tmp_path / "none"), "--text-encoder", str(tmp_path / "none")]
    flags = ["--data", str(tmp_path / "data"), "--run", str(tmp_path / "run"), *missing]
    assert "label': 1 row outside" in stop_line(build.main, flags)


def test_no_captioner_where_no_picture_can_be_read(tmp_path, monkeypatch, capsys):
    tables = small_dataset()
    tables["pins"]["image"] = ["https://shop.example/1.jpg", None, "ftp://x/2.jpg"]
    write_dataset(tmp_path / "data", tables)
    own_embeddings(tmp_path / "data")
    monkeypatch.setattr(encoders.models, "load_config", None)
    flags = ["--data", str(tmp_path / "data"), "--run", str(tmp_path / "run"), "--device", "cpu"]
    build.main(flags)
    out = "\n".join(lines(capsys))
    assert "column 'image': 2 of 2 are URLs, which are not fetched: leave the column out" in out
    assert "warning: not one of 2 pictures can be read" in out
    assert "captions: 0 pins; 2 images skipped" in out
    assert not (tmp_path / "run" / "features" / "pin_visual_embedding.npy").exists()


def test_the_toy_is_advised_for_the_toy_alone(tmp_path, monkeypatch):
    nowhere = tmp_path / "nowhere"
    for preset in ("toy", "small"):
        line = stop_line(build.main, ["--preset", preset, "--data", str(nowhere)])
        assert "make_toy" not in line and "data/README.md" in line
    monkeypatch.setitem(build.PRESETS, "toy", replace(build.PRESETS["toy"], data=nowhere))
    assert "make_toy.py" in stop_line(build.main, [])


# ------------------------------------------------------------------------------------------------------------
# What becomes of each column


def test_every_column_has_a_role_and_what_is_odd_is_said(tmp_path, capsys):
    columns = {
        "brand": lambda i: "Ardo" if i % 3 else "Bo",
        "price": lambda i: f"{i},95",
        "euro": lambda i: f"€ 1.0{i:02},5",
        "size": lambda i: f"{i}.5",
        "sku": lambda i: f"A-{i}",
        "attributes": lambda i: ('{"red": 1}' if i % 2 else " [1]") if i < 36 else "x",
        "body": lambda i: f"<p>A long text that says something of the thing</p> {i % 30}",
        "nothing": lambda i: None,
        "updated": lambda i: f"{i % 28 + 1:02d}.03.2024",
    }
    tables = many(columns)
    tables["pins"]["description"] = [f"<b>{i}</b>" if i % 2 else "plain" for i in range(43)]
    tables["labels"] |= {"position": [1, 2, 3], "note": ["a", "b", "c"]}
    tables["impressions"]["position"] = [1, 2, 3]
    check(write_dataset(tmp_path, tables, "csv"))
    out = lines(capsys)
    roles = {line.split()[0]: " ".join(line.split()[1:]) for line in out if line.startswith("  ")}
    assert roles["pins.brand"] == "category, 2 values Ardo"
    assert roles["pins.size"] == "number 0.5"
    assert roles["pins.nothing"] == "left out: nothing in it"
    assert roles["labels.position"] == "number of the pair 1"
    assert roles["labels.note"].startswith("left out: no number that impressions has too")
    odd = {line.split(":")[1].strip(): line.split(":")[2].strip() for line in out if line.startswith("odd")}
    assert odd == {
        "pins.price": "a category, for 40 of 40 cells are no plain number, the first",
        "pins.euro": "a category, for 40 of 40 cells are no plain number, the first",
        "pins.description": "21 of 43 cells are HTML",
        "pins": "(next to) no two rows share a value of 'euro', 'price', 'sku'",
        "pins.attributes": "36 of 40 cells are JSON",
        "pins.body": "40 of 40 cells are long texts, in a category that nobody reads",
    }


def test_queries_that_differ_in_case_alone(tmp_path, capsys):
    tables = small_dataset()
    tables["queries"] = {"query_id": ["q1", "q2", "q3"], "query": ["red chair", "椅子", " Red Chair"]}
    check(write_dataset(tmp_path, tables))
    assert any("3 rows, 2 texts" in line for line in lines(capsys))


TAGS = {  # as they stand in the table: bare, or None where they are no tag
    **{"en": "en", "en-US": "en-us", "EN_GB": "en-gb", "zh-Hant": "zh-hant", " fr_FR ": "fr-fr", "": ""},
    **{"\u200een": "en", "x-shop": "x-shop", "es-419": "es-419", "de-CH-1996": "de-ch-1996"},
    **dict.fromkeys(["true", "1", "this is, a; sentence", "en\0us", "-us", "_", "english"]),
}


def test_languages_that_are_no_tag_are_named(tmp_path, capsys):
    tables, n = small_dataset(), len(TAGS)
    ids = [f"q{i + 1}" for i in range(n)]
    tables["queries"] = {"query_id": ids, "query": [f"text {i}" for i in range(n)], "language": [*TAGS]}
    check(write_dataset(tmp_path, tables))
    [line] = [line for line in lines(capsys) if line.startswith("odd")]
    assert line.startswith("odd: queries.parquet: column 'language': 7 rows are no BCP 47 tag")
    assert line.endswith("the first: 'true'")
    bare = RawTables(tmp_path).ask("SELECT coalesce(plain_tag(language), '') FROM raw_queries")
    assert all(tag == found for (found,), tag in zip(bare, TAGS.values()) if tag is not None)


# ------------------------------------------------------------------------------------------------------------
# Raters


def rated(tmp_path, ratings, levels=None):
    """Checked tables with labels of raters: rows (query, pin, rater, label)."""
    tables = small_dataset()
    tables["labels"] = dict(zip(("query_id", "pin_id", "rater", "label"), map(list, zip(*ratings))))
    raw = RawTables(write_dataset(tmp_path, tables), levels=levels)
    raw.check()
    return raw


def test_raters_are_merged_by_the_median_ties_down(tmp_path):
    ratings = [("q2", "p3", "ann", 4)]
    ratings += [("q1", "007", rater, label) for rater, label in (("ann", 5), ("bob", 1), ("cy", 4))]
    ratings += [("q1", "p2", rater, label) for rater, label in (("ann", 2), ("bob", 3))]
    raw = rated(tmp_path, ratings)
    found = raw.ask("SELECT query_id, pin_id, label FROM raw_labels")
    assert found == [("q1", "007", 4), ("q1", "p2", 2), ("q2", "p3", 4)]
    assert raw.count_rows()["labels"] == 3
    [line] = look.agreement(raw)
    assert "3, 6 ratings of 3 pairs" in line and "agree in 0%" in line


def test_kappa_is_that_of_both_orders(tmp_path):
    levels = np.array([[5, 5], [1, 1], [5, 4], [1, 2], [3, 3], [4, 4]])
    pairs = [(query, pin) for query in ("q1", "q2") for pin in ("007", "p2", "p3")]
    ratings = [
        (*pair, rater, int(label)) for pair, two in zip(pairs, levels) for rater, label in zip("ab", two)
    ]
    [line] = look.agreement(rated(tmp_path, ratings))
    both = np.concatenate([levels, levels[:, ::-1]])
    expected = ((both[:, 0][:, None] - both[:, 1][None]) ** 2).mean()  # by chance
    kappa = 1 - ((both[:, 0] - both[:, 1]) ** 2).mean() / expected
    assert f"agree in 67%, weighted kappa {kappa:.2f}" in line


def test_all_ratings_of_a_pair_count_and_without_raters_there_is_one(tmp_path):
    ratings = [("q1", "007", "ann", 5), ("q1", "007", "ann", 4), ("q2", "p3", "bob", 1)]
    raw = rated(tmp_path / "raters", ratings)
    assert raw.ask("SELECT label FROM raw_labels ORDER BY ALL") == [(1,), (4,)]
    tables = small_dataset()
    tables["labels"] = {"query_id": ["q1", "q1"], "pin_id": ["007", "007"], "label": [5, 4]}
    line = stop_line(RawTables(write_dataset(tmp_path / "none", tables)).check)
    assert "'q1', '007'" in line and "A column 'rater' names them" in line


def test_the_labels_that_there_are_are_named(tmp_path):
    tables = small_dataset()
    tables["labels"]["label"] = ["yes", "no", "partly"]
    line = stop_line(RawTables(write_dataset(tmp_path / "words", tables)).check)
    assert "--levels says what other labels mean" in line and line.endswith("there are no, partly, yes")
    tables["labels"]["label"] = [0, 3, 1]
    line = stop_line(RawTables(write_dataset(tmp_path / "numbers", tables)).check)
    assert "outside 1, 2, 3, 4, 5" in line and line.endswith("there are 0, 1, 3")


def test_a_rating_outside_the_levels_is_said_though_the_median_is_inside(tmp_path):
    ratings = [("q1", "007", "ann", 5), ("q1", "007", "bob", 9), ("q2", "p3", "bob", 1)]
    with pytest.raises(Stop, match="1 row outside"):
        rated(tmp_path, ratings)
    tables = [("q1", "007", "ann", 0), ("q1", "007", "bob", 3), ("q2", "p3", "bob", 1)]
    raw = rated(tmp_path, tables, levels_of("0=1,1=2,2=4,3=5"))
    assert raw.ask("SELECT label FROM raw_labels ORDER BY ALL") == [(1,), (2,)]


# ------------------------------------------------------------------------------------------------------------
# The split


def test_eval_share_holds_out_queries_and_says_how_sure_one_will_be(capsys):
    keys = [f"query {i // 10}" for i in range(2_000)]
    for share in (0.1, 0.4):
        split, counts = split_of(keys, [None] * len(keys), share, "labels")
        queries = len({key for key, side in zip(keys, split) if side == "eval"})
        assert abs(queries - 200 * share) < 15 and counts["eval"] == 10 * queries
        said = capsys.readouterr().out
        assert f"{counts['eval']:,} rows of {queries:,} queries eval" in said
        assert ("--eval-share" in said) == (queries < 50)


def test_the_run_is_the_toys_for_the_toy_alone():
    settings = [stage("02").parse(stage("02").PRESETS, flags) for flags in ([], ["--preset", "small"])]
    assert [each.run.name for each in settings] == ["toy", "small"]
