"""What the paper's method would cost on your data: parameters, memory, hours, money, disk. Loads no weights.

    python benchmarks/plan.py                                                 six teachers, the paper's rows
    python benchmarks/plan.py --data DATASET_DIR --model google-t5/t5-base    your rows, one teacher; and
                                                                              minutes of preset small here
    python benchmarks/plan.py --run RUN                                       rows of features that are there
    python benchmarks/plan.py --gpus 8 --machines 4 --price 3.5               several GPUs, a provider's USD

Speeds are those measured of Llama-3-8B's and BLIP-large's shapes on one H200 (benchmarks/RESULTS.md); another
teacher's follow from the size of its linear layers. Put in your own, from the first minutes of a run or from
benchmarks/teacher.py. Several GPUs share what is dealt out, as evenly as shards and chunks allow.
"""

import importlib
import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from torch import nn
from transformers import AutoConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import Teacher  # noqa: E402
from lib import models  # noqa: E402
from lib.stages.finished import require_finished  # noqa: E402
from lib.stages.settings import Count, NonNegative, Positive  # noqa: E402
from lib.stages.terminal import run_main  # noqa: E402
from lib.tables.raw import RawTables  # noqa: E402

this_machine = importlib.import_module("benchmarks.this_machine")
stage01, stage02, stage03 = map(
    importlib.import_module, ("01_build_features", "02_train_teacher", "03_label")
)
SHAPES = json.loads((ROOT / "benchmarks" / "shapes.json").read_text())  # as published with the weights
LLAMA_LINEAR = 6.98e9  # weights in the linear layers of Llama-3-8B: what the speeds are of


@dataclass(frozen=True)
class Plan:
    """What the plan reckons with."""

    data: Path | None = None  # dataset whose rows are counted
    run: Path | None = None  # run directory whose features are counted
    model: tuple[str, ...] = tuple(SHAPES)  # teachers: folders or hub ids
    labels: int = 280_000  # human-labelled training rows (stated in the paper)
    impressions: int = 30_000_000  # rows to label (stated in the paper)
    pins: int = 10_000_000  # pins whose text is embedded (an assumption)
    pictures: int = 10_000_000  # pictures to caption (an assumption)
    tokens: Positive = 200.0  # mean tokens a row (an assumption)
    train_speed: Positive = 5_816.0  # tokens/s of QLoRA
    label_speed: Positive = 30_742.0  # tokens/s of labelling in bf16
    caption_speed: Positive = 175.0  # pictures/s of captioning
    embed_speed: Positive = 1e6  # tokens/s of the text encoder (an assumption, not measured)
    gpus: Count = 1  # of a machine
    machines: Count = 1
    price: NonNegative = 2.0  # USD a GPU hour (an example)


def counted(plan):
    """The plan with the rows of the run or the dataset, and where they were counted."""
    if plan.run is not None:
        features = plan.run / "features"
        about = require_finished(features, f"01_build_features.py --run {plan.run}", reads=())
        rows, pictures = about["rows"], (about["images"] or {"captioned": 0})["captioned"]
        counts = {"impressions": rows["impressions"], "pins": rows["pins"], "pictures": pictures}
        return replace(plan, labels=rows["labelled_train"], **counts), str(features)
    if plan.data is not None:
        tables = RawTables(plan.data)
        train = "WHERE split = 'train'" if "split" in tables.types["labels"] else ""
        labels = int(tables.ask(f"SELECT count(*) FROM raw_labels {train}")[0][0])
        pictures = tables.ask("SELECT count(*) FROM raw_pins WHERE image IS NOT NULL")[0][0]
        counts = {name: tables.count_rows()[name] for name in ("impressions", "pins")}
        return replace(plan, labels=labels, pictures=pictures, **counts), str(plan.data)
    return plan, "the paper's, or as given"


def empty_teacher(model, settings):
    """Stage 02's teacher on the meta device: shapes alone. Returns it, and how it is fine-tuned."""
    # The paper's teachers are known without the hub.
    config = AutoConfig.for_model(**SHAPES[model]) if model in SHAPES else models.load_config(model)
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


def memory_parts(teacher, finetuning, train, label):
    """{stage: [(bytes, what for)]} of a process on a GPU in bf16. Weights are counted, activations estimated;
    for labelling LoRA is merged."""
    config, (count, ends) = teacher.backbone.config, count_weights(teacher)
    packed = count["linear"] if finetuning == "qlora" else 0
    # A linear layer keeps some 4.7 bytes an input and output for the backward pass; the rest: gradients.
    layers = config.num_hidden_layers
    kept = train.batch_tokens * (2 * config.hidden_size * layers + 6 * sum(ends) / layers)
    context = (1e9, "device context and fragmentation (allowance)")
    training = [
        (packed * (0.5 + 1 / 64 + 4 / 64 / 256), "linear layers, NF4: 4 bit, and scales in 8 bit"),
        (2 * (count["frozen"] - packed), "other frozen weights, bf16"),
        (16 * count["trained"], "trained weights, gradients and both AdamW moments, fp32"),
        (kept, "activations: inputs of all layers, one layer computed again; 02 keeps all where they fit"),
        context,
    ]
    # One layer while labelling: 11 bytes, as measured (RESULTS.md: 21.7 GB with the weights).
    layer = (11 * label.batch_tokens * max(ends), "one layer")
    return {"02": training, "03": [(2 * count["all"], "weights, bf16"), layer, context]}


