"""The student at work: a new query or pin gets the features that stage 01 would give it, the ONNX files say
what PyTorch says, and the service by uvicorn answers."""

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from helpers import ROOT, environment, mark_finished, stage, stop_line
from rank_bm25 import BM25Okapi
from served_run import served_run

from common import FIELDS, Student
from lib.inputs.bm25 import tokenize
from lib.inputs.match import MATCH_FEATURES
from lib.inputs.student_inputs import StudentInputs
from lib.results import contract as served
from lib.results import export
from lib.stages.files import read_json, write_json
from lib.stages.terminal import Stop
from lib.tables.raw import RawTables
from serving import ranker as ranker_module
from serving.ranker import Pin, Query, Ranker
from serving.text_encoder import model_of_01


@pytest.fixture(scope="module")
def run(features, models):
    return served_run(features, models["bert"])


@pytest.fixture(scope="module")
def ranker(run):
    return Ranker(run)


@pytest.fixture(scope="module")
def raw(toy):
    """The tables of the dataset, as stage 01 reads them."""
    return RawTables(toy)


@pytest.fixture(scope="module")
def queries(run):
    """The run's queries as a service would get them, in index order."""
    found = []
    for row in pq.read_table(run / "features" / "queries.parquet").to_pylist():
        found.append(Query(row["query"], {name: row[name] for name in ("interest", "shopping_interest")}))
    return found


@pytest.fixture(scope="module")
def labelled(run):
    """labelled.parquet as columns."""
    table = pq.read_table(run / "features" / "labelled.parquet")
    return {name: np.array(table[name].to_pylist()) for name in table.column_names}


def scored(ranker, queries, labelled):
    """The class on every labelled pair."""
    pairs = []
    for query, pin in zip(labelled["query_index"], labelled["pin_index"]):
        pairs.append((queries[query], ranker.ids[pin]))
    return ranker.score(pairs)


def same_order(a, b, tolerance=1e-5):
    """Do two scores rank alike, but for ties?"""
    order = np.argsort(-a, kind="stable")
    return (np.diff(b[order]) <= tolerance).all()


# ------------------------------------------------------------------------------------------------------------
# New texts


def test_a_known_query_gets_the_features_that_01_gave_it(run, ranker, queries, labelled):
    found = scored(ranker, queries, labelled)
    for name in MATCH_FEATURES:
        assert labelled[name].std() > 0
        np.testing.assert_allclose(found.match[name], labelled[name], atol=1e-5)
    inputs = StudentInputs(run / "features", ranker.spec)
    for index in (0, 7, len(queries) - 1):
        side = ranker.new.query(queries[index])
        for name, codes in inputs.codes.items():
            if name.startswith("query"):
                assert side.columns[name] == [codes[index]]
        stored = inputs.embeddings["query_text"][index].astype(np.float32)
        np.testing.assert_allclose(side.columns["query_text"][0], stored, atol=1e-3)  # float16: 11 bits


def test_bm25_of_a_new_query_is_rank_bm25s(run, ranker):
    """rank_bm25 itself, on the same texts, is the reference."""
    pins = pq.read_table(run / "features" / "pins.parquet").to_pylist()
    reference = BM25Okapi([tokenize(" ".join(pin[name] for name in FIELDS if pin[name])) for pin in pins])
    for text in ("red chair", "vintage red red lamp", "rotes kleid", "nothing like it"):
        scores = ranker.score([(text, pin_id) for pin_id in ranker.ids])
        np.testing.assert_allclose(scores.match["bm25"], reference.get_scores(tokenize(text)), atol=1e-5)


def test_boards_of_a_new_pin_give_01s_graph_embedding(run, ranker, raw):
    boards = {}
    for pin_id, title in raw.ask("SELECT pin_id, board_title FROM raw_boards"):
        boards.setdefault(pin_id, []).append(title)
    stored = np.load(run / "features" / "pin_graph_embedding.npy")
    assert len(boards) > 20
    for pin_id, titles in boards.items():
        expected = stored[ranker.row_of[pin_id]].astype(np.float32)
        np.testing.assert_allclose(ranker.new.graph_embedding(titles), expected, atol=1e-3)
    assert not ranker.new.graph_embedding(["no such board"]).any()


