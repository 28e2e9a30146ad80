"""What the paper's method would cost on your data: parameters, memory, hours, money, disk. Loads no weights.

    python benchmarks/plan.py                              the paper's rows; its teachers, and preset small's
    python benchmarks/plan.py --data DATASET_DIR --model google-t5/t5-base    your rows, one teacher; and
                                                                              minutes of preset small here
    python benchmarks/plan.py --gpus 8 --machines 4 --price 3.5               several GPUs, a provider's USD

Speeds are those measured of Llama-3-8B's and BLIP-large's shapes on one H200 (benchmarks/RESULTS.md); another
teacher's follow from the size of its linear layers. Put in your own, from the first minutes of a run or from
benchmarks/teacher.py. Minutes here are reckoned from some seconds of a model with random weights.
"""

import importlib
import json
import math
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import NUM_LEVELS, Teacher  # noqa: E402
from lib import models  # noqa: E402
from lib.stages.hardware import pick_hardware  # noqa: E402
from lib.stages.settings import Count, NonNegative, Positive, Size, flags_read  # noqa: E402
from lib.stages.terminal import run_main  # noqa: E402
from lib.tables.raw import RawTables  # noqa: E402

NAMES = ("01_build_features", "02_train_teacher", "03_label", "04_train_student")
stage01, stage02, stage03, stage04 = map(importlib.import_module, NAMES)
SHAPES = json.loads((ROOT / "benchmarks" / "shapes.json").read_text())  # as published with the weights
LLAMA_LINEAR = 6.98e9  # weights in the linear layers of Llama-3-8B: what the speeds are of
CHARACTERS = 4.0  # a token, about, of alphabets; an assumption


@dataclass(frozen=True)
class Plan:
    """What the plan reckons with."""

    data: Path | None = None  # dataset whose rows are counted
    model: tuple[str, ...] = tuple(SHAPES)  # teachers: folders or hub ids
    labels: Size = 280_000  # human-labelled training rows (stated in the paper)
    impressions: Size = 30_000_000  # rows to label (stated in the paper)
    pins: Size = 10_000_000  # pins whose text is embedded (an assumption)
    pictures: Size = 10_000_000  # pictures to caption (an assumption)
    tokens: Positive = 200.0  # mean tokens a row (an assumption)
    train_speed: Positive = 5_816.0  # tokens/s of QLoRA
    label_speed: Positive = 30_742.0  # tokens/s of labelling in bf16
    caption_speed: Positive = 175.0  # pictures/s of captioning
    embed_speed: Positive = 1e6  # tokens/s of the text encoder (an assumption, not measured)
    gpus: Count = 1  # of a machine
    machines: Count = 1  # of so many GPUs each
    price: NonNegative = 2.0  # USD a GPU hour (an example)


def counted(plan, raw):
    """The plan with the rows of a dataset, its RawTables."""
    train = "WHERE split = 'train'" if "split" in raw.types["labels"] else ""
    labels = raw.ask(f"SELECT count(*) FROM raw_labels {train}")[0][0]
    pictures = raw.ask("SELECT count(image) FROM raw_pins")[0][0]
    counts = {name: raw.count_rows()[name] for name in ("impressions", "pins")}
    return replace(plan, labels=int(labels), pictures=pictures, **counts)


# ------------------------------------------------------------------------------------------------------------
# The paper's settings on GPUs


def config_of(model):
    """The config of a model; the paper's teachers, and preset small's, are known without the hub."""
    return AutoConfig.for_model(**SHAPES[model]) if model in SHAPES else models.load_config(model)


def empty_teacher(model, settings):
    """Stage 02's teacher on the meta device: shapes alone. Returns it, and how it is fine-tuned."""
    config = config_of(model)
    kind = models.backbone_kind(config)
    finetuning = "qlora" if kind == "decoder" else "full"
    with torch.device("meta"):
        backbone = models.empty_backbone(config, torch.bfloat16)
        backbone = backbone if finetuning == "full" else stage02.add_lora(backbone, settings)
        return Teacher(backbone, kind, torch.bfloat16), finetuning


def count_weights(teacher):
    """Numbers of weights: {"all", "linear" (layers of the backbone), "trained", "frozen"}, LoRA's among the
    trained alone; and input and output sizes of the linear layers, added up."""
    count, ends = dict.fromkeys(("all", "linear", "trained", "frozen"), 0), []
    for name, p in teacher.named_parameters():
        count["all"] += 0 if "lora_" in name else p.numel()
        count["trained" if p.requires_grad else "frozen"] += p.numel()
    for name, module in teacher.backbone.named_modules():
        if isinstance(module, nn.Linear) and "lora_" not in name:
            count["linear"] += module.weight.numel()
            ends.append(module.in_features + module.out_features)
    return count, ends


