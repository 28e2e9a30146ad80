"""What a judge's labels of result lists say: metrics of a list, means with intervals, means corrected by
people's labels, how far the judge agrees with people, how many queries a difference takes.

Wang et al., 2025 (arXiv 2509.03764) measure experiments so; the correction is prediction-powered inference
(Angelopoulos et al., 2023; power tuning: arXiv 2311.01453), on ranking metrics as PRECISE has it (arXiv
2606.05308). Shapes: N pairs, Q queries, K places, H strata, C = 5 levels.
"""

from typing import NamedTuple

import numpy as np
from scipy import stats
from sklearn.metrics import cohen_kappa_score

from common import LEVELS, NUM_LEVELS, RELEVANT, at_least, expected_level

HOW = ("expected", "probable")  # a pair's gain: the mean under its probabilities, or its likeliest level's
MOST = 2.0 ** (NUM_LEVELS - 1) - 1  # gain of level 5
DETECTED = stats.norm.ppf(0.975) + stats.norm.ppf(0.8)  # 5 % of false alarms, 80 % power


def gains(p, how):
    """Probabilities [N, C] -> gain 2^(level - 1) - 1 and relevance (level >= RELEVANT) of each pair [N]. A
    person's label is a probability of 1."""
    if how == "probable":
        p = np.eye(NUM_LEVELS)[p.argmax(axis=1)]
    return p @ (2.0 ** np.arange(NUM_LEVELS) - 1), at_least(p, RELEVANT)


def list_metrics(pairs, judged, gain, relevant):
    """Metrics of a result list: {metric: [Q]}. pairs [Q, K]: numbers of its pairs, best first, -1 where the
    list has ended; judged [Q, K']: all pairs of the query with a label, -1 beyond; gain, relevant [N].

    ndcg: the ideal list is made of the query's judged pairs (Burges et al., 2005); NaN where none has a gain.
    sdcg: scaled DCG, the ideal list is K pins of level 5. precision: share of relevant pins."""
    discount = 1 / np.log2(np.arange(2, pairs.shape[1] + 2))
    dcg = np.where(pairs < 0, 0, gain[pairs]) @ discount
    best = -np.sort(-np.where(judged < 0, 0, gain[judged]), axis=1)[:, : pairs.shape[1]]
    ideal = best @ discount[: best.shape[1]]
    ndcg = np.divide(dcg, ideal, out=np.full(len(pairs), np.nan), where=ideal > 0)
    precision = np.where(pairs < 0, 0, relevant[pairs]).mean(axis=1)
    return {"ndcg": ndcg, "sdcg": dcg / (MOST * discount.sum()), "precision": precision}


class Estimate(NamedTuple):
    """A mean over queries, its standard error, and its 95 % interval."""

    value: float
    error: float
    low: float
    high: float


def estimate(value, error, n):
    """The Estimate of a mean with this standard error over n queries: Student's t, n - 1 degrees."""
    width = error * stats.t.ppf(0.975, n - 1) if n > 1 else np.nan
    return Estimate(*(float(x) for x in (value, error, value - width, value + width)))


def mean(values, weight=None):
    """Mean of values [Q] over queries; weight [Q]: each one's share of the traffic. NaN does not count."""
    known = np.isfinite(values)
    weight = np.ones(known.sum()) if weight is None else weight[known]
    values, n, share = values[known], known.sum(), weight / weight.sum()
    value = share @ values
    return estimate(value, np.sqrt((share**2 @ (values - value) ** 2) * n / max(n - 1, 1)), n)


def corrected_mean(people, judge, others):
    """Power-tuned prediction-powered mean: people's and the judge's values of the same n queries, and the
    judge's of N others. Returns the Estimate, and how much the judge counts (lambda, from 0 to 1).

        theta = lambda mean(others) + mean(people - lambda judge)
        lambda = cov(people, judge) / ((1 + n / N) var(judge and others))        arXiv 2311.01453, example 6.1
    """
    n, more = len(people), len(others)
    variance = np.concatenate([judge, others]).var(ddof=1)
    tuned = np.cov(people, judge)[0, 1] / ((1 + n / more) * variance) if variance > 0 else 0.0
    tuned = float(np.clip(tuned, 0, 1))
    left = people - tuned * judge
    error = np.sqrt(tuned**2 * others.var(ddof=1) / more + left.var(ddof=1) / n)
    return estimate(tuned * others.mean() + left.mean(), error, n), tuned


