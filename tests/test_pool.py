"""The teacher pooled with the regression: closed forms, what it finds, where it stays away."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers import mark_finished, stage, stop_line, synthetic
from scipy.special import softmax
from scipy.stats import entropy
from sklearn.linear_model import LogisticRegression

from lib.inputs import pool
from lib.inputs.inherited import teacher_identity
from lib.inputs.match import MATCH_FEATURES
from lib.inputs.pairs import PairFiles, read_labelled, read_labels
from lib.inputs.regression import fit_regression, one_hot
from lib.stages.files import read_json, write_json, write_parquet
from lib.stages.finished import hold
from lib.tables.splits import in_hash_split


def world(seed=0, queries=400, rows=20):
    """Levels, their query, the probabilities they are drawn from, and a second opinion that knows nothing."""
    rng = np.random.default_rng(seed)
    true = rng.dirichlet(np.ones(5), queries * rows)
    level = (rng.random((len(true), 1)) > true.cumsum(1)).sum(1).clip(max=4) + 1
    return level, np.repeat(np.arange(queries), rows), true, rng.dirichlet(np.ones(5), len(true))


def test_pooling_by_hand():
    """Weights 1, 0 give the teacher; 1/2, 1/2 the normalized geometric mean; another language the teacher."""
    _, _, p, q = world(queries=2)
    x = np.random.default_rng(1).normal(size=(len(p), 2))
    regression = fit_regression(x, q)
    other = regression.probabilities(x)
    language = np.array(["en", "hi"], dtype=object)[np.arange(len(p)) % 2]
    makes = {"languages": ["en"], "names": ["a", "b"], "regression": regression}
    np.testing.assert_allclose(pool.Pool(1.0, 0.0, **makes)(p, x, language), p, atol=1e-5)
    pooled = pool.Pool(0.5, 0.5, **makes)(p, x, language)
    mean = np.sqrt(p * other)
    np.testing.assert_allclose(pooled[::2], (mean / mean.sum(1, keepdims=True))[::2], atol=1e-6)
    np.testing.assert_array_equal(pooled[1::2], p[1::2])


@pytest.mark.parametrize("true", [(1.0, 0.0), (0.0, 1.0), (0.6, 0.9)])
def test_weights_are_found_again_where_queries_are_many(true):
    """Levels drawn from a pool of two opinions: as softmax(a log p + b log q)."""
    _, query, p, q = world()
    mixed = softmax(true[0] * np.log(p) + true[1] * np.log(q), axis=1)
    draw = np.random.default_rng(5).random((len(p), 1))
    level = (draw > mixed.cumsum(1)).sum(1).clip(max=4) + 1
    assert pool.fit_weights(level, query, p, q)[0] == pytest.approx(true, abs=0.1)


def test_a_teacher_that_says_the_same_of_every_pair_does_not_make_the_pool_less_sure():
    """The prior's weights by hand: p is (1 - s, s / 4, …) turned from row to row, so mean p is 1 / 5, and KL
    to it the same for all rows."""

    def turned(s):
        first = np.array([1 - s, *[s / 4] * 4])
        return np.stack([np.roll(first, k) for k in range(5)]), np.log(5) + (first * np.log(first)).sum()

    (sure, much), (vague, little) = turned(0.3), turned(0.7)
    weights, common = pool.weights_before(sure, vague)  # perhaps it is too sure
    assert weights == pytest.approx([0.5, 0.5]) and common == pytest.approx([0] * 5)
    share = little / (little + much)
    weights, common = pool.weights_before(vague, sure)
    assert weights == pytest.approx([0.5, 1 - share], abs=1e-4)
    assert common == pytest.approx([(1 - 2 * share) * np.log(0.2)] * 5, abs=1e-3)
    flat = np.tile([0.6, 0.1, 0.1, 0.1, 0.1], (5, 1))
    weights, common = pool.weights_before(flat, sure)
    made = {"languages": ["en"], "names": [], "regression": SimpleNamespace(probabilities=lambda x: sure)}
    pooled = pool.Pool(*weights, **made, common=common.tolist())(flat, None, np.full(5, "en", object))
    np.testing.assert_allclose(pooled, sure, atol=1e-3)  # as if there were no such teacher
    assert pool.weights_before(flat, flat)[0] == pytest.approx([0.5, 0.5])


def test_a_query_counts_once():
    level, query, p, q = world(queries=3)
    few, _ = pool.fit_weights(level, query, p, q)
    many = [np.repeat(column, 50, axis=0) for column in (level, query, p, q)]
    assert pool.fit_weights(*many)[0] == pytest.approx(few, abs=1e-3)  # the same queries, each row 50 times
    apart = [np.concatenate([column] * 50) for column in (level, p, q)]
    queries = np.concatenate([query + 3 * copy for copy in range(50)])
    more, _ = pool.fit_weights(apart[0], queries, *apart[1:])
    assert more[0] > few[0] and more[1] < few[1] < 0.5  # 150 queries outweigh the prior


def test_the_held_out_rows_are_not_in_the_regression_that_weighs_them(monkeypatch):
    level, query, p, _ = world(queries=30)
    rng = np.random.default_rng(2)
    rows = {"label": level, "key": query, "teacher": p, "language": np.full(len(p), "en", object)}
    rows |= {"a": level + rng.normal(size=len(p)), "b": rng.normal(size=len(p))}
    held_out = query < 6
    seen = []
    fitted = np.array([0.4, 0.6]), np.zeros(5)
    monkeypatch.setattr(pool, "fit_weights", lambda *given: seen.append(given) or fitted)
    found = pool.fit_pool(rows, held_out, ["a", "b"])
    x = np.stack([rows["a"], rows["b"]], axis=1)
    z = (x - x[~held_out].mean(0)) / x[~held_out].std(0)
    apart = LogisticRegression(max_iter=1_000).fit(z[~held_out], level[~held_out])
    np.testing.assert_allclose(seen[0][3], apart.predict_proba(z[held_out]), atol=1e-3)
    np.testing.assert_array_equal(seen[0][2], p[held_out])
    assert found[:4] == (0.4, 0.6, ["en"], ["a", "b"])
    whole = fit_regression(x, one_hot(level))  # the labels are of all rows
    np.testing.assert_allclose(found.regression.weight, whole.weight)


def test_a_text_under_many_ids_is_one_query(tmp_path):
    """As where a log's sessions are the query_ids: three texts stand for 200 queries, and tell as little."""
    synthetic(tmp_path, shards=1)
    path = tmp_path / "features" / "queries.parquet"
    table = pq.read_table(path)
    place = table.column_names.index("query")
    texts = [f"text {i % 3}" for i in range(len(table))]
    write_parquet(path, table.set_column(place, "query", [texts]))
    train, evaluation = read_labelled(tmp_path)
    for rows in (train, evaluation):  # the unit of nDCG and of the intervals in 05
        np.testing.assert_array_equal(rows["query"], rows["query_index"] % 3)
    held_out = train["key"] != "text 0"
    found = pool.fit_pool(train, held_out, ["bm25"])
    _, numbers = np.unique(train["key"], return_inverse=True)  # each text under one id
    assert found[:2] == pool.fit_pool({**train, "query_index": numbers}, held_out, ["bm25"])[:2]
    assert found[:2] == pytest.approx([0.5, 0.5], abs=0.2)


