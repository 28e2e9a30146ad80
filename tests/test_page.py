"""The page in the browser, people's labels, and the choice of what to label."""

import csv
import os
import socket
import subprocess
import sys
import time
from shutil import which
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from fastapi.testclient import TestClient
from finished_run import finished_run
from helpers import ROOT, stop_line

from experiments import choose
from lib.stages.terminal import Stop
from serving import page as serving_page
from serving.labels import Labels
from serving.page import Page, application

BROWSER = which("chromium") or which("chromium-browser") or which("google-chrome")


@pytest.fixture(scope="module")
def run(features, models):
    return finished_run(features, models["llama"])


@pytest.fixture(scope="module")
def queue(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("queue") / "new" / "queue.csv"
    choose.main(["--run", str(run), "--queries", "3", "--pins", "5", "--out", str(path)])
    return path


@pytest.fixture
def labels(queue, tmp_path):
    return Labels(queue, tmp_path, raters=2)


# ------------------------------------------------------------------------------------------------------------
# Which queries


def test_the_queue(run, queue):
    with open(queue, newline="") as file:
        rows = [*csv.DictReader(file)]
    queries = {row["query_id"] for row in rows}
    assert len(queries) == 3 and len(rows) == 15 == len({(row["query_id"], row["pin_id"]) for row in rows})
    labelled = pq.read_table(run / "features" / "labelled.parquet")["query_index"].unique()
    ids = pq.read_table(run / "features" / "queries.parquet")["query_id"].take(labelled).to_pylist()
    assert not queries & {*ids}
    assert sum(float(row["weight"]) for row in rows) / 5 == pytest.approx(
        1, abs=0.35
    )  # a stratum may get none


def test_the_draw_follows_the_traffic():
    queries = pd.DataFrame({"stratum": ["a"] * 50 + ["b"] * 50, "traffic": [3.0] * 50 + [1.0] * 50})
    is_open = queries.index % 10 > 0
    drawn = choose.draw(queries[is_open], 40, np.random.default_rng(0))
    assert len({*drawn.index}) == 40 and is_open[drawn.index].all()
    assert (drawn["stratum"] == "a").sum() == 30 and drawn["weight"].sum() == pytest.approx(1)
    few = choose.draw(queries[is_open][:4], 40, np.random.default_rng(0))
    assert len(few) == 4  # no more are shown


def test_a_query_is_drawn_by_its_traffic():
    rng, first = np.random.default_rng(0), []
    queries = pd.DataFrame({"stratum": ["a"] * 3, "traffic": [1.0, 2.0, 5.0]})
    for _ in range(300):
        first += choose.draw(queries, 1, rng).index.tolist()
    assert np.bincount(first) / 300 == pytest.approx([1 / 8, 2 / 8, 5 / 8], abs=0.1)


def test_strata(run, tmp_path):
    assert sorted(choose.popularity(pd.Series([1.0, 1.0, 1.0]))) == ["head", "tail", "torso"]
    flags = ["--run", str(run), "--out", str(tmp_path / "queue.csv"), "--strata", "language"]
    choose.main([*flags, "popularity", "--queries", "9", "--pins", "1"])
    assert pd.read_csv(tmp_path / "queue.csv")["stratum"].str.fullmatch("[a-z]{2} / (head|torso|tail)").all()
    assert "no column" in stop_line(choose.main, [*flags, "shop"])


def test_a_queue_has_no_formulas(tmp_path):
    cells = {
        "query_id": ["q1", "q2"],
        "query": ["=1+1", "chair"],
        "stratum": ["-x", "en"],
        "weight": [0.5, 0.5],
    }
    drawn = pd.DataFrame({**cells, "pin_id": [["p1", "p2"], ["p1"]]}, index=[7, 3])
    choose.write_queue(drawn, tmp_path / "queue.csv")
    rows = pd.read_csv(tmp_path / "queue.csv").to_numpy().tolist()
    one = ["'=1+1", "'-x", 0.5]
    assert rows == [["q1", "p1", *one], ["q1", "p2", *one], ["q2", "p1", "chair", "en", 0.5]]


# ------------------------------------------------------------------------------------------------------------
# Labels


def test_labels_survive(queue, labels, tmp_path):
    first, done, left = labels.next("ann", [])
    assert done == 0 and left == 15
    labels.add("ann", first, 4, "=a\nnote\0, with comma")
    again = Labels(queue, tmp_path, raters=2)  # as after a kill
    second, done, left = again.next("ann", [])
    assert second != first and (done, left) == (1, 14)
    with open(tmp_path / "labels_ann.csv", newline="") as file:
        [row] = csv.DictReader(file)
    assert [*row.values()] == [*first, "4", "ann", "'=a note , with comma"]
    assert "before" in stop_line(again.add, "ann", first, 5, "")
    assert again.undo("ann") == first and again.undo("ann") is None
    (tmp_path / "labels_bob.csv").write_text(f"query_id,pin_id,label\n{','.join(first)},\n")
    assert Labels(queue, tmp_path, raters=2).next("bob", [])[:2] == (first, 0)


def test_labels_that_a_spreadsheet_has_saved(queue, labels, tmp_path):
    """The next label writes the file anew: what is not read would be lost."""
    first, second, *_ = labels.pairs
    text = f"\ufeffQuery_id;pin_id;label;rater;note\n{';'.join(first)};4;ann;so so\n{';'.join(second)};;;\n"
    (tmp_path / "labels_ann.csv").write_text(text, encoding="utf-8")
    again = Labels(queue, tmp_path, raters=2)
    again.add("ann", second, 2, "")
    assert Labels(queue, tmp_path, raters=2).said == {"ann": {first: (4, "so so"), second: (2, None)}}


@pytest.mark.parametrize("label", ["good", "9", "4.5", "４", "caf\xe9"])
def test_a_label_that_is_none_is_one_line(queue, labels, tmp_path, label):
    text = f"query_id,pin_id,label\n{','.join(labels.pairs[0])},{label}\n"
    (tmp_path / "labels_ann.csv").write_bytes(text.encode("latin1" if "caf" in label else "utf-8"))
    assert "labels_ann.csv" in stop_line(Labels, queue, tmp_path, 2)
    (tmp_path / "labels_ann.csv").write_text(f"query_id,pin_id,label\n{labels.pairs[0][0]}")  # cut
    assert "line 2" in stop_line(Labels, queue, tmp_path, 2)


def test_as_many_people_as_asked(labels):
    first, *_ = labels.next("ann", [])
    for name, level in (("ann", 5), ("bob", 4)):
        assert labels.next(name, [])[0] == first
        labels.add(name, first, level, "")
    assert labels.next("cid", [])[0] != first
    second, *_ = labels.next("ann", [])
    assert labels.next("ann", [second])[0] not in (first, second)
    for name in ("ann", "bob"):
        labels.add(name, second, 1, "")
    found = labels.agreement()
    assert found["pairs"] == 2 and found["exact"] == 0.5
    assert found["kappa"] == pytest.approx(
        1 - 0.5 / ((1 + 16 + 9 + 0) / 4)
    )  # Cohen, 1968: disagreement, chance


@pytest.mark.parametrize("name", ["../up", "", "a/b", "x" * 41])
def test_a_name_is_no_path(labels, name):
    with pytest.raises(Stop):
        labels.add(name, labels.pairs[0], 3, "")


# ------------------------------------------------------------------------------------------------------------
# Over HTTP


@pytest.fixture(scope="module")
def client(run, queue, tmp_path_factory):
    page = Page(run, queue, tmp_path_factory.mktemp("labels"))
    return TestClient(application(page), base_url="http://127.0.0.1")


def test_search(client, run):
    found = client.get("/search", params={"query": "red chair", "teacher": True, "top": 3}).json()
    assert [*found] == ["BM25", "student", "teacher"] and all(len(pins) == 3 for pins in found.values())
    bm25 = [pin["why"]["bm25"] for pin in found["BM25"]]
    assert bm25 == sorted(bm25, reverse=True)
    for pins in (found["student"], found["teacher"]):
        level = [np.dot(pin["p"], range(1, 6)) for pin in pins]
        assert level == sorted(level, reverse=True) and sum(pins[0]["p"]) == pytest.approx(1, abs=1e-3)


def test_the_teacher_is_03s(client, run):
    """The page's teacher, LoRA beside the model, on pairs that 03 has labelled."""
    page = Page(run)
    rows = pq.read_table(run / "features" / "labelled.parquet").slice(0, 3)
    text = pq.read_table(run / "features" / "queries.parquet")["query"][
        rows["query_index"][0].as_py()
    ].as_py()
    p = page.teacher(text, rows["pin_index"].to_numpy()[:1])
    table = pq.read_table(run / "labels" / "labelled.parquet").slice(0, 1).to_pylist()[0]
    assert np.abs(p[0] - [table[f"p{level}"] for level in range(1, 6)]).max() < 0.05


def test_peoples_labels_are_shown_however_the_query_is_written(client, run):
    [row] = pq.read_table(run / "features" / "labelled.parquet").slice(0, 1).to_pylist()
    text = pq.read_table(run / "features" / "queries.parquet")["query"][row["query_index"]].as_py()
    human = []
    for asked in (text, f" {text.upper()}"):
        found = client.get("/search", params={"query": asked, "top": 50}).json()
        human.append({pin["pin_id"]: pin["human"] for pins in found.values() for pin in pins})
    assert human[0] == human[1] and any(human[0].values())


@pytest.mark.parametrize(
    "path", ["/search", "/search?query=a&top=99", "/image/..%2F..%2Fetc", "/image/nobody"]
)
def test_what_is_refused(client, path):
    assert client.get(path).status_code in (404, 422)


def test_pairs_of_another_run_are_left_out(run, queue, tmp_path, capsys):
    """Nobody gets stuck at one."""
    name = tmp_path / "queue.csv"
    first, *rest = queue.read_text(encoding="utf-8").splitlines(keepends=True)
    name.write_text("".join([first, "nobody,p1,x,x,1\n", rest[0], f"{rest[0].split(',')[0]},gone,x,x,1\n"]))
    page = Page(run, name)
    assert "2 pairs of a query or a pin that the run does not have" in capsys.readouterr().out
    assert page.pair("ann", [])["pin_id"] == rest[0].split(",")[1] and page.pair("ann", [])["left"] == 1


@pytest.mark.parametrize("wrong", ["PORT=x", "PORT=65536", "RATERS=0", "RATERS=two", "RATERS=²"])
def test_a_number_of_the_environment_that_is_none_is_one_line(monkeypatch, wrong):
    monkeypatch.setenv("RUN", "nowhere")
    monkeypatch.setenv(*wrong.split("="))
    assert wrong in stop_line(serving_page.main)


def test_only_this_machine(client):
    assert client.get("/about", headers={"host": "evil.example"}).status_code == 400


@pytest.mark.parametrize("host, name", [("0.0.0.0", "10.0.0.7"), ("::", "here"), ("Here.org", "here.org")])
def test_other_machines_where_host_says_so(monkeypatch, host, name):
    monkeypatch.setenv("HOST", host)
    page = SimpleNamespace(columns={}, labels=SimpleNamespace(pairs=[]))
    asked = TestClient(application(page), base_url=f"http://{name}:8000")
    assert asked.get("/about").status_code == 200


def test_label_over_http(client):
    asked = {"name": "dora"}
    pair = client.post("/next", json=asked).json()
    said = {**asked, "query_id": pair["query_id"], "pin_id": pair["pin_id"], "level": 5}
    assert client.post("/label", json=said).status_code == 200
    assert client.post("/label", json=said | {"level": 6}).status_code == 422
    assert client.post("/next", json=asked).json()["done"] == 1
    client.post("/undo", json=asked)
    assert client.post("/next", json=asked).json()["pin_id"] == pair["pin_id"]
    assert client.post("/next", json={"name": "../x"}).status_code == 422


# ------------------------------------------------------------------------------------------------------------
# In a browser


@pytest.fixture
def server(run, queue, tmp_path):
    """Address and process of the page on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {"RUN": str(run), "QUEUE": str(queue), "LABELS": str(tmp_path), "PORT": str(port)}
    return port, told


def start(port, told):
    process = subprocess.Popen([sys.executable, "-m", "serving.page"], cwd=ROOT, env={**os.environ, **told})
    while process.poll() is None:
        with socket.socket() as one:
            if one.connect_ex(("127.0.0.1", port)) == 0:
                return process
        time.sleep(0.1)
    raise AssertionError("the page does not answer")


@pytest.mark.skipif(
    not (BROWSER and which("chromedriver")), reason="no Chromium: apt-get install chromium-driver"
)
def test_in_a_browser(server, tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver", reason="pip install selenium")
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    port, told = server
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1200,900"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(which("chromedriver")))
    process, until = start(port, told), WebDriverWait(driver, 60).until
    try:
        driver.get(f"http://127.0.0.1:{port}/?query=roter+stuhl")  # a link that somebody sent
        until(lambda d: len(d.find_elements(By.CSS_SELECTOR, "#columns section")) == 2)
        assert driver.find_element(By.NAME, "query").get_attribute("value") == "roter stuhl"
        driver.find_element(By.ID, "to-label").click()
        driver.find_element(By.NAME, "name").send_keys("eve\n")
        until(lambda d: d.find_element(By.ID, "work").is_displayed())
        body = driver.find_element(By.TAG_NAME, "body")
        for done in range(1, 11):
            if done == 6:  # killed halfway, and started again
                process.kill()
                process.wait()
                process = start(port, told)
            body.send_keys(str(1 + done % 5))
            until(lambda d, done=done: f"{done} labelled" in d.find_element(By.ID, "progress").text)
        rows = (tmp_path / "labels_eve.csv").read_text().splitlines()
        assert len(rows) == 11 and [row.split(",")[2] for row in rows[1:4]] == ["2", "3", "4"]
    finally:
        driver.quit()
        process.kill()
