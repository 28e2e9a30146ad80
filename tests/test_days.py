"""Four days of a shop, each a run of its own on the one before (01 --base): what the teacher has labelled it
never labels again, yesterday's student reads today's features, what is looked up is what would be made."""

import contextlib
import functools
import os
import shutil
import signal

import days
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from days import build, flags, read_tables, write_tables
from finished_run import student_seed
from helpers import stage, stop_line, synthetic
from PIL import Image
from test_kill import start, warm  # noqa: F401

from common import PairText
from lib.inputs import base as base_module
from lib.inputs import encoders
from lib.inputs.inherited import whose_labels
from lib.inputs.known import FILE, LabelTable
from lib.inputs.pairs import read_labels
from lib.inputs.rows import tokenized_shards
from lib.inputs.student_inputs import StudentInputs
from lib.models import load_config, load_tokenizer
from lib.stages.files import read_json, write_parquet
from serving.ranker import Ranker

trainer, labeller = stage("02"), stage("03")
QUICK = ["--rows", "48", "--epochs", "1", "--batch-size", "16", "--max-tokens", "48", "--lora-rank", "4"]


def train(run, models, *more):
    trainer.main(["--run", str(run), "--model", str(models["llama"]), *QUICK, *map(str, more)])


def label(run, *more):
    """Stage 03; returns the token ids that went through the teacher, as bytes, in their order."""
    passes, original = [], labeller.soft_labels

    def counted(teacher, rows, pad_id, budget, on_batch=None):
        if on_batch is not None:  # not the sample on which compiling is tried
            passes.extend(row.tobytes() for row in rows)
        return original(teacher, rows, pad_id, budget, on_batch)

    labeller.soft_labels = counted
    try:
        labeller.main(["--run", str(run), "--device", "cpu", *map(str, more)])
    finally:
        labeller.soft_labels = original
    return passes


def report_of(run):
    """Stages 04 and 05; returns report.md."""
    stage("04").main(["--run", str(run), "--epochs", "1", "--device", "cpu"])
    stage("05").main(["--run", str(run), "--resamples", "5", "--search-pages", "0"])
    return (run / "report" / "report.md").read_text()


def pairs_of(run, teacher):
    """The different pairs of a run, as the token ids that the teacher reads, in bytes."""
    about = read_json(teacher / "teacher.json")
    tokenizer = load_tokenizer(teacher / "tokenizer", load_config(about["model"]))
    text = PairText(tokenizer, about["kind"], about["fields"], about["max_tokens"])
    features = run / "features"
    paths = [features / "labelled.parquet", *features.glob("impressions/*")]
    return {row.tobytes() for _, rows in tokenized_shards(features, text, paths) for row in rows}


def labels_of(run):
    return {path.name: read_labels(path) for path in sorted(run.glob("labels/**/*.parquet"))}


def column(run, table, name):
    return pq.read_table(run / "features" / f"{table}.parquet")[name].to_pylist()


@pytest.fixture(scope="module")
def shop(features, toy, models, tmp_path_factory):
    """Monday's run, through 04, and the runs of the days after it, through 01."""
    root = tmp_path_factory.mktemp("shop")
    tables = read_tables(toy)
    (root / "monday").mkdir()
    (root / "monday" / "features").symlink_to(features)
    train(root / "monday", models)
    label(root / "monday")
    quick = ["--epochs", "2", "--seed", str(student_seed(features)), "--device", "cpu"]
    stage("04").main(["--run", str(root / "monday"), *quick])
    write_tables(days.tuesday(tables), toy / "images", root / "data2")
    build(root / "data2", root / "tuesday", models["bert"], "--base", root / "monday")
    write_tables(days.wednesday(tables), toy / "images", root / "data3")
    path = dict(zip(tables["pins"]["pin_id"].to_pylist(), tables["pins"]["image"].to_pylist()))[
        days.REPAINTED
    ]
    Image.new("RGB", (64, 64), "purple").save(root / "data3" / path)
    build(root / "data3", root / "wednesday", models["bert"], "--base", root / "tuesday")
    return root


