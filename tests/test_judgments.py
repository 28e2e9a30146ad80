"""Judgment lists and result lists: how they are read, and the way into a dataset."""

import csv
import hashlib

import judgments
import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers import small_dataset, stage, stop_line, write_dataset, write_table

from lib.tables.raw import RawTables
from lib.tables.result_lists import read_list
from lib.tables.splits import query_key

VALUES = ("rating", "score", "rank")


def query_id_of(text):
    return hashlib.md5(query_key(text).encode()).hexdigest()[:16]


def written(folder, name, text):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


QUIRKS = {  # what is in files, and what it says: query id, query, pin, value
    "list.qrels": (
        "\ufeff# judged in May\n\nred-chair\t0\tpin one\t2.0\nred-chair Q0 p2 -1\r\n7 0 p2 3e0\n7 0 p2 3\n"
        "# more\nred-chair 0 #p3 +1\n",
        [
            ("red-chair", None, "pin one", 2),
            ("red-chair", None, "p2", -1),
            ("7", None, "p2", 3),
            ("7", None, "p2", 3),
            ("red-chair", None, "#p3", 1),
        ],
    ),
    "list.run": (
        "\ufeff7 Q0 p2 1 1e-3 mine\n7\tQ0\tpin one\t9\t12.5\tmine\n",
        [("7", None, "p2", 0.001), ("7", None, "pin one", 12.5)],
    ),
    "list.csv": (
        '\ufeffRating , Query,DOCID,notes\r\n3,"red ""chair"", oak",pin one,"a\nb"\r\n,Red chair,p2,\r\n',
        [(None, 'red "chair", oak', "pin one", 3), (None, "Red chair", "p2", None)],
    ),
    "list.jsonl": ('{"query_id": 7, "pin_id": "p1", "rank": 2}\n', [("7", None, "p1", -2)]),
    "none.qrels": ("# nothing\n", []),
}


@pytest.mark.parametrize("name", QUIRKS)
def test_quirks_are_read(name, tmp_path):
    text, expected = QUIRKS[name]
    found = read_list(written(tmp_path, name, text), VALUES).to_pylist()
    assert [tuple(row.values()) for row in found] == expected


