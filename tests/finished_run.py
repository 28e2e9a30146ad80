"""A run directory that has been through all five stages on the tiny toy dataset, with a Llama of random
weights, made once a test session."""

import functools
import shutil

import pyarrow.parquet as pq
from helpers import stage

from lib.tables.splits import in_hash_split


def student_seed(features):
    """The first seed that holds out one of the few training queries for the student."""
    train = [("split", "=", "train")]
    labelled = pq.read_table(features / "labelled.parquet", columns=["query_index"], filters=train)
    queries = pq.read_table(features / "queries.parquet", columns=["query_id"])["query_id"]
    ids = queries.take(labelled["query_index"].unique()).to_pylist()
    for seed in range(1000):
        if 0 < in_hash_split(ids, 0.05, f"student:{seed}").sum() < len(ids) / 3:
            return seed
    raise AssertionError("no such seed")


@functools.cache
def finished_run(features, llama):
    """`features`: the session's stage 01; `llama`: model folder. Beside it: RUN/../title, a teacher that
    reads titles alone, with --only-labelled."""
    root = features.parent.parent / "finished"
    shutil.rmtree(root, ignore_errors=True)
    for name in ("run", "title"):
        (root / name).mkdir(parents=True)
        (root / name / "features").symlink_to(features)
    run, common = root / "run", ["--device", "cpu"]
    seed = ["--seed", str(student_seed(features))]
    fewer = ["--epochs", "1", "--rows", "200", "--name", "student_200"]
    stage("02").main(["--run", str(run), "--model", str(llama), "--epochs", "1", *common])
    stage("03").main(["--run", str(run), *common])
    stage("04").main(["--run", str(run), "--labels", "human", "--epochs", "2", *seed, *common])
    stage("04").main(["--run", str(run), "--epochs", "3", *seed, *common])
    stage("04").main(["--run", str(run), *fewer, *seed, *common])
    stage("05").main(["--run", str(run), "--resamples", "50", "--search-pages", "1"])
    title = ["--model", str(llama), "--epochs", "1", "--fields", "title"]
    stage("02").main(["--run", str(root / "title"), *title, *common])
    stage("03").main(["--run", str(root / "title"), "--only-labelled", *common])
    return run