def memory(teacher, finetuning, train, label):
    """Bytes of a process of 02 and of 03 on a GPU in bf16. Weights are counted, activations estimated; for
    labelling LoRA is merged."""
    config, (count, ends) = teacher.backbone.config, count_weights(teacher)
    packed = count["linear"] if finetuning == "qlora" else 0
    weights = packed * (0.5 + 1 / 64 + 4 / 64 / 256)  # NF4: 4 bit, and scales in 8 bit
    weights += 2 * (count["frozen"] - packed)  # bf16
    weights += 16 * count["trained"]  # these, gradients and both AdamW moments in fp32
    # Inputs of all layers, one layer computed again (02 keeps all where they fit). That one has some 4.7
    # bytes an input and output for the backward pass; the rest: gradients.
    layers = config.num_hidden_layers
    kept = train.batch_tokens * (2 * config.hidden_size * layers + 6 * sum(ends) / layers)
    # One layer while labelling: 11 bytes, as measured (RESULTS.md: 21.7 GB with the weights).
    labelling = 2 * count["all"] + 11 * label.batch_tokens * max(ends)
    context = 1e9  # and fragmentation (allowance)
    return weights + kept + context, labelling + context


def gpu_hours(linear, finetuning, plan, epochs):
    """Hours of 02 and of 03 on one GPU, of a teacher with so many weights in its linear layers."""
    size = linear / LLAMA_LINEAR
    # QLoRA: forward, forward again, gradients of the inputs, 6 FLOP a weight and token; in full: 8.
    flop = 8 / 6 if finetuning == "full" else 1
    seconds_02 = size * flop * plan.labels * plan.tokens * epochs / plan.train_speed
    seconds_03 = size * plan.impressions * plan.tokens / plan.label_speed
    return seconds_02 / 3600, seconds_03 / 3600


# ------------------------------------------------------------------------------------------------------------
# Preset small on this machine


def mean_tokens(raw, limit):
    """Mean tokens of a query, a pin's text, and both in a pair, at most `limit`, reckoned by characters."""
    query = raw.ask("SELECT avg(length(query)) FROM raw_queries")[0][0] / CHARACTERS + 2
    text = "coalesce(length(title), 0) + coalesce(length(description), 0)"
    pin = raw.ask(f"SELECT avg(least({text}, {CHARACTERS * limit})) FROM raw_pins")[0][0] / CHARACTERS + 2
    return [int(min(max(tokens, 4), limit)) for tokens in (query, pin, query + pin)]


def seconds_of(step, at_least=2.0):
    """Mean seconds of a call, the first one, which warms up, left out."""
    step()
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < at_least:
        step()
        calls += 1
    return (time.perf_counter() - start) / calls


