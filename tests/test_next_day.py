"""The next day. 01 --update takes in what is new and leaves the rest as it is, whatever kills it; what 02 and
03 read is their identity: moved folders change nothing, only new pairs are labelled; what is not a number or
too long stops in time."""

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
from days import NEW, build, two_days
from finished_run import student_seed
from helpers import TOY_MODELS, mark_finished, own_embeddings, small_dataset, stage, stop_line, write_dataset
from rank_bm25 import BM25Okapi
from test_kill import content, start, warm  # noqa: F401

from lib.inputs import rows as rows_module
from lib.inputs.bm25 import tokenize
from lib.inputs.held_out import prior_scores, warn_if_useless
from lib.inputs.pairs import read_labels
from lib.inputs.rows import LabelledRows, hash_rows, unique_rows
from lib.results.summary import is_stand_in
from lib.stages import hardware
from lib.stages.files import read_json, write_parquet
from lib.stages.finished import hold, require_finished
from serving.ranker import Ranker

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


def test_the_next_day(run, capsys, monkeypatch):
    """A new query, a new pin, a new shard of impressions, and rows added to the last one: 02 has nothing to
    do, 03 labels the new pairs alone, and old rows stay as they are to the byte."""
    features = run / "features"
    for name in ("queries", "pins"):
        table = pq.read_table(features / f"{name}.parquet")
        write_parquet(features / f"{name}.parquet", pa.concat_tables([table, table.slice(3, 1)]))
    shards = sorted(features.glob("impressions/part-*.parquet"))
    first, last = (pq.read_table(path) for path in (shards[0], shards[-1]))
    write_parquet(shards[-1], pa.concat_tables([last, first.slice(0, 5), last.slice(0, 2)]))
    write_parquet(features / "impressions" / "part-00099.parquet", first.slice(5, 4))
    identity = read_json(features / "stage.json")["identity"]
    mark_finished(features, identity=identity + " of the next day")
    before = {path.name: read_labels(path) for path in run.glob("labels/**/*.parquet")}
    old_bytes = {path.name: path.read_bytes() for path in run.glob("labels/**/*.parquet")}

    train(run)
    assert "nothing to do" in capsys.readouterr().out
    passes, original = [], labeller.soft_labels

    def counted(teacher, rows, *more):
        passes.append(len(rows))
        return original(teacher, rows, *more)

    monkeypatch.setattr(labeller, "soft_labels", counted)
    label(run)
    said = capsys.readouterr().out
    assert "have changed; what still holds is kept" in said
    old_rows = sum(map(len, before.values()))
    assert f"{old_rows + 5 + 2 + 4:,} rows, {old_rows:,} of them labelled before" in said
    sample = 2 * labeller.CHECKED_ROWS  # before and after LoRA is merged
    assert sum(passes) - sample <= 5 + 4  # the last shard's own rows once more are no new pairs
    after = {path.name: read_labels(path) for path in run.glob("labels/**/*.parquet")}
    for name, labels in before.items():
        np.testing.assert_array_equal(after[name][: len(labels)], labels)
    assert len(after[shards[-1].name]) == len(before[shards[-1].name]) + 7
    np.testing.assert_array_equal(after[shards[-1].name][-2:], before[shards[-1].name][:2])
    for path in run.glob("labels/**/*.parquet"):
        if path.name in old_bytes and path.name != shards[-1].name:
            assert path.read_bytes() == old_bytes[path.name]
    np.testing.assert_allclose(after["part-00099.parquet"], before[shards[0].name][5:9], atol=1e-6)


def test_labels_of_the_day_before_that_are_damaged_are_made_again(run, capsys):
    shard = sorted(run.glob("labels/impressions/*.parquet"))[0]
    before = read_labels(shard)
    content = bytearray(shard.read_bytes())
    content[200] ^= 1
    shard.write_bytes(content)
    change(run, "pins.parquet", {})
    label(run)
    assert f"{len(before):,} of them" not in capsys.readouterr().out
    np.testing.assert_allclose(read_labels(shard), before, atol=1e-6)


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
# A pair is labelled once


