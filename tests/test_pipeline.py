"""The five stages as a user runs them, and what each folder promises: files, rows, refusals, repetition."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
from argparse import Namespace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import common
from helpers import environment, script, stage, stop_line

STEPS = (  # stage, its settings: the toy's with little training
    ("01", "--shard-rows", "700"),
    ("02", "--epochs", "1", "--rows", "128"),
    ("03",),
    ("04", "--epochs", "2", "--seed", "4"),  # a seed that holds out some of these few queries
    ("04", "--epochs", "2", "--seed", "4", "--labels", "human"),
    ("05", "--resamples", "50", "--search-pages", "2"),
)
FOLDERS = {"01": "features", "02": "teacher", "03": "labels", "04": "student", "05": "report"}


def arguments(step, run, toy):
    number, *more = step
    return [number, "--run", str(run), *(["--data", str(toy)] if number == "01" else []), *(["--device", "cpu"] if number != "05" else []), *more]


@pytest.fixture(scope="module")
def pipeline(toy, tmp_path_factory):
    """A run directory, made by the five scripts, and what they printed."""
    run, printed = tmp_path_factory.mktemp("pipeline") / "run", {}
    for step in STEPS:
        number, *argv = arguments(step, run, toy)
        done = subprocess.run(script(number, *argv), env=environment(torch.get_num_threads()), cwd=run.parent, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        printed["".join(step)] = done.stdout
    return run, printed


def table(path):
    return pq.read_table(path)


# ---------------------------------------------------------------------------------------------------------------------


def test_every_file_of_the_design_is_there(pipeline):
    run, _ = pipeline
    for name in ("features/pins.parquet", "features/queries.parquet", "features/labelled.parquet", "features/impressions/part-00000.parquet", "features/skipped_images.csv",
                 "features/query_text_embedding.npy", "features/pin_text_embedding.npy", "features/pin_visual_embedding.npy", "features/pin_graph_embedding.npy",
                 "teacher/head.safetensors", "teacher/adapter/adapter_model.safetensors", "teacher/tokenizer/tokenizer.json", "teacher/training_log.jsonl",
                 "labels/labelled.parquet", "labels/impressions/part-00000.parquet", "student/model.safetensors", "student/features.json", "student/training_log.jsonl",
                 "student_human_labels/model.safetensors", "report/metrics.json", "report/report.md", "report/accuracy.png", "report/confusion.png", "report/reliability.png"):
        assert (run / name).stat().st_size > 0, name
    for folder in ("features", "teacher", "labels", "student", "student_human_labels", "report"):
        about = common.read_json(run / folder / "stage.json")
        assert about["finished"] and {"arguments", "seed", "versions", "rows", "seconds", "inputs", "identity"} <= about.keys()
    left = [p for p in run.rglob("*") if ".tmp" in p.name or p.name in ("work", "checkpoint.safetensors", "best.safetensors")]
    assert not left


def test_rows_in_are_rows_out(pipeline, toy):
    run, _ = pipeline
    raw = common.RawTables(toy, spill=run / "spill")
    count = lambda name: raw.db.execute(f"SELECT count(*) FROM raw_{name}").fetchall()[0][0]
    features = run / "features"
    assert len(table(features / "pins.parquet")) == count("pins") == 100
    assert len(table(features / "queries.parquet")) == count("queries")
    assert len(table(features / "labelled.parquet")) == len(table(run / "labels/labelled.parquet")) == count("labels")
    parts = sorted((features / "impressions").glob("part-*.parquet"))
    assert len(parts) == 3 and sum(len(table(p)) for p in parts) == count("impressions") == 2_000
    ids = {side: np.array(table(features / file)[f"{side}_id"].to_pylist()) for side, file in (("query", "queries.parquet"), ("pin", "pins.parquet"))}
    got = [(q, p) for part in parts for q, p in zip(ids["query"][table(part)["query_index"]], ids["pin"][table(part)["pin_index"]])]
    assert got == raw.db.execute("SELECT query_id, pin_id FROM raw_impressions").fetchall()  # in their order
    labelled = table(features / "labelled.parquet").to_pydict()
    got = list(zip(ids["query"][labelled["query_index"]], ids["pin"][labelled["pin_index"]], labelled["label"], labelled["split"]))
    assert got == raw.db.execute("SELECT query_id, pin_id, label::INTEGER, split FROM raw_labels").fetchall()
    images = table(toy / "pins.parquet")["image"]
    assert common.read_json(features / "stage.json")["images"] == {"captioned": len(images) - images.null_count, "skipped": 0}
    captions = table(features / "pins.parquet")["caption"].to_pylist()
    assert [bool(c) for c in captions] == [i is not None for i in images.to_pylist()]


def test_features_are_those_of_their_pairs(pipeline):
    """Every match feature is there, finite and not constant."""
    features = pipeline[0] / "features"
    for path in (features / "labelled.parquet", features / "impressions"):
        for name in common.MATCH_FEATURES:
            values = table(path)[name].to_numpy()
            assert values.dtype == np.float32 and np.isfinite(values).all() and values.std() > 0, (path, name)
    for path in features.glob("*_embedding.npy"):
        array = np.load(path, allow_pickle=False)
        assert len(array) == len(table(features / f"{'queries' if path.name.startswith('query') else 'pins'}.parquet")) and np.isfinite(array).all()


def test_soft_labels(pipeline):
    """float32, each row sums to 1, row for row the features' shards, as the teacher in the folder gives them."""
    run, _ = pipeline
    teacher, about = common.Teacher.load(run / "teacher")
    shards = stage("03").Shards(run / "features", run / "teacher", about)
    paths = [run / "features" / "labelled.parquet", *sorted((run / "features" / "impressions").glob("*.parquet"))]
    for path in paths:
        labels = table(run / "labels" / path.relative_to(run / "features"))
        assert labels.column_names == ["p1", "p2", "p3", "p4", "p5"] and {str(t) for t in labels.schema.types} == {"float"}
        p = np.stack([labels[f"p{k}"].to_numpy() for k in range(1, 6)], 1)
        assert len(p) == len(table(path)) and (p >= 0).all()
        np.testing.assert_allclose(p.sum(1), 1, atol=1e-6)
        ids = shards.token_ids(path)
        for row in (0, len(p) // 2, len(p) - 1):
            with torch.inference_mode():
                alone = teacher(*ids.batch(np.array([row]), shards.tokenizer.pad_token_id)).double().softmax(1)[0]
            np.testing.assert_allclose(p[row], alone, atol=1e-4)


def test_metrics(pipeline):
    run, _ = pipeline
    metrics = common.read_json(run / "report" / "metrics.json")
    assert list(metrics["systems"]) == ["majority", "bm25", "student_human_labels", "student", "teacher"]
    names = ["accuracy", "within_one", "auroc_3", "auroc_4", "auroc_5", "ndcg_20", "ece"]
    for system, parts in metrics["systems"].items():
        assert set(parts["by_language"]) == {"en", "es", "fr", "de"}
        for m in [parts["overall"], *parts["by_language"].values()]:
            assert list(m) == names + ["kl_to_teacher"] * system.startswith("student")
            assert all(v["value"] is None or v["low"] <= v["high"] for v in m.values())
        for name, v in parts["overall"].items():
            if name != "ece":  # resampling biases it upwards
                assert v["low"] <= v["value"] <= v["high"], (system, name, v)
    human = table(run / "features" / "labelled.parquet").to_pydict()
    level = np.array([y for y, s in zip(human["label"], human["split"]) if s == "eval"])
    common_level = np.bincount([y for y, s in zip(human["label"], human["split"]) if s == "train"]).argmax()
    assert metrics["systems"]["majority"]["overall"]["accuracy"]["value"] == pytest.approx((level == common_level).mean(), abs=1e-6)
    assert metrics["systems"]["majority"]["overall"]["auroc_4"]["value"] == 0.5


def test_report_names_every_system_and_picture(pipeline):
    folder = pipeline[0] / "report"
    text = (folder / "report.md").read_text()
    for system in common.read_json(folder / "metrics.json")["systems"]:
        assert f"| {system} |" in text
    pictures = [line.split("(")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert len(pictures) == 6 and all((folder / p).read_bytes().startswith(b"\x89PNG") for p in pictures)


def test_preambles_and_ends_are_printed(pipeline):
    run, printed = pipeline
    for step in STEPS:
        assert f"wrote {run}" in printed["".join(step)]
    assert "QLoRA (NF4)" in printed["".join(STEPS[1])] and "4 to label" in printed["03"]


def test_whole_pipeline_again_gives_the_same_bytes(pipeline, toy, tmp_path):
    """In another folder and by one process: nothing hangs on a name, a clock or the process."""
    for step in STEPS:
        number, *argv = arguments(step, tmp_path / "again", toy)
        stage(number).main(argv)
    files = [p.relative_to(pipeline[0]) for p in pipeline[0].rglob("*") if p.suffix in (".parquet", ".npy", ".safetensors", ".csv") or p.name == "metrics.json"]
    assert len(files) > 20
    assert [str(f) for f in files if (pipeline[0] / f).read_bytes() != (tmp_path / "again" / f).read_bytes()] == []


# ---------------------------------------------------------------------------------------------------------------------
# Started again


@pytest.fixture
def copied(pipeline, tmp_path):
    shutil.copytree(pipeline[0], tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("step", STEPS, ids="".join)
def test_finished_stage_does_nothing(pipeline, toy, capsys, step):
    number, *argv = arguments(step, pipeline[0], toy)
    before = {p: p.stat().st_mtime_ns for p in pipeline[0].rglob("*") if p.is_file() and p.name != ".lock"}
    stage(number).main(argv)
    assert "nothing to do" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in pipeline[0].rglob("*") if p.is_file() and p.name != ".lock"}
    assert not (pipeline[0] / "features" / "work").exists()


def test_a_switch_of_a_later_version_changes_nothing_while_it_is_off(copied, toy, capsys):
    number, *argv = arguments(STEPS[2], copied, toy)
    path = copied / "labels" / "stage.json"
    about = common.read_json(path)
    assert about["arguments"].pop("fp8") is False  # as a version would have written it that has no --fp8
    common.write_json(path, about)
    stage(number).main(argv)
    assert "nothing to do" in capsys.readouterr().out
    assert "--fp8 was False, is True" in stop_line(stage(number).main, [*argv, "--fp8", "--precision", "bf16"])


@pytest.mark.parametrize("step,flag,value", [(STEPS[0], "--top-tokens", "3"), (STEPS[1], "--lr", "0.1"), (STEPS[2], "--no-merge", None), (STEPS[3], "--temperature", "2"), (STEPS[5], "--seed", "9")])
def test_other_arguments_are_refused_by_name(pipeline, toy, step, flag, value):
    number, *argv = arguments(step, pipeline[0], toy)
    line = stop_line(stage(number).main, [*argv, flag, *([value] if value else [])])
    assert flag.replace("--no-", "--") in line and "--overwrite" in line and FOLDERS[number] in line


def test_changed_data_is_noticed_and_overwrite_makes_it_anew(copied, toy, tmp_path, monkeypatch):
    data = shutil.copytree(toy, tmp_path / "data")
    number, *argv = arguments(STEPS[0], copied, data)
    line = stop_line(stage("01").main, argv)
    assert "--data" in line  # another folder
    monkeypatch.setattr(stage("01"), "Captioner", None)  # the captions are kept: no image is captioned again
    stage("01").main([*argv, "--overwrite"])
    with open(data / "labels.csv", "a") as f:
        f.write((data / "labels.csv").read_text().splitlines()[1].replace('"train"', '"eval"') + "\n")
    line = stop_line(stage("01").main, argv)
    assert "table labels" in line and "--overwrite" in line
    # What was made from the earlier features is not mixed with the new ones.
    (data / "labels.csv").write_text("\n".join((data / "labels.csv").read_text().splitlines()[:-2]) + "\n")
    stage("01").main([*argv, "--overwrite"])
    assert "02_train_teacher.py" in stop_line(stage("03").main, ["--run", str(copied), "--device", "cpu"])
    assert "03_label.py" in stop_line(stage("04").main, ["--run", str(copied), "--device", "cpu"])
    assert "--overwrite" in stop_line(stage("05").main, ["--run", str(copied)])


def test_another_teacher_is_never_mixed_in(copied, toy):
    """A shard of an earlier teacher is missing; the teacher has changed meanwhile."""
    head = copied / "teacher" / "stage.json"
    about = common.read_json(head)
    common.write_json(head, {**about, "weights": "others"})
    (copied / "labels" / "impressions" / "part-00001.parquet").unlink()
    line = stop_line(stage("03").main, ["--run", str(copied), "--device", "cpu"])
    assert "teacher" in line and "--overwrite" in line


def test_report_twice_gives_the_same_bytes(copied, toy):
    before = (copied / "report" / "metrics.json").read_bytes()
    number, *argv = arguments(STEPS[5], copied, toy)
    stage(number).main([*argv, "--overwrite"])
    assert (copied / "report" / "metrics.json").read_bytes() == before


def test_labels_without_merged_lora_are_nearly_the_same(copied):
    merged = np.stack([table(copied / "labels" / "labelled.parquet")[f"p{k}"].to_numpy() for k in range(1, 6)])
    stage("03").main(["--run", str(copied), "--device", "cpu", "--no-merge", "--overwrite"])
    plain = np.stack([table(copied / "labels" / "labelled.parquet")[f"p{k}"].to_numpy() for k in range(1, 6)])
    np.testing.assert_allclose(plain, merged, atol=1e-4)


def test_labels_by_8_bit_products(copied, capsys):
    assert "--precision bf16" in stop_line(stage("03").main, ["--run", str(copied), "--device", "cpu", "--fp8", "--precision", "fp32", "--overwrite"])
    stage("03").main(["--run", str(copied), "--device", "cpu", "--fp8", "--precision", "bf16", "--overwrite"])
    about = common.read_json(copied / "labels" / "stage.json")
    assert 0 < about["fp8"]["mean_difference"] <= about["fp8"]["max_difference"] < 0.5 and about["merge"]["max_difference"] < 0.05
    assert "8-bit products: labels of" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# What cannot work


@pytest.mark.parametrize("number,command", [("02", "01_build_features.py"), ("03", "01_build_features.py"), ("04", "01_build_features.py"), ("05", "01_build_features.py")])
def test_missing_earlier_stage_names_its_command(tmp_path, number, command):
    line = stop_line(stage(number).main, ["--run", str(tmp_path)])
    assert str(tmp_path / "features") in line and f"python {command} --run {tmp_path}" in line


def test_missing_later_stages_name_their_commands(run):
    assert "python 02_train_teacher.py" in stop_line(stage("03").main, ["--run", str(run)])
    assert "python 03_label.py" in stop_line(stage("04").main, ["--run", str(run)])
    assert "python 03_label.py" in stop_line(stage("05").main, ["--run", str(run)])


def test_missing_student_names_its_command(copied):
    shutil.rmtree(copied / "student")
    assert "python 04_train_student.py" in stop_line(stage("05").main, ["--run", str(copied)])


def test_unfinished_stage_counts_as_missing(copied):
    about = common.read_json(copied / "teacher" / "stage.json")
    common.write_json(copied / "teacher" / "stage.json", {**about, "finished": False})
    assert "missing or unfinished" in stop_line(stage("03").main, ["--run", str(copied)])


@pytest.mark.parametrize("number", FOLDERS)
def test_unknown_and_abbreviated_flags(number, capsys):
    for wrong in (["--unknown"], ["--overwrit"], ["--preset", "nonsense"]):
        with pytest.raises(SystemExit) as e:
            stage(number).main(wrong)
        assert e.value.code == 2
        assert wrong[0].rstrip("t") in capsys.readouterr().err


@pytest.mark.parametrize("number", FOLDERS)
def test_importing_a_script_does_nothing_and_help_works(number, capsys):
    with pytest.raises(SystemExit) as e:
        stage(number).main(["--help"])
    assert e.value.code == 0
    text = capsys.readouterr().out
    assert "--run" in text and "--overwrite" in text and "--preset" in text


@pytest.mark.parametrize("step", STEPS[:4] + STEPS[5:], ids="".join)
def test_second_process_on_a_folder_is_told_so(pipeline, toy, step):
    number, *argv = arguments(step, pipeline[0], toy)
    folder = pipeline[0] / FOLDERS[number]
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        line = stop_line(stage(number).main, argv)
    assert str(folder) in line and "another process" in line


def test_an_error_is_one_line_and_status_1(tmp_path):
    done = subprocess.run(script("05", "--run", tmp_path / "nowhere"), env=environment(), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith("error: ") and "01_build_features.py" in done.stderr


def ended(main):
    with pytest.raises(SystemExit) as e:
        common.run(main)
    return str(e.value.code)


@pytest.mark.skipif(not Path("/sys").is_dir() or os.access("/sys", os.W_OK) and os.geteuid() != 0, reason="no folder here that nobody can write")
def test_folder_that_cannot_be_written(toy):
    line = ended(lambda: stage("01").main(["--data", str(toy), "--run", "/sys/run", "--device", "cpu"]))
    assert line.startswith("error: ") and "/sys/run" in line and "\n" not in line


def test_run_directory_that_is_a_file(toy, tmp_path):
    (tmp_path / "run").write_text("mine")
    line = ended(lambda: stage("01").main(["--data", str(toy), "--run", str(tmp_path / "run"), "--device", "cpu"]))
    assert line.startswith("error: ") and str(tmp_path / "run") in line and (tmp_path / "run").read_text() == "mine"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_disk_full_or_read_only_leaves_earlier_results_whole(tmp_path, monkeypatch, number):
    common.write_json(tmp_path / "metrics.json", {"a": 1})
    before = (tmp_path / "metrics.json").read_bytes()

    def full(self, *args, **options):
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(Path, "write_text", full)
    line = ended(lambda: common.write_json(tmp_path / "metrics.json", {"b": 2}))
    assert line.startswith("error: ") and "metrics.json" in line and "\n" not in line
    assert (tmp_path / "metrics.json").read_bytes() == before


# ---------------------------------------------------------------------------------------------------------------------
# The plumbing that the stages stand on


def args(**more):
    return Namespace(**{"run": "r", "overwrite": False, "seed": 0, **more})


def test_half_written_files_are_removed_at_the_next_start(tmp_path):
    stage_ = common.Stage(tmp_path / "s", args(), {})
    (tmp_path / "s" / ".work.tmp" / "a").mkdir(parents=True)
    (tmp_path / "s" / ".work.tmp" / "a" / ".b.parquet.tmp").write_text("half")
    (tmp_path / "s" / "labels").mkdir()
    (tmp_path / "s" / "labels" / ".part-0.parquet.tmp").write_text("half")
    (tmp_path / "s" / "labels" / "part-1.parquet").write_text("whole")
    del stage_
    common.Stage(tmp_path / "s", args(), {})
    assert sorted(p.name for p in (tmp_path / "s").rglob("*")) == [".lock", "labels", "part-1.parquet", "stage.json"]


def test_overwrite_killed_half_way_is_not_finished(tmp_path, monkeypatch):
    """With the results half deleted, the stage must not count as finished."""
    common.Stage(tmp_path / "s", args(), {}).finish()
    for name in "abcdefgh":
        (tmp_path / "s" / name).mkdir()

    def kill(*paths, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", kill)
    with pytest.raises(KeyboardInterrupt):
        common.Stage(tmp_path / "s", args(overwrite=True), {})
    assert not (tmp_path / "s" / "stage.json").exists()


def test_overwrite_keeps_the_cache_and_nothing_else(tmp_path):
    common.Stage(tmp_path / "s", args(), {}).finish()
    for name in ("captions", "other"):
        (tmp_path / "s" / name).mkdir()
    common.Stage(tmp_path / "s", args(overwrite=True), {}, keep={"captions"})
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == [".lock", "captions", "stage.json"]


def test_settings_that_cannot_change_a_result_are_free(tmp_path):
    common.Stage(tmp_path / "s", args(workers=1, device="cpu"), {"x": 1}).finish()
    assert common.Stage(tmp_path / "s", args(workers=8, device="auto", run="elsewhere"), {"x": 1}).done
    assert "x was 1, is 2" in stop_line(common.Stage, tmp_path / "s", args(workers=1, device="cpu"), {"x": 2})


def test_fingerprint(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_bytes(b"1" * 100)
    first = common.fingerprint(tmp_path / "a")
    assert first == common.fingerprint(tmp_path / "a") != common.fingerprint(tmp_path / "a" / "x")
    (tmp_path / "a" / "x").write_bytes(b"1" * 99 + b"2")
    changed = common.fingerprint(tmp_path / "a")
    (tmp_path / "a" / "x").rename(tmp_path / "a" / "y")
    assert len({first, changed, common.fingerprint(tmp_path / "a")}) == 3


def test_atomic_leaves_nothing_when_the_block_fails(tmp_path):
    (tmp_path / "f").write_text("old")
    with pytest.raises(RuntimeError):
        with common.atomic(tmp_path / "f") as tmp:
            tmp.write_text("half")
            raise RuntimeError
    assert (tmp_path / "f").read_text() == "old"
    with common.atomic(tmp_path / "f") as tmp:
        tmp.write_text("new")
    assert (tmp_path / "f").read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["f"]


def test_presets_fill_in_and_flags_win():
    parse = stage("04").parse_args
    assert parse([]).batch_rows == 256 and parse(["--preset", "paper"]).batch_rows == 4_096 and parse(["--preset", "paper", "--batch-rows", "7"]).batch_rows == 7
    assert parse(["--epochs", "0"]).epochs == 0  # a given 0 is not "not given"
    for number in FOLDERS:
        assert set(stage(number).PRESETS["toy"]) == set(stage(number).PRESETS["paper"])


def test_metrics_file_is_plain_json(pipeline):
    json.loads((pipeline[0] / "report" / "metrics.json").read_text(), parse_constant=lambda c: pytest.fail(f"{c} is no JSON"))
