"""The regression on match features against scikit-learn's own pipeline."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lib.inputs.regression import fit_regression, one_hot


def rows(levels, n=600, seed=0):
    """Features of very different size, and levels that depend on them."""
    rng = np.random.default_rng(seed)
    label = rng.choice(levels, n)
    x = rng.normal(size=(n, 3)) + label[:, None] * [1.0, 0.2, 0.0]
    return (x * [1, 30, 0.01]).astype(np.float32), label


@pytest.mark.parametrize("levels", [[1, 2, 3, 4, 5], [1, 3, 5], [1, 5], [2, 3]])
def test_probabilities_are_scikit_learns(levels):
    x, label = rows(levels)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1_000)).fit(x.astype(float), label)
    p = fit_regression(x, one_hot(label)).probabilities(x)
    np.testing.assert_allclose(p[:, np.array(levels) - 1], model.predict_proba(x.astype(float)), atol=1e-4)
    np.testing.assert_allclose(p.sum(1), 1)


def test_one_level_alone():
    x, _ = rows([4])
    assert (fit_regression(x, one_hot(np.full(len(x), 4))).probabilities(x)[:, 3] > 1 - 1e-7).all()


def test_what_is_not_known_counts_as_the_mean():
    x, label = rows([1, 3, 5])
    x[::4, 0], x[:, 2] = np.nan, np.nan  # the last feature of nobody is known
    found = fit_regression(x, one_hot(label))
    assert found.mean[0] == pytest.approx(np.nanmean(x[:, 0].astype(float)), rel=1e-6)
    unknown = found.probabilities(np.array([[np.nan, x[1, 1], np.nan]]))
    known = found.probabilities(np.array([[found.mean[0], x[1, 1], 7.0]]))
    np.testing.assert_allclose(unknown, known)
    assert np.isfinite(found.weight).all() and (found.weight[:, 2] == 0).all()


def test_moments_of_others():
    """Standardized by other rows' moments it is a regression on those numbers."""
    x, label = rows([1, 3, 5])
    mean, std = np.array([2.0, 0.0, 0.0]), np.array([2.0, 10.0, 0.02])
    model = LogisticRegression(max_iter=1_000).fit((x - mean) / std, label)
    p = fit_regression(x, one_hot(label), (mean, std)).probabilities(x)
    np.testing.assert_allclose(p[:, [0, 2, 4]], model.predict_proba((x - mean) / std), atol=1e-4)


def test_soft_targets_are_rows_by_their_share():
    """Probabilities of a level count as so many rows of it."""
    x, label = rows([1, 2, 3, 4, 5], n=200)
    other = np.random.default_rng(1).integers(1, 6, 200)
    soft = fit_regression(x, 0.75 * one_hot(label) + 0.25 * one_hot(other))
    repeated = LogisticRegression(C=0.25, max_iter=1_000)
    z = (x - x.astype(float).mean(0)) / x.astype(float).std(0)
    repeated.fit(np.concatenate([z] * 4), np.concatenate([label] * 3 + [other]))
    np.testing.assert_allclose(soft.probabilities(x), repeated.predict_proba(z), atol=1e-3)
