"""Rows per second and peak memory of stages 01, 03 and 04 on synthetic tables, beside the naive way.

    python benchmarks/scale.py --impressions 300000 3000000 --pins 1000000            one line a size
    python benchmarks/scale.py --stages 01 --impressions 3000000 --pins 100000 1000000 10000000
    python benchmarks/scale.py --stages 04 --width 1100 --impressions 3000000 --json scale.json
    python benchmarks/scale.py --stages logs --engagements 100000000 --pins 1000000 --impressions 300000
    python benchmarks/scale.py --stages match --naive --pins 1000000 --impressions 3000000

Made by DuckDB from hashes: queries and pins of a Zipf-like popularity, pin text of 12 words out of 200
thousand, an engagement log. Query and pin embeddings are random and given as the user's own, so stage 01
needs no model. 03 runs a one-layer teacher of width 64: its reading, tokenizing, batching and writing are
measured, not the model. The stages are run as a user would, as processes; memory is the sum of RssAnon over
a stage's processes, sampled every 0.1 s: memory-mapped embeddings are the page cache's, which the kernel may
drop at any time.

`logs` is 01's aggregation of the engagement log alone (its rows a second are the log's), `match` its match
features alone. 04 trains the paper preset's network unless --hidden.

Naive ways (--naive): pandas with everything in one DataFrame for 01's joins; rank-bm25's get_batch_scores; a
PyTorch Dataset with a DataLoader for 04.
"""

import argparse
import contextlib
import dataclasses
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import duckdb
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
from lib.inputs.student_inputs import StudentInputs  # noqa: E402
from lib.stages.files import hashed, list_files, read_json, write_json  # noqa: E402


def words_of(row, count, salt):
    """SQL: a text of `count` words out of 200 thousand, rare ones rarely, that follows from the number
    `row`."""
    words = []
    for k in range(count):
        draw = f"(hash({row}, {salt + k}) % 1000003) / 1000003.0"
        words.append(f"'w' || floor(200000 * pow({draw}, 3))::INTEGER")
    return f"concat_ws(' ', {', '.join(words)})"


def popular(row, size, salt):
    """SQL: a number below `size`, small ones more often, that follows from the number `row`."""
    return f"floor({size} * pow((hash({row}, {salt}) % 1000003) / 1000003.0, 2))::BIGINT"


def make_tables(folder, args, impressions, pins):
    """The raw tables of the given numbers of rows."""
    db = duckdb.connect(config={"memory_limit": "4GB", "temp_directory": str(folder / "spill")})
    queries = args.queries
    query_of_event = words_of(f"hash(i, 36) % {queries}", 3, 20)
    tables = {
        "pins": f"""SELECT 'p' || i AS pin_id, {words_of("i", 6, 0)} AS title,
            {words_of("i", 6, 10)} AS description, NULL::VARCHAR AS image FROM range({pins}) t(i)""",
        "queries": f"""SELECT 'q' || i AS query_id, {words_of("i", 3, 20)} AS query, 'en' AS language,
            'c' || i % 20 AS interest FROM range({queries}) t(i)""",
        "labels": f"""SELECT 'q' || {popular("i", queries, 30)} AS query_id, 'p' || i AS pin_id,
            1 + hash(i, 31) % 5 AS label FROM range({min(pins, 20_000)}) t(i)""",
        "impressions": f"""SELECT 'q' || {popular("i", queries, 32)} AS query_id,
            'p' || {popular("i", pins, 33)} AS pin_id FROM range({impressions}) t(i)""",
        "engagements": f"""SELECT {query_of_event} AS query,
            'p' || {popular("i", pins, 34)} AS pin_id,
            DATE '2024-01-01' + (hash(i, 35) % 900)::INTEGER AS date, 1 + hash(i, 37) % 9 AS count
            FROM range({args.engagements}) t(i)""",
    }
    for name, sql in tables.items():
        db.execute(f"COPY ({sql}) TO '{folder / name}.parquet' (FORMAT parquet)")
    db.close()


def make_dataset(folder, args, impressions, pins, seed=0):
    """Raw tables, and embeddings of --width columns together, half of it the pins' visual embedding."""
    (folder / "embeddings").mkdir(parents=True)
    make_tables(folder, args, impressions, pins)
    rng = np.random.default_rng(seed)
    small = args.width // 6
    sizes = {
        "query_text": (args.queries, small),
        "pin_text": (pins, small),
        "pin_graph": (pins, small),
        "pin_visual": (pins, args.width - 3 * small),
    }
    for name, (rows, dim) in sizes.items():
        path = folder / "embeddings" / f"{name}.npy"
        array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(rows, dim))
        for start in range(0, rows, 100_000):
            block = array[start : start + 100_000]
            block[:] = rng.standard_normal(block.shape, dtype=np.float32)
        ids = "\n".join(f"{name[0]}{i}" for i in range(rows))
        (folder / "embeddings" / f"{name}.ids").write_text(ids + "\n")


