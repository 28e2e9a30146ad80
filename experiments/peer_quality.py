"""Quality beside what a user would use instead, on the same rows: paired intervals of the differences.

    pip install -r benchmarks/requirements.txt
    python experiments/peer_quality.py --run outputs/msrd      minutes: a CrossEncoder is trained

Reads a run's features, teacher, labels and students; prints two tables, with 95 % intervals: bootstrap over
queries. cross_encoder is sentence-transformers' CrossEncoder, trained by its own trainer: the teacher's base
model, training rows, text fields, greatest length, epochs, batch size, warm-up, decay and precision;
cross-entropy of the five levels. Its own: the learning rate, one linear layer for a head; a pair longer than
the greatest length loses the end of the pin text, or of the query where that is longer.
"""

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


def cross_encoder(model, made, max_tokens, pairs, labels, evaluated):
    """A CrossEncoder trained on pairs [(query, pin text)] and their labels in 1..5, on the pairs `evaluated`:
    probabilities [B, C] and ranking score [B]. made: stage 02's arguments."""
    try:
        from datasets import Dataset
        from sentence_transformers import cross_encoder as peer
    except ImportError as error:
        raise Stop(f"{error.name}: pip install -r benchmarks/requirements.txt") from None
    from transformers import set_seed

    set_seed(made["seed"])  # of the new head
    weights = {"dtype": torch.float32}  # in whatever the folder has them, as ours while they are trained
    encoder = peer.CrossEncoder(model, num_labels=NUM_LEVELS, max_length=max_tokens, model_kwargs=weights)
    queries, pins = zip(*pairs)
    data = Dataset.from_dict({"query": queries, "pin": pins, "label": labels - 1})
    device, loss = pick_device("auto"), peer.losses.CrossEntropyLoss(encoder)
    with tempfile.TemporaryDirectory() as folder:
        arguments = peer.CrossEncoderTrainingArguments(
            output_dir=folder,
            num_train_epochs=made["epochs"],
            per_device_train_batch_size=made["batch_size"],
            warmup_steps=made["warmup"],  # below 1: a share of the steps
            weight_decay=made["weight_decay"],
            bf16=pick_dtype(made["precision"], device) == torch.bfloat16,
            use_cpu=device.type == "cpu",  # bf16 there has to be asked for
            seed=made["seed"],
            save_strategy="no",
            disable_tqdm=False,  # it takes minutes
        )
        peer.CrossEncoderTrainer(encoder, arguments, train_dataset=data, loss=loss).train()
    p = encoder.predict(evaluated, apply_softmax=True, show_progress_bar=False).astype(np.float64)
    return p, expected_level(p)


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
    if made["rows"]:
        raise Stop(f"{run}: its teacher learned --rows {made['rows']} of the labels: which ones is not known")
    learned, *_ = split_rows(train["key"], SimpleNamespace(**made))  # as stage 02 splits them
    rows = {name: column[learned] for name, column in train.items()}
    model, fields = settings.model or about["model"], about["fields"]
    print(f"cross_encoder: {model}, {len(learned):,} rows")
    pairs, evaluated = (pair_texts(features, fields, some) for some in (rows, evaluation))
    peer = cross_encoder(model, made, about["max_tokens"], pairs, rows["label"], evaluated)

    # 2. Beside the run's systems: metrics, and the differences with their intervals
    students = sorted(path.parent.name for path in run.glob("student*/stage.json"))
    systems = comparison.evaluate.all_systems(run, students[::-1], train, evaluation)
    systems = {"cross_encoder": peer, **systems}
    found = {name: [comparison.System(evaluation, *system, {})] for name, system in systems.items()}
    values, differences = comparison.measure(found, settings.resamples)
    queries = len(np.unique(evaluation["query"]))
    print(f"\n{len(evaluation['label']):,} evaluation rows of {queries:,} queries")
    for title, rows in (("system", values), ("difference", differences)):
        print("\n".join(comparison.table_of(title, comparison.COMPARED.values(), rows)))


if __name__ == "__main__":
    run_main(main)
