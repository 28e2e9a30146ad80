"""The teacher as judge of result lists: experiments/estimates.py, lists.py, judge.py."""

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from finished_run import finished_run
from helpers import stop_line
from scipy import stats
from sklearn.metrics import ndcg_score

from experiments import estimates, judge
from experiments.lists import list_metrics, strata_of
from lib.tables.result_lists import read_results, rows_of_queries

# ------------------------------------------------------------------------------------------------------------
# Estimates


def test_metrics_of_a_list():
    """Two queries with three judged pins each; the second list ends after one pin."""
    level = np.array([5, 3, 1, 2, 4, 1])
    gain, relevant = estimates.gains(np.eye(5)[level - 1], "probable")
    np.testing.assert_array_equal(gain, 2.0 ** (level - 1) - 1)
    pairs = pd.MultiIndex.from_arrays([[7, 7, 7, 9, 9, 9], range(6)], names=["query", "pin"])
    gain, relevant = pd.Series(gain, pairs), pd.Series(relevant, pairs)
    found = list_metrics(pd.Series([2, 1, 3, 1, np.nan, np.nan], pairs), gain, relevant, 3)
    shown = ndcg_score([gain[:3]], [[2, 3, 1]], k=3)
    best = 7 + 1 / np.log2(3)  # levels 4, 2
    np.testing.assert_allclose(found["ndcg"], [shown, 1 / best])
    scale = 15 * (1 / np.log2([2, 3, 4])).sum()
    np.testing.assert_allclose(found["sdcg"], [(3 + 15 / np.log2(3)) / scale, 1 / scale])
    np.testing.assert_allclose(found["precision"], [1 / 3, 0])
    nothing = list_metrics(pd.Series([np.nan, np.nan, 1, *[np.nan] * 3], pairs), gain * 0, relevant, 3)
    assert np.isnan(nothing["ndcg"][7]) and nothing["sdcg"][7] == 0
    assert nothing.loc[9].isna().all()  # not answered by the list


def test_expected_gain():
    p = np.array([[0, 0, 0.5, 0, 0.5]])
    gain, relevant = estimates.gains(p, "expected")
    assert gain[0] == pytest.approx(9) and relevant[0] == pytest.approx(0.5)  # (3 + 15) / 2
    assert estimates.gains(p, "probable")[0][0] == 3


def test_mean_and_its_interval():
    values = np.random.default_rng(0).normal(1, 2, 40)
    found = estimates.mean(np.append(values, np.nan), np.ones(41))
    reference = stats.ttest_1samp(values, 0).confidence_interval()
    assert (found.low, found.high) == pytest.approx((reference.low, reference.high))
    twice = estimates.mean(np.array([1.0, 1.0, 4.0]), np.array([1.0, 1.0, 2.0]))
    assert twice.value == pytest.approx(2.5)  # traffic counts
    weight = np.append(np.ones(4), np.zeros(36))  # no traffic: as if it were not there
    assert estimates.mean(values, weight) == estimates.mean(values[:4], np.ones(4))
    assert np.isnan(estimates.mean(np.full(3, np.nan), np.ones(3)).value)  # not 0


def test_corrected_mean_is_that_of_ppi_python():
    """ppi-python 0.2.3 on the same numbers: ppi_mean_pointestimate -0.0290468, ppi_mean_ci [-0.15681623,
    0.09872262]. It divides by n where we divide by n - 1."""
    rng = np.random.default_rng(0)
    n, more = 200, 1500
    x = rng.normal(0, 1, n + more)
    people = (x + rng.normal(0, 0.7, n + more))[:n]
    judge = 0.8 * x + rng.normal(0.1, 0.4, n + more)
    found, tuned, alone = estimates.corrected_mean(people, judge[:n], judge[n:])
    assert found.value == pytest.approx(-0.0290468, abs=1e-3)
    assert 1.959964 * found.error == pytest.approx((0.09872262 + 0.15681623) / 2, rel=0.01)
    assert 0.5 < tuned < 1.5 and found.error < estimates.mean(people, np.ones(n)).error
    assert alone > n


