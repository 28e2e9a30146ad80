"""Rows per second and peak memory of stages 01, 03 and 04 on synthetic tables.

    python benchmarks/scale.py --impressions 300000 3000000 --pins 1000000            one line a size
    python benchmarks/scale.py --stages 01 --impressions 3000000 --pins 100000 1000000 10000000
    python benchmarks/scale.py --stages 04 --width 1100 --impressions 3000000

Made by DuckDB from hashes: queries and pins of a Zipf-like popularity, pin text of 12 words out of 200
thousand, an engagement log. Query and pin embeddings are random and given as the user's own, so stage 01
needs no model. 03 runs a one-layer teacher of width 64: its reading, tokenizing, batching and writing are
measured, not the model. 04 trains the paper preset's network unless --hidden. The stages are processes;
memory is what they hold of their own, sampled every 0.1 s: memory-mapped embeddings are the page cache's,
which the kernel may drop at any time. The tables are written to the system's temporary folder (TMPDIR).
"""

import contextlib
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import duckdb
import numpy as np
import psutil  # of accelerate
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from lib.stages.settings import Count, Width, flags_read  # noqa: E402
from lib.stages.terminal import Stop, run_main  # noqa: E402


@dataclass(frozen=True)
class Settings:
    """Sizes, and what is measured."""

    impressions: tuple[Count, ...] = (300_000, 3_000_000)  # each with each number of pins
    pins: tuple[Count, ...] = (100_000,)  # rows of pins
    queries: Count = 100_000  # rows of queries
    engagements: Count = 1_000_000  # rows of the engagement log
    width: Width = 1_100  # columns of all embeddings together
    stages: tuple[Literal["01", "03", "04"], ...] = ("01", "03", "04")  # what is timed
    hidden: tuple[Width, ...] = (1024, 512, 256)  # widths of 04's hidden layers
    memory: str = "4GB"  # DuckDB's limit in 01


# ------------------------------------------------------------------------------------------------------------
# Tables


def words_of(row, count, salt):
    """SQL: a text of `count` words out of 200 thousand, rare ones rarely, that follows from the number
    `row`."""
    draws = [f"(hash({row}, {salt + k}) % 1000003) / 1000003.0" for k in range(count)]
    words = [f"'w' || floor(200000 * pow({draw}, 3))::INTEGER" for draw in draws]
    return f"concat_ws(' ', {', '.join(words)})"


def popular(row, size, salt):
    """SQL: a number below `size`, small ones more often, that follows from the number `row`."""
    return f"floor({size} * pow((hash({row}, {salt}) % 1000003) / 1000003.0, 2))::BIGINT"


def make_tables(folder, settings, impressions, pins):
    """The raw tables of the given numbers of rows."""
    db = duckdb.connect(config={"memory_limit": "4GB", "temp_directory": str(folder / "spill")})
    queries = settings.queries
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
            FROM range({settings.engagements}) t(i)""",
    }
    for name, sql in tables.items():
        db.execute(f"COPY ({sql}) TO '{folder / name}.parquet' (FORMAT parquet)")
    db.close()


def make_embeddings(folder, settings, pins):
    """The user's own embeddings, of --width columns together, half of it the pins' visual one. The same
    100,000 random rows again and again."""
    folder.mkdir()
    rng, small = np.random.default_rng(0), settings.width // 6
    sizes = {"query_text": (settings.queries, small), "pin_text": (pins, small), "pin_graph": (pins, small)}
    sizes["pin_visual"] = (pins, settings.width - 3 * small)
    for name, (rows, dim) in sizes.items():
        array = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float16, (rows, dim))
        block = rng.standard_normal((min(rows, 100_000), dim), np.float32)
        for start in range(0, rows, len(block)):
            array[start : start + len(block)] = block[: rows - start]
        ids = (f"{name[0]}{i}\n" for i in range(rows))
        (folder / f"{name}.ids").write_text("".join(ids))


# ------------------------------------------------------------------------------------------------------------
# Measuring


def own_memory(process):
    """Bytes of a process that are neither a file's nor shared (RssAnon), and of its children."""
    size = 0
    with contextlib.suppress(psutil.Error):
        for one in (process, *process.children(recursive=True)):
            found = one.memory_info()
            size += found.rss - found.shared
    return size


def measured(*command):
    """Runs a script. Returns seconds and peak memory in GB."""
    start, peak = time.time(), 0
    process = psutil.Popen([sys.executable, *map(str, command)], cwd=ROOT, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, own_memory(process))
        time.sleep(0.1)
    if process.returncode:
        raise Stop(f"{' '.join(map(str, command))}: failed")
    return time.time() - start, peak / 1e9


def tiny_encoder(folder):
    """A one-layer BERT of width 64 with random weights and a vocabulary of words, as a hub model is saved."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "title", "description", ":"]
    words += [f"w{i}" for i in range(20_000)]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    shape = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=64)
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=64, **shape)).save_pretrained(folder)


# ------------------------------------------------------------------------------------------------------------
# One size


def measure(settings, impressions, pins, folder):
    """All that is asked for at one size, in a folder of its own. Yields (what, seconds, peak GB)."""
    data, run, model = folder / "data", folder / "run", folder / "model"
    data.mkdir()
    make_tables(data, settings, impressions, pins)
    make_embeddings(data / "embeddings", settings, pins)
    tiny_encoder(model)
    flags = ["--data", data, "--text-encoder", model, "--memory", settings.memory, "--shard-rows", 250_000]
    yield "01", *measured("01_build_features.py", "--run", run, *flags)
    if "03" in settings.stages or "04" in settings.stages:
        few = ["--rows", 200, "--epochs", 1, "--max-tokens", 32]
        measured("02_train_teacher.py", "--run", run, "--model", model, *few)
        yield "03, one-layer teacher", *measured("03_label.py", "--run", run, "--batch-tokens", 32_768)
    if "04" in settings.stages:
        flags = ["--preset", "paper", "--epochs", 1, "--hidden", *settings.hidden]
        made = measured("04_train_student.py", "--run", run, *flags)
        yield f"04, one epoch, hidden layers of {settings.hidden}", *made


def main(argv=None):
    settings = flags_read(Settings, None, argv, __doc__.split("\n")[0])
    print("| what | impressions | pins | rows/s | seconds | peak GB |\n|---|---|---|---|---|---|")
    for pins in settings.pins:
        for impressions in settings.impressions:
            with tempfile.TemporaryDirectory() as folder:
                for what, seconds, peak in measure(settings, impressions, pins, Path(folder)):
                    cells = [what, f"{impressions:,}", f"{pins:,}", f"{impressions / seconds:,.0f}"]
                    print(f"| {' | '.join(cells)} | {seconds:,.0f} | {peak:.2f} |", flush=True)


if __name__ == "__main__":
    run_main(main)
