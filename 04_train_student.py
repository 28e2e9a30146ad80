"""Stage 04: soft labels -> the student, a feed-forward network on precomputed features, cheap to serve.

Paper: "Distill LLM into Servable Student Model". The student learns the teacher's probabilities of the five
levels on unlabelled impressions (knowledge distillation). The paper does not give the loss; ours is Hinton et
al., 2015: KL divergence at temperature T, times T squared.

Reads   RUN/features/, RUN/labels/ (not with --labels human)
Writes  RUN/student/    model.safetensors, features.json (inputs, normalization), training_log.jsonl

Toy     python 04_train_student.py
        python 04_train_student.py --labels human     the same network on the human labels alone
        python 04_train_student.py --rows 6000 --name student_6000
Paper   python 04_train_student.py --preset paper --run /runs/search

Shapes: B rows, F match features, C = 5 levels, D embedding size, K categories.
"""

import math
import re
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pyarrow.parquet as pq
import torch

from common import MATCH_FEATURES, NUM_LEVELS, Student, StudentInputs, in_hash_split, linear_warmup_decay
from runs.stage import Count, Device, NonNegative, Positive, Share, Size, StageSettings, parse, pick_device

# isort: split
from runs.stage import Stage, Stop, load_checkpoint, progress_bar, require_finished, run_main

# isort: split
from runs.stage import save_checkpoint, write_jsonl


@dataclass(frozen=True)
class Settings(StageSettings):
    """What stage 04 is told."""

    labels: Literal["teacher", "human"] = "teacher"  # soft labels of impressions, or human training labels
    name: str | None = None  # output folder below RUN (default: student, or student_human_labels)
    rows: Count | None = None  # train on a random N impressions (default: all)
    languages: tuple[str, ...] = ()  # train on rows of queries in these languages only (default: all)

    hidden: tuple[Count, ...] = (256, 128)  # widths of the hidden layers
    category_dim: Count = 8  # size of the embedding of a categorical column
    dropout: Share = 0.1  # share of the hidden units left out in a training step
    temperature: Positive = 1.0  # softens teacher and student alike; 1 leaves the probabilities as they are

    epochs: Count = 20  # passes over the training rows
    batch_size: Count = 256  # rows a step
    lr: Positive = 1e-3  # peak learning rate
    weight_decay: NonNegative = 1e-4  # of AdamW
    warmup: Share = 0.05  # share of training with a rising learning rate; then it falls linearly to 0
    shuffle_window: Count = 4  # shards shuffled together; their rows are held in memory
    checkpoint_steps: Count = 500  # steps between two checkpoints to resume from
    device: Device = "auto"  # where the student is trained
    seed: Size = 0  # of weights, held-out queries, row order and dropout


TOY = Settings()
PAPER = replace(
    TOY,
    hidden=(1024, 512, 256),  # not stated in the paper; our choice
    category_dim=32,  # not stated; our choice
    temperature=1.0,  # not stated; at 1 the gradient is that of soft cross-entropy
    epochs=3,  # not stated; our choice
    batch_size=4_096,  # not stated; our choice
    weight_decay=1e-5,  # not stated; our choice
    warmup=0.01,  # not stated; our choice
    shuffle_window=8,  # our choice
    checkpoint_steps=2_000,  # our choice
)
PRESETS = {"toy": TOY, "small": TOY, "paper": PAPER}
HELD_OUT = {"teacher": 0.05, "human": 0.1}  # share of the queries that choose the epoch
HELD_OUT_ROWS = 100_000  # about, at most
READS = ("*.parquet", "*_embedding.npy")  # files of features/ and labels/


# ------------------------------------------------------------------------------------------------------------
# The loss


def soften(p, temperature):
    """Probabilities [B, C] at temperature T: p^(1/T), normalized, as a softmax over logits / T gives them."""
    return (p.log() / temperature).softmax(dim=1)


def distillation_loss(logits, soft_labels, temperature=1.0):
    """KL(teacher || student), mean over rows: student logits [B, C], teacher probabilities [B, C] -> scalar.

    Both are softened by the temperature T, and the loss is multiplied by T^2 so that its gradient keeps its
    size (Hinton et al., 2015, section 2). With one-hot labels and T = 1 this is cross-entropy."""
    target = soft_labels if temperature == 1 else soften(soft_labels, temperature)
    log_student = (logits / temperature).log_softmax(dim=1)
    negative_entropy = torch.special.xlogy(target, target)
    return temperature**2 * (negative_entropy - target * log_student).sum(dim=1).mean()