def test_a_teacher_that_is_clearly_better_stays_alone():
    level, query, p, noise = world(queries=25)
    assert pool.is_clearly_better(level, query, p, noise)
    assert not pool.is_clearly_better(level, query, noise, p)
    assert not pool.is_clearly_better(level, query, p, p)
    one = query == 0
    assert not pool.is_clearly_better(level[one], query[one], p[one], noise[one])
    few = query < 5  # in one of five queries it is much worse: so few do not tell
    odd = np.where((query == 0)[:, None], np.roll(np.eye(5)[level - 1], 1, axis=1), p)
    assert not pool.is_clearly_better(level[few], query[few], odd[few], noise[few])
    rows = {"label": level, "key": query, "teacher": p, "language": np.full(len(p), "en", object)}
    rows["a"] = np.random.default_rng(3).normal(size=len(p))
    assert pool.fit_pool(rows, query < 12, ["a"]) is None
    assert pool.fit_pool({**rows, "teacher": noise}, query < 12, ["a"]) is not None


def test_a_language_without_labels_is_pooled_where_the_match_features_mean_the_same(monkeypatch):
    """As far from the teacher by mean KL(match || teacher), and enough pairs to tell."""
    rng = np.random.default_rng(7)
    rows = {"en": 300, "de": 200, "hi": 200, "th": pool.ENOUGH - 1}
    language = np.repeat(np.array(list(rows), dtype=object), list(rows.values()))
    x, target = rng.normal(size=(len(language), 1)), rng.dirichlet(np.ones(5), len(language))
    regression = fit_regression(x, target)
    match = regression.probabilities(x)
    p = softmax(np.log(match) + 0.5 * rng.normal(size=match.shape), axis=1)
    p[language == "hi"] = target[language == "hi"]
    mine = pool.Pool(0.5, 0.5, ["en"], ["a"], regression)
    found, times = mine.widened(p, x, language)
    far = entropy(match, np.maximum(p, 1e-6), axis=1)
    for other in ("de", "hi"):
        expected = far[language == other].mean() / far[language == "en"].mean()
        assert times.pop(other) == pytest.approx(expected, rel=1e-6)
        assert (expected <= pool.FAR) == (other == "de")
    assert found == mine._replace(languages=["de", "en"]) and times == {"th": None}
    found, _ = mine.widened(p, x, language, ["hi", "th"])  # hi is measured, th goes by the run before
    assert found.languages == ["de", "en", "th"]
    monkeypatch.setattr(pool, "FAR", 0.1)
    assert mine.widened(p, x, language)[0] == mine
    few = np.r_[: pool.ENOUGH - 1, rows["en"] : len(p)]
    assert mine.widened(p[few], x[few], language[few]) == (mine, dict.fromkeys(("de", "hi", "th")))
    found, times = mine.widened(p[:0], x[:0], language[:0], ["de"])
    assert found.languages == ["de", "en"] and times == {"de": None}


