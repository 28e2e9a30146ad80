"""A training that a kill does not undo: its checkpoints and its log. The last epoch is the one that is kept:
the learning rate falls to zero there."""

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
            other = f"{self.path}: written by another version of this project"
            with stop_on_error(other, "--overwrite starts again"), torch.no_grad():
                self.load(torch.load(self.path, map_location="cpu", weights_only=True))

    def load(self, saved):
        """Puts a checkpoint's weights, moments and state in place."""
        self.state = {name: saved["train_state"][name] for name in self.state}
        for name, p in self.trainable():
            p.copy_(saved["weights"][name])
        self.optimizer.load_state_dict(saved["optimizer"])

    def save(self):
        """Writes a checkpoint to continue from: trainable weights, the optimizer's state, and ours."""
        if self.writes:
            weights = {name: p.detach() for name, p in self.trainable()}
            saved = {"weights": weights, "optimizer": self.optimizer.state_dict(), "train_state": self.state}
            with (
                whole_file(self.path) as file,
                stop_on_error(f"{self.path}: not written", "is the disk full?"),
            ):
                torch.save(saved, file)  # which reports a full disk in ways of its own

    def trainable(self):
        """(name, parameter) of the weights that are trained."""
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def end_epoch(self, scores, **line):
        """Prints and logs the scores of an epoch. line: what stands before them in the log."""
        if self.writes:
            print(", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in scores.items()))
        self.state["log"].append({**line, **scores})
        self.save()


def seed_step(seed, step, process=0):
    """Seeds each step's dropout on each process: a resumed run equals an undisturbed one."""
    torch.manual_seed(seed * SEED_STRIDE + step * STEP_STRIDE + process)