WRONG = {  # what is in the file, what the line says
    "few.qrels": ("q1 0 p1 1\nq1 0 pin one 1\n", "line 2"),
    "latin.qrels": ("q1 0 caf\u00e9 1\n".encode("latin-1"), "UTF-8"),
    "few.run": ("q1 Q0 p1 1 0.5\n", "TAG"),
    "list.csv": ("query,doc,rating\na,b,1\n", "pin_id"),
    "none.csv": ("", "empty"),
    "other.csv": ("pin_id,rating\na,1\n", "query_id or query"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_hold_is_one_line(name, tmp_path):
    text, said = WRONG[name]
    line = stop_line(read_list, written(tmp_path, name, text), VALUES)
    assert said in line and name in line


# ------------------------------------------------------------------------------------------------------------


def dataset(folder):
    return write_dataset(folder, {"pins": small_dataset()["pins"]})


def read(folder, name):
    return pq.read_table(folder / name).to_pylist()


def test_into_a_dataset(tmp_path, capsys):
    """Ratings become labels under the dataset's own query ids; what it lacks is listed."""
    data = dataset(tmp_path / "data")
    write_table(data / "queries", "old", {"query_id": ["q2"], "query": ["Red Chair"], "language": ["en"]})
    ratings = "query,docid,rating\nred chair,007,100\n椅子,p2,0\nred chair,gone,1\nRED CHAIR ,007,100\n"
    source = written(tmp_path, "list.csv", ratings + "red chair,p3,\n ,p3,1\n")
    levels = ["--levels", "100=5,10=4,1=3,0=1", "--language", "ja", "--split", "eval"]
    judgments.main([str(source), str(data), *levels])
    assert read(data, "labels/list.parquet") == [
        {"query_id": "q2", "pin_id": "007", "label": 5, "split": "eval"},
        {"query_id": query_id_of("椅子"), "pin_id": "p2", "label": 1, "split": "eval"},
    ]
    assert read(data, "queries/list.parquet") == [
        {"query_id": query_id_of("椅子"), "query": "椅子", "language": "ja"}
    ]
    with open(data / "skipped_judgments.csv", newline="") as file:
        assert list(csv.reader(file))[1:] == [
            ["red chair", "gone", "1", "no such pin"],
            ["red chair", "p3", "", "no rating"],
            ["", "p3", "1", "no such query"],
        ]
    assert "2 labels, 1 new queries; 3 judgments skipped" in capsys.readouterr().out

    shown = f"q2 Q0 p3 1 7.5 x\nnobody Q0 p3 1 7 x\n{query_id_of('椅子')} Q0 p2 1 1 x\n"
    judgments.main([str(written(tmp_path, "list.run", shown)), str(data)])
    assert [row["pin_id"] for row in read(data, "impressions/list.parquet")] == ["p3", "p2"]
    RawTables(data).check()  # what stage 01 asks for


def test_what_does_not_fit_leaves_the_dataset_as_it_was(tmp_path):
    data = dataset(tmp_path / "data")

    def refused(text, *more, name="list.csv"):
        line = stop_line(judgments.main, [str(written(tmp_path, name, text)), str(data), *more])
        assert not [path for path in data.rglob("*.parquet") if path.name != "pins.parquet"]
        return line

    good = "query,pin_id,rating\nred chair,007,5\n"
    assert "--levels" in refused(good.replace(",5", ",0"))
    assert "says nothing of 5" in refused(good, "--levels", "1=5")
    assert "numbers" in refused(good, "--levels", "E=5")
    assert "different labels" in refused(good + "Red Chair,007,4\n")
    assert "none of 1 rows" in refused("1 0 007 5\n", name="list.qrels")
    assert "none of 1 rows" in refused(good.replace("007", "gone"))
    assert "none of 0 rows" in refused("# nothing\n", name="list.qrels")
    source = written(tmp_path, "list.csv", good)
    judgments.main([str(source), str(data)])
    assert "already" in stop_line(judgments.main, [str(source), str(data)])
    (data / "pins.parquet").unlink()
    assert "pins" in stop_line(judgments.main, [str(source), str(data)])


def test_trec_eval_finds_the_same_ndcg_and_precision():
    """trec_eval's code against the metric of stage 05; ESCI's gains a hundredfold."""
    import pytrec_eval

    rng, ndcg = np.random.default_rng(0), stage("05").ndcg
    labels, scores = rng.integers(1, 6, (100, 30)), rng.random((100, 30))
    gains = {1: 0, 2: 1, 3: 3, 4: 7, 5: 15}  # 2^(level - 1) - 1, the gain of nDCG@20
    esci = {1: 0, 2: 2, 3: 1, 4: 10, 5: 100}
    judged = [{"q": {str(pin): gain[int(level)] for pin, level in enumerate(row)}} for gain in (gains, esci)
              for row in labels]  # fmt: skip
    for row in range(len(labels)):
        results = {"q": {str(pin): float(score) for pin, score in enumerate(scores[row])}}
        found = pytrec_eval.RelevanceEvaluator(judged[row], {"ndcg_cut_20", "P_5"}, relevance_level=7)
        found = found.evaluate(results)["q"]
        assert found["ndcg_cut_20"] == pytest.approx(ndcg(labels[row], scores[row]))
        best = labels[row][np.argsort(-scores[row])][:5]
        assert found["P_5"] == pytest.approx((best >= 4).sum() / 5)
        whole = pytrec_eval.RelevanceEvaluator(judged[100 + row], {"ndcg"}).evaluate(results)["q"]["ndcg"]
        own = ndcg(labels[row], scores[row], None, np.array([0, 0.02, 0.01, 0.1, 1]))
        assert whole == pytest.approx(own)