def test_a_new_pin_equal_to_a_known_one_gets_its_features(run, ranker, raw, toy):
    """Caption, picture and boards of ten pins. What a new pin cannot have is text from engaged queries and
    links: one pin of the toy has neither, and is scored alike."""
    rows = pq.read_table(run / "features" / "pins.parquet").to_pylist()
    boards = {row["pin_id"]: [] for row in rows}
    for pin_id, title in raw.ask("SELECT pin_id, board_title FROM raw_boards"):
        boards[pin_id].append(title)
    alike = [row for row in rows if row["image"] and not row["queries"] and not row["links"]]
    chosen = alike + [row for row in rows if row["image"] and row not in alike][:9]
    pins = []
    for row in chosen:
        picture = toy / row["image"]
        given = picture if len(pins) % 2 else picture.read_bytes()
        pins.append(Pin(row["title"], row["description"], given, tuple(boards[row["pin_id"]])))
    stored = np.load(run / "features" / "pin_visual_embedding.npy")
    for pin, row in zip(pins, chosen):
        text, made = ranker.new.look_at(pin)
        assert row["caption"] and row["caption"] in text
        np.testing.assert_allclose(made["pin_visual"], stored[ranker.row_of[row["pin_id"]]], atol=5e-3)
        assert ranker.new.top_tokens(pin.boards) == row["boards"]
    new = ranker.score([("red chair", pin) for pin in pins[: len(alike)]])
    known = ranker.score([("red chair", row["pin_id"]) for row in alike])
    assert len(alike) > 0
    np.testing.assert_allclose(new.probabilities, known.probabilities, atol=2e-3)  # float16 embeddings
    np.testing.assert_allclose(new.match["bm25"], known.match["bm25"], atol=1e-5)


def test_what_a_new_text_lacks_is_unknown(ranker):
    side = ranker.new.query(Query("red chair", {"interest": "no such interest"}))
    assert side.columns["query_interest"] == [0] and side.columns["query_shopping_interest"] == [0]
    pin = ranker.new.pins([Pin("Chair")])
    for name in ("pin_visual", "pin_graph"):
        assert not pin.columns[name].any()
    line = stop_line(ranker.rank, Query("red chair", {"intrest": "garden"}))
    assert "intrest" in line and "columns interest, shopping_interest; embeddings query_text" in line
    assert "no such file" in stop_line(ranker.score, [("red chair", Pin(image=ROOT / "none.png"))]).lower()
    assert "the picture" in stop_line(ranker.score, [("red chair", Pin(image=b"no picture"))])


# ------------------------------------------------------------------------------------------------------------
# One ranking: the class, the ONNX file, the student of stage 05


def test_class_onnx_and_05_rank_the_evaluation_pairs_alike(run, ranker, queries, labelled):
    ours = scored(ranker, queries, labelled)
    inputs = StudentInputs(run / "features", ranker.spec)
    match = np.stack([labelled[name] for name in MATCH_FEATURES], 1).astype(np.float32)
    gathered = inputs.gather(labelled["query_index"], labelled["pin_index"], match)
    feed = {name: tensor.numpy() for name, tensor in gathered.items()}
    onnx_p, onnx_level = served.open_onnx(run / "student" / "student.onnx").run(served.OUTPUTS, feed)
    rows = {**labelled, **{name: labelled[name].astype(np.float32) for name in MATCH_FEATURES}}
    torch_p, torch_level = stage("05").student_system(run / "student", run / "features", rows)
    np.testing.assert_allclose(onnx_p, torch_p, atol=1e-5)
    np.testing.assert_allclose(ours.probabilities, torch_p, atol=1e-3)  # of float16 embeddings
    in_eval = labelled["split"] == "eval"
    for query in np.unique(labelled["query_index"][in_eval]):
        at = in_eval & (labelled["query_index"] == query)
        assert same_order(torch_level[at], onnx_level[at])
        assert same_order(torch_level[at], ours.expected_level[at], tolerance=1e-3)
    assert torch_level.std() > 0.1  # there is something to rank


