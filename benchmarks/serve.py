"""How long a query takes: on one core of this process, or of a service over HTTP.

    python benchmarks/serve.py --run outputs/toy                                       two minutes
    RUN=outputs/toy uvicorn serving.service:app --port 8001 &
    python benchmarks/serve.py --run outputs/toy --url http://127.0.0.1:8001           80 seconds a size

Reads   RUN/features, RUN/student, RUN/teacher; prints a Markdown table

    at hand   the student's inputs of all pairs lie in memory: the network, the order by expected level.
              one query: student_one_query.onnx, which a service takes; any pairs: student.onnx
    fresh     from the query's text on: its embedding, its match features, gathering, network, order
    teacher   from the texts on: tokens of all pairs, network, order; one call for a hundred of the others
    start     from nothing to a Ranker's first answer: seconds, memory; after `python -m serving.text_encoder
              --run RUN` it needs no PyTorch
    HTTP      until the whole answer is there, to clients that ask again at once

Candidates are drawn with repetition from the run's pins; queries are the run's own, one after another. The
systems of this process take turns, call by call, so that what else the machine does meets all of them alike.
"""

import contextlib
import http.client
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pyarrow.parquet as pq
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.scale import measured  # noqa: E402
from common import Student, expected_level  # noqa: E402
from lib.models import quiet_libraries  # noqa: E402
from lib.results.contract import ONNX, OUTPUTS, open_onnx  # noqa: E402
from lib.stages.settings import Count, NonNegative, flags_read  # noqa: E402
from lib.stages.terminal import Stop, run_main  # noqa: E402
from serving.page import PairTeacher  # noqa: E402
from serving.ranker import Query, Ranker  # noqa: E402

WARM_UP = 3  # calls before those that are measured
LEAST = 100  # calls, whatever the time
START = "import sys; from serving.ranker import Ranker; Ranker(sys.argv[1]).rank('red chair')"


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    run: Path = ROOT / "outputs" / "toy"  # through stage 04
    candidates: tuple[Count, ...] = (100, 1_000, 10_000)  # pins of a query
    seconds: NonNegative = 20.0  # for a number of candidates
    url: str | None = None  # of a service of the same run, which is asked instead
    clients: Count = 8  # that ask the service at once


# ------------------------------------------------------------------------------------------------------------
# In this process