# ------------------------------------------------------------------------------------------------------------
# Rows

ROW = np.dtype(
    [
        ("query", np.int32),  # row of queries.parquet
        ("pin", np.int32),  # row of pins.parquet
        ("match", np.float32, len(MATCH_FEATURES)),
        ("target", np.float32, NUM_LEVELS),  # probability of each level
    ]
)


class TrainingRows:
    """Streams training rows. A shard is read whole, `shuffle_window` shards at a time: memory does not grow
    with their number.

    Shards come in random order, rows are shuffled inside a window. Two rows of shards in different windows
    never meet in a batch; with impressions in log order that costs little as long as a window spans many
    queries."""

    def __init__(self, settings, features, labels):
        self.settings, self.features = settings, features
        queries = pq.read_table(features / "queries.parquet", columns=["query_id", "language"])
        ids, languages = queries["query_id"].to_pylist(), queries["language"].to_pylist()
        self.is_held_out = in_hash_split(ids, HELD_OUT[settings.labels], f"student:{settings.seed}")
        wanted = set(settings.languages or languages)
        self.is_wanted = np.array([language in wanted for language in languages])
        self.shards = [(features / "labelled.parquet", None)]
        if settings.labels == "teacher":
            pairs = sorted((features / "impressions").glob("part-*.parquet"))
            self.shards = [(path, labels / "impressions" / path.name) for path in pairs]
        self.counts = []  # training rows of each shard; survey() fills it

    def read(self, shard):
        """All rows of a shard, and two masks of them: to train on, held out."""
        path, label_path = self.shards[shard]
        table = pq.read_table(path)
        rows = np.empty(len(table), ROW)
        rows["query"], rows["pin"] = table["query_index"].to_numpy(), table["pin_index"].to_numpy()
        for column, name in enumerate(MATCH_FEATURES):
            rows["match"][:, column] = table[name].to_numpy()
        used = self.is_wanted[rows["query"]]
        if label_path is None:
            rows["target"] = np.eye(NUM_LEVELS)[table["label"].to_numpy() - 1]
            used &= table["split"].to_numpy() == "train"
        else:
            labels = pq.read_table(label_path)
            if len(labels) != len(rows):
                sizes = f"{label_path} has {len(labels):,} rows, {path} {len(rows):,}"
                raise Stop(f"{sizes}: run 03_label.py --overwrite")
            for level in range(NUM_LEVELS):
                rows["target"][:, level] = labels[f"p{level + 1}"].to_numpy()
        held_out = self.is_held_out[rows["query"]]
        return rows, used & ~held_out, used & held_out

    def survey(self):
        """One pass: counts the training rows of each shard and deals --rows to them. Returns mean and
        standard deviation [F] of the match features, and the held-out rows: of every shard at most its share
        of HELD_OUT_ROWS, for logs change over time."""
        counts, total, squares, held_out = [], 0.0, 0.0, []
        for shard in progress_bar(iterable=range(len(self.shards)), desc="survey", unit=" shards"):
            rows, train, held = self.read(shard)
            match = rows["match"][train].astype(np.float64)
            counts.append(len(match))
            total, squares = total + match.sum(0), squares + (match**2).sum(0)
            held_out.append(rows[held][: math.ceil(HELD_OUT_ROWS / len(self.shards))])
        n = sum(counts)
        if n == 0:
            wanted = " ".join(["", "for --languages", *self.settings.languages])
            raise Stop(f"no rows to train on in {self.features}" + wanted * bool(self.settings.languages))
        if self.settings.rows and self.settings.rows < n:
            dealer = np.random.default_rng([self.settings.seed, 1])
            counts = dealer.multivariate_hypergeometric(counts, self.settings.rows, method="marginals")
        self.counts = [int(count) for count in counts]
        mean = total / n
        std = np.sqrt(np.maximum(squares / n - mean**2, 0))
        return mean, np.where(std > 1e-6, std, 1.0), np.concatenate(held_out)

    @property
    def total(self):
        """Training rows of an epoch."""
        return sum(self.counts)

    def training_rows(self, shard):
        """The training rows of a shard, --rows applied: the same in every epoch."""
        rows, train, _ = self.read(shard)
        chosen = np.flatnonzero(train)
        if self.counts[shard] < len(chosen):
            chooser = np.random.default_rng([self.settings.seed, 2, shard])
            chosen = np.sort(chooser.permutation(chosen)[: self.counts[shard]])
        return rows[chosen]

    def read_window(self, shards):
        """The training rows of some shards, one after another."""
        window = np.empty(sum(self.counts[shard] for shard in shards), ROW)
        start = 0
        for shard in shards:
            window[start : start + self.counts[shard]] = self.training_rows(shard)
            start += self.counts[shard]
        return window

    def batches(self, epoch, skip=0):
        """One epoch's batches of rows, without the first `skip`."""
        size = self.settings.batch_size
        rng = np.random.default_rng([self.settings.seed, 3, epoch])
        order = rng.permutation(len(self.shards))
        for start in range(0, len(order), self.settings.shuffle_window):
            shards = order[start : start + self.settings.shuffle_window]
            shuffled = rng.permutation(sum(self.counts[shard] for shard in shards))
            first, skip = skip * size, max(skip - math.ceil(len(shuffled) / size), 0)
            if first < len(shuffled):
                window = None  # the one before is not held while this one is read
                window = self.read_window(shards)
                for at in range(first, len(shuffled), size):
                    yield window[shuffled[at : at + size]]


