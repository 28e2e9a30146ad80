"""Stage 05 on a small run of random content: what it reads, refuses, leaves out; report.md, pictures."""

import csv
import shutil
import warnings
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import SYSTEMS, mark_finished, stage, stop_line, synthetic
from matplotlib.figure import Figure

from common import Student
from lib.inputs.inherited import require
from lib.results import pictures, queries, report
from lib.stages.files import read_json, write_json, write_parquet
from serving.ranker import Ranker

distil, evaluate = stage("04"), stage("05")
TEXTS = ["$10 50% off $20", "椅子 🪑", "<img src=x onerror=alert(1)> | # **b**", "a\tb\nc"]
LANGUAGES = ["en", "zh-|<b>", "$de$", "#fr"]


def awkward(folder):
    """Puts awkward texts and languages into features/queries.parquet, and titles into pins.parquet."""
    path = folder / "features" / "queries.parquet"
    table = pq.read_table(path).to_pydict()
    n = len(table["query"])
    table["query"] = [f"{TEXTS[i % 4]} {i // 4}" for i in range(n)]
    table["language"] = [LANGUAGES[i % 4] for i in range(n)]
    write_parquet(path, table)
    path = folder / "features" / "pins.parquet"
    table = pq.read_table(path).to_pydict()
    table["title"] = [TEXTS[i % 4] for i in range(len(table["title"]))]
    table["image"] = pa.array([None] * len(table["title"]), pa.string())
    write_parquet(path, table)


def about_features(folder, **more):
    names = {"text encoder": "some/encoder", "caption model": "some/captioner"}
    models = {kind: {"name": name, "fingerprint": name} for kind, name in names.items()}
    facts = {"dataset": str(folder / "data"), "models": models, "identity": "features"}
    mark_finished(folder / "features", **{**facts, **more})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """features/, labels/ and both students, of two epochs."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("report")
    synthetic(folder, queries=40)
    awkward(folder)
    about_features(folder)
    teacher = folder / "teacher"
    write_json(teacher / "teacher.json", {"model": "some/model"})
    whose = {"model": "some/model", "folder": None}
    counts = {"rows": 10, "passes": 3, "looked_up": {"/runs/monday": 5}}
    inputs = read_json(folder / "labels" / "stage.json")["inputs"]
    mark_finished(folder / "labels", inputs=inputs, teacher=whose, labels=counts)
    held_out = {"share": 0.3, "salt": "teacher:0"}
    mark_finished(teacher, held_out=held_out, rows={"train": 111})
    for labels in ("teacher", "human"):
        distil.main(["--run", str(folder), "--labels", labels, "--epochs", "2", "--device", "cpu"])
    return folder


@pytest.fixture
def run(made, tmp_path):
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


def measure(run, *more):
    evaluate.main(["--run", str(run), "--resamples", "10", "--search-pages", "4", *more])
    return (run / "report" / "report.md").read_text(encoding="utf-8")


@pytest.fixture
def no_pictures(monkeypatch):
    """They take longer than all the rest."""
    for name in ("plot_accuracy", "plot_confusion", "plot_reliability", "draw_pins"):
        monkeypatch.setattr(pictures, name, lambda *arguments: None)


# ------------------------------------------------------------------------------------------------------------
# Texts of anybody


@pytest.fixture(scope="module")
def measured(made, tmp_path_factory):
    """A run with its report, pictures and all."""
    folder = tmp_path_factory.mktemp("measured") / "run"
    shutil.copytree(made, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as "Glyph 26893 missing from font"
        measure(folder)
    return folder


def test_awkward_texts_are_drawn_as_they_are_and_escaped(measured):
    run = measured
    text = (run / "report" / "report.md").read_text(encoding="utf-8")
    assert len(list((run / "report").glob("*.png"))) == 7
    assert "<img" not in text and "<b>" not in text and "&lt;img" in text
    before, queries_of = text.split("## Queries")
    tables = [line for line in before.splitlines() if line.startswith("|")]
    one_by_one = [line for line in queries_of.split("\n## ")[0].splitlines() if line.startswith("|")]
    assert {line.count("|") - line.count("\\|") for line in one_by_one} == {11} and len(one_by_one) > 5
    assert len({line.count("|") - line.count("\\|") for line in tables if "\\#fr" in line}) == 1
    assert all(line.count("|") - line.count("\\|") == 6 for line in tables if "zh-" in line)
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings[0] == "# Evaluation" and all(line.startswith("## ") for line in headings[1:])
    assert "$10 50% off $20" in text


@pytest.mark.parametrize("text,expected", [
    ("a|b", "a\\|b"), ("# h", "\\# h"), ("<img onerror=x>", "&lt;img onerror=x&gt;"), ("a\nb  c", "a b c"),
    ("[x](y)", "\\[x\\](y)"), ("a_b", "a_b"), ("*b* `c` ~d~ \\", "\\*b\\* \\`c\\` \\~d\\~ \\\\"),
    ("&lt;", "&amp;lt;"),
])  # fmt: skip
def test_escaped(text, expected):
    assert report.escaped(text) == expected


def test_what_no_font_draws_is_a_box(monkeypatch, tmp_path):
    pictures.family_of.cache_clear()
    fonts = pictures.font_manager.fontManager.ttflist
    ours = [font for font in fonts if font.name == "DejaVu Sans"]
    monkeypatch.setattr(pictures.font_manager.fontManager, "ttflist", ours)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pictures.picture_file(tmp_path / "x.png", (2, 2)) as figure:
            assert pictures.drawable("red 椅子 café\u200d\n") == "red □□ café"
            figure.suptitle(pictures.drawable("$10 椅子 $\\frac{"))
    assert (tmp_path / "x.png").stat().st_size > 500
    pictures.family_of.cache_clear()


def test_a_label_of_an_axis_is_drawn_in_the_font_that_has_it(tmp_path):
    """U+2315 is not in DejaVu Sans; DejaVu Sans Mono, which Matplotlib brings too, has it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as "Glyph 8981 missing from font"
        with pictures.picture_file(tmp_path / "x.png", (2, 2)) as figure:
            figure.subplots().set_xticks([0, 1], map(pictures.drawable, ["a", "\u2315"]))
    assert pictures.family_of("\u2315") != "DejaVu Sans"


