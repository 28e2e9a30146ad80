"""Judgment lists and result lists: every format written and read again, its quirks, and the way into a
dataset and out of a run."""

import csv
import json
from itertools import groupby
from operator import attrgetter

import judgments
import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers import mark_finished, small_dataset, stage, stop_line, synthetic, write_dataset, write_table
from hypothesis import given
from hypothesis import strategies as st

from lib.stages.files import read_json
from lib.tables.judgment_files import FORMATS, Judgment, query_id_of, read_judgments
from lib.tables.raw import RawTables

CHAIR, CHAIRS = query_id_of("red chair"), query_id_of("赤い 椅子")
LISTED = [
    Judgment("q1", "red chair", "p1", 4.0, "Chair, red"),
    Judgment("q1", "red chair", "p2", 0.0, 'A "stool"'),
    Judgment("#2", "赤い 椅子", "p2", 2.0),
    Judgment("#2", "赤い 椅子", "é/1", 1.0, "椅子"),
]


def as_read(judgment, name):
    """What a format keeps of a judgment."""
    query_id, query, pin, rating, title = judgment
    if name in ("qrels", "run"):
        return Judgment(query_id, None, pin, rating)
    if name == "ranklib":
        return Judgment(query_id, query, pin, rating, " ".join(title.split()))
    return Judgment(query_id_of(query), query, pin, rating)


def written(path, name, text):
    path = path / f"list{FORMATS[name][0]}"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("name", FORMATS)
def test_written_and_read_again(name, tmp_path):
    rows = [row._replace(query_id=row.query_id.strip("#")) for row in LISTED]
    path, again = tmp_path / f"a{FORMATS[name][0]}", tmp_path / f"b{FORMATS[name][0]}"
    judgments.write_judgments(path, rows, name)
    found = read_judgments(path)
    assert sorted(found) == sorted(as_read(row, name) for row in rows)
    judgments.write_judgments(again, found, name)
    assert again.read_bytes() == path.read_bytes()


word = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=8)
spaced = st.lists(word, min_size=1, max_size=3).map(" ".join)


@given(
    st.dictionaries(st.tuples(spaced, spaced), st.integers(0, 4) | st.floats(-9, 9), min_size=1, max_size=6)
)
def test_any_text_is_read_as_it_was_or_refused(tmp_path_factory, pairs):
    """Whatever ids and texts hold: the file says the same again, or it is not written."""
    rows = {}
    for (query, pin), rating in pairs.items():
        rows[query_id_of(query), pin] = Judgment(query_id_of(query), query, pin, float(rating))
    texts = {row.query_id: row.query for row in rows.values()}
    rows = [rows[key]._replace(query=texts[key[0]]) for key in sorted(rows)]
    for name, (suffix, _, write) in FORMATS.items():
        path = tmp_path_factory.getbasetemp() / f"any{suffix}"
        try:
            with open(path, "w", encoding="utf-8", newline="") as file:
                write(file, rows)
        except ValueError:
            assert name in ("qrels", "run")  # whose ids have no spaces
        else:
            assert sorted(read_judgments(path)) == sorted(as_read(row, name) for row in rows)


# ------------------------------------------------------------------------------------------------------------

