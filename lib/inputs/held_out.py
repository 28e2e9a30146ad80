"""Rows of queries that stage 02 does not train on: what a teacher has to beat there. They choose nothing."""

import math

import numpy as np
from sklearn.metrics import roc_auc_score

from common import NUM_LEVELS, RELEVANT, at_least
from lib.inputs.regression import fit_regression, one_hot


def scores_of(level, p):
    """Mean of -log p(label), accuracy, and AUROC of P(label >= RELEVANT) of probabilities p [N, C] for labels
    [N] in 1..5. NaN where p is no number; the AUROC without both kinds of labels, too."""
    with np.errstate(divide="ignore"):
        loss = -np.log(p[np.arange(len(p)), level - 1]).mean()
    relevant = level >= RELEVANT
    score = at_least(p, RELEVANT)
    has_auroc = len(set(relevant)) == 2 and np.isfinite(score).all()
    found = {"loss": loss, "accuracy": (p.argmax(1) + 1 == level).mean()}
    found[f"auroc_{RELEVANT}"] = roc_auc_score(relevant, score) if has_auroc else math.nan
    return {name: float(score) for name, score in found.items()}


def prior_scores(rows):
    """On the held-out rows, of one that knows the labels' shares alone."""
    shares = np.bincount(rows.levels[rows.train], minlength=NUM_LEVELS).clip(min=0.5)
    level = rows.levels[rows.held_out].numpy() + 1
    return scores_of(level, np.tile(shares / shares.sum(), (len(level), 1)))


def feature_scores(rows, x):
    """On the held-out rows, of a regression of the training rows' labels on a feature x [N]."""
    level = rows.levels.numpy() + 1
    x = x[:, None]
    target = one_hot(level[rows.train])
    regression = fit_regression(x[rows.train], target)
    return scores_of(level[rows.held_out], regression.probabilities(x[rows.held_out]))


def describe_held_out(rows):
    """What a teacher has to beat on the held-out rows."""
    if not len(rows.held_out):
        print("none held out: too few queries")
        return
    n, queries = len(rows.held_out), rows.held_out_queries
    print(f"held out: {n:,} rows of {queries} queries; there have")
    found = {"the labels' own shares": prior_scores(rows)}
    for name, feature in (("bm25", "bm25"), ("embedding", "text_cosine")):
        found[f"a regression of the labels on {name}"] = feature_scores(rows, rows.match[feature])
    for name, scores in found.items():
        shown = ", ".join(f"{what} {value:.4f}" for what, value in scores.items())
        print(f"  {name}: {shown.replace('_', ' >= ')}")


def warn_if_useless(rows, scores):
    """Two lines if the teacher does not beat the labels' own shares. scores: on the held-out rows."""
    if "held_out_loss" not in scores:
        return
    prior = prior_scores(rows)
    is_right = scores["held_out_accuracy"] > prior["accuracy"]
    if is_right and scores["held_out_loss"] < prior["loss"]:
        return
    wrong, advice = "does not beat", "more epochs, other learning rates, or a better --model?"
    if is_right:
        wrong = "is too sure of itself: right more often than"
        advice = "labels of more queries, or fewer epochs? (stage 05 fits it a temperature)"
    shares = f"the labels' own shares (loss {prior['loss']:.4f}, accuracy {prior['accuracy']:.4f})"
    print(f"warning: the teacher {wrong} {shares}\n{advice}")