def family(pid):
    """A process and its children, and theirs."""
    yield pid
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            yield from family(int(child))


def own_memory(pid):
    """RssAnon of a process in kB; 0 if it has gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                return int(line.split()[1])
    return 0


def measured(command):
    """Runs a command. Returns seconds and peak memory in GB (RssAnon of it and its children)."""
    start, peak, done = time.time(), [0], threading.Event()
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )

    def watch():
        while not done.wait(0.1):
            peak[0] = max(peak[0], sum(own_memory(pid) for pid in list(family(process.pid))))

    watcher = threading.Thread(target=watch)
    watcher.start()
    error = process.communicate()[1]
    done.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed: {error.strip().splitlines()[-1]}")
    return time.time() - start, peak[0] / 1e6


def tiny_encoder(folder):
    """A one-layer BERT of width 64 with random weights and a tokenizer of single characters, saved as a hub
    model is."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        *(f"w{i}" for i in range(20_000)),
        "title",
        "description",
        ":",
    ]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=len(words),
            hidden_size=64,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=64,
            max_position_embeddings=64,
        )
    ).save_pretrained(folder)


LOGS = """
import importlib, sys
from pathlib import Path
from lib.tables.raw import RawTables
data, memory = Path(sys.argv[1]), sys.argv[2]
raw = RawTables(data, memory, spill=data / "spill")
importlib.import_module("01_build_features").text_from_logs(raw, None, 6)
"""


def aggregate_logs(data, memory):
    """Seconds and peak memory (GB) of 01's text from logs alone."""
    return measured(["-c", LOGS, data, memory])


def match_rate(run, naive, pairs=4_000_000):
    """Pairs/s of 01's match features alone (BM25, terms matched, cosine), and of rank-bm25's
    get_batch_scores on the same texts, or None."""
    stage = importlib.import_module("01_build_features")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "features"
        shutil.copytree(run / "features", out, copy_function=os.symlink)
        (out / "bm25.parquet").unlink()
        match = stage.open_match_features(out, os.cpu_count())
    bm25 = match.bm25
    rng = np.random.default_rng(0)
    queries, pins = bm25.queries.shape[0], bm25.corpus_size
    query, pin = rng.integers(0, queries, pairs), rng.integers(0, pins, pairs)
    seconds = []
    for _ in range(2):  # the first brings the embeddings into the page cache
        start = time.time()
        match(query, pin, np.zeros(pairs, np.int64))
        seconds.append(time.time() - start)
    peer = rank_bm25_rate(run, rng) if naive and pins <= 1_000_000 else None
    return pairs / min(seconds), peer


def rank_bm25_rate(run, rng, pins_a_query=20, seconds=10):
    """Pairs/s of rank-bm25's get_batch_scores, BM25 alone."""
    import pyarrow.parquet as pq
    from rank_bm25 import BM25Okapi

    from lib.inputs.bm25 import tokenize

    stage = importlib.import_module("01_build_features")
    queries = pq.read_table(run / "features/queries.parquet", columns=["query"])["query"].to_pylist()
    documents = []
    for chunk in stage.pin_texts(run / "features/pins.parquet"):
        documents += [tokenize(text) for text in chunk]
    okapi = BM25Okapi(documents)
    start, n = time.time(), 0
    while time.time() - start < seconds:
        pins = rng.integers(0, okapi.corpus_size, pins_a_query).tolist()
        okapi.get_batch_scores(tokenize(queries[n % len(queries)]), pins)
        n += 1
    return pins_a_query * n / (time.time() - start)


