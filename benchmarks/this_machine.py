"""Minutes of preset small on this machine, from a few seconds of measurement: passes and steps of a model
with random weights, at the dataset's own numbers of rows and lengths of text. plan.py --data prints them."""

import importlib
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common import NUM_LEVELS, Teacher
from lib import models
from lib.stages.hardware import pick_hardware

stages = {number: importlib.import_module(name) for number, name in (
    ("01", "01_build_features"), ("02", "02_train_teacher"), ("03", "03_label"), ("04", "04_train_student")
)}  # fmt: skip
SHAPE = {  # of paraphrase-multilingual-MiniLM-L12-v2, the preset's text encoder and teacher
    "model_type": "bert", "hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 1536, "vocab_size": 250_037,
}  # fmt: skip
CHARACTERS = 4.0  # a token, about, of alphabets; an assumption


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
    """Rows/s of preset small's 02, in training, and of 03, of rows of so many tokens."""
    train, label = stages["02"].PRESETS["small"], stages["03"].PRESETS["small"]
    device, dtype, _ = pick_hardware(train)
    teacher = Teacher(models.random_backbone(config), models.backbone_kind(config), dtype).to(device)
    optimizer = stages["02"].make_optimizer(teacher, "full", train)

    def batch(rows):
        ids = torch.randint(5, min(config.vocab_size, 30_000), (rows, tokens), device=device)
        return ids, torch.ones_like(ids)

    def step():
        ids, mask = batch(train.batch_size)
        F.cross_entropy(teacher.train()(ids, mask), ids[:, 0] % NUM_LEVELS).backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.inference_mode()
    def forward():
        float(teacher.eval()(*batch(rows)).sum())

    rows = max(1, label.batch_tokens // tokens)
    return train.batch_size / seconds_of(step), rows / seconds_of(forward)


def student_speed(width):
    """Rows/s of preset small's 04, in training, on so many numbers a row."""
    settings = stages["04"].PRESETS["small"]
    sizes = [width, *settings.hidden, NUM_LEVELS]
    layers = [part for ends in zip(sizes, sizes[1:]) for part in (nn.Linear(*ends), nn.ReLU())]
    student = nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(student.parameters())
    table = torch.from_numpy(np.random.default_rng(0).normal(size=(10_000, width)).astype(np.float32))

    def step():
        rows = torch.randint(len(table), (settings.batch_size,))
        F.cross_entropy(student(table[rows]), rows % NUM_LEVELS).backward()
        optimizer.step()
        optimizer.zero_grad()

    return settings.batch_size / seconds_of(step, 1.0)


def minutes(raw, plan, model, config):
    """Lines of a table: what each stage has to do here, how fast, in how many minutes. raw: RawTables."""
    limit, counts = stages["02"].PRESETS["small"].max_tokens, raw.count_rows()
    of_query, of_pin, of_pair = mean_tokens(raw, limit)
    train, label = teacher_speeds(config, of_pair)
    tokens = counts["queries"] * of_query + counts["pins"] * of_pin
    epochs = {number: stages[number].PRESETS["small"].epochs for number in ("02", "04")}
    epochs["02"] = epochs["02"] or stages["02"].passes_over(
        plan.labels, stages["02"].PRESETS["small"].batch_size
    )
    rows = plan.impressions + plan.labels
    student = student_speed(2 * config.hidden_size + stages["01"].PRESETS["small"].graph_dim)
    hardware = pick_hardware(stages["02"].PRESETS["small"])[2]
    yield f"\non this machine ({hardware}, {torch.get_num_threads()} threads), preset small, {model}"
    yield f"measured on random weights; {of_pair} tokens a pair, by {CHARACTERS:g} characters a token"
    yield "\n| stage | rows | rows/s | minutes |\n| --- | ---: | ---: | ---: |"
    for what, n, speed in (
        ("01, text embeddings alone", tokens / of_pair, label),
        (f"02, {epochs['02']} epochs", plan.labels * epochs["02"], train),
        ("03, without equal rows", rows, label),
        (f"04, {epochs['04']} epochs", rows * epochs["04"], student),
    ):
        yield f"| {what} | {n:,.0f} | {speed:,.0f} | {n / speed / 60:,.1f} |"
    if raw.ask("SELECT count(*) FROM raw_pins WHERE image IS NOT NULL")[0][0]:
        yield "captions are not in it: on a CPU they are the long part of 01"
