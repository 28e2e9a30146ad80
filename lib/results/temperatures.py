"""Probabilities to be trusted: one temperature a trained system (Guo et al., 2017), fitted on training
queries that the system was not trained on.

Ours: the paper ranks by scores, and needs no calibrated ones.
"""

import numpy as np
import torch
from scipy.optimize import minimize_scalar

from common import at_temperature
from lib.inputs.inherited import students_of
from lib.tables.splits import in_hash_split

ENOUGH_QUERIES = 15  # of fewer none is fitted: experiments/RESULTS.md, "Temperatures of few queries"


def fit_temperature(y, p):
    """The temperature that makes labels [B] most probable (Guo et al., 2017, section 4.2)."""
    p, rows = torch.from_numpy(p).clamp(min=1e-12), np.arange(len(y))

    def loss(log_temperature):
        scaled = at_temperature(p, np.exp(log_temperature))
        return -scaled[rows, y - 1].log().mean().item()

    return float(np.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded").x))


def fit_temperatures(read, train, run, system):
    """{trained system: its temperature, and on how many rows of how many queries it was fitted}, of those
    whose stage has held queries out; of fewer than ENOUGH_QUERIES it is 1. read: {folder: stage.json};
    train: columns of the human training rows; system(run, name, rows): probabilities [B, C] and scores of a
    system on some of them."""
    found = {}
    for name in [*students_of(read), "teacher"]:
        split = read.get(name, {}).get("held_out")
        held_out = in_hash_split(train["key"], **split) if split else np.zeros(1, bool)
        if held_out.any():
            rows = {column: values[held_out] for column, values in train.items()}
            p, _ = system(run, name, rows)
            queries = len(np.unique(rows["query_index"]))
            temperature = fit_temperature(rows["label"], p) if queries >= ENOUGH_QUERIES else 1.0
            size = {"rows": len(rows["label"]), "queries": queries}
            found[name] = {"temperature": round(temperature, 4), **size}
    return found
