"""Metrics against scikit-learn, SciPy and counts by hand; the bootstrap against what must hold of it."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import stage
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import rel_entr
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score
from torch.nn.functional import kl_div

from common import at_temperature
from experiments import comparison
from lib.results import report
from lib.tables.splits import in_hash_split

evaluate = stage("05")
ERRORS, INTERVAL = ("ece", "ece_at_temperature"), SimpleNamespace(value=0.1, low=0.0, high=0.2)


def triple(m):
    """A metric's value and the ends of its interval."""
    return m.value, m.low, m.high


def metrics_of(y, p, w, teacher=None):
    """A system's metrics, every row a query of its own with this weight."""
    return evaluate.Measured(y, p, p[:, 4], np.arange(len(y)), teacher).metrics(w)


def example(seed, n=200, ties=False):
    """Labels, probabilities (a few distinct ones with ties) and weights."""
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.ones(5) * 0.7, n)
    return rng.integers(1, 6, n), p[rng.integers(0, 7, n)] if ties else p, rng.integers(0, 4, n).astype(float)


@pytest.mark.parametrize("seed", range(3))
def test_accuracy_and_within_one(seed):
    y, p, w = example(seed)
    guess = p.argmax(1) + 1
    assert evaluate.accuracy(y, p, w) == pytest.approx(accuracy_score(y, guess, sample_weight=w))
    near = np.array([abs(int(a) - int(b)) in (0, 1) for a, b in zip(y, guess)])
    assert metrics_of(y, p, w)["within_one"] == pytest.approx((near * w).sum() / w.sum())


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_auroc_equals_scikit_learn(seed, ties):
    y, p, w = example(seed, ties=ties)
    score = p[:, 3:].sum(1)
    for weight in (np.ones(len(y)), w):
        assert evaluate.auroc(y >= 4, evaluate.ranked(score), weight) == pytest.approx(
            roc_auc_score(y >= 4, score, sample_weight=weight), abs=1e-12
        )


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=30))
def test_auroc_by_counting_pairs(rows):
    positive, score, w = (np.array(c) for c in zip(*rows))
    got = evaluate.auroc(positive, evaluate.ranked(score), w.astype(float))
    pairs = [
        (wa * wb, (a > b) + 0.5 * (a == b))
        for a, pa, wa in zip(score, positive, w)
        if pa
        for b, pb, wb in zip(score, positive, w)
        if not pb
    ]
    total = sum(weight for weight, _ in pairs)
    assert (
        np.isnan(got)
        if total == 0
        else got == pytest.approx(sum(weight * won for weight, won in pairs) / total)
    )


def mean_dcg(gain, score, k):
    """DCG@k over all orders of equal scores, by trying them all."""
    found = []
    for order in itertools.permutations(range(len(gain))):
        if all(score[a] >= score[b] for a, b in itertools.pairwise(order)):
            found.append(sum(gain[row] / np.log2(place + 2) for place, row in enumerate(order[:k])))
    return np.mean(found)


@pytest.mark.parametrize("k", [1, 3, 20])
@pytest.mark.parametrize("seed", range(5))
def test_ndcg_is_the_mean_over_the_orders_of_equal_scores(seed, k):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 7))
    y, score = rng.integers(1, 6, n), rng.integers(0, 3, n)
    gain = [0, 1, 3, 7, 15]
    gain = [gain[level - 1] for level in y]
    expected = mean_dcg(gain, score, k) / mean_dcg(gain, gain, k)
    assert evaluate.ndcg(y, score, k) == pytest.approx(expected, abs=1e-12)


def test_ndcg_by_hand():
    expected = (15 + 3 / 2) / (15 + 3 / np.log2(3))
    assert evaluate.ndcg(np.array([5, 1, 3]), np.array([3.0, 2.0, 1.0])) == pytest.approx(expected)
    assert np.isnan(evaluate.ndcg(np.array([1, 1]), np.array([2.0, 1.0])))  # no gain to be had
    assert evaluate.ndcg(np.array([4]), np.array([0.0])) == 1
    assert evaluate.ndcg(np.array([1] * 20 + [5]), -np.arange(21.0)) == 0  # place 21 is not counted


