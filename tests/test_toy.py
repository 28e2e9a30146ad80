"""The toy world: the same bytes every time, and the promises that data/toy/README.md makes of it."""

import datetime

import make_toy
import make_toy_models
import numpy as np
import pyarrow.parquet as pq
import pytest
import toy_images
from PIL import Image
from transformers import AutoModel, AutoTokenizer

from lib.tables.raw import RawTables


def test_every_object_can_be_drawn_and_every_colour_has_one():
    assert set(toy_images.SHAPES) == set(make_toy.OBJECTS) == set(make_toy.FAMILY_OF)
    assert set(toy_images.COLOURS) == set(make_toy.WORDS["colour"])
    assert sum(map(len, make_toy.WORDS.values())) == 105
    for concepts in make_toy.WORDS.values():
        assert all(len(texts) == len(make_toy.LANGUAGES) and all(texts) for texts in concepts.values())


def test_a_query_that_all_pins_were_drawn_for_gets_none():
    """A small world with many impressions runs out of pairs."""
    pins = [{"object": "chair"}, {"object": "table"}]
    query = {"meaning": {"object": "chair"}, "levels": np.array([5, 1]), "taken": set()}
    rng = np.random.default_rng(0)
    assert sorted(make_toy.sample_pins(query, pins, 3, [0.2] * 5, rng)) == [0, 1]
    assert make_toy.sample_pins(query, pins, 3, [0.2] * 5, rng) == []


def test_the_five_levels_by_hand():
    query = {"object": "chair", "colour": "red", "material": "wood"}
    pin = {"object": "chair", "colour": "red", "material": "wood", "style": "modern", "scene": "kitchen"}
    levels = [
        make_toy.relevance(query, pin | change)
        for change in (
            {},
            {"style": "boho"},
            {"colour": "blue"},
            {"colour": "blue", "material": "metal"},
            {"object": "table"},
            {"object": "shelf"},
            {"object": "cake"},
        )
    ]
    assert levels == [5, 5, 4, 3, 3, 2, 1]


def test_complements_are_symmetric_and_never_the_object_itself():
    for a, others in make_toy.COMPLEMENTS.items():
        assert others and a not in others and all(a in make_toy.COMPLEMENTS[b] for b in others)


def test_two_runs_give_the_same_bytes_and_another_seed_others(toy, tmp_path):
    make_toy.main(tmp_path / "again", scale=0.05)
    make_toy.main(tmp_path / "seed", scale=0.05, seed=1)
    files = sorted(p.relative_to(toy) for p in toy.rglob("*") if p.is_file())
    assert len(files) > 100 and files == sorted(
        p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*") if p.is_file()
    )
    assert [str(f) for f in files if (toy / f).read_bytes() != (tmp_path / "again" / f).read_bytes()] == []
    assert (toy / "pins.parquet").read_bytes() != (tmp_path / "seed" / "pins.parquet").read_bytes()


def test_more_impressions_of_the_same_world(toy, tmp_path):
    make_toy.main(tmp_path / "more", scale=0.05, impressions=2500)
    pairs = lambda folder: [
        tuple(row.values())
        for p in sorted((folder / "impressions").iterdir())
        for row in pq.read_table(p).to_pylist()
    ]
    before, after = pairs(toy), pairs(tmp_path / "more")
    assert (
        len(before) + 400 < len(after) == len(set(after)) <= 2500 and after[: len(before)] == before
    )  # a query has at most as many as there are pins
    files = [
        p.relative_to(toy)
        for p in toy.rglob("*")
        if p.is_file() and "impressions" not in str(p.relative_to(toy)) and p.name != "toy.json"
    ]
    assert [str(f) for f in files if (toy / f).read_bytes() != (tmp_path / "more" / f).read_bytes()] == []


def test_tables_keep_their_promises(toy, tmp_path):
    raw = RawTables(toy, spill=tmp_path)
    raw.check()
    ask = lambda sql: raw.db.execute(sql).fetchall()
    labelled = "raw_labels JOIN raw_queries USING (query_id)"
    assert ask(f"SELECT DISTINCT language FROM {labelled} WHERE split = 'train'") == [("en",)]
    assert ask(f"SELECT DISTINCT language FROM {labelled} WHERE split = 'eval' ORDER BY ALL") == [
        ("de",),
        ("en",),
        ("es",),
        ("fr",),
    ]
    assert ask("SELECT split, count(DISTINCT label) FROM raw_labels GROUP BY split ORDER BY split") == [
        ("eval", 5),
        ("train", 5),
    ]
    assert ask("SELECT count(*) FROM raw_impressions JOIN raw_labels USING (query_id, pin_id)") == [
        (0,)
    ]  # impressions are unlabelled
    assert len(ask("SELECT DISTINCT language FROM raw_impressions JOIN raw_queries USING (query_id)")) == 4
    assert ask("SELECT max(date), date_diff('day', min(date), max(date)) > 731 FROM raw_engagements") == [
        (datetime.date(2024, 6, 30), True)
    ]
    assert ask("SELECT min(dwell_seconds) < 10, max(dwell_seconds) > 10 FROM raw_link_visits") == [
        (True, True)
    ]


def test_images_exist_and_are_images(toy):
    table = pq.read_table(toy / "pins.parquet")["image"]
    paths = [p for p in table.to_pylist() if p]
    assert len(paths) == len(list((toy / "images").iterdir())) > 90
    for path in paths:
        with Image.open(toy / path) as image:
            assert 64 <= image.size[0] <= 96 and image.mode == "RGB"


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("important")
    with pytest.raises(SystemExit, match="exists"):
        make_toy.main(tmp_path / "mine", scale=0.05)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_the_stand_in_models_are_made(tmp_path, monkeypatch):
    """One step each; what is saved loads as a hub's model does, and the tokenizer knows the world's words."""
    monkeypatch.setattr(make_toy_models, "PAGES", 1_000)
    monkeypatch.setattr(make_toy_models, "FRESH_PAGES", 120)
    names = ("llama", "bert", "t5", "blip")
    make_toy_models.main(tmp_path, names, steps=0.0005)
    for name in names:
        AutoModel.from_pretrained(tmp_path / name)
    words = AutoTokenizer.from_pretrained(tmp_path / "llama").tokenize("rotes Kleid für Küche")
    assert words == ["▁rotes", "▁kleid", "▁für", "▁küche"]
