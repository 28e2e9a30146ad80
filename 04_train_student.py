"""Stage 04: soft labels -> the student, a feed-forward network on precomputed features, cheap to serve.

Paper: "Distill LLM into Servable Student Model". The student learns the teacher's probabilities of the five
levels on unlabelled impressions (knowledge distillation). The paper does not give the loss; ours is Hinton et
al., 2015: KL divergence at temperature T, times T squared.

    1  settings; labels and features must belong together
    2  rows: impressions with soft labels; human-labelled ones with the mean of both labels (ours)
    3  the network, which starts at a regression of the human-labelled rows on the match features (ours)
    4  distillation; scores on held-out queries after each epoch
    5  the student is saved, also as ONNX

Reads   RUN/features/, RUN/labels/ (not with --labels human)
Writes  RUN/student/    model.safetensors, training_log.jsonl; to serve it: student.onnx,
                        student_one_query.onnx, features.json (their inputs, how each is computed)

Toy     python 04_train_student.py
        python 04_train_student.py --labels human     the same network on the human labels alone
        python 04_train_student.py --rows 6000 --name student_6000
Paper   python 04_train_student.py --preset paper --run /runs/search

Shapes: B rows, F match features, C = 5 levels, D embedding size, K categories.
"""

import copy
import re
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from common import Student, at_temperature, linear_warmup_decay
from lib.inputs.inherited import require_languages, require_pairs, whose_labels
from lib.inputs.pairs import PairFiles, TrainingRows
from lib.inputs.pool import POOL
from lib.inputs.regression import fit_regression, one_hot
from lib.inputs.student_inputs import StudentInputs
from lib.results import report, summary
from lib.results.contract import contract
from lib.results.export import CHECKED_ROWS, save_onnx
from lib.stages.checkpoint import CHECKPOINT, Checkpoints
from lib.stages.files import write_jsonl
from lib.stages.hardware import pick_device
from lib.stages.settings import (
    Count,
    DeviceSettings,
    NonNegative,
    Positive,
    Share,
    Size,
    Temperature,
    Width,
    parse,
    refuse,
    typed,
)
from lib.stages.stage import Stage
from lib.stages.streams import ahead
from lib.stages.terminal import Stop, progress_bar, run_main
from lib.tables.splits import hash_position


@dataclass(frozen=True)
class Settings(DeviceSettings):
    """Settings of stage 04."""

    labels: Literal["teacher", "human"] = "teacher"  # soft labels of impressions, or human training labels
    name: str | None = None  # output folder below RUN (default: student, or student_human_labels)
    rows: Count | None = None  # train on a random N impressions, or human labels (default: all)
    # half, with --labels teacher (ours): human-labelled rows too, with the mean of people's and the teacher's
    # labels; none: neither these nor the regression of them, at which the student starts
    human_rows: Literal["none", "half"] = "half"
    languages: tuple[str, ...] = ()  # train on rows of queries in these languages only (default: all)

    hidden: tuple[Width, ...] = (256, 128)  # widths of the hidden layers
    category_dim: Width = 8  # size of the embedding of a categorical column
    input_dropout: Share | None = None  # share of the embeddings' numbers left out in a training step
    dropout: Share | None = None  # likewise of the hidden units (default of both: by the rows, DROPOUTS)
    temperature: Temperature = 1.0  # softens teacher and student alike; at 1 probabilities stay as they are

    epochs: Count = 20  # passes over the training rows
    batch_size: Count = 256  # rows a step
    lr: Positive = 1e-3  # peak learning rate
    weight_decay: NonNegative = 1e-4  # of AdamW
    warmup: Share = 0.05  # share of training with a rising learning rate; then it falls linearly to 0
    shuffle_window: Count = 4  # shards shuffled together; their rows are held in memory
    checkpoint_steps: Count = 500  # steps between two checkpoints to resume from
    seed: Size = 0  # of weights, held-out queries, row order and dropout