def test_equal_rows_share_one_pass():
    rows = [np.array(row, np.int32) for row in ([1, 2], [3], [1, 2], [2, 1], [3], [1, 2])]
    different, which = unique_rows(rows)
    assert [row.tolist() for row in different] == [[1, 2], [3], [2, 1]] and which.tolist() == [
        0,
        1,
        0,
        2,
        1,
        0,
    ]
    assert unique_rows([]) == ([], pytest.approx([]))
    assert hash_rows(rows) != hash_rows([*rows[1:], rows[0]])
    assert hash_rows([np.array([1, 2], np.int32)]) != hash_rows([np.array([n], np.int32) for n in (1, 2)])


@pytest.mark.parametrize("known", [0, 2, 5])
def test_known_labels_and_new_ones(monkeypatch, known):
    rows = [np.array(row, np.int32) for row in ([1], [2], [1], [3], [2], [4], [3])]
    passed = []

    def by_first_token(teacher, some, pad_id, budget, on_batch):
        passed.extend(row[0] for row in some)
        return np.array([[row[0]] * 5 for row in some], np.float32).reshape(-1, 5)

    monkeypatch.setattr(labeller, "soft_labels", by_first_token)
    kept = np.array([[row[0]] * 5 for row in rows[:known]], np.float32).reshape(-1, 5)
    labels, passes = labeller.label_shard(None, rows, kept, 0, 100)
    assert labels[:, 0].tolist() == [1, 2, 1, 3, 2, 4, 3]
    assert passes == len(passed) == {0: 4, 2: 2, 5: 1}[known]


# ------------------------------------------------------------------------------------------------------------
# Not a number


def test_03_names_the_rows_that_have_no_finite_label(run, monkeypatch):
    """It wrote them, was finished, and 04 blamed --lr."""
    original, calls = labeller.soft_labels, []

    def broken(teacher, rows, *more):
        labels = original(teacher, rows, *more)
        calls.append(len(rows))
        if len(calls) == 4:  # the sample twice, the labelled rows, then the first shard
            labels[[3, 7]] = np.nan
        return labels

    monkeypatch.setattr(labeller, "soft_labels", broken)
    line = stop_line(label, run, "--overwrite")
    assert "part-00000.parquet" in line and "[3" in line and "--precision fp32" in line
    [work] = run.glob(".labels.unfinished-*")
    assert (work / "labelled.parquet").exists() and not list(work.glob("impressions/*.parquet"))