def ahead(batches, depth=4):
    """What a generator yields, made by a thread up to `depth` items before its use (while NumPy gathers,
    other threads run)."""
    with ThreadPoolExecutor(1) as thread:
        waiting = deque(thread.submit(next, batches, None) for _ in range(depth))
        while (batch := waiting.popleft().result()) is not None:
            waiting.append(thread.submit(next, batches, None))
            yield batch


# ------------------------------------------------------------------------------------------------------------
# Training


def tensors(inputs, rows, device):
    """Rows -> embeddings [B, sum of D], categories [B, K], match features [B, F], target [B, C]."""
    columns = [*inputs.gather(rows["query"], rows["pin"])]
    columns += [torch.from_numpy(np.ascontiguousarray(rows[name])) for name in ("match", "target")]
    return [column.to(device, non_blocking=True) for column in columns]


@torch.inference_mode()
def held_out_scores(student, inputs, held_out, device, chunk=16_384):
    """KL(target || student) at temperature 1 and agreement of the most probable level, over held-out rows."""
    student.eval()
    loss = right = 0.0
    for start in range(0, len(held_out), chunk):
        *features, target = tensors(inputs, held_out[start : start + chunk], device)
        logits = student(*features)
        loss += distillation_loss(logits, target).item() * len(target)
        right += (logits.argmax(1) == target.argmax(1)).sum().item()
    return loss / len(held_out), right / len(held_out)


def train(student, rows, inputs, held_out, settings, device, work):
    """The training loop. Leaves the weights of the epoch with the lowest held-out KL in `student`; returns
    its log and that epoch. Checkpoints go into the folder `work`."""
    optimizer = torch.optim.AdamW(student.parameters(), settings.lr, weight_decay=settings.weight_decay)
    train_state = {"epoch": 0, "step": 0, "rows": 0, "best": None, "log": []}
    checkpoint = work / "checkpoint.pt"
    if checkpoint.exists():
        train_state = load_checkpoint(checkpoint, student, optimizer)
        print(f"continuing in epoch {train_state['epoch'] + 1}, after {train_state['rows']:,} rows")
    planned = rows.total * settings.epochs
    bar = progress_bar(total=planned, initial=train_state["rows"], desc="student", unit=" rows")
    while train_state["epoch"] < settings.epochs:
        epoch = train_state["epoch"]
        batches = rows.batches(epoch, skip=train_state["step"])
        for *features, target in ahead(tensors(inputs, batch, device) for batch in batches):
            progress = train_state["rows"] / planned
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * linear_warmup_decay(progress, settings.warmup)
            # A seed of its own for every step's dropout: a resumed run equals an undisturbed one.
            torch.manual_seed((settings.seed * 1_009 + epoch) * 10_000_019 + train_state["step"])
            student.train()
            loss = distillation_loss(student(*features), target, settings.temperature)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            train_state["step"] += 1
            train_state["rows"] += len(target)
            bar.update(len(target))
            if train_state["step"] % 50 == 0:
                bar.set_postfix(loss=f"{finite(loss.item(), epoch):.4f}")
            if train_state["step"] % settings.checkpoint_steps == 0:
                save_checkpoint(checkpoint, student, optimizer, train_state)
        kl, agreement = held_out_scores(student, inputs, held_out, device)
        scores = {"epoch": epoch + 1, "kl": finite(kl, epoch), "agreement": agreement}
        train_state["log"].append({"rows": train_state["rows"], **scores})
        if train_state["best"] is None or kl < train_state["best"]["kl"]:
            train_state["best"] = scores
            save_checkpoint(work / "best.pt", student, None, scores)
        train_state |= {"epoch": epoch + 1, "step": 0}
        save_checkpoint(checkpoint, student, optimizer, train_state)
    bar.close()
    load_checkpoint(work / "best.pt", student)
    return train_state


