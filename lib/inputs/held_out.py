"""Rows of queries that stage 02 does not train on: what a teacher has to beat there. They choose nothing."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score

from common import NUM_LEVELS, RELEVANT, at_least
from lib.inputs.regression import fit_regression, one_hot


def prior_scores(rows):
    """Cross-entropy and accuracy on the held-out rows of one that knows the labels' shares alone."""
    shares = torch.bincount(rows.levels[rows.train], minlength=NUM_LEVELS).clamp(min=0.5)
    guess = (shares / shares.sum()).log().expand(len(rows.held_out), -1)
    levels = rows.levels[rows.held_out]
    return F.nll_loss(guess, levels).item(), (guess.argmax(1) == levels).double().mean().item()


def describe_held_out(rows):
    """What a teacher has to beat on the held-out rows."""
    if not len(rows.held_out):
        print("none held out: too few queries")
        return
    loss, accuracy = prior_scores(rows)
    prior = f"the labels' own shares have loss {loss:.4f}, accuracy {accuracy:.4f} there"
    print(f"held out: {len(rows.held_out):,} rows of {rows.held_out_queries} queries; {prior}")
    for name, feature in (("bm25", "bm25"), ("embedding", "text_cosine")):
        scores = untrained_scores(rows, rows.match[feature][:, None])
        shown = ", ".join(f"{what} {value:.4f}" for what, value in scores.items())
        print(f"{name} there, a regression of the labels on it: {shown}")


def untrained_scores(rows, x):
    """Loss, accuracy and AUROC of P(label >= RELEVANT) on the held-out rows: of a regression of the training
    rows' labels on features x [N, F]."""
    level = rows.levels.numpy() + 1
    regression = fit_regression(x[rows.train], one_hot(level[rows.train]))
    p, level = regression.probabilities(x[rows.held_out]), level[rows.held_out]
    loss = -np.log(p[np.arange(len(p)), level - 1]).mean()
    right = (p.argmax(1) + 1 == level).mean()
    auroc = auroc_of_relevant(level, at_least(p, RELEVANT))
    return {"loss": loss, "accuracy": right, f"AUROC >= {RELEVANT}": auroc}


def auroc_of_relevant(level, score):
    """AUROC of a score [N] for labels [N] >= RELEVANT; NaN without both kinds."""
    relevant = np.asarray(level) >= RELEVANT
    return float(roc_auc_score(relevant, score)) if len(set(relevant)) == 2 else math.nan


def warn_if_useless(rows, scores):
    """Two lines if the teacher does not beat one that knows the labels' shares alone, or is right more often
    than that, but so sure of its errors that its loss is higher. scores: on the held-out rows."""
    if "held_out_loss" not in scores:
        return
    loss, accuracy = prior_scores(rows)
    right = scores["held_out_accuracy"] > accuracy
    if right and scores["held_out_loss"] < loss:
        return
    prior = f"the labels' own shares (loss {loss:.4f}, accuracy {accuracy:.4f})"
    if right:
        print(f"warning: the teacher is too sure of itself: right more often than {prior}, at a higher loss")
        print("labels of more queries, or fewer epochs? (stage 05 fits it a temperature)")
    else:
        print(f"warning: the teacher does not beat {prior}")
        print("more epochs, other learning rates, or a better --model?")