def test_a_judge_that_knows_nothing_costs_nothing():
    rng = np.random.default_rng(1)
    people, noise = rng.normal(0, 1, 50), rng.normal(5, 1, 500)
    found, tuned, _ = estimates.corrected_mean(people, noise[:50], noise[50:])
    assert tuned < 0.4 and found.error < 1.05 * people.std(ddof=1) / np.sqrt(50)
    constant, tuned, _ = estimates.corrected_mean(people, np.ones(50), np.ones(500))
    assert tuned == 0 and constant.value == pytest.approx(people.mean())


def test_people_who_have_labelled_all_queries_need_no_judge():
    rng = np.random.default_rng(0)
    people, weight = rng.normal(size=50), rng.random(50)
    covered = np.full(50, True)
    found = judge.correct(people + 1, people, covered, weight)
    assert found["value"] == pytest.approx(np.average(people, weights=weight))
    assert (found["lambda"], found["people"], found["people_alone"]) == (0, 50, 50)
    covered[: judge.FEWEST] = False  # enough of the judge's own to count
    assert judge.correct(people + 1, people, covered, weight)["lambda"] > 0
    assert judge.correct(people + 1, people, np.arange(50) < judge.FEWEST - 1, weight) is None


def test_a_correction_leaves_out_queries_without_traffic():
    rng = np.random.default_rng(0)
    people, covered, some = rng.normal(1, 1, 60), np.arange(60) < 30, np.arange(60) % 2 == 0
    judged = people + rng.normal(0, 0.3, 60)
    expected = judge.correct(judged[some], people[some], covered[some], np.ones(30))
    assert judge.correct(judged, people, covered, some.astype(float)) == pytest.approx(expected)
    assert judge.correct(judged, people, covered, (~covered).astype(float)) is None  # not 0 [0, 0]


def test_power_and_allocation():
    """The detected difference is the one that a t test finds four times of five."""
    rng, n, deviation = np.random.default_rng(0), 400, 0.3
    difference = estimates.detectable(deviation, n)
    found = [stats.ttest_1samp(rng.normal(difference, deviation, n), 0).pvalue < 0.05 for _ in range(500)]
    assert np.mean(found) == pytest.approx(0.8, abs=0.06)
    values = np.concatenate([np.tile([-1.0, 1.0], 50), np.tile([-3.0, 3.0], 50)])
    stratum = np.repeat(["calm", "wild"], 100)
    found = estimates.power(values, stratum, np.ones(200), 0.1, 100)
    assert estimates.detectable(found["deviation"], found["queries_for_want"]) == pytest.approx(0.1, rel=0.01)
    assert [*found["plan"]["calm"].values(), *found["plan"]["wild"].values()] == [50, 25, 50, 75]
    assert found["plan_detects"]["optimal"] < found["plan_detects"]["proportional"]
    weight = (np.arange(200) < 120).astype(float)
    some = estimates.power(values[:120], stratum[:120], np.ones(120), 0.1, 100)
    assert estimates.power(values, stratum, weight, 0.1, 100) == some  # no traffic: as if it were not there


def test_power_is_that_of_the_weighted_mean():
    rng = np.random.default_rng(0)
    values, weight, stratum = rng.normal(size=50), rng.random(50) ** 4, np.full(50, "all")
    found, error = estimates.power(values, stratum, weight, 0.1, 100), estimates.mean(values, weight).error
    assert found["detects"] == pytest.approx(estimates.DETECTED * error)
    assert found["detects"] > 1.3 * estimates.detectable(found["deviation"], 50)
    assert found["queries_for_want"] == np.ceil(50 * (found["detects"] / 0.1) ** 2)
    one = estimates.power(values[:1], stratum[:1], weight[:1], 0.1, 100)
    assert np.isnan(one["detects"]) and np.isnan(estimates.mean(values[:1], weight[:1]).error)


