"""How long a query takes on one core: the student in onnxruntime and in PyTorch, the teacher beside them.

    python benchmarks/serve.py --run outputs/toy                         a minute or two
    python benchmarks/serve.py --run outputs/toy --without-teacher --json serve.json --markdown serve.md

Reads   RUN/features, RUN/student, RUN/teacher
Writes  a Markdown table; with --json FILE and --markdown FILE also there

    any pairs student.onnx; else student_one_query.onnx, which has less to compute
    at hand   the student's inputs of all pairs lie in memory: the network, the order by expected level
    fresh     from the query's text on: its embedding, its match features, gathering, network, order
    teacher   from the texts on: tokens of all pairs (a pin's are kept for the next query), network, order

Candidates are drawn with repetition from the run's pins; queries are the run's own, one after another, each
as if it were new. The process stays on one core. p99 of N calls: N stands in the table.
"""

import argparse
import importlib
import os
import platform
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import FIELDS, PairText, Student, Teacher, expected_level  # noqa: E402
from lib import models  # noqa: E402
from lib.results.contract import ONNX, OUTPUTS, open_onnx  # noqa: E402
from lib.stages.files import write_json  # noqa: E402
from lib.stages.terminal import run_main  # noqa: E402
from serving.ranker import Query, Ranker  # noqa: E402

stage_03 = importlib.import_module("03_label")

WARM_UP = 3  # calls before those that are measured
LEAST = 100  # calls of the student a row of the table, whatever the time


# ------------------------------------------------------------------------------------------------------------
# What is measured: functions of a query's text and candidates (row numbers of pins)


class Students:
    """The student of a run, in onnxruntime and in PyTorch, on the same features."""

    def __init__(self, run):
        self.ranker = Ranker(run)
        self.network = Student.load(run / "student")
        self.any_pairs = open_onnx(run / "student" / ONNX)

    def features(self, text, rows):
        """Everything that is fresh: the student's inputs {name: array}."""
        new, pins = self.ranker.new, self.ranker.pins
        query = new.query(Query(text))
        match = new.match(query, pins, rows, np.zeros(len(rows)))
        return self.ranker.feed(query, pins, rows, match)

    def onnx_order(self, feed):
        """Inputs -> order by expected level, onnxruntime."""
        return np.argsort(-self.ranker.predict(feed)[1], kind="stable")

    def any_pairs_order(self, feed):
        """Likewise by student.onnx, whose inputs have one row a pair."""
        return np.argsort(-self.any_pairs.run(OUTPUTS, feed)[1], kind="stable")

    @torch.inference_mode()
    def torch_order(self, inputs):
        """Inputs -> order by expected level, PyTorch."""
        p = self.network(inputs).softmax(dim=1)
        return torch.argsort(expected_level(p), descending=True, stable=True)


class TeacherOnOneCore:
    """The teacher of a run, LoRA merged as stage 03 does; tokens of the pins are made once."""

    def __init__(self, run, dtype=torch.float32):
        folder, features = run / "teacher", run / "features"
        self.teacher, about = Teacher.load(folder, dtype)
        if about["finetuning"] != "full":
            stage_03.merge_lora(self.teacher, folder / "adapter")
        source = folder / "backbone" if about["finetuning"] == "full" else about["model"]
        tokenizer = models.load_tokenizer(folder / "tokenizer", models.load_config(source))
        self.text = PairText(tokenizer, about["kind"], about["fields"], about["max_tokens"])
        pins = pq.read_table(features / "pins.parquet", columns=list(FIELDS))
        self.pins = self.text.pins(pins.to_pydict())

    def order(self, text, rows):
        """Query and candidates -> order by expected level."""
        query = self.text.queries([text])[0]
        ids = [self.text.pair(query, self.pins[row]) for row in rows]
        labels = stage_03.soft_labels(self.teacher, ids, self.text.tokenizer.pad_token_id, 8_192)
        return np.argsort(-expected_level(labels), kind="stable")


def tensors(feed):
    """The student's inputs as PyTorch takes them."""
    return {name: torch.from_numpy(array) for name, array in feed.items()}


