"""Training rows: counted, held out by query, dealt, shuffled, streamed; each once an epoch."""

import weakref
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import stage, stop_line, synthetic

from lib.inputs import pairs
from lib.inputs.match import MATCH_FEATURES
from lib.stages import streams
from lib.stages.files import write_parquet
from lib.tables.database import Database
from lib.tables.splits import held_out, in_hash_split, query_key

distil = stage("04")


def rows_of(folder, *more):
    """The training rows of `folder`, and what their survey gives; without human-labelled rows unless asked
    for."""
    argv = [
        "--run",
        str(folder),
        "--batch-size",
        "16",
        "--shuffle-window",
        "2",
        "--human-rows",
        "none",
        *more,
    ]
    settings = distil.parse(distil.PRESETS, argv)
    files = pairs.PairFiles(folder, settings.languages)
    rows = pairs.TrainingRows(files, distil.human_rows(files, settings), settings)
    return rows, rows.survey()


def keys(batches):
    """How often each row stands in some batches."""
    count = Counter()
    for batch in batches:
        columns = batch["query"], batch["pin"], batch["match"][:, 0], batch["target"][:, 0]
        count.update(zip(*(column.tolist() for column in columns)))
    return count


def replace_column(path, name, values):
    """Puts a column into a Parquet file, in the place of one of its name."""
    table = pq.read_table(path)
    kept = [column for column in table.column_names if column != name]
    write_parquet(path, table.select(kept).append_column(name, pa.array(values)))


def test_no_rows_to_train_on_is_one_line(tmp_path):
    synthetic(tmp_path)
    for path in (tmp_path / "features" / "impressions").iterdir():
        path.unlink()
    assert stop_line(rows_of, tmp_path) == f"no rows to train on in {tmp_path}"
    assert stop_line(rows_of, tmp_path, "--languages", "en").endswith(f" in {tmp_path}, --languages en")


# ------------------------------------------------------------------------------------------------------------
# Each row once


def test_rows_are_counted_and_held_out_queries_are_never_trained_on(tmp_path):
    every, _ = synthetic(tmp_path)
    rows, (moments, held) = rows_of(tmp_path)
    mean, std = moments["mean"], moments["std"]
    out = rows.is_held_out
    total = sum(len(p) for _, p in every)
    assert out.any() and rows.total + len(held) == total == 310
    for epoch in (0, 1):
        batches = list(rows.batches(epoch))
        assert not out[np.concatenate([b["query"] for b in batches])].any()
        expected = Counter()
        for table, probabilities in every:
            train = ~out[table["query_index"]]
            columns = table["query_index"], table["pin_index"], table["bm25"], probabilities[:, 0]
            expected.update(zip(*(column[train].tolist() for column in columns)))
        assert keys(batches) == expected  # each training row once an epoch, and nothing else
        assert all(len(b) <= 16 for b in batches)
    assert out[held["query"]].all()
    match = [np.stack([t[n] for n in MATCH_FEATURES], 1)[~out[t["query_index"]]] for t, _ in every]
    training = np.concatenate(match).astype(np.float64)
    np.testing.assert_allclose(mean, training.mean(0), atol=1e-9)
    np.testing.assert_allclose(std, training.std(0), atol=1e-9)
    np.testing.assert_array_equal(moments["low"], training.min(0))
    np.testing.assert_array_equal(moments["high"], training.max(0))


def test_epochs_differ_and_repeat(tmp_path):
    synthetic(tmp_path)
    (a, _), (b, _) = rows_of(tmp_path, "--human-rows", "half"), rows_of(tmp_path, "--human-rows", "half")

    def order(rows, epoch):
        return np.concatenate([batch["match"] for batch in rows.batches(epoch)])

    np.testing.assert_array_equal(order(a, 0), order(b, 0))
    assert (order(a, 0) != order(a, 1)).any()


@pytest.mark.parametrize("skip", [0, 1, 5, 8, 13, 100])
@pytest.mark.parametrize("human", ["none", "half"])
def test_skipping_batches_equals_dropping_them(tmp_path, skip, human):
    synthetic(tmp_path)
    rows, _ = rows_of(tmp_path, "--human-rows", human)
    whole, rest = list(rows.batches(0))[skip:], list(rows.batches(0, skip=skip))
    assert len(whole) == len(rest)
    for a, b in zip(whole, rest):
        assert a.tobytes() == b.tobytes()


def test_only_one_window_is_held(tmp_path, monkeypatch):
    synthetic(tmp_path)
    rows, _ = rows_of(tmp_path, "--human-rows", "half")
    held, read_window = [], rows.read_window

    def read(shards, human):
        before = "the window before is still in memory while the next is read"
        assert not any(array() is not None for array in held), before
        made = read_window(shards, human)
        parts = np.concatenate([rows.human[human], *(rows.training_rows(i) for i in shards)])
        assert made.tobytes() == parts.tobytes()
        held.append(weakref.ref(made))
        return made

    monkeypatch.setattr(rows, "read_window", read)
    assert sum(len(b) for b in rows.batches(0)) == rows.total
    assert len(held) >= 3


