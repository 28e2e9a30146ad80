"""Stage 01's text, match features and embeddings, each against a count by hand or an independent library."""

import csv
import datetime
import errno
import os
import shutil
import threading
import time
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from helpers import (
    TOY_MODELS,
    own_embeddings,
    small_dataset,
    stage,
    stop_line,
    write_dataset,
    write_table,
)
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rank_bm25 import BM25Okapi
from sklearn.metrics.pairwise import cosine_similarity
from transformers import AutoTokenizer, BertModel

import common
from lib.inputs.bm25 import PairBM25
from lib.inputs.match import MATCH_FEATURES, MatchFeature, MatchFeatures, match_names
from lib.results.contract import contract
from lib.stages import streams
from lib.stages.files import read_json
from lib.stages.finished import hold
from lib.stages.terminal import Stop
from lib.tables.raw import RawTables

build = stage("01")


# ------------------------------------------------------------------------------------------------------------
# Tokens


@pytest.mark.parametrize(
    "text,tokens",
    [
        ("", []),
        (" \t\n!?…", []),
        ("Red CHAIR, 2-seat", ["red", "chair", "2", "seat"]),
        ("snake_case", ["snake", "case"]),
        ("STRASSE Straße", ["strasse", "strasse"]),  # case-folded, not lower-cased
        ("ΣΊΣΥΦΟΣ", ["σίσυφοσ"]),
        ("café", ["café"]),
        ("cafe\u0301", ["café"]),  # the accent as a character of its own
        ("ＡＢＣ１２", ["abc12"]),  # full width
        ("١٢٣ 456", ["١٢٣", "456"]),
        ("हिन्दी में", ["हिन्दी", "में"]),  # vowel signs are combining marks: they do not cut the word
        ("كُرْسِي أحمر", ["كُرْسِي", "أحمر"]),
        ("椅", ["椅"]),
        ("椅子", ["椅子"]),
        ("红色椅子", ["红色", "色椅", "椅子"]),
        ("おしゃれ", ["おし", "しゃ", "ゃれ"]),
        ("コーヒー", ["コー", "ーヒ", "ヒー"]),  # the long-vowel mark belongs to the run
        ("เก้าอี้", ["เก", "ก้", "้า", "าอ", "อี", "ี้"]),
        ("ikea椅子 new", ["ikea", "椅子", "new"]),
        ("chair🪑red", ["chair", "red"]),
        ("의자 빨강", ["의자", "빨강"]),  # Korean is written with spaces
    ],
)
def test_tokenize(text, tokens):
    assert build.tokenize(text, characters=False) == tokens


@pytest.mark.parametrize(
    "text,more",
    [
        ("red chair", []),
        ("椅", []),
        ("椅子", ["椅", "子"]),
        ("黒猫の椅子", ["黒", "猫", "の", "椅", "子"]),
        ("เก้า", ["เ", "ก", "า"]),  # a tone mark is no character of its own
    ],
)
def test_single_characters_beside_the_bigrams(text, more):
    assert build.tokenize(text) == build.tokenize(text, characters=False) + more


@given(st.text(max_size=40))
def test_tokens_are_case_folded_and_of_letters_and_digits(text):
    tokens = build.tokenize(text)
    assert tokens == [t for t in tokens if t and t == t.casefold() and not any(c.isspace() for c in t)]
    assert build.tokenize(" ".join([text, "chair"]))[-1] == "chair"
    assert build.tokenize(text + " x") == build.tokenize(text) + ["x"]


# ------------------------------------------------------------------------------------------------------------
# What the logs say of a pin


def number_rows(raw):
    build.number_rows(raw, "pins", "pin", reserved=common.FIELDS)
    build.number_rows(raw, "queries", "query")


def logs(tmp_path, as_of=None, k=3, **tables):
    """text_from_logs on the small dataset with other logs -> {pin: text} for queries, boards and links, and
    as_of."""
    raw = RawTables(write_dataset(tmp_path / "data", small_dataset() | tables), spill=tmp_path / "spill")
    raw.check()
    number_rows(raw)
    end = build.text_from_logs(raw, as_of, k)
    names = ("queries", "boards", "links")
    return [dict(raw.ask(f"SELECT pin_id, text FROM pin_{name}")) for name in names], end


def engagements(*rows):
    return {"engagements": {c: list(v) for c, v in zip(("pin_id", "query", "date", "count"), zip(*rows))}}


def test_two_year_window_at_its_edges(tmp_path):
    (queries, _, _), end = logs(
        tmp_path,
        k=9,
        **engagements(
            ("007", "newest", "2024-06-30", 9),
            ("007", "inside", "2022-07-01", 5),
            ("007", "outside", "2022-06-30", 500),
            ("007", "ancient", "2020-01-01", 500),
        ),
    )
    assert queries == {"007": "newest inside"} and end == datetime.date(2024, 6, 30)


def test_as_of_moves_the_window(tmp_path):
    rows = engagements(
        ("007", "future", "2024-06-30", 9),
        ("007", "last", "2024-02-29", 5),
        ("007", "first", "2022-03-01", 3),
        ("007", "before", "2022-02-28", 7),
    )
    (queries, _, _), end = logs(tmp_path, as_of=datetime.date(2024, 2, 29), k=9, **rows)  # a leap day
    assert queries == {"007": "last first"} and end == datetime.date(2024, 2, 29)


