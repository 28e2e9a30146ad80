"""A run directory with a student to serve, made once a test session: stage 01's features of the tiny toy
dataset, soft labels as a teacher might give them, and a teacher with random weights."""

import functools
import shutil

import numpy as np
import pyarrow.parquet as pq
from helpers import mark_finished, stage

from common import FIELDS, Teacher
from lib.models import load_backbone, load_config, load_tokenizer
from lib.stages.files import read_json, write_parquet


def soft_labels(pairs, rng):
    """Probabilities p1 … p5 that grow with the pair's BM25 and cosine, with noise: a table of columns."""
    score = pairs["bm25"].to_numpy() / 4 + pairs["text_cosine"].to_numpy() + rng.normal(0, 0.3, len(pairs))
    logits = -2 * np.abs(np.arange(5) - np.clip(score, 0, 4)[:, None])
    p = np.exp(logits)
    p = (p / p.sum(1, keepdims=True)).astype(np.float32)
    return {f"p{level}": p[:, level - 1] for level in range(1, 6)}


@functools.cache
def served_run(features, bert):
    """`features`: the session's stage 01; `bert`: folder of the teacher's backbone."""
    run = features.parent.parent / "served" / "run"
    shutil.rmtree(run.parent, ignore_errors=True)
    run.mkdir(parents=True)
    (run / "features").symlink_to(features)
    rng = np.random.default_rng(0)
    for path in [features / "labelled.parquet", *sorted(features.glob("impressions/part-*.parquet"))]:
        labels = soft_labels(pq.read_table(path), rng)
        write_parquet(run / "labels" / path.relative_to(features), labels)
    made = {"features": read_json(features / "stage.json")["identity"]}
    mark_finished(run / "labels", identity="labels", inputs=made, arguments={"only_labelled": False})

    config = load_config(bert)
    about = {"model": str(bert), "kind": "encoder", "finetuning": "full", "fields": FIELDS, "max_tokens": 64}
    (run / "teacher").mkdir()
    Teacher(load_backbone(bert, None), "encoder").save(run / "teacher", about)
    load_tokenizer(bert, config).save_pretrained(run / "teacher" / "tokenizer")
    mark_finished(run / "teacher", identity="teacher", inputs=made)
    stage("04").main(["--run", str(run), "--epochs", "8", "--batch-size", "64", "--device", "cpu"])
    return run