def bare_student_rate(run, hidden, batch=4_096, seconds=20):
    """Rows/s of the same network stepping on one batch held in memory: what the hardware allows."""
    import torch

    stage = importlib.import_module("04_train_student")
    inputs = StudentInputs(run / "features")
    preset = stage.PRESETS["paper"]
    settings = dataclasses.replace(preset, hidden=tuple(map(int, str(hidden).split(","))))
    shares = dict(zip(("input_dropout", "dropout"), stage.DROPOUTS[0]))  # of many rows
    settings = dataclasses.replace(settings, **shares)
    F = len(inputs.match)
    ends = {"mean": 0.0, "std": 1.0, "low": -9.0, "high": 9.0}
    spec = stage.student_spec(settings, inputs, {name: np.full(F, end) for name, end in ends.items()})
    student = common.Student(spec)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    rows = np.random.default_rng(0).integers(0, len(next(iter(inputs.codes.values()))), batch)
    columns = inputs.gather(rows, rows, np.random.default_rng(0).normal(size=(batch, F)).astype(np.float32))
    target = torch.randn(batch, 5).softmax(1)

    def step():
        loss = stage.distillation_loss(student(columns), target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    for _ in range(3):
        step()
    start, n = time.time(), 0
    while time.time() - start < seconds:
        step()
        n += 1
    return n * batch / (time.time() - start)


def loader_rate(run, rows, batch=4_096, seconds=20):
    """Rows/s of the naive loader alone: a Dataset that gathers one row at a time, a DataLoader that stacks
    them."""
    import pyarrow.parquet as pq
    import torch

    class Pairs(torch.utils.data.Dataset):
        def __init__(self):
            part = pq.read_table(sorted((run / "features/impressions").glob("*.parquet"))[0]).slice(0, rows)
            self.query, self.pin = part["query_index"].to_numpy(), part["pin_index"].to_numpy()
            self.inputs = {
                p.name: np.load(p, mmap_mode="r") for p in (run / "features").glob("*_embedding.npy")
            }

        def __len__(self):
            return len(self.query)

        def __getitem__(self, i):
            columns = []
            for name, array in self.inputs.items():
                columns.append(array[(self.query if name[0] == "q" else self.pin)[i]])
            return torch.from_numpy(np.concatenate(columns).astype(np.float32))

    start, n = time.time(), 0
    for x in torch.utils.data.DataLoader(Pairs(), batch_size=batch, shuffle=True):
        n += len(x)
        if time.time() - start > seconds:
            break
    return n / (time.time() - start)


PANDAS = """
import sys
import pandas as pd
tables = {name: pd.read_parquet(f"{sys.argv[1]}/{name}.parquet")
          for name in ("pins", "queries", "impressions", "engagements")}
tables["pins"]["pin_index"] = range(len(tables["pins"]))
tables["queries"]["query_index"] = range(len(tables["queries"]))
log = tables["engagements"]
log = log[log["date"] > log["date"].max() - pd.Timedelta(days=730)]
log = log.groupby(["query", "pin_id"], as_index=False)["count"].sum()
pairs = tables["impressions"].merge(tables["queries"], on="query_id").merge(tables["pins"], on="pin_id")
print(len(pairs.merge(log, on=["query", "pin_id"], how="left")))
"""


def pandas_rate(data):
    """Seconds and peak memory (GB) of 01's joins by pandas: every table one DataFrame."""
    return measured(["-c", PANDAS, data])


def random_labels(run):
    """Soft labels as 03 would write them, random: for sizes whose labelling would take hours here."""
    import pyarrow.parquet as pq

    from lib.stages.files import write_parquet

    rng, features, labels = np.random.default_rng(0), run / "features", run / "labels"
    for path in [features / "labelled.parquet", *sorted((features / "impressions").glob("*.parquet"))]:
        p = rng.dirichlet(np.ones(5), pq.read_metadata(path).num_rows).astype(np.float32)
        columns = {f"p{level}": p[:, level - 1] for level in range(1, 6)}
        write_parquet(labels / path.relative_to(features), columns)
    made = read_json(features / "stage.json")
    about = {"finished": True, "identity": hashed("random"), "arguments": {}}
    about |= {"inputs": {"features": made["identity"]}, "outputs": list_files(labels)}
    write_json(labels / "stage.json", about)


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--impressions", type=int, nargs="+", default=[300_000, 3_000_000])
    p.add_argument("--pins", type=int, nargs="+", default=[100_000])
    p.add_argument("--queries", type=int, default=100_000)
    p.add_argument("--engagements", type=int, default=1_000_000, help="rows of the engagement log")
    p.add_argument("--width", type=int, default=1_100, help="columns of all embeddings together")
    p.add_argument(
        "--stages", nargs="+", choices=("01", "03", "04", "logs", "match"), default=["01", "03", "04"]
    )
    p.add_argument(
        "--hidden",
        default="1024,512,256",
        metavar="W,W,…",
        help="widths of 04's hidden layers (default: the paper preset's)",
    )
    p.add_argument("--memory", default="4GB", help="DuckDB's limit in 01")
    p.add_argument(
        "--label-rows",
        type=int,
        default=3_000_000,
        help="skip 03's engine (random soft labels instead) beyond so many impressions",
    )
    p.add_argument("--shard-rows", type=int, default=250_000)
    p.add_argument("--naive", action="store_true", help="also the naive ways")
    p.add_argument("--work", type=Path, help="folder for the tables (default: a temporary one)")
    p.add_argument("--json", type=Path, metavar="FILE")
    return p.parse_args(argv)


def measure(args, impressions, pins, folder, line):
    """All that is asked for at one size, in a folder of its own. line(what, rate, seconds, peak_gb) takes
    each result."""
    data, run, model = folder / "data", folder / "run", folder / "model"
    make_dataset(data, args, impressions, pins)
    tiny_encoder(model)
    if "logs" in args.stages:
        seconds, peak = aggregate_logs(data, args.memory)
        what = f"01, its logs alone: {args.engagements:,} engagements"
        line(what, args.engagements / seconds, seconds, peak)
        if args.stages == ["logs"]:
            return
    sizes = ["--shard-rows", args.shard_rows, "--memory", args.memory]
    where = ["--data", data, "--run", run, "--text-encoder", model]
    seconds, peak = measured(["01_build_features.py", *where, *sizes])
    line("01, all of it", impressions / seconds, seconds, peak)
    if "match" in args.stages:
        ours, peer = match_rate(run, args.naive)
        line("01, match features alone", ours)
        if peer:
            line("naive: rank-bm25 get_batch_scores, 20 pins a query", peer)
    if "03" in args.stages or "04" in args.stages:
        measure_labels(args, impressions, run, model, line)
    if "04" in args.stages:
        measure_student(args, impressions, run, line)
    if args.naive and "01" in args.stages:
        try:
            seconds, peak = pandas_rate(data)
            line("naive: 01's joins in pandas", impressions / seconds, seconds, peak)
        except SystemExit as e:
            print(f"naive: pandas did not finish: {str(e)[-200:]}")


def measure_labels(args, impressions, run, model, line):
    """Stage 03 with a one-layer teacher; beyond --label-rows, or without it, random labels."""
    few = ["--rows", 200, "--epochs", 1, "--max-tokens", 32]
    measured(["02_train_teacher.py", "--run", run, "--model", model, *few])
    if impressions > args.label_rows or "03" not in args.stages:
        random_labels(run)
        return
    seconds, peak = measured(["03_label.py", "--run", run, "--batch-tokens", 32_768])
    line("03, one-layer teacher", impressions / seconds, seconds, peak)


def measure_student(args, impressions, run, line):
    """An epoch of stage 04 beside its network alone, and a naive loader."""
    settings = ["--preset", "paper", "--epochs", 1, "--hidden", *args.hidden.split(",")]
    seconds, peak = measured(["04_train_student.py", "--run", run, *settings])
    line(f"04, one epoch, hidden layers of {args.hidden}", impressions / seconds, seconds, peak)
    line("its network alone, on one batch in memory", bare_student_rate(run, args.hidden))
    if args.naive:
        line("naive: Dataset and DataLoader, gathering alone", loader_rate(run, 200_000))


class Results:
    """Takes what is measured: prints each figure as a line of a table, keeps all."""

    def __init__(self):
        self.rows = []
        print("| what | impressions | pins | seconds | rows/s | peak GB |\n|---|---|---|---|---|---|")

    def at(self, impressions, pins):
        """A function that takes the figures of this size."""

        def line(what, rate, seconds=float("nan"), peak_gb=float("nan")):
            size = dict(impressions=impressions, pins=pins)
            self.rows.append(dict(what=what, **size, seconds=seconds, rate=rate, peak_gb=peak_gb))
            figures = f"{seconds:,.0f} | {rate:,.0f} | {peak_gb:.2f}"
            print(f"| {what} | {impressions:,} | {pins:,} | {figures} |", flush=True)

        return line


def main(argv=None):
    args = parse_args(argv)
    results = Results()
    for pins in args.pins:
        for impressions in args.impressions:
            with tempfile.TemporaryDirectory(dir=args.work) as folder:
                measure(args, impressions, pins, Path(folder), results.at(impressions, pins))
    if args.json:
        write_json(args.json, {"cores": os.cpu_count(), "results": results.rows})


if __name__ == "__main__":
    main()
