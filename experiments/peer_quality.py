"""Quality beside what a user would use instead, on the same rows: paired intervals of the differences.

    pip install -r benchmarks/requirements.txt
    python experiments/peer_quality.py --run outputs/msrd      minutes: a CrossEncoder is trained

Reads   RUN/features, RUN/teacher/stage.json and teacher.json, RUN/labels/labelled.parquet, RUN/student*/;
        prints two tables

    cross_encoder   sentence-transformers' CrossEncoder, trained by its own trainer: the teacher's base model,
                    training rows, text fields, greatest length, epochs, batch size, warm-up, decay and
                    precision; cross-entropy of the five levels. Its own: the learning rate, one linear layer
                    for a head; a pair longer than the greatest length loses the end of the pin text, or of
                    the query where that is longer
    the others      as stage 05 has them

Intervals: 95 %, bootstrap over queries; a difference is taken on the same resample of the queries for both.
"""

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import NUM_LEVELS, expected_level  # noqa: E402
from experiments import comparison  # noqa: E402
from lib.inputs.inherited import require  # noqa: E402
from lib.inputs.pairs import read_labelled  # noqa: E402
from lib.inputs.rows import split_rows  # noqa: E402
from lib.models import quiet_libraries  # noqa: E402
from lib.stages.files import read_json  # noqa: E402
from lib.stages.hardware import pick_device, pick_dtype  # noqa: E402
from lib.stages.settings import ROOT, Count, parse  # noqa: E402
from lib.stages.terminal import Stop, run_main  # noqa: E402

PEER = "cross_encoder"


@dataclass(frozen=True)
class Settings:
    """Settings of the comparison."""

    run: Path = ROOT / "outputs" / "toy"  # a run that has been through 03 or 04
    model: str | None = None  # the peer's base model (default: the teacher's, if it is an encoder)
    resamples: Count = 1_000  # of the queries


def pair_texts(features, fields, rows):
    """[(query, pin text)] of rows: a pin's non-empty fields with their names, as the teacher reads them."""
    queries = pq.read_table(features / "queries.parquet", columns=["query"])["query"]
    pins = pq.read_table(features / "pins.parquet", columns=list(fields)).take(rows["pin_index"]).to_pylist()
    texts = []
    for query, pin in zip(queries.take(rows["query_index"]).to_pylist(), pins):
        texts.append((query, " ".join(f"{field}: {text}" for field, text in pin.items() if text)))
    return texts


def train_peer(model, pairs, labels, settings):
    """A CrossEncoder trained on pairs [(query, pin text)] and their labels [B] in 1..5. settings: of
    peer_settings."""
    try:
        from datasets import Dataset
        from sentence_transformers import cross_encoder
    except ImportError as error:
        raise Stop(f"{error.name}: pip install -r benchmarks/requirements.txt") from None
    from transformers import set_seed

    set_seed(settings["seed"])  # of the new head
    encoder = cross_encoder.CrossEncoder(model, num_labels=NUM_LEVELS, max_length=settings["max_tokens"])
    queries, pins = zip(*pairs)
    columns = {"query": queries, "pin": pins, "label": [int(label) - 1 for label in labels]}
    with tempfile.TemporaryDirectory() as folder:
        arguments = cross_encoder.CrossEncoderTrainingArguments(
            output_dir=folder,
            num_train_epochs=settings["epochs"],
            per_device_train_batch_size=settings["batch_size"],
            learning_rate=settings["learning_rate"],
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
        data, loss = Dataset.from_dict(columns), cross_encoder.losses.CrossEntropyLoss(encoder)
        cross_encoder.CrossEncoderTrainer(encoder, arguments, train_dataset=data, loss=loss).train()
    return encoder


def peer_system(encoder, pairs):
    """A trained CrossEncoder on pairs: probabilities [B, C] and ranking score [B]."""
    p = encoder.predict(pairs, apply_softmax=True, show_progress_bar=False).astype(np.float64)
    return p, expected_level(p)


def peer_settings(made, about):
    """Settings for train_peer. made: stage 02's arguments; about: teacher.json."""
    found = {name: made[name] for name in ("epochs", "batch_size", "warmup", "weight_decay", "seed")}
    is_bf16 = pick_dtype(made["precision"], pick_device("auto")) == torch.bfloat16
    found |= {"max_tokens": about["max_tokens"], "learning_rate": 5e-5}  # its trainer's own
    return {**found, "bf16": is_bf16}


def teacher_rows(train, made):
    """The training rows that the teacher learned from, by stage 02's own split: without the queries it held
    out, and the ones left out by its --rows. made: stage 02's arguments."""
    learned, *_ = split_rows(train["key"], SimpleNamespace(rows=made["rows"], seed=made["seed"]))
    return {name: column[learned] for name, column in train.items()}


def main(argv=None):
    # 1. The run's rows, and the peer on the teacher's
    settings = parse({"toy": Settings()}, argv, __doc__)
    quiet_libraries()
    run, features = settings.run, settings.run / "features"
    read = [require(run / name, comparison.evaluate.READS) for name in ("features", "labels", "teacher")]
    train, evaluation = read_labelled(run)
    made, about = read[-1]["arguments"], read_json(run / "teacher" / "teacher.json")
    if about["kind"] == "decoder" and not settings.model:
        raise Stop("a CrossEncoder of a decoder scores yes against no, not five levels: --model ENCODER")
    of_peer, model = peer_settings(made, about), settings.model or about["model"]
    rows = teacher_rows(train, made)
    print(f"{PEER}: {model}, {len(rows['label']):,} rows, {json.dumps(of_peer)}")
    encoder = train_peer(model, pair_texts(features, about["fields"], rows), rows["label"], of_peer)
    systems = {PEER: peer_system(encoder, pair_texts(features, about["fields"], evaluation))}

    # 2. Beside the run's systems: metrics, and the differences with their intervals
    students = sorted(path.parent.name for path in run.glob("student*/stage.json"))
    systems |= comparison.evaluate.all_systems(run, students[::-1], train, evaluation)
    found = {name: [comparison.System(evaluation, [], *system, {})] for name, system in systems.items()}
    values, differences = comparison.measure(found, settings.resamples)
    queries = len(np.unique(evaluation["query_index"]))
    print(f"\n{len(evaluation['label']):,} evaluation rows of {queries:,} queries")
    print(comparison.flat_table("system", values, ["condition"]))
    print(comparison.flat_table("difference", differences, ["condition", "minus"]))


if __name__ == "__main__":
    run_main(main)