def test_ece_by_hand():
    """Bins of 1/15. Two rows in the bin of 0.9, one right; one row at 0.5, right; one at 1.0, right."""
    p = np.array([[0.9, 0.1, 0, 0, 0], [0.91, 0.09, 0, 0, 0], [0.5, 0.3, 0.2, 0, 0], [0, 0, 0, 0, 1.0]])
    y = np.array([1, 2, 1, 5])
    expected = (2 * abs((0.9 + 0.91) / 2 - 0.5) + abs(0.5 - 1) + 0) / 4
    assert evaluate.ece(y, p, np.ones(4)) == pytest.approx(expected)
    assert evaluate.ece(y, p, np.array([1.0, 0, 0, 1])) == pytest.approx((abs(0.9 - 1) + 0) / 2)
    # Bins 9 and 11: errors of either sign do not cancel
    apart = np.array([[0.35, 0.65, 0, 0, 0], [0.25, 0.75, 0, 0, 0]])
    assert evaluate.ece(np.array([2, 1]), apart, np.ones(2)) == pytest.approx((0.35 + 0.75) / 2)


@pytest.mark.parametrize("bins", [3, 10, 15])
def test_bins_of_ece_are_closed_on_the_right(bins):
    """Guo et al., 2017, eq. 3: bin m holds confidences in ((m - 1) / M, m / M]. A wrong row whose confidence
    is on an edge shares its bin with right rows just below it, and not with those just above."""
    for edge in np.arange(2, bins) / bins:
        if edge > 0.5:
            p = np.zeros((3, 5))
            p[:, 0] = edge, edge - 1e-6, edge + 1e-6
            p[:, 1] = 1 - p[:, 0]
            below = abs((2 * edge - 1e-6) / 2 - 1 / 2) * 2 / 3  # rows 0 (wrong) and 1 (right)
            above = abs(edge + 1e-6 - 1) / 3
            assert evaluate.ece(np.array([2, 1, 1]), p, np.ones(3), bins) == pytest.approx(below + above)


@pytest.mark.parametrize("seed", range(3))
def test_kl_equals_scipy_and_torch(seed):
    y, p, w = example(seed)
    teacher = np.random.default_rng(seed + 9).dirichlet(np.ones(5), len(p))
    expected = kl_div(torch.from_numpy(p).log(), torch.from_numpy(teacher), reduction="batchmean").item()

    def kl(teacher, p, w):
        return metrics_of(y[: len(p)], p, w, teacher)["kl_to_teacher"]

    assert kl(teacher, p, np.ones(len(p))) == pytest.approx(expected)
    assert kl(teacher, p, w) == pytest.approx((rel_entr(teacher, p).sum(1) * w).sum() / w.sum())
    assert kl(p, p, w) == pytest.approx(0, abs=1e-9)
    assert np.isfinite(kl(np.eye(5)[:2], np.eye(5)[1:3], np.ones(2)))


# ------------------------------------------------------------------------------------------------------------
# Intervals


def with_intervals(y, p, score, query, resamples, seed, teacher=None):
    """{metric: Interval} of one system."""
    measured = evaluate.Measured(y, p, score, query, teacher, evaluate.GAINS)
    value, drawn = measured.bootstrap(resamples, seed)
    return {metric: evaluate.interval(value[metric], drawn[metric]) for metric in value}


def sample(seed=0, queries=30, rows=8):
    y, p, _ = example(seed, queries * rows)
    return (
        y,
        p,
        evaluate.expected_level(p),
        np.random.default_rng(seed).permutation(np.repeat(np.arange(queries) * 7, rows)),
    )


def test_interval_holds_the_value_and_depends_on_the_seed_alone():
    y, p, score, query = sample()
    teacher = np.random.default_rng(1).dirichlet(np.ones(5), len(y))
    one = with_intervals(y, p, score, query, 200, 3, teacher)
    assert list(one) == list(report.METRICS)
    for m in one.values():
        assert m.low < m.value < m.high
    assert one == with_intervals(y, p, score, query, 200, 3, teacher)
    assert one != with_intervals(y, p, score, query, 200, 4, teacher)
    shuffled = np.random.default_rng(5).permutation(len(y))
    again = with_intervals(
        y[shuffled], p[shuffled], score[shuffled], query[shuffled], 200, 3, teacher[shuffled]
    )
    for name, m in one.items():
        assert triple(again[name]) == pytest.approx(triple(m), abs=2e-6)


