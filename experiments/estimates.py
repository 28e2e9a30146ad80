"""What a judge's labels of result lists say, as in Wang et al., 2025 (arXiv 2509.03764).

The correction is prediction-powered inference (Angelopoulos et al., 2023; power tuning: arXiv 2311.01453), on
ranking metrics as PRECISE has it (arXiv 2606.05308). Shapes: N pairs, Q queries, C = 5 levels.
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
        p = np.eye(NUM_LEVELS)[p.argmax(axis=1)]
    return p @ GAINS, at_least(p, RELEVANT)


class Estimate(NamedTuple):
    """A mean over queries, its standard error, and its 95 % interval."""

    value: float
    error: float
    low: float
    high: float


def estimate(value, variance, n):
    """The Estimate of a mean of this variance over n queries: Student's t, n - 1 degrees."""
    degrees = n - 1
    error = np.sqrt(variance) if degrees > 0 else np.nan  # nobody knows how far one query is off
    width = error * stats.t.ppf(0.975, degrees)
    return Estimate(value, error, value - width, value + width)


def mean(values, weight):
    """Mean of values [Q] over queries; weight [Q]: each one's share of the traffic. A query whose value is
    NaN, or that has no weight, does not count; the mean of none is NaN."""
    known = np.isfinite(values) & (weight > 0)
    values, weight = values[known], weight[known]
    share = weight / weight.sum()
    n = len(values)
    value = share @ values if n else np.nan
    squares = (values - value) ** 2
    return estimate(value, share**2 @ squares * n / max(n - 1, 1), n)


def corrected_mean(people, judge, others):
    """Power-tuned prediction-powered mean: people's and the judge's values of the same n queries, and the
    judge's of N others. Returns the Estimate, how much the judge counts (lambda, from 0 to 1), and how many
    queries judged by people alone give as narrow an interval.

        theta = lambda mean(others) + mean(people - lambda judge)
        lambda = cov(people, judge) / ((1 + n / N) var(judge and others))        arXiv 2311.01453, example 6.1
    """
    n, more = len(people), len(others)
    variance = np.append(judge, others).var(ddof=1)
    tuned = np.cov(people, judge)[0, 1] / (1 + n / more) / (variance or np.inf)
    tuned = np.clip(tuned, 0, 1)
    left = people - tuned * judge
    value = tuned * others.mean() + left.mean()
    variance = tuned**2 * others.var(ddof=1) / more + left.var(ddof=1) / n
    return estimate(value, variance, n), tuned, people.var(ddof=1) / max(variance, 1e-24)


def trust(rows):
    """Which gain is nearer to people's, the mean distance of each over queries, and how far the judge agrees
    with people, overall ("") and by language. rows: with people's labels, of read_labelled()."""
    p, level = rows["teacher"], rows["label"]
    pairs = pd.DataFrame({"query": rows["query"], "level": level, "likeliest": p.argmax(axis=1) + 1})
    pairs["people"] = GAINS[level - 1]
    for how in HOW:
        pairs[how], _ = gains(p, how)
    means = pairs.groupby("query").mean()
    distance = {how: (means[how] - means["people"]).abs().mean() for how in HOW}
    how = min(HOW, key=distance.get)
    agrees = {"": agreement(pairs, how)}
    for language, some in pairs.groupby(rows["language"]):
        agrees[language] = agreement(some, how)
    return how, distance, agrees


def agreement(pairs, how):
    """The judge on pairs with a person's label (a table of trust): exact and within one level, quadratic
    weighted kappa, and Kendall's tau and Spearman's rho of the queries' mean gains; NaN where a
    coefficient does not exist."""
    level, likeliest = pairs["level"], pairs["likeliest"]
    off = (likeliest - level).abs()
    means = pairs.groupby("query")[["people", how]].mean()
    return {
        "pairs": len(pairs),
        "queries": len(means),
        "exact": (off == 0).mean(),
        "within_one": (off <= 1).mean(),
        "kappa": cohen_kappa_score(level, likeliest, labels=[*LEVELS], weights="quadratic"),
        "tau": means.corr("kendall").iloc[0, 1],
        "rho": means.corr("spearman").iloc[0, 1],
    }


def detectable(deviation, n):
    """The smallest mean difference that n queries detect."""
    return DETECTED * deviation / np.sqrt(n)


def power(values, stratum, weight, want, plan):
    """What the queries at hand detect by these differences [Q], how many detect the difference `want` (0: not
    asked), and how to draw `plan` queries from the strata next time: by their traffic, or optimally (Neyman,
    1934: by traffic times standard deviation), and what these detect."""
    queries = pd.DataFrame({"value": values, "weight": weight, "stratum": stratum})
    queries = queries[weight > 0].dropna()
    strata = queries.groupby("stratum").agg({"weight": "sum", "value": "std"}).fillna(0)
    share = strata["weight"] / strata["weight"].sum()
    product = share * strata["value"]
    optimal = (product / product.sum()).fillna(share)
    drawn = pd.DataFrame({"proportional": share, "optimal": optimal})
    variance = drawn.rdiv(product**2, axis=0).sum(min_count=1)  # of the mean, times the queries drawn
    n = len(queries)
    detects = DETECTED * mean(values, weight).error
    return {
        "queries": n,
        "deviation": queries["value"].std(),
        "detects": detects,
        "queries_for_want": want and np.ceil(n * (detects / want) ** 2),
        "plan": (plan * drawn).round().to_dict("index"),
        "plan_detects": detectable(np.sqrt(variance), plan).to_dict(),
    }