def test_ten_second_rule_at_its_edges(tmp_path):
    visits = {
        "pin_id": ["007", "007", "p2", "p3", "p3", "p3"],
        "link_title": ["short", "long", "never", "one", "two", "two"],
        "link_description": [None, "note", "read", None, None, None],
        "dwell_seconds": [9.999, 10.0, 9.0, 50.0, 10.0, 11.0],
    }
    (_, _, links), _ = logs(tmp_path, link_visits=visits)
    assert links == {"007": "long note", "p3": "two"}  # of several links the one with most visits that stayed


def test_top_tokens_by_count_then_name(tmp_path):
    rows = engagements(
        ("007", "red chair", "2024-01-01", 4),
        ("007", "Red  Sofa", "2024-02-01", 3),
        ("007", "armchair", "2024-02-01", 4),
        ("007", "zebra", "2024-02-02", 4),
        ("p2", "lamp", "2024-06-30", 1),
    )
    (queries, _, _), _ = logs(tmp_path, k=3, **rows)
    assert queries == {"007": "red armchair chair", "p2": "lamp"}  # red 7; armchair, chair, zebra 4


def test_a_token_counts_once_a_query_and_letters_of_either_case_are_one_query(tmp_path):
    rows = engagements(
        ("007", "Tick tick tick", "2024-01-01", 2),
        ("007", "tock", "2024-01-01", 2),
        ("007", "TOCK ", "2024-01-02", 2),
    )
    (queries, _, _), _ = logs(tmp_path, **rows)
    assert queries == {"007": "tock tick"}


def test_board_tokens_count_saves(tmp_path):
    boards = {
        "pin_id": ["007"] * 4 + ["gone"],
        "board_title": ["My Kitchen", "kitchen ideas", "Kitchen", "ideas", "nobody"],
    }
    (_, boards, _), _ = logs(tmp_path, boards=boards)
    assert boards["007"] == "kitchen ideas my"


def test_no_logs_no_text(tmp_path):
    tables = {k: v for k, v in small_dataset().items() if k not in ("engagements", "boards", "link_visits")}
    raw = RawTables(write_dataset(tmp_path, tables), spill=tmp_path / "spill")
    number_rows(raw)
    assert build.text_from_logs(raw, None, 3) is None
    for name in ("queries", "boards", "links"):
        assert raw.ask(f"SELECT count(*) FROM pin_{name}") == [(0,)]


# ------------------------------------------------------------------------------------------------------------
# BM25 and the other match features

vocabulary = ["red", "chair", "sofa", "table", "green", "oak", "lamp", "the", "of", "zzz"]
words = st.lists(st.sampled_from(vocabulary), max_size=12).map(" ".join)


def assert_equal_to_rank_bm25(queries, texts, chunks=1):
    """Every (query, pin) pair against BM25Okapi.get_scores, and the matched share against sets."""
    ours = PairBM25(queries, [list(c) for c in np.array_split(np.array(texts, dtype=object), chunks)])
    theirs = BM25Okapi([build.tokenize(t) for t in texts])
    query, pin = (
        a.ravel() for a in np.meshgrid(np.arange(len(queries)), np.arange(len(texts)), indexing="ij")
    )
    shuffled = np.random.default_rng(0).permutation(len(query))
    score, matched = ours.score(query[shuffled], pin[shuffled])
    expected = np.concatenate([theirs.get_scores(build.tokenize(q)) for q in queries])[shuffled]
    np.testing.assert_allclose(score, expected, atol=1e-6, rtol=1e-6)
    for m, q, p in zip(matched, query[shuffled], pin[shuffled]):
        tokens = build.tokenize(queries[q])
        assert m == pytest.approx(sum(t in build.tokenize(texts[p]) for t in tokens) / max(len(tokens), 1))


@given(
    st.lists(words, min_size=1, max_size=5),
    st.lists(words, min_size=1, max_size=9).filter(lambda texts: any(texts)),
    st.integers(1, 3),
)
def test_bm25_equals_rank_bm25(queries, texts, chunks):
    assert_equal_to_rank_bm25(queries, texts, chunks)


def test_bm25_on_three_documents_with_a_negative_idf():
    texts = ["the red chair", "the green sofa sofa", "the oak table of the lamp"]
    # Raised to epsilon x the mean idf; log(0.5 / 3.5) without.
    assert BM25Okapi([t.split() for t in texts]).idf["the"] > 0
    assert_equal_to_rank_bm25(["the", "the red the", "sofa sofa chair", "absent", "absent red", ""], texts)


def test_bm25_by_the_formula():
    """Two equal pins of four: f = 1, length = average, so that a term weighs idf x 2.5 / (1 + 1.5) = idf =
    log((4 - 1 + .5) / (1 + .5))."""
    bm25 = PairBM25(["red"], [["red a", "b c", "d e", "f g"]])
    score, matched = bm25.score(np.array([0, 0]), np.array([0, 1]))
    np.testing.assert_allclose(score, [np.log(3.5 / 1.5), 0])
    assert matched.tolist() == [1, 0]


def test_bm25_with_empty_documents_and_no_words_at_all():
    assert_equal_to_rank_bm25(["red chair"], ["", "red", "", "chair red"])
    score, matched = PairBM25(["red", ""], [["", ""]]).score(np.array([0, 1]), np.array([1, 0]))
    assert score.tolist() == [0, 0] and matched.tolist() == [0, 0]