def test_interval_of_a_constant_is_that_constant():
    y = np.tile([5, 1, 3], 20)
    p, query = np.eye(5)[y - 1], np.repeat(np.arange(20), 3)  # always right
    out = with_intervals(y, p, y.astype(float), query, 50, 0)
    for name in ("accuracy", "within_one", "auroc_3", "auroc_4", "auroc_5", "ndcg_20"):
        assert triple(out[name]) == (1, 1, 1)
    assert triple(out["ece"]) == (0, 0, 0)


def test_interval_is_wider_over_queries_than_over_rows():
    """Rows of a query that are all alike carry the information of one row."""
    rng = np.random.default_rng(0)
    right = np.repeat(rng.random(40) < 0.5, 25)
    y, query = np.ones(1000, int), np.repeat(np.arange(40), 25)
    p = np.where(right[:, None], np.eye(5)[0], np.eye(5)[1])
    width = []
    for unit in (query, np.arange(1000)):
        m = with_intervals(y, p, np.zeros(1000), unit, 400, 0)["accuracy"]
        width.append(m.high - m.low)
    # The normal approximation, for 40 and for 1,000 draws
    assert width[0] == pytest.approx(2 * 1.96 * np.sqrt(0.25 / 40), rel=0.2)
    assert width[1] == pytest.approx(2 * 1.96 * np.sqrt(0.25 / 1000), rel=0.2)


def test_weights_are_repeated_rows():
    y, p, w = example(6, 60)
    query = np.repeat(np.arange(12), 5)
    weight = np.random.default_rng(0).integers(0, 3, 12).astype(float)
    score = evaluate.expected_level(p)
    weighted = evaluate.Measured(y, p, score, query, p[::-1]).metrics(weight)
    rows, copy = [], []  # each query's rows as often as its weight says, each time as another query
    for number in range(12):
        for again in range(int(weight[number])):
            rows.append(np.flatnonzero(query == number))
            copy.append(np.full(5, 12 * again + number))
    rows, copy = np.concatenate(rows), np.concatenate(copy)
    repeated = evaluate.Measured(y[rows], p[rows], score[rows], copy, p[::-1][rows])
    assert weighted == pytest.approx(repeated.metrics(np.ones(int(weight.sum()))))


def test_a_metric_that_does_not_exist_is_none():
    out = with_intervals(np.array([1, 1]), np.eye(5)[[0, 1]], np.zeros(2), np.array([0, 1]), 20, 0)
    assert triple(out["auroc_3"]) == triple(out["ndcg_20"]) == (None, None, None)
    assert out["accuracy"].value == 0.5


def test_a_metric_that_no_resample_has_is_a_dash():
    """Of two queries, with two resamples of one query each."""
    found = evaluate.interval(1.0, np.array([np.nan, np.nan]))
    assert (found.value, found.low) == (1, None)
    assert report.cell(found) == report.cell(found, False) == comparison.points(found) == "–"


def settings(resamples, seed, gains=None):
    return evaluate.Settings(resamples=resamples, seed=seed, gains=gains)


AUROCS = {"auroc_3", "auroc_4", "auroc_5"}


@pytest.mark.parametrize("levels,within_one,aurocs", [
    ([1, 2, 3, 4, 5], True, AUROCS), ([1, 3, 4, 5], True, AUROCS), ([1, 2, 3], True, {"auroc_3"}),
    ([1, 3, 5], False, {"auroc_3", "auroc_4"}), ([1, 5], False, {"auroc_4"}), ([4, 5], False, {"auroc_5"}),
    ([1, 2], False, set()), ([3], False, set()), ([2, 3, 4], True, {"auroc_3", "auroc_4"}),
])  # fmt: skip
def test_metrics_that_mean_something(levels, within_one, aurocs):
    found = report.meaningful(np.array(levels))
    assert ("within_one" in found) is within_one and found & AUROCS == aurocs
    assert {"accuracy", "ndcg_20", "ece", "kl_to_teacher"} <= found