@pytest.mark.parametrize("held_out", [True, False])
def test_02_stops_where_the_last_step_ruined_the_weights(features, models, tmp_path, monkeypatch, held_out):
    """It saved a teacher with a loss of nan, "best so far"."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "features").symlink_to(features)
    if not held_out:
        everything = {"share": 0.0, "salt": ""}
        monkeypatch.setattr(rows_module, "hash_split", lambda *of_queries: everything)
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
    assert "--long-queries cut" in stop_line(label, run)  # before its first shard
    assert not list(run.glob(".labels.unfinished-*/**/*.parquet"))
    label(run, "--long-queries", "cut", "--only-labelled", "--overwrite")
    assert len(read_labels(run / "labels" / "labelled.parquet"))
    train(run, "--overwrite", "--epochs", "2", "--long-queries", "cut")
    label(run, "--overwrite", "--only-labelled")  # as in training


# ------------------------------------------------------------------------------------------------------------
# Small data, and what is said


def test_a_teacher_that_learned_nothing_is_named(features, models, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "features").symlink_to(features)
    argv = ["--run", str(tmp_path / "run"), "--model", str(models["bert"]), *QUICK, "--rows", "8"]
    trainer.main([*argv, "--encoder-lr", "1e-9", "--head-lr", "1e-9"])
    said = capsys.readouterr().out
    assert "the labels' own shares have loss" in said and "does not beat the labels' own shares" in said
    assert "--preset small" in said  # the toy's settings on a model that is none of its stand-ins


def test_a_teacher_too_sure_of_itself_is_told_from_one_that_learned_nothing(capsys):
    """Ten held-out rows, half of level 1 and half of level 5, as in training: the labels' shares are right
    for five of them, with loss log 2."""
    levels = torch.tensor([0, 4]).repeat(1_000)
    rows = SimpleNamespace(levels=levels, train=np.arange(10, 2_000), held_out=np.arange(10))
    assert prior_scores(rows) == pytest.approx((math.log(2), 0.5), abs=0.01)
    for accuracy, loss, said in (
        (0.9, 0.6, ""),
        (0.9, 0.8, "is too sure of itself: right more often than the labels' own shares"),
        (0.5, 0.6, "does not beat the labels' own shares"),
        (0.4, 0.8, "does not beat the labels' own shares"),
    ):
        warn_if_useless(rows, {"held_out_loss": loss, "held_out_accuracy": accuracy})
        assert said in (line := capsys.readouterr().out) and bool(said) == bool(line)


def test_which_models_are_stand_ins(models):
    """With the others, --preset toy is said not to fit."""
    for name in ("llama", "bert", "t5", "deberta"):
        assert is_stand_in(TOY_MODELS / name)
    for model in ("google-bert/bert-base-multilingual-cased", "gpt2", models["bert"], "/nowhere/llama"):
        assert not is_stand_in(model)


def test_the_prior_by_hand():
    rows = LabelledRows.__new__(LabelledRows)
    rows.levels = torch.tensor([0, 0, 0, 1, 0, 1])
    rows.train, rows.held_out = np.arange(4), np.array([4, 5])
    shares = np.array([3, 1, 0.5, 0.5, 0.5]) / 5.5
    loss, accuracy = prior_scores(rows)
    assert loss == pytest.approx(-np.log(shares[:2]).mean(), rel=1e-5) and accuracy == 0.5


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
    assert small.encoder_lr == 1e-4 and small.head_lr == 1e-3
    assert small.epochs == 3 and replace(trainer.TOY) == trainer.PRESETS["toy"]


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
    assert len(asked) >= 5 and all("is at work here or reads it" in line for line in asked)


# ------------------------------------------------------------------------------------------------------------
# 01 --update


@pytest.fixture
def days(toy, models):
    return two_days(toy, models["bert"])


@pytest.fixture
def first(days, tmp_path):
    """A copy of the first day's run."""
    shutil.copytree(days / "run1", tmp_path / "first", ignore=shutil.ignore_patterns(".*"))
    return tmp_path / "first"


def column(folder, table, name):
    return pq.read_table(folder / f"{table}.parquet")[name].to_pylist()


def by_id(folder, side, table):
    """{id: its row, and its vectors as bytes}"""
    vectors = [np.load(path) for path in sorted(folder.glob(f"{side}_*_embedding.npy"))]
    rows = zip(pq.read_table(folder / f"{table}.parquet").to_pylist(), *vectors)
    return {row[f"{side}_id"]: (row, [vector.tobytes() for vector in some]) for row, *some in rows}


def pairs(folder, pattern):
    """Rows of pairs in order, with the ids of their queries and pins."""
    ids = {"query": column(folder, "queries", "query_id"), "pin": column(folder, "pins", "pin_id")}
    rows = pa.concat_tables(pq.read_table(path) for path in sorted(folder.glob(pattern))).to_pylist()
    for row in rows:
        for side, names in ids.items():
            row[side] = names[row.pop(f"{side}_index")]
    return rows


def test_old_rows_stay_and_new_ones_come_after(days):
    before, after = days / "run1" / "features", days / "run2" / "features"
    for side, table, widths in (("query", "queries", 1), ("pin", "pins", 3)):
        was, now = (column(folder, table, f"{side}_id") for folder in (before, after))
        assert now[: len(was)] == was and sorted(now[len(was) :]) == NEW[f"{side}_id"]
        old, new = (by_id(folder, side, table) for folder in (before, after))
        assert all(new[row] == old[row] and len(old[row][1]) == widths for row in was)
        made = np.array(
            [[np.frombuffer(vector, np.float16).any() for vector in new[row][1]] for row in NEW[f"{side}_id"]]
        )
        assert made.any(axis=0).all()  # a pin on no board has no graph embedding
    was, now = (pairs(folder, "impressions/*.parquet") for folder in (before, after))
    assert len(was) == 1759 and len(now) == 2000 and now[:1759] == was
    assert pairs(after, "labelled.parquet") == pairs(before, "labelled.parquet")
    kept = ["bm25.parquet", "graph.parquet", "labelled.parquet"]
    kept += [f"impressions/part-0000{number}.parquet" for number in range(5)]
    for name in kept:
        assert (after / name).read_bytes() == (before / name).read_bytes()
    require_finished(after, "")


