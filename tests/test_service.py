"""The service as its callers and its operator meet it, over HTTP; what the class makes of odd arguments."""

import asyncio
import base64
import importlib.metadata
import io
import json
import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from fastapi.testclient import TestClient
from helpers import ROOT, environment, stop_line
from PIL import Image
from served_run import served_run

from lib.inputs.student_inputs import StudentInputs
from lib.levels import CHARACTERS
from lib.results import contract as export
from lib.stages.files import write_json
from lib.stages.streams import MOST_NORM
from lib.tables.database import Database
from lib.tables.raw import RawTables
from serving import new_features, service, text_encoder
from serving.new_features import number
from serving.ranker import Pin, Query, Ranker


@pytest.fixture(scope="module")
def run(features, models):
    return served_run(features, models["bert"])


@pytest.fixture(scope="module")
def app(run):
    return service.from_environment({"RUN": str(run), "MAX_BYTES": "50000", "MAX_CANDIDATES": "300"})


@pytest.fixture(scope="module")
def client(app):
    return TestClient(app, raise_server_exceptions=False)


@pytest.fixture(scope="module")
def ranker(run):
    return Ranker(run)


@pytest.fixture(scope="module")
def labelled(run):
    table = pq.read_table(run / "features" / "labelled.parquet")
    return {name: np.array(table[name].to_pylist()) for name in table.column_names}


@pytest.fixture(scope="module")
def texts(run):
    return pq.read_table(run / "features" / "queries.parquet")["query"].to_pylist()


def stored(run, ranker, labelled, query):
    """Pins of a query in labelled.parquet, and what student.onnx says of their stored features."""
    at = np.flatnonzero(labelled["query_index"] == query)
    match = np.stack([labelled[name][at] for name in ranker.spec["match"]], 1).astype(np.float32)
    inputs = StudentInputs(run / "features", ranker.spec)
    gathered = inputs.gather(labelled["query_index"][at], labelled["pin_index"][at], match)
    feed = {name: tensor.numpy() for name, tensor in gathered.items()}
    p, level = export.open_onnx(run / "student" / "student.onnx").run(export.OUTPUTS, feed)
    return [ranker.ids[pin] for pin in labelled["pin_index"][at]], p, level


# ------------------------------------------------------------------------------------------------------------
# A query that the run has


def test_a_known_query_by_its_bare_text_is_what_the_student_learnt(client, run, ranker, labelled, texts):
    """Columns, embedding and engagement of stage 01; also with spaces, another case, in several at once."""
    engaged = 0
    for query in np.unique(labelled["query_index"]):
        pins, p, _ = stored(run, ranker, labelled, query)
        engaged += (labelled["engagement"][labelled["query_index"] == query] > 0).any()
        for text in (texts[query], f"  {texts[query].upper().replace(' ', '  ')} "):
            found = client.post("/rank", json={"query": text, "candidates": pins, "top": 300}).json()
            by_pin = {row["pin_id"]: row["probabilities"] for row in found}
            np.testing.assert_allclose([by_pin[pin] for pin in pins], p, atol=1e-6)
    assert engaged > 3
    pins, p, _ = stored(run, ranker, labelled, query)
    np.testing.assert_allclose(
        ranker.score([(texts[query], pin) for pin in pins]).probabilities, p, atol=1e-6
    )


