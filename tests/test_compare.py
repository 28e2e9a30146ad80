"""05_evaluate.py --compare and 03_label.py --only-labelled, on a tiny finished run."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from finished_run import finished_run
from helpers import stage, stop_line

stage05 = stage("05")


@pytest.fixture
def finished(features, models):
    return finished_run(features, models["llama"])


def compare(into, finding, *arms, resamples=50):
    stage05.main(["--compare", *arms, "--into", str(into), "--finding", finding, "--resamples", str(resamples)])
    return json.loads((into / "findings.json").read_text())[finding]


def test_one_seed_arms_have_the_reports_figures(finished, tmp_path):
    """Value and interval of an arm of one seed are those that the stage itself reports, overall and by language."""
    entry = compare(tmp_path, "b", f"human={finished}:student_human_labels", f"all={finished}:student", f"teacher={finished}")
    systems = json.loads((finished / "report" / "metrics.json").read_text())["systems"]
    for arm, system in zip(entry["arms"], ("student_human_labels", "student", "teacher")):
        for part, expected in (("overall", systems[system]["overall"]), *((lang, systems[system]["by_language"][lang]) for lang in ("en", "de", "es", "fr"))):
            got = arm["overall"] if part == "overall" else arm["by_language"][part]
            for metric in ("accuracy", "auroc_4", "ndcg_20"):
                assert {k: got[metric][k] for k in ("value", "low", "high")} == expected[metric], (system, part, metric)
    assert [arm["training_rows"] is None for arm in entry["arms"]] == [False, False, True]
    assert [arm["learnt_from"] for arm in entry["arms"]] == ["human labels", "teacher labels", "human labels"]


def test_seeds_are_averaged_and_widen_the_interval():
    rng = np.random.default_rng(0)
    y, query = rng.integers(1, 6, 200), np.repeat(np.arange(20), 10)
    perfect = np.eye(5)[y - 1]
    wrong = np.eye(5)[y % 5]
    metrics, _ = stage05.arm_metrics(y, query, [(p, stage05.expected_level(p)) for p in (perfect, wrong)], 400, 0, 0)
    assert metrics["accuracy"] == {"value": 0.5, "low": 0.0, "high": 1.0, "seeds": [1.0, 0.0]}  # a resample may draw one seed twice
    alone, _ = stage05.arm_metrics(y, query, [(perfect, stage05.expected_level(perfect))] * 3, 400, 0, 0)
    assert alone["accuracy"] == {"value": 1.0, "low": 1.0, "high": 1.0, "seeds": [1.0] * 3}


def test_differences_are_paired(finished, tmp_path):
    """Two arms of the same run differ by exactly 0 in every resample, though each interval is wide."""
    entry = compare(tmp_path, "d", f"one={finished}", f"two={finished}", f"title={finished.parent / 'title'}")
    same = stage05.difference(entry, "two", "one")["overall"]["accuracy"]
    assert same == {"value": 0, "low": 0, "high": 0}
    assert entry["arms"][0]["overall"]["accuracy"]["low"] < entry["arms"][0]["overall"]["accuracy"]["high"]
    other = stage05.difference(entry, "title", "one")["overall"]["accuracy"]
    assert other["value"] == pytest.approx(entry["arms"][2]["overall"]["accuracy"]["value"] - entry["arms"][0]["overall"]["accuracy"]["value"], abs=2e-6)
    kept = entry["arms"][0]["accuracy_kept"]["de"]["value"]
    assert kept == pytest.approx(entry["arms"][0]["by_language"]["de"]["accuracy"]["value"] / entry["arms"][0]["by_language"]["en"]["accuracy"]["value"], abs=1e-5)


def test_findings_are_gathered_and_not_made_twice(finished, tmp_path, capsys):
    title = finished.parent / "title"
    compare(tmp_path, "d", f"title={title}", f"six fields={finished}")
    compare(tmp_path, "a", f"BERT={title},{title}", f"Llama={finished}")
    findings = json.loads((tmp_path / "findings.json").read_text())
    assert list(findings) == ["a", "d"]
    assert str(finished.parent) not in (tmp_path / "findings.json").read_text()  # runs are named relative to DIR
    assert len(findings["a"]["arms"][0]["overall"]["accuracy"]["seeds"]) == 2
    text = (tmp_path / "findings.md").read_text()
    assert "| 53.5 |" in text and "| 60.2 |" in text and "## (d)" in text
    assert (tmp_path / "finding_a.png").stat().st_size > 1000
    capsys.readouterr()
    compare(tmp_path, "a", f"BERT={title},{title}", f"Llama={finished}")
    assert "nothing to do" in capsys.readouterr().out
    compare(tmp_path, "a", f"BERT={title}", f"Llama={finished}")
    assert "nothing to do" not in capsys.readouterr().out


def test_an_arm_needs_only_what_it_uses(finished, tmp_path):
    """A student: the features and its own folder. A teacher: labels/labelled.parquet."""
    for name in ("student_only", "teacher_only"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "features").symlink_to((finished / "features").resolve())
    shutil.copytree(finished / "student", tmp_path / "student_only" / "student_x")
    shutil.copytree(finished / "labels", tmp_path / "teacher_only" / "labels", ignore=shutil.ignore_patterns("impressions"))
    entry = compare(tmp_path / "out", "c", f"s={tmp_path / 'student_only'}:student_x", f"t={tmp_path / 'teacher_only'}")
    assert len(entry["arms"]) == 2
    line = stop_line(stage05.main, ["--compare", f"t={tmp_path / 'student_only'}", "--into", str(tmp_path / "out"), "--finding", "a"])
    assert "03_label.py" in line and str(tmp_path / "student_only" / "labels") in line


def test_other_evaluation_rows_are_refused(finished, tmp_path):
    run = tmp_path / "other"
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns("report", "teacher"))
    table = pq.read_table(run / "features" / "labelled.parquet")
    label = table["label"].to_numpy().copy()
    at = int(np.flatnonzero(np.array(table["split"].to_pylist()) == "eval")[0])
    label[at] = label[at] % 5 + 1
    pq.write_table(table.set_column(table.column_names.index("label"), "label", pa.array(label)), run / "features" / "labelled.parquet")
    line = stop_line(stage05.main, ["--compare", f"a={finished}", f"b={run}", "--into", str(tmp_path), "--finding", "a"])
    assert str(run) in line and "other evaluation rows" in line
    assert not (tmp_path / "findings.json").exists()


@pytest.mark.parametrize("arguments", [
    ["--compare", "no equals sign", "--into", "x", "--finding", "a"], ["--compare", "a=", "--into", "x", "--finding", "a"], ["--compare", "a=b", "--into", "x"],
    ["--compare", "a=b", "--finding", "a"], ["--compare", "a=b", "--into", "x", "--finding", "z"], ["--finding", "a"], ["--title", "t"]])
def test_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as e:
        stage05.parse_args(arguments)
    assert e.value.code == 2


def test_only_labelled(finished, tmp_path):
    """The human-labelled rows get the labels they get anyway; no student can be trained on them; completing them needs --overwrite."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "features").symlink_to((finished / "features").resolve())
    shutil.copytree(finished / "teacher", run / "teacher")
    stage("03").main(["--run", str(run), "--only-labelled", "--device", "cpu"])
    assert not (run / "labels" / "impressions").exists()
    assert pq.read_table(run / "labels" / "labelled.parquet").equals(pq.read_table(finished / "labels" / "labelled.parquet"))
    about = json.loads((run / "labels" / "stage.json").read_text())
    assert about["arguments"]["only_labelled"] is True and about["rows"]["impressions"] == 0
    line = stop_line(stage("04").main, ["--run", str(run), "--epochs", "1", "--device", "cpu"])
    assert "--only-labelled" in line and f"python 03_label.py --run {run} --overwrite" in line
    assert "--only-labelled was True, is False" in stop_line(stage("03").main, ["--run", str(run), "--device", "cpu"])