QUIRKS = {  # what is in files, and the judgments that it says: query id, query, pin, rating, title
    "qrels": (
        "\ufeff# judged in May\n\nred-chair\t0\tpin one\t2.0\nred-chair Q0 p2 -1\r\n7 0 p2 3e0\n"
        "7 0 p2 3\n# more\nred-chair 0 #p3 +1\n",
        [
            ("red-chair", None, "pin one", 2),
            ("red-chair", None, "p2", -1),
            ("red-chair", None, "#p3", 1),
            ("7", None, "p2", 3),
        ],
    ),
    "run": (
        "\ufeff7 Q0 p2 1 1e-3 mine\n7\tQ0\tpin one\t9\t12.5\tmine\n",
        [("7", None, "p2", 0.001), ("7", None, "pin one", 12.5)],
    ),
    "ranklib": (
        "\ufeff# Add your keywords\n# qid:1: red chair: wood\n#qid:x:y:  赤い 椅子 \n# https://example.org\n#\n"
        "4\tqid:1 #\t7555\tRambo # II\n3.5 qid:1 1:9.8 2:-1e3 # pin two\n0 qid:x:y # pin two\tTwo\n"
        "1 qid:none #p1\n4 qid:1 # 7555\n",
        [
            ("1", "red chair: wood", "7555", 4, "Rambo # II"),
            ("1", "red chair: wood", "pin", 3.5, "two"),
            ("x:y", "赤い 椅子", "pin two", 0, "Two"),
            ("none", None, "p1", 1),
        ],
    ),
    "quepid": (
        '\ufeffRating , Query,DOCID,notes\r\n3,"red ""chair"", oak",pin one,"a\nb"\r\n,Red chair,p2,\r\n'
        "1.0,Red chair ,p3,\r\n2,RED CHAIR,p4,\r\n1, red chair,p3,\r\n",
        [
            (query_id_of('red "chair", oak'), 'red "chair", oak', "pin one", 3),
            (CHAIR, "Red chair", "p3", 1),
            (CHAIR, "Red chair", "p4", 2),
        ],
    ),
    "workbench": (
        "\ufeff"
        + json.dumps(
            {
                "judgmentRatings": [
                    {
                        "query": "red chair",
                        "ratings": [
                            {"docId": "pin one", "rating": "100.000"},
                            {"docId": 7, "rating": 10},
                            {"docId": "p3", "rating": None},
                        ],
                    },
                    {"query": "赤い 椅子", "ratings": [{"docId": "p1", "rating": 0.5}]},
                    {"query": "red chair", "ratings": [{"docId": "pin one", "rating": 100}]},
                ]
            }
        ),
        [
            (CHAIR, "red chair", "pin one", 100),
            (CHAIR, "red chair", "7", 10),
            (CHAIRS, "赤い 椅子", "p1", 0.5),
        ],
    ),
}


@pytest.mark.parametrize("name", QUIRKS)
def test_quirks_are_read(name, tmp_path, capsys):
    text, expected = QUIRKS[name]
    found = read_judgments(written(tmp_path, name, text))
    assert found == [Judgment(*row) for row in expected]
    printed = capsys.readouterr().out
    assert f"{len(expected)} judgments" in printed
    assert ("1 without a rating" in printed) == (name in ("quepid", "workbench"))


def test_a_header_stands_anywhere_and_an_empty_rating_is_none(tmp_path, capsys):
    found = read_judgments(written(tmp_path, "ranklib", "4 qid:1 # p1\n# qid:1: red chair\n"))
    assert found == [Judgment("1", "red chair", "p1", 4)]
    found = read_judgments(written(tmp_path, "qrels", "q1\t0\tp1\t \nq1\t0\tp2\t3\n"))
    assert found == [Judgment("q1", None, "p2", 3)]
    assert "1 without a rating" in capsys.readouterr().out
    line = stop_line(read_judgments, written(tmp_path, "quepid", "query,rating\nred,1\n"))
    assert "no 'docid'" in line


def test_the_answer_to_a_search_for_a_list_is_read(tmp_path):
    entry = {"query": "red chair", "ratings": [{"docId": "p1", "rating": "3.0"}]}
    answer = {"hits": {"total": 1, "hits": [{"_id": "x", "_source": {"judgmentRatings": [entry]}}]}}
    path = written(tmp_path, "workbench", json.dumps(answer))
    assert read_judgments(path) == [Judgment(CHAIR, "red chair", "p1", 3)]