def test_what_is_known_is_not_made_again(days, first, monkeypatch, capsys):
    """One pin has another title: that text alone is embedded, no picture captioned, and the shards without
    that pin are the very files of before."""
    data = first.parent / "data"
    shutil.copytree(days / "day1", data)
    table = pq.read_table(data / "pins.parquet")
    titles = ["A new title of it", *table["title"].to_pylist()[1:]]
    write_parquet(data / "pins.parquet", table.set_column(1, "title", pa.array(titles)))
    texts, encoder = [], stage("01").TextEncoder.__call__

    def counted(self, some):
        texts.extend(some)
        return encoder(self, some)

    monkeypatch.setattr(stage("01").TextEncoder, "__call__", counted)
    monkeypatch.setattr("lib.inputs.captions.Captioner", None)
    inodes = {path.name: path.stat().st_ino for path in first.glob("features/impressions/*")}
    folder = build(data, first, "--update", *encoder_of(days))
    assert len(texts) == 1 and texts[0].startswith("A new title of it")
    changed = column(folder, "pins", "title").index("A new title of it")
    kept = 0
    for path in folder.glob("impressions/*"):
        has_it = changed in column(path.parent, path.stem, "pin_index")
        assert (path.stat().st_ino == inodes[path.name]) == (not has_it)
        kept += not has_it
    assert f"{kept} of {len(inodes)} shards" in capsys.readouterr().out


def encoder_of(days):
    arguments = read_json(days / "run1" / "features" / "stage.json")["arguments"]
    return ["--text-encoder", arguments["text_encoder"]]


def test_a_plain_run_names_update_and_an_update_of_nothing_does_nothing(days, first, capsys):
    encoder = encoder_of(days)
    line = stop_line(build, days / "day2", first, *encoder)
    assert "table pins was" in line and "--update takes in what is new, --overwrite" in line
    about = (first / "features" / "stage.json").read_bytes()
    build(days / "day1", first, "--update", *encoder)
    assert "nothing to do" in capsys.readouterr().out
    build(days / "day2", days / "run2", "--update", *encoder)
    build(days / "day2", days / "run2", *encoder)
    assert capsys.readouterr().out.count("nothing to do") == 2
    assert (first / "features" / "stage.json").read_bytes() == about
    assert "earlier features" not in stop_line(build, days / "day1", days / "run2", *encoder)


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--shard-rows", "200"], "--shard-rows was 300, is 200"),
        (["--text-encoder", "deberta"], "text encoder was"),
        (["--caption-tokens", "5"], "--caption-tokens was 12, is 5"),
        (["--overwrite"], "give one of them"),
        (["--precision", "bf16"], "bfloat16 on cpu"),
    ],
)
def test_settings_that_cannot_be_updated(days, first, models, flags, said):
    flags = [str(models["deberta"]) if flag == "deberta" else flag for flag in flags]
    encoder = [] if "--text-encoder" in flags else encoder_of(days)
    before = sorted(path.name for path in first.rglob("*"))
    line = stop_line(build, days / "day2", first, "--update", *encoder, *flags)
    assert said in line and "table pins" not in line
    assert [name for name in sorted(path.name for path in first.rglob("*")) if ".lock" not in name] == before


