"""The search command: what cannot come to a good end is said before the work; its output for programs."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from helpers import stop_line

from serving import search
from serving.ranker import Scores

SCORES = Scores(
    ["a", "b\x1b[2J\nb"], np.full((2, 5), 0.2), np.array([3.5, 2.0]), {"bm25": np.array([1.25, 0.0])}
)


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"picture": Path("/nope/x.png")}, "--picture /nope/x.png"),
        ({"picture": Path("x.txt")}, "--picture x.txt: a PNG file"),
        ({"pin_image": Path("/nope/chair.jpg")}, "/nope/chair.jpg: cannot be read (no such file"),
        ({"pin_image": Path(__file__)}, "test_search_output.py: cannot be read"),
        ({"query": "caf\udce9"}, "surrogates"),
        ({"pin_boards": ("caf\udce9",)}, "surrogates"),
        ({"query_columns": ("garden",)}, "NAME=VALUE"),
    ],
)
def test_what_cannot_end_well_is_said_first(flags, words):
    assert words in stop_line(search.asked, search.Settings(**{"query": "red chair", **flags}))


def test_rows_for_programs(capsys):
    texts = ['one,\n"two"', "=1+1"]
    search.print_pins(SCORES, texts, "json")
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["pin_id"] for row in rows] == ["a", "b\x1b[2J\nb"] and rows[0]["place"] == 1
    assert rows[0]["text"] == texts[0] and rows[0]["p3"] == 0.2 and rows[0]["bm25"] == 1.25
    search.print_pins(SCORES, texts, "csv")
    search.print_pins(SCORES, [None], "csv", first=7)  # the new pin
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["place"] for row in rows] == ["1", "2", "7"] and rows[0]["text"] == texts[0]
    assert rows[1]["text"] == "'=1+1" and float(rows[1]["expected_level"]) == 2 and rows[2]["text"] == ""


def test_an_id_writes_nothing_to_the_terminal_but_itself(capsys):
    search.print_pins(SCORES, ["text\x1b[2J", "text"], "table")
    out = capsys.readouterr().out
    assert "\x1b" not in out and out.count("\n") == 2 and "b\\x1b[2J\\nb" in out