def test_bm25_on_a_larger_corpus_and_with_worker_processes():
    rng = np.random.default_rng(1)
    vocabulary = np.array([f"w{i}" for i in range(300)])
    text = lambda n: " ".join(vocabulary[np.minimum(rng.zipf(1.3, n), 300) - 1])
    texts, queries = (
        [text(rng.integers(0, 40)) for _ in range(200)],
        [text(rng.integers(1, 6)) for _ in range(30)],
    )
    assert_equal_to_rank_bm25(queries, texts, chunks=7)
    pairs = rng.integers(0, 30, 500), rng.integers(0, 200, 500)
    chunks = [texts[:90], texts[90:]]
    np.testing.assert_array_equal(
        PairBM25(queries, chunks, workers=2).score(*pairs)[0],
        PairBM25(queries, chunks).score(*pairs)[0],
    )


def test_terms_matched_by_hand():
    bm25 = PairBM25(["red oak chair", "chair chair lamp", "!"], [["A red chair", "oak", ""]])
    _, matched = bm25.score(np.array([0, 0, 0, 1, 2]), np.array([0, 1, 2, 0, 0]))
    np.testing.assert_allclose(matched, [2 / 3, 1 / 3, 0, 2 / 3, 0])


def test_match_features():
    rng = np.random.default_rng(2)
    vectors = rng.normal(size=(3, 8)).astype(np.float16), rng.normal(size=(4, 8)).astype(np.float16)
    vectors[1][2] = 0  # a pin without a vector
    bm25 = PairBM25(["red", "oak", "lamp"], [["red", "oak lamp", "x", "y"]])
    query, pin = (a.ravel() for a in np.meshgrid(np.arange(3), np.arange(4), indexing="ij"))
    engaged = np.arange(12)
    whole = MatchFeatures(bm25, *vectors)(query, pin, engaged)
    cut = MatchFeatures(bm25, *vectors, chunk=5)(query, pin, engaged)
    for name in MATCH_FEATURES:
        assert whole[name].dtype == np.float32
        np.testing.assert_array_equal(whole[name], cut[name])
    expected = cosine_similarity(*(v.astype(np.float64) for v in vectors))
    np.testing.assert_allclose(whole["text_cosine"].reshape(3, 4), expected, atol=1e-6)
    np.testing.assert_allclose(whole["engagement"], np.log(1 + engaged), rtol=1e-6)
    of_other_widths = MatchFeatures(bm25, vectors[0], vectors[1][:, :5])(query, pin, engaged)
    assert (of_other_widths["text_cosine"] == 0).all()
    threads = threading.active_count()
    for _ in range(3):  # a service calls for ever: no thread outlives a call
        MatchFeatures(bm25, *vectors, chunk=5)(query, pin, engaged)
    assert threading.active_count() == threads


# ------------------------------------------------------------------------------------------------------------
# A whole run without models: the user's own text embeddings


def made(data, run, *more):
    build.main(["--data", str(data), "--run", str(run), "--device", "cpu", *more])
    return run / "features"


def test_a_match_feature_more_is_a_line_of_the_table(tmp_path, monkeypatch, capsys):
    """01 writes it and is another run by it, features.json describes it; so is a changed rule."""
    data = own_embeddings(write_dataset(tmp_path / "data", small_dataset()))
    made(data, tmp_path / "run")
    monkeypatch.setattr(build, "RULES", 0)
    assert "rules was" in stop_line(made, data, tmp_path / "run")
    monkeypatch.undo()
    made(data, tmp_path / "run")
    assert "nothing to do" in capsys.readouterr().out
    feature = MatchFeature(lambda pairs: pairs.pin + 0.5, "rows", "a pin's row and a half", None)
    monkeypatch.setitem(MATCH_FEATURES, "row", feature)
    assert "rules was" in stop_line(made, data, tmp_path / "run")
    folder = made(data, tmp_path / "run", "--overwrite")
    for path in (folder / "labelled.parquet", folder / "impressions" / "part-00000.parquet"):
        table = pq.read_table(path)
        np.testing.assert_array_equal(table["row"], table["pin_index"].to_numpy() + 0.5)
    spec = {
        "embeddings": {},
        "categories": {},
        "numbers": {},
        "match": match_names(folder / "labelled.parquet"),
    }
    inputs = contract(spec, read_json(folder / "stage.json"))["inputs"]
    described = {wanted["name"]: wanted for wanted in inputs}
    assert described["row"]["how"] == "a pin's row and a half" and described["row"]["of"] == "pair"


