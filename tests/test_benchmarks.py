"""The benchmark scripts run at a tiny size, and what they compare agrees."""

import functools
import json

import known_labels
import label_throughput
import pytest
import scale
import teacher_gpu
import torch
from helpers import stop_line


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
        *(f"w{i}" for i in range(50)),
    ]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    config = BertConfig(vocab_size=len(words), max_position_embeddings=64, initializer_range=0.2, **shape)
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def msrd(tmp_path_factory):
    """64 judgments of 9 queries and 12 movies, in MSRD's form; one movie has no overview, one judgment no
    movie."""
    folder = tmp_path_factory.mktemp("msrd")
    movies = []
    for i in range(12):
        overview = " ".join(f"w{(i * j) % 50}" for j in range(4 * i))
        movies.append({"id": str(i), "title": f"w{i} w{i + 1}", "overview": overview})
    (folder / "movies-corpus.jsonl").write_text("".join(json.dumps(m) + "\n" for m in movies))
    judgments = [f"q{i // 8}\tw{i // 8} w3\t{i % 12}\t{i % 2}" for i in range(70)]
    judgments[5] = "q0\tw0 w3\t999\t1"
    lines = ["query_id\tquery\tdoc_id\tgrade", *judgments]
    (folder / "movies-judgments.tsv").write_text("\n".join(lines) + "\n")
    return folder


def test_label_throughput(bert, msrd, tmp_path, capsys):
    argv = ["--data", str(msrd), "--model", str(bert), "--rows", "64", "--max-tokens", "32"]
    argv += ["--batch-tokens", "256", "--repeats", "1", "--only", "loop,pipeline,ours"]
    label_throughput.main([*argv, "--json", str(tmp_path / "out.json")])
    out = json.loads((tmp_path / "out.json").read_text())
    assert out["rows"] == out["rows_with_equal_tokens"] == 64
    assert out["spread"] > 0.01  # the rows' probabilities differ, so that agreement says something
    systems = [(r["system"], r["precision"]) for r in out["results"]]
    assert systems[:3] == [("pipeline", "fp32"), ("loop", "fp32"), ("ours", "fp32")]
    for r in out["results"]:
        largest, mean = (1e-6, 1e-7) if r["precision"] == "fp32" else (0.03, 0.004)
        assert r["rows_per_second"] > 0 and r["max_difference"] < largest and r["mean_difference"] < mean
    padding = {r["system"]: r["padding"] for r in out["results"] if r["precision"] == "fp32"}
    assert 0 <= padding["ours"] < padding["loop"] == padding["pipeline"]
    assert "| ours | fp32 |" in capsys.readouterr().out


def test_label_throughput_names_what_to_install(bert, msrd, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sentence_transformers", None)
    argv = ["--data", str(msrd), "--model", str(bert), "--rows", "8", "--only", "crossencoder"]
    line = stop_line(label_throughput.main, argv)
    assert "benchmarks/requirements.txt" in line and "--only" in line


def test_teacher_gpu(tmp_path):
    argv = ["--small", "--device", "cpu", "--steps", "1", "--rows", "8", "--batch-size", "4"]
    argv += ["--images", "2", "--image-batch", "2", "--caption-tokens", "3", "--peak-tflops", "1"]
    teacher_gpu.main([*argv, "--json", str(tmp_path / "out.json")])
    out = json.loads((tmp_path / "out.json").read_text())
    assert out["linear_weights"] == 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)
    facts = {"tokens_per_second", "padding", "peak_gb", "share_of_bound"}
    for way in ("ours", "naive"):
        assert facts <= out["train"][way].keys()
        assert facts | {"rows_per_second"} <= out["label"][way].keys()
        assert out["caption"][way]["images_per_second"] > 0
    train = out["train"]["ours"]
    flops = 6 * out["linear_weights"] * train["tokens_per_second"]
    assert train["share_of_bound"] == pytest.approx(flops / 1e12)


def test_scale(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scale.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(scale, "bare_student_rate", functools.partial(scale.bare_student_rate, seconds=0.1))
    sizes = "--impressions 2000 --pins 300 --queries 50 --engagements 4000 --width 60 --hidden 8"
    scale.main(["--stages", "01", "04", "logs", "match", *sizes.split()])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    found = {what: cells for what, *cells in rows}
    assert len(found) == 6  # each stage, 03 for 04's sake, and 04's network alone
    for cells in found.values():
        assert cells[0] == "2,000" and float(cells[2].replace(",", "")) > 0
    assert all(float(found[what][4]) > 0.05 for what in found if what.startswith(("01, all", "03", "04")))
    assert not list(tmp_path.glob("tmp*"))  # the tables are gone


def test_known_labels_are_found_and_counted(monkeypatch, capsys):
    monkeypatch.setattr(known_labels, "SHARD", 1_000)
    monkeypatch.setattr(known_labels, "NEW", 0.1)
    known_labels.main(["--known", "5000"])
    said = capsys.readouterr().out
    assert "table: 5,000 pairs" in said and "found 4,500 of 5,000" in said