RATED = '{"judgmentRatings": [{"query": "a", "ratings": [{"docId": "%s", "rating": %s}]}]}'
WRONG = [  # format, what is in the file, what the line says
    ("qrels", "q1 0 p1 1\nq1 0 pin one 1\n", "line 2"),
    ("qrels", "q1 0 p1 high\n", "high"),
    ("qrels", "q1 0 p1 nan\n", "no rating"),
    ("qrels", "q1 0 p1 1\nq1 0 p1 2\n", "two ratings"),
    ("qrels", "q1\t0\t \t2\n", "no id"),
    ("qrels", "# nothing\n", "no judgment"),
    ("qrels", "q1 0 caf\u00e9 1\n".encode("latin-1"), "utf-8"),
    ("run", "q1 Q0 p1 1 0.5\n", "tag"),
    ("run", "q1 Q0 p1 1 0.5 a\nq1 Q0 p1 2 0.4 a\n", "two ratings"),
    ("ranklib", "4 qid:1 1:2\n", "line 1"),
    ("ranklib", "# qid:1: a\n# qid:1: b\n4 qid:1 # p1\n", "two texts"),
    ("quepid", "query,doc,rating\na,b,1\n", "no 'docid'"),
    ("quepid", "query,docid,rating\na,,1\n", "no id"),
    ("quepid", "query,docid,rating\nred chair,p1,1\nRed Chair,p1,3\n", "two ratings"),
    ("quepid", "", "no judgment"),
    ("workbench", "{", "workbench"),
    ("workbench", "[]", "workbench"),
    ("workbench", "[" * 100_000, "workbench"),
    ("workbench", '{"name": "x"}', "judgmentRatings"),
    ("workbench", RATED % ("\\ud800", "1"), "utf-8"),  # half a character
    ("workbench", RATED % ("p", "1" + 400 * "0"), "too large"),
    ("workbench", '{"judgmentRatings": [{"query": "a", "ratings": [{"docId": null, "rating": 1}]}]}', "None"),
    (
        "workbench",
        '{"judgmentRatings": [{"query": " ", "ratings": [{"docId": "p", "rating": 1}]}]}',
        "no query",
    ),
]


@pytest.mark.parametrize("name, text, said", WRONG)
def test_what_does_not_hold_is_one_line(name, text, said, tmp_path):
    line = stop_line(read_judgments, written(tmp_path, name, text))
    assert said in line and "list" in line


UNWRITABLE = [
    ("qrels", Judgment("q 1", None, "p1", 1.0)),
    ("qrels", Judgment("q1", None, "p 1", 1.0)),
    ("qrels", Judgment("#q1", None, "p1", 1.0)),
    ("qrels", Judgment("q1", None, "p1", 1.5)),
    ("run", Judgment("q1", None, "p\n1", 1.5)),
    ("ranklib", Judgment("q1", "red\nchair", "p1", 1.0)),
    ("ranklib", Judgment("q1", "red", "p\t1", 1.0)),
    ("quepid", Judgment("q1", None, "p1", 1.0)),
    ("workbench", Judgment("q1", None, "p1", 1.0)),
]


@pytest.mark.parametrize("name, judgment", UNWRITABLE)
def test_what_a_format_cannot_hold_is_one_line(name, judgment, tmp_path):
    line = stop_line(judgments.write_judgments, tmp_path / "x", [judgment], name)
    assert "x:" in line and not (tmp_path / "x").exists()


# ------------------------------------------------------------------------------------------------------------


def dataset(folder):
    tables = small_dataset()
    return write_dataset(folder, {name: tables[name] for name in ("pins", "impressions")})


def read(folder, name):
    return pq.read_table(folder / name).to_pylist()


def test_into_a_dataset(tmp_path, capsys):
    """Ratings become labels under the dataset's own query ids; what it lacks is listed."""
    data = dataset(tmp_path / "data")
    write_table(data / "queries", "old", {"query_id": ["q2"], "query": ["Red Chair"], "language": ["en"]})
    (data / "impressions.parquet").unlink()
    ratings = "query,docid,rating\nred chair,007,100\n椅子,p2,0\nred chair,gone,1\n"
    source = written(tmp_path, "quepid", ratings)
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
        assert list(csv.reader(file))[1:] == [["Red Chair", "gone", "3", "no such pin"]]
    assert "2 labels, 1 new queries; 1 judgments skipped" in capsys.readouterr().out

    listed = written(
        tmp_path, "run", f"q2 Q0 p3 1 7.5 x\nnobody Q0 p3 1 7 x\n{query_id_of('椅子')} Q0 p2 1 1 x\n"
    )
    judgments.main([str(listed), str(data)])
    assert len(read(data, "impressions/list.parquet")) == 2
    RawTables(data).check()  # what stage 01 asks for

    out = tmp_path / "again.csv"
    judgments.main([str(data), str(out), *levels[:2]])
    assert sorted(out.read_text().splitlines()[1:]) == ["Red Chair,007,100", "椅子,p2,0"]


