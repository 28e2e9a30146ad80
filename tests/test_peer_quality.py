"""experiments/peer_quality.py: the same rows for the peer, and paired intervals."""

import importlib.util
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from helpers import mark_finished, stop_line, synthetic
from safetensors.torch import load_file, save_file

from experiments import comparison, peer_quality
from lib.inputs.pairs import read_labelled
from lib.stages.files import read_json, write_json
from lib.tables.splits import held_out

TRAINED = {
    "epochs": 1,
    "batch_size": 8,
    "encoder_lr": 1e-3,
    "lr": 1e-2,
    "warmup": 0.1,
    "precision": "fp32",
    "weight_decay": 0.01,
    "rows": None,
    "seed": 3,
}


@pytest.fixture
def labelled_run(tmp_path, models):
    """Features and labels with random content and the papers of a teacher that read title and links."""
    synthetic(tmp_path, shards=1)
    about = {
        "model": str(models["bert"]),
        "fields": ["title", "links"],
        "max_tokens": 32,
        "kind": "encoder",
    }
    write_json(tmp_path / "teacher" / "teacher.json", about)
    mark_finished(tmp_path / "teacher", arguments=TRAINED)
    return tmp_path


def test_pair_texts(labelled_run):
    features = labelled_run / "features"
    pins = pq.read_table(features / "pins.parquet").to_pydict()
    pins["title"][2], pins["links"][2], pins["boards"][2] = "red chair", "a shop", "not read"
    pq.write_table(pq.read_table(features / "pins.parquet").from_pydict(pins), features / "pins.parquet")
    rows = {"query_index": np.array([5, 0]), "pin_index": np.array([2, 0])}
    texts = peer_quality.pair_texts(features, ["title", "links"], rows)
    assert texts == [("text 5", "title: red chair links: a shop"), ("text 0", "")]


def test_differences_are_paired():
    """Two systems that differ on one query alone: the interval of the difference is narrow, though each one's
    is wide, and it is the difference resample by resample."""
    rng = np.random.default_rng(0)
    query = np.repeat(np.arange(40), 6)
    y = rng.integers(1, 6, len(query))
    p = rng.dirichlet(np.ones(5), len(query))
    right = np.eye(5)[y - 1]
    p[query % 2 == 0] = right[query % 2 == 0]  # every second query: all right
    better = np.where((query == 1)[:, None], right, p)
    rows = {"label": y, "query": query, "language": np.array([""] * len(y), object)}
    systems = {}
    for name, of_rows in (("bm25", p), ("teacher", better)):
        systems[name] = [comparison.System(rows, of_rows, of_rows @ np.arange(1, 6), {})]
    values, differences = comparison.measure(systems, 200)
    assert {(row["condition"], row["minus"]) for row in differences} == {("teacher", "bm25")}
    wide = next(row for row in values if (row["condition"], row["metric"]) == ("bm25", "accuracy"))
    found = next(row for row in differences if row["metric"] == "accuracy")
    expected = ((better.argmax(1) + 1 == y).mean() - (p.argmax(1) + 1 == y).mean()).round(6)
    assert found["value"] == expected > 0
    assert found["low"] == 0 and found["high"] < 0.1 < wide["high"] - wide["low"]


def test_the_tables(labelled_run, capsys, monkeypatch):
    """All systems of stage 05 stand beside the peer, here one that says the same of every pair. It gets the
    teacher's settings and rows: not those of the queries that 02 held out."""
    given = {}

    def same_of_all(model, made, max_tokens, pairs, labels, evaluated):
        given.update(made=made, max_tokens=max_tokens, labels=labels, queries=[query for query, _ in pairs])
        return np.full((len(evaluated), 5), 0.2), np.zeros(len(evaluated))

    monkeypatch.setattr(peer_quality, "cross_encoder", same_of_all)
    peer_quality.main(["--run", str(labelled_run), "--resamples", "20"])
    out = capsys.readouterr().out
    for system in ("cross_encoder", "majority", "bm25", "embedding", "match", "teacher"):
        assert f"\n| {system} | " in out
    assert "| teacher − cross_encoder | " in out
    train, _ = read_labelled(labelled_run)
    queries = [f"text {i}" for i in train["query_index"]]
    is_held_out, _ = held_out(queries, 0.1, "teacher:3", np.ones(len(queries)))
    assert 0 < is_held_out.sum() < len(is_held_out)
    assert given["made"] == TRAINED and given["max_tokens"] == 32
    assert given["labels"].tolist() == train["label"][~is_held_out].tolist()
    assert given["queries"] == np.array(queries)[~is_held_out].tolist()


def test_a_decoder_is_no_peer(labelled_run):
    about = labelled_run / "teacher" / "teacher.json"
    about.write_text(about.read_text().replace("encoder", "decoder"))
    assert "--model" in stop_line(peer_quality.main, ["--run", str(labelled_run)])


def test_rows_that_a_teacher_drew_are_not_known(labelled_run):
    mark_finished(labelled_run / "teacher", arguments={**TRAINED, "rows": 50})
    assert "learned --rows 50" in stop_line(peer_quality.main, ["--run", str(labelled_run)])


@pytest.mark.skipif(
    not (importlib.util.find_spec("sentence_transformers") and importlib.util.find_spec("datasets")),
    reason="benchmarks/requirements.txt is not installed",
)
def test_a_peer_learns(models, tmp_path, monkeypatch):
    """It ranks pairs of level 5 above others, which share no word with them. Its weights are fp32, as our
    teacher's while it trains; the folder has fp16, whose gradients can end in NaN."""
    from sentence_transformers import cross_encoder as peer

    folder = shutil.copytree(models["bert"], tmp_path / "bert")
    weights = load_file(folder / "model.safetensors")
    save_file({name: weight.half() for name, weight in weights.items()}, folder / "model.safetensors")
    write_json(folder / "config.json", {**read_json(folder / "config.json"), "dtype": "float16"})

    trainer, kept_in = peer.CrossEncoderTrainer, set()

    def note(encoder, *rest, **more):
        kept_in.update(weight.dtype for weight in encoder.parameters())
        return trainer(encoder, *rest, **more)

    monkeypatch.setattr(peer, "CrossEncoderTrainer", note)
    words = {5: "chair", 1: "lamp"}
    labels = np.array([5, 1] * 40)
    pairs = [("red", f"title: {words[label]}") for label in labels]
    made = {**TRAINED, "epochs": 5, "precision": "bf16", "seed": 0}
    p, score = peer_quality.cross_encoder(str(folder), made, 16, pairs, labels, pairs)
    assert np.allclose(p.sum(1), 1, atol=1e-5)
    assert score[labels == 5].min() > score[labels == 1].max()
    assert kept_in == {torch.float32}
