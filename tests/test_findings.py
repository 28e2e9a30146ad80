"""experiments/comparison.py and findings.py, and 03_label.py --only-labelled, on a tiny finished run."""

import shlex
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from finished_run import finished_run
from helpers import mark_finished, stage, stop_line

from experiments import comparison, findings
from lib.inputs.inherited import require_pairs
from lib.stages.files import read_json, write_parquet


@pytest.fixture
def finished(features, models):
    return finished_run(features, models["llama"])


def compare(into, key, conditions, resamples=50):
    """{label: [(run, system), …]} -> the finding's entry in findings.json."""
    comparison.compare(key, conditions, into, resamples)
    return read_json(into / "findings.json")[key]


def value_of(entry, condition, **which):
    """A metric's value, low and high."""
    m = comparison.find(entry["table"], condition=condition, **which)
    return {"value": m.value, "low": m.low, "high": m.high}


# ------------------------------------------------------------------------------------------------------------
# The comparison


def test_one_seed_conditions_have_the_reports_figures(finished, tmp_path):
    """Value and interval of a condition of one seed are those that stage 05 reports, overall and by
    language."""
    names = {"human": "student_human_labels", "all": "student", "teacher": "teacher"}
    entry = compare(tmp_path, "b", {label: [(str(finished), name)] for label, name in names.items()})
    systems = read_json(finished / "report" / "metrics.json")["systems"]
    for label, name in names.items():
        for metric in ("accuracy", "auroc_4", "ndcg_20"):
            assert value_of(entry, label, metric=metric) == systems[name]["overall"][metric]
            for language in ("en", "de", "es", "fr"):
                expected = systems[name]["by_language"][language][metric]
                assert value_of(entry, label, metric=metric, language=language) == expected
    about = entry["conditions"].values()
    assert [made["training_rows"] is None for made in about] == [False, False, True]
    assert [made["learnt_from"] for made in about] == ["human labels", "teacher labels", "human labels"]


def test_seeds_are_averaged_and_widen_the_interval():
    rng = np.random.default_rng(0)
    y, query = rng.integers(1, 6, 200), np.repeat(np.arange(20), 10)

    def system(p):
        score = comparison.evaluate.expected_level(p)
        rows = {"label": y, "query": query, "language": np.full(200, "en", object)}
        return comparison.System(rows, p, score, {})

    right, wrong = system(np.eye(5)[y - 1]), system(np.eye(5)[y % 5])
    table, differences = comparison.measure({"two": [right, wrong], "three": [right] * 3}, 400)
    two, three = (comparison.find(table, condition=label, metric="accuracy") for label in ("two", "three"))
    # A resample may draw one seed twice
    assert (two.value, two.low, two.high, two.seeds) == (0.5, 0, 1, [1, 0])
    assert (three.value, three.low, three.high, three.seeds) == (1, 1, 1, [1, 1, 1])
    difference = comparison.find(differences, condition="three", minus="two", metric="accuracy")
    assert (difference.value, difference.low, difference.high) == (0.5, 0, 1)


def test_differences_are_paired(finished, tmp_path):
    """Two conditions of the same run differ by exactly 0 in every resample, though each interval is wide."""
    one, title = [(finished, "teacher")], [(finished.parent / "title", "teacher")]
    entry = compare(tmp_path, "d", {"one": one, "two": one, "title": title})
    same = comparison.find(entry["differences"], condition="two", minus="one", metric="accuracy")
    assert (same.value, same.low, same.high) == (0, 0, 0)
    a, b = (value_of(entry, label, metric="accuracy") for label in ("title", "one"))
    assert b["low"] < b["high"]
    other = comparison.find(entry["differences"], condition="title", minus="one", metric="accuracy")
    assert other.value == pytest.approx(a["value"] - b["value"], abs=2e-6)


def test_findings_are_gathered(finished, tmp_path):
    title, all_fields = (finished.parent / "title", "teacher"), (finished, "teacher")
    compare(tmp_path, "d", {"title": [title], "six fields": [all_fields]})
    compare(tmp_path, "a", {"BERT": [title, title], "Llama": [all_fields]})
    found = read_json(tmp_path / "findings.json")
    assert list(found) == ["a", "d"]
    assert str(finished.parent) not in (tmp_path / "findings.json").read_text()  # relative to the folder
    seeds = comparison.find(found["a"]["table"], condition="BERT", metric="accuracy").seeds
    assert len(seeds) == 2
    text = (tmp_path / "findings.md").read_text()
    assert "## (a)" in text and "| BERT | " in text and "## (d)" in text
    assert "| six fields − title | " in text and "| accuracy % by language | all | en | " in text
    assert (tmp_path / "finding_a.png").stat().st_size > 1000


