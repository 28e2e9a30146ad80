"""What stages 02 and 04 print before and after they train. No method of the paper is in this file."""

from pathlib import Path

import numpy as np
import torch

from common import LEVELS, NUM_LEVELS
from runs.export import input_names
from runs.settings import dtype_name

ENOUGH_QUERIES = 50  # with fewer of them held out, no epoch is chosen by them


def describe_teacher(teacher, finetuning, rows, settings):
    """What is going to be trained, on what."""
    how = {"qlora": "QLoRA (NF4)", "lora": "LoRA", "full": "all weights trained"}[finetuning]
    trainable = sum(p.numel() for p in teacher.parameters() if p.requires_grad)
    print(f"{settings.model}: {teacher.kind}, read out at the {teacher.pooling} token")
    print(f"{how}: {trainable:,} weights; {dtype_name(teacher.dtype)}")
    if settings.preset == "toy" and not (Path(settings.model).parent / "figures.json").exists():
        rate = settings.encoder_lr if finetuning == "full" else settings.lr
        print(f"--preset toy, learning rate {rate:g}, is for the toy's stand-in models: try --preset small")
    print(f"rows: {len(rows.train):,} train; tokens a row: mean {rows.lengths.mean():.0f}, "
          f"max {rows.lengths.max()} of {settings.max_tokens}")  # fmt: skip
    shares = 100 * torch.bincount(rows.levels[rows.train], minlength=NUM_LEVELS) / len(rows.train)
    print("labels: " + ", ".join(f"{n} {LEVELS[n]} {share:.0f} %" for n, share in enumerate(shares, 1)))
    if len(rows.held_out):
        loss, accuracy = rows.prior()
        print(f"held out: {len(rows.held_out):,} rows of {rows.held_out_queries} queries; the labels' own "
              f"shares have loss {loss:.4f}, accuracy {accuracy:.4f} there")  # fmt: skip
    else:
        print("none held out: too few queries")
    if settings.keep == "best" and rows.held_out_queries < ENOUGH_QUERIES:
        print(f"--keep best: {rows.held_out_queries} held-out queries are too few: the last")


def in_words(scores):
    """{"held_out_loss": 0.71234, …} -> "held out loss 0.7123, …"."""
    return ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in scores.items())


def warn_if_useless(rows, scores):
    """A line if the teacher does not beat one that knows the labels' shares alone."""
    if scores.get("held_out_loss") is not None:
        loss, accuracy = rows.prior()
        if scores["held_out_loss"] >= loss or scores["held_out_accuracy"] <= accuracy:
            print(f"warning: the teacher does not beat the labels' own shares (loss {loss:.4f}, accuracy "
                  f"{accuracy:.4f}): more epochs, other learning rates, or a better --model?")  # fmt: skip


def describe_student(student, rows, held_out, settings, device):
    """What is going to be trained, on what. rows: TrainingRows; held_out: its held-out rows."""
    queries = len(np.unique(held_out["query"]))
    few = "" if queries else ": too few queries"
    print(f"{settings.labels}'s labels: {rows.total:,} rows, {len(rows.human):,} human-labelled; {device}")
    print(f"held out: {len(held_out):,} rows of {queries:,} queries{few}")
    if settings.keep == "best" and queries < ENOUGH_QUERIES:
        print(f"the last epoch is kept: under {ENOUGH_QUERIES} queries tell no best one")
    sizes = [f"{source} {size}" for source, size in student.spec["embeddings"].items()]
    print(f"inputs: {', '.join([*sizes, *input_names(student.spec)[len(sizes) :]])}")
    print(f"parameters: {sum(p.numel() for p in student.parameters()):,}")
