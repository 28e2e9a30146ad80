"""Checkpoints of stages 02 and 04. No method of the paper is in this file."""

import torch

from runs.files import whole_file


def save_checkpoint(path, model, optimizer, train_state):
    """Trainable weights, the optimizer's state (or None) and `train_state` (plain values) in one file."""
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    moments = optimizer.state_dict() if optimizer is not None else None
    with whole_file(path) as temporary, open(temporary, "wb") as f:
        torch.save({"weights": weights, "optimizer": moments, "train_state": train_state}, f)


@torch.no_grad()
def load_checkpoint(path, model, optimizer=None):
    """Puts a checkpoint's weights (and moments) in place; returns its train_state."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.copy_(saved["weights"][name])
    if optimizer is not None:
        optimizer.load_state_dict(saved["optimizer"])
    return saved["train_state"]