def test_a_pool_is_read_as_it_was_written(tmp_path):
    assert pool.read_pool(tmp_path) is None
    x, target = np.random.default_rng(0).normal(size=(50, 2)), np.eye(5)[np.arange(50) % 5]
    written = pool.Pool(0.4, 0.7, ["de", "en"], ["a", "b"], fit_regression(x, target))
    pool.write_pool(written, tmp_path)
    found = pool.read_pool(tmp_path)
    assert found[:4] == written[:4]
    for name, values in written.regression._asdict().items():
        np.testing.assert_array_equal(getattr(found.regression, name), values)


def test_03_pools_by_the_rows_that_02_held_out(tmp_path, capsys):
    synthetic(tmp_path, shards=1)
    train, _ = read_labelled(tmp_path)
    split = {"share": 0.3, "salt": "teacher:0"}
    held_out = in_hash_split(train["key"], **split)
    stage("03").pool_labels(tmp_path, tmp_path / "labels", split, None)
    found = pool.read_pool(tmp_path / "labels")
    assert found[:2] == pool.fit_pool(train, held_out, list(MATCH_FEATURES))[:2]
    assert found.languages == ["en"] and found.names == list(MATCH_FEATURES)
    queries = len(np.unique(train["key"][held_out]))
    assert f"{held_out.sum()} rows of {queries} held-out queries" in capsys.readouterr().out


def speak(run, languages):
    """Gives the queries of a run these languages [Q]."""
    path = run / "features" / "queries.parquet"
    table = pq.read_table(path)
    write_parquet(path, table.set_column(table.column_names.index("language"), "language", [list(languages)]))


SPLIT = {"share": 0.3, "salt": "teacher:0"}