def test_pairs_keep_their_order_and_engagement_is_the_windows(tmp_path):
    rng = np.random.default_rng(3)
    n = 5_000
    q, p = rng.integers(0, 2, n), rng.integers(0, 3, n)  # the same pair may be shown many times
    tables = small_dataset()
    queries, pins = tables["queries"]["query_id"], tables["pins"]["pin_id"]
    tables["impressions"] = {"query_id": [queries[i] for i in q], "pin_id": [pins[i] for i in p]}
    tables |= engagements(
        ("007", " RED chair", "2024-06-30", 3),
        ("007", "red chair", "2023-01-01", 4),
        ("007", "red chair", "2021-01-01", 100),
        ("p3", "椅子", "2024-01-01", 2),
        ("gone", "red chair", "2024-01-01", 5),
    )
    folder = made(
        own_embeddings(write_dataset(tmp_path / "data", tables)), tmp_path / "run", "--shard-rows", "1500"
    )
    shards = [pq.read_table(path) for path in sorted((folder / "impressions").glob("part-*.parquet"))]
    assert [len(t) for t in shards] == [1500, 1500, 1500, 500]
    column = lambda name: np.concatenate([t[name].to_numpy() for t in shards])
    assert (column("query_index") == q).all() and (column("pin_index") == p).all()
    events = {(0, 0): 7, (1, 2): 2}
    np.testing.assert_allclose(
        column("engagement"),
        np.log1p([events.get(pair, 0) for pair in zip(q.tolist(), p.tolist())]),
        rtol=1e-6,
    )
    labelled = pq.read_table(folder / "labelled.parquet").to_pydict()
    assert (labelled["label"], labelled["split"], labelled["query_index"], labelled["pin_index"]) == (
        [5, 1, 4],
        ["train", "train", "eval"],
        [0, 0, 1],
        [0, 1, 2],
    )
    assert not (folder / "work").exists()


def test_split_by_hash_when_there_is_none(tmp_path):
    tables = small_dataset()
    n = 200
    tables["queries"] = {"query_id": [f"q{i}" for i in range(n)], "query": [f"chair {i}" for i in range(n)]}
    tables["labels"] = {
        "query_id": [f"q{i}" for i in range(n)] * 2,
        "pin_id": ["007"] * n + ["p2"] * n,
        "label": [3] * 2 * n,
    }
    tables["impressions"] = {"query_id": ["q1"], "pin_id": ["007"]}
    folder = made(own_embeddings(write_dataset(tmp_path / "data", tables)), tmp_path / "run")
    table = pq.read_table(folder / "labelled.parquet").to_pydict()
    side = {}
    for q, s in zip(table["query_index"], table["split"]):
        side.setdefault(q, set()).add(s)
    assert all(len(s) == 1 for s in side.values())  # no query on both sides
    assert 0.04 < Counter(table["split"])["eval"] / (2 * n) < 0.18  # 10 %, 200 draws
    assert pq.read_table(folder / "queries.parquet")["language"].to_pylist() == ["en"] * n  # the default


def test_optional_columns_with_any_name(tmp_path):
    tables = small_dataset()
    names = ['a "quoted" one', "texts", "n", "select", "label", "größe", "query_id2", "row", "board"]
    for name in names:
        tables["pins"][name], tables["queries"][name] = ["x", None, "y"], ["x", "y"]
    folder = made(own_embeddings(write_dataset(tmp_path / "data", tables)), tmp_path / "run")
    for name in names:
        assert pq.read_table(folder / "pins.parquet")[name].to_pylist() == ["x", None, "y"]
        assert pq.read_table(folder / "queries.parquet")[name].to_pylist() == ["x", "y"]


def test_own_embeddings_are_aligned_by_id(tmp_path):
    data = own_embeddings(write_dataset(tmp_path / "data", small_dataset()))
    vectors = np.arange(12, dtype=np.float32).reshape(4, 3)
    np.save(data / "embeddings" / "pin_mine.npy", vectors.astype(np.float16))
    (data / "embeddings" / "pin_mine.ids").write_text("p3\nunknown\n007\nother\n")
    out = np.load(made(data, tmp_path / "run") / "pin_mine_embedding.npy")
    assert out.dtype == np.float16
    np.testing.assert_array_equal(out, np.stack([vectors[2], np.zeros(3), vectors[0]]))


class Unpickled:
    ran = False

    def __reduce__(self):
        return (setattr, (Unpickled, "ran", True))


def object_array(path):
    np.save(path, np.array([[Unpickled()]], dtype=object), allow_pickle=True)


BAD_EMBEDDINGS = {  # what is written; parts of the line
    "NaN": (
        lambda p: np.save(p, np.array([[1, 2], [np.nan, 0], [1, 1]], np.float32)),
        ["pin_mine.npy", "1 rows", "'p2'"],
    ),
    "infinite": (
        lambda p: np.save(p, np.array([[1, 2], [3, 0], [np.inf, 1]], np.float16)),
        ["pin_mine.npy", "1 rows", "'p3'"],
    ),
    "beyond fp32": (
        lambda p: np.save(p, np.array([[1, 2], [9e8, 0], [1e25, -1e25]], np.float32)),
        ["pin_mine.npy", "1 rows", "a norm over 1e+09", "'p3'", "divided by its norm"],
    ),
    "one dimension": (lambda p: np.save(p, np.ones(3, np.float32)), ["pin_mine.npy", "[rows, dim]", "[3]"]),
    "float64": (lambda p: np.save(p, np.ones((3, 2))), ["pin_mine.npy", "float64"]),
    "text": (lambda p: np.save(p, np.array([["a"]] * 3)), ["pin_mine.npy", "float16 or float32"]),
    "too few rows": (lambda p: np.save(p, np.ones((2, 2), np.float32)), ["pin_mine.ids", "3 ids for 2 rows"]),
    "pickled": (object_array, ["pin_mine.npy"]),
    "no array": (lambda p: p.write_bytes(b"hello"), ["pin_mine.npy"]),
    "cut": (
        lambda p: (np.save(p, np.ones((3, 2), np.float32)), p.write_bytes(p.read_bytes()[:-4])),
        ["pin_mine.npy"],
    ),
    "zero bytes": (lambda p: p.write_bytes(b""), ["pin_mine.npy"]),
    "no rows": (lambda p: np.save(p, np.ones((0, 2), np.float32)), ["pin_mine.npy", "[0, 2]"]),
    "no width": (lambda p: np.save(p, np.ones((3, 0), np.float32)), ["pin_mine.npy", "[3, 0]"]),
}