def test_four_days(shop, models, toy, tmp_path, capsys):
    """Passes of the teacher are the different pairs whose token ids nobody has labelled, exactly."""
    monday, tuesday, wednesday = (shop / name for name in ("monday", "tuesday", "wednesday"))
    teacher = monday / "teacher"
    seen = pairs_of(monday, teacher)
    train(tuesday, models)  # no training row has changed
    assert f"the same as {teacher}, linked" in capsys.readouterr().out
    weights = next((tuesday / "teacher").rglob("adapter_model.safetensors"))
    assert weights.stat().st_nlink > 1
    passes = label(tuesday)
    said = capsys.readouterr().out
    assert len(passes) == len(set(passes)) and set(passes) == pairs_of(tuesday, teacher) - seen
    assert 8 <= len(passes) < 80 and f"{len(passes):,} by a pass of the teacher" in said
    about = read_json(tuesday / "labels" / "stage.json")["labels"]
    assert about["passes"] == len(passes) and list(about["looked_up"]) == [str(monday)]
    assert f"looked up in {monday}" in said and "known.arrow: " in said

    seen |= pairs_of(tuesday, teacher)
    train(wednesday, models)  # its files have another order, and no training row another text
    assert "linked" in capsys.readouterr().out
    passes = label(wednesday)
    assert set(passes) == pairs_of(wednesday, teacher) - seen and len(passes) == len(set(passes)) > 5
    back = read_json(wednesday / "labels" / "stage.json")["labels"]["looked_up"]
    assert [*back] == [str(tuesday), str(monday)] and back[str(tuesday)] > 100
    assert back[str(monday)] > 1_000  # they were absent on Tuesday
    assert LabelTable(wednesday / "labels" / FILE).rows == len(pairs_of(wednesday, teacher))

    for run in (tuesday, wednesday):  # the same with nothing looked up
        alone = tmp_path / f"{run.name} alone"
        alone.mkdir()
        (alone / "features").symlink_to(run / "features")
        passes = label(alone, "--teacher", teacher, "--known")
        assert set(passes) == pairs_of(run, teacher) and len(passes) == len(set(passes))
        about = read_json(alone / "labels" / "stage.json")
        assert about["teacher"]["folder"] == str(teacher) and f"trained in {monday}" in whose_labels(about)
        one, other = labels_of(run), labels_of(alone)
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_allclose(one[name], other[name], atol=1e-6)
    (tmp_path / "report").mkdir()
    for folder in ("features", "teacher", "labels"):
        (tmp_path / "report" / folder).symlink_to(wednesday / folder)
    assert f"looked up in {tuesday}, {back[str(monday)]:,} looked up in {monday}" in report_of(
        tmp_path / "report"
    )

    tables = read_tables(shop / "data3")
    query, pin = "new", days.RETITLED
    new = {"query_id": query, "pin_id": pin, "label": "5", "split": "train"}
    tables["labels"] = days.with_rows(tables["labels"], [new])
    write_tables(tables, shop / "data3" / "images", tmp_path / "data4")
    thursday = shop / "thursday"
    build(tmp_path / "data4", thursday, models["bert"], "--base", wednesday)
    train(thursday, models)
    assert "linked" not in capsys.readouterr().out
    passes = label(thursday)
    assert set(passes) == pairs_of(thursday, thursday / "teacher")  # another teacher: nothing is known
    assert "of another teacher" in capsys.readouterr().out
    assert f"{len(passes):,} by a pass of the teacher, " in report_of(thursday)
    systems = read_json(thursday / "report" / "metrics.json")["systems"]
    assert {"match", "student", "teacher"} <= systems.keys()