def test_03_pools_other_languages_by_the_impressions(tmp_path, capsys, monkeypatch):
    """Random labels and features are as far apart in one language as in another."""
    synthetic(tmp_path, shards=3, shard_rows=300)
    train, _ = read_labelled(tmp_path)
    speak(tmp_path, np.where(np.isin(np.arange(200), train["query_index"]), "en", "de"))
    labels, pool_labels = tmp_path / "labels", stage("03").pool_labels
    pool_labels(tmp_path, labels, SPLIT, None)
    assert pool.read_pool(labels).languages == ["de", "en"]
    assert "de has no training labels, or few; its match features are 1.0" in capsys.readouterr().out
    monkeypatch.setattr(pool, "FAR", 0.5)
    pool_labels(tmp_path, labels, SPLIT, None)
    assert pool.read_pool(labels).languages == ["en"]
    monkeypatch.undo()
    for path in (labels / "impressions").iterdir():  # as with --only-labelled, whose pairs tell as much
        path.unlink()
    pool_labels(tmp_path, labels, SPLIT, None)
    assert "de has no training labels, or few; its match features are" in capsys.readouterr().out


def test_the_sample_is_spread_over_all_shards(tmp_path):
    """A log is in some order: by the hour, by market."""
    synthetic(tmp_path, shards=5)
    files = PairFiles(tmp_path)
    p, match, language = files.sample(tmp_path / "labels", most=65)  # of 60 + 61 + … + 64
    assert len(p) == len(match) == len(language) == 12 + 4 * 13
    of_last = read_labels(tmp_path / "labels/impressions/part-00004.parquet")
    np.testing.assert_array_equal(p[-13:], of_last[::5])
    p, *_ = files.sample(tmp_path / "labels")
    assert len(p) == 310


def test_a_language_of_few_labels_is_measured_as_one_of_none():
    language = np.repeat(np.array(["en", "de", "fr"], dtype=object), [500, 100, 1])
    assert pool.home_languages(language) == ["de", "en"]
    assert pool.home_languages(language[-3:]) == ["de"]  # so few in all: that of the most


def test_impressions_of_a_region_are_pooled_as_its_language(tmp_path):
    """04 reads what 05 measures: en-us is English to both."""
    synthetic(tmp_path, shards=1)
    speak(tmp_path, ["en-us"] * 200)
    stage("03").pool_labels(tmp_path, tmp_path / "labels", SPLIT, None)
    files = PairFiles(tmp_path)
    rows, _, _ = files.labelled()
    of_both = np.concatenate([side["learnt"] for side in read_labelled(tmp_path)])
    of_files = files.soft_labels("labelled.parquet", rows)
    np.testing.assert_allclose(np.sort(of_files, axis=0), np.sort(of_both, axis=0), atol=1e-6)
    impressions = "impressions/part-00000.parquet"
    shard = files.read(tmp_path / "features" / impressions)
    p = read_labels(tmp_path / "labels" / impressions)
    expected = pool.read_pool(tmp_path / "labels")(p, shard["match"], np.full(len(p), "en", object))
    np.testing.assert_array_equal(files.soft_labels(impressions, shard), expected)
    assert np.abs(expected - p).max() > 0.1


FILES = ("labelled.parquet", "impressions/part-00000.parquet")


def test_a_pool_finds_its_features_by_name(tmp_path):
    """One that a base has made, where this run's columns stand in another order, or are more."""
    synthetic(tmp_path, shards=1)
    stage("03").pool_labels(tmp_path, tmp_path / "labels", SPLIT, None)
    before = PairFiles(tmp_path)
    labels = [before.soft_labels(name, before.read(tmp_path / "features" / name)) for name in FILES]
    for name in FILES:
        path = tmp_path / "features" / name
        table = pq.read_table(path)
        columns = [*table.column_names[:2], *reversed(MATCH_FEATURES)]
        columns += [column for column in table.column_names if column not in columns]
        write_parquet(path, table.select(columns).add_column(2, "shelf", table["bm25"]))
    files = PairFiles(tmp_path)
    assert files.match != before.match
    for name, expected in zip(FILES, labels):
        found = files.soft_labels(name, files.read(tmp_path / "features" / name))
        np.testing.assert_allclose(found, expected, atol=1e-6)
    of_both = np.concatenate([side["learnt"] for side in read_labelled(tmp_path)])
    np.testing.assert_allclose(np.sort(of_both, axis=0), np.sort(labels[0], axis=0), atol=1e-6)


