"""How long a query takes: on one core of this process, or of a service over HTTP.

    python benchmarks/serve.py --run outputs/toy                                       two minutes
    RUN=outputs/toy uvicorn serving.service:app --port 8001 &
    python benchmarks/serve.py --run outputs/toy --url http://127.0.0.1:8001           40 seconds a line

Reads   RUN/features, RUN/student, RUN/teacher; prints a Markdown table

    at hand   the student's inputs of all pairs lie in memory: the network, the order by expected level.
              one query: student_one_query.onnx, which a service takes; any pairs: student.onnx
    fresh     from the query's text on: its embedding, its match features, gathering, network, order
    teacher   from the texts on: tokens of all pairs, network, order; one call for a hundred of the others
    HTTP      until the whole answer is there, to one client, and to --clients that ask again at once

Candidates are drawn with repetition from the run's pins; queries are the run's own, one after another. The
systems of this process take turns, call by call, so that what else the machine does meets all of them alike.
"""

import argparse
import http.client
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pyarrow.parquet as pq
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import expected_level  # noqa: E402
from lib.models import quiet_libraries  # noqa: E402
from lib.results.contract import ONNX, OUTPUTS, open_onnx  # noqa: E402
from lib.stages.terminal import run_main  # noqa: E402
from serving.pair_teacher import PairTeacher  # noqa: E402
from serving.ranker import Query, Ranker  # noqa: E402

WARM_UP = 3  # calls before those that are measured
LEAST = 100  # calls, whatever the time


# ------------------------------------------------------------------------------------------------------------
# In this process


class Systems:
    """What is measured: functions that give candidates, row numbers of pins, their levels for a query."""

    def __init__(self, run):
        torch.set_num_threads(1)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        self.ranker, self.teacher = Ranker(run), PairTeacher(run)
        self.session = open_onnx(run / "student" / ONNX)

    def features(self, text, rows):
        """Everything that is fresh: the student's inputs {name: array}; those of the query have one row."""
        new, pins = self.ranker.new, self.ranker.pins
        query = new.query(Query(text))
        return self.ranker.feed(query, pins, rows, new.match(query, pins, rows, np.zeros(len(rows))))

    def pairs(self, text, rows):
        """Likewise, all of them one row a pair."""
        feed = self.features(text, rows)
        return {name: np.repeat(array, len(rows) // len(array), axis=0) for name, array in feed.items()}

    def calls(self, texts, rows):
        """{name: (function that gives expected levels [B], its arguments in turn)}"""
        predict = self.ranker.predict
        of_query = [self.features(text, rows) for text in texts[:8]]
        of_pairs = [self.pairs(text, rows) for text in texts[:8]]
        return {
            "one query, at hand": (lambda feed: predict(feed)[1], of_query),
            "any pairs, at hand": (lambda feed: self.session.run(OUTPUTS, feed)[1], of_pairs),
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


def busy(url, bodies, clients, seconds):
    """Milliseconds of all answers to /rank that so many clients get in these seconds, at least one each."""
    end = time.perf_counter() + seconds

    def work(turn):
        connection, times = http.client.HTTPConnection(urlsplit(url).netloc, timeout=600), []
        while not times or time.perf_counter() < end:
            before = time.perf_counter()
            body = bodies[turn % len(bodies)]
            connection.request("POST", "/rank", body, {"content-type": "application/json"})
            with connection.getresponse() as answer:
                answer.read()
            if answer.status != 200:
                sys.exit(f"error: {url}: answers {answer.status}")
            times.append(1e3 * (time.perf_counter() - before))
            turn += clients
        return times

    with ThreadPoolExecutor(clients) as pool:
        return [one for times in pool.map(work, range(clients)) for one in times]


def from_service(args, texts, pin_ids):
    """{name: milliseconds [N]}: the run's queries over some candidates, known to the service and new ones."""
    known = [json.dumps({"query": text, "candidates": pin_ids}) for text in texts]
    new = [json.dumps({"query": f"{text} {i}", "candidates": pin_ids}) for i, text in enumerate(texts)]
    return {
        "HTTP, 1 client": busy(args.url, known, 1, args.seconds),
        "HTTP, 1 client, new queries": busy(args.url, new, 1, args.seconds),
        f"HTTP, {args.clients} clients": busy(args.url, known, args.clients, args.seconds),
    }


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--run", type=Path, default=ROOT / "outputs" / "toy", help="through stage 04")
    parser.add_argument("--candidates", type=int, nargs="+", default=[100, 1_000, 2_000])
    parser.add_argument("--seconds", type=float, default=20.0, help="for a number of candidates")
    parser.add_argument("--url", help="of a service of the same run, which is asked instead")
    parser.add_argument("--clients", type=int, default=8)
    args = parser.parse_args(argv)
    if min(args.clients, *args.candidates) < 1 or not args.seconds >= 0:
        parser.error("--candidates, --clients: at least 1; --seconds: at least 0")
    return args


def main(argv=None):
    args = parse_args(argv)
    quiet_libraries()
    features, rng = args.run / "features", np.random.default_rng(0)
    texts = pq.read_table(features / "queries.parquet", columns=["query"])["query"].to_pylist()
    ids = pq.read_table(features / "pins.parquet", columns=["pin_id"])["pin_id"].to_pylist()
    systems = None if args.url else Systems(args.run)
    print("| | candidates | p50, ms | p99, ms | calls |\n| --- | ---: | ---: | ---: | ---: |")
    for candidates in args.candidates:
        rows = rng.integers(0, len(ids), candidates)
        if systems:  # as they are the texts are known, and nothing is made for them
            found = in_turns(systems.calls([f"{text} ?" for text in texts], rows), args.seconds)
        else:
            found = from_service(args, texts, [ids[row] for row in rows])
        for name, times in found.items():
            p50, p99 = np.percentile(times, [50, 99])
            print(f"| {name} | {candidates:,} | {p50:,.1f} | {p99:,.1f} | {len(times):,} |", flush=True)


if __name__ == "__main__":
    run_main(main)