TOY = Settings()
# Not stated in the paper, our choice; at temperature 1 the gradient is that of soft cross-entropy.
SIZES = dict(hidden=(1024, 512, 256), category_dim=32, batch_size=4_096, shuffle_window=8)
STEPS = dict(epochs=3, weight_decay=1e-5, warmup=0.01, temperature=1.0, checkpoint_steps=2_000)
PAPER = replace(TOY, preset="paper", human_rows="none", **SIZES, **STEPS)
PRESETS = {"toy": TOY, "small": replace(TOY, preset="small"), "paper": PAPER}
# (input_dropout, dropout), our choice. Rows with human labels alone, at most FEW_ROWS, choose among them by
# cross-validation over queries; fewer than ENOUGH_QUERIES cannot tell, and take the last. More rows, and a
# teacher's soft labels, take the first.
DROPOUTS, FEW_ROWS, ENOUGH_QUERIES, FOLDS = ((0.4, 0.1), (0.6, 0.3), (0.9, 0.5)), 20_000, 50, 3
READS = ("*.parquet", "*_embedding.npy", POOL)  # files of features/ and labels/


# ------------------------------------------------------------------------------------------------------------
# The loss


def distillation_loss(logits, soft_labels, temperature=1.0):
    """KL(teacher || student), mean over rows: student logits [B, C], teacher probabilities [B, C] -> scalar.

    Both are softened by the temperature T, and the loss is multiplied by T^2 so that its gradient keeps its
    size (Hinton et al., 2015, section 2). With one-hot labels and T = 1 this is cross-entropy."""
    target = at_temperature(soft_labels, temperature)
    log_student = (logits / temperature).log_softmax(dim=1)
    return temperature**2 * F.kl_div(log_student, target, reduction="batchmean")


# ------------------------------------------------------------------------------------------------------------
# Rows: impressions with the teacher's labels, and the human-labelled ones


def human_rows(files, settings):
    """The human-labelled training rows. Their targets: with --labels human all probability on the human
    level; else its mean with the teacher's probabilities, or no rows at all (--human-rows)."""
    rows, level, is_train = files.labelled()
    target = one_hot(level)
    if settings.labels == "teacher":
        if settings.human_rows == "none":
            return rows[:0]
        target = (target + files.soft_labels("labelled.parquet", rows)) / 2
    rows["target"] = target
    return rows[is_train]


def tensors(inputs, rows, device):
    """Rows -> the student's inputs {name: [B, …]} and the target [B, C]."""
    features = inputs.gather(rows["query"], rows["pin"], rows["match"])
    features = {name: column.to(device, non_blocking=True) for name, column in features.items()}
    target = torch.from_numpy(np.ascontiguousarray(rows["target"]))
    return features, target.to(device, non_blocking=True)


# ------------------------------------------------------------------------------------------------------------
# Training


@torch.inference_mode()
def held_out_scores(student, inputs, held_out, device, chunk=16_384):
    """KL(target || student) at temperature 1 and agreement of the most probable level, over held-out rows."""
    student.eval()
    loss = right = 0.0
    for start in range(0, len(held_out), chunk):
        features, target = tensors(inputs, held_out[start : start + chunk], device)
        logits = student(features)
        loss += distillation_loss(logits, target).item() * len(target)
        right += (logits.argmax(1) == target.argmax(1)).sum().item()
    n = len(held_out)
    return {"held_out_kl": loss / n, "held_out_agreement": right / n} if n else {}


def new_optimizer(student, settings):
    """AdamW of all weights."""
    decay = settings.weight_decay
    return torch.optim.AdamW(student.parameters(), settings.lr, weight_decay=decay, fused=True)


def train_step(student, optimizer, features, target, settings, progress):
    """One step on a batch, at `progress` in [0, 1) of the training; returns its loss."""
    for group in optimizer.param_groups:
        group["lr"] = settings.lr * linear_warmup_decay(progress, settings.warmup)
    student.train()
    loss = distillation_loss(student(features), target, settings.temperature)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach()