NOTHING = {"share": 0.0, "salt": "teacher:0"}  # is held out


def test_03_takes_the_pool_of_a_run_that_it_builds_on_where_it_cannot_make_one(tmp_path, capsys):
    """That of the nearest one with labels of this teacher."""
    label, trained = stage("03"), {"identity": "a teacher", "outputs": {}, "held_out": NOTHING}
    days = [tmp_path / name for name in ("sunday", "monday", "tuesday")]
    for day in days:
        synthetic(day, shards=1)
    for run, base in zip(days[1:], days):
        mark_finished(run / "features", base=str(base))
    settings = replace(label.TOY, run=days[2])
    assert label.pool_before(settings, trained) == (None, None)
    for day, share, teacher in ((days[0], 0.2, teacher_identity(trained)), (days[1], 0.3, "another")):
        label.pool_labels(day, day / "labels", {"share": share, "salt": "teacher:0"}, None)
        mark_finished(day / "labels", inputs={"teacher": teacher})
    taken, lock = label.pool_before(settings, trained)
    assert taken == days[0] / "labels"
    assert "reads it" in stop_line(hold, taken, "write")  # 03 of that run waits until this one has read it
    del lock
    hold(taken, "write")
    label.pool_labels(settings.run, settings.run / "labels", NOTHING, taken)
    of_two = [(day / "labels" / pool.POOL).read_bytes() for day in (days[0], days[2])]
    assert of_two[0] == of_two[1] and f"pooled as in {taken}" in capsys.readouterr().out
    assert label.pool_before(replace(settings, pool="none"), trained) == (None, None)


def test_03_names_the_features_that_a_pool_needs(tmp_path, capsys):
    synthetic(tmp_path, shards=1)
    pool_labels, labels = stage("03").pool_labels, tmp_path / "labels"
    pool_labels(tmp_path, labels, SPLIT, None)
    made = pool.read_pool(labels)
    before = tmp_path / "before"
    before.mkdir()
    pool.write_pool(made._replace(names=[*made.names[:-1], "shelf"]), before)
    (labels / pool.POOL).unlink()
    pool_labels(tmp_path, labels, NOTHING, before)
    assert "reads shelf, which these tables lack" in capsys.readouterr().out
    assert pool.read_pool(labels) is None
    pool.write_pool(made._replace(languages=["de", "en", "sw"]), before)  # languages go by it, too
    pool_labels(tmp_path, labels, SPLIT, before)
    assert "sw" in pool.read_pool(labels).languages and "as in the run before" in capsys.readouterr().out


def test_03_does_not_pool_without_held_out_rows_or_need(tmp_path, capsys, monkeypatch):
    synthetic(tmp_path, shards=1)
    stage("03").pool_labels(tmp_path, tmp_path / "labels", NOTHING, None)
    assert pool.read_pool(tmp_path / "labels") is None and "not pooled" in capsys.readouterr().out
    monkeypatch.setattr(stage("03"), "fit_pool", lambda *_: None)
    stage("03").pool_labels(tmp_path, tmp_path / "labels", {"share": 0.3, "salt": "teacher:0"}, None)
    assert pool.read_pool(tmp_path / "labels") is None and "clearly better" in capsys.readouterr().out
    assert stage("03").PAPER.pool == "none"  # the paper has no such step


# ------------------------------------------------------------------------------------------------------------
# The mean of several runs' labels


