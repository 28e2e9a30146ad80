"""The benchmark scripts run at a tiny size, and what they compare agrees."""

import json
import sys
from types import SimpleNamespace

import pytest
import scale
import teacher
import torch
from conftest import toy_words
from helpers import stop_line
from transformers import AutoModelForSequenceClassification, AutoTokenizer


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A BERT with random weights and a word-piece tokenizer that frames a pair as [CLS] a [SEP] b [SEP]."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        ":",
        "title",
        "description",
        *dict.fromkeys(toy_words()),
    ]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    config = BertConfig(vocab_size=len(words), max_position_embeddings=128, initializer_range=0.2, **shape)
    BertModel(config).save_pretrained(folder)
    return folder


def test_teacher(tmp_path, monkeypatch):
    monkeypatch.setattr(teacher.stage03, "compile_layers", lambda *_: None)  # tests/test_inference.py does
    argv = ["--small", "--device", "cpu", "--steps", "1", "--rows", "8", "--batch-size", "4", "--profile"]
    argv += ["--images", "16", "--texts", "8", "--caption-tokens", "3", "--peak-tflops", "1"]
    teacher.main([*argv, "--json", str(tmp_path / "out.json")])
    out = json.loads((tmp_path / "out.json").read_text())
    assert out["linear_weights"] == 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)
    for part in ("train", "label", "caption", "embed"):
        assert out[part].keys() == {*teacher.WAYS[part]}
        assert all(figures["per_second"] > 0 for figures in out[part].values())
    train = out["train"]["activations kept"]
    assert train["share_of_bound"] == pytest.approx(6 * out["linear_weights"] * train["per_second"] / 1e12)
    assert out["label"]["naive"]["padding"] > 0 and "mm" in train["profile"]


class Padded:
    """A loop over padded batches with the call of sentence_transformers.CrossEncoder."""

    def __init__(self, folder, max_length, **options):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        self.options = {"truncation": True, "max_length": max_length, "padding": True, "return_tensors": "pt"}

    @torch.inference_mode()
    def predict(self, pairs, **options):
        queries, texts = map(list, zip(*pairs))
        return self.model(**self.tokenizer(queries, texts, **self.options)).logits.softmax(1).numpy()


def test_peers_of_the_teacher_agree(bert, features, tmp_path, monkeypatch):
    argv = ["--parts", "peers", "--run", str(features.parent), "--model", str(bert), "--rows", "64"]
    argv += ["--device", "cpu", "--precision", "fp32", "--json", str(path := tmp_path / "peers.json")]
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    assert "benchmarks/requirements.txt" in stop_line(teacher.main, argv)
    monkeypatch.setitem(sys.modules, "sentence_transformers", SimpleNamespace(CrossEncoder=Padded))
    teacher.main(argv)
    found = json.loads(path.read_text())["peers"]
    assert found["CrossEncoder"]["max_difference"] == 0
    assert 0 < found["ours"]["max_difference"] < 1e-6 < found["ours"]["per_second"]


def test_scale(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scale.tempfile, "tempdir", str(tmp_path))
    sizes = "--impressions 2000 --pins 300 --queries 50 --engagements 4000 --width 60 --hidden 8"
    scale.main(["--stages", "01", "04", *sizes.split()])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    found = {what: cells for what, *cells in rows}
    assert len(found) == 3  # 03 for 04's sake
    for cells in found.values():
        assert cells[0] == "2,000" and float(cells[2].replace(",", "")) > 0
    assert all(float(cells[4]) > 0.05 for cells in found.values())
    assert not list(tmp_path.glob("tmp*"))  # the tables are gone