def train(student, rows, inputs, held_out, settings, device, folder):
    """The training loop, over what is left of it; every so many steps there is a checkpoint in `folder`.
    Returns the log, a line an epoch."""
    optimizer = new_optimizer(student, settings)
    start = {"epoch": 0, "step": 0, "rows": 0, "loss_sum": 0.0}
    checkpoints = Checkpoints(folder, student, optimizer, start)
    state, planned = checkpoints.state, rows.total * settings.epochs
    if checkpoints.continues:
        print(f"continuing after {state['rows']:,} of {planned:,} rows")
    for epoch in range(state["epoch"], settings.epochs):
        loss_sum, batches = torch.tensor(state["loss_sum"]), rows.batches(epoch, skip=state["step"])
        bar = progress_bar(total=planned, initial=state["rows"], desc=f"epoch {epoch + 1}", unit=" rows")
        for features, target in ahead((tensors(inputs, batch, device) for batch in batches), depth=4):
            # A seed of its own for every step's dropout: a resumed run equals an undisturbed one.
            torch.manual_seed((settings.seed * 1_009 + epoch) * 10_000_019 + state["step"])
            loss = train_step(student, optimizer, features, target, settings, state["rows"] / planned)
            loss_sum = loss_sum.to(loss.device) + loss * len(target)
            state["step"] += 1
            state["rows"] += len(target)
            bar.update(len(target))
            if state["step"] % settings.checkpoint_steps == 0:
                state["loss_sum"] = finite(loss_sum, epoch)
                checkpoints.save()
        bar.close()
        scores = {"epoch": epoch + 1, "loss": finite(loss_sum, epoch) / rows.total}
        scores |= held_out_scores(student, inputs, held_out, device)
        state |= {"epoch": epoch + 1, "step": 0, "loss_sum": 0.0}
        checkpoints.end_epoch(scores)
    return state["log"]


def finite(loss, epoch):
    """A sum of losses as a number; Stop if it is not finite."""
    if not torch.isfinite(loss):
        raise Stop(f"the loss is not finite in epoch {epoch + 1}: lower --lr or --weight-decay")
    return loss.item()


