"""What 02 and 03 read is their identity: moved folders change nothing. What is not a number, or too long,
stops in time."""

import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
from helpers import mark_finished, stage, stop_line
from test_kill import content, start, warm  # noqa: F401

from lib.inputs import rows as rows_module
from lib.inputs.held_out import feature_scores, prior_scores, warn_if_useless
from lib.inputs.pairs import read_labels
from lib.inputs.rows import LabelledRows
from lib.stages import hardware
from lib.stages.files import read_json, write_parquet
from lib.stages.finished import hold

trainer, labeller = stage("02"), stage("03")
QUICK = ["--rows", "48", "--epochs", "1", "--batch-size", "16", "--max-tokens", "48", "--lora-rank", "4"]


@pytest.fixture(scope="module")
def day_one(features, models, tmp_path_factory):
    """A run with a teacher and labels, features and model of its own."""
    root = tmp_path_factory.mktemp("days")
    shutil.copytree(models["llama"], root / "model")
    shutil.copytree(features, root / "run" / "features")
    for path in sorted(root.glob("run/features/impressions/*.parquet"))[2:]:
        path.unlink()
    mark_finished(root / "run" / "features", identity="day one")
    trainer.main(["--run", str(root / "run"), "--model", str(root / "model"), *QUICK])
    labeller.main(["--run", str(root / "run")])
    return root


@pytest.fixture
def run(day_one, tmp_path):
    """A copy of it, in another place."""
    shutil.copytree(day_one / "run", tmp_path / "run", ignore=shutil.ignore_patterns(".*"))
    shutil.copytree(day_one / "model", tmp_path / "model")
    return tmp_path / "run"


def train(run, *more):
    trainer.main(["--run", str(run), "--model", str(run.parent / "model"), *QUICK, *more])


def label(run, *more):
    labeller.main(["--run", str(run), "--model", str(run.parent / "model"), *more])


def change(run, name, columns):
    """Other columns for one of the features' tables."""
    path = run / "features" / name
    table = pq.read_table(path)
    for column, values in columns.items():
        table = table.set_column(
            table.column_names.index(column), column, pa.array(values, table[column].type)
        )
    write_parquet(path, table)
    identity = read_json(run / "features" / "stage.json")["identity"]
    mark_finished(run / "features", identity=identity + "'")


def test_a_moved_run_and_model_are_the_same(run, capsys):
    train(run)
    label(run)
    assert capsys.readouterr().out.count("nothing to do") == 2


def test_one_label_changed_trains_again(run):
    labels = pq.read_table(run / "features" / "labelled.parquet")["label"].to_pylist()
    split = pq.read_table(run / "features" / "labelled.parquet")["split"].to_pylist()
    row = split.index("train")
    labels[row] = labels[row] % 5 + 1
    change(run, "labelled.parquet", {"label": labels})
    line = stop_line(train, run)
    assert "rows was" in line and "--overwrite" in line
    assert "02_train_teacher.py" in stop_line(label, run, "--overwrite")  # 03 sees it as well
    train(run, "--overwrite")


def test_another_text_of_a_training_pin_trains_again(run):
    titles = pq.read_table(run / "features" / "pins.parquet")["title"].to_pylist()
    change(run, "pins.parquet", {"title": [f"new {title}" for title in titles]})
    assert "rows was" in stop_line(train, run)


@pytest.mark.parametrize("number", ["02", "03"])
def test_the_precision_that_auto_came_to_is_part_of_the_identity(run, monkeypatch, number):
    monkeypatch.setattr(hardware, "pick_dtype", lambda name, device: torch.bfloat16)
    line = stop_line({"02": train, "03": label}[number], run, "--precision", "auto")
    assert "float32 on cpu" in line and "bfloat16 on cpu" in line


# ------------------------------------------------------------------------------------------------------------
# Not a number


def test_03_names_the_rows_that_have_no_finite_label(run, monkeypatch):
    """It wrote them, was finished, and 04 blamed --lr."""
    original, calls = labeller.soft_labels, []

    def broken(teacher, rows, *more):
        labels = original(teacher, rows, *more)
        calls.append(len(rows))
        if len(calls) == 2:  # the labelled rows, then the first shard
            labels[[3, 7]] = np.nan
        return labels

    monkeypatch.setattr(labeller, "soft_labels", broken)
    line = stop_line(label, run, "--overwrite", "--known")
    assert "part-00000.parquet" in line and "[3" in line and "--precision fp32" in line
    [work] = run.glob(".labels.unfinished-*")
    assert (work / "labelled.parquet").exists() and not list(work.glob("impressions/*.parquet"))