@pytest.mark.parametrize("n", [1, 17, 100, 10_000])
@pytest.mark.parametrize("labels", ["teacher", "human"])
def test_subsample_has_exactly_so_many_rows(tmp_path, n, labels):
    synthetic(tmp_path)
    rows, _ = rows_of(tmp_path, "--rows", str(n), "--labels", labels)
    all_of_them, _ = rows_of(tmp_path, "--labels", labels)
    first, second = keys(rows.batches(0)), keys(rows.batches(1))
    assert sum(first.values()) == rows.total == min(n, all_of_them.total)
    assert first == second and not first - keys(all_of_them.batches(0))  # the same rows every epoch


def test_languages(tmp_path):
    synthetic(tmp_path)
    rows, (_, held) = rows_of(tmp_path, "--languages", "fr", "--human-rows", "half")
    used = np.concatenate([b["query"] for b in rows.batches(0)])
    assert len(used) and (used % 4 == 0).all() and (held["query"] % 4 == 0).all()
    assert "xx" in stop_line(rows_of, tmp_path, "--languages", "xx")


# ------------------------------------------------------------------------------------------------------------
# Human-labelled rows


def test_human_labels_are_one_hot_and_of_the_training_split(tmp_path):
    _, human = synthetic(tmp_path)
    rows, (_, held) = rows_of(tmp_path, "--labels", "human")
    batches = list(rows.batches(0))
    train = human["split"] == "train"
    assert rows.total + len(held) == train.sum()
    target, query = (np.concatenate([b[name] for b in batches]) for name in ("target", "query"))
    train &= ~rows.is_held_out[human["query_index"]]
    expected = Counter(zip(human["query_index"][train].tolist(), human["label"][train].tolist()))
    assert Counter(zip(query.tolist(), (target.argmax(1) + 1).tolist())) == expected
    assert (target.max(1) == 1).all() and (target.sum(1) == 1).all()


@pytest.mark.parametrize("asked", ["none", "half"])
def test_human_rows_are_learnt_beside_the_impressions(tmp_path, asked):
    every, human = synthetic(tmp_path)
    rows, (_, held) = rows_of(tmp_path, "--human-rows", asked)
    impressions, _ = rows_of(tmp_path)
    train = (human["split"] == "train") & ~rows.is_held_out[human["query_index"]]
    labels = pq.read_table(tmp_path / "labels" / "labelled.parquet")
    soft = np.stack([labels[f"p{level}"].to_numpy() for level in range(1, 6)], axis=1)[train]
    one_hot = np.eye(5)[human["label"][train] - 1]
    targets = {"none": soft[:0], "half": (soft + one_hot) / 2}
    target = targets[asked].astype(np.float32)
    assert len(rows.human) == len(target)
    np.testing.assert_allclose(rows.human["target"], target, atol=1e-7)
    got = keys(rows.batches(0))
    of_human = got - keys(rows.human[i : i + 1] for i in range(0))
    shards = Counter()
    for shard in range(len(rows.shards)):
        shards += keys([rows.training_rows(shard)])
    assert of_human == shards + keys([rows.human]) and sum(got.values()) == rows.total
    assert not rows.is_held_out[rows.human["query"]].any()
    from_impressions = {
        (q, p) for table, _ in every for q, p in zip(table["query_index"], table["pin_index"])
    }
    assert {(q, p) for q, p in zip(held["query"], held["pin"])} <= from_impressions
    assert impressions.total <= rows.total


def test_rows_of_human_labels_are_spread_over_the_windows(tmp_path):
    synthetic(tmp_path)
    rows, _ = rows_of(tmp_path, "--human-rows", "half")
    human = {row.tobytes() for row in rows.human}
    is_human = [sum(row.tobytes() in human for row in batch) for batch in rows.batches(0)]
    half = len(is_human) // 2
    assert 0.3 < sum(is_human[:half]) / sum(is_human) < 0.7


# ------------------------------------------------------------------------------------------------------------
# Held out