def test_agreement():
    level, query = np.array([1, 2, 5, 5, 3, 3]), np.array([0, 0, 1, 1, 2, 2])
    names = ("exact", "within_one", "kappa", "tau", "rho")

    def agreement(level, likeliest, query):
        rows = {"label": level, "teacher": np.eye(5)[likeliest - 1], "query": query}
        _, distance, agrees = estimates.trust({**rows, "language": np.array(["en"] * len(level))})
        assert agrees[""] == agrees["en"]
        return distance, agrees["en"]

    distance, found = agreement(level, level, query)
    assert [found[name] for name in names] == pytest.approx([1] * 5)
    assert distance == {"expected": 0, "probable": 0}
    _, off = agreement(level, np.minimum(level, 4) + 1, query)
    assert off["exact"] == pytest.approx(2 / 6) and off["within_one"] == 1 and 0 < off["kappa"] < 1
    # Levels that nobody gives keep their distance
    _, two = agreement(np.array([5, 1]), np.array([4, 1]), np.array([0, 1]))
    assert two["kappa"] == pytest.approx(1 - 0.5 / (26 / 4))  # Cohen, 1968


# ------------------------------------------------------------------------------------------------------------
# Lists


LISTS = {
    "a.run": "q1 Q0 p1 1 9.5 x\nq1 Q0 p2 2 3 x\n",
    "a.csv": "query_id,pin_id,rank\nq1,p1,1\nq1,p2,2\n",
    "a.tsv": "Query\tpin_id\tscore\nRed chair \tp1\t2\nred chair\tp2\t1\n",
    "a.jsonl": """{"query_id": "q1", "pin_id": "p1", "score": 2}
        {"query_id": "q1", "pin_id": "p2", "score": 1}""",
}


@pytest.mark.parametrize("name", LISTS)
def test_a_list_of_each_kind(tmp_path, name):
    (tmp_path / name).write_text(LISTS[name])
    table = read_results(tmp_path / name)
    assert table["pin_id"].to_pylist() == ["p1", "p2"] and np.diff(table["score"].to_numpy())[0] < 0
    assert rows_of_queries(table, ["q0", "q1"], ["blue", "red chair"]).tolist() == [1, 1]


WRONG_LISTS = {
    "no.csv": ("query_id,pin_id\nq1,p1\n", "rank or score"),
    "bad.csv": ("query_id,pin_id,rank\nq1,p1,first\n", "1 rows whose rank is no number"),
    "nobody.csv": ("pin_id,rank\np1,1\n", "query_id or query"),
}


@pytest.mark.parametrize("name", WRONG_LISTS)
def test_a_wrong_list_is_one_line(tmp_path, name):
    text, said = WRONG_LISTS[name]
    (tmp_path / name).write_text(text)
    line = stop_line(read_results, tmp_path / name)
    assert said in line and name in line


STRATA = {
    "query_id,stratum,weight\nq1,head,2\nq1,head,2\nzz,tail,9\nq2,,1\n": (
        ["head", "other", "other"],
        [2, 1, 0],
    ),
    "query,stratum\nBlue ,tail\n": (["tail", "other", "other"], [1, 1, 1]),
    "query_id,weight\nq3,4\n": (["all"] * 3, [0, 0, 4]),
}


@pytest.mark.parametrize("text", STRATA)
def test_strata_of_a_table(tmp_path, text):
    """A line a query or a pair, as a queue has it; unknown queries, strata without a name."""
    (tmp_path / "strata.csv").write_text(text)
    queries = pd.DataFrame({"query_id": ["q1", "q2", "q3"], "key": ["blue", "red", "green"]}, [4, 7, 9])
    stratum, weight = strata_of(str(tmp_path / "strata.csv"), queries)
    assert (stratum.tolist(), weight.tolist()) == STRATA[text]


@pytest.mark.parametrize("weight", ["q1,-3", "q1,inf", "zz,1", 'q1,"1,5"'])
def test_weights_that_are_none_are_one_line(tmp_path, weight):
    (tmp_path / "strata.csv").write_text(f"query_id,weight\n{weight}\n")
    queries = pd.DataFrame({"query_id": ["q1"], "key": ["blue"]})
    assert "finite, none below 0, some above" in stop_line(strata_of, str(tmp_path / "strata.csv"), queries)