def finite(loss, epoch):
    """The loss itself; Stop if it is not a finite number."""
    if not math.isfinite(loss):
        raise Stop(f"the loss is not finite in epoch {epoch + 1}: lower --lr")
    return loss


# ------------------------------------------------------------------------------------------------------------


def inherited(settings):
    """What is read, checked: {"features": its stage.json, "labels": its stage.json}."""
    run = settings.run
    read = {"features": require_finished(run / "features", f"01_build_features.py --run {run}", READS)}
    if settings.labels == "teacher":
        command = f"03_label.py --run {run}"
        read["labels"] = require_finished(run / "labels", command, READS)
        if read["labels"]["inputs"]["features"] != read["features"]["identity"]:
            raise Stop(f"{run / 'labels'}: of other features than those here; python {command} --overwrite")
        if read["labels"]["arguments"].get("only_labelled"):
            raise Stop(f"{run / 'labels'}: made with --only-labelled; python {command} --overwrite")
    return read


def main(argv=None):
    # 1. Settings, what is inherited, and the folder
    settings = parse(PRESETS, argv, __doc__)
    name = settings.name or {"teacher": "student", "human": "student_human_labels"}[settings.labels]
    if not re.fullmatch(r"student[\w.+-]*", name):
        raise Stop(f"--name {name}: one folder's name, that begins with 'student'")
    settings = replace(settings, name=name)
    device, features = pick_device(settings.device), settings.run / "features"
    read = inherited(settings)
    identities = {folder: about["identity"] for folder, about in read.items()}
    stage = Stage(settings.run / name, settings, identities)
    if stage.done:
        return

    # 2. Rows and inputs
    rows = TrainingRows(settings, features, settings.run / "labels")
    mean, std, held_out = rows.survey()
    if not len(held_out):
        raise Stop(f"no query of {features} is held out: more queries are needed")
    inputs = StudentInputs(features).to(device)

    # 3. The network
    spec = {
        "embeddings": inputs.dims,
        "categories": inputs.categories,
        "category_dim": settings.category_dim,
        "match": list(MATCH_FEATURES),
        "mean": mean.tolist(),
        "std": std.tolist(),
        "hidden": list(settings.hidden),
        "dropout": settings.dropout,
    }
    torch.manual_seed(settings.seed)
    student = Student(spec).to(device)
    sizes = ", ".join(f"{source} {size}" for source, size in inputs.dims.items())
    print(f"{settings.labels}'s labels: {rows.total:,} rows, {len(held_out):,} held out; {device}")
    print(f"inputs: {sizes}, {len(inputs.categories)} categories, {len(mean)} match features")
    print(f"parameters: {sum(p.numel() for p in student.parameters()):,}")

    # 4. Distillation
    train_state = train(student, rows, inputs, held_out, settings, device, stage.work)

    # 5. Save
    student.save(stage.work)
    write_jsonl(stage.work / "training_log.jsonl", train_state["log"])
    best, right = train_state["best"], 100 * train_state["best"]["agreement"]
    print(f"kept epoch {best['epoch']}: held-out KL {best['kl']:.4f}, same most probable level {right:.1f} %")
    stage.discard("checkpoint.pt", "best.pt")
    stage.finish(rows={"train": rows.total, "held_out": len(held_out)}, best=best)


if __name__ == "__main__":
    run_main(main)