def test_a_day_without_a_new_pair_loads_no_teacher_and_tokenizes_once(shop, tmp_path, monkeypatch):
    run, tokenized, tokens = tmp_path / "run", [], labeller.tokenized_shards
    run.mkdir()
    (run / "features").symlink_to(shop / "monday" / "features")

    def counted(features, text, paths, made=()):
        tokenized.extend(path for path in paths if path not in made)
        return tokens(features, text, paths, made)

    monkeypatch.setattr(labeller, "load_teacher", None)
    monkeypatch.setattr(labeller, "tokenized_shards", counted)
    assert label(run, "--teacher", shop / "monday" / "teacher", "--known", shop / "monday") == []
    assert len(tokenized) == len(set(tokenized)) > 2
    one, other = labels_of(run), labels_of(shop / "monday")
    assert all(np.array_equal(one[name], other[name]) for name in other)


def test_boards_and_categories_that_the_base_does_not_know_are_said(shop, models, tmp_path, capsys):
    tables = read_tables(shop / "data3")
    boards, queries = tables["boards"], tables["queries"]
    titles = pc.binary_join_element_wise("unheard of", boards["board_title"], " ")
    tables["boards"] = boards.set_column(boards.column_names.index("board_title"), "board_title", titles)
    tables["queries"] = days.with_value(queries, "query_id", "q0001", "interest", "unheard of")
    write_tables(tables, shop / "data3" / "images", tmp_path / "data")
    build(tmp_path / "data", tmp_path / "run", models["bert"], "--base", shop / "wednesday")
    said = capsys.readouterr().out
    assert "fit them again" in said and "unknown values of query_interest 2.9%" in said
    drift = read_json(tmp_path / "run" / "features" / "stage.json")["drift"]
    assert drift["board saves under a title that the graph does not know"] == 1
    assert read_json(shop / "wednesday" / "features" / "stage.json")["drift"].keys() == drift.keys()


def test_ids_of_a_day_that_no_student_knew_are_no_drift(tmp_path):
    for day in ("base", "today"):
        synthetic(tmp_path / day, queries=20_000)
        path = tmp_path / day / "features" / "queries.parquet"
        ids = [f"{day} {row}" for row in range(20_000)]
        write_parquet(path, pq.read_table(path).drop_columns("interest").append_column("session", [ids]))
    base = base_module.Base(tmp_path / "base", {"outputs": {}})
    base.complete(tmp_path / "today" / "features", [])
    unknown = {"unknown values of query_session": 0.05, "unknown values of pin_kind": 0}  # 1,000 were known
    assert base.drift == pytest.approx(unknown)


def test_a_category_whose_values_are_all_digits_today_is_there(tmp_path, capsys):
    """In CSV they are numbers then; a student reads them as the texts that they were."""
    for day, values in (("base", ["7", "12", "A3", None]), ("today", [7.0, 12.0, 12.0, None])):
        synthetic(tmp_path / day, queries=200)
        path = tmp_path / day / "features" / "queries.parquet"
        table = pq.read_table(path).drop_columns("interest").append_column("shelf", [values * 50])
        write_parquet(path, table)
    base = base_module.Base(tmp_path / "base", {"outputs": {}})
    base.complete(tmp_path / "today" / "features", [])
    assert base.drift["unknown values of query_shelf"] == 0 and "lack" not in capsys.readouterr().out
    spec = {"embeddings": {}, "match": [], "categories": {"query_shelf": ["12", "7", "A3"]}, "numbers": {}}
    inputs = StudentInputs(tmp_path / "today" / "features", spec)
    assert inputs.codes["query_shelf"].tolist()[:4] == [2, 1, 1, 0]


def test_yesterdays_student_reads_todays_features(shop, capsys):
    """Without a column that it knows, and with one that it does not."""
    for name in ("tuesday", "wednesday"):
        if not (shop / name / "student").exists():
            (shop / name / "student").symlink_to(shop / "monday" / "student")
        then, now = Ranker(shop / "monday"), Ranker(shop / name)
        same = [pin for pin in then.ids if pin in now.ids and pin not in (days.RETITLED, days.REPAINTED)]
        one, other = (ranker.rank("red chair", candidates=same) for ranker in (then, now))
        assert len(same) == 97 and one.pins == other.pins
        np.testing.assert_allclose(one.probabilities, other.probabilities, atol=1e-6)
        assert {"new1", "new2"} <= set(now.rank("small oak desk").pins)
        new = ("bm25.parquet", "graph.parquet")
        assert all((shop / name / "features" / file).read_bytes() == (then.new.folder / file).read_bytes()
                   for file in new)  # fmt: skip
        del then, now  # their locks


