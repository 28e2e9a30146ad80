"""Model cards: form of the hub, what they say, the metrics that stage 05 puts in."""

import shutil
from dataclasses import replace

import pytest
import yaml
from helpers import stage
from served_run import served_run

from lib.results import cards


@pytest.fixture(scope="module")
def run(features, models):
    return served_run(features, models["bert"])


def parts(card):
    """(front matter, text) of a card."""
    _, head, text = card.split("---\n", 2)
    return yaml.safe_load(head), text


def test_student_card(run):
    head, text = parts((run / "student" / "README.md").read_text(encoding="utf-8"))
    assert head["library_name"] == "onnx" and head["language"] == ["de", "en", "es", "fr"]
    assert "license" not in head and "base_model" not in head
    assert "33 queries, 100 pins, 2,000 impressions" in text
    assert "04_train_student.py --preset toy --run RUN" in text and "--epochs 8" in text
    assert "bm25" in text and "query_text [64]" in text
    assert str(run) not in text and "{" not in text.replace("{name: features[name] for name in inputs}", "")
    assert "held out, when training ended" in text


@pytest.mark.parametrize("model, licence", [("google/mt5-base", "apache-2.0"), ("folder", None)])
def test_teacher_card(run, tmp_path, monkeypatch, model, licence):
    about = {"model": model, "kind": "decoder", "finetuning": "qlora", "fields": ["title"], "max_tokens": 64}
    if licence:
        monkeypatch.setattr(cards, "licence_of", lambda model: (licence, f"`{licence}`"))
    else:
        about["model"] = str(tmp_path)
    counts = {"train": 1_000, "held_out": 100}
    log = [{"loss": 0.5, "epoch": 1}, {"epoch": 1, "held_out_loss": 0.61, "held_out_accuracy": 0.75}]
    head, text = parts(cards.teacher_card(about, "python 02_train_teacher.py", run, counts, log))
    assert head.get("base_model") == (model if licence else None) and head.get("license") == licence
    assert "accuracy 0.750" in text and "1,000 human-labelled" in text and "QLoRA" in text
    assert "the last token" in text and "{" not in text
    assert str(tmp_path.parent) not in text


def test_impressions_are_counted_where_their_files_are_damaged(features, tmp_path):
    """02 reads none of them, and said another number of a shard that was gone, or ended in a traceback."""
    folder = shutil.copytree(features, tmp_path / "features")
    before = cards.data_line(folder)
    assert "2,000 impressions" in before
    (folder / "impressions" / "part-00001.parquet").unlink()
    (folder / "impressions" / "part-00002.parquet").write_bytes(b"")
    assert cards.data_line(folder) == before


def test_licence_of_a_folder(tmp_path):
    assert cards.licence_of(str(tmp_path)) == (None, "not stated in its folder")
    (tmp_path / "LICENSE.txt").write_text("MIT License")
    assert cards.licence_of(str(tmp_path)) == (None, "in its file `LICENSE.txt`")
    (tmp_path / "README.md").write_text("---\ntags: [x]\nlicense: 'cc-by-4.0'\n---\n# A model\nlicense: no")
    assert cards.licence_of(str(tmp_path)) == ("cc-by-4.0", "`cc-by-4.0`, as its card says")
    (tmp_path / "README.md").write_text("---\ntags: [x]\n---\n# A model\nlicense: no")
    assert cards.licence_of(str(tmp_path))[0] is None
    assert cards.licence_of("no/such-model") == (None, "see its page on the hub")


def test_the_command_of_a_card_gives_the_same_settings(tmp_path):
    """Read back by the stage, it has the settings that it was made from."""
    module = stage("04")
    changed = {"labels": "human", "hidden": (64, 32), "languages": ("en", "de"), "lr": 3e-4, "rows": 10}
    for preset in ("toy", "paper"):
        settings = replace(module.PRESETS[preset], preset=preset, **changed)
        command = cards.command_line("04_train_student.py", settings, module.PRESETS).split()
        assert command[:2] == ["python", "04_train_student.py"]
        read = module.parse(module.PRESETS, command[2:])
        assert replace(read, run=settings.run) == settings
    teacher = stage("02")
    settings = replace(teacher.PRESETS["toy"], model=str(tmp_path))
    command = cards.command_line("02_train_teacher.py", settings, teacher.PRESETS)
    assert f"--model {tmp_path.name}" in command and str(tmp_path) not in command


def test_05_puts_the_metrics_in(run):
    interval = stage("05").Interval
    table = {}
    for system in ("bm25", "match", "teacher", "student"):
        for language in ("", "de"):
            table[system, language, "accuracy"] = interval(0.7, 0.65, 0.75)
            table[system, language, "ndcg_20"] = interval(0.9, 0.8, 1.0)
    folder = run / "cards"
    cards.write_cards(run, table, {"rows": 50, "queries": 7}, folder)
    assert [path.name for path in folder.iterdir()] == ["student.md"]  # the others have no card here
    before = (run / "student" / "README.md").read_text(encoding="utf-8")
    after = (folder / "student.md").read_text(encoding="utf-8")
    assert "| de | 70.0 [65.0, 75.0] | 0.900 [0.800, 1.000] |" in after and "50 human-labelled" in after
    assert "| all: match, untrained | 70.0" in after and "bm25, untrained" in after
    assert parts(after)[0] == parts(before)[0]
    start, end = before.index(cards.EVALUATION), before.index("\n## Limits")
    assert after.startswith(before[:start]) and after.endswith(before[end:])
    assert "when training ended" not in after