@pytest.mark.parametrize("case", BAD_EMBEDDINGS)
def test_bad_embeddings_are_one_line(tmp_path, case):
    write, parts = BAD_EMBEDDINGS[case]
    data = own_embeddings(write_dataset(tmp_path / "data", small_dataset()))
    (data / "embeddings" / "pin_mine.ids").write_text("007\np2\np3\n")
    write(data / "embeddings" / "pin_mine.npy")
    line = stop_line(made, data, tmp_path / "run")
    assert not Unpickled.ran
    for part in parts:
        assert part in line, line


def test_bad_embedding_ids_are_one_line(tmp_path):
    data = own_embeddings(write_dataset(tmp_path / "data", small_dataset()))
    np.save(data / "embeddings" / "pin_mine.npy", np.ones((3, 2), np.float32))
    assert "pin_mine.ids" in stop_line(made, data, tmp_path / "run")
    (data / "embeddings" / "pin_mine.ids").write_text("007\np2\np2\n")
    line = stop_line(made, data, tmp_path / "run2")
    assert "pin_mine.ids" in line and "'p2'" in line and "more than once" in line
    (data / "embeddings" / "pin_mine.ids").write_bytes(b"007\np2\n\xff\n")
    assert "pin_mine.ids" in stop_line(made, data, tmp_path / "run3")
    (data / "embeddings" / "pin_mine.npy").rename(data / "embeddings" / "mine.npy")
    assert "query_ or pin_" in stop_line(made, data, tmp_path / "run4")


def test_hidden_files_among_the_embeddings_are_left_alone(tmp_path):
    """As a Mac leaves them in an archive."""
    data = own_embeddings(write_dataset(tmp_path / "data", small_dataset()))
    for name in ("._pin_text.npy", "._pin_text.ids", "_old.npy"):
        (data / "embeddings" / name).write_bytes(b"\0\5\26\7")
    assert sorted(read_json(made(data, tmp_path / "run") / "stage.json")["inputs"])[:3] == [
        "embeddings/pin_text",
        "embeddings/query_text",
        "rules",
    ]


def test_query_and_pin_vectors_of_different_width(tmp_path):
    data = own_embeddings(write_dataset(tmp_path / "data", small_dataset()))
    np.save(data / "embeddings" / "pin_text.npy", np.ones((1, 7), np.float32))
    folder = made(data, tmp_path / "run")
    assert pq.read_table(folder / "labelled.parquet")["text_cosine"].to_pylist() == [0, 0, 0]


def test_vectors_of_another_width_than_the_base_has_stop_before_any_work(tmp_path):
    data = own_embeddings(write_dataset(tmp_path / "data", small_dataset()))
    made(data, tmp_path / "run")
    np.save(data / "embeddings" / "pin_text.npy", np.ones((1, 7), np.float32))
    line = stop_line(made, data, tmp_path / "next", "--base", str(tmp_path / "run"))
    assert "pin_text.npy: 7 wide, that of" in line and line.endswith("is 4 wide")
    assert not list(tmp_path.glob("next/*"))


# ------------------------------------------------------------------------------------------------------------
# Graph embedding


def graph(tmp_path, boards, pins, dim=3, seed=0):
    tables = small_dataset()
    tables["pins"] = {"pin_id": pins}
    tables["labels"]["pin_id"] = tables["impressions"]["pin_id"] = pins[:3]
    tables["boards"] = {"pin_id": [p for p, _ in boards], "board_title": [b for _, b in boards]}
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    data = own_embeddings(write_dataset(folder / "data", tables))
    return np.load(
        made(data, folder / "run", "--graph-dim", str(dim), "--seed", str(seed)) / "pin_graph_embedding.npy"
    )


def test_graph_embedding(tmp_path):
    pins = [f"p{i}" for i in range(12)]
    boards = [
        (p, f"{'kitchen' if i < 5 else 'garden'} {j}") for i, p in enumerate(pins[:10]) for j in range(3)
    ]
    boards += [("p0", "odd"), ("p7", "odd"), ("p3", "other"), ("p9", "other")]
    out = graph(tmp_path, boards, pins)
    assert out.shape == (12, 3) and out.dtype == np.float16 and np.isfinite(out).all()
    assert (out[10:] == 0).all()  # pins on no board
    similar = cosine_similarity(out[:10].astype(np.float64))
    assert similar[:5, :5].min() > similar[:5, 5:].max()  # pins of the same boards lie together
    np.testing.assert_array_equal(out, graph(tmp_path, boards, pins))