def test_nothing_to_update(days, first, tmp_path):
    line = stop_line(build, days / "day1", tmp_path / "new", "--update", *encoder_of(days))
    assert "nothing to update" in line and "01_build_features.py" in line
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "features").symlink_to(first / "features")
    line = stop_line(build, days / "day2", tmp_path / "linked", "--update", *encoder_of(days))
    assert "is a link to" in line and str(first) in line
    path = first / "features" / "pin_text_embedding.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    line = stop_line(build, days / "day2", first, "--update", *encoder_of(days))
    assert "pin_text_embedding.npy: not what its stage wrote" in line and "--overwrite" in line


def small_day(folder, **more):
    """The small dataset, with further columns, and without models: {table: {column: values}}."""
    tables = small_dataset()
    tables["pins"]["kind"] = ["a", "b", "a"]
    tables["labels"]["price"] = [1.0, 2.0, 3.0]
    tables["impressions"]["price"] = [1.0, 2.0, 2.5]
    for name, columns in more.items():
        tables[name] |= columns
    return own_embeddings(write_dataset(folder, tables))


GONE = {"pin_id": ["007", "p2", "new"]}
ROWS_OF_GONE = {"query_id": ["q1", "q1", "q2"], "pin_id": ["007", "p2", "new"], "label": [5, 1, 4]}


@pytest.mark.parametrize(
    "change, said",
    [
        ({"pins": {"kind": [1.0, 2.0, 1.0]}}, "kind was string, is double"),
        ({"pins": {"colour": ["red", "red", "blue"]}}, "colour was absent, is string"),
        ({"queries": {"interest": ["home", None]}}, "interest was absent"),
        ({"labels": {"price": ["", "", ""]}}, "price was there, is absent"),
        ({"pins": GONE, "labels": ROWS_OF_GONE, "impressions": {"pin_id": ["new"] * 3}}, "1 pins of"),
    ],
)
def test_tables_that_cannot_be_updated(tmp_path, change, said):
    run = tmp_path / "run"
    build(small_day(tmp_path / "one"), run)
    before = content(run / "features")
    line = stop_line(build, small_day(tmp_path / "two", **change), run, "--update")
    assert said in line and "--overwrite instead of --update" in line
    after = content(run / "features")
    assert {name: after[name] for name in before} == before


def test_the_window_of_engagement_moves_and_an_own_embedding_changes(tmp_path):
    run = tmp_path / "run"
    build(small_day(tmp_path / "one"), run, "--as-of", "2024-06-30")
    data = small_day(tmp_path / "two")
    assert pairs(run / "features", "labelled.parquet")[0]["engagement"] == pytest.approx(np.log(4))
    folder = build(data, run, "--as-of", "2026-07-01", "--update")
    assert not column(folder, "pins", "queries")[0]  # its events are older than two years now
    assert pairs(folder, "labelled.parquet")[0]["engagement"] == 0
    np.save(data / "embeddings" / "pin_text.npy", np.full((1, 4), 2, np.float32))
    (data / "embeddings" / "pin_text.ids").write_text("p3\n")
    shard = folder / "impressions" / "part-00000.parquet"
    before = shard.read_bytes()
    build(data, run, "--as-of", "2026-07-01", "--update")
    assert np.load(folder / "pin_text_embedding.npy")[2].tolist() == [2, 2, 2, 2]
    assert shard.read_bytes() == before  # its queries have no vector: a cosine of 0 stays 0
    np.save(data / "embeddings" / "pin_text.npy", np.full((1, 5), 2, np.float32))
    line = stop_line(build, data, run, "--as-of", "2026-07-01", "--update")
    assert "pin_text_embedding.npy was 4 wide, is 5 wide" in line


