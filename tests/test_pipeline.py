"""The five stages as a user runs them, and what each folder promises: files, rows, refusals, repetition."""

import json
import os
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from helpers import ROOT, SYSTEMS, environment, script, stage, stop_line

import common
from lib.inputs.match import MATCH_FEATURES
from lib.models import load_config, load_tokenizer
from lib.stages.files import read_json, write_json
from lib.stages.finished import hold
from lib.stages.terminal import run_main
from lib.tables.raw import RawTables

STEPS = (  # stage, its settings: the toy's with little training
    ("01", "--shard-rows", "700"),
    ("02", "--epochs", "1", "--rows", "128"),
    ("03",),
    ("04", "--epochs", "2", "--seed", "4"),
    ("04", "--epochs", "2", "--seed", "4", "--labels", "human"),
    ("05", "--resamples", "50", "--search-pages", "2"),
)
FOLDERS = {"01": "features", "02": "teacher", "03": "labels", "04": "student", "05": "report"}
FILES = """
    features: pins.parquet queries.parquet labelled.parquet impressions/part-00000.parquet skipped_images.csv
    features: query_text_embedding.npy pin_text_embedding.npy pin_visual_embedding.npy pin_graph_embedding.npy
    teacher: head.safetensors adapter/adapter_model.safetensors tokenizer/tokenizer.json training_log.jsonl
    labels: labelled.parquet impressions/part-00000.parquet
    student: model.safetensors features.json training_log.jsonl
    student_human_labels: model.safetensors
    report: metrics.json report.md accuracy.png confusion.png reliability.png
"""


def arguments(step, run, toy):
    number, *more = step
    data = ["--data", str(toy)] if number == "01" else []
    device = ["--device", "cpu"] if number != "05" else []
    return [number, "--run", str(run), *data, *device, *more]


@pytest.fixture(scope="module")
def pipeline(toy, tmp_path_factory):
    """A run directory, made by the five scripts, and what they printed."""
    run, printed = tmp_path_factory.mktemp("pipeline") / "run", {}
    options = dict(env=environment(torch.get_num_threads()), cwd=run.parent, capture_output=True, text=True)
    for step in STEPS:
        number, *argv = arguments(step, run, toy)
        done = subprocess.run(script(number, *argv), **options)
        assert done.returncode == 0, done.stderr
        printed["".join(step)] = done.stdout
    return run, printed


def table(path):
    return pq.read_table(path)


def soft_labels(path):
    """Soft labels of a label file, [B, C]."""
    return np.stack([table(path)[f"p{level}"].to_numpy() for level in range(1, 6)], 1)


# ------------------------------------------------------------------------------------------------------------


def test_every_file_of_the_design_is_there(pipeline):
    run, _ = pipeline
    for line in FILES.split("\n"):
        folder, _, names = line.strip().partition(": ")
        for name in names.split():
            assert (run / folder / name).stat().st_size > 0, name
    for folder in ("features", "teacher", "labels", "student", "student_human_labels", "report"):
        about = read_json(run / folder / "stage.json")
        wanted = {"arguments", "seed", "versions", "rows", "seconds", "inputs", "identity", "outputs"}
        assert about["finished"] and wanted <= about.keys()
        files = {p.relative_to(run / folder).as_posix() for p in (run / folder).rglob("*") if p.is_file()}
        assert files == {"stage.json", *about["outputs"]}  # nothing intermediate is left, nothing is unlisted
    hidden = sorted(p.name for p in run.iterdir() if p.name.startswith("."))
    assert all(name.endswith(".lock") for name in hidden), hidden