def test_held_out_rows_come_from_every_shard(tmp_path, monkeypatch):
    every, _ = synthetic(tmp_path)
    monkeypatch.setattr(pairs, "HELD_OUT_ROWS", 7)
    rows, (_, held) = rows_of(tmp_path)
    share = -(-7 // len(every))
    expected = []
    for table, _ in every:
        query = table["query_index"]
        expected += query[rows.is_held_out[query]][:share].tolist()
    assert len(every) > 3 and len(expected) > share and held["query"].tolist() == expected


@pytest.mark.parametrize("seed", range(20))
def test_at_most_a_tenth_of_the_rows_is_held_out(seed):
    """Few queries of very different size; a share of the queries would be up to half of the rows."""
    rng = np.random.default_rng(seed)
    rows = np.maximum(1, rng.pareto(1.0, 30) * 20).astype(int)
    texts = [f"query {i} of {seed}" for i in range(30)]
    held, split = held_out(texts, 0.2, "s", rows)
    assert (held == in_hash_split(texts, **split)).all()
    assert split["share"] <= 0.2 and rows[held].sum() <= rows.sum() / 10
    every, _ = held_out(texts, 0.2, "s")
    if rows[every].sum() <= rows.sum() / 10:
        assert (held == every).all()


def test_one_text_under_two_ids_stands_on_one_side(tmp_path):
    synthetic(tmp_path)
    path = tmp_path / "features" / "queries.parquet"
    texts = [f"Red  Chair {i // 2}" if i % 2 else f" red  chair {i // 2} " for i in range(200)]
    replace_column(path, "query", texts)
    for seed in range(5):
        rows, _ = rows_of(tmp_path, "--seed", str(seed))
        assert (rows.is_held_out[::2] == rows.is_held_out[1::2]).all() and rows.is_held_out.any()
    assert query_key("Cafe\u0301 ") == query_key("CAF\u00c9") == "caf\u00e9"


def test_a_query_has_one_key_in_sql_and_python():
    """Stage 01 joins logs and splits labels by the one, 02 and 04 hold queries out by the other. İ and the
    final sigma were two."""
    assert query_key("ΟΔΟΣ") == query_key("οδος") and query_key("İZMİR") == query_key("izmir")
    characters = [chr(c) for c in range(32, 0x110000) if not 0xD800 <= c < 0xE000]
    texts = [*(f"a{c}b" for c in characters), *(f"a{c}" for c in characters), "ΟΔΟΣ ΑΣ", "ΣΑΣ", "ÇİÇEK"]
    keys = Database(".").table("SELECT query_key(text) AS key FROM texts", texts=pa.table({"text": texts}))
    different = [text for text, key in zip(texts, keys["key"].to_pylist()) if query_key(text) != key]
    assert different == []


def test_few_queries_hold_nothing_out(tmp_path):
    synthetic(tmp_path, queries=3)
    for labels in ("teacher", "human"):
        rows, (_, held) = rows_of(tmp_path, "--labels", labels)
        assert not len(held) and not rows.is_held_out.any()
        assert sum(keys(rows.batches(0)).values()) == rows.total


# ------------------------------------------------------------------------------------------------------------
# Numbers and labels


def test_numbers_of_the_user_join_the_match_features(tmp_path):
    every, human = synthetic(tmp_path)
    for path in [*(tmp_path / "features" / "impressions").iterdir(), tmp_path / "features/labelled.parquet"]:
        n = len(pq.read_table(path))
        values = np.arange(n, dtype=np.float32)
        values[::2] = np.nan
        replace_column(path, "clicks", values)
    rows, (moments, _) = rows_of(tmp_path)
    mean, std = moments["mean"], moments["std"]
    assert rows.files.match == [*MATCH_FEATURES, "clicks"]
    used = []
    for shard in range(len(rows.shards)):
        used.append(rows.training_rows(shard)["match"][:, 4])
    used = np.concatenate(used)
    assert np.isnan(used).any()
    assert (mean[4], std[4]) == pytest.approx((np.nanmean(used), np.nanstd(used)))
    assert (moments["low"][4], moments["high"][4]) == (np.nanmin(used), np.nanmax(used))


def test_a_constant_match_feature_does_not_divide_by_zero(tmp_path):
    synthetic(tmp_path)
    for path in (tmp_path / "features" / "impressions").glob("*.parquet"):
        replace_column(path, "engagement", np.zeros(len(pq.read_table(path)), np.float32))
    _, (moments, _) = rows_of(tmp_path)
    mean, std = moments["mean"], moments["std"]
    assert (mean[3], std[3]) == (0, 1)


# ------------------------------------------------------------------------------------------------------------
# Ahead


def test_prepared_ahead_in_order_and_errors_arrive():
    assert list(streams.ahead(iter(range(20)), depth=3)) == list(range(20))
    assert list(streams.ahead(iter([]), depth=4)) == []

    def fail():
        yield from range(5)
        raise RuntimeError("broken shard")

    got = []
    with pytest.raises(RuntimeError, match="broken shard"):
        for x in streams.ahead(fail(), depth=4):
            got.append(x)
    assert got == list(range(5))


def test_no_more_is_prepared_than_asked_for():
    """Memory: at most `depth` batches wait beside the one in use."""
    made = []

    def batches():
        for x in range(50):
            made.append(x)
            yield x

    for x in streams.ahead(batches(), depth=3):
        assert len(made) <= x + 1 + 3