def test_graph_embedding_of_hardly_any_board(tmp_path):
    pins = ["a", "b", "c"]
    for boards in (
        [("a", "one")],
        [("a", "one"), ("b", "one")],
        [("a", "one"), ("a", "two")],
        [("a", "one"), ("b", "two"), ("c", "three")],
    ):
        out = graph(tmp_path, boards, pins, dim=8)
        assert len(out) == 3 and out.shape[1] >= 1 and np.isfinite(out).all()


# ------------------------------------------------------------------------------------------------------------
# Captions, visual and text embeddings, and model folders that are refused


def with_models(tmp_path, caption_model, text_encoder):
    """Stage 01 on the small dataset with one picture, one broken one, and these models."""
    tables = small_dataset()
    tables["pins"]["image"] = ["a.png", "b.png", None]
    data = write_dataset(tmp_path / "data", tables)
    Image.new("RGB", (80, 80), "red").save(data / "a.png")
    (data / "b.png").write_bytes(b"broken")
    return made(
        data, tmp_path / "run", "--caption-model", str(caption_model), "--text-encoder", str(text_encoder)
    )


def test_skipped_images_are_listed(models, tmp_path):
    folder = with_models(tmp_path, TOY_MODELS / "blip", models["bert"])
    with open(folder / "skipped_images.csv", newline="", encoding="utf-8") as f:
        head, row = csv.reader(f)
    assert head == ["pin_id", "image", "reason"] and row[:2] == ["p2", "b.png"] and row[2]
    captions = pq.read_table(folder / "pins.parquet")["caption"].to_pylist()
    assert captions[0] and captions[1:] == ["", ""]
    visual = np.load(folder / "pin_visual_embedding.npy")
    assert np.isfinite(visual).all() and visual[0].any() and not visual[1:].any()
    assert read_json(folder / "stage.json")["images"] == {"captioned": 1, "skipped": 1}


def test_the_text_embedding_is_the_mean_over_the_tokens(models, tmp_path):
    """Against transformers called plainly, one text at a time."""
    folder = with_models(tmp_path, TOY_MODELS / "blip", models["bert"])
    model, tokenizer = (
        BertModel.from_pretrained(models["bert"]).eval(),
        AutoTokenizer.from_pretrained(models["bert"]),
    )
    pins = pq.read_table(folder / "pins.parquet").to_pylist()
    for pin, got in zip(pins, np.load(folder / "pin_text_embedding.npy")):
        text = " ".join(pin[f] for f in common.FIELDS if pin[f])
        with torch.inference_mode():
            mean = (
                model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False))
                .last_hidden_state[0]
                .mean(0)
                .numpy()
            )
        np.testing.assert_allclose(got, mean / np.linalg.norm(mean), atol=2e-3)


def test_wrong_models_are_one_line(models, tmp_path):
    assert "BLIP" in stop_line(with_models, tmp_path / "a", models["bert"], models["bert"])
    (tmp_path / "empty").mkdir()
    assert "empty" in stop_line(with_models, tmp_path / "e", tmp_path / "empty", models["bert"])
    assert not (tmp_path / "a" / "run").exists() and not (tmp_path / "e" / "run").exists()
    assert "encoder" in stop_line(with_models, tmp_path / "b", TOY_MODELS / "blip", models["llama"])
    assert "nowhere" in stop_line(with_models, tmp_path / "c", tmp_path / "nowhere", models["bert"])
    (tmp_path / "blip").mkdir()
    for path in (TOY_MODELS / "blip").iterdir():
        (tmp_path / "blip" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "blip" / "model.safetensors").write_bytes(b"garbage")
    assert str(tmp_path / "blip") in stop_line(with_models, tmp_path / "d", tmp_path / "blip", models["bert"])


# ------------------------------------------------------------------------------------------------------------
# Flags, caches, what a stranger's folder may hold


@pytest.mark.parametrize(
    "one, other",
    [
        ("猫", "黒猫の椅子"),
        ("Küchenstuhl", "Küchen\u00adstuhl"),
        ("a\u200bbç", "abç"),
        ("می\u200cخواهم", "میخواهم"),
        ("❤\ufe0fred", "red"),
    ],
)
def test_what_nobody_sees_does_not_keep_texts_apart(one, other):
    bm25 = PairBM25([one, other], [[one, other, "x", "y", "z"]])
    score, matched = bm25.score(np.array([0, 1, 0]), np.array([1, 1, 2]))
    assert (score[:2] > 0).all() and matched[0] == 1 and score[2] == 0


def test_as_of_through_the_command_line(tmp_path, capsys):
    data = own_embeddings(write_dataset(tmp_path / "data", small_dataset()))
    folder = made(data, tmp_path / "run", "--as-of", "2024-07-01")
    about = read_json(folder / "stage.json")
    assert about["as_of"] == about["arguments"]["as_of"] == "2024-07-01"
    assert "2 years up to 2024-07-01" in capsys.readouterr().out
    assert "--as-of was '2024-07-01', is '2020-01-01'" in stop_line(
        made, data, tmp_path / "run", "--as-of", "2020-01-01"
    )


def test_no_window_is_shown_without_a_log(tmp_path, capsys):
    tables = {name: t for name, t in small_dataset().items() if name != "engagements"}
    folder = made(own_embeddings(write_dataset(tmp_path / "data", tables)), tmp_path / "run")
    assert "None" not in capsys.readouterr().out and read_json(folder / "stage.json")["as_of"] is None