def test_rows_in_are_rows_out(pipeline, toy):
    run, _ = pipeline
    raw = RawTables(toy, spill=run / "spill")

    def rows(sql):
        return raw.db.execute(sql).fetchall()

    def count(name):
        return rows(f"SELECT count(*) FROM raw_{name}")[0][0]

    features = run / "features"
    assert len(table(features / "pins.parquet")) == count("pins") == 100
    assert len(table(features / "queries.parquet")) == count("queries")
    labelled = table(features / "labelled.parquet")
    assert len(labelled) == len(table(run / "labels/labelled.parquet")) == count("labels")
    shards = sorted((features / "impressions").glob("part-*.parquet"))
    assert len(shards) == 3 and sum(len(table(p)) for p in shards) == count("impressions") == 2_000
    query_ids = np.array(table(features / "queries.parquet")["query_id"].to_pylist())
    pin_ids = np.array(table(features / "pins.parquet")["pin_id"].to_pylist())

    def pairs(found):
        return list(zip(query_ids[found["query_index"]], pin_ids[found["pin_index"]]))

    got = [pair for shard in shards for pair in pairs(table(shard))]
    assert got == rows("SELECT query_id, pin_id FROM raw_impressions")  # in their order
    got = list(zip(*zip(*pairs(labelled)), labelled["label"].to_pylist(), labelled["split"].to_pylist()))
    assert got == rows("SELECT query_id, pin_id, label::INTEGER, split FROM raw_labels")
    images = table(toy / "pins.parquet")["image"]
    with_image = len(images) - images.null_count
    assert read_json(features / "stage.json")["images"] == {"captioned": with_image, "skipped": 0}
    captions = table(features / "pins.parquet")["caption"].to_pylist()
    assert [bool(caption) for caption in captions] == [image is not None for image in images.to_pylist()]


def test_features_are_those_of_their_pairs(pipeline):
    """Every match feature is there, finite and not constant."""
    features = pipeline[0] / "features"
    for path in (features / "labelled.parquet", features / "impressions"):
        for name in MATCH_FEATURES:
            values = table(path)[name].to_numpy()
            assert values.dtype == np.float32 and np.isfinite(values).all() and values.std() > 0, (path, name)
    for path in features.glob("*_embedding.npy"):
        array = np.load(path, allow_pickle=False)
        side = "queries" if path.name.startswith("query") else "pins"
        assert len(array) == len(table(features / f"{side}.parquet")) and np.isfinite(array).all()