def test_drift_by_hand(tmp_path, capsys):
    """Statistics of three short texts, then of five: rank_bm25 itself is the reference."""
    run = tmp_path / "run"
    texts = ["red chair", "oak table", "blue lamp of glass"]
    tables = {"pins": {"title": texts, "description": [None] * 3}, "engagements": {"pin_id": ["nobody"]}}
    logs = {"boards": {"board_title": ["Kitchen"]}, "link_visits": {"dwell_seconds": [1.0]}}
    build(small_day(tmp_path / "one", **tables, **logs), run)
    texts += ["red sofa", "red sofa bed"]
    more = {"pin_id": ["007", "p2", "p3", "p4", "p5"], "title": texts, "description": [None] * 5}
    more["kind"] = ["a", "b", "a", "c", "b"]
    tables |= {"pins": more, "queries": {"query": ["red sofa", "red chair"]}}
    tables["impressions"] = {"query_id": ["q1"], "pin_id": ["p5"], "price": [1.0]}
    boards = {"pin_id": ["007", "p4", "p5", "p5"], "board_title": ["Kitchen", "Kitchen", "Garden", "Garden"]}
    folder = build(small_day(tmp_path / "two", **tables, **{**logs, "boards": boards}), run, "--update")

    words = [
        tokenize(text) + tokenize(board)
        for text, board in zip(texts, ["kitchen", "", "", "kitchen", "garden"])
    ]
    then, now = BM25Okapi(words[:3]), BM25Okapi(words)
    off = 2 * abs(then.idf["red"] - now.idf["red"]) + abs(then.idf["chair"] - now.idf["chair"])
    drift = read_json(folder / "stage.json")["drift"]
    assert drift == pytest.approx({
        "mean length of a pin's text": abs(now.avgdl / then.avgdl - 1),
        "idf of the words of queries": off / (2 * then.idf["red"] + then.idf["chair"]),
        "words of queries that only new pins have": 1 / 4,
        "board saves under a title that the graph does not know": 2 / 4,
        "loss of what its axes hold": 0.0,
    }, abs=1e-5)  # fmt: skip
    [row] = pairs(folder, "impressions/*.parquet")
    length = len(words[4])  # "sofa" is a word that the statistics do not know
    expected = then.idf["red"] * 2.5 / (1 + 1.5 * (0.25 + 0.75 * length / then.avgdl))
    assert row["bm25"] == pytest.approx(expected, rel=1e-5) and row["terms_matched"] == 0.5
    said = capsys.readouterr().out
    assert "not below 10%: make the statistics anew (--overwrite" in said
    assert "category values that no old row has: 1 of pin_kind" in said


def update_in_a_child(days, run, log, rename=None):
    """01 --update to day 2 in a process of its own; returns its exit code."""
    argv = ["--data", days / "day2", "--update", "--shard-rows", "300", "--device", "cpu", *encoder_of(days)]
    return start("01", ["--run", run, *argv], log, rename)