def queries_as_good(people, error):
    """How many queries judged by people alone give a standard error as small as this."""
    return int(np.ceil(people.var(ddof=1) / max(error, 1e-12) ** 2))


# ------------------------------------------------------------------------------------------------------------
# The judge beside people


def per_query(values, query):
    """Mean of values [N] in each query [Q], in the order of np.unique(query)."""
    _, which = np.unique(query, return_inverse=True)
    return np.bincount(which, values) / np.bincount(which)


def agreement(level, p, query, how):
    """The judge on pairs with a person's label [N]: exact and within one level, quadratic weighted kappa, and
    Kendall's tau and Spearman's rho of the queries' mean gains; NaN where a coefficient does not exist."""
    likeliest, people = p.argmax(axis=1) + 1, np.eye(NUM_LEVELS)[level - 1]
    distance = np.abs(likeliest - level)
    ours, theirs = (per_query(gains(x, how)[0], query) for x in (p, people))
    kappa, several = np.nan, min(np.ptp(ours), np.ptp(theirs)) > 0
    if len(np.union1d(level, likeliest)) > 1:
        kappa = cohen_kappa_score(level, likeliest, labels=[*LEVELS], weights="quadratic")
    return {
        "pairs": len(level),
        "queries": len(ours),
        "exact": float((distance == 0).mean()),
        "within_one": float((distance <= 1).mean()),
        "kappa": float(kappa),
        "tau": float(stats.kendalltau(ours, theirs).statistic) if several else np.nan,
        "rho": float(stats.spearmanr(ours, theirs).statistic) if several else np.nan,
        "mean_level": float(expected_level(p).mean() - level.mean()),  # the judge's less people's
    }


def nearer(level, p, query):
    """The one of HOW whose mean gains of queries lie nearer to people's, and the mean distance of each."""
    theirs = per_query(gains(np.eye(NUM_LEVELS)[level - 1], "probable")[0], query)
    distance = {how: float(np.abs(per_query(gains(p, how)[0], query) - theirs).mean()) for how in HOW}
    return min(HOW, key=distance.get), distance


def trust(level, p, query, language):
    """Which gain is nearer to people's, both distances, and how far the judge agrees with people, overall
    ("") and by language, on pairs with a person's label [N]."""
    how, distance = nearer(level, p, query)
    groups = {"": np.full(len(level), True)} | {name: language == name for name in sorted(set(language))}
    agrees = {name: agreement(level[at], p[at], query[at], how) for name, at in groups.items()}
    return how, distance, agrees


# ------------------------------------------------------------------------------------------------------------
# How many queries


def detectable(deviation, n):
    """The smallest mean difference that n queries detect (two-sided 5 %, 80 % power); its values have this
    standard deviation."""
    return DETECTED * deviation / np.sqrt(n)


def queries_for(deviation, difference):
    """How many queries detect a mean difference."""
    return int(np.ceil((DETECTED * deviation / difference) ** 2))


def allocation(values, stratum, weight, n):
    """How to draw n queries from strata: proportionally to their traffic, or optimally (Neyman, 1934: to
    traffic times standard deviation). values, stratum, weight [Q] -> {stratum: (proportional, optimal)}, and
    what n queries detect so: (proportional, optimal)."""
    names, which = np.unique(stratum, return_inverse=True)
    share = np.bincount(which, weight) / weight.sum()
    deviation = np.array(
        [values[which == h].std(ddof=1) if (which == h).sum() > 1 else 0 for h in range(len(names))]
    )
    product = share * deviation
    optimal = product / product.sum() if product.sum() > 0 else share
    drawn = {str(name): (round(n * a), round(n * b)) for name, a, b in zip(names, share, optimal)}
    errors = np.sqrt(share @ deviation**2), product.sum()
    return drawn, tuple(float(detectable(error, n)) for error in errors)


def power(values, stratum, weight, want, plan):
    """What the queries at hand detect by these differences [Q], how many detect the difference `want`, and
    how to draw `plan` queries from the strata next time."""
    at = np.isfinite(values)
    values, deviation = values[at], float(values[at].std(ddof=1)) if at.sum() > 1 else np.nan
    drawn, detects = allocation(values, stratum[at], weight[at], plan)
    return {
        "queries": len(values),
        "deviation": deviation,
        "detects": float(detectable(deviation, len(values))),
        "queries_for_want": want and queries_for(deviation, want),
        "plan": {"queries": plan, "proportional_optimal": drawn, "detects": detects},
    }
