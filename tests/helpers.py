"""What several test files share: importing numbered stages, writing raw tables, catching a Stop."""

import importlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

import common
from lib.inputs.match import MATCH_FEATURES
from lib.stages.files import list_files, write_json, write_parquet
from lib.stages.finished import sealed
from lib.stages.terminal import Stop
from lib.tables.splits import in_hash_split

ROOT = Path(__file__).resolve().parent.parent
TOY_MODELS = ROOT / "data" / "toy" / "models"
SYSTEMS = ["majority", "bm25", "embedding", "match", "student_human_labels", "student", "teacher"]
STAGES = {
    "01": "01_build_features",
    "02": "02_train_teacher",
    "03": "03_label",
    "04": "04_train_student",
    "05": "05_evaluate",
}


def stage(number):
    """The module of a numbered script."""
    return importlib.import_module(STAGES[number])


def stop_line(call, *args):
    """The one line that `call` stops with. The exception is dropped: its traceback would keep the folder's
    lock."""
    try:
        call(*args)
    except Stop as e:
        line = str(e)
    else:
        raise AssertionError("it did not stop")
    assert line and "\n" not in line, line
    return line


def environment(threads=2):
    """Environment of a subprocess: no network, a fixed number of threads."""
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def script(number, *args):
    """Command line of a stage."""
    return [sys.executable, str(ROOT / f"{STAGES[number]}.py"), *map(str, args)]


def write_table(folder, name, columns, kind="parquet"):
    """A dict of columns -> NAME.kind; a text value keeps its exact characters in all three formats."""
    path = Path(folder) / f"{name}.{kind}"
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "jsonl":
        rows = [dict(zip(columns, row)) for row in zip(*columns.values())]
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif kind == "csv":
        pa.csv.write_csv(
            pa.table({k: v if isinstance(v, pa.Array) else pa.array(v) for k, v in columns.items()}), path
        )
    else:
        pq.write_table(pa.table(columns), path)
    return path


def small_dataset():
    """Tables of a tiny valid dataset, as dicts of columns; the required four and the three logs."""
    return {
        "pins": {
            "pin_id": ["007", "p2", "p3"],
            "title": ["red chair", None, "كرسي أحمر"],
            "description": ["line one\nline two", 'with "quotes", commas', "🪑 café"],
        },
        "queries": {"query_id": ["q1", "q2"], "query": ["red chair", "椅子"], "language": ["en", "zh"]},
        "labels": {
            "query_id": ["q1", "q1", "q2"],
            "pin_id": ["007", "p2", "p3"],
            "label": [5, 1, 4],
            "split": ["train", "train", "eval"],
        },
        "impressions": {"query_id": ["q1", "q2", "q2"], "pin_id": ["p3", "007", "007"]},
        "engagements": {"query": ["red chair"], "pin_id": ["007"], "date": ["2024-06-30"], "count": [3]},
        "boards": {"pin_id": ["007"], "board_title": ["Kitchen"]},
        "link_visits": {
            "pin_id": ["007"],
            "link_title": ["Buy a chair"],
            "link_description": [None],
            "dwell_seconds": [12.5],
        },
    }


def write_dataset(folder, tables, kind="parquet"):
    for name, columns in tables.items():
        write_table(folder, name, columns, kind)
    return Path(folder)


def own_embeddings(folder, dim=4):
    """Text embeddings of the user's own for no row at all: stage 01 then needs no text encoder."""
    (folder / "embeddings").mkdir(exist_ok=True)
    for name in ("query_text", "pin_text"):
        np.save(folder / "embeddings" / f"{name}.npy", np.ones((1, dim), np.float32))
        (folder / "embeddings" / f"{name}.ids").write_text("nobody\n")
    return folder


def synthetic(folder, shards=5, shard_rows=60, queries=200, pins=30, seed=0):
    """features/ and labels/ as 01 and 03 write them, with random content. Returns the pairs and soft labels
    in order, and the human-labelled rows."""
    rng = np.random.default_rng(seed)
    features, labels = folder / "features", folder / "labels"
    query_ids = [f"q{i}" for i in range(queries)]
    interests = [("home", "home", "food", None)[i % 4] for i in range(queries)]
    kinds = [("a", "b", "b")[i % 3] if i % 5 else None for i in range(pins)]
    languages = [("en", "fr")[i % 4 == 0] for i in range(queries)]
    query_table = {
        "query_id": query_ids,
        "query": [f"text {i}" for i in range(queries)],
        "language": languages,
    }
    texts = {field: [""] * pins for field in common.FIELDS}
    pin_table = {"pin_id": [f"p{i}" for i in range(pins)], **texts, "image": pa.nulls(pins, pa.string())}
    write_parquet(features / "queries.parquet", {**query_table, "interest": pa.array(interests)})
    write_parquet(features / "pins.parquet", {**pin_table, "kind": pa.array(kinds)})
    np.save(features / "query_text_embedding.npy", rng.normal(size=(queries, 4)).astype(np.float16))
    np.save(features / "pin_text_embedding.npy", rng.normal(size=(pins, 6)).astype(np.float32))
    every = []

    def pairs(n):
        columns = {
            "query_index": rng.integers(0, queries, n).astype(np.int32),
            "pin_index": rng.integers(0, pins, n).astype(np.int32),
        }
        for name in MATCH_FEATURES:
            columns[name] = rng.normal(size=n).astype(np.float32)
        return columns

    for i in range(shards):
        table, p = pairs(shard_rows + i), rng.dirichlet(np.ones(5), shard_rows + i).astype(np.float32)
        write_parquet(features / "impressions" / f"part-{i:05d}.parquet", table)
        soft = {f"p{level}": p[:, level - 1] for level in range(1, 6)}
        write_parquet(labels / "impressions" / f"part-{i:05d}.parquet", soft)
        every.append((table, p))
    table = pairs(300)
    in_eval = in_hash_split([f"q{i}" for i in table["query_index"]], 0.3, "eval")
    label = rng.integers(1, 6, 300).astype(np.int8)
    human = {**table, "label": label, "split": np.where(in_eval, "eval", "train")}
    write_parquet(features / "labelled.parquet", human)
    p = rng.dirichlet(np.ones(5), 300).astype(np.float32)
    write_parquet(labels / "labelled.parquet", {f"p{level}": p[:, level - 1] for level in range(1, 6)})
    for name in ("features", "labels"):
        mark_finished(folder / name, identity=name, inputs={"features": "features"})
    return every, human


def mark_finished(folder, **about):
    """Writes the stage.json that a stage would have written over what the folder holds now."""
    given = {"identity": folder.name, "arguments": {}, "inputs": {}, **about}
    made = {**given, "finished": True, "outputs": list_files(folder)}
    write_json(folder / "stage.json", sealed(made))