SPECS = {
    "all": (
        {"query_k": ["a", "b"], "pin_k": ["x"]},
        {"pin_price": [3.0, 2.0, 0.0, 5.0], "query_n": [0.0, 1.0, -9.0, 9.0]},
    ),
    "none": ({}, {}),
}


@pytest.mark.parametrize("hidden", [(16, 8), ()])
@pytest.mark.parametrize("kind", SPECS)
def test_both_onnx_files_are_the_network(kind, hidden, tmp_path):
    """With categories and numbers of both sides, unknown numbers, pairs of embeddings of one size; one row of
    the query for all pins is that row repeated; twice the same bytes, without a path of this machine."""
    categories, numbers = SPECS[kind]
    embeddings = {"pin_a": 4, "pin_b": 6, "query_a": 6, "query_b": 4, "query_c": 6}
    spec = {"embeddings": embeddings, "categories": categories, "category_dim": 3, "numbers": numbers}
    spec |= {"match": ["bm25", "query_price"], "mean": [0.5, 1.0], "std": [2.0, 3.0], "hidden": hidden}
    spec |= {"low": [-0.5, -9.0], "high": [0.5, 9.0]}
    torch.manual_seed(0)
    student = Student({**spec, "dropout": 0.5, "input_dropout": 0.5}).train()
    inputs = {name: torch.randn(40, size) for name, size in embeddings.items()}
    inputs |= {name: torch.randint(0, 2, (40,)) for name in categories}
    inputs |= {name: torch.randn(40) for name in (*numbers, "bm25", "query_price")}
    for name in (*numbers, "bm25"):
        inputs[name][5] = torch.nan
    assert export.save_onnx(student, inputs, tmp_path) < 1e-5
    assert student.training  # what was given is left as it was
    names = (served.ONNX, served.ONNX_ONE_QUERY)
    first = [(tmp_path / name).read_bytes() for name in names]
    export.save_onnx(student, inputs, tmp_path)
    assert [(tmp_path / name).read_bytes() for name in names] == first
    assert str(ROOT).encode() not in first[0] + first[1]

    one_row = {name: tensor[3:4] for name, tensor in inputs.items() if served.is_query(name, spec)}
    assert one_row.keys() == {name for name in (*embeddings, *categories, *numbers) if "query" in name}
    repeated = {name: tensor.expand(40, *tensor.shape[1:]) for name, tensor in one_row.items()}
    with torch.inference_mode():
        expected = student.eval()(inputs | repeated).softmax(1).numpy()
        broadcast = student(inputs | one_row).softmax(1).numpy()
    feed = {name: tensor.numpy() for name, tensor in (inputs | one_row).items()}
    p, level = served.open_onnx(tmp_path / served.ONNX_ONE_QUERY).run(served.OUTPUTS, feed)
    for found in (p, broadcast):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(level, expected @ np.arange(1, 6), atol=1e-4)


def test_a_wrong_onnx_file_stops_04():
    p = np.full((3, 5), 0.2)
    assert export.compare(p, (p, p @ np.arange(1, 6)), "student.onnx") < 1e-12
    for wrong in (p + [[2e-4, -2e-4, 0, 0, 0]], p * np.nan):
        with pytest.raises(Stop, match="student.onnx"):
            export.compare(p, (wrong, p @ np.arange(1, 6)), "student.onnx")
    with pytest.raises(Stop, match="student.onnx"):
        export.compare(p, (p, np.zeros(3)), "student.onnx")


def test_an_input_has_a_name_of_its_own():
    """A column `text` of the pins would be the input pin_text, as the embedding is."""
    spec = {
        "embeddings": {"pin_text": 4},
        "categories": {"pin_text": ["a"]},
        "numbers": {},
        "match": ["bm25"],
    }
    assert "'pin_text'" in stop_line(served.input_names, spec)