def test_what_does_not_fit_leaves_the_dataset_as_it_was(tmp_path):
    data = dataset(tmp_path / "data")
    (data / "impressions.parquet").unlink()

    def refused(text, *more, name="ranklib"):
        line = stop_line(judgments.main, [str(written(tmp_path, name, text)), str(data), *more])
        assert not [path for path in data.rglob("*.parquet") if path.name != "pins.parquet"]
        return line

    good = "# qid:1: red chair\n5 qid:1 # 007\n"
    assert "--levels" in refused(good.replace("5 ", "0 "))
    assert "says nothing of 5" in refused(good, "--levels", "1=5")
    assert "numbers" in refused(good, "--levels", "E=5")
    assert "no query" in refused("1 0 007 5\n", name="qrels")
    assert "no pin" in refused(good.replace("007", "gone"))
    judgments.main([str(written(tmp_path, "ranklib", good)), str(data)])
    assert "already" in stop_line(judgments.main, [str(tmp_path / "list.txt"), str(data)])
    other = tmp_path / "other.txt"
    other.write_text("# qid:1: blue chair\n5 qid:1 # 007\n")
    assert "'red chair', not 'blue chair'" in stop_line(judgments.main, [str(other), str(data)])
    (data / "pins.parquet").unlink()
    assert "pins" in stop_line(judgments.main, [str(other), str(data)])


def test_from_file_to_file(tmp_path):
    source = written(tmp_path, "ranklib", "# qid:1: red chair\n5 qid:1 # 007\n")
    judgments.main([str(source), str(tmp_path / "x.qrels")])
    assert (tmp_path / "x.qrels").read_text() == "1 0 007 5\n"
    data = dataset(tmp_path / "data")
    write_table(data, "queries", {"query_id": ["1"], "query": ["Red Chair"]})
    line = stop_line(judgments.main, [str(tmp_path / "x.qrels"), str(tmp_path / "x.csv")])
    assert "--queries" in line
    judgments.main([str(tmp_path / "x.qrels"), str(tmp_path / "x.csv"), "--queries", str(data)])
    assert (tmp_path / "x.csv").read_text() == "query,docid,rating\nRed Chair,007,5\n"
    assert "--format" in stop_line(judgments.main, [str(source), str(tmp_path / "x.dat")])
    (tmp_path / "x.dat").write_text("1 0 007 5\n")
    judgments.main([str(tmp_path / "x.dat"), str(tmp_path / "y.qrels"), "--format", "qrels"])
    assert (tmp_path / "y.qrels").read_text() == "1 0 007 5\n"


# ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def labelled_run(tmp_path_factory):
    run = tmp_path_factory.mktemp("judged") / "run"
    return run, *synthetic(run)


def probabilities(run, every, human):
    """{(query id, pin id): p [5]} of all pairs, a pair's first row in the order labelled, shown."""
    soft = pq.read_table(run / "labels/labelled.parquet")
    p = np.stack([soft[f"p{level}"].to_numpy() for level in range(1, 6)], axis=1)
    found = {}
    for table, soft in [(human, p), *every]:
        for query, pin, row in zip(table["query_index"], table["pin_index"], soft):
            found.setdefault((f"q{query}", f"p{pin}"), row)
    return found


