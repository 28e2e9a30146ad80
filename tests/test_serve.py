"""The benchmarks of serving run at a tiny size, and what they compare agrees."""

import http.client
import re
import socket
import threading

import numpy as np
import pytest
import serve
import torch
import uvicorn
from helpers import stop_line
from served_run import served_run

from serving import service
from serving.ranker import Query


@pytest.fixture(scope="module")
def run(features, models):
    return served_run(features, models["bert"])


@pytest.fixture(autouse=True)
def all_cores(monkeypatch):
    """The other tests keep their cores."""
    for module, name in ((serve.os, "sched_setaffinity"), (torch, "set_num_threads")):
        monkeypatch.setattr(module, name, lambda *arguments: None)


def test_all_systems_do_the_same_work(run):
    systems = serve.Systems(run)
    rows = np.array([4, 9, 2, 30, 9])
    ids = [systems.ranker.ids[row] for row in rows]
    expected = systems.ranker.score([(Query("red chair"), pin) for pin in ids]).expected_level
    calls = systems.calls(["red chair"], rows)
    for system, (call, given) in calls.items():
        found = call(given[0])
        if system == "teacher":
            assert len(found) == 5 and found[1] == pytest.approx(found[4])  # the same pin
        else:
            np.testing.assert_allclose(found, expected, atol=1e-4)
    assert len(calls) == 5


def rows_of(out):
    """Cells of a table's rows."""
    return [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("| ")][2:]


def test_benchmark(run, capsys, monkeypatch):
    monkeypatch.setattr(serve, "LEAST", 5)
    serve.main(["--run", str(run), "--candidates", "3", "20", "--seconds", "0"])
    out = capsys.readouterr().out
    rows = rows_of(out)
    assert len(rows) == 2 * 5 and {row[1] for row in rows} == {"3", "20"}
    for system, _, p50, p99, calls in rows:
        assert 0 < float(p50) <= float(p99) and calls == ("1" if system == "teacher" else "5")
    assert re.search(r"start: [1-9][\d.]* s, [1-9]\d+ MB", out)


def test_wrong_flags(capsys):
    for wrong in (["--candidates", "0"], ["--seconds", "-1"], ["--candidate", "3"]):
        with pytest.raises(SystemExit) as ended:
            serve.main(wrong)
        assert ended.value.code == 2
    capsys.readouterr()


def test_over_http(run, capsys):
    """Clients of a service in this process; a service that refuses is named."""
    app = service.from_environment({"RUN": str(run)})
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()  # who asks early waits
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        argv = ["--candidates", "20", "--clients", "2", "--seconds", "0"]
        serve.main(["--run", str(run), "--url", url, *argv])
        answers = [row[-1] for row in rows_of(capsys.readouterr().out)]
        assert answers[:3] == ["1", "1", "2"] and len(answers) == 4
        settings = serve.Settings(run, url=url, seconds=0)
        assert "answers 422" in stop_line(serve.busy, settings, ["red"], ["no such pin"], 1)
        assert serve.ask(http.client.HTTPConnection(url.removeprefix("http://")), "x " * 5_000_000, []) == 413
        server.should_exit = True
        thread.join()