def test_table_of_two_levels():
    """Labels 0/1 as levels 1 and 5: one AUROC, no within-one; every language."""
    y, p, score, query = sample()
    y = np.where(y > 3, 5, 1)
    language = np.array(["en", "de"], dtype=object)[query % 2]
    rows = {"label": y, "query": query, "language": language, "learnt": p}
    systems = {"bm25": (p, score), "student": (p, score)}
    table, compared, ndcg = evaluate.measure(systems, rows, np.array([1, 5]), settings(10, 0))
    shared = ["accuracy", "auroc_4", "ndcg_20", "ece"]
    for system, names in (("bm25", shared), ("student", [*shared, "kl_to_teacher"])):
        parts = table[system]["by_language"]
        for found in (table[system]["overall"], parts["en"], parts["de"]):
            assert list(found) == names
    assert table["student"]["overall"]["kl_to_teacher"].value == 0
    assert list(table) == ["bm25", "student"] and list(table["bm25"]["by_language"]) == ["de", "en"]
    assert np.nanmean(ndcg["bm25"]) == pytest.approx(table["bm25"]["overall"]["ndcg_20"].value, abs=1e-6)


def test_differences_are_paired_and_losses_told_beside_the_best_untrained_system():
    """The same as resampling the rows of both by hand; noise is not told as a loss."""
    y, good, score, query = sample()
    bad = np.random.default_rng(9).dirichlet(np.ones(5), len(y))
    right = 0.5 * np.eye(5)[y - 1] + 0.5 * good
    rows = {"label": y, "query": query, "learnt": good}
    rows["language"] = np.array(["en", "de"], dtype=object)[query % 2]
    probabilities = {"bm25": bad, "embedding": right, "match": bad, "student_human_labels": right,
                     "student": bad, "teacher": right * 0.9 + 0.02}  # fmt: skip
    systems = {name: (p, evaluate.expected_level(p)) for name, p in probabilities.items()}
    table, compared, _ = evaluate.measure(systems, rows, np.arange(1, 6), settings(50, 4))
    pairs = {(m.system, m.minus) for m in compared}
    trained = ("student_human_labels", "student", "teacher")
    beside = {
        ("student", "student_human_labels"),
        ("teacher", "student_human_labels"),
        ("teacher", "student"),
    }
    assert pairs == beside | {(name, other) for name in trained for other in report.UNTRAINED}
    assert {m.metric for m in compared} == {"auroc_4", "ndcg_20"}
    found = {(m.system, m.minus, m.metric): m for m in compared}
    drawn = []
    for name in ("student", "embedding"):
        p, score = systems[name]
        drawn.append(evaluate.Measured(y, p, score, query).bootstrap(50, 4)[1]["auroc_4"])
    low, high = np.percentile(drawn[0] - drawn[1], [2.5, 97.5])
    m = found["student", "embedding", "auroc_4"]
    assert (m.low, m.high) == pytest.approx((low, high), abs=1e-6)
    overall = {system: parts["overall"] for system, parts in table.items()}
    gap = overall["student"]["auroc_4"].value - overall["embedding"]["auroc_4"].value
    assert m.value == pytest.approx(gap, abs=2e-6)
    assert triple(found["student_human_labels", "embedding", "ndcg_20"]) == (0, 0, 0)

    lines = report.below(compared)
    assert [line.split(":")[0] for line in lines] == [
        "student is below embedding", "student is below student_human_labels",
    ]  # fmt: skip
    assert "AUROC ≥4 -0." in lines[0] and "nDCG@20 -0." in lines[0] and "more queries" in lines[0]
    assert report.summary(table, compared)[-2:] == lines
    assert all("AUROC ≥4" in line for line in report.summary(table, compared)[:-2])
    assert compared[0].minus == "bm25"