@pytest.mark.parametrize(
    "flag, value",
    [
        ("--shard-rows", "0"),
        ("--shard-rows", "-5"),
        ("--top-tokens", "x"),
        ("--workers", "0"),
        ("--as-of", "soon"),
        ("--device", "gpu"),
        ("--precision", "fp8"),
        ("--graph-dim", "0"),
        ("--caption-tokens", "0"),
        ("--image-batch", "1.5"),
    ],
)
def test_values_out_of_range_touch_nothing(tmp_path, flag, value, capsys):
    with pytest.raises(SystemExit) as end:
        made(tmp_path / "data", tmp_path / "run", flag, value)
    assert end.value.code == 2 and not (tmp_path / "run").exists()


@pytest.mark.parametrize("memory", ["lots", "4", "GB"])
def test_a_memory_that_is_no_size(tmp_path, memory, capsys):
    data = own_embeddings(write_dataset(tmp_path / "data", small_dataset()))
    with pytest.raises(SystemExit) as end:
        made(data, tmp_path / "run", "--memory", memory)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith(f"error: --memory {memory}: give a size")
    assert said.count("\n") == 1 and not (tmp_path / "run").exists()
    with pytest.raises((Stop, SystemExit)) as end:  # DuckDB may connect with it, or not
        made(data, tmp_path / "run", "--memory", "0GB")
    assert "--memory" in f"{end.value}{capsys.readouterr().err}"


def test_a_run_does_not_build_on_itself(tmp_path, capsys):
    data = own_embeddings(write_dataset(tmp_path / "data", small_dataset()))
    with pytest.raises(SystemExit) as end:
        made(data, tmp_path / "run", "--base", str(tmp_path / "run"))
    assert end.value.code == 2 and "cannot build on itself" in capsys.readouterr().err


def test_nobody_rebuilds_a_base_while_a_day_is_built_on_it(tmp_path, monkeypatch):
    data, monday = own_embeddings(write_dataset(tmp_path / "data", small_dataset())), tmp_path / "monday"
    folder, said, write_texts = made(data, monday), [], build.write_texts

    def meanwhile(*given):
        said.append(stop_line(hold, folder, "write"))
        write_texts(*given)

    monkeypatch.setattr(build, "write_texts", meanwhile)
    made(data, tmp_path / "tuesday", "--base", str(monday))
    assert said[0].startswith(f"{folder}: another process is at work here or reads it")


def test_a_day_without_pictures_does_not_let_another_captioner_in(tmp_path):
    tables = small_dataset()
    tables["pins"]["image"] = ["a.png", None, None]
    data = own_embeddings(write_dataset(tmp_path / "data", tables))
    Image.new("RGB", (8, 8), "red").save(data / "a.png")
    captioner = TOY_MODELS / "blip"
    made(data, tmp_path / "monday", "--caption-model", str(captioner))
    bare = own_embeddings(write_dataset(tmp_path / "bare", small_dataset()))
    made(bare, tmp_path / "tuesday", "--base", str(tmp_path / "monday"))
    shutil.copytree(captioner, tmp_path / "blip")
    (tmp_path / "blip" / "generation_config.json").write_text('{"max_length": 9}')
    flags = ["--base", str(tmp_path / "tuesday"), "--caption-model"]
    line = stop_line(made, data, tmp_path / "wednesday", *flags, str(tmp_path / "blip"))
    assert "mean something else (caption model was" in line
    made(data, tmp_path / "wednesday", *flags, str(captioner))


def test_a_text_encoder_that_reads_less(models, tmp_path):
    data = write_dataset(tmp_path / "data", small_dataset())
    line = stop_line(
        made, data, tmp_path / "run", "--text-encoder", str(models["bert"]), "--text-tokens", "600"
    )
    assert "600" in line and "128" in line and "--text-tokens" in line


def captioned(data, run, *flags):
    """Stage 01 with the toy's captioner on a dataset with text embeddings of its own -> {file: bytes}."""
    folder = made(data, run, "--caption-model", str(TOY_MODELS / "blip"), *flags)
    files = [
        p for p in folder.rglob("*") if p.is_file() and p.name != "stage.json" and "captions" not in p.parts
    ]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def with_pictures(tmp_path):
    tables = small_dataset()
    tables["pins"]["image"] = ["a.png", "b.png", "a.png"]
    data = own_embeddings(write_dataset(tmp_path / "data", tables))
    for name, color in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (80, 80), color).save(data / f"{name}.png", compress_level=0)  # of one size
    return data


@pytest.mark.parametrize("flags", [["--caption-tokens", "1"], ["--precision", "bf16"]], ids=" ".join)
def test_the_cache_of_captions_is_of_one_way_of_captioning(tmp_path, flags):
    data = with_pictures(tmp_path)
    first = captioned(data, tmp_path / "run")
    again = captioned(data, tmp_path / "run", *flags, "--overwrite")
    fresh = captioned(data, tmp_path / "fresh", *flags)
    assert again == fresh != first


def test_the_cache_of_captions_survives_overwrite(tmp_path, monkeypatch):
    data = with_pictures(tmp_path)
    first = captioned(data, tmp_path / "run")
    monkeypatch.setattr("lib.inputs.captions.Captioner", None)
    again = captioned(data, tmp_path / "run", "--top-tokens", "3", "--overwrite")
    assert again.keys() == first.keys() and again["pins.parquet"] == first["pins.parquet"]