def test_what_is_looked_up_is_what_would_be_made(shop, models, tmp_path, monkeypatch):
    """Byte for byte, but for the cache of captions."""
    made = []

    def none_known(self, side, texts, out):
        made.append(side)
        vectors, place = original(self, side, texts, out)
        assert (place >= 0).sum() > 25
        return vectors, np.full_like(place, -1)

    original = base_module.Base.known_texts
    monkeypatch.setattr(base_module.Base, "known_texts", none_known)
    monkeypatch.setattr(stage("01"), "reuse_captions", lambda folders, out: None)
    build(shop / "data2", tmp_path / "run", models["bert"], "--base", shop / "monday")
    one, other = content(shop / "tuesday" / "features"), content(tmp_path / "run" / "features")
    assert made == ["query", "pin"] and one.keys() == other.keys() and len(one) > 10
    assert [name for name in one if one[name] != other[name]] == []


def content(folder):
    """{file: bytes} of features, without the cache of captions and what stage.json says of time and files."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    found = {name: path.read_bytes() for name, path in files.items() if not name.startswith("captions/")}
    about = read_json(folder / "stage.json")
    return {**found, "stage.json": {k: about[k] for k in about if k not in ("seconds", "digest", "outputs")}}


def test_nothing_known_is_made_again(shop, models, tmp_path, monkeypatch, capsys):
    """Only new texts are embedded and new pictures captioned."""
    texts, encoder, images = [], encoders.TextEncoder.__call__, []

    def counted(self, some, **options):
        texts.extend(some)
        return encoder(self, some, **options)

    def captioned(self, some):
        images.extend(some)
        return captioner(self, some)

    captioner = encoders.Captioner.caption
    monkeypatch.setattr(encoders.TextEncoder, "__call__", counted)
    monkeypatch.setattr(encoders.Captioner, "caption", captioned)
    build(shop / "data3", tmp_path / "run", models["bert"], "--base", shop / "tuesday")
    assert len(images) == 1 and 2 <= len(texts) <= 3  # the picture's pin, the one with an engagement
    assert "all below 10%: the statistics serve" in capsys.readouterr().out


def at_rename(call, number, monkeypatch):
    """Calls; at the so-manieth rename of a file it is interrupted (0: never). Returns how many there were."""
    done, replace = 0, os.replace

    def counted(*paths):
        nonlocal done
        done += 1
        if done == number:
            raise KeyboardInterrupt
        replace(*paths)

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(os, "replace", counted)
        call()
    return done


def test_a_day_that_is_killed_again_and_again_ends_the_same(shop, models, tmp_path, monkeypatch):
    """By SIGKILL at renames of files: early ones, and of 02 the one that puts the folder into its place."""
    rng, runs = np.random.default_rng(1), [tmp_path / name for name in ("undisturbed", "disturbed")]
    stages = {
        "01": ("features", lambda run: flags(shop / "data2", run, models["bert"], "--base", shop / "monday")),
        "02": ("teacher", lambda run: ["--run", run, "--model", models["llama"], *QUICK]),
        "03": ("labels", lambda run: ["--run", run, "--device", "cpu"]),
    }
    for number, (folder, argv) in stages.items():
        main, (one, other) = stage(number).main, [list(map(str, argv(run))) for run in runs]
        renames = at_rename(functools.partial(main, one), 0, monkeypatch)
        assert renames > 2
        early = rng.integers(1, renames // 3 + 2, 2).tolist()  # started again, it has so many left
        for rename in [renames] if number == "02" else early:
            killed = start(number, other, tmp_path / "log", rename=(rename, rng.choice(["before", "after"])))
            assert killed == -signal.SIGKILL, (tmp_path / "log").read_text()
        main(other)
        one, other = (content(run / folder) for run in runs)
        assert one.keys() == other.keys()
        assert [name for name in one if one[name] != other[name]] == []
    assert read_json(runs[1] / "labels" / "stage.json")["labels"]["looked_up"]


def test_a_table_of_labels_that_is_damaged_is_made_again(shop, tmp_path, monkeypatch):
    """Of a day that was killed: the labels that it had are those of its shards."""
    run, teacher = tmp_path / "run", shop / "monday" / "teacher"
    run.mkdir()
    (run / "features").symlink_to(shop / "wednesday" / "features")
    argv = "--teacher", teacher, "--known"
    at_rename(functools.partial(label, run, *argv), 8, monkeypatch)
    tables = sorted(run.glob(".labels.unfinished-*/known/*.arrow"))
    assert len(tables) > 1
    content = bytearray(tables[0].read_bytes())
    content[-300] ^= 1
    tables[0].write_bytes(content)
    label(run, *argv)
    assert LabelTable(run / "labels" / FILE).rows == len(pairs_of(run, teacher))


def test_columns_that_a_student_reads_and_a_day_lacks_are_said_and_unknown(shop, models, tmp_path, capsys):
    """And pictures, of which there are none: zeros."""
    tables = read_tables(shop / "data2")
    tables["queries"] = tables["queries"].drop_columns("interest")
    tables["pins"] = tables["pins"].drop_columns("image")
    for name in ("boards", "link_visits"):
        del tables[name]
    (tmp_path / "no pictures").mkdir()
    data = write_tables(tables, tmp_path / "no pictures", tmp_path / "data")
    folder = build(data, tmp_path / "run", models["bert"], "--base", shop / "monday")
    lacking = "query_interest, pin_visual"
    assert (
        f"a student of {shop / 'monday'} reads, and these tables lack: {lacking}" in capsys.readouterr().out
    )
    for name in ("visual", "graph"):
        assert not np.load(folder / f"pin_{name}_embedding.npy").any()
    (tmp_path / "run" / "student").symlink_to(shop / "monday" / "student")
    inputs = StudentInputs(folder, read_json(shop / "monday" / "student" / "features.json"))
    assert not inputs.codes["query_interest"].any() and inputs.codes["query_shopping_interest"].any()


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--caption-tokens", "5"], "--caption-tokens was 12, is 5"),
        (
            ["--text-tokens", "32", "--graph-dim", "8"],
            "--graph-dim was 32, is 8; --text-tokens was 64, is 32",
        ),
        (["--text-encoder", "deberta"], "text encoder was"),
        (["--precision", "bf16"], "precision was 'float32 on cpu', is 'bfloat16 on cpu'"),
        (["embeddings"], "embeddings/pin_graph was None, is "),
    ],
)
def test_features_that_would_mean_something_else_are_refused(shop, models, tmp_path, flags, said):
    data, encoder = shop / "data2", models["bert"]
    if flags == ["embeddings"]:
        data, flags = tmp_path / "data", []
        shutil.copytree(shop / "data2", data)
        (data / "embeddings").mkdir()
        np.save(data / "embeddings" / "pin_graph.npy", np.ones((1, 32), np.float32))
        (data / "embeddings" / "pin_graph.ids").write_text("p00001\n")
    if "deberta" in flags:
        encoder, flags = models["deberta"], []
    line = stop_line(build, data, tmp_path / "run", encoder, "--base", shop / "monday", *flags)
    assert said in line and "table pins" not in line and not list(tmp_path.glob("run/*"))


def test_bases_that_cannot_be_built_on(shop, models, tmp_path):
    argv = shop / "data2", tmp_path / "run", models["bert"], "--base"
    line = stop_line(build, *argv, tmp_path / "nowhere")
    assert "missing or unfinished" in line and "01_build_features.py" in line
    shutil.copytree(shop / "monday" / "features", tmp_path / "monday" / "features")
    path = tmp_path / "monday" / "features" / "bm25.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert "bm25.parquet: not what its stage wrote" in stop_line(build, *argv, tmp_path / "monday")
