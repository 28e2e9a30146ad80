"""The UBI converter on documents of its several generations, made by hand."""

import csv
import gzip
import json

import from_ubi
import pyarrow.parquet as pq
import pytest
from helpers import small_dataset, stop_line, write_dataset, write_table

from lib.tables.judgment_files import query_id_of
from lib.tables.raw import RawTables


def event(action, search, pin=None, when="2024-12-10T23:30:00.000Z", **more):
    """An event; pin None: without attributes."""
    found = {"object": {"object_id": pin, "object_id_field": "sku"}, "position": {"ordinal": 0}}
    attributes = None if pin is None else found
    return {
        "action_name": action,
        "query_id": search,
        "timestamp": when,
        "event_attributes": attributes,
        **more,
    }


def search(name, text, **more):
    return {"query_id": name, "user_query": text, "timestamp": "2024-12-10T00:00:00Z", **more}


DOCUMENTS = [
    search("a", "Red  chair", query_response_hit_ids=["007", "gone"], query_attributes={}),
    search("b", " red  chair ", query_response_hit_ids=None),
    search("blank", " "),
    event("impression", "a", "p2"),
    event("impression", "a", "p2"),
    event("impression", "a", 3),
    event("click", "a", "p2", user_query="another text"),
    event("click", "b", "p2", "2024-12-10T23:30:00+01:00"),
    event("click", "b", "p2", "2024-12-11T00:30:00+01:00"),
    event("purchase", "b", "p2", 1733961600000),  # 2024-12-12 in milliseconds
    event("purchase", "b", "p2", 1733961600),
    event("add_to_cart", "c", "p3", user_query="椅子 赤"),
    event("on_search", "d", message="oak chair", message_type="QUERY"),
    event("click", "d", "007", message="Click on 007", message_type="INFO"),
    event("click", "d"),  # no object
    event("click", "d", "p2", "yesterday"),
    event("click", "blank", "p2"),
    event("click", None, "p2"),
    event("click", "a", "gone"),
    event("hover", "a", "p2"),
]


def export(path, documents, bulk=True):
    lines = []
    for document in documents:
        index = "ubi_events" if "action_name" in document else "ubi_queries"
        if bulk:
            lines.append(json.dumps({"index": {"_index": index, "_id": "1"}}))
        else:  # as hits of a search
            document = {"_index": index, "_id": "1", "_source": document}
        lines.append(json.dumps(document, ensure_ascii=False))
    text = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def read(folder, name):
    return pq.read_table(folder / name).to_pylist()


@pytest.fixture
def data(tmp_path):
    folder = write_dataset(tmp_path / "data", {"pins": small_dataset()["pins"]})
    mine = {"query_id": ["mine"], "query": ["RED  CHAIR"], "language": ["en"]}
    write_table(folder / "queries", "old", mine)
    return folder


@pytest.mark.parametrize("name, bulk", [("log.ndjson.gz", True), ("log.json", False)])
def test_tables(data, tmp_path, name, bulk, capsys):
    from_ubi.main([str(export(tmp_path / name, DOCUMENTS, bulk)), "--out", str(data), "--language", "de"])
    oak, japanese = query_id_of("oak chair"), query_id_of("椅子 赤")
    queries = sorted(read(data, "queries/log.parquet"), key=lambda row: row["query"])
    assert queries == [
        {"query_id": oak, "query": "oak chair", "language": "de"},
        {"query_id": japanese, "query": "椅子 赤", "language": "de"},
    ]
    shown = [(row["query_id"], row["pin_id"]) for row in read(data, "impressions/log.parquet")]
    assert sorted(shown) == [("mine", "007"), ("mine", "p2"), ("mine", "p2")]
    engaged = {
        (row["query"].strip(), row["pin_id"], str(row["date"])): row["count"]
        for row in read(data, "engagements/log.parquet")
    }
    assert engaged == {
        ("Red  chair", "p2", "2024-12-10"): 1,
        ("red  chair", "p2", "2024-12-10"): 2,  # half past midnight in Berlin is the day before in UTC
        ("red  chair", "p2", "2024-12-12"): 2,
        ("椅子 赤", "p3", "2024-12-10"): 1,
        ("oak chair", "007", "2024-12-10"): 1,
    }
    with open(data / "skipped_events.csv", newline="") as file:
        skipped = {(row["action"], row["reason"]): int(row["events"]) for row in csv.DictReader(file)}
    assert skipped == {
        ("a hit", "no such pin"): 1,
        ("click", "no object"): 1,
        ("click", "no such pin"): 1,
        ("click", "no text of its search"): 2,
        ("click", "no time"): 1,
        ("hover", "an action that does not count"): 1,
        ("impression", "no such pin"): 1,
        ("on_search", "an action that does not count"): 1,
    }
    events = sum("action_name" in document for document in DOCUMENTS) + 2  # and two hits
    assert events == len(shown) + sum(engaged.values()) + sum(skipped.values())
    assert "2 queries, 3 impressions, 5 engagements" in capsys.readouterr().out
    assert not list(data.glob(".spill*"))
    write_table(data, "labels", {"query_id": ["mine"], "pin_id": ["p2"], "label": [5]})
    RawTables(data).check()


def test_actions_are_settable(data, tmp_path):
    path = export(tmp_path / "log.json", DOCUMENTS)
    from_ubi.main([str(path), "--out", str(data), "--actions", "hover", "--shown", "click"])
    assert [row["count"] for row in read(data, "engagements/log.parquet")] == [1]
    assert (
        len(read(data, "impressions/log.parquet")) == 6
    )  # a hit, and clicks on known pins, with a time or none


def test_what_does_not_hold_is_one_line(data, tmp_path):
    def refused(documents):
        path = tmp_path / "log.json"
        path.write_text(documents) if isinstance(documents, str) else export(path, documents)
        line = stop_line(from_ubi.main, [str(path), "--out", str(data)])
        assert not (data / "impressions" / "log.parquet").exists()
        return line

    assert "nothing in it" in refused(DOCUMENTS[2:3])
    assert "cannot be read" in refused('{"query_id": "a"}\n{"query_id": ')
    assert "in the future" in refused([DOCUMENTS[0], event("click", "a", "p2", "2999-01-01T00:00:00Z")])
    line = stop_line(from_ubi.main, [str(tmp_path / "none.json"), "--out", str(data)])
    assert "none.json" in line
    (data / "pins.parquet").unlink()
    assert "pins" in refused(DOCUMENTS)
