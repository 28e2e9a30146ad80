"""A training that a kill does not undo: its checkpoints, its log, the epoch that is kept. Stages 02 and 04.

The last epoch is kept, for the learning rate falls to zero there;
with --keep best the best one, where enough held-out queries tell which that is.
"""

import torch

from lib.stages.files import whole_file
from lib.stages.terminal import Stop

ENOUGH_QUERIES = 50  # with fewer of them held out, no epoch is chosen by them
CHECKPOINT_FILES = ("checkpoint.pt", "best.pt")  # what a finished stage does not need any more


class Checkpoints:
    """Where a training stands, in files of the folder `work`. state: plain values, among them `log` (lines of
    training_log.jsonl) and `kept` (the scores of the epoch that is kept). metric: the score by which the best
    epoch is kept; None: the last one is. writes: is this the process that writes?"""

    def __init__(self, work, model, optimizer, start, metric=None, writes=True):
        """start: the state before the first step; a checkpoint that is there takes its place."""
        self.checkpoint, self.best = (work / name for name in CHECKPOINT_FILES)
        self.model, self.optimizer, self.metric, self.writes = model, optimizer, metric, writes
        self.state = {**start, "kept": None, "log": []}
        self.continues = self.checkpoint.exists()
        if self.continues:
            self.state |= load_checkpoint(self.checkpoint, model, optimizer, self.state.keys())

    def save(self):
        """Writes a checkpoint to continue from."""
        if self.writes:
            save_checkpoint(self.checkpoint, self.model, self.optimizer, self.state)

    def end_epoch(self, scores, **line):
        """Prints and logs the scores of an epoch, and keeps it if it is to be kept. line: what stands before
        them in the log."""
        if self.writes:
            print(", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in scores.items()))
        self.state["log"].append({**line, **scores})
        kept = self.state["kept"]
        if self.metric is None or kept is None or scores[self.metric] > kept[self.metric]:
            self.state["kept"] = scores
            if self.metric and self.writes:
                save_checkpoint(self.best, self.model, None, scores)
        self.save()

    def load_kept(self):
        """Puts the weights of the epoch that is kept into the model."""
        if self.metric:
            load_checkpoint(self.best, self.model)


def chosen_by(metric, settings, held_out_queries):
    """The metric by which the best epoch is chosen; None: the last one is kept."""
    return metric if settings.keep == "best" and held_out_queries >= ENOUGH_QUERIES else None


def save_checkpoint(path, model, optimizer, train_state):
    """Trainable weights, the optimizer's state (or None) and `train_state` (plain values) in one file."""
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    moments = optimizer.state_dict() if optimizer is not None else None
    with whole_file(path) as temporary, open(temporary, "wb") as f:
        torch.save({"weights": weights, "optimizer": moments, "train_state": train_state}, f)


@torch.no_grad()
def load_checkpoint(path, model, optimizer=None, needed=frozenset()):
    """Puts a checkpoint's weights (and moments) in place; returns its train_state. Stop without the `needed`
    values in that."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    if needed - saved["train_state"].keys():
        raise Stop(f"{path}: written by another version of this project; --overwrite begins anew")
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.copy_(saved["weights"][name])
    if optimizer is not None:
        optimizer.load_state_dict(saved["optimizer"])
    return saved["train_state"]
