"""What a judge's labels of result lists say: metrics of a list, means with intervals, means corrected by
people's labels, how far the judge agrees with people, how many queries a difference takes.

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
    width = np.nan
    if n > 1:
        width = error * stats.t.ppf(0.975, n - 1)
    return Estimate(*map(float, (value, error, value - width, value + width)))


def mean(values, weight=None):
    """Mean of values [Q] over queries; weight [Q]: each one's share of the traffic. NaN does not count."""
    known = np.isfinite(values)
    if weight is None:
        weight = np.ones(len(values))
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
    found = {"pairs": len(level), "queries": len(ours)}
    found |= {"kappa": np.nan, "tau": np.nan, "rho": np.nan}
    found["exact"] = float((distance == 0).mean())
    found["within_one"] = float((distance <= 1).mean())
    if len(np.union1d(level, likeliest)) > 1:
        levels = [*LEVELS]
        kappa = cohen_kappa_score(level, likeliest, labels=levels, weights="quadratic")
        found["kappa"] = float(kappa)
    if min(np.ptp(ours), np.ptp(theirs)) > 0:
        found["tau"] = float(stats.kendalltau(ours, theirs).statistic)
        found["rho"] = float(stats.spearmanr(ours, theirs).statistic)
    return found


def nearer(level, p, query):
    """The one of HOW whose mean gains of queries lie nearer to people's, and the mean distance of each."""
    theirs = mean_gains(certain(level), query, "probable")
    distance = {}
    for how in HOW:
        ours = mean_gains(p, query, how)
        distance[how] = float(np.abs(ours - theirs).mean())
    return min(HOW, key=distance.get), distance


def trust(level, p, query, language):
    """Which gain is nearer to people's, both distances, and how far the judge agrees with people, overall
    ("") and by language, on pairs with a person's label [N]."""
    how, distance = nearer(level, p, query)
    agrees = {"": agreement(level, p, query, how)}
    for name in sorted(set(language)):
        at = language == name
        agrees[name] = agreement(level[at], p[at], query[at], how)
    return how, distance, agrees


def detectable(deviation, n):
    """The smallest mean difference that n queries detect (two-sided 5 %, 80 % power); its values have this
    standard deviation."""
    return float(DETECTED * deviation / np.sqrt(n))


def queries_for(deviation, difference):
    """How many queries detect a mean difference."""
    needed = (DETECTED * deviation / difference) ** 2
    return int(np.ceil(needed))


def allocation(values, stratum, weight, n):
    """How to draw n queries from strata: proportionally to their traffic, or optimally (Neyman, 1934: to
    traffic times standard deviation). values, stratum, weight [Q] -> {stratum: (proportional, optimal)}, and
    what n queries detect so: (proportional, optimal)."""
    share = pd.Series(weight).groupby(stratum).sum() / weight.sum()
    deviation = pd.Series(values).groupby(stratum).std().fillna(0)  # of one query: 0
    product = share * deviation
    optimal = share
    if product.sum() > 0:
        optimal = product / product.sum()
    drawn = {}
    for name in share.index:
        drawn[str(name)] = round(n * share[name]), round(n * optimal[name])
    proportional = np.sqrt(share @ deviation**2)
    return drawn, (detectable(proportional, n), detectable(product.sum(), n))


def power(values, stratum, weight, want, plan):
    """What the queries at hand detect by these differences [Q], how many detect the difference `want`, and
    how to draw `plan` queries from the strata next time."""
    at = np.isfinite(values)
    values = values[at]
    deviation = float(values.std(ddof=1)) if len(values) > 1 else np.nan
    drawn, detects = allocation(values, stratum[at], weight[at], plan)
    return {
        "queries": len(values),
        "deviation": deviation,
        "detects": detectable(deviation, len(values)),
        "queries_for_want": want and queries_for(deviation, want),
        "plan": {"queries": plan, "proportional_optimal": drawn, "detects": detects},
    }
