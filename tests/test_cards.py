"""Model cards: form of the hub, what they say, and what a stranger's names cannot do in them."""

from types import SimpleNamespace

import pytest
import yaml
from served_run import served_run

from lib.results import cards
from lib.stages.files import read_json

FEATURES = {"dataset": "/home/me/shop", "rows": {"queries": 33, "impressions": 2_000}}


@pytest.fixture(scope="module")
def run(features, models):
    return served_run(features, models["bert"])


def parts(card):
    """(front matter, text) of a card."""
    _, head, text = card.split("---\n", 2)
    return yaml.safe_load(head), text


@pytest.mark.parametrize("model, shown", [("google/mt5-base", "google/mt5-base"), ("/home/me/mine", "mine")])
def test_a_teachers_card(model, shown):
    arguments = {"model": model, "epochs": 3, "fields": ["title"]}
    about = {"arguments": arguments, "rows": {"train": 1_000, "held_out": 90}}
    head, text = parts(cards.card("teacher", about, FEATURES, ["de", "en"], "| metrics |"))
    assert head["language"] == ["de", "en"] and head["pipeline_tag"] == "text-ranking"
    assert head.get("base_model") == (model if shown == model else None) and "license" not in head
    assert f"teacher on {shown}" in text and "epochs 3" in text and "1,000 train, 90 held out" in text
    assert "shop: 33 queries, 2,000 impressions; queries in de, en" in text and "| metrics |" in text
    assert "/home/me" not in text and "{" not in text


def test_a_languages_name_is_no_key_of_the_head():
    about, wild = {"arguments": {}, "rows": {}}, ["en\nlicense: mit", "fr\n---\n# Mine"]
    head, text = parts(cards.card("student", about, FEATURES, wild, ""))
    assert head["language"] == ["en license: mit", "fr --- # Mine"] and "license" not in head
    assert "\n# Mine" not in text


def test_05_writes_a_card_of_every_folder(run, tmp_path):
    found = {"accuracy": SimpleNamespace(value=0.7, low=0.65, high=0.75)}
    found["ndcg_20"] = SimpleNamespace(value=0.9, low=0.8, high=1.0)
    systems = ("bm25", "match", "teacher", "student")
    table = {system: {"overall": found, "by_language": {"de": found}} for system in systems}
    read = {name: read_json(run / name / "stage.json") for name in ("features", "student")}
    cards.write_cards(run, read, table, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["student.md"]
    head, text = parts((tmp_path / "student.md").read_text(encoding="utf-8"))
    assert head["library_name"] == "onnx" and head["language"] == ["de", "en", "es", "fr"]
    assert "| student | de | 70.0 [65.0, 75.0] | 0.900 [0.800, 1.000] |" in text
    assert "| match | all | 70.0" in text and "| bm25 | all" in text and "| bm25 | de" not in text
    assert "33 queries" in text and "100 pins" in text and "epochs 8" in text
    assert str(run) not in text and "{" not in text
