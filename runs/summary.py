"""What stages 02, 03 and 04 print before and after their work. No method of the paper is in this file."""

from pathlib import Path

import numpy as np
import torch

from common import LEVELS, NUM_LEVELS
from runs.checkpoint import ENOUGH_QUERIES
from runs.export import input_names
from runs.held_out import describe_held_out
from runs.pairs import mean_label
from runs.settings import dtype_name

FINETUNING = {"qlora": "QLoRA (NF4)", "lora": "LoRA", "full": "all weights trained"}


def is_stand_in(model):
    """Is this one of the toy's models, data/toy_models/NAME?"""
    return (Path(model).parent / "figures.json").exists()


def describe_teacher(teacher, finetuning, rows, settings):
    """What is going to be trained, on what. rows: LabelledRows."""
    trainable = sum(p.numel() for p in teacher.parameters() if p.requires_grad)
    print(f"{settings.model}: {teacher.kind}, read out at the {teacher.pooling} token")
    print(f"{FINETUNING[finetuning]}: {trainable:,} weights; {dtype_name(teacher.dtype)}")
    if settings.preset == "toy" and not is_stand_in(settings.model):
        rate = settings.encoder_lr if finetuning == "full" else settings.lr
        print(f"--preset toy, learning rate {rate:g}, is for the toy's stand-in models: try --preset small")
    tokens = f"mean {rows.lengths.mean():.0f}, max {rows.lengths.max()} of {settings.max_tokens}"
    print(f"rows: {len(rows.train):,} train; tokens a row: {tokens}")
    counts = torch.bincount(rows.levels[rows.train], minlength=NUM_LEVELS)
    shares = []
    for level, share in enumerate(100 * counts / len(rows.train), 1):
        shares.append(f"{level} {LEVELS[level]} {share:.0f} %")
    print(f"labels: {', '.join(shares)}")
    describe_held_out(rows)
    if settings.keep == "best" and rows.held_out_queries < ENOUGH_QUERIES:
        print(f"--keep best: {rows.held_out_queries} held-out queries are too few: the last")


def describe_student(student, rows, held_out, settings, device):
    """What is going to be trained, on what. rows: TrainingRows; held_out: its held-out rows."""
    queries = len(np.unique(held_out["query"]))
    few = "" if queries else ": too few queries"
    print(f"{settings.labels}'s labels: {rows.total:,} rows, {len(rows.human):,} human-labelled; {device}")
    print(f"held out: {len(held_out):,} rows of {queries:,} queries{few}")
    if settings.keep == "best" and queries < ENOUGH_QUERIES:
        print(f"the last epoch is kept: under {ENOUGH_QUERIES} queries tell no best one")
    names, sizes = input_names(student.spec), list(student.spec["embeddings"].values())
    for place, size in enumerate(sizes):
        names[place] += f" {size}"
    print(f"inputs: {', '.join(names)}")
    print(f"parameters: {sum(p.numel() for p in student.parameters()):,}")


def describe_labels(counts, paths):
    """What stage 03 has made. counts: rows, those labelled before, passes of the teacher, of this process;
    paths: files of labels."""
    rows, before, passes = counts
    print(f"this process: {rows:,} rows, {before:,} of them labelled before, {passes:,} passes")
    shares = [f"{level}: {share:.0f} %" for level, share in enumerate(100 * mean_label(paths), 1)]
    print(f"mean soft label: {', '.join(shares)}")