def gpu_hours(linear, finetuning, plan, epochs):
    """{stage: hours on one GPU} of a teacher with so many weights in its linear layers."""
    size = linear / LLAMA_LINEAR
    # QLoRA: forward, forward again, gradients of the inputs, 6 FLOP a weight and token; in full: 8.
    flop = 8 / 6 if finetuning == "full" else 1
    learnt = plan.labels * plan.tokens * epochs
    labelled = plan.impressions * plan.tokens
    seconds_02 = size * flop * learnt / plan.train_speed
    seconds_03 = size * labelled / plan.label_speed
    return {"02": seconds_02 / 3600, "03": seconds_03 / 3600}


def wall(hours, plan, rows=None, size=1):
    """Hours on all GPUs of what takes so many on one; of `rows` dealt out by shards of a size."""
    gpus = plan.gpus * plan.machines
    if rows is None:
        return hours / gpus
    shards = math.ceil(rows / size)
    return hours * math.ceil(shards / gpus) / max(shards, 1)


def describe_01(plan):
    """Lines on the captions and the text embeddings."""
    texts = plan.pins * min(plan.tokens, stage01.PRESETS["paper"].text_tokens)
    for what, rows, seconds in (
        (f"captions of {plan.pictures:,} pictures", plan.pictures, plan.pictures / plan.caption_speed),
        (f"embeddings of {plan.pins:,} pins' texts", plan.pins, texts / plan.embed_speed),
    ):
        hours = wall(seconds / 3600, plan, rows, stage01.CHUNK)
        print(f"01: {what}: {hours:,.1f} h, {seconds / 3600 * plan.price:,.0f} USD")
    print("01: its tables and logs, on one machine's CPUs, are not in it")


def main(argv=None):
    # 1. Rows, and the paper's settings
    models.quiet_libraries()
    plan, where = counted(tyro.cli(Plan, args=argv, description=__doc__))
    train, label = stage02.PRESETS["paper"], stage03.PRESETS["paper"]
    shard_rows = stage01.PRESETS["paper"].shard_rows
    steps = train.epochs * -(-plan.labels // train.batch_size)
    rows = f"{plan.labels:,} labelled, {plan.impressions:,} impressions ({where})"
    print(f"rows: {rows}; {plan.tokens:g} tokens")
    print(f"steps of 02: {steps:,} of {train.batch_size} rows, {train.epochs} epochs")
    disk = 44e-9 * plan.impressions
    print(f"disk: {disk:.1f} GB for impressions and soft labels, and the embeddings")
    print(f"hours: {plan.machines} machine(s) of {plan.gpus} GPU(s); USD: at {plan.price:g} a GPU hour")
    describe_01(plan)

    # 2. Each teacher
    print("\n| teacher | parameters | trained | 02: GB | hours | USD | 03: GB | hours | USD |")
    print("| --- |" + " ---: |" * 8)
    for model in plan.model:
        teacher, finetuning = empty_teacher(model, train)
        count, _ = count_weights(teacher)
        parts = memory_parts(teacher, finetuning, train, label)
        weights, trained = count["all"] / 1e6, count["trained"] / 1e6
        cells = [model, f"{weights:,.1f} M", f"{trained:,.1f} M, {finetuning}"]
        for number, hours in gpu_hours(count["linear"], finetuning, plan, train.epochs).items():
            memory = sum(part for part, _ in parts[number]) / 1e9
            shards = (plan.impressions, shard_rows) if number == "03" else ()
            cells += [f"{memory:.1f}", f"{wall(hours, plan, *shards):,.1f}", f"{hours * plan.price:,.0f}"]
        print(f"| {' | '.join(cells)} |")

    # 3. Where one teacher's memory goes
    for number, found in parts.items() if len(plan.model) == 1 else ():
        for part, what in found:
            print(f"{number}: {part / 1e9:6.2f} GB  {what}")

    # 4. Preset small on this machine
    if plan.data is not None:
        for line in here(plan):
            print(line)


def here(plan):
    """Minutes of preset small on this machine, with the encoder --model, or the preset's own."""
    one = plan.model[0] if len(plan.model) == 1 else None
    config = models.load_config(one) if one else AutoConfig.for_model(**this_machine.SHAPE)
    if models.backbone_kind(config) == "decoder":
        return ["preset small has an encoder as teacher: --model ENCODER reckons its minutes on this machine"]
    return this_machine.minutes(RawTables(plan.data), plan, one or "a multilingual MiniLM", config)


if __name__ == "__main__":
    run_main(main)