def test_soft_labels(pipeline):
    """float32, each row sums to 1, row for row the features' shards, as the teacher in the folder gives
    them."""
    run, _ = pipeline
    features = run / "features"
    teacher, about = common.Teacher.load(run / "teacher")
    tokenizer = load_tokenizer(run / "teacher" / "tokenizer", load_config(about["model"]))
    text = common.PairText(tokenizer, about["kind"], about["fields"], about["max_tokens"])
    paths = [features / "labelled.parquet", *sorted((features / "impressions").glob("*.parquet"))]
    for path, rows in stage("03").tokenized_shards(features, text, paths):
        labels = table(run / "labels" / path.relative_to(features))
        assert labels.column_names == ["p1", "p2", "p3", "p4", "p5"]
        assert {str(kind) for kind in labels.schema.types} == {"float"}
        p = soft_labels(run / "labels" / path.relative_to(features))
        assert len(p) == len(table(path)) and (p >= 0).all()
        np.testing.assert_allclose(p.sum(1), 1, atol=1e-6)
        for row in (0, len(p) // 2, len(p) - 1):
            with torch.inference_mode():
                inputs = common.pad_rows([rows[row]], tokenizer.pad_token_id)
                alone = teacher(*inputs).double().softmax(1)[0]
            np.testing.assert_allclose(p[row], alone, atol=1e-4)


def test_metrics(pipeline):
    run, _ = pipeline
    systems = read_json(run / "report" / "metrics.json")["systems"]
    assert list(systems) == [*SYSTEMS, "pooled"]
    names = ["accuracy", "within_one", "auroc_3", "auroc_4", "auroc_5", "ndcg_20", "ece"]
    for system, parts in systems.items():
        assert set(parts["by_language"]) == {"en", "es", "fr", "de"}
        for metrics in [parts["overall"], *parts["by_language"].values()]:
            assert list(metrics)[: len(names)] == names
            assert ("kl_to_teacher" in metrics) == system.startswith("student")
            assert all(m["value"] is None or m["low"] <= m["high"] for m in metrics.values())
        for name, m in parts["overall"].items():
            if name != "ece":  # resampling biases it upwards
                assert m["low"] <= m["value"] <= m["high"], (system, name, m)
    rows = table(run / "features" / "labelled.parquet").to_pylist()
    counts = Counter(row["label"] for row in rows if row["split"] == "train")
    level = [row["label"] for row in rows if row["split"] == "eval"]
    majority = systems["majority"]["overall"]
    share = level.count(counts.most_common(1)[0][0]) / len(level)
    assert majority["accuracy"]["value"] == pytest.approx(share, abs=1e-6)
    assert majority["auroc_4"]["value"] == 0.5


def test_report_names_every_system_and_picture(pipeline):
    folder = pipeline[0] / "report"
    text = (folder / "report.md").read_text()
    for system in read_json(folder / "metrics.json")["systems"]:
        assert f"| {system} |" in text
    pictures = [line.split("](")[1].split(")")[0] for line in text.splitlines() if line.startswith("![")]
    assert len(pictures) == 5
    assert all((folder / picture).read_bytes().startswith(b"\x89PNG") for picture in pictures)


def test_preambles_and_ends_are_printed(pipeline):
    run, printed = pipeline
    for step in STEPS:
        assert f"wrote {run}" in printed["".join(step)]
    assert "QLoRA" in printed["".join(STEPS[1])] and "4 to label" in printed["03"]


def test_whole_pipeline_again_gives_the_same_bytes(pipeline, toy, tmp_path):
    """In another folder and by one process: nothing hangs on a name, a clock or the process."""
    for step in STEPS:
        number, *argv = arguments(step, tmp_path / "again", toy)
        stage(number).main(argv)
    suffixes = (".parquet", ".npy", ".safetensors", ".csv", ".json", ".jsonl", ".png")
    files = [p.relative_to(pipeline[0]) for p in pipeline[0].rglob("*") if p.suffix in suffixes]
    files = [f for f in files if f.name != "stage.json"]
    assert len(files) > 30
    different = [f for f in files if (pipeline[0] / f).read_bytes() != (tmp_path / "again" / f).read_bytes()]
    assert [str(f) for f in different] == []


# ------------------------------------------------------------------------------------------------------------
# Started again


@pytest.fixture
def copied(pipeline, tmp_path):
    shutil.copytree(pipeline[0], tmp_path / "run")
    return tmp_path / "run"


def times(run):
    """When each file was changed; locks apart."""
    return {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file() and ".lock" not in p.name}


@pytest.mark.parametrize("step", STEPS, ids="".join)
def test_finished_stage_does_nothing(pipeline, toy, capsys, step):
    number, *argv = arguments(step, pipeline[0], toy)
    before = times(pipeline[0])
    stage(number).main(argv)
    assert "nothing to do" in capsys.readouterr().out
    assert before == times(pipeline[0])


@pytest.mark.parametrize(
    "step, flags",
    [
        (STEPS[0], ["--top-tokens", "3"]),
        (STEPS[1], ["--lr", "0.1"]),
        (STEPS[2], ["--no-merge"]),
        (STEPS[3], ["--temperature", "2"]),
        (STEPS[5], ["--seed", "9"]),
    ],
)
def test_other_arguments_are_refused_by_name(pipeline, toy, step, flags):
    number, *argv = arguments(step, pipeline[0], toy)
    line = stop_line(stage(number).main, [*argv, *flags])
    assert flags[0].replace("--no-", "--") in line and "--overwrite" in line and FOLDERS[number] in line


def test_a_moved_dataset_is_the_same_dataset(pipeline, toy, tmp_path, capsys):
    """Identity is what a stage reads, not where it lies."""
    data = shutil.copytree(toy, tmp_path / "moved")
    number, *argv = arguments(STEPS[0], pipeline[0], data)
    stage(number).main(argv)
    assert "nothing to do" in capsys.readouterr().out


def test_changed_data_is_noticed_and_overwrite_makes_it_anew(copied, toy, tmp_path, monkeypatch):
    data = shutil.copytree(toy, tmp_path / "data")
    number, *argv = arguments(STEPS[0], copied, data)
    lines = (data / "labels.csv").read_text().splitlines()
    (data / "labels.csv").write_text("\n".join(lines[:-1]) + "\n")
    line = stop_line(stage("01").main, argv)
    assert "table labels" in line and "--overwrite" in line
    monkeypatch.setattr(
        "lib.inputs.captions.Captioner", None
    )  # the captions are kept: no image is captioned again
    stage("01").main([*argv, "--overwrite"])
    # What was made from the earlier features is not mixed with the new ones.
    assert "03_label.py" in stop_line(stage("04").main, ["--run", str(copied), "--device", "cpu"])
    assert "--overwrite" in stop_line(stage("05").main, ["--run", str(copied)])


def test_a_refused_overwrite_loses_nothing(copied, toy, tmp_path):
    """A wrong label in the table; a wrong setting: the old folder stays as it was."""
    before = times(copied)
    data = shutil.copytree(toy, tmp_path / "data")
    text = (data / "labels.csv").read_text()
    (data / "labels.csv").write_text(text + text.splitlines()[1].replace('"train"', '"eval"') + "\n")
    number, *argv = arguments(STEPS[0], copied, data)
    assert "labels" in stop_line(stage("01").main, [*argv, "--overwrite"])
    with pytest.raises(SystemExit):
        stage("02").main(["--run", str(copied), "--batch-size", "0", "--overwrite"])
    assert before == {
        p: t for p, t in times(copied).items() if not p.relative_to(copied).parts[0].startswith(".")
    }


def test_a_changed_teacher_is_noticed(copied, toy):
    head = copied / "teacher" / "head.safetensors"
    data = bytearray(head.read_bytes())
    data[-1] ^= 1
    head.write_bytes(bytes(data))
    line = stop_line(stage("03").main, ["--run", str(copied), "--device", "cpu"])
    assert "head.safetensors" in line and "02_train_teacher.py" in line and "--overwrite" in line


def test_report_twice_gives_the_same_bytes(copied, toy):
    before = (copied / "report" / "metrics.json").read_bytes()
    number, *argv = arguments(STEPS[5], copied, toy)
    stage(number).main([*argv, "--overwrite"])
    assert (copied / "report" / "metrics.json").read_bytes() == before


def test_labels_without_merged_lora_are_nearly_the_same(copied):
    merged = soft_labels(copied / "labels" / "labelled.parquet")
    stage("03").main(["--run", str(copied), "--device", "cpu", "--no-merge", "--overwrite"])
    plain = soft_labels(copied / "labels" / "labelled.parquet")
    np.testing.assert_allclose(plain, merged, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------
# What cannot work


@pytest.mark.parametrize("number", ["02", "03", "04", "05"])
def test_missing_earlier_stage_names_its_command(tmp_path, number):
    line = stop_line(stage(number).main, ["--run", str(tmp_path)])
    command = f"python 01_build_features.py --run {tmp_path}"
    assert str(tmp_path / "features") in line and command in line


def test_missing_later_stages_name_their_commands(run):
    assert "python 02_train_teacher.py" in stop_line(stage("03").main, ["--run", str(run)])
    assert "python 03_label.py" in stop_line(stage("04").main, ["--run", str(run)])
    assert "python 03_label.py" in stop_line(stage("05").main, ["--run", str(run)])


def test_missing_student_names_its_command(copied):
    shutil.rmtree(copied / "student")
    assert "python 04_train_student.py" in stop_line(stage("05").main, ["--run", str(copied)])


@pytest.mark.parametrize("number", FOLDERS)
def test_importing_a_script_does_nothing_and_help_works(number, capsys):
    with pytest.raises(SystemExit) as end:
        stage(number).main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "--run" in text and "--overwrite" in text and "--preset" in text


@pytest.mark.parametrize("number", FOLDERS)
def test_unknown_and_abbreviated_flags(number, capsys):
    for wrong in (["--unknown"], ["--overwrit"], ["--preset", "nonsense"]):
        with pytest.raises(SystemExit) as end:
            stage(number).main(wrong)
        assert end.value.code == 2
        assert wrong[0].rstrip("t") in capsys.readouterr().err


@pytest.mark.parametrize("number", FOLDERS)
def test_every_stage_has_the_three_presets(number):
    presets = stage(number).PRESETS
    assert list(presets) == ["toy", "small", "paper"]
    assert all(settings.preset == name for name, settings in presets.items())


@pytest.mark.parametrize("step", STEPS[:4] + STEPS[5:], ids="".join)
def test_second_process_on_a_folder_is_told_so(pipeline, toy, step):
    number, *argv = arguments(step, pipeline[0], toy)
    folder = pipeline[0] / FOLDERS[number]
    lock = hold(folder, "write")
    line = stop_line(stage(number).main, argv)
    del lock
    assert str(folder) in line and "another process" in line


def test_an_error_is_one_line_and_status_1(tmp_path):
    done = subprocess.run(
        script("05", "--run", tmp_path / "nowhere"),
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith("error: ") and "01_build_features.py" in done.stderr


def ended(main):
    with pytest.raises(SystemExit) as end:
        run_main(main)
    return str(end.value.code)


nobody_can_write = Path("/sys").is_dir() and (not os.access("/sys", os.W_OK) or os.geteuid() == 0)


@pytest.mark.skipif(not nobody_can_write, reason="no folder here that nobody can write")
def test_folder_that_cannot_be_written(toy):
    argv = ["--data", str(toy), "--run", "/sys/run", "--device", "cpu"]
    line = ended(lambda: stage("01").main(argv))
    assert line.startswith("error: ") and "/sys/run" in line and "\n" not in line


def test_run_directory_that_is_a_file(toy, tmp_path):
    (tmp_path / "run").write_text("mine")
    argv = ["--data", str(toy), "--run", str(tmp_path / "run"), "--device", "cpu"]
    line = ended(lambda: stage("01").main(argv))
    assert line.startswith("error: ") and str(tmp_path / "run") in line
    assert (tmp_path / "run").read_text() == "mine"


def test_a_recipe_takes_a_relative_run_from_where_the_user_stands(tmp_path):
    """It landed in the checkout. The python here only says how it is called."""
    stub = tmp_path / "bin" / "python"
    stub.parent.mkdir()
    stub.write_text(f'#!/bin/bash\n[ "$1" = -c ] && echo {tmp_path}\ntrue\n')
    stub.chmod(0o755)
    (tmp_path / "here").mkdir()
    told = {"PATH": f"{stub.parent}:{os.environ['PATH']}", "VIRTUAL_ENV": str(tmp_path)}
    for run, expected in (("my/run", tmp_path / "here" / "my" / "run"), (tmp_path / "x", tmp_path / "x")):
        recipe = {"cwd": tmp_path / "here", "env": {**os.environ, **told, "RUN": str(run)}}
        done = subprocess.run(["bash", ROOT / "runs" / "toy.sh"], **recipe, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        calls = [line.split() for line in done.stdout.splitlines() if line.startswith("+ python 0")]
        assert len(calls) == 6 and {words[words.index("--run") + 1] for words in calls} == {str(expected)}
    stub.write_text('#!/bin/bash\n! grep -q version_info <<< "$2"\n')  # an old one
    done = subprocess.run(["bash", ROOT / "runs" / "toy.sh"], **recipe, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "error: needs Python 3.11 or newer\n"


def test_metrics_file_is_plain_json(pipeline):
    text = (pipeline[0] / "report" / "metrics.json").read_text()
    json.loads(text, parse_constant=lambda c: pytest.fail(f"{c} is no JSON"))


def test_unfinished_work_does_not_count(copied):
    about = read_json(copied / "teacher" / "stage.json")
    write_json(copied / "teacher" / "stage.json", {**about, "finished": False})
    line = stop_line(stage("03").main, ["--run", str(copied), "--device", "cpu"])
    assert "stage.json" in line and "--overwrite" in line