def test_features_json_is_the_contract(run):
    """Names, order, types and sizes are those of the files; sources are fingerprints of what is there."""
    contract = read_json(run / "student" / "features.json")
    made = read_json(run / "features" / "stage.json")
    for file in (served.ONNX, served.ONNX_ONE_QUERY):
        session = served.open_onnx(run / "student" / file)
        kinds = {"float32": "tensor(float)", "int64": "tensor(int64)"}
        for wanted, has in zip(contract["inputs"], session.get_inputs(), strict=True):
            assert (wanted["name"], kinds[wanted["dtype"]]) == (has.name, has.type)
            one_row = file == served.ONNX_ONE_QUERY and wanted["of"] == "query"
            assert [1 if one_row else "B", *wanted["shape"][1:]] == has.shape
        for promised, has in zip(contract["outputs"], session.get_outputs(), strict=True):
            assert (promised["name"], promised["shape"]) == (has.name, ["B", *promised["shape"][1:]])
    assert all(wanted["how"] and wanted["unit"] for wanted in contract["inputs"])
    sources = contract["sources"]
    assert sources["text encoder"]["fingerprint"] == made["inputs"]["text encoder"]
    assert sources["caption model"] == {"name": "blip", "fingerprint": made["inputs"]["caption model"]}
    assert sources["bm25.parquet"]["fingerprint"] == made["outputs"]["bm25.parquet"]["hash"]
    assert {wanted["source"] for wanted in contract["inputs"]} - {None} == set(sources)


# ------------------------------------------------------------------------------------------------------------
# The class