def with_dropout(settings, rows, inputs, moments, device):
    """The settings with both shares of dropout: as given, or those of DROPOUTS with which students learn most
    from some queries' human labels about other queries'. Where they were compared, also the learning curve:
    KL on queries left out, of the regression and of the student, from a third and from two thirds of the
    other queries: {"queries": [n, n], "match": [KL, KL], "student": [KL, KL]}."""
    names = ("input_dropout", "dropout")
    given = {name: getattr(settings, name) for name in names if getattr(settings, name) is not None}
    choices = [replace(settings, **dict(zip(names, shares)) | given) for shares in DROPOUTS]
    queries, data = rows.count_queries(rows.human), (rows, inputs, moments, device)
    if len(given) == 2 or settings.labels == "teacher" or rows.total > FEW_ROWS:
        return choices[0], None
    if queries < ENOUGH_QUERIES:
        return choices[-1], None
    found = []
    for choice in progress_bar(iterable=choices, desc="cross-validation", unit=" dropouts"):
        found.append(cross_validated(choice, FOLDS - 1, *data))
        print(f"dropout {choice.input_dropout}, {choice.dropout}: KL on other queries {found[-1][1]:.4f}")
    best = int(np.argmin([student for _, student in found]))
    match, student = np.transpose([cross_validated(choices[best], 1, *data), found[best]]).tolist()
    sizes = [queries * folds // FOLDS for folds in (1, FOLDS - 1)]
    return choices[best], {"queries": sizes, "match": match, "student": student}


def cross_validated(settings, folds, rows, inputs, moments, device):
    """Mean KL(target || student) of human-labelled rows, each under a student trained on the queries of so
    many other folds: [before its training, when it is the regression, and after]."""
    keys = np.array(rows.files.keys, dtype=object)[rows.human["query"]]
    fold_of = np.array([int(FOLDS * hash_position(key, "folds")) for key in keys])
    losses, part = np.zeros(2), copy.copy(rows)
    for fold in range(FOLDS):
        distance = (fold_of - fold) % FOLDS  # from the fold that is left out
        part.human, left_out = rows.human[(distance > 0) & (distance <= folds)], rows.human[distance == 0]
        if len(part.human) and len(left_out):
            student = new_student(settings, inputs, moments, part.human, device)
            before = held_out_scores(student, inputs, left_out, device)["held_out_kl"]
            optimizer = new_optimizer(student, settings)
            batches = [batch for epoch in range(settings.epochs) for batch in part.batches(epoch)]
            for step, batch in enumerate(batches):
                columns = tensors(inputs, batch, device)
                train_step(student, optimizer, *columns, settings, step / len(batches))
            after = held_out_scores(student, inputs, left_out, device)["held_out_kl"]
            losses += np.array([before, after]) * len(left_out)
    return losses / len(rows.human)


def warn_if_by_heart(log):
    """A line if the student ends worse on held-out queries than it was: by a twentieth and 0.01 nats."""
    losses = [line["held_out_kl"] for line in log if "held_out_kl" in line]
    if losses and losses[-1] - min(losses) > max(min(losses) / 20, 0.01):
        rose = f"from {min(losses):.3f} to {losses[-1]:.3f}"
        print(f"warning: on held-out queries KL rose {rose}")
        print("more --dropout and --input-dropout, fewer --epochs, lower --lr, or labels of more queries?")


# ------------------------------------------------------------------------------------------------------------


def with_name(settings):
    """The settings with the name of the output folder, checked."""
    if settings.labels == "human" and (idle := typed(settings, "human-rows", "shuffle-window")):
        refuse(f"--labels human trains on human labels alone: {idle} would do nothing")
    names = {"teacher": "student", "human": "student_human_labels"}  # as 05 knows them
    default = names[settings.labels]
    name = default if settings.name is None else settings.name
    if name != default and name in names.values():
        refuse(f"--name {name}: is that of the student on the other labels")
    if not re.fullmatch(r"student[\w.+-]*", name):
        refuse(f"--name {name!r}: one folder's name, that begins with 'student'")
    return replace(settings, name=name)


@torch.no_grad()
def new_student(settings, inputs, moments, human, device):
    """A student before its training (ours): the regression of the human-labelled rows' targets on the match
    features, its network at zero. moments: of those features (survey()); human: human-labelled rows."""
    torch.manual_seed(settings.seed)
    spec = {"embeddings": inputs.dims, "categories": inputs.categories, "category_dim": settings.category_dim}
    spec |= {"numbers": inputs.numbers, "match": inputs.match}
    spec |= {name: values.tolist() for name, values in moments.items()}
    spec |= {"hidden": list(settings.hidden), "dropout": settings.dropout}
    student = Student({**spec, "input_dropout": settings.input_dropout}).to(device)
    if len(human):
        scale = student.mean.cpu().numpy(), student.std.cpu().numpy()
        regression = fit_regression(human["match"], human["target"], scale)
        student.linear.weight.copy_(torch.from_numpy(regression.weight))
        student.linear.bias.copy_(torch.from_numpy(regression.bias))
        student.mlp[-1].weight.zero_()
        student.mlp[-1].bias.zero_()
    return student


def main(argv=None):
    # 1. Settings, what is inherited, and the folder
    settings = with_name(parse(PRESETS, argv, __doc__))
    device, features = pick_device(settings.device), settings.run / "features"
    read = require_pairs(settings.run, READS, settings.labels == "teacher", impressions=True)
    require_languages(settings.run, settings.languages)
    identities = {folder: about["identity"] for folder, about in read.items()}
    stage = Stage(settings.run / settings.name, settings, identities)
    if stage.done:
        return

    # 2. Rows and inputs
    files = PairFiles(settings.run, settings.languages)
    rows = TrainingRows(files, human_rows(files, settings), settings)
    moments, held_out = rows.survey()
    inputs = StudentInputs(features).to(device)

    # 3. The network
    settings, curve = with_dropout(settings, rows, inputs, moments, device)
    student = new_student(settings, inputs, moments, rows.human, device)
    if curve:
        print(report.more_labels(curve))
    summary.describe_student(student, rows, held_out, settings, device)
    if "labels" in read:
        print(f"the teacher: {whose_labels(read['labels'])}")

    # 4. Distillation
    log = train(student, rows, inputs, held_out, settings, device, stage.folder)
    warn_if_by_heart(log)

    # 5. Save, also as a service takes it
    sample = held_out if len(held_out) else next(rows.batches(epoch=0))
    columns, _ = tensors(inputs, sample[:CHECKED_ROWS], "cpu")
    student.spec |= contract(student.spec, read["features"])
    student.save(stage.folder)
    difference = save_onnx(student, columns, stage.folder)
    print(f"student.onnx: its probabilities are PyTorch's to {difference:.0e}")
    write_jsonl(stage.folder / "training_log.jsonl", log)
    dropouts = {"input_dropout": settings.input_dropout, "dropout": settings.dropout}
    counts = {"train": rows.total, "human": len(rows.human), "held_out": len(held_out)}
    teacher = read["labels"].get("teacher") if "labels" in read else None
    facts = {"dropouts": dropouts, "teacher": teacher, "curve": curve}
    stage.finish([CHECKPOINT], rows=counts, held_out=rows.held_out, scores=log[-1], **facts)


if __name__ == "__main__":
    run_main(main)
