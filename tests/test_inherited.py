"""What a stage inherits: that of other features, labels or teachers is named, with the command for it."""

import shlex

import pytest
from helpers import mark_finished, stage, stop_line, synthetic

from lib.inputs.inherited import (
    require_pairs,
    require_student,
    require_systems,
    require_teacher,
    teacher_identity,
)
from lib.stages.files import read_json, write_json

READS = ("*.parquet", "*_embedding.npy")


@pytest.fixture(scope="module")
def inherited(tmp_path_factory):
    """A run of synthetic features and labels, the labels by the teacher that is there."""
    run = tmp_path_factory.mktemp("inherited") / "a run"
    synthetic(run, shards=1, shard_rows=5, queries=5)
    write_json(run / "teacher" / "teacher.json", {})
    mark_finished(run / "teacher", identity="seed 0")
    inputs = {"features": "features", "teacher": teacher_identity(read_json(run / "teacher" / "stage.json"))}
    mark_finished(run / "labels", stage="labels", inputs=inputs, command=["--batch-tokens", "300"])
    return run


@pytest.mark.parametrize("impressions", [False, True])
def test_labels_of_another_teacher_are_named(inherited, impressions):
    """02 --overwrite --seed 1, then 05: report and card said seed 1 with the metrics of seed 0's labels."""
    assert require_pairs(inherited, READS, impressions=impressions)
    mark_finished(inherited / "teacher", identity="seed 1")
    line = stop_line(lambda: require_pairs(inherited, READS, impressions=impressions))
    assert "of another teacher" in line
    command = ["03_label.py", "--run", str(inherited), "--batch-tokens", "300", "--overwrite"]
    assert shlex.split(line.partition("; python ")[2]) == command
    assert require_pairs(inherited, READS, labels=False)  # 04 --labels human
    mark_finished(inherited / "teacher", identity="seed 0")


def test_a_folder_that_holds_no_teacher_is_named(inherited):
    assert "--teacher RUN/teacher" in stop_line(require_teacher, inherited, inherited / "features")


@pytest.mark.parametrize(
    "name, given", [("student", ["--rows", "5"]), ("student_human_labels", ["--labels", "human"])]
)
def test_advice_on_a_student_of_other_features_trains_what_it_was(inherited, name, given):
    """`--name student_human_labels --overwrite`, followed word for word, trained on the teacher's labels."""
    write_json(inherited / name / "features.json", {})
    mark_finished(inherited / name, stage=name, inputs={"features": "of before"}, command=given)
    read = {"features": {"identity": "features"}}
    line = stop_line(require_student, inherited, name, read)
    command = ["04_train_student.py", "--run", str(inherited), *given, "--overwrite"]
    assert "trained on other features" in line and shlex.split(line.partition("; python ")[2]) == command


def test_what_is_advised_trains_the_student_that_was_there(tmp_path):
    """Its own flags, so that the baseline stays one of human labels; then nothing is wrong with it."""
    run, name = tmp_path / "a run", "student_human_labels"
    synthetic(run, shards=1, shard_rows=5, queries=60)
    stage("04").main(["--run", str(run), "--labels", "human", "--epochs", "1", "--hidden", "4"])
    before = read_json(run / name / "stage.json")["arguments"]
    mark_finished(run / "features", identity="others")
    read = require_pairs(run, READS, labels=False)
    line = stop_line(require_student, run, name, read)
    stage("04").main(shlex.split(line.partition("; python ")[2])[1:])
    assert require_student(run, name, read)["arguments"] == before


@pytest.mark.parametrize("name", ["impressions/part-00009.parquet", "pin_new_embedding.npy"])
def test_a_file_more_in_a_finished_folder_is_not_read(inherited, name):
    """It was labelled and trained on, or a traceback."""
    path = inherited / "features" / name
    path.write_bytes(b"")
    try:
        for call in (require_pairs, require_systems):
            assert f"{path}: its stage did not write this file" in stop_line(call, inherited, READS)
    finally:
        path.unlink()
