"""The benchmark of serving runs at a tiny size, and what it compares agrees."""

import numpy as np
import pytest
import serve
from served_run import served_run

from lib.stages.files import read_json
from serving.ranker import Query


@pytest.fixture(scope="module")
def run(features, models):
    return served_run(features, models["bert"])


def test_all_systems_do_the_same_work(run):
    students, teacher = serve.Students(run), serve.TeacherOnOneCore(run)
    rows = np.array([4, 9, 2, 30, 9])
    feed = students.features("red chair", rows)
    by_onnx = students.onnx_order(feed)
    by_torch = students.torch_order(serve.tensors(feed)).numpy()
    ids = [students.ranker.ids[row] for row in rows]
    level = students.ranker.score([(Query("red chair"), pin) for pin in ids]).expected_level
    for order in (by_onnx, by_torch, students.any_pairs_order(serve.repeated(feed, len(rows)))):
        assert sorted(order) == [0, 1, 2, 3, 4]
        assert (np.diff(level[order]) <= 1e-5).all()
    order = teacher.order("red chair", rows)
    assert sorted(order) == [0, 1, 2, 3, 4] and abs(list(order).index(1) - list(order).index(4)) == 1


def test_benchmark(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(serve, "LEAST", 5)
    monkeypatch.setattr(serve, "one_core", lambda: None)  # the other tests keep their cores
    files = ["--json", str(tmp_path / "serve.json"), "--markdown", str(tmp_path / "serve.md")]
    serve.main(["--run", str(run), "--candidates", "3", "20", "--seconds", "0", *files])
    found = read_json(tmp_path / "serve.json")
    assert found["pins"] == 100 and {row["candidates"] for row in found["results"]} == {3, 20}
    assert len(found["results"]) == 2 * 7
    for row in found["results"]:
        assert 0 < row["p50_ms"] <= row["p99_ms"] and row["calls"] >= 2
    table = (tmp_path / "serve.md").read_text()
    assert table in capsys.readouterr().out and table.count("\n| student, onnxruntime |") == 4


def test_wrong_flags(capsys):
    for wrong in (["--candidates", "0"], ["--seconds", "-1"], ["--candidate", "3"]):
        with pytest.raises(SystemExit) as ended:
            serve.main(wrong)
        assert ended.value.code == 2
    capsys.readouterr()
