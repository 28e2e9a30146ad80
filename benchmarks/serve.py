"""How long a query takes on one core: the student in onnxruntime and in PyTorch, the teacher beside them.

    python benchmarks/serve.py --run outputs/toy                         two minutes
    python benchmarks/serve.py --run outputs/toy --without-teacher --candidates 1000 --seconds 20

Reads   RUN/features, RUN/student, RUN/teacher; prints a Markdown table

    at hand   the student's inputs of all pairs lie in memory: the network, the order by expected level
    fresh     from the query's text on: its embedding, its match features, gathering, network, order
    one query student_one_query.onnx, which a service takes: less to compute than student.onnx, any pairs
    int8      weights of student.onnx quantized by onnxruntime
    teacher   from the texts on: tokens of all pairs, network, order; one call for a hundred of the others

Candidates are drawn with repetition from the run's pins; queries are the run's own, one after another, each
as if it were new. The systems take turns, call by call, so that what else the machine does meets all of them
alike; the process stays on one core. Over HTTP: benchmarks/load.py.
"""

import argparse
import logging
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
import pyarrow.parquet as pq
import torch
from onnxruntime.quantization import quantize_dynamic

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import Student, expected_level  # noqa: E402
from lib.models import quiet_libraries  # noqa: E402
from lib.results.contract import ONNX, OUTPUTS, open_onnx  # noqa: E402
from lib.stages.terminal import run_main  # noqa: E402
from serving.pair_teacher import PairTeacher  # noqa: E402
from serving.ranker import Query, Ranker  # noqa: E402

WARM_UP = 3  # calls before those that are measured
LEAST = 100  # calls, whatever the time


def quantized(path, folder):
    """student.onnx with weights in int8: the path of a file in `folder`. Constants are folded first: of the
    file as it is the widest layer would not count as weights."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath, made = str(folder / "folded.onnx"), folder / "int8.onnx"
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    logging.getLogger().setLevel(logging.ERROR)  # it advises a step that this is
    quantize_dynamic(options.optimized_model_filepath, made, per_channel=True)
    return made


class Systems:
    """What is measured: functions that order candidates, row numbers of pins, for a query."""

    def __init__(self, run, folder):
        """folder: for the file in int8."""
        self.ranker, self.network, self.teacher = Ranker(run), Student.load(run / "student"), PairTeacher(run)
        path = run / "student" / ONNX
        self.files = {"any pairs": path, "any pairs, int8": quantized(path, folder)}
        self.sessions = {name: open_onnx(path) for name, path in self.files.items()}

    def features(self, text, rows):
        """Everything that is fresh: the student's inputs {name: array}; those of the query have one row."""
        new, pins = self.ranker.new, self.ranker.pins
        query = new.query(Query(text))
        return self.ranker.feed(query, pins, rows, new.match(query, pins, rows, np.zeros(len(rows))))

    def pairs(self, text, rows):
        """Likewise, all of them one row a pair."""
        feed = self.features(text, rows)
        return {name: np.repeat(array, len(rows) // len(array), axis=0) for name, array in feed.items()}

    @torch.inference_mode()
    def by_torch(self, tensors):
        return expected_level(self.network(tensors).softmax(dim=1)).numpy()

    def calls(self, texts, rows):
        """{(system, features): (function that gives expected levels [B], its arguments in turn)}"""
        feeds = [self.features(text, rows) for text in texts[:8]]
        tensors = [{name: torch.from_numpy(array) for name, array in feed.items()} for feed in feeds]
        pairs, predict = [self.pairs(text, rows) for text in texts[:8]], self.ranker.predict
        calls = {("one query", "at hand"): (lambda feed: predict(feed)[1], feeds)}
        for name, session in self.sessions.items():
            calls[name, "at hand"] = (lambda feed, run=session.run: run(OUTPUTS, feed)[1], pairs)
        calls["PyTorch", "at hand"] = (self.by_torch, tensors)
        calls["one query", "fresh"] = (lambda text: predict(self.features(text, rows))[1], texts)
        embed = self.ranker.new.embed
        calls["the query's embedding", "fresh"] = (
            lambda text: embed("query_text", [text])["query_text"],
            texts,
        )
        calls["teacher", "fresh"] = (lambda text: expected_level(self.teacher(text, rows)), texts)
        return calls


def measure(calls, seconds):
    """{name: milliseconds [N]} of `calls`, the order included, in turns, for `seconds` together."""
    times, turn, start = {name: [] for name in calls}, -WARM_UP, time.perf_counter()
    while turn < LEAST or time.perf_counter() - start < seconds:
        for name, (call, given) in calls.items():
            if name[0] == "teacher" and turn % 100:
                continue
            before = time.perf_counter()
            np.argsort(-call(given[turn % len(given)]), axis=0, kind="stable")
            if turn >= 0:
                times[name].append(1e3 * (time.perf_counter() - before))
        turn += 1
    return times


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--run", type=Path, default=ROOT / "outputs" / "toy", help="through stage 04")
    parser.add_argument("--candidates", type=int, nargs="+", default=[100, 1_000, 2_000, 10_000])
    parser.add_argument("--seconds", type=float, default=20.0, help="for a number of candidates")
    parser.add_argument("--without-teacher", action="store_true")
    args = parser.parse_args(argv)
    if min(args.candidates) < 1 or not args.seconds >= 0:
        parser.error("--candidates: at least 1; --seconds: at least 0")
    return args


def main(argv=None):
    args = parse_args(argv)
    quiet_libraries()
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    texts = pq.read_table(args.run / "features" / "queries.parquet", columns=["query"])["query"].to_pylist()
    texts = [f"{text} ?" for text in texts]  # else they are known, and nothing is made for them
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        systems = Systems(args.run, Path(folder))
        print(f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}\n")
        print("| | features | candidates | p50, ms | p99, ms | calls |")
        print("| --- | --- | ---: | ---: | ---: | ---: |")
        for candidates in args.candidates:
            rows = rng.integers(0, len(systems.ranker.ids), candidates)
            calls = systems.calls(texts, rows)
            if args.without_teacher:
                del calls["teacher", "fresh"]
            for (system, features), times in measure(calls, args.seconds).items():
                p50, p99 = np.percentile(times, [50, 99])
                print(
                    f"| {system} | {features} | {candidates:,} | {p50:,.1f} | {p99:,.1f} | {len(times):,} |"
                )

        # How int8 differs
        same = []
        for text in texts[:40]:
            feed = systems.pairs(text, rows)
            first, second = (session.run(OUTPUTS, feed)[0].argmax(1) for session in systems.sessions.values())
            same.append((first == second).mean())
        fp32, int8 = (path.stat().st_size for path in systems.files.values())
    share = 100 * np.mean(same)
    print(
        f"\nint8: {int8:,} bytes instead of {fp32:,}; the most probable level is the same for {share:.2f} %"
    )


if __name__ == "__main__":
    run_main(main)