def test_metrics_are_written_before_pictures(run, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("no picture")

    monkeypatch.setattr(pictures, "plot_accuracy", broken)
    with pytest.raises(RuntimeError):
        measure(run)
    (unfinished,) = run.glob(".report.unfinished-*")
    assert read_json(unfinished / "metrics.json")["systems"]["student"]


# ------------------------------------------------------------------------------------------------------------
# What the report says


def test_the_report_stands_alone(measured):
    run = measured
    text = (run / "report" / "report.md").read_text(encoding="utf-8")
    facts = """some/encoder|some/captioner|some/model|5 looked up in /runs/monday|111 human-labelled|made: 20
student learnt from|the human labels|have no gain|its judged pins only|ECE before|search_1.png
expected calibration error|† fewer than 30 queries|In short
Queries, the worst beside bm25 first|nDCG@20: bm25"""
    for fact in facts.replace("\n", "|").split("|"):
        assert fact in text, fact
    rows = read_json(run / "student" / "stage.json")["rows"]["train"]
    assert f"{rows:,} rows, the teacher's labels" in text
    human = pq.read_table(run / "features" / "labelled.parquet").to_pydict()
    best = {}
    for query, split, label in zip(human["query_index"], human["split"], human["label"]):
        if split == "eval":
            best[query] = max(best.get(query, 0), label)
    assert f"{sum(label == 1 for label in best.values())} queries have no gain" in text
    for name in [*report.CAPTIONS, *(f"search_{i}.png" for i in (1, 2, 3, 4))]:
        assert f"![{name}]({name})" in text and (run / "report" / name).exists()


def test_in_short_is_better_worse_or_not_clear():
    found = {
        "bm25": (0.1, 0.2),
        "match": (-0.1, 0.2),
        "embedding": (-0.2, 0.1),
        "student_human_labels": (-0.3, -0.2),
    }
    compared = []
    few = {"system": "student", "minus": "bm25", "metric": "auroc_4", "value": -0.1}
    [line] = report.in_short([SimpleNamespace(**few, low=None, high=None)])[2:-1]
    assert line.endswith("AUROC ≥4: -0.100: **too few queries to tell**")
    for other, (low, high) in found.items():
        m = {"system": "student", "minus": other, "metric": "ndcg_20"}
        compared.append(SimpleNamespace(**m, value=(low + high) / 2, low=low, high=high))
    lines = [line for line in report.in_short(compared) if line.startswith("-")]
    assert [line.split("**")[1] for line in lines] == ["better", "no clear difference", "worse"]
    assert "nDCG@20: +0.150 [+0.100, +0.200]" in lines[0] and report.in_short([]) == []
    assert "student beside embedding" in lines[1]  # the better one of match and embedding


def test_a_temperatures_curve_has_the_systems_own_beside_it(monkeypatch, tmp_path):
    drawn, p, y = [], np.eye(5)[[0, 1, 2, 3]] * 0.8 + 0.04, np.array([1, 2, 3, 5])
    for name in ("plot_accuracy", "plot_confusion"):
        monkeypatch.setattr(pictures, name, lambda *given: None)
    monkeypatch.setattr(pictures, "plot_reliability", lambda y, p, scaled, path: drawn.append((p, scaled)))
    systems = dict.fromkeys(("bm25", "student", "student_6000", "teacher"), (p, p @ np.arange(5)))
    scaled = dict.fromkeys(("student", "student_6000", "teacher"), p)
    pictures.plots({}, y, systems, scaled, [1, 5], tmp_path)
    assert [list(curves) for curves in drawn[0]] == [["student", "teacher"]] * 2


def test_queries_stand_one_by_one(measured):
    """Worst beside bm25 first, those without a gain left out; pages of the worst and of the best."""
    run = measured
    with open(run / "report" / "queries.csv", encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    differences = [float(line["difference"]) for line in lines]
    assert differences == sorted(differences) and all(int(line["best level"]) > 1 for line in lines)
    for line in lines:
        gap = float(line["student"]) - float(line["bm25"])
        assert float(line["difference"]) == pytest.approx(gap, abs=2e-4)
    overall = read_json(run / "report" / "metrics.json")["systems"]
    for system in ("bm25", "student", "teacher"):
        mean = np.mean([float(line[system]) for line in lines])
        assert mean == pytest.approx(overall[system]["overall"]["ndcg_20"]["value"], abs=1e-4)
    shown = [query["index"] for query in queries.for_pages([{"index": i} for i in range(9)], 5)]
    assert shown == [0, 1, 2, 8, 7]
    assert len(queries.for_pages([{"index": 0}], 5)) == 1 and queries.for_pages([], 4) == []


def test_without_pictures_nobody_captions(run, no_pictures):
    about_features(run, models={})
    text = measure(run)
    assert "captions by: nobody" in text and "text encoder: none" in text


def test_after_labelling_the_human_rows_alone_05_measures_what_is_there(run, no_pictures, capsys):
    labels = read_json(run / "labels" / "stage.json")
    mark_finished(run / "labels", **{**labels, "arguments": {"only_labelled": True}})
    shutil.rmtree(run / "student")
    text = measure(run)
    assert "left out" in capsys.readouterr().out
    systems = read_json(run / "report" / "metrics.json")["systems"]
    assert set(systems) == set(SYSTEMS) - {"student"} and "teacher − bm25" in text


def test_a_pin_without_a_picture_is_a_card_of_its_text():
    ax = Figure().subplots()
    pin = {"title": "Kettle", "description": "Enamel, 1.7 litres " * 40, "caption": "", "image": None}
    pictures.show_pin(ax, pin, 5, None, "5 excellent")
    title, more = (text.get_text() for text in ax.texts)
    assert title == "Kettle" and more.startswith("Enamel") and more.count("\n") == 6
    pictures.show_pin(ax := Figure().subplots(), {**dict.fromkeys(pin), "description": "Pot"}, 1, None, "")
    assert [text.get_text() for text in ax.texts] == ["Pot", ""]


def test_levels_that_nobody_used(run, no_pictures):
    """Labels 1 and 5 alone: no metrics without meaning, no row of the paper's figures."""
    path = run / "features" / "labelled.parquet"
    table = pq.read_table(path)
    label = pa.array(np.where(table["label"].to_numpy() > 3, 5, 1), pa.int8())
    write_parquet(path, table.set_column(table.column_names.index("label"), "label", label))
    about_features(run)
    text = measure(run)
    metrics = read_json(run / "report" / "metrics.json")["systems"]["student"]["overall"]
    assert set(metrics) == {"accuracy", "auroc_4", "ndcg_20", "ece", "kl_to_teacher"}
    assert "within" not in text and "AUROC ≥3" not in text and "in the paper %" not in text


def test_temperatures_are_reported(run, no_pictures):
    text = measure(run)
    found = read_json(run / "report" / "temperatures.json")
    assert set(found) == {"student", "student_human_labels", "teacher"}
    systems = read_json(run / "report" / "metrics.json")["systems"]
    for system, fitted in found.items():
        assert fitted["ece"] == systems[system]["overall"]["ece"] and fitted["temperature"] > 0
        assert f"{fitted['ece_at_temperature']['value']:.3f} [" in text


def test_without_held_out_queries_there_is_no_temperature(run, no_pictures):
    shutil.rmtree(run / "teacher")
    for name in ("student", "student_human_labels"):
        about = read_json(run / name / "stage.json")
        del about["held_out"]
        mark_finished(run / name, **about)
    text = measure(run)
    assert "No training query was held out" in text
    assert read_json(run / "report" / "temperatures.json") == {}


def test_numbers_of_pins_and_pairs_reach_the_student(run, no_pictures):
    for path in [*(run / "features" / "impressions").iterdir(), run / "features" / "labelled.parquet"]:
        table = pq.read_table(path)
        values = np.arange(len(table), dtype=np.float32)
        values[::3] = np.nan
        write_parquet(path, table.append_column("clicks", pa.array(values)))
    path = run / "features" / "pins.parquet"
    table = pq.read_table(path)
    write_parquet(path, table.append_column("price", pa.array(np.linspace(0, 1, len(table)))))
    about_features(run)
    distil.main(["--run", str(run), "--epochs", "1", "--overwrite", "--device", "cpu"])
    distil.main(["--run", str(run), "--epochs", "1", "--overwrite", "--device", "cpu", "--labels", "human"])
    spec = Student.load(run / "student").spec
    assert list(spec["numbers"]) == ["pin_price"] and spec["match"][-1] == "clicks"
    measure(run)
    accuracy = read_json(run / "report" / "metrics.json")["systems"]["student"]["overall"]["accuracy"]
    assert 0 <= accuracy["value"] <= 1


# ------------------------------------------------------------------------------------------------------------
# Which students


def test_a_student_that_does_not_fit_is_named_and_left_out(run, capsys, no_pictures):
    """One failed, one of other labels, one damaged, one somebody's own folder."""
    stop_line(distil.main, ["--run", str(run), "--name", "student_bad", "--lr", "1e30", "--epochs", "50"])
    for name in ("student_other", "student_damaged"):
        shutil.copytree(run / "student", run / name)
    about = read_json(run / "student_other" / "stage.json")
    mark_finished(run / "student_other", **{**about, "inputs": {**about["inputs"], "labels": "old"}})
    (run / "student_damaged" / "model.safetensors").write_bytes(b"0")
    (run / "student_notes").mkdir()
    (run / "student_notes" / "ideas.txt").write_text("mine")
    capsys.readouterr()
    measure(run)
    out = capsys.readouterr().out
    for name in ("student_bad", "student_other", "student_damaged", "student_notes"):
        (line,) = [line for line in out.splitlines() if line.startswith("left out") and name in line]
        assert f"04_train_student.py --run {run}" in line and f"--name {name}" in line
    systems = read_json(run / "report" / "metrics.json")["systems"]
    assert list(systems) == SYSTEMS


def test_a_teacher_that_is_not_finished_is_named(run):
    """Without its stage.json the report left the teacher's facts and temperature out, and said nothing."""
    (run / "teacher" / "stage.json").unlink()
    line = stop_line(measure, run)
    assert str(run / "teacher") in line and f"02_train_teacher.py --run {run}" in line


def test_the_main_student_is_needed(run):
    about = read_json(run / "student" / "stage.json")
    mark_finished(run / "student", **{**about, "inputs": {**about["inputs"], "labels": "old"}})
    line = stop_line(measure, run)
    assert "other labels" in line and f"04_train_student.py --run {run}" in line and "--overwrite" in line
    shutil.rmtree(run / "student")
    line = stop_line(measure, run)
    assert "missing" in line and line.endswith(f"python 04_train_student.py --run {run} --name student")
    shutil.rmtree(run / "student_human_labels", ignore_errors=True)
    line = stop_line(require, run / "student_human_labels")
    made = f"04_train_student.py --run {run} --name student_human_labels --labels human"
    assert line.endswith(made)
    assert made in stop_line(Ranker, run, "student_human_labels")
    write_json(run / "student_human_labels" / "features.json", {})
    assert made in stop_line(Student.load, run / "student_human_labels")


# ------------------------------------------------------------------------------------------------------------
# Flags and folders


@pytest.mark.parametrize("flags", ["--resamples 0", "--resamples 1", "--resamples x",
                                   "--resamples 1000000000", "--search-pages -1",
                                   "--gains 0 0 0 0 0", "--seed -1", "--compare a=b",
                                   "--preset huge"])  # fmt: skip
def test_bad_flags(tmp_path, flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(["--run", str(tmp_path), *flags.split()])
    assert stopped.value.code == 2 and capsys.readouterr().err and not list(tmp_path.iterdir())


def test_somebodys_own_report_is_not_touched(run):
    (run / "report").mkdir()
    (run / "report" / "mine.txt").write_text("mine")
    line = stop_line(measure, run, "--overwrite")
    assert str(run / "report") in line
    assert [path.name for path in (run / "report").iterdir()] == ["mine.txt"]


def test_no_page_of_search_results_is_fine(run, no_pictures):
    text = measure(run, "--search-pages", "0")
    assert "search_1.png" not in text


@pytest.mark.parametrize(
    "after, expected", [(0.90, "queries help"), (0.99, "bring little"), (1.1, "bring little")]
)
def test_whether_more_labels_help_is_one_sentence(after, expected):
    curve = {"queries": [1_100, 2_200], "match": [1.2, 1.19], "student": [1.0, after]}
    line = report.more_labels(curve)
    assert (
        expected in line and "1,100 to 2,200" in line and f"1.000 -> {after:.3f}" in line and "1.190" in line
    )