def test_rank(ranker):
    every = ranker.rank("red chair")
    assert sorted(every.pins) == sorted(ranker.ids)
    assert (np.diff(every.expected_level) <= 0).all()
    np.testing.assert_allclose(every.probabilities.sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(every.probabilities @ np.arange(1, 6), every.expected_level, atol=1e-4)
    some = every.pins[10:40:3]
    assert ranker.rank("red chair", candidates=some[::-1]).pins == some
    assert ranker.rank("red chair", candidates=some, top=2).pins == some[:2]
    assert ranker.rank("red chair", candidates=[]).pins == []
    engaged = ranker.rank("red chair", engaged={every.pins[5]: 20.0})
    place = engaged.pins.index(every.pins[5])
    assert (
        engaged.match["engagement"][place] == np.float32(np.log(21)) and engaged.match["engagement"].sum() > 3
    )
    assert "'p?'" in stop_line(ranker.rank, "red chair", ["p?"])


def test_chunks_do_not_show(ranker, monkeypatch):
    whole = ranker.rank("red chair")
    monkeypatch.setattr(ranker_module, "CHUNK", 7)
    parts = ranker.rank("red chair")
    np.testing.assert_allclose(parts.expected_level, whole.expected_level, atol=1e-5)
    np.testing.assert_allclose(parts.match["bm25"], whole.match["bm25"], atol=1e-6)


def test_score_is_rank_pair_by_pair(ranker):
    """Pairs of several queries, known and new pins mixed, come back in their order."""
    new = Pin("Red chair", "a chair")
    pairs = [(text, pin) for pin in (ranker.ids[3], new, ranker.ids[9]) for text in ("red chair", "lampe")]
    together = ranker.score(pairs)
    for row, pair in enumerate(pairs):
        alone = ranker.score([pair])
        np.testing.assert_allclose(together.probabilities[row], alone.probabilities[0], atol=1e-5)
        assert together.pins[row] is pair[1]
    ranked = ranker.rank("lampe")
    row = ranked.pins.index(ranker.ids[3])
    np.testing.assert_allclose(together.expected_level[1], ranked.expected_level[row], atol=1e-4)
    assert together.match["terms_matched"][2] == 1 and together.match["terms_matched"][3] == 0
    assert len(ranker.score([]).pins) == 0


def test_a_temperature_softens(run, ranker):
    sharp, soft = ranker.rank("red chair", top=5), Ranker(run, temperature=2.0)
    soft = soft.score([("red chair", pin) for pin in sharp.pins])
    expected = np.sqrt(sharp.probabilities)
    expected /= expected.sum(1, keepdims=True)
    np.testing.assert_allclose(soft.probabilities, expected, atol=1e-5)
    np.testing.assert_allclose(soft.expected_level, expected @ np.arange(1, 6), atol=1e-4)


def test_several_threads_at_once(ranker):
    texts = ["red chair", "silla roja", "chaise rouge", "roter stuhl"] * 6
    alone = {text: ranker.rank(text) for text in set(texts)}
    with ThreadPoolExecutor(4) as pool:
        for text, found in zip(texts, pool.map(ranker.rank, texts)):
            assert found.pins == alone[text].pins


def test_a_student_of_other_statistics_is_refused(run, tmp_path):
    """BM25's or the graph's statistics rebuilt: the student would be silently worse."""
    (tmp_path / "features").symlink_to(run / "features")
    for file in (run / "student").iterdir():
        (tmp_path / "student").mkdir(exist_ok=True)
        (tmp_path / "student" / file.name).write_bytes(file.read_bytes())
    spec = read_json(tmp_path / "student" / "features.json")
    spec["sources"]["graph.parquet"]["fingerprint"] = "another"
    write_json(tmp_path / "student" / "features.json", spec)
    mark_finished(tmp_path / "student")
    line = stop_line(Ranker, tmp_path)
    assert "another graph.parquet" in line and "--overwrite" in line


def test_models_that_moved_or_changed(run, models):
    line = stop_line(lambda: Ranker(run, models={"text encoder": models["t5"]}))
    assert "not the text encoder" in line and "--text-encoder" in line
    Ranker(run, models={"text encoder": str(models["bert"]) + "/"})


def test_what_says_where_a_moved_model_is():
    """Settings of a service, not flags that it has not."""
    other = ROOT / "data" / "toy" / "models" / "t5"
    made = {"models": dict.fromkeys(("text encoder", "caption model"), {"name": "", "fingerprint": ""})}
    assert "TEXT_ENCODER of a service" in stop_line(model_of_01, made, "text encoder", other)
    line = stop_line(model_of_01, made, "caption model", other)
    assert "CAPTION_MODEL of a service" in line and "--" not in line


# ------------------------------------------------------------------------------------------------------------
# The service


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def post(port, question):
    body = json.dumps(question).encode()
    headers = {"Content-Type": "application/json"}
    asked = urllib.request.Request(f"http://127.0.0.1:{port}/rank", data=body, headers=headers)
    with urllib.request.urlopen(asked, timeout=30) as answer:
        return json.load(answer)


@pytest.fixture(scope="module")
def port(run):
    """The service of serving/service.py, by uvicorn, in a process of its own."""
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "serving.service:app", "--port", str(port)]
    env = {**environment(1), "RUN": str(run)}
    service = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
    while True:  # no limit of time: a busy machine takes minutes to import PyTorch
        time.sleep(0.2)
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                break
        assert service.poll() is None, service.stderr.read()
    yield port
    service.terminate()
    service.wait(20)
    service.stderr.close()


def test_the_service(port, ranker):
    found = post(port, {"query": "red chair", "top": 5})
    expected = ranker.rank("red chair", top=5)
    assert [row["pin_id"] for row in found] == expected.pins
    np.testing.assert_allclose([row["expected_level"] for row in found], expected.expected_level, atol=1e-5)
    np.testing.assert_allclose([row["probabilities"] for row in found], expected.probabilities, atol=1e-5)
    some = expected.pins[1:3]
    columns = {"interest": "furniture"}
    asked = {"query": "red chair", "candidates": some, "columns": columns}
    expected = ranker.rank(Query("red chair", columns), some)
    assert [row["pin_id"] for row in post(port, asked)] == expected.pins
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: post(port, {"query": "red chair", "top": 5}), range(12)))
    assert all(answer == found for answer in answers)
    for wrong in ({"query": "red chair", "candidates": ["no such pin"]}, {"top": 3}):
        with pytest.raises(urllib.error.HTTPError) as refused:
            post(port, wrong)
        assert refused.value.code == 422
