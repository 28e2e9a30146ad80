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

SCORES = Scores(["a", "b"], np.full((2, 5), 0.2), np.array([3.5, 2.0]), {"bm25": np.array([1.25, 0.0])})


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"picture": Path("/nope/x.png")}, "--picture /nope/x.png"),
        ({"picture": Path("x.txt")}, "--picture x.txt: a PNG file"),
        ({"pin_image": Path("/nope/chair.jpg")}, "--pin-image /nope/chair.jpg: no such file"),
        ({"pin_image": Path(__file__)}, "--pin-image"),
        ({"query": "caf\udce9"}, "not UTF-8"),
        ({"pin_boards": ("caf\udce9",)}, "not UTF-8"),
    ],
)
def test_what_cannot_end_well_is_said_first(flags, words):
    assert words in stop_line(search.check_flags, search.Settings(**{"query": "red chair", **flags}))


def test_rows_for_programs(capsys):
    shown = [("a", 'one,\n"two"'), ("b", "=1+1")]
    search.print_rows(SCORES, shown, "json")
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["pin_id"] for row in rows] == ["a", "b"] and rows[0]["place"] == 1
    assert rows[0]["text"] == shown[0][1] and rows[0]["p3"] == 0.2 and rows[0]["bm25"] == 1.25
    search.print_rows(SCORES, shown, "csv", first=7)
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["place"] for row in rows] == ["7", "8"] and rows[0]["text"] == shown[0][1]
    assert rows[1]["text"] == "'=1+1" and float(rows[1]["expected_level"]) == 2


def test_an_id_writes_nothing_to_the_terminal_but_itself(capsys):
    search.print_table(SCORES, [("a\x1b[2J\nb", "text"), ("b", "text")])
    out = capsys.readouterr().out
    assert "\x1b" not in out and out.count("\n") == 2
