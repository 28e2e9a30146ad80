"""The teacher's probabilities pooled with the match features, a logarithmic opinion pool (Genest and Zidek,
1986): softmax(a (log p_teacher - common) + b log p_match).

Ours, not the paper's. p_match is the regression of the human training labels on the match features. `common`
is what the teacher says of every pair, 0 where it tells pairs apart no less than the regression does. Both
weights are fitted on the queries that 02 holds out, on which neither was trained. A teacher that is clearly
better than the regression there stays alone; so it does in languages without training labels where the
regression is far from it: BM25 finds nothing there, or the text encoder does not know the language.
"""

from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax
from scipy.stats import ttest_rel

from lib.inputs.regression import Regression, fit_regression, one_hot, stacked
from lib.stages.files import read_json, write_json

POOL = "pool.json"  # in labels/
SPREAD = 0.25  # standard deviation of a weight in the prior, around those of weights_before()
CLEAR = 0.025  # p-value below which the teacher alone is clearly better than the regression
FAR = 1.5  # times as far from the teacher as where labels are: there the match features mean something else
ENOUGH = 100  # pairs of a language, to tell how far; of fewer labels it is measured, too


class Pool(NamedTuple):
    """teacher, match: the two weights; languages: home_languages() of the human training labels, and what
    widened() adds, all others keep the teacher alone; regression: of the match features `names` [F]; common
    [C]: what the teacher says of every pair, weights_before()."""

    teacher: float
    match: float
    languages: list
    names: list
    regression: Regression
    common: tuple = (0.0,)

    def __call__(self, p, x, language):
        """The teacher's probabilities [B, C], match features [B, F] and languages [B] -> pooled [B, C]."""
        match = self.regression.probabilities(x)
        logits = self.teacher * (log(p) - self.common) + self.match * log(match)
        is_pooled = np.isin(language, self.languages)
        return np.where(is_pooled[:, None], softmax(logits, axis=1), p)

    def widened(self, p, x, language, before=()):
        """The pool for languages without labels, too, where the match features mean the same: there, as mean
        KL(match || teacher), the regression is at most FAR times as far from the teacher as where labels are.
        Of unlabelled pairs, as in a call. before: languages of the pool of a run that this one builds on, by
        which it goes where pairs are too few to tell. Returns also how many times as far, {language: times,
        or None where they are too few}."""
        match = self.regression.probabilities(x)
        distance = (match * (log(match) - log(p))).sum(axis=1)
        home = distance[np.isin(language, self.languages)]
        times_as_far = {}
        near = []
        for other in sorted({*language, *before} - {*self.languages}):
            there = distance[language == other]
            times = None
            is_near = other in before
            if min(len(home), len(there)) >= ENOUGH:
                times = float(there.mean() / home.mean())
                is_near = times <= FAR
            times_as_far[other] = times
            if is_near:
                near.append(other)
        languages = sorted([*self.languages, *near])
        return self._replace(languages=languages), times_as_far


def log(p):
    """The logarithm of probabilities, each at least a millionth."""
    return np.log(np.maximum(p, 1e-6))


def weights_before(p_teacher, p_match):
    """Both weights [2] where no row speaks against them, and what is left out of log p_teacher [C]: a half
    each, and nothing. A teacher that tells the rows less apart than the regression does, as mean
    KL(p || mean p), says of each row mostly what it says of all, and the regression knows that, too. The less
    it tells them apart, the more of it is left out, and the more the regression counts, up to 1. A teacher
    that tells them more apart may be too sure."""
    told = []
    for p in (p_teacher, p_match):
        divergence = p * (log(p) - log(p.mean(axis=0)))
        told.append(divergence.sum() + 1e-6)
    share = min(0.5, told[0] / sum(told))
    common = (1 - 2 * share) * log(p_teacher.mean(axis=0))
    return np.array([0.5, 1 - share]), common


def fit_weights(level, query, p_teacher, p_match):
    """The two weights for which the cross-entropy, averaged within a query and summed over queries, plus the
    Gaussian prior is least; and what is left out of log p_teacher [C]. level, query [B]; probabilities
    [B, C]; at least one row."""
    _, of_query, sizes = np.unique(query, return_inverse=True, return_counts=True)
    rows = np.arange(len(level))
    share = 1 / sizes[of_query]
    start, common = weights_before(p_teacher, p_match)
    log_teacher, log_match = log(p_teacher) - common, log(p_match)

    def loss(weights):
        pooled = log_softmax(weights[0] * log_teacher + weights[1] * log_match, axis=1)
        prior = ((weights - start) ** 2).sum() / (2 * SPREAD**2)
        return prior - share @ pooled[rows, level - 1]

    return minimize(loss, start, bounds=[(0, None)] * 2).x, common


def is_clearly_better(level, query, p, other):
    """Is the cross-entropy of p [B, C], averaged within a query, clearly below that of `other`? By a paired
    t-test over the queries; a single query tells nothing."""
    _, of_query, sizes = np.unique(query, return_inverse=True, return_counts=True)
    rows = np.arange(len(level))
    ours, theirs = (np.bincount(of_query, -log(q[rows, level - 1])) / sizes for q in (p, other))
    return len(sizes) > 1 and bool(ttest_rel(ours, theirs, alternative="less").pvalue < CLEAR)


def read_pool(labels):
    """The Pool in the folder of labels that 03 wrote, or None."""
    path = labels / POOL
    if not path.exists():
        return None
    found = read_json(path)
    regression = Regression(*(np.array(found["regression"][name]) for name in Regression._fields))
    return Pool(**{**found, "regression": regression})


def write_pool(pool, labels):
    """pool.json in a folder of labels."""
    numbers = {name: values.tolist() for name, values in pool.regression._asdict().items()}
    write_json(labels / POOL, {**pool._asdict(), "regression": numbers})


def fit_pool(rows, held_out, names):
    """The Pool of a run, None if the teacher does without. rows: read_labelled()'s training rows; held_out
    [B]: those the teacher was not trained on, at least one; names: of the match features."""
    x, target = stacked(rows, names), one_hot(rows["label"])
    apart = fit_regression(x[~held_out], target[~held_out])
    level, query, p = (rows[name][held_out] for name in ("label", "key", "teacher"))
    p_match = apart.probabilities(x[held_out])
    if is_clearly_better(level, query, p, p_match):
        return None
    weights, common = fit_weights(level, query, p, p_match)
    languages = home_languages(rows["language"])
    return Pool(*weights.tolist(), languages, names, fit_regression(x, target), common.tolist())


def home_languages(language):
    """Those of the rows [B] that have ENOUGH of them, or else most."""
    names, counts = np.unique(language, return_counts=True)
    return names[counts >= min(ENOUGH, counts.max())].tolist()