def test_labels_of_the_teacher(labelled_run, tmp_path):
    run, every, human = labelled_run
    p = probabilities(run, every, human)
    judgments.main([str(run), str(tmp_path / "teacher.qrels")])
    found = read_judgments(tmp_path / "teacher.qrels")
    assert {(row.query_id, row.pin_id): row.rating for row in found} == {
        pair: row.argmax() + 1 for pair, row in p.items()
    }
    judgments.main([str(run), str(tmp_path / "teacher.run")])
    found = read_judgments(tmp_path / "teacher.run")
    assert len(found) == len(p)
    for row in found:
        assert row.rating == pytest.approx(p[row.query_id, row.pin_id] @ np.arange(1, 6))
    for _, listed in groupby(found, attrgetter("query_id")):
        scores = [row.rating for row in listed]
        assert scores == sorted(scores, reverse=True)
    judgments.main([str(run), str(tmp_path / "teacher.json"), "--levels", "100=5,10=4,5=3,1=2,0=1"])
    entries = read_json(tmp_path / "teacher.json")["judgmentRatings"]
    rated = {(entry["query"], x["docId"]): x["rating"] for entry in entries for x in entry["ratings"]}
    query, pin = next(iter(p))
    number = p[query, pin].argmax()
    assert rated[f"text {query[1:]}", pin] == ["0", "1", "5", "10", "100"][number] and len(rated) == len(p)


def test_a_run_without_features_is_the_line_of_every_stage(tmp_path):
    (tmp_path / "run" / "features").mkdir(parents=True)
    line = stop_line(judgments.main, [str(tmp_path / "run"), str(tmp_path / "a.csv")])
    assert line.startswith(f"{tmp_path}/run/features: missing") and line.endswith(f"--run {tmp_path}/run")


def test_labels_of_people(labelled_run, tmp_path):
    run, _, human = labelled_run
    judgments.main([str(run), str(tmp_path / "people.csv"), "--labels", "human"])
    found = {(row.query, row.pin_id): row.rating for row in read_judgments(tmp_path / "people.csv")}
    expected = {}
    for query, pin, label in zip(human["query_index"], human["pin_index"], human["label"]):
        expected.setdefault((f"text {query}", f"p{pin}"), label)
    assert found == expected


def test_trec_eval_finds_the_same_ndcg_and_precision(tmp_path):
    """trec_eval's code on files, the metrics of stage 05 on the rows; ESCI's gains a hundredfold."""
    import pytrec_eval

    run = tmp_path / "run"
    _, human = synthetic(run)
    mark_finished(run / "labels", arguments={"only_labelled": True}, inputs={"features": "features"})
    gains = "0=1,1=2,3=3,7=4,15=5"  # 2^(level - 1) - 1, the gain of nDCG@20
    judgments.main([str(run), str(tmp_path / "a.qrels"), "--labels", "human", "--levels", gains])
    judgments.main([str(run), str(tmp_path / "a.run")])
    esci = ["--labels", "human", "--levels", "0=1,2=2,1=3,10=4,100=5"]
    judgments.main([str(run), str(tmp_path / "esci.qrels"), *esci])
    with open(tmp_path / "a.qrels") as qrels, open(tmp_path / "a.run") as results:
        qrels, results = pytrec_eval.parse_qrel(qrels), pytrec_eval.parse_run(results)
    with open(tmp_path / "esci.qrels") as file:
        whole = pytrec_eval.RelevanceEvaluator(pytrec_eval.parse_qrel(file), {"ndcg"}).evaluate(results)
    p = probabilities(run, [], human)
    level = {}
    for query, pin, label in zip(human["query_index"], human["pin_index"], human["label"]):
        level.setdefault((f"q{query}", f"p{pin}"), int(label))
    ndcg = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut_20"}).evaluate(results)
    precision = pytrec_eval.RelevanceEvaluator(qrels, {"P_5"}, relevance_level=7).evaluate(results)
    assert len(ndcg) == len({query for query, _ in level}) > 100
    for query in ndcg:
        pairs = [pair for pair in level if pair[0] == query]
        score = np.array([p[pair] @ np.arange(1, 6) for pair in pairs])
        labels = np.array([level[pair] for pair in pairs])
        own = stage("05").ndcg(labels, score)
        assert ndcg[query]["ndcg_cut_20"] == pytest.approx(0 if np.isnan(own) else own)
        own = stage("05").ndcg(labels, score, None, np.array([0, 0.02, 0.01, 0.1, 1]))
        assert whole[query]["ndcg"] == pytest.approx(0 if np.isnan(own) else own)
        best = labels[np.argsort(-score)][:5]
        assert precision[query]["P_5"] == pytest.approx((best >= 4).sum() / 5)