class Systems:
    """What is measured: functions that give candidates, row numbers of pins, their levels for a query."""

    def __init__(self, run):
        torch.set_num_threads(1)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        self.ranker, self.teacher, self.student = Ranker(run), PairTeacher(run), Student.load(run / "student")
        self.session = open_onnx(run / "student" / ONNX)

    def features(self, text, rows):
        """Everything that is fresh: the student's inputs {name: array}; those of the query have one row."""
        new, pins = self.ranker.new, self.ranker.pins
        query = new.query(Query(text))
        return self.ranker.feed(query, pins, rows, new.match(query, pins, rows, np.zeros(len(rows))))

    @torch.inference_mode()
    def in_pytorch(self, tensors):
        """Expected levels [B] of the student's inputs."""
        return expected_level(self.student(tensors).softmax(1).numpy())

    def calls(self, texts, rows):
        """{name: (function that gives expected levels [B], its arguments in turn)}"""
        predict, ones, pairs, tensors = self.ranker.predict, [], [], []
        for text in texts[:8]:
            feed = self.features(text, rows)
            ones.append(feed)
            pairs.append({name: np.repeat(array, len(rows) // len(array), 0) for name, array in feed.items()})
            tensors.append({name: torch.from_numpy(array) for name, array in feed.items()})
        return {
            "one query, at hand": (lambda feed: predict(feed)[1], ones),
            "any pairs, at hand": (lambda feed: self.session.run(OUTPUTS, feed)[1], pairs),
            "one query, at hand, PyTorch": (self.in_pytorch, tensors),
            "one query, fresh": (lambda text: predict(self.features(text, rows))[1], texts),
            "teacher": (lambda text: expected_level(self.teacher(text, rows)), texts),
        }


def in_turns(calls, seconds):
    """{name: milliseconds [N]} of `calls`, the order included, in turns, for `seconds` together."""
    times, turn, start = {name: [] for name in calls}, -WARM_UP, time.perf_counter()
    while turn < LEAST or time.perf_counter() - start < seconds:
        for name, (call, given) in calls.items():
            if name == "teacher" and turn % 100:
                continue
            before = time.perf_counter()
            np.argsort(-call(given[turn % len(given)]), axis=0, kind="stable")
            if turn >= 0:
                times[name].append(1e3 * (time.perf_counter() - before))
        turn += 1
    return times


# ------------------------------------------------------------------------------------------------------------
# Over HTTP


def ask(connection, query, candidates):
    """The status of the answer to a query, once the whole of it is there."""
    body = json.dumps({"query": query, "candidates": candidates})
    connection.request("POST", "/rank", body, {"content-type": "application/json"})
    with connection.getresponse() as answer:
        answer.read()
        return answer.status


def busy(settings, queries, candidates, clients, large=False):
    """Milliseconds of all answers that so many clients get in these seconds, at least one each; beside
    another one's queries of 10 MB if `large`."""
    place, end = urlsplit(settings.url).netloc, time.perf_counter() + settings.seconds

    def work(turn):
        connection, times = http.client.HTTPConnection(place, timeout=600), []
        while not times or time.perf_counter() < end:
            before = time.perf_counter()
            status = ask(connection, queries[turn % len(queries)], candidates)
            if status != 200:
                raise Stop(f"{settings.url}: answers {status}")
            times.append(1e3 * (time.perf_counter() - before))
            turn += clients
        return times

    def disturb():
        while time.perf_counter() < end:
            with contextlib.suppress(OSError, http.client.HTTPException):  # refused before it is read
                ask(http.client.HTTPConnection(place, timeout=600), "x " * 5_000_000, [])

    with ThreadPoolExecutor(clients + large) as pool:
        if large:
            pool.submit(disturb)
        return [one for times in pool.map(work, range(clients)) for one in times]


def from_service(settings, texts, ids):
    """{name: milliseconds [N]}: the run's queries over some candidates, known to the service and new ones."""
    new, many = [f"{text} {i}" for i, text in enumerate(texts)], settings.clients
    return {
        "HTTP, 1 client": busy(settings, texts, ids, 1),
        "HTTP, 1 client, new queries": busy(settings, new, ids, 1),
        f"HTTP, {many} clients": busy(settings, texts, ids, many),
        f"HTTP, {many} clients, beside queries of 10 MB": busy(settings, texts, ids, many, large=True),
    }


def main(argv=None):
    settings = flags_read(Settings, None, argv, __doc__.split("\n")[0])
    quiet_libraries()
    features, rng = settings.run / "features", np.random.default_rng(0)
    texts = pq.read_table(features / "queries.parquet", columns=["query"])["query"].to_pylist()
    ids = pq.read_table(features / "pins.parquet", columns=["pin_id"])["pin_id"].to_pylist()
    systems = None if settings.url else Systems(settings.run)
    print("| | candidates | p50, ms | p99, ms | calls |\n| --- | ---: | ---: | ---: | ---: |")
    for candidates in settings.candidates:
        rows = rng.integers(0, len(ids), candidates)
        if systems:  # as they are the texts are known, and nothing is made for them
            found = in_turns(systems.calls([f"{text} ?" for text in texts], rows), settings.seconds)
        else:
            found = from_service(settings, texts, [ids[row] for row in rows])
        for name, times in found.items():
            p50, p99 = np.percentile(times, [50, 99])
            print(f"| {name} | {candidates:,} | {p50:,.1f} | {p99:,.1f} | {len(times):,} |", flush=True)
    if systems:
        seconds, peak = measured("-c", START, settings.run)
        print(f"start: {seconds:.1f} s, {1e3 * peak:,.0f} MB")


if __name__ == "__main__":
    run_main(main)