def test_two_exchanged_pictures_of_one_size_are_noticed(tmp_path):
    data = with_pictures(tmp_path)
    captioned(data, tmp_path / "run")
    one, other = ((data / name).read_bytes() for name in ("a.png", "b.png"))
    assert len(one) == len(other)
    (data / "a.png").write_bytes(other)
    (data / "b.png").write_bytes(one)
    assert "images" in stop_line(captioned, data, tmp_path / "run")
    assert captioned(data, tmp_path / "run", "--overwrite") == captioned(data, tmp_path / "fresh")


def test_pipes_and_links_in_a_strangers_folder(tmp_path):
    data = own_embeddings(write_dataset(tmp_path / "data", small_dataset()))
    (tmp_path / "secret.ids").write_text("007\n")
    np.save(tmp_path / "secret.npy", np.ones((1, 2), np.float32))
    for number, (name, make) in enumerate(
        [
            ("embeddings/pin_mine.npy", os.mkfifo),
            ("embeddings/pin_mine.ids", os.mkfifo),
            ("boards.csv", os.mkfifo),
            ("boards/a.csv", os.mkfifo),
            ("embeddings/pin_mine.npy", lambda path: path.symlink_to(tmp_path / "secret.npy")),
            ("boards.csv", lambda path: path.symlink_to(tmp_path / "secret.ids")),
            ("boards.csv", lambda path: path.symlink_to("/dev/zero")),
            ("boards", lambda path: path.symlink_to(tmp_path / "elsewhere")),
        ]
    ):
        copy = shutil.copytree(data, tmp_path / str(number))
        write_table(tmp_path / "elsewhere", "a", {"pin_id": ["007"], "board_title": ["x"]}, "csv")
        (copy / "boards.parquet").unlink()
        np.save(copy / "embeddings" / "pin_mine.npy", np.ones((1, 2), np.float32))
        (copy / "embeddings" / "pin_mine.ids").write_text("007\n")
        (copy / name).unlink(missing_ok=True)
        (copy / name).parent.mkdir(exist_ok=True)
        make(copy / name)
        begin = time.time()
        line = stop_line(made, copy, tmp_path / "run")
        assert name in line and ("regular" in line or "leaves" in line), line
        assert time.time() - begin < 5 and not (tmp_path / "run").exists()


def test_an_embedding_whose_header_promises_petabytes(tmp_path):
    data = own_embeddings(write_dataset(tmp_path / "data", small_dataset()))
    (data / "embeddings" / "pin_mine.ids").write_text("007\n")
    for shape in ((10**12, 1_000), (2**62, 4), (1, 2**61), (10**30, 1)):
        with open(data / "embeddings" / "pin_mine.npy", "wb") as file:
            np.lib.format.write_array_header_1_0(
                file, {"descr": "<f4", "fortran_order": False, "shape": shape}
            )
        assert "pin_mine.npy" in stop_line(made, data, tmp_path / "run")
    with open(data / "embeddings" / "pin_mine.npy", "wb") as file:
        file.write(b"\x93NUMPY\x02\x00\xff\xff\xff\xff")
    assert "pin_mine.npy" in stop_line(made, data, tmp_path / "run")
    np.save(data / "embeddings" / "pin_mine.npy", np.ones((1, 2), np.float32))
    with open(data / "embeddings" / "pin_mine.ids", "wb") as file:
        file.truncate(3 << 30)
    assert "pin_mine.ids" in stop_line(made, data, tmp_path / "run")


def test_ids_of_an_embedding_written_on_windows(tmp_path):
    data = own_embeddings(write_dataset(tmp_path / "data", small_dataset()))
    np.save(data / "embeddings" / "pin_mine.npy", np.arange(6, dtype=np.float32).reshape(3, 2))
    (data / "embeddings" / "pin_mine.ids").write_bytes(b"\xef\xbb\xbf007\r\np2\r\np3\r\n")
    made_of = np.load(made(data, tmp_path / "run") / "pin_mine_embedding.npy")
    np.testing.assert_array_equal(made_of, np.arange(6).reshape(3, 2))


def test_a_full_disk_is_an_error_where_an_array_is_made(tmp_path, monkeypatch):
    """A file mapped into memory without its room on disk would end in a signal later."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError), streams.new_matrix(tmp_path / "a.npy", 3, 4):
        raise AssertionError("the array is there")
    monkeypatch.undo()
    with streams.new_matrix(tmp_path / "b.npy", 1_000, 250) as matrix:
        assert os.stat(tmp_path / ".b.npy.tmp").st_blocks * 512 >= matrix.nbytes
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".npy"] == ["b.npy"]


def test_parquet_with_random_bytes_changed_is_one_line(tmp_path):
    rng = np.random.default_rng(0)
    data = own_embeddings(write_dataset(tmp_path / "data", small_dataset()))
    for number in range(56):
        path = data / f"{list(small_dataset())[number % 7]}.parquet"
        whole = path.read_bytes()
        broken = bytearray(whole)
        for place in rng.integers(0, len(broken), 1 + number % 4):
            broken[place] = rng.integers(256)
        path.write_bytes(bytes(broken))
        try:
            made(data, tmp_path / str(number))
        except Stop as error:
            assert "\n" not in str(error)
        path.write_bytes(whole)