def teacher_speeds(config, tokens):
    """Rows/s of 02, in training, and of 03, of rows of so many tokens."""
    train, label = stage02.PRESETS["small"], stage03.PRESETS["small"]
    device, dtype, _ = pick_hardware(train)
    teacher = Teacher(models.random_backbone(config), models.backbone_kind(config), dtype).to(device)
    optimizer = stage02.make_optimizer(teacher, "full", train)

    few, many = train.batch_size, max(1, label.batch_tokens // tokens)
    ids = torch.randint(5, min(config.vocab_size, 30_000), (max(few, many), tokens), device=device)
    mask = torch.ones_like(ids)

    def step():
        logits = teacher.train()(ids[:few], mask[:few])
        teacher.loss(logits, ids[:few, 0] % NUM_LEVELS).backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.inference_mode()
    def forward():
        float(teacher.eval()(ids[:many], mask[:many]).sum())

    return few / seconds_of(step), many / seconds_of(forward)


def student_speed(width):
    """Rows/s of 04, in training, on so many numbers a row."""
    settings = stage04.PRESETS["small"]
    sizes = [width, *settings.hidden, NUM_LEVELS]
    layers = [part for ends in zip(sizes, sizes[1:]) for part in (nn.Linear(*ends), nn.ReLU())]
    student, table = nn.Sequential(*layers), torch.randn(10_000, width)
    optimizer = stage04.new_optimizer(student, settings)

    def step():
        rows = torch.randint(len(table), (settings.batch_size,))
        target = F.one_hot(rows % NUM_LEVELS, NUM_LEVELS).float()
        stage04.train_step(student, optimizer, table[rows], target, settings, progress=0.5)

    return settings.batch_size / seconds_of(step, 1.0)


def print_minutes(raw, plan, config):
    """A table: what each stage has to do here, how fast, in how many minutes. config: of the encoder."""
    train, counts = stage02.PRESETS["small"], raw.count_rows()
    of_query, of_pin, of_pair = mean_tokens(raw, train.max_tokens)
    train_speed, label_speed = teacher_speeds(config, of_pair)
    texts = (counts["queries"] * of_query + counts["pins"] * of_pin) / of_pair
    epochs = train.epochs or stage02.passes_over(plan.labels, train.batch_size)
    epochs_04, rows = stage04.PRESETS["small"].epochs, plan.impressions + plan.labels
    student = student_speed(2 * config.hidden_size + stage01.PRESETS["small"].graph_dim)
    hardware = f"{pick_hardware(train)[2]}, {torch.get_num_threads()} threads"
    print(
        f"\non this machine ({hardware}), preset small, {of_pair} tokens a pair, by {CHARACTERS:g} "
        "characters a token"
    )
    print("\n| stage | rows | rows/s | minutes |\n| --- | ---: | ---: | ---: |")
    for what, n, speed in (
        ("01, text embeddings alone", texts, label_speed),
        (f"02, {epochs} epochs", plan.labels * epochs, train_speed),
        ("03, without equal rows", rows, label_speed),
        (f"04, {epochs_04} epochs", rows * epochs_04, student),
    ):
        print(f"| {what} | {n:,.0f} | {speed:,.0f} | {n / speed / 60:,.1f} |")
    if plan.pictures:
        print("captions are not in it: on a CPU they are the long part of 01")


# ------------------------------------------------------------------------------------------------------------


def main(argv=None):
    # 1. Rows, and the paper's settings
    plan = flags_read(Plan, None, argv, __doc__.split("\n")[0])
    models.quiet_libraries()
    raw, where = None, "the paper's, or as given"
    if plan.data is not None:
        raw, where = RawTables(plan.data), plan.data
        plan = counted(plan, raw)
    features, train = stage01.PRESETS["paper"], stage02.PRESETS["paper"]
    steps, gpus = train.epochs * math.ceil(plan.labels / train.batch_size), plan.gpus * plan.machines
    print(
        f"rows: {plan.labels:,} labelled, {plan.impressions:,} impressions ({where}); {plan.tokens:g} tokens"
    )
    print(f"steps of 02: {steps:,} of {train.batch_size} rows, {train.epochs} epochs")
    print(f"disk: {44e-9 * plan.impressions:.1f} GB for impressions and soft labels, and the embeddings")
    print(f"hours: {plan.machines} machine(s) of {plan.gpus} GPU(s); USD: at {plan.price:g} a GPU hour")
    texts = plan.pins * min(plan.tokens, features.text_tokens)
    for what, rows, seconds in (
        ("captions of {:,} pictures", plan.pictures, plan.pictures / plan.caption_speed),
        ("embeddings of {:,} pins' texts", plan.pins, texts / plan.embed_speed),
    ):
        hours = seconds / 3600
        print(f"01: {what.format(rows)}: {hours / gpus:,.1f} h, {hours * plan.price:,.0f} USD")
    print("01: its tables and logs, on one machine's CPUs, are not in it")

    # 2. Each teacher
    print("\n| teacher | parameters | trained | 02: GB | hours | USD | 03: GB | hours | USD |")
    print("| --- |" + " ---: |" * 8)
    for model in plan.model:
        teacher, finetuning = empty_teacher(model, train)
        count, _ = count_weights(teacher)
        needed = memory(teacher, finetuning, train, stage03.PRESETS["paper"])
        cells = [model, f"{count['all'] / 1e6:,.1f} M", f"{count['trained'] / 1e6:,.1f} M, {finetuning}"]
        for size, hours in zip(needed, gpu_hours(count["linear"], finetuning, plan, train.epochs)):
            cells += [f"{size / 1e9:.1f}", f"{hours / gpus:,.1f}", f"{hours * plan.price:,.0f}"]
        print(f"| {' | '.join(cells)} |")

    # 3. Preset small on this machine, with --model, or the preset's own
    if raw:
        one = plan.model[0] if len(plan.model) == 1 else stage01.PRESETS["small"].text_encoder
        config = config_of(one)
        if models.backbone_kind(config) == "decoder":
            print("preset small's teacher is an encoder: --model ENCODER reckons its minutes on this machine")
        else:
            print_minutes(raw, plan, config)


if __name__ == "__main__":
    run_main(main)
