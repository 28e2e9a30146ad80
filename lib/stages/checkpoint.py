"""A training that a kill does not undo: its checkpoints and its log. Stages 02 and 04. The last epoch is the
one that is kept: the learning rate falls to zero there."""

import torch

from lib.stages.files import whole_file
from lib.stages.terminal import stop_on_error

CHECKPOINT = "checkpoint.pt"  # what a finished stage does not need any more
SEED_STRIDE, STEP_STRIDE = 1_000_003, 1_009  # primes: one number for each (seed, step, process)


class Checkpoints:
    """Where a training stands, in a file of `folder`. state: plain values, among them `log`, the lines of
    training_log.jsonl. writes: is this the process that writes?"""

    def __init__(self, folder, model, optimizer, start, writes=True):
        """start: the state before the first step; a checkpoint that is there takes its place."""
        self.path, self.model, self.optimizer, self.writes = folder / CHECKPOINT, model, optimizer, writes
        self.state = {**start, "log": []}
        self.continues = self.path.exists()
        if self.continues:
            self.state |= load_checkpoint(self.path, model, optimizer, self.state.keys())

    def save(self):
        """Writes a checkpoint to continue from."""
        if self.writes:
            save_checkpoint(self.path, self.model, self.optimizer, self.state)

    def end_epoch(self, scores, **line):
        """Prints and logs the scores of an epoch. line: what stands before them in the log."""
        if self.writes:
            print(", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in scores.items()))
        self.state["log"].append({**line, **scores})
        self.save()


def seed_step(seed, step, process=0):
    """Seeds a training step's dropout, each step of each process by a number of its own: a resumed run equals
    an undisturbed one."""
    torch.manual_seed(seed * SEED_STRIDE + step * STEP_STRIDE + process)


def save_checkpoint(path, model, optimizer, train_state):
    """Trainable weights, the optimizer's state and `train_state` (plain values) in one file."""
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    saved = {"weights": weights, "optimizer": optimizer.state_dict(), "train_state": train_state}
    with whole_file(path) as temporary, stop_on_error(f"{path}: not written", "is the disk full?"):
        torch.save(saved, temporary)  # which reports a full disk in ways of its own


@torch.no_grad()
def load_checkpoint(path, model, optimizer, needed=frozenset()):
    """Puts a checkpoint's weights and moments in place; returns its train_state. Stop without the `needed`
    values in that."""
    with stop_on_error(f"{path}: written by another version of this project", "--overwrite starts again"):
        saved = torch.load(path, map_location="cpu", weights_only=True)
        for name in needed:
            saved["train_state"][name]
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.copy_(saved["weights"][name])
        optimizer.load_state_dict(saved["optimizer"])
    return saved["train_state"]
