"""Rows of queries that stage 02 does not train on: how the teacher does on them, beside one that knows the
labels' shares alone. No choice rests on them.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from sklearn.metrics import roc_auc_score

from common import NUM_LEVELS, token_batches
from lib.inputs.regression import fit_regression
from lib.stages.terminal import Stop

LOWER = "lower --lr, --encoder-lr, --head-lr, --lora-alpha or --weight-decay"  # of a loss that is not finite


@torch.inference_mode()
def held_out_scores(teacher, rows, accelerator, token_budget):
    """{"held_out_loss" (cross-entropy), "held_out_accuracy", "held_out_auroc_4"} on the held-out rows, each
    process on its share; {} if there are none. AUROC of P(label >= 4); NaN without both kinds."""
    teacher.eval()
    watched = rows.held_out if len(rows.held_out) else rows.train[:64]  # these for a finite loss alone
    mine = watched[accelerator.process_index :: accelerator.num_processes]
    order = mine[np.argsort(rows.lengths[mine], kind="stable")]
    sums = torch.zeros(2, device=accelerator.device, dtype=torch.float64)
    scored = []
    for batch in token_batches(rows.lengths[order], token_budget):
        ids, mask, levels = rows.batch(order[batch], accelerator.device)
        logits = teacher(ids, mask)
        sums[0] += F.cross_entropy(logits, levels, reduction="sum")
        sums[1] += (logits.argmax(1) == levels).sum()
        scored += zip((levels >= 3).tolist(), logits.softmax(1)[:, 3:].sum(1).tolist())
    loss, accuracy = (accelerator.reduce(sums, "sum") / len(watched)).tolist()
    if not math.isfinite(loss):
        raise Stop(f"the loss after the epoch is {loss}: {LOWER}")
    relevant, score = zip(*gather_object(scored))
    if not len(rows.held_out):
        return {}
    auroc = roc_auc_score(relevant, score) if len(set(relevant)) == 2 else math.nan
    return {"held_out_loss": loss, "held_out_accuracy": accuracy, "held_out_auroc_4": float(auroc)}


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
    """Loss, accuracy and AUROC of P(label >= 4) on the held-out rows of a regression of the training rows'
    labels on features x [N, F]."""
    level = rows.levels.numpy() + 1
    regression = fit_regression(x[rows.train], level[rows.train])
    p, level = regression.probabilities(x[rows.held_out]), level[rows.held_out]
    loss = -np.log(p[np.arange(len(p)), level - 1]).mean()
    auroc = roc_auc_score(level >= 4, p[:, 3:].sum(1)) if len(set(level >= 4)) == 2 else math.nan
    return {"loss": loss, "accuracy": (p.argmax(1) + 1 == level).mean(), "AUROC >= 4": auroc}


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