def test_what_the_caller_gives_is_taken(client, ranker, texts):
    text = next(text for row, text in enumerate(texts) if ranker.new.events(row, np.arange(100)).any())
    asked = {"query": text, "match": True, "top": 100}
    known, none = (client.post("/rank", json={**asked, **more}).json() for more in ({}, {"engaged": {}}))
    assert any(row["match"]["engagement"] for row in known)
    assert not any(row["match"]["engagement"] for row in none)
    one = client.post("/rank", json={**asked, "engaged": {ranker.ids[7]: 3}}).json()
    assert {row["pin_id"] for row in one if row["match"]["engagement"]} == {ranker.ids[7]}
    side = ranker.new.query(Query(text, {"interest": None}))
    bare = ranker.new.query(Query(text)).columns
    assert side.columns["query_interest"] == [0] != bare["query_interest"]
    assert side.columns["query_shopping_interest"] == bare["query_shopping_interest"]
    vector = [float(place) for place in range(ranker.spec["embeddings"]["query_text"])]
    given = client.post("/rank", json={"query": text, "embeddings": {"query_text": vector}}).json()
    direct = ranker.rank(Query(text, {}, {"query_text": vector}), top=20)
    assert [row["pin_id"] for row in given] == direct.pins != ranker.rank(text, top=20).pins
    for wrong in ([1.0], [*vector[:-1], None], 3.0):
        asked = {"query": text, "embeddings": {"query_text": wrong}}
        assert client.post("/rank", json=asked).status_code == 422
    assert client.post("/rank", json={"query": text, "embeddings": {"query_txt": vector}}).status_code == 422


# ------------------------------------------------------------------------------------------------------------
# Without PyTorch

WITHOUT = """
import json, sys
refused = json.loads(sys.argv.pop())
class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in refused:
            raise ImportError(name)
sys.meta_path.insert(0, Refused())
from fastapi.testclient import TestClient
from serving import service
client = TestClient(service.from_environment({"RUN": sys.argv[1]}))
pin = {"title": "Red chair", "boards": ["Kitchen"]}
print(json.dumps([client.post("/rank", json={"query": text, "top": 100}).json() for text in sys.argv[2:]]))
print(json.dumps(client.post("/score", json={"query": "red chair", "pins": [pin]}).json()))
picture = client.post("/score", json={"query": "red chair", "pins": [{"image": "aGVsbG8="}]})
assert picture.status_code == 422 and "PyTorch" in picture.json()["detail"]
"""


