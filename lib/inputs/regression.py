"""What the match features of a pair alone say of its level: multinomial logistic regression of human labels.
05 measures it, 03 pools it with the teacher, and the student's linear part starts there."""

from typing import NamedTuple

import numpy as np
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression

from common import NUM_LEVELS

NEVER = -20.0  # logit of a level that no row has: the mean of the others is 0


class Regression(NamedTuple):
    """logits = (x - mean) / std @ weight.T + bias, of features x [B, F]; one that is not known (NaN) counts
    as its mean. mean, std [F]; weight [C, F]; bias [C]."""

    mean: np.ndarray
    std: np.ndarray
    weight: np.ndarray
    bias: np.ndarray

    def probabilities(self, x):
        """Match features [B, F] -> probabilities of the levels [B, C]."""
        return softmax(standardized(x, self.mean, self.std) @ self.weight.T + self.bias, axis=1)


def standardized(x, mean, std):
    """Features [B, F] less their mean, over their deviation; 0 where they are not known."""
    return np.nan_to_num((x.astype(np.float64) - mean) / std)


def fit_regression(x, target, moments=None):
    """The Regression of levels, given as probabilities [B, C], on features [B, F], with scikit-learn's
    penalty. moments: mean and std to standardize by (default: those of x)."""
    if moments is None:
        known = np.ma.masked_invalid(x.astype(np.float64))
        std = known.std(axis=0).filled(0)
        moments = known.mean(axis=0).filled(0), np.where(std > 1e-6, std, 1.0)
    weight, bias = np.zeros((NUM_LEVELS, x.shape[1])), np.full(NUM_LEVELS, NEVER)
    used = np.flatnonzero(target.sum(axis=0))
    bias[used] = 0
    if len(used) > 1:
        row, level = np.nonzero(target)
        model = LogisticRegression(max_iter=1_000)
        model.fit(standardized(x, *moments)[row], level, sample_weight=target[row, level])
        if len(used) == 2:  # logit of the second level alone, which a softmax shares out between both
            both = np.array([[-0.5], [0.5]])
            weight[used], bias[used] = both * model.coef_, both[:, 0] * model.intercept_
        else:
            weight[used], bias[used] = model.coef_, model.intercept_
    return Regression(*moments, weight, bias)


def one_hot(level):
    """Human levels [B] in 1..5 -> probabilities [B, C]."""
    return np.eye(NUM_LEVELS)[level - 1]


def stacked(rows, names):
    """Columns of rows (a dict of arrays [B]) side by side: [B, F]."""
    return np.stack([rows[name] for name in names], axis=1)
