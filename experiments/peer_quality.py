"""Quality beside what a user would use instead, on the same rows: paired intervals of the differences.

    pip install -r benchmarks/requirements.txt
    python experiments/peer_quality.py --run outputs/msrd                   minutes: a CrossEncoder is trained
    python experiments/peer_quality.py --run outputs/msrd --without-peer    seconds: what needs no training

Reads   RUN/features, RUN/teacher/stage.json and teacher.json, RUN/labels/labelled.parquet, RUN/student*/
Writes  a table; with --json FILE also there

    cross_encoder   sentence-transformers' CrossEncoder, trained by its own trainer: the teacher's base model,
                    training rows, text fields, greatest length, epochs, batch size, warm-up, decay and
                    precision; cross-entropy of the five levels. Its own: the learning rate, one linear layer
                    for a head; a pair longer than the greatest length loses the end of the pin text, or of
                    the query where that is longer
    the others      as stage 05 has them

Intervals: 95 %, bootstrap over queries; a difference is taken on the same resample of the queries for both.
"""

import argparse
import importlib
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import NUM_LEVELS  # noqa: E402
from lib.inputs.pairs import read_labelled  # noqa: E402
from lib.inputs.rows import split_rows  # noqa: E402
from lib.models import quiet_libraries  # noqa: E402
from lib.stages.files import read_json, write_json  # noqa: E402
from lib.stages.finished import require_finished  # noqa: E402
from lib.stages.hardware import pick_device, pick_dtype  # noqa: E402
from lib.stages.terminal import Stop, run_main  # noqa: E402
from lib.tables.splits import query_key  # noqa: E402

stage_02 = importlib.import_module("02_train_teacher")
stage_05 = importlib.import_module("05_evaluate")

METRICS = ("auroc_4", "accuracy", "ndcg_20")
PEER = "cross_encoder"
DIFFERENCES = (  # the first less the second
    ("teacher", PEER),
    ("teacher", "bm25"),
    ("teacher", "embedding"),
    ("teacher", "match"),
    ("student", PEER),
    ("student", "bm25"),
    ("student", "embedding"),
    ("student", "match"),
    ("student", "student_human_labels"),
    ("student", "teacher"),
    (PEER, "bm25"),
)


# ------------------------------------------------------------------------------------------------------------
# Systems: probabilities [B, C] and ranking score [B] on the evaluation rows


def pair_texts(features, fields, rows):
    """[(query, pin text)] of rows: a pin's non-empty fields with their names, as the teacher reads them."""
    queries = pq.read_table(features / "queries.parquet", columns=["query"])["query"]
    pins = pq.read_table(features / "pins.parquet", columns=list(fields)).take(rows["pin_index"]).to_pylist()
    texts = []
    for query, pin in zip(queries.take(rows["query_index"]).to_pylist(), pins):
        texts.append((query, " ".join(f"{field}: {text}" for field, text in pin.items() if text)))
    return texts


def train_peer(model, pairs, labels, settings):
    """A CrossEncoder trained on pairs [(query, pin text)] and their labels [B] in 1..5. settings: max_tokens,
    epochs, batch_size, learning_rate, warmup, weight_decay, bf16, seed."""
    try:
        from datasets import Dataset
        from sentence_transformers.cross_encoder import (
            CrossEncoder,
            CrossEncoderTrainer,
            CrossEncoderTrainingArguments,
            losses,
        )
    except ImportError as error:
        line = "pip install -r benchmarks/requirements.txt, or --without-peer"
        raise Stop(f"{error.name}: not installed; {line}") from None
    from transformers import set_seed

    set_seed(settings["seed"])  # of the new head
    encoder = CrossEncoder(model, num_labels=NUM_LEVELS, max_length=settings["max_tokens"])
    columns = {
        "query": [query for query, _ in pairs],
        "pin": [text for _, text in pairs],
        "label": [int(label) - 1 for label in labels],
    }
    rate = settings["learning_rate"]
    with tempfile.TemporaryDirectory() as folder:
        arguments = CrossEncoderTrainingArguments(
            output_dir=folder,
            num_train_epochs=settings["epochs"],
            per_device_train_batch_size=settings["batch_size"],
            **({"learning_rate": rate} if rate else {}),
            warmup_steps=settings["warmup"],  # below 1: a share of the steps
            weight_decay=settings["weight_decay"],
            bf16=settings["bf16"],
            use_cpu=pick_device("auto").type == "cpu",  # bf16 there has to be asked for
            seed=settings["seed"],
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=False,  # it takes minutes
        )
        loss = losses.CrossEntropyLoss(encoder)
        trainer = CrossEncoderTrainer(encoder, arguments, train_dataset=Dataset.from_dict(columns), loss=loss)
        trainer.train()
    return encoder


def peer_system(encoder, pairs):
    """A trained CrossEncoder on pairs."""
    p = encoder.predict(pairs, apply_softmax=True, show_progress_bar=False).astype(np.float64)
    return p, stage_05.expected_level(p)


# ------------------------------------------------------------------------------------------------------------
# What the run's teacher was trained with


