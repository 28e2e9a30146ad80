"""What stages 02, 03 and 04 print before and after their work."""

import numpy as np
import torch

from common import LEVELS, NUM_LEVELS
from lib.inputs.held_out import describe_held_out
from lib.inputs.inherited import whence
from lib.inputs.pairs import count_labels, read_labels
from lib.results.contract import input_names
from lib.stages.hardware import dtype_name

TOY_WEIGHTS = 10_000_000  # of a larger model the learning rates of --preset toy are too high
FINETUNING = {"qlora": "QLoRA (NF4)", "lora": "LoRA", "full": "all weights trained"}


def count_weights(model, trained=False):
    """The number of a model's weights, or of those that are trained."""
    weights = [p for p in model.parameters() if p.requires_grad or not trained]
    return sum(p.numel() for p in weights)


def describe_teacher(teacher, finetuning, rows, settings):
    """What is going to be trained, on what. rows: LabelledRows."""
    weights = count_weights(teacher, trained=True)
    how = FINETUNING[finetuning]
    print(f"{settings.model}: {teacher.kind}, read out at the {teacher.pooling} token")
    print(f"{how}: {weights:,} weights;", dtype_name(teacher.dtype))
    if settings.preset == "toy" and count_weights(teacher) > TOY_WEIGHTS:
        rate = settings.encoder_lr if finetuning == "full" else settings.lr
        print(f"--preset toy, learning rate {rate:g}, is for tiny models: try --preset small")
    n, lengths = len(rows.train), rows.lengths
    print(f"rows: {n:,} of {rows.train_queries:,} queries train")
    mean, longest = lengths.mean(), lengths.max()
    print(f"tokens a row: mean {mean:.0f}, max {longest} of {settings.max_tokens}")
    levels = rows.levels[rows.train]
    counts = torch.bincount(levels, minlength=NUM_LEVELS)
    print_shares("labels", counts / n)
    describe_held_out(rows)


def print_shares(what, shares):
    """The shares of the levels [C] in percent."""
    named = []
    for level, share in enumerate(shares, 1):
        name = LEVELS[level]
        named.append(f"{level} {name} {100 * share:.0f} %")
    print(f"{what}:", ", ".join(named))


def describe_student(student, rows, held_out, settings, device):
    """What is going to be trained, on what. rows: TrainingRows; held_out: its held-out rows."""
    n = len(rows.human)
    queries = len(np.unique(rows.human["query"]))
    human = f"{n:,} human-labelled, of {queries:,} queries"
    print(f"{settings.labels}'s labels: {rows.total:,} rows, {human}; {device}")
    n = len(held_out)
    queries = len(np.unique(held_out["query"]))
    few = "" if queries else ": too few queries"
    print(f"held out: {n:,} rows of {queries:,} queries{few}")
    names = input_names(student.spec)
    sizes = student.spec["embeddings"].values()
    for place, size in enumerate(sizes):
        names[place] += f" {size}"
    print("inputs:", ", ".join(names))
    weights = count_weights(student)
    print(f"parameters: {weights:,}")


def describe_labelling(about, paths, todo, hardware, processes):
    """What is going to be labelled, by which teacher. about: teacher.json; paths, todo: all shards,
    and those left."""
    fields = ", ".join(about["fields"])
    print(f"teacher: {about['model']}, trained on {fields}")
    print(f"shards: {len(paths)}, of which {len(todo)} to label")
    print(f"{hardware}, {processes} process(es)")


def describe_pool(pool, rows, queries):
    """What 03 has found. pool: None: the teacher does without."""
    if pool is None:
        print("not pooled: on the held-out queries the teacher is clearly better than the match features")
        return
    weights = f"p_teacher^{pool.teacher:.2f} p_match^{pool.match:.2f}"
    print(f"pooled: {weights}, by {rows:,} rows of {queries:,} held-out queries")
    print("only for queries in languages with labels:", *pool.languages)


def describe_labels(paths, table):
    """What stage 03 has made, and where it is from (count_labels). paths: files of labels; table: the run's
    LabelTable."""
    counts = count_labels(paths)
    print(f"labels: {whence(counts)}")
    name = table.path.name
    megabytes = table.path.stat().st_size / 1e6
    print(f"{name}: {table.rows:,} different pairs, {megabytes:.1f} MB")
    labels = np.concatenate([read_labels(path) for path in paths[-10:]])
    print_shares("mean soft label", labels.mean(axis=0))
    return counts