@pytest.mark.parametrize("queries, gainless, intervals", [(4, 0, 0), (5, 0, 2), (5, 1, 1), (1, 0, 0)])
def test_a_difference_on_too_few_queries_has_no_interval(queries, gainless, intervals):
    y, good, _, query = sample(queries=queries)
    y[query < gainless] = 1
    rows = {"label": y, "query": query, "learnt": good, "language": np.full(len(y), "en", dtype=object)}
    right = np.eye(5)[y - 1]
    systems = {"bm25": (right, y + 0.0), "teacher": (right[:, ::-1], -y + 0.0)}
    _, compared, _ = evaluate.measure(systems, rows, np.arange(1, 6), settings(20, 0))
    found = [m for m in compared if m.low is not None]
    assert len(compared) == 2 and len(found) == intervals and all(m.value < 0 for m in compared)
    assert sum(line.count("[") for line in report.below(compared)) == intervals
    assert str(report.in_short(compared)).count("too few") == 2 - intervals


def test_few_queries_are_told():
    assert report.few_queries(30) == [] and "only 29 " in report.few_queries(29)[0]


# ------------------------------------------------------------------------------------------------------------
# Temperatures


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_a_temperature_is_found_again(temperature):
    """Labels drawn from probabilities that a system states too sharply or too flatly."""
    rng = np.random.default_rng(0)
    true = rng.dirichlet(np.ones(5), 20_000)
    y = (rng.random((len(true), 1)) > true.cumsum(1)).sum(1) + 1
    stated = at_temperature(torch.from_numpy(true), 1 / temperature).numpy()
    assert evaluate.fit_temperature(y, stated) == pytest.approx(temperature, rel=0.05)
    scaled = at_temperature(torch.from_numpy(stated), temperature).numpy()
    np.testing.assert_allclose(scaled, true, atol=1e-3)  # less what is below 1e-12
    ones = np.ones(len(y))
    assert evaluate.ece(y, scaled, ones) < 0.02
    assert temperature == 1 or evaluate.ece(y, stated, ones) > 0.1


def test_at_temperature_is_a_softmax_over_logits():
    z = torch.from_numpy(np.random.default_rng(0).normal(size=(9, 5)) * 3)
    for temperature in (0.5, 1.0, 2.5):
        expected = (z / temperature).softmax(1).numpy()
        np.testing.assert_allclose(at_temperature(z.softmax(1), temperature), expected, atol=1e-9)
    for temperature in (0.01, 2.0, 100.0):
        assert torch.equal(at_temperature(torch.eye(5), temperature), torch.eye(5))