def test_strata_that_are_nowhere():
    queries = pd.DataFrame({"query_id": ["q1"], "interest": ["garden"]})
    line = stop_line(strata_of, "intrest", queries)
    assert "--strata intrest" in line and "query_id, interest" in line


def test_queries_without_traffic_are_no_group():
    """As those that a table of strata does not have."""
    weight, strata = np.array([1.0, 2.0, 0.0]), np.array(["head", "tail", "other"])
    groups = judge.groups_of(weight, np.array(["en", "en", "de"]), strata)
    assert {name: at.tolist() for name, at in groups.items()} == {
        "all": [True, True, False],
        "head": [True, False, False],
        "tail": [False, True, False],
    }


def test_a_stratum_may_have_the_name_of_another_group():
    language, strata = np.array(["en", "en", "de", "de"]), np.array(["all", "de", "corrected", "all"])
    groups = judge.groups_of(np.ones(4), language, strata)
    assert {name: np.flatnonzero(at).tolist() for name, at in groups.items()} == {
        **{"all": [0, 1, 2, 3], "de": [2, 3], "en": [0, 1]},
        **{"all (stratum)": [0, 3], "corrected (stratum)": [2], "de (stratum)": [1]},
    }
    assert [*judge.groups_of(np.ones(4), language, language)] == ["all", "de", "en"]


# ------------------------------------------------------------------------------------------------------------
# A run


@pytest.fixture(scope="module")
def run(features, models):
    return finished_run(features, models["llama"])


def write_list(run, path, feature, top=8):
    """The labelled evaluation pairs of a run as a result list by a match feature, in a file."""
    rows = pq.read_table(run / "features" / "labelled.parquet", filters=[("split", "=", "eval")])
    queries = pq.read_table(run / "features" / "queries.parquet")["query_id"]
    pins = pq.read_table(run / "features" / "pins.parquet")["pin_id"]
    columns = {"query_id": queries.take(rows["query_index"]), "pin_id": pins.take(rows["pin_index"])}
    pa.csv.write_csv(pa.table({**columns, "score": rows[feature]}), path)
    return path


def test_two_lists_of_a_run(run, tmp_path, capsys):
    lists = [f"{name}={write_list(run, tmp_path / f'{name}.csv', name)}" for name in ("bm25", "text_cosine")]
    argv = ["--run", str(run), "--results", *lists, "--top", "5", "--strata", "interest", "--want", "0.01"]
    judge.main([*argv, "--name", "two"])
    folder, said = run / "judged" / "two", capsys.readouterr().out
    result = json.loads((folder / "metrics.json").read_text(), parse_constant=pytest.fail)
    means = result["means"]
    difference = means["text_cosine - bm25"]["ndcg"]["all"]["value"]
    assert difference == pytest.approx(
        means["text_cosine"]["ndcg"]["all"]["value"] - means["bm25"]["ndcg"]["all"]["value"]
    )
    assert set(result["agreement"]) > {"", "en"} and "judge beside people" in said
    assert "looked up" in said and " 0 by a pass" in said  # 03 has labelled all of these pairs
    pairs = pq.read_table(folder / "pairs.parquet")
    assert {"rank_bm25", "rank_text_cosine", "p5"} <= {*pairs.column_names}
    assert (folder / "differences.png").stat().st_size > 5_000
    judge.main([*argv, "--name", "two"])
    assert "nothing to do" in capsys.readouterr().out
    (tmp_path / "bm25.csv").write_text("query_id,pin_id,rank\nnobody,nothing,1\n")
    assert "no row with a query and a pin of this run" in stop_line(judge.main, [*argv, "--name", "three"])
    said = capsys.readouterr().out
    assert "1 rows of a query or a pin" in said and "'pin_id': 'nothing'" in said
