"""What stages 02, 03 and 04 print before and after their work."""

import numpy as np

from common import LEVELS
from lib.inputs.held_out import describe_held_out
from lib.inputs.inherited import whence
from lib.inputs.pairs import count_labels, read_labels
from lib.inputs.regression import one_hot
from lib.results.contract import input_names
from lib.stages.settings import typed

TOY_WEIGHTS = 10_000_000  # of a larger model the learning rates of --preset toy are too high
FINETUNING = {"qlora": "QLoRA (NF4)", "lora": "LoRA", "full": "all weights trained"}
OF_LORA = ("lora-rank", "lora-alpha", "lora-dropout", "lr")  # flags of 02 that are of one way alone
OF_FULL = ("encoder-lr", "layer-decay")


def count_weights(parameters):
    """How many numbers these are."""
    return sum(p.numel() for p in parameters)


def describe_teacher(teacher, finetuning, rows, settings):
    """What is going to be trained, on what. rows: LabelledRows."""
    trained = [p for p in teacher.parameters() if p.requires_grad]
    print(f"{settings.model}: {teacher.kind}, read out at the {teacher.pooling} token")
    how = FINETUNING[finetuning]
    dtype = str(teacher.dtype).removeprefix("torch.")
    weights = count_weights(trained)
    print(f"{how}: {weights:,} weights; {dtype}")
    if idle := typed(settings, *(OF_LORA if finetuning == "full" else OF_FULL)):
        print(f"with --finetuning {finetuning} these do nothing: {idle}")
    if settings.preset == "toy" and count_weights(teacher.parameters()) > TOY_WEIGHTS:
        print("--preset toy is for tiny models, by its learning rates: try --preset small")
    n, lengths = len(rows.train), rows.lengths
    print(f"rows: {n:,} of {rows.train_queries:,} queries train")
    mean, longest = lengths.mean(), lengths.max()
    print(f"tokens a row: mean {mean:.0f}, max {longest} of {settings.max_tokens}")
    print_shares("labels", one_hot(rows.levels.numpy()[rows.train] + 1))
    describe_held_out(rows)


def print_shares(what, p):
    """The mean of probabilities of the levels [N, C] in percent."""
    named, shares = [], 100 * p.mean(axis=0)
    for level, share in enumerate(shares, 1):
        name = LEVELS[level]
        named.append(f"{level} {name} {share:.0f} %")
    print(f"{what}:", ", ".join(named))


def describe_student(student, rows, held_out, settings, device):
    """What is going to be trained, on what. rows: TrainingRows; held_out: its held-out rows."""
    n = len(rows.human)
    queries = rows.count_queries(rows.human)
    human = f"{n:,} human-labelled, of {queries:,} queries"
    print(f"{settings.labels}'s labels: {rows.total:,} rows, {human}; {device}")
    n = len(held_out)
    queries = rows.count_queries(held_out)
    print(f"held out: {n:,} rows of {queries:,} queries")
    print("inputs:", *input_names(student.spec))
    weights = count_weights(student.parameters())
    print(f"parameters: {weights:,}")


def describe_labelling(about, paths, todo, hardware, accelerator):
    """What is going to be labelled. about: teacher.json; paths, todo: all shards, those left."""
    model = about["model"]
    fields = ", ".join(about["fields"])
    accelerator.print(f"teacher: {model}, trained on {fields}")
    accelerator.print(f"shards: {len(paths)}, of which {len(todo)} to label")
    accelerator.print(f"{hardware}, {accelerator.num_processes} process(es)")


def describe_pool(pool, rows, queries):
    """What 03 has found. pool: None: the teacher does without."""
    if pool is None:
        print("not pooled: on the held-out queries the teacher is clearly better than the match features")
        return
    weights = f"p_teacher^{pool.teacher:.2f} p_match^{pool.match:.2f}"
    print(f"pooled: {weights}, by {rows:,} rows of {queries:,} held-out queries")


def describe_languages(pool, times_as_far):
    """In which languages 03 pools, and why. times_as_far: of Pool.widened()."""
    print("only for queries in:", *pool.languages)
    for language, times in times_as_far.items():
        how_far = "too few pairs to tell how far its match features are from the teacher"
        how_far += ": as in the run before" * (language in pool.languages)
        if times is not None:
            how_far = f"its match features are {times:.2f} times as far from the teacher"
        print(f"  {language} has no training labels, or few; {how_far}")


def describe_labels(paths, table):
    """What 03 has made, and where it is from. paths: files of labels; table: the LabelTable."""
    counts = count_labels(paths)
    print("labels:", whence(counts))
    name = table.path.name
    megabytes = table.path.stat().st_size / 1e6
    print(f"{name}: {table.rows:,} different pairs, {megabytes:.1f} MB")
    total = sum(read_labels(path).sum(axis=0, dtype=np.float64) for path in paths)
    print_shares("mean soft label", total[None] / counts["rows"])
    return counts
