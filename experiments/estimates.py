"""What a judge's labels of result lists say: metrics of a list, means with intervals, means corrected by
people's labels, how far the judge agrees with people, which difference so many queries detect.

Wang et al., 2025 (arXiv 2509.03764) measure experiments so; the correction is prediction-powered inference
(Angelopoulos et al., 2023; power tuning: arXiv 2311.01453), on ranking metrics as PRECISE has it (arXiv
2606.05308). Shapes: N pairs, Q queries, C = 5 levels.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats
from sklearn.metrics import cohen_kappa_score

from common import LEVELS, NUM_LEVELS, RELEVANT, at_least

HOW = ("expected", "probable")  # a pair's gain: the mean under its probabilities, or its likeliest level's
GAINS = 2.0 ** np.arange(NUM_LEVELS) - 1
DETECTED = stats.norm.ppf(0.975) + stats.norm.ppf(0.8)  # 5 % of false alarms, 80 % power


def gains(p, how):
    """Probabilities [N, C] -> gain 2^(level - 1) - 1 and relevance (level >= RELEVANT) of each pair [N]."""
    if how == "probable":
        p = certain(p.argmax(axis=1) + 1)
    return p @ GAINS, at_least(p, RELEVANT)


def certain(level):
    """People's labels [N] as probabilities [N, C]."""
    return np.eye(NUM_LEVELS)[level - 1]


def list_metrics(shown, judged, top):
    """Metrics of a result list: a table of ndcg, sdcg, precision by query. shown: the list's pairs, a table
    of query, rank (from 0, below `top`), gain, relevant; judged: query and gain of all pairs with a label.

    ndcg: the ideal list is made of the query's judged pairs (Burges et al., 2005); NaN where none has a gain.
    sdcg: scaled DCG, the ideal list is `top` pins of level 5. precision: share of relevant pins."""
    best = judged.sort_values("gain", ascending=False)
    best["rank"] = best.groupby("query").cumcount()
    found = pd.DataFrame({"dcg": dcg(shown)})
    found["ideal"] = dcg(best[best["rank"] < top])
    relevant = shown.groupby("query")["relevant"].sum()
    found["precision"] = relevant / top
    discount = 1 / np.log2(np.arange(top) + 2)
    found["sdcg"] = found["dcg"] / (GAINS[-1] * discount.sum())
    found["ndcg"] = found["dcg"] / found["ideal"].where(found["ideal"] > 0)
    return found.loc[shown["query"].unique(), ["ndcg", "sdcg", "precision"]]


def dcg(shown):
    """Discounted cumulative gain by query of a table of query, rank (from 0), gain."""
    discounted = shown["gain"] / np.log2(shown["rank"] + 2)
    return discounted.groupby(shown["query"]).sum()


class Estimate(NamedTuple):
    """A mean over queries, its standard error, and its 95 % interval."""

    value: float
    error: float
    low: float
    high: float


def estimate(value, error, n):
    """The Estimate of a mean with this standard error over n queries: Student's t, n - 1 degrees."""
    width = error * stats.t.ppf(0.975, n - 1)  # NaN for one query
    return Estimate(*map(float, (value, error, value - width, value + width)))


def mean(values, weight):
    """Mean of values [Q] over queries; weight [Q]: each one's share of the traffic. NaN does not count."""
    known = np.isfinite(values)
    values, weight = values[known], weight[known]
    n = len(values)
    share = weight / weight.sum()
    value = share @ values
    squares = (values - value) ** 2
    variance = share**2 @ squares
    variance *= n / max(n - 1, 1)
    return estimate(value, np.sqrt(variance), n)


def corrected_mean(people, judge, others):
    """Power-tuned prediction-powered mean: people's and the judge's values of the same n queries, and the
    judge's of N others. Returns the Estimate, and how much the judge counts (lambda, from 0 to 1).

        theta = lambda mean(others) + mean(people - lambda judge)
        lambda = cov(people, judge) / ((1 + n / N) var(judge and others))        arXiv 2311.01453, example 6.1
    """
    n, more = len(people), len(others)
    variance = np.concatenate([judge, others]).var(ddof=1)
    tuned = 0.0
    if variance > 0:
        tuned = np.cov(people, judge)[0, 1] / ((1 + n / more) * variance)
    tuned = float(np.clip(tuned, 0, 1))
    left = people - tuned * judge
    value = tuned * others.mean() + left.mean()
    of_others = tuned**2 * others.var(ddof=1) / more
    of_people = left.var(ddof=1) / n
    return estimate(value, np.sqrt(of_others + of_people), n), tuned


def queries_as_good(people, error):
    """How many queries judged by people alone give a standard error as small as this."""
    needed = people.var(ddof=1) / max(error, 1e-12) ** 2
    return int(np.ceil(needed))


def mean_gains(p, query, how):
    """Mean gain of the pairs [N] of each query [Q]."""
    gain, _ = gains(p, how)
    return pd.Series(gain).groupby(query).mean().to_numpy()


def agreement(level, p, query, how):
    """The judge on pairs with a person's label [N]: exact and within one level, quadratic weighted kappa, and
    Kendall's tau and Spearman's rho of the queries' mean gains; NaN where a coefficient does not exist."""
    likeliest = p.argmax(axis=1) + 1
    distance = np.abs(likeliest - level)
    ours = mean_gains(p, query, how)
    theirs = mean_gains(certain(level), query, how)
    found = {
        "pairs": len(level),
        "queries": len(ours),
        "exact": float((distance == 0).mean()),
        "within_one": float((distance <= 1).mean()),
        "kappa": np.nan,
        "tau": np.nan,
        "rho": np.nan,
    }
    if len(np.union1d(level, likeliest)) > 1:
        kappa = cohen_kappa_score(level, likeliest, labels=[*LEVELS], weights="quadratic")
        found["kappa"] = float(kappa)
    if min(np.ptp(ours), np.ptp(theirs)) > 0:
        found["tau"] = float(stats.kendalltau(ours, theirs).statistic)
        found["rho"] = float(stats.spearmanr(ours, theirs).statistic)
    return found


def trust(level, p, query, language):
    """Which one of HOW gives mean gains of queries nearer to people's, the mean distance of each, and how far
    the judge agrees with people, overall ("") and by language, on pairs with a person's label [N]."""
    theirs = mean_gains(certain(level), query, "probable")
    distance = {}
    for how in HOW:
        ours = mean_gains(p, query, how)
        distance[how] = float(np.abs(ours - theirs).mean())
    how = min(HOW, key=distance.get)
    agrees = {"": agreement(level, p, query, how)}
    for name in sorted(set(language)):
        at = language == name
        agrees[name] = agreement(level[at], p[at], query[at], how)
    return how, distance, agrees


def power(values):
    """The smallest mean difference that so many queries detect (two-sided 5 %, 80 % power) where their
    differences [Q] scatter so; of a smaller one the number of queries grows by the square."""
    values = values[np.isfinite(values)]
    deviation = float(values.std(ddof=1)) if len(values) > 1 else np.nan
    detects = float(DETECTED * deviation / np.sqrt(len(values)))
    return {"queries": len(values), "deviation": deviation, "detects": detects}