def peer_settings(made, about, args):
    """Settings for train_peer. made: stage 02's arguments; about: teacher.json; flags win."""
    return {
        "max_tokens": about["max_tokens"],
        "epochs": made["epochs"],
        "batch_size": made["batch_size"],
        "learning_rate": args.learning_rate,
        "warmup": made["warmup"],
        "weight_decay": made["weight_decay"],
        "bf16": pick_dtype(made["precision"], pick_device("auto")) == torch.bfloat16,
        "seed": made["seed"] if args.seed is None else args.seed,
    }


def teacher_rows(run, train, made):
    """The training rows that the teacher learned from, by stage 02's own split: without the queries it held
    out, and the ones left out by its --rows. made: stage 02's arguments."""
    queries = pq.read_table(run / "features" / "queries.parquet", columns=["query"])["query"]
    keys = [query_key(query) for query in queries.take(train["query_index"]).to_pylist()]
    settings = replace(stage_02.TOY, rows=made["rows"], seed=made["seed"])
    learned, *_ = split_rows(keys, settings)
    return {name: column[learned] for name, column in train.items()}


# ------------------------------------------------------------------------------------------------------------
# Metrics and their differences


def measure(systems, rows, resamples, seed):
    """(values, differences): lists of flat rows with system, metric, value, low, high."""
    value, drawn = {}, {}
    for name, (p, score) in systems.items():
        measured = stage_05.Measured(rows["label"], p, score, rows["query_index"])
        value[name], drawn[name] = measured.bootstrap(resamples, seed)
    values, differences = [], []
    for name in systems:
        for metric in METRICS:
            found = stage_05.interval(value[name][metric], drawn[name][metric])
            values.append({"system": name, "metric": metric, **found._asdict()})
    for first, second in DIFFERENCES:
        if first not in systems or second not in systems:
            continue
        for metric in METRICS:
            difference = value[first][metric] - value[second][metric]
            sample = drawn[first][metric] - drawn[second][metric]  # resample by resample: the same queries
            found = stage_05.interval(difference, sample)
            differences.append({"system": f"{first} − {second}", "metric": metric, **found._asdict()})
    return values, differences


def table(title, rows):
    """Flat rows -> a Markdown table, one line a system."""
    cells = {}
    for row in rows:
        text = "–"
        if row["value"] is not None:
            text = f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
        cells.setdefault(row["system"], []).append(text)
    lines = [f"| {title} | AUROC ≥4 | accuracy | nDCG@20 |", "| --- | --- | --- | --- |"]
    for system, found in cells.items():
        lines.append(f"| {system} | {' | '.join(found)} |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument(
        "--run", type=Path, required=True, metavar="DIR", help="run directory, finished up to 03 or 04"
    )
    p.add_argument(
        "--model",
        metavar="ENCODER",
        help="the peer's base model (default: the teacher's, if it is an encoder)",
    )
    p.add_argument("--learning-rate", type=float, metavar="X", help="the peer's (default: its own)")
    p.add_argument("--seed", type=int, metavar="N", help="the peer's (default: the teacher's)")
    p.add_argument("--without-peer", action="store_true", help="train nothing")
    p.add_argument("--resamples", type=int, default=1_000, metavar="N", help="of the queries (1,000)")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    return p.parse_args(argv)


def main(argv=None):
    # 1. The run's rows and systems
    args = parse_args(argv)
    quiet_libraries()
    run = args.run
    require_finished(run / "features", f"01_build_features.py --run {run}")
    require_finished(run / "labels", f"03_label.py --run {run}", reads=("labelled.parquet",))
    train, evaluation = read_labelled(run)
    students = sorted(path.parent.name for path in run.glob("student*/stage.json"))
    systems = stage_05.all_systems(run, students, train, evaluation)

    # 2. The peer, on the teacher's rows
    made = require_finished(run / "teacher", f"02_train_teacher.py --run {run}", reads=())["arguments"]
    about = read_json(run / "teacher" / "teacher.json")
    settings = peer_settings(made, about, args)
    model, fields = args.model or about["model"], about["fields"]
    if about["kind"] == "decoder" and not args.model and not args.without_peer:
        raise Stop("a CrossEncoder of a decoder scores yes against no, not five levels: --model ENCODER")
    if not args.without_peer:
        rows = teacher_rows(run, train, made)
        print(f"{PEER}: {model}, {len(rows['label']):,} rows, {json.dumps(settings)}")
        pairs = pair_texts(run / "features", fields, rows)
        encoder = train_peer(model, pairs, rows["label"], settings)
        systems[PEER] = peer_system(encoder, pair_texts(run / "features", fields, evaluation))

    # 3. Metrics, and the differences with their intervals
    values, differences = measure(systems, evaluation, args.resamples, seed=0)
    queries = len(np.unique(evaluation["query_index"]))
    print(f"\n{len(evaluation['label']):,} evaluation rows of {queries:,} queries\n")
    print(table("system", values))
    print("\n" + table("difference", differences))
    if args.json:
        write_json(
            args.json, {"peer": settings, "model": model, "systems": values, "differences": differences}
        )
        print(f"\nwrote {args.json}")


if __name__ == "__main__":
    run_main(main)