def test_a_condition_needs_only_what_it_uses(finished, tmp_path):
    """A student: the features and its own folder. A teacher: labels/labelled.parquet."""
    for name in ("student_only", "teacher_only"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "features").symlink_to((finished / "features").resolve())
    shutil.copytree(finished / "student", tmp_path / "student_only" / "student_x")
    without = shutil.ignore_patterns("impressions")
    shutil.copytree(finished / "labels", tmp_path / "teacher_only" / "labels", ignore=without)
    student, teacher = (tmp_path / "student_only", "student_x"), (tmp_path / "teacher_only", "teacher")
    entry = compare(tmp_path / "out", "c", {"s": [student], "t": [teacher]})
    assert list(entry["conditions"]) == ["s", "t"]
    run = tmp_path / "student_only"
    line = stop_line(comparison.compare, "a", {"t": [(run, "teacher")]}, tmp_path / "out")
    assert "03_label.py" in line and str(run / "labels") in line


def test_other_evaluation_rows_are_refused(finished, tmp_path):
    run = tmp_path / "other"
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns("report", "teacher"))
    path = run / "features" / "labelled.parquet"
    table = pq.read_table(path)
    label = table["label"].to_numpy().copy()
    first = int(np.flatnonzero(np.array(table["split"].to_pylist()) == "eval")[0])
    label[first] = label[first] % 5 + 1
    write_parquet(path, table.set_column(table.column_names.index("label"), "label", pa.array(label)))
    mark_finished(run / "features", **read_json(run / "features" / "stage.json"))
    conditions = {"a": [(finished, "teacher")], "b": [(run, "teacher")]}
    line = stop_line(comparison.compare, "a", conditions, tmp_path)
    assert str(run) in line and "other evaluation rows" in line
    assert not (tmp_path / "findings.json").exists()