@pytest.fixture(scope="module")
def undisturbed(toy, models, tmp_path_factory):
    """What an update in a child leaves, and how many files it renames."""
    days, root = two_days(toy, models["bert"]), tmp_path_factory.mktemp("undisturbed")
    shutil.copytree(days / "run1", root / "run", ignore=shutil.ignore_patterns(".*"))
    assert update_in_a_child(days, root / "run", root / "log") == 0, (root / "log").read_text()
    return content(root / "run" / "features"), int((root / "log").read_text().rsplit("renames: ", 1)[1])


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_killed_in_the_middle_of_an_update(days, first, undisturbed, tmp_path, share):
    """The old folder stands there, whole; the same command ends with the bytes of an undisturbed update."""
    new, renames = undisturbed
    old = content(first / "features")
    assert update_in_a_child(days, first, tmp_path / "log", (int(share * renames), "before")) == -9
    now = content(first / "features")
    assert {name: now[name] for name in old} == old
    assert update_in_a_child(days, first, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert differing(content(first / "features"), new) == []


@pytest.mark.parametrize(
    "from_last, when, stands", [(1, "before", "old"), (1, "after", None), (0, "after", "new")]
)
def test_killed_while_an_update_swaps_folders(days, first, undisturbed, tmp_path, from_last, when, stands):
    """The last two renames put the old folder aside, and the new one into its place."""
    new, renames = undisturbed
    old = content(first / "features")
    assert update_in_a_child(days, first, tmp_path / "log", (renames - from_last, when)) == -9
    assert (first / "features").exists() == (stands is not None)
    if stands:
        now, whole = content(first / "features"), {"old": old, "new": new}[stands]
        assert {name: now[name] for name in whole} == whole
    assert update_in_a_child(days, first, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert differing(content(first / "features"), new) == []


def differing(one, other):
    return [name for name in sorted({*one, *other}) if one.get(name) != other.get(name)]


# ------------------------------------------------------------------------------------------------------------
# Three days, through all stages


def test_three_days(days, first, models, capsys, monkeypatch):
    """Day 2 has new queries, pins and impressions: the teacher stays, new pairs alone are labelled, student
    and report are made anew; until then the old student serves the new features. Day 3 has one label changed:
    the teacher is trained again."""
    data, encoder = first.parent / "data", encoder_of(days)
    seed = ["--seed", str(student_seed(first / "features"))]

    def later_stages(*flags):
        train_day = ["--run", str(first), "--model", str(models["llama"]), *QUICK]
        trainer.main(train_day)
        labeller.main(["--run", str(first)])
        stage("04").main(["--run", str(first), "--epochs", "2", *seed, "--device", "cpu", *flags])
        stage("05").main(["--run", str(first), "--resamples", "20", "--search-pages", "1", *flags])

    later_stages()
    labels = {path: path.read_bytes() for path in sorted(first.glob("labels/**/*.parquet"))}
    ranker = Ranker(first)
    day_one = ranker.rank("red chair")
    del ranker  # its lock

    shutil.copytree(days / "day2", data)
    build(data, first, "--update", *encoder)
    ranker = Ranker(first)
    day_two = ranker.rank("red chair", candidates=day_one.pins)
    assert day_two.pins == day_one.pins
    np.testing.assert_array_equal(day_two.probabilities, day_one.probabilities)
    assert set(NEW["pin_id"]) < set(ranker.rank("red chair").pins)
    new = [
        row for row in pairs(first / "features", "impressions/*.parquet") if row["query"] in NEW["query_id"]
    ]
    texts = dict(zip(*(column(first / "features", "queries", name) for name in ("query_id", "query"))))
    found = ranker.score([(texts[row["query"]], row["pin"]) for row in new])
    for name in ("bm25", "terms_matched", "text_cosine"):
        np.testing.assert_allclose(found.match[name], [row[name] for row in new], rtol=1e-5, atol=1e-6)
    del ranker
    capsys.readouterr()

    passes, original = [], labeller.soft_labels

    def counted(teacher, rows, *more):
        passes.append(len(rows))
        return original(teacher, rows, *more)

    monkeypatch.setattr(labeller, "soft_labels", counted)
    line = stop_line(later_stages)
    assert "--overwrite" in line and "features was" in line  # 04's
    later_stages("--overwrite")
    said = capsys.readouterr().out
    assert said.count("teacher: finished before") == 2 and "labels: finished before" in said
    rows = len(pairs(first / "features", "impressions/*.parquet"))
    human = len(pairs(first / "features", "labelled.parquet"))
    old = 1759 + human
    assert f"{rows + human:,} rows, {old:,} of them labelled before" in said
    assert sum(passes) - 2 * labeller.CHECKED_ROWS <= rows - 1759
    changed = [path.name for path, before in labels.items() if path.read_bytes() != before]
    assert changed == ["part-00005.parquet"]  # the last one, to which rows were added
    report = read_json(first / "report" / "stage.json")["inputs"]
    assert report["features"] == read_json(first / "features" / "stage.json")["identity"]

    table = pq.read_table(data / "labels.parquet")
    levels = table["label"].to_pylist()
    [row] = np.flatnonzero(np.array(column(first / "features", "labelled", "split")) == "train")[:1]
    levels[row] = str(int(levels[row]) % 5 + 1)  # as the toy's CSV has it
    index = table.column_names.index("label")
    write_parquet(
        data / "labels.parquet", table.set_column(index, "label", pa.array(levels, table["label"].type))
    )
    build(data, first, "--update", *encoder)
    assert "7 of 7 shards" in capsys.readouterr().out
    assert "rows was" in stop_line(later_stages)
    trainer.main(["--run", str(first), "--model", str(models["llama"]), *QUICK, "--overwrite"])