def repeated(feed, rows):
    """The student's inputs, one row a pair."""
    return {name: np.repeat(array, rows // len(array), axis=0) for name, array in feed.items()}


# ------------------------------------------------------------------------------------------------------------
# Measuring


def timed(call, arguments, seconds, least):
    """Milliseconds of call(*arguments of a turn), turn by turn, for `seconds`, at least `least` turns."""
    for turn in range(min(WARM_UP, least // 2)):
        call(*arguments(turn))
    times, start = [], time.perf_counter()
    while len(times) < least or time.perf_counter() - start < seconds:
        given = arguments(len(times))
        before = time.perf_counter()
        call(*given)
        times.append(1e3 * (time.perf_counter() - before))
    return times


def row(system, features, candidates, times):
    """A row of the results."""
    p50, p99 = np.percentile(times, [50, 99])
    found = {"p50_ms": round(float(p50), 2), "p99_ms": round(float(p99), 2), "calls": len(times)}
    line = f"  {system}, {features}, {candidates:,} candidates: {p50:.2f} ms, p99 {p99:.2f}"
    print(line, file=sys.stderr, flush=True)
    return {"system": system, "features": features, "candidates": candidates, **found}


def measure_students(students, texts, rows, seconds):
    """Rows of the results for candidates `rows`."""
    feeds = [students.features(text, rows) for text in texts[:8]]
    inputs = [tensors(feed) for feed in feeds]
    pairs = [repeated(feed, len(rows)) for feed in feeds]

    def onnx_fresh(text):
        students.onnx_order(students.features(text, rows))

    def torch_fresh(text):
        students.torch_order(tensors(students.features(text, rows)))

    def embed(text):
        students.ranker.new.query(Query(text))

    plan = (
        ("student, onnxruntime", "at hand", students.onnx_order, feeds),
        ("student, onnxruntime, any pairs", "at hand", students.any_pairs_order, pairs),
        ("student, PyTorch", "at hand", students.torch_order, inputs),
        ("student, onnxruntime", "fresh", onnx_fresh, texts),
        ("student, PyTorch", "fresh", torch_fresh, texts),
        ("of which the query's embedding", "fresh", embed, texts),
    )
    found = []
    for system, features, call, given in plan:
        times = timed(call, lambda turn, given=given: (given[turn % len(given)],), seconds, LEAST)
        found.append(row(system, features, len(rows), times))
    return found


def markdown(results, facts):
    """The table."""
    lines = [
        f"{facts['cpu']}, one core; {facts['packages']}; {facts['pins']:,} pins.",
        "",
        "| | features | candidates | p50, ms | p99, ms | calls |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for found in results:
        cells = [found["system"], found["features"], f"{found['candidates']:,}"]
        cells += [f"{found['p50_ms']:,.1f}", f"{found['p99_ms']:,.1f}", f"{found['calls']:,}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def one_core():
    """Keeps this process on one core, where the system can, and PyTorch to one thread."""
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def machine(pins):
    """What the figures depend on."""
    import onnxruntime

    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    packages = f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}"
    return {"cpu": cpu, "packages": packages, "pins": pins, "load_at_start": load}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--run", type=Path, default=ROOT / "outputs" / "toy", help="through stage 04")
    parser.add_argument("--candidates", type=int, nargs="+", default=[100, 1_000, 2_000, 10_000])
    parser.add_argument("--seconds", type=float, default=4.0, help="a row of the table")
    parser.add_argument("--without-teacher", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    if min(args.candidates) < 1 or not args.seconds >= 0:
        parser.error("--candidates: at least 1; --seconds: at least 0")
    return args


def main(argv=None):
    # 1. One core; the models
    args = parse_args(argv)
    models.quiet_libraries()
    one_core()
    students = Students(args.run)
    teacher = None if args.without_teacher else TeacherOnOneCore(args.run)
    texts = pq.read_table(args.run / "features" / "queries.parquet", columns=["query"])["query"].to_pylist()
    texts = [f"{text} ?" for text in texts]  # else they are known, and nothing is made for them
    facts, results = machine(len(students.ranker.ids)), []

    # 2. Every number of candidates
    rng = np.random.default_rng(0)
    for candidates in args.candidates:
        rows = rng.integers(0, len(students.ranker.ids), candidates)
        results += measure_students(students, texts, rows, args.seconds)
        if teacher is not None:
            times = timed(
                teacher.order, lambda turn, rows=rows: (texts[turn % len(texts)], rows), args.seconds, 2
            )
            results.append(row("teacher", "fresh", candidates, times))

    # 3. Table
    table = markdown(results, facts)
    print(table)
    if args.json:
        write_json(args.json, {**facts, "results": results})
    if args.markdown:
        args.markdown.write_text(table, encoding="utf-8")


if __name__ == "__main__":
    run_main(main)