def test_only_labelled(finished, tmp_path):
    """The human-labelled rows get the labels they get anyway; no student can be trained on them; what 04
    advises completes them, and labels none of them again."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "features").symlink_to((finished / "features").resolve())
    shutil.copytree(finished / "teacher", run / "teacher")
    stage("03").main(["--run", str(run), "--only-labelled", "--device", "cpu"])
    assert not (run / "labels" / "impressions").exists()
    made = pq.read_table(run / "labels" / "labelled.parquet")
    assert made.equals(pq.read_table(finished / "labels" / "labelled.parquet"))
    about = read_json(run / "labels" / "stage.json")
    assert about["arguments"]["only_labelled"] is True and about["rows"]["impressions"] == 0
    line = stop_line(stage("04").main, ["--run", str(run), "--epochs", "1", "--device", "cpu"])
    assert "--only-labelled was True" in stop_line(stage("03").main, ["--run", str(run), "--device", "cpu"])
    command = shlex.split(line.partition("--only-labelled; python ")[2])
    assert command == ["03_label.py", "--run", str(run), "--device", "cpu", "--overwrite"]
    stage("03").main(command[1:])
    counts, whole = (read_json(r / "labels" / "stage.json")["labels"] for r in (run, finished))
    assert counts["looked_up"] == {str(run): about["labels"]["passes"]}
    assert counts["passes"] == whole["passes"] - about["labels"]["passes"]
    assert set(require_pairs(run, ["*.parquet"], impressions=True)) == {"features", "labels"}


def test_two_levels_are_shown_by_auroc(finished, tmp_path, monkeypatch):
    """Of relevant or not, most rows are not: accuracy says little."""
    conditions = {"BERT": [(finished, "teacher")], "larger": [(finished, "teacher")]}
    assert compare(tmp_path / "five", "a", conditions)["shown"] == "accuracy"
    read = comparison.read_system

    def read_binary(run, name):
        system = read(run, name)
        system.rows["label"] = np.where(system.rows["label"] >= 4, 5, 1)
        return system

    monkeypatch.setattr(comparison, "read_system", read_binary)
    entry = compare(tmp_path / "two", "a", conditions)
    assert entry["shown"] == "auroc_4"
    assert "| AUROC ≥4 by language | " in (tmp_path / "two" / "findings.md").read_text()


# ------------------------------------------------------------------------------------------------------------
# The driver


@pytest.mark.parametrize("human,impressions,expected", [
    (6_000, 40_000, [4_000, 6_000, 18_000]),
    (6_000, 120_000, [6_000, 18_000, 60_000]),
    (100, 1_000_000, [100, 300, 1_000, 3_000, 10_000]),
    (1_000, 1_000, [100]),
])  # fmt: skip
def test_sizes(human, impressions, expected):
    assert findings.sizes(human, impressions) == expected


@pytest.fixture
def trained(monkeypatch):
    """Stages are not run: notes their command lines and gives their folders a stage.json."""
    commands = []

    def train(self, name):
        for _, script, *flags in self.noted[name]:
            number, flags = script.name[:2], dict(zip(map(str, flags[::2]), flags[1::2]))
            commands.append((number, flags))
            if number == "04":
                folder = flags["--run"] / flags["--name"]
                folder.mkdir(exist_ok=True)
                mark_finished(folder, rows={"train": 77, "human": 7}, arguments={"labels": "teacher"})

    monkeypatch.setattr(findings.Experiments, "train", train)
    return commands


def test_experiments_of_the_paper(finished, tmp_path, trained, monkeypatch):
    """The paper's order of text sources, no experiment that RUN stands for, equal steps."""
    compared = {}

    def note(key, conditions, into, resamples):
        compared[key] = conditions
        (into / "findings.md").write_text("done")

    monkeypatch.setattr(findings, "compare", note)
    seeds = ["--seeds", "5", "6"]
    findings.main(["--run", str(finished), "--into", str(tmp_path / "out"), *seeds, "--models", "BERT=x"])
    assert list(compared["d"]) == ["caption", "+ title+description", "+ links", "+ boards", "+ queries"]
    assert compared["d"]["+ queries"] == compared["a"]["Llama"] == compared["c"]["teacher"]
    assert compared["a"]["Llama"][0] == (finished, "teacher") and len(compared["a"]["BERT"]) == 2
    assert compared["c"]["student"][0] == compared["b"]["all impressions"][0] == (finished, "student")
    teachers = [flags for number, flags in trained if number == "02"]
    assert len(teachers) == 2 + 1 + 4 * 2  # BERT, RUN's own second seed, four amounts of text
    assert {flags["--seed"] for flags in teachers} == {5, 6}
    of_home = [flags for number, flags in trained if flags.get("--languages") == "en"]
    fewer = [flags for number, flags in trained if flags.get("--name", "").startswith("student_fewer")]
    assert len(of_home) == len(fewer) == 2
    languages = pq.read_table(finished / "features" / "queries.parquet")["language"].to_pylist()
    impressions = pq.read_table(finished / "features" / "impressions")["query_index"].to_pylist()
    rows = sum(languages[query] == "en" for query in impressions) * 9 // 10
    assert {flags["--rows"] for flags in of_home + fewer} == {rows}
    assert len({flags["--epochs"] for flags in of_home + fewer}) == 1


@pytest.mark.parametrize("wanted", [["a", "d"], ["b"], ["c"]])
def test_only_the_findings_asked_for(finished, tmp_path, trained, monkeypatch, wanted):
    compared = []

    def note(key, conditions, into, resamples):
        compared.append(key)
        (into / "findings.md").write_text("done")

    monkeypatch.setattr(findings, "compare", note)
    flags = ["--run", str(finished), "--into", str(tmp_path / "out"), "--seeds", "0", "1"]
    findings.main([*flags, "--models", "BERT=x", "--findings", *wanted])
    assert compared == wanted
    stages = {number for number, _ in trained}
    assert stages == {"a": {"02", "03"}, "b": {"04"}, "c": {"02", "03", "04"}}[wanted[0]]


def test_seeds_and_flags_of_the_language_finding_alone(finished, tmp_path, trained, monkeypatch):
    """(c) takes RUN's own teacher as the first seed; every stage gets the flags that RUN's got."""
    compared = {}

    def note(key, conditions, into, resamples):
        compared.update(conditions)
        (into / "findings.md").write_text("done")

    monkeypatch.setattr(findings, "compare", note)
    flags = ["--run", str(finished), "--findings", "c", "--into", str(tmp_path / "out"), "--seeds", "0"]
    findings.main(flags)
    assert compared["teacher"] == [(finished, "teacher")]
    findings.main([*flags, "1"])
    assert compared["teacher"] == [
        (finished, "teacher"),
        (tmp_path / "out" / "teacher_Llama_1", "teacher"),
    ]
    (of_02, of_03) = [flags for number, flags in trained if number in ("02", "03")]
    assert of_02["--epochs"] == "1" and of_02["--device"] == of_03["--device"] == "cpu"