def modules_left_out():
    """Modules of requirements.txt that serving/Dockerfile does not install; this test needs one of them."""
    dockerfile = (ROOT / "serving" / "Dockerfile").read_text()
    kept = set(re.search(r'"\^\((.*?)\)=="', dockerfile)[1].split("|"))
    listed = set(re.findall(r"^([\w-]+)==", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    assert kept < listed
    left_out, found = listed - kept - {"httpx"}, []
    for module, packages in importlib.metadata.packages_distributions().items():
        if left_out & {package.lower().replace("_", "-") for package in packages}:
            found.append(module)
    assert {"torch", "transformers", "sklearn", "PIL"} < set(found)
    return found


def test_a_process_without_pytorch_serves(run, ranker, tmp_path, capsys):
    """The text encoder as ONNX says what PyTorch says; a query never seen, a known one and a new pin get the
    same probabilities, in a process that has the packages of serving/Dockerfile alone."""
    (tmp_path / "run").mkdir()
    for name in ("features", "student"):
        (tmp_path / "run" / name).symlink_to(run / name)
    texts = ["wooden red chair for a kitchen", ranker.new.texts[0]]
    left_out = json.dumps(modules_left_out())
    command = [sys.executable, "-c", WITHOUT, str(tmp_path / "run"), *texts, left_out]
    options = {"cwd": ROOT, "env": environment(1), "capture_output": True, "text": True}
    refused = subprocess.run(command, **options)
    assert refused.returncode == 1 and "serving.text_encoder" in refused.stderr.splitlines()[-1]
    text_encoder.main(["--run", str(tmp_path / "run")])
    served = subprocess.run(command, **options)
    assert served.returncode == 0, served.stderr
    ranked, new = map(json.loads, served.stdout.splitlines())
    for text, rows in zip(texts, ranked):
        expected = ranker.score([(text, row["pin_id"]) for row in rows]).probabilities
        np.testing.assert_allclose([row["probabilities"] for row in rows], expected, atol=2e-4)
    expected = ranker.score([("red chair", Pin("Red chair", boards=["Kitchen"]))]).probabilities
    np.testing.assert_allclose([row["probabilities"] for row in new], expected, atol=2e-4)
    capsys.readouterr()


def test_the_text_encoder_as_onnx(run, ranker, tmp_path):
    text_encoder.export(ranker.new.text_encoder, tmp_path)
    ours = text_encoder.OnnxTextEncoder(tmp_path, {"max_tokens": 64, "dim": 64, "cut": "right"})
    assert not ours.vector("").any()
    write_json(tmp_path / "text_encoder" / "text_encoder.json", {"fingerprint": "one"})
    made = {"models": {"text encoder": {"fingerprint": "one"}}}
    assert "remove it" in stop_line(text_encoder.saved_encoder, tmp_path, made)
    blank = " " * 64 * CHARACTERS
    for text in (
        "a",
        "Red Chair!",
        "red chair for ideas " * 40,
        "stuhl 椅子 [SEP]",
        f"red{blank}chair",
        blank,
    ):
        np.testing.assert_allclose(ours.vector(text), ranker.new.text_encoder([text])[0], atol=4e-4)


# ------------------------------------------------------------------------------------------------------------
# The contract

STRANGER = """
import json, sys, unicodedata
from collections import Counter
import numpy as np, onnxruntime, pyarrow.parquet as pq, regex
features, student, toy = sys.argv[1:]
spec = json.load(open(f"{student}/features.json", encoding="utf-8"))
table = {name: pq.read_table(f"{features}/{name}.parquet") for name in ("pins", "queries", "bm25", "graph")}
pairs = pq.read_table(f"{features}/labelled.parquet").slice(0, 100).to_pylist()
engaged = pq.read_table(f"{features}/engagements.parquet").to_pylist()
engaged = {(row["query_index"], row["pin_index"]): row["engaged"] for row in engaged}
settings, rows = spec["settings"], {side: table[side].to_pylist() for side in ("pins", "queries")}

def tokens(text):
    text = unicodedata.normalize("NFKC", text).casefold()
    for found in regex.finditer(settings["token"], regex.sub(settings["invisible"], "", text)):
        word = found.group()
        if found.group("run") and len(word) > 1:
            yield from (word[i : i + 2] for i in range(len(word) - 1))
            yield from (c for c in word if unicodedata.category(c)[0] != "M")
        else:
            yield word

idf = dict(zip(table["bm25"]["token"].to_pylist(), table["bm25"]["idf"].to_pylist()))
k1, b, mean = (float(table["bm25"].schema.metadata[name]) for name in (b"k1", b"b", b"mean_length"))
saves, boards = {}, {row["board_title"]: row for row in table["graph"].to_pylist()}
for row in pq.read_table(f"{toy}/boards.parquet").to_pylist():
    saves.setdefault(row["pin_id"], []).append(row["board_title"])

def graph(pin_id):
    counts = Counter(title for title in saves.get(pin_id, []) if title in boards)
    if not counts:
        return np.zeros(len(table["graph"]["axes"][0]))
    weights = np.array([(1 + np.log(n)) * boards[title]["idf"] for title, n in counts.items()])
    axes = np.array([boards[title]["axes"] for title in counts])
    return (weights / np.linalg.norm(weights) @ axes).astype(np.float16)

feed = {one["name"]: [] for one in spec["inputs"]}
stored = {name: np.load(f"{features}/{name}_embedding.npy") for name in spec["embeddings"]}
for pair in pairs:
    index = {"query": pair["query_index"], "pin": pair["pin_index"]}
    query, pin = rows["queries"][index["query"]], rows["pins"][index["pin"]]
    fields = [f for f in spec["how"]["pin_text"].split(" of ")[0].split(", ")]
    text = list(tokens(" ".join(pin[field] for field in fields if pin[field])))
    asked, f = list(tokens(query["query"])), Counter(text)
    q, p = (np.float32(stored[f"{side}_text"][at]) for side, at in index.items())
    norm = k1 * (1 - b + b * len(text) / mean)
    value = {
        "bm25": sum(idf.get(token, 0) * f[token] * (k1 + 1) / (f[token] + norm) for token in asked),
        "terms_matched": sum(f[token] > 0 for token in asked) / len(asked),
        "text_cosine": q @ p / (np.linalg.norm(q) * np.linalg.norm(p)),
        "engagement": np.log1p(engaged.get((index["query"], index["pin"]), 0)),
    }
    for one in spec["inputs"]:
        name, kind = one["name"], one["kind"]
        if name == "pin_graph":
            value[name] = graph(pin["pin_id"])
        elif kind == "embedding":
            value[name] = stored[name][index[one["of"]]]
        elif kind == "category":
            values = spec["categories"][name]
            cell = (query if one["of"] == "query" else pin)[name.split("_", 1)[1]]
            value[name] = values.index(cell) + 1 if cell in values else 0
        feed[name].append(value[name])
session = onnxruntime.InferenceSession(f"{student}/student.onnx")
assert session.get_modelmeta().custom_metadata_map["contract"] == "features.json"
feed = {one["name"]: np.array(feed[one["name"]], one["dtype"]) for one in spec["inputs"]}
p, level = session.run(None, feed)
code = next(iter(spec["categories"]))
below, zero = ({**feed, code: np.full(100, number)} for number in (-1, 0))
assert (session.run(None, below)[0] == session.run(None, zero)[0]).all()
unknown = session.run(None, {**feed, "bm25": np.full(100, np.nan, np.float32)})[0]
at = spec["match"].index("bm25")
mean = session.run(None, {**feed, "bm25": np.full(100, spec["mean"][at], np.float32)})[0]
assert abs(unknown - mean).max() < 1e-5
ends = [np.full(100, number, np.float32) for number in (1e9, spec["high"][at])]
beyond, end = (session.run(None, {**feed, "bm25": column})[0] for column in ends)
assert abs(beyond - end).max() < 1e-6
assert not {"lib", "common", "serving", "torch"} & set(sys.modules)
print(json.dumps(p.tolist()))
"""


def test_100_pairs_from_the_contract_alone(run, labelled, ranker, toy, tmp_path):
    """features.json says all that somebody without this code must know."""
    pq.write_table(RawTables(toy).table("SELECT * FROM raw_boards"), tmp_path / "boards.parquet")
    folders = [str((run / name).resolve()) for name in ("features", "student")]
    env = {name: value for name, value in environment(1).items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", STRANGER, *folders, str(tmp_path)]
    served = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert served.returncode == 0, served.stderr
    expected = []
    for query, pin in zip(labelled["query_index"][:100], labelled["pin_index"][:100]):
        expected.append((Query(ranker.new.texts[query]), ranker.ids[pin]))
    expected = ranker.score(expected).probabilities
    np.testing.assert_allclose(json.loads(served.stdout), expected, atol=1e-3)  # float16 of the graph


# ------------------------------------------------------------------------------------------------------------
# Arguments of the class


def test_candidates_are_any_sequence(ranker):
    some = ranker.ids[5:25:2]
    expected = ranker.rank("red chair", some)
    series = pd.Series(some, index=range(900, 910))
    forms = [series, series[series.index >= 900], tuple(some), (pin for pin in some), dict.fromkeys(some)]
    forms += [np.array(some), dict.fromkeys(some).keys(), pd.Index(some), {*some}]
    for form in forms:
        found = ranker.rank("red chair", form)
        assert found.pins == expected.pins
        np.testing.assert_array_equal(found.probabilities, expected.probabilities)
    pairs = [("red chair", pin) for pin in some]
    straight = ranker.score(pairs)
    for form in (zip(["red chair"] * 10, some), pd.Series(pairs, index=range(5, 15)), iter(pairs)):
        np.testing.assert_array_equal(ranker.score(form).probabilities, straight.probabilities)
    engaged = pd.Series(range(10), index=some)
    by_dict = ranker.rank("red chair", some, engaged.to_dict())
    np.testing.assert_array_equal(
        ranker.rank("red chair", some, engaged).probabilities, by_dict.probabilities
    )
    for wrong in ("p00001", [1, 2], [None]):
        stop_line(ranker.rank, "red chair", wrong)
    assert "one text" in stop_line(ranker.rank, "red chair", some[0])
    assert "one text" in stop_line(lambda: ranker.rank("red chair", exclude=some[0]))
    for wrong in ({some[0]: -1}, {some[0]: None}, {some[0]: np.inf}, {1: 2}, pd.Series([1, 2])):
        assert "engaged" in stop_line(ranker.rank, "red chair", some, wrong)
    for wrong in ([("red chair", 3)], [(None, some[0])]):
        stop_line(ranker.score, wrong)
    for wrong in (None, b"red chair", "", " "):
        stop_line(ranker.rank, wrong)
    for wrong in (None, 1.0, [1.0], [np.nan] * 64, [np.inf] * 64, [1e9] * 64, ["x"] * 64, [[1], [1, 2]]):
        query = Query("red chair", embeddings={"query_text": wrong})
        assert "query_text: must be 64 finite numbers" in stop_line(ranker.rank, query)
    left = ranker.rank("red chair", exclude=some[:4])
    assert set(left.pins) == {*ranker.ids} - {*some[:4]}


def test_a_pins_arguments(ranker, toy):
    assert Pin(boards="Living room").boards == ["Living room"]
    nan = float("nan")
    assert Pin(boards=None).boards == Pin(boards=nan).boards == Pin(boards=[None, nan]).boards == []
    assert Pin(title=float("nan"), description=None).title == Pin(description=None).description == ""
    for wrong in ({"title": 3}, {"boards": [3]}, {"description": b"x"}):
        stop_line(lambda wrong=wrong: Pin(**wrong))
    path = next((toy / "images").iterdir())
    forms = (path, str(path), path.read_bytes(), io.BytesIO(path.read_bytes()), Image.open(path))
    texts, made = zip(*(ranker.new.look_at(Pin(image=form)) for form in forms))
    assert len(set(texts)) == 1 and all((one["pin_visual"] == made[0]["pin_visual"]).all() for one in made)
    assert "picture" in stop_line(ranker.new.look_at, Pin(image=3))


def test_numbers_and_categories_are_stage_01s(ranker, tmp_path):
    known = Database(tmp_path)
    for text in ("inf", "-inf", "nan", "1e39", "1_000", " 5 ", "1e30", "-1e31", "+3", "-.5", "5.", "", "3"):
        (value,) = known.ask(f"SELECT number('{text}')")[0]
        np.testing.assert_array_equal(number("price", text), np.float32(np.nan if value is None else value))
    for beyond in (None, float("inf"), 1e300, 10**400, np.nan):
        assert np.isnan(number("price", beyond))
    for wrong in ("cheap", "１２", [1]):
        assert "price" in stop_line(number, "price", wrong)
    assert new_features.MOST_NORM == MOST_NORM
    new = ranker.new
    old = new.spec["categories"]
    new.spec["categories"] = {"query_size": ["1", "true", "2.5"]}
    codes = [
        new.value("query_size", given)
        for given in (1, "1", 1.0, True, np.True_, 2.5, None, np.nan, np.inf, "x")
    ]
    new.spec["categories"] = old
    assert codes == [1, 1, 1, 2, 2, 3, 0, 0, 0, 0]
    assert known.ask("SELECT digits(1.0::DOUBLE)") == [("1",)]


def test_a_temperature_outside_its_range(run):
    for wrong in (0, -1, np.nan, 1e9):
        assert "temperature" in stop_line(lambda wrong=wrong: Ranker(run, temperature=wrong))


# ------------------------------------------------------------------------------------------------------------
# Over HTTP


WRONG = [
    {"query": "red chair", "top": -1},
    {"query": "red chair", "top": 0},
    {"query": "red chair", "top": None},
    {"query": "red chair", "top": 2.0},
    {"query": "red chair", "candidate": ["p00001"]},
    {"query": "red chair", "candidates": [1]},
    {"query": "red chair", "candidates": "p00001"},
    {"query": "red chair", "columns": {"intrest": "x"}},
    {"query": "red chair", "columns": {"text": "x"}},
    {"query": "red chair", "embeddings": {"query_interest": [1.0]}},
    {"query": "red chair", "engaged": {"p00001": -1}},
    {"query": None},
    {"query": 3},
    {"query": "  "},
    {},
    [],
]
RAW = [
    '{"query": "a\\ud800"}',
    '{"query": "a", "candidates": ["\\ud800"]}',
    '{"query": "a", "columns": {"\\ud800": "x"}}',
    '{"query": "a", "columns": {"interest": "\\ud800"}}',
    '{"query": "a", "columns": {"interest": "furniture", "interest": "\\udfff\\ud800"}}',
    '{"query": "a", "engaged": {"\\ud800": 1}}',
    '{"query": "a", "\\ud800": 1}',
    '{"query": "a", "engaged": {"p00001": NaN}}',
    '{"query": "a", "top": NaN}',
    '{"query": "a", "engaged": {"p00001": Infinity}}',
    '{"query": "a", "engaged": {"p00001": 1e999}}',
    f'{{"query": "a", "engaged": {{"p00001": {"9" * 400}}}}}',
]


WRONG_PINS = [
    {"boards": "Living room"},
    {"boards": [None]},
    {"boards": [3]},
    {"title": None},
    {"image": 3},
    {"colour": "red"},
    {"columns": {"colour": "red"}},
    {"embeddings": {"pin_text": [1.0]}},
    {"embeddings": {"pin_txt": [1.0]}},
]


def test_a_body_may_begin_with_a_byte_order_mark(client):
    headers = {"content-type": "application/json"}
    found = client.post("/rank", content='\ufeff{"query": "red chair"}'.encode(), headers=headers)
    assert found.json() == client.post("/rank", json={"query": "red chair"}).json()


@pytest.mark.parametrize("wrong", [*map(json.dumps, WRONG), *RAW])
def test_what_is_wrong_is_422_and_can_be_read(client, wrong):
    answer = client.post("/rank", content=wrong, headers={"content-type": "application/json"})
    assert answer.status_code == 422 and answer.json()["detail"]


@pytest.mark.parametrize("wrong", WRONG_PINS)
def test_a_pin_that_is_wrong_is_422(client, wrong):
    answer = client.post("/score", json={"query": "red chair", "pins": [wrong]})
    assert answer.status_code == 422 and answer.json()["detail"]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e39", '"1"'])
def test_an_embedding_of_odd_numbers_is_422(client, ranker, number):
    size = ranker.spec["embeddings"]["query_text"]
    vector = f"[{', '.join(['0', number][row == 3] for row in range(size))}]"
    asked = f'{{"query": "a", "embeddings": {{"query_text": {vector}}}}}'
    assert client.post("/rank", content=asked).status_code == 422


def test_odd_numbers_of_a_column_are_stage_01s(app, client, monkeypatch):
    """Infinite or too large: not known, as in a raw table; a word is refused."""
    new, seen = served(app).ranker.new, []
    query = new.query

    def noted(asked):
        side = query(asked)
        seen.append(side.columns["query_n"][0])
        return side

    monkeypatch.setattr(new, "spec", new.spec | {"numbers": {"query_n": [0, 1, 0, 1]}})
    monkeypatch.setitem(new.stored["query"], "query_n", np.zeros(len(new.texts)))
    monkeypatch.setattr(new, "query", noted)
    for given in ("inf", "1e39", 1e39, None, "", 2.5, "2.5"):
        asked = {"query": "red chair", "columns": {"n": given}, "top": 1}
        assert client.post("/rank", json=asked).status_code == 200
    np.testing.assert_array_equal(seen, [np.nan, np.nan, np.nan, np.nan, np.nan, 2.5, 2.5])
    asked["columns"] = {"n": "cheap"}
    assert client.post("/rank", json=asked).status_code == 422


def served(app):
    """The Service of an application."""
    return next(route.endpoint.__self__ for route in app.routes if route.path == "/rank")


def test_others_are_answered_while_a_ranking_is_at_work(app, monkeypatch):
    started, released = threading.Event(), threading.Event()
    rank = served(app).ranker.rank

    def slow(*arguments):
        started.set()
        released.wait()
        return rank(*arguments)

    monkeypatch.setattr(served(app).ranker, "rank", slow)
    with TestClient(app) as client, ThreadPoolExecutor() as pool:
        answer = pool.submit(client.post, "/rank", json={"query": "red chair", "top": 1})
        started.wait()
        statuses = [client.get("/ready").status_code, client.get("/version").status_code]
        released.set()
        assert [*statuses, answer.result().status_code] == [200] * 3


def test_limits(client, ranker):
    assert client.post("/rank", json={"query": "red chair " * 40}).status_code == 200
    assert client.post("/rank", json={"query": "red chair " * 60}).status_code == 422
    assert client.post("/rank", json={"query": "x" * 6_000}).status_code == 422
    assert client.post("/rank", json={"query": "x" * 60_000}).status_code == 413
    pieces = (b'{"query": "', *(b"x" * 9_000 for _ in range(9)), b'"}')
    assert client.post("/rank", content=iter(pieces)).status_code == 411  # its length is not told
    many = {"query": "red chair", "candidates": ranker.ids[:100] * 4}
    assert "300" in client.post("/rank", json=many).json()["detail"]
    several = {"searches": [{"query": "red chair"}] * 4}
    assert client.post("/rank_several", json=several).status_code == 422


def test_more_than_a_ranking(client, ranker, toy):
    one, two = {"query": "red chair", "top": 3}, {"query": "lampe", "top": 2, "titles": True, "match": True}
    together = client.post("/rank_several", json={"searches": [one, two]}).json()
    assert together == [client.post("/rank", json=each).json() for each in (one, two)]
    best = together[1][0]
    assert best["title"] == ranker.texts["title"][ranker.row_of[best["pin_id"]]].as_py()
    assert set(best["match"]) == set(ranker.spec["match"])
    without = client.post("/rank", json={**one, "exclude": [together[0][0]["pin_id"]]}).json()
    assert without[:2] == together[0][1:]
    picture = next((toy / "images").iterdir()).read_bytes()
    pins = [{"title": "Red chair", "boards": ["Kitchen"]}, {"image": base64.b64encode(picture).decode()}]
    found = client.post("/score", json={"query": "red chair", "pins": pins}).json()
    same = [Pin("Red chair", boards=("Kitchen",)), Pin(image=picture)]
    expected = ranker.score([("red chair", pin) for pin in same])
    np.testing.assert_allclose([row["expected_level"] for row in found], expected.expected_level, atol=1e-6)
    empty = client.post("/score", json={"query": "red chair", "pins": [{}]}).json()  # a text without tokens
    assert sum(empty[0]["probabilities"]) == pytest.approx(1)
    for wrong in ("no picture", base64.b64encode(b"no picture").decode()):
        asked = {"query": "red chair", "pins": [{"image": wrong}]}
        assert client.post("/score", json=asked).status_code == 422


def test_what_an_operator_asks(client, ranker, run):
    assert client.get("/health").status_code == client.get("/ready").status_code == 200
    about = client.get("/version").json()
    assert about["run"] == str(run) and about["fingerprints"]["student"] == ranker.trained["identity"]
    assert "text encoder" in about["fingerprints"]
    client.post("/rank", json={"query": "red chair"})
    client.get("/no such address")
    metrics = client.get("/metrics").text
    assert 'requests_total{address="/rank",status="200"}' in metrics and "scored_pairs_total" in metrics
    assert 'address="other",status="404"' in metrics
    schema = client.get("/openapi.json").json()
    answer = schema["paths"]["/rank"]["post"]["responses"]["200"]["content"]["application/json"]["schema"]
    assert answer["items"]["$ref"].endswith("Found")


def test_a_failure_of_ours_is_counted(app, client, monkeypatch):
    monkeypatch.setattr(served(app).ranker, "rank", None)
    assert client.post("/rank", json={"query": "red chair"}).status_code == 500
    assert 'requests_total{address="/rank",status="500"} 1.0' in client.get("/metrics").text


def test_a_client_that_goes_away_is_no_failure_of_ours(app, client):
    scope = {"type": "http", "method": "POST", "path": "/rank", "query_string": b""}
    scope["headers"] = [(b"content-length", b"9"), (b"content-type", b"application/json")]

    async def gone():
        return {"type": "http.disconnect"}

    async def nobody(message):
        pass

    asyncio.run(app(scope, gone, nobody))
    assert 'status="400"' in client.get("/metrics").text


def test_reload_serves_what_run_points_to_now(run, tmp_path):
    """The run is a link; a broken one is refused, and what was loaded serves on."""
    link = tmp_path / "now"
    link.symlink_to(run)
    client = TestClient(service.from_environment({"RUN": str(link), "run": "/nope", "EXCLUDE": ""}))
    before = client.post("/rank", json={"query": "red chair"}).json()
    link.unlink()
    assert client.post("/reload").status_code == 422
    assert client.post("/rank", json={"query": "red chair"}).json() == before
    shutil.copytree(run / "student", tmp_path / "other" / "student")
    (tmp_path / "other" / "features").symlink_to(run / "features")
    link.symlink_to(tmp_path / "other")
    first = client.get("/version").json()
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(client.post, "/rank", json={"query": "red chair"}) for _ in range(8)]
        assert client.post("/reload").json().keys() == first.keys()
        assert all(answer.result().json() == before for answer in asked)  # none is lost
    assert client.post("/rank", json={"query": "red chair"}).json() == before


def test_pins_that_no_ranking_has(run, ranker, tmp_path):
    best = ranker.rank("red chair", top=3).pins
    (tmp_path / "out.txt").write_text("\n".join(best[:2]) + "\n", encoding="utf-8-sig")  # as Notepad does
    client = TestClient(service.from_environment({"RUN": str(run), "EXCLUDE": str(tmp_path / "out.txt")}))

    def first():
        return client.post("/rank", json={"query": "red chair", "top": 1}).json()[0]["pin_id"]

    assert first() == best[2]
    (tmp_path / "out.txt").write_text(f"{best[0]} \r\n")
    assert client.post("/reload").status_code == 200 and first() == best[1]
    (tmp_path / "out.txt").unlink()
    answer = client.post("/reload")
    assert answer.status_code == 422 and "EXCLUDE" in answer.json()["detail"] and first() == best[1]


def test_settings_that_are_wrong_are_one_line(run, tmp_path):
    for wrong, named in (
        ({}, "RUN"),
        ({"RUN": "/nope"}, "/nope"),
        ({"RUN": str(run), "TEMPERATURE": "0"}, "temperature"),
        ({"RUN": str(run), "TEMPERATURE": "-1"}, "temperature"),
        ({"RUN": str(run), "TEMPERATURE": "nan"}, "temperature"),
        ({"RUN": str(run), "THREADS": "many"}, "THREADS"),
        ({"RUN": str(run), "MAX_TOKENS": "-1"}, "MAX_TOKENS"),
        ({"RUN": str(run), "STUDENT": "student_x"}, "student_x"),
        ({"RUN": str(run), "EXCLUDE": str(tmp_path / "none")}, "EXCLUDE"),
        ({"RUN": str(run), "TEXT_ENCODER": str(tmp_path)}, str(tmp_path)),
    ):
        with pytest.raises(SystemExit) as ended:
            service.from_environment(wrong)
        assert named in ended.value.code and "\n" not in ended.value.code


def test_every_setting_is_named_at_the_top():
    for name in service.Settings.model_fields:
        assert re.search(rf"\b{name.upper()}\b", service.__doc__), name