@pytest.mark.parametrize("held_out", [True, False])
def test_02_stops_where_the_last_step_ruined_the_weights(features, models, tmp_path, monkeypatch, held_out):
    """It saved a teacher with a loss of nan, "best so far"."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "features").symlink_to(features)
    if not held_out:
        nothing = {"share": 0.0, "salt": ""}
        monkeypatch.setattr(rows_module, "held_out", lambda keys, *more: (np.zeros(len(keys), bool), nothing))
    argv = ["--run", str(tmp_path / "run"), "--model", str(models["bert"]), *QUICK, "--rows", "8"]
    argv += ["--encoder-lr", "1e30", "--head-lr", "1e30", "--warmup", "0"]
    assert "--lr" in stop_line(trainer.main, argv)
    assert not (tmp_path / "run" / "teacher").exists()


# ------------------------------------------------------------------------------------------------------------
# Queries that do not fit


def test_a_query_that_only_impressions_have_is_checked_before_training(run, capsys):
    queries = pq.read_table(run / "features" / "queries.parquet")["query"].to_pylist()
    labelled = set(pq.read_table(run / "features" / "labelled.parquet")["query_index"].to_pylist())
    row = next(row for row in range(len(queries)) if row not in labelled)
    queries[row] = "chair " * 60
    change(run, "queries.parquet", {"query": queries})
    train(run)  # the teacher has not read it
    assert "nothing to do" in capsys.readouterr().out
    line = stop_line(train, run, "--overwrite", "--epochs", "2")
    assert "1 of" in line and "has 60" in line and "--long-queries cut" in line
    assert "--long-queries cut" in stop_line(label, run, "--overwrite")  # before its first shard
    assert not list(run.glob(".labels.unfinished-*/**/*.parquet"))
    label(run, "--long-queries", "cut", "--only-labelled", "--overwrite")
    assert len(read_labels(run / "labels" / "labelled.parquet"))
    train(run, "--overwrite", "--epochs", "2", "--long-queries", "cut")
    label(run, "--overwrite", "--only-labelled")  # as in training


# ------------------------------------------------------------------------------------------------------------
# Small data, and what is said


def test_a_teacher_that_learned_nothing_is_named(features, models, tmp_path, capsys, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "features").symlink_to(features)
    argv = ["--run", str(tmp_path / "run"), "--model", str(models["bert"]), *QUICK, "--rows", "8"]
    monkeypatch.setattr("lib.results.summary.TOY_WEIGHTS", 90_000)
    trainer.main([*argv, "--encoder-lr", "1e-9", "--head-lr", "1e-9"])
    said = capsys.readouterr().out
    assert "the labels' own shares: loss" in said and "does not beat the labels' own shares" in said
    assert "--preset small" in said  # the toy's settings on a model that is too large for them


def test_the_small_presets_teacher_is_stage_01s_text_encoder(features, models, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "features").symlink_to(features)
    argv = [*QUICK, "--rows", "8", "--precision", "fp32", "--run", str(tmp_path / "run")]
    trainer.main([*argv, "--preset", "small"])
    said = capsys.readouterr().out
    assert f"--model {models['bert']}: stage 01's text encoder" in said
    assert read_json(tmp_path / "run" / "teacher" / "teacher.json")["model"] == str(models["bert"])
    assert "labels on bm25: loss" in said and "labels on embedding: loss" in said and "queries train" in said


def test_what_a_feature_says_of_held_out_rows_by_hand():
    """Relevant rows have the higher cosine, in training and among the held-out ones."""
    level, cosine = torch.tensor([0, 4]).repeat(50), np.tile([0.1, 0.8], 50)
    rows = SimpleNamespace(levels=level, train=np.arange(80), held_out=np.arange(80, 100))
    scores = feature_scores(rows, cosine)
    assert scores["accuracy"] == scores["auroc_4"] == 1 and scores["loss"] < 0.1
    rows.held_out = np.arange(80, 100, 2)
    assert math.isnan(feature_scores(rows, cosine)["auroc_4"])


def test_a_teacher_too_sure_of_itself_is_told_from_one_that_learned_nothing(capsys):
    """Ten held-out rows, half of level 1 and half of level 5, as in training: the labels' shares are right
    for five of them, with loss log 2."""
    levels = torch.tensor([0, 4]).repeat(1_000)
    rows = SimpleNamespace(levels=levels, train=np.arange(10, 2_000), held_out=np.arange(10))
    prior = prior_scores(rows)
    assert (prior["loss"], prior["accuracy"]) == pytest.approx((math.log(2), 0.5), abs=0.01)
    for accuracy, loss, said in (
        (0.9, 0.6, ""),
        (0.9, 0.8, "is too sure of itself: right more often than the labels' own shares"),
        (0.5, 0.6, "does not beat the labels' own shares"),
        (0.4, 0.8, "does not beat the labels' own shares"),
    ):
        warn_if_useless(rows, {"held_out_loss": loss, "held_out_accuracy": accuracy})
        assert said in (line := capsys.readouterr().out) and bool(said) == bool(line)


def test_the_prior_by_hand():
    rows = LabelledRows.__new__(LabelledRows)
    rows.levels = torch.tensor([0, 0, 0, 1, 0, 1])
    rows.train, rows.held_out = np.arange(4), np.array([4, 5])
    shares = np.array([3, 1, 0.5, 0.5, 0.5]) / 5.5
    scores = prior_scores(rows)
    assert scores["loss"] == pytest.approx(-np.log(shares[:2]).mean()) and scores["accuracy"] == 0.5


def test_twelve_queries_train_and_say_that_nothing_is_held_out(run, capsys):
    table = pq.read_table(run / "features" / "labelled.parquet", filters=[("split", "=", "train")])
    queries = np.unique(table["query_index"].to_numpy())[:12]
    few = table.filter(pa.array(np.isin(table["query_index"].to_numpy(), queries)))
    write_parquet(run / "features" / "labelled.parquet", few)
    change(run, "labelled.parquet", {})
    train(run, "--overwrite")
    said = capsys.readouterr().out
    assert "none held out" in said or "held out:" in said
    label(run, "--overwrite", "--only-labelled")


def test_no_fields_at_all(tmp_path):
    assert "title description" in stop_line(trainer.main, ["--run", str(tmp_path), "--fields"])


def test_a_gpu_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for number in ("02", "03"):
        line = stop_line(stage(number).main, ["--run", str(tmp_path), "--device", "cuda"])
        assert "--device cuda" in line and "GPU" in line


def test_presets_are_what_they_say():
    for module in (trainer, labeller):
        assert {name: settings.preset for name, settings in module.PRESETS.items()} == {
            name: name for name in ("toy", "small", "paper")
        }
    small = trainer.PRESETS["small"]
    assert (small.encoder_lr, small.head_lr, small.layer_decay) == (1e-4, 1e-3, 0.8)
    assert trainer.TOY.layer_decay == trainer.PRESETS["paper"].layer_decay == 1.0
    assert small.epochs is None and replace(trainer.TOY) == trainer.PRESETS["toy"]


# ------------------------------------------------------------------------------------------------------------
# Locks


def test_what_02_and_03_read_stays_as_it_is_while_they_work(run, monkeypatch):
    """They let go of the features at once: 01 --overwrite could put others into their place."""
    asked = []

    def note(folder):
        asked.append(stop_line(hold, run / folder, "write"))

    original = {"train_step": trainer.train_step, "soft_labels": labeller.soft_labels}

    def train_step(*arguments):
        note("features")
        return original["train_step"](*arguments)

    def soft_labels(*arguments):
        note("features")
        note("teacher")
        return original["soft_labels"](*arguments)

    monkeypatch.setattr(trainer, "train_step", train_step)
    monkeypatch.setattr(labeller, "soft_labels", soft_labels)
    train(run, "--overwrite", "--rows", "20")
    label(run, "--overwrite", "--only-labelled")
    assert len(asked) == 4 and all("is at work here or reads it" in line for line in asked)