def test_the_mean_of_what_the_students_of_several_runs_learn(tmp_path, capsys):
    """One of them pooled, the other not; 04 and 05 read it as they read a teacher's."""
    first, second, mean = (tmp_path / name for name in ("first", "second", "mean"))
    synthetic(first, shards=2)
    mark_finished(first / "features", identity="features", dataset=str(tmp_path))
    shutil.copytree(first, second)
    rng = np.random.default_rng(9)
    for path in (second / "labels").rglob("*.parquet"):
        p = rng.dirichlet(np.ones(5), len(pq.read_table(path))).astype(np.float32)
        write_parquet(path, {f"p{level}": p[:, level - 1] for level in range(1, 6)})
    stage("03").pool_labels(first, first / "labels", SPLIT, None)
    for run in (first, second):
        mark_finished(run / "labels", identity=run.name, inputs={"features": "features"})
    mean.mkdir()
    (mean / "features").symlink_to(first / "features")
    argv = ["--run", str(mean), "--mean", str(first), str(second)]
    stage("03").main(argv)
    files = [PairFiles(run) for run in (first, second, mean)]
    for name in ("labelled.parquet", "impressions/part-00001.parquet"):
        rows = files[0].read(first / "features" / name)
        one, other, both = (of_run.soft_labels(name, rows) for of_run in files)
        np.testing.assert_allclose(both, (one + other) / 2, atol=1e-6)
        assert np.abs(one - read_labels(first / "labels" / name)).max() > 0.1
    quick = ["--run", str(mean), "--epochs", "1", "--device", "cpu"]
    stage("04").main(quick)
    write_json(mean / "teacher" / "teacher.json", {})  # which the labels are not of
    mark_finished(mean / "teacher", rows={"train": 7}, held_out=SPLIT)
    stage("05").main(["--run", str(mean), "--resamples", "5", "--search-pages", "0"])
    report = (mean / "report" / "report.md").read_text(encoding="utf-8")
    assert "teacher: the mean of 2 runs" in report and "the teacher learnt from" not in report
    assert "teacher" not in read_json(mean / "report" / "temperatures.json")
    assert not (mean / "report" / "cards" / "teacher.md").exists()
    stage("03").main([*argv[:3], *reversed(argv[3:])])
    assert "nothing to do" in capsys.readouterr().out
    itself = ["--run", str(first), "--mean", str(first), str(second), "--overwrite"]
    assert "another --run" in stop_line(stage("03").main, itself)
    with pytest.raises(SystemExit) as end:
        stage("03").main([*argv, "--overwrite", "--long-queries", "cut", "--model", "elsewhere"])
    said = capsys.readouterr().err
    assert end.value.code == 2 and "--model --long-queries would do nothing" in said
    twice = [*argv, f"{first}/../{first.name}", "--overwrite"]
    assert "a run stands twice" in stop_line(stage("03").main, twice)
    mark_finished(second / "features", identity="others")
    mark_finished(second / "labels", identity="others", inputs={"features": "others"})
    assert "of other features" in stop_line(stage("03").main, [*argv, "--overwrite"])


def test_flags_that_a_mean_has_no_use_for_are_refused(tmp_path, capsys):
    """`--mean A B --pool none` averaged labels that were pooled."""
    argv = ["--run", str(tmp_path / "mean"), "--mean", str(tmp_path / "a"), str(tmp_path / "b")]
    with pytest.raises(SystemExit) as end:
        stage("03").main([*argv, "--pool", "none", "--no-merge"])
    assert end.value.code == 2 and "--pool --no-merge would do nothing" in capsys.readouterr().err
    of_preset = [*argv, "--preset", "paper"]  # which says --pool none, too
    assert "missing or unfinished" in stop_line(stage("03").main, of_preset)


def test_a_mean_is_the_same_in_any_order(tmp_path):
    runs = [tmp_path / name for name in ("a", "b", "c")]
    for seed, run in enumerate(runs):
        synthetic(run, shards=1, seed=seed)
        shutil.rmtree(run / "features")
        synthetic(tmp_path / "features of all", shards=1)
        shutil.copytree(tmp_path / "features of all" / "features", run / "features")
        mark_finished(run / "labels", identity=run.name, inputs={"features": "features"})
    found = []
    for order in ((0, 1, 2), (2, 1, 0)):
        mean = tmp_path / f"mean {order}"
        shutil.copytree(runs[0] / "features", mean / "features")
        stage("03").main(["--run", str(mean), "--mean", *(str(runs[i]) for i in order)])
        found.append(read_labels(mean / "labels" / "impressions" / "part-00000.parquet"))
    np.testing.assert_array_equal(*found)