def test_languages_of_a_teacher_without_a_student(finished, tmp_path):
    """English labels in other languages can be looked at before any impression is labelled."""
    run = tmp_path / "run"
    run.mkdir()
    for name in ("features", "teacher", "labels"):
        (run / name).symlink_to((finished / name).resolve())
    findings.main(["--run", str(run), "--findings", "c", "--resamples", "20", "--seeds", "0"])
    table = read_json(tmp_path / "findings" / "findings.json")["c"]["table"]
    assert {row["condition"] for row in table} == {"teacher"}
    assert {"en", "de", "es", "fr"} <= {row["language"] for row in table}
    assert "| difference |" not in (tmp_path / "findings" / "findings.md").read_text()
    assert str(run / "student") in stop_line(findings.main, ["--run", str(run), "--findings", "b", "c"])


def test_fields_of_the_experiments(finished, tmp_path, trained):
    """A teacher reads its fields in the order in which RUN's reads them."""
    into = tmp_path / "out"
    settings = findings.Settings(run=finished, into=into, more=finished, models=(), seeds=(0,))
    experiments = findings.Experiments(settings)
    findings.compare_sources(experiments, [(finished, "teacher")])
    read = list(map(str, experiments.noted["fields_to_title_description_0"][0]))
    assert read[read.index("--fields") + 1 :] == ["title", "description", "caption"]


def experiments_of(run, into, **settings):
    return findings.Experiments(findings.Settings(run=run, into=into, more=run, **settings))


@pytest.mark.parametrize("own, others", [(0, [1, 2]), (1, [0, 2]), (7, [1, 2])])
def test_no_seed_counts_twice(tmp_path, own, others):
    (tmp_path / "teacher").mkdir()
    mark_finished(tmp_path / "teacher", arguments={"seed": own})
    experiments = experiments_of(tmp_path, tmp_path / "out", seeds=(0, 1, 2))
    assert experiments.seeds_beside([(tmp_path, "teacher")]) == others
    assert experiments.seeds_beside([]) == [0, 1, 2]


def test_students_on_human_labels_have_their_own_flags(tmp_path):
    """RUN's student may have flags that 04 --labels human refuses."""
    flags = {"student": ["--human-rows", "none"], "student_human_labels": ["--labels", "human"]}
    for name, command in flags.items():
        (tmp_path / name).mkdir()
        arguments = {"seed": 0, "epochs": 1}
        mark_finished(tmp_path / name, arguments=arguments, command=command, rows={"human": 1, "train": 9})
    (tmp_path / "features").mkdir()
    mark_finished(tmp_path / "features", rows={"labelled_train": 1, "impressions": 2})
    experiments = experiments_of(tmp_path, tmp_path / "out", seeds=(0, 1))
    findings.compare_amounts(experiments, None)
    for name, ((_, script, *given),) in experiments.noted.items():
        on_human = name == "students_student_human_1"
        assert script.name == "04_train_student.py"
        assert given[:2] == flags["student_human_labels" if on_human else "student"]


def test_the_experiments_of_another_run_are_refused(tmp_path):
    for run in ("one", "two"):
        (tmp_path / run / "features").mkdir(parents=True)
    one, two = (experiments_of(tmp_path / run, tmp_path / "out") for run in ("one", "two"))
    for _ in range(2):
        link = one.link("teacher_0", one.run, "features") / "features"
    line = stop_line(two.link, "teacher_0", two.run, "features")
    assert str(link) in line and "--into" in line
    one.run.rename(tmp_path / "gone")  # the link leads nowhere
    assert stop_line(two.link, "teacher_0", two.run, "features") == line


def test_a_failed_experiment_is_named(finished, tmp_path):
    into = tmp_path / "out"
    settings = findings.Settings(run=finished, into=into, more=finished, seeds=(0,))
    experiments = findings.Experiments(settings)
    experiments.students(finished, "student_all", "--lr", "-1")
    line = stop_line(experiments.work)
    assert "students_student_all_0" in line and "--lr" in line and "logs" in line


def test_bad_runs_and_flags(tmp_path, capsys):
    line = stop_line(findings.main, ["--run", str(tmp_path)])
    assert str(tmp_path / "teacher") in line and "02_train_teacher.py" in line
    for flags in (["--jobs", "0"], ["--seeds", "a"], ["--nonsense"]):
        with pytest.raises(SystemExit) as stopped:
            findings.main(flags)
        assert stopped.value.code == 2