def test_temperatures_are_fitted_on_held_out_training_queries_alone(monkeypatch):
    key = np.array([f"q{i}" for i in range(40)], dtype=object).repeat(10)
    y, p, _ = example(3, 400)
    train = {"key": key, "label": y, "teacher": p, "query": np.arange(40).repeat(10)}
    held_out = {"share": 0.5, "salt": "x"}
    fitted = []
    monkeypatch.setattr(evaluate, "fit_temperature", lambda y, p: fitted.append((y, p)) or 2.0)
    read = {"features": {}, "labels": {}, "teacher": {"held_out": held_out}}
    found = evaluate.fit_temperatures(None, read, train)
    at = in_hash_split(key, **held_out)
    assert found == {"teacher": {"temperature": 2.0, "rows": at.sum(), "queries": at.sum() // 10}}
    np.testing.assert_array_equal(fitted[0][0], y[at])
    np.testing.assert_array_equal(fitted[0][1], p[at])
    few = train["query"] < 14  # of fourteen queries, all of them held out, none is fitted
    train = {name: column[few] for name, column in train.items()}
    read["teacher"] = {"held_out": {"share": 1.0, "salt": "x"}}
    found = evaluate.fit_temperatures(None, read, train)
    assert found == {"teacher": {"temperature": 1.0, "rows": 140, "queries": 14}} and len(fitted) == 1
    table = report.of_temperatures({"teacher": {**found["teacher"], **dict.fromkeys(ERRORS, INTERVAL)}})
    assert "| teacher | 1.00 | 140 rows of 14 queries: too few |" in "\n".join(table)
    for nothing in ({}, {"teacher": {}}, {"teacher": {"held_out": {"share": 0.0, "salt": "x"}}}):
        assert evaluate.fit_temperatures(None, nothing, train) == {}


# ------------------------------------------------------------------------------------------------------------
# Baselines


@pytest.mark.parametrize("levels", [[1, 2, 3, 4, 5], [1, 5], [4]])
def test_bm25_system(levels):
    rng = np.random.default_rng(0)
    label = rng.choice(levels, 300)
    train = {"label": label, "bm25": np.maximum(0, label * 3 + rng.normal(size=300)).astype(np.float32)}
    train["found"] = train["bm25"] > 0
    p, score = evaluate.regression_system(["bm25", "found"], train, train, ranks_by="bm25")
    np.testing.assert_allclose(p.sum(1), 1)
    assert (p[:, [k - 1 for k in range(1, 6) if k not in levels]] < 1e-8).all()
    if len(levels) > 1:
        assert np.corrcoef(evaluate.expected_level(p), label)[0, 1] > 0.9
    else:
        assert (p[:, 3] > 1 - 1e-7).all()
    np.testing.assert_array_equal(score, train["bm25"])


def test_embedding_system_ranks_by_the_cosine():
    """Its probabilities follow the training labels."""
    train = {"text_cosine": np.linspace(-1, 1, 200), "label": np.repeat([1, 5], 100)}
    cosine = {"text_cosine": np.array([0.9, -0.9, 0.1])}
    p, score = evaluate.regression_system(["text_cosine"], train, cosine, ranks_by="text_cosine")
    assert (score == [0.9, -0.9, 0.1]).all() and np.allclose(p.sum(1), 1)
    assert p[0, 4] > 0.9 and p[1, 0] > 0.9 and p[2, 4] > p[2, 0]


def test_match_system_reads_the_features_that_it_is_told():
    rng = np.random.default_rng(0)
    label = rng.integers(1, 6, 300)
    train = {"label": label, "a": rng.normal(size=300), "b": label + 0.01 * rng.normal(size=300)}
    p, score = evaluate.regression_system(["a", "b"], train, train)
    assert (p.argmax(1) + 1 == label).mean() > 0.9
    np.testing.assert_array_equal(score, evaluate.expected_level(p))
    assert (evaluate.regression_system(["a"], train, train)[0].argmax(1) + 1 == label).mean() < 0.5


def test_expected_level():
    p = np.array([[0, 0, 0, 0.5, 0.5], [1, 0, 0, 0, 0]], np.float32)
    assert evaluate.expected_level(p).tolist() == [4.5, 1]


@pytest.mark.parametrize("seed", range(3))
def test_macro_f1_equals_scikit_learn(seed):
    y, p, w = example(seed)
    levels = np.unique(y[w > 0])
    expected = f1_score(y, p.argmax(1) + 1, labels=levels, average="macro", sample_weight=w)
    assert evaluate.macro_f1(y, p, w) == pytest.approx(expected)
    micro = f1_score(y, p.argmax(1) + 1, average="micro", sample_weight=w)
    assert evaluate.accuracy(y, p, w) == pytest.approx(micro)


def test_given_gains():
    """ESCI's gains, whole lists: place 21 counts."""
    gains = evaluate.parse(evaluate.PRESETS, ["--gains", "0", "0", "0.01", "0.1", "1"]).gains
    assert gains == (0, 0, 0.01, 0.1, 1) and evaluate.Settings().gains is None
    y, score = np.array([1] * 20 + [5]), -np.arange(21.0)
    assert evaluate.ndcg(y, score, None, gains) == pytest.approx(1 / np.log2(22))
    expected = (0.1 + 1 / np.log2(3)) / (1 + 0.1 / np.log2(3))
    assert evaluate.ndcg(np.array([4, 5]), np.array([2.0, 1.0]), None, gains) == pytest.approx(expected)
    p = np.full((21, 5), 0.2)
    found = evaluate.Measured(y, p, score, np.zeros(21, int), gains=gains).metrics(np.ones(1))
    assert found["ndcg"] == pytest.approx(1 / np.log2(22)) and found["ndcg_20"] == 0
    assert found["macro_f1"] == pytest.approx(40 / 41 / 2)  # every row is taken for level 1
    assert (
        not {"ndcg", "macro_f1"}
        & evaluate.Measured(y, p, score, np.zeros(21, int)).metrics(np.ones(1)).keys()
    )
    for text in ("5", "1 2 3 4 -5", "1 2 3 4 x", "1 2 3 4 5 6"):
        with pytest.raises(SystemExit):
            evaluate.parse(evaluate.PRESETS, ["--gains", *text.split()])
