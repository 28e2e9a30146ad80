"""Deals rows out to steps, processes and forward passes.

No method of the paper is in this file: with any batches of the same rows a step has the same gradients.
"""

import hashlib
import os

import numpy as np
from accelerate import Accelerator

from runs.stage import Stop


def start_processes(device):
    """The Accelerator: this process and those that were launched with it, which on CPUs talk over gloo."""
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        launch = "torchrun --nproc_per_node N -- SCRIPT --run RUN"
        raise Stop(f"accelerate launch --cpu starts one process where N were asked for; on CPUs: {launch}")
    return Accelerator(cpu=device.type == "cpu")


def hash_rows(rows, *columns):
    """Hash of rows of token ids (N arrays [T]) in their order, and of further columns [N]."""
    digest = hashlib.blake2b(np.array([len(row) for row in rows], np.int64).tobytes(), digest_size=16)
    for row in rows:
        digest.update(row.tobytes())
    for column in columns:
        digest.update(np.ascontiguousarray(column).tobytes())
    return digest.hexdigest()


def unique_rows(rows):
    """The different rows of token ids in the order of their first appearance, and for each row its number
    among them [N]."""
    numbers, different = {}, []
    which = np.empty(len(rows), np.int64)
    for row, ids in enumerate(rows):
        which[row] = numbers.setdefault(ids.tobytes(), len(numbers))
        if which[row] == len(different):
            different.append(ids)
    return different, which


def epoch_batches(lengths, batch_size, seed, epoch, pool=16):
    """One epoch's batches of row numbers: shuffled, then sorted by length inside pools of `pool` batches, so
    that a batch has little padding, then the batches shuffled. Depends on seed and epoch alone: a resumed run
    sees the same batches."""
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    batches = []
    for start in range(0, len(order), pool * batch_size):
        block = order[start : start + pool * batch_size]
        block = block[np.argsort(lengths[block], kind="stable")]
        batches += [block[i : i + batch_size] for i in range(0, len(block), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def micro_batches(batch, lengths, token_budget, rank, world):
    """This process's part of a batch, cut into forward passes of at most `token_budget` padded tokens; as
    many passes on every process, so that gradients are exchanged in step. A pass may be empty."""
    parts = [batch[r::world] for r in range(world)]

    def fits(rows):
        return len(rows) <= 1 or len(rows) * lengths[rows].max() <= token_budget

    passes = 1
    while not all(fits(rows) for part in parts for rows in np.array_split(part, passes)):
        passes += 1
    return np.array_split(parts[rank], passes)
