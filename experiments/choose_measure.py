"""Which queries should people label next? Ways to choose them, where people's labels of all are known.

    python data/from_msrd.py SOURCE --out data/msrd_choose --train-share 0.045 --eval-share 0.025
    python experiments/choose_measure.py --data data/msrd_choose --encoder ENCODER --into outputs/choose

The training queries are the pool: START of them, drawn by chance, are labelled, the pairs of all are the
impressions. A way adds queries of the pool; teacher and student are trained as on a next day (01 --base, 02,
03, 04) and compared on the evaluation queries. Killed or run again, it continues.

    random        by chance                         strata        by chance, within the numbers of words
    disagreement  teacher and student differ most   uncertainty   the teacher is least sure
    QxP           nothing at first, Q queries by chance, P pins of each
"""

import importlib
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import entr, rel_entr

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from experiments import choose, comparison  # noqa: E402
from lib.inputs.pairs import read_labels  # noqa: E402
from lib.stages.settings import ROOT, Count, Size, parse  # noqa: E402
from lib.stages.terminal import run_main  # noqa: E402


@dataclass(frozen=True)
class Settings:
    """Settings of the study."""

    data: Path = ROOT / "data" / "msrd_choose"  # raw tables; labels with a split
    encoder: str = "sentence-transformers/all-MiniLM-L6-v2"  # the teacher, and the text encoder
    into: Path = ROOT / "outputs" / "choose"  # a run a way and seed
    ways: tuple[str, ...] = ("120x10", "240x5", "random", "strata", "disagreement", "uncertainty")
    start: Count = 60  # queries labelled at first
    more: tuple[Count, ...] = (120, 60)  # queries added
    pins: Count = 20  # labelled pins of a query, at most
    shown: Count = 8  # impressions of a query of the pool, at most
    judged: Count = 20  # pins of an evaluation query, at most
    max_tokens: Count = 32
    steps: Count = 400  # of the teacher, about
    seeds: tuple[Size, ...] = (0,)
    resamples: Count = 1_000


def train(settings, seed, name, people, others):
    """A run INTO/NAME_SEED on people's labels, through stage 04. others: evaluation labels, impressions."""
    run = settings.into / f"{name}_{seed}"
    if (run / "student" / "stage.json").exists():
        return run
    data, evaluation, impressions = run / "data", *others
    shutil.rmtree(data, ignore_errors=True)
    shutil.copytree(settings.data, data, ignore=shutil.ignore_patterns("labels.*", "impressions.*"))
    pd.concat([people, evaluation]).to_parquet(data / "labels.parquet", index=False)
    impressions[["query_id", "pin_id"]].to_parquet(data / "impressions.parquet", index=False)
    base, epochs = settings.into / "base", max(1, round(settings.steps * 32 / len(people)))
    flags = {
        "01_build_features": ["--data", data, "--text-encoder", settings.encoder],
        "02_train_teacher": ["--max-tokens", settings.max_tokens, "--epochs", epochs, "--seed", seed],
        "03_label": [],
        "04_train_student": ["--seed", seed],
    }
    if base.exists():
        flags["01_build_features"] += ["--base", base]
    for stage, own in flags.items():
        argv = ["--preset", "small", "--run", run, *own]
        importlib.import_module(stage).main([*map(str, argv)])
    if not base.exists():
        base.symlink_to(run.resolve())
    return run


def least_known(run, way):
    """Query ids of the impressions, those first on which teacher and student differ most (mean
    Kullback-Leibler divergence), or of which the teacher is least sure (mean entropy)."""
    features, found = run / "features", []
    ids = pd.read_parquet(features / "queries.parquet", columns=["query_id"])["query_id"]
    for path in sorted((features / "impressions").glob("part-*.parquet")):
        rows = pd.read_parquet(path)
        p = read_labels(run / "labels" / "impressions" / path.name)
        columns = {name: column.to_numpy() for name, column in rows.items()}
        value = entr(p)
        if way == "disagreement":
            other, _ = comparison.evaluate.student_system(run / "student", features, columns)
            value = rel_entr(p, other)
        found.append(pd.Series(value.sum(axis=1), ids[rows["query_index"]].to_numpy()))
    return pd.concat(found).groupby(level=0).mean().sort_values(ascending=False).index


def order_of(settings, seed, way, pool, start):
    """The pool's queries without the first START, in the order in which a way adds them. start: the run on
    the first ones."""
    rest = pool[settings.start :]
    if way == "random":
        return rest
    if way == "strata":
        queries = pd.read_parquet(settings.data / "queries.parquet").set_index("query_id")["query"]
        words = queries[rest].str.split().str.len()
        rng, same = np.random.default_rng(seed), np.ones(len(rest))
        rows, _ = choose.draw(np.minimum(words.to_numpy(), 5), same, same > 0, max(settings.more), rng)
        return rng.permutation(rest[rows])
    return [query for query in least_known(start, way) if query in set(rest)]


def runs_of(settings, seed):
    """{way: its run} of a seed."""
    labels = pd.read_parquet(settings.data / "labels.parquet").sample(frac=1, random_state=0)
    labels = {split: rows.groupby("query_id") for split, rows in labels.groupby("split")}
    others = labels["eval"].head(settings.judged), labels["train"].head(settings.shown)
    mine = labels["train"].head(settings.pins)
    pool = np.random.default_rng(seed).permutation(np.unique(mine["query_id"]))

    def trained(name, queries, pins=settings.pins):
        people = mine[mine["query_id"].isin(queries)].groupby("query_id").head(pins)
        return train(settings, seed, name, people, others)

    found = {"start": trained("start", pool[: settings.start])}
    for way in settings.ways:
        if "x" in way:
            queries, pins = map(int, way.split("x"))
            found[way] = trained(way, pool[:queries], pins)
            continue
        order = order_of(settings, seed, way, pool, found["start"])
        for n in settings.more:
            queries = [*pool[: settings.start], *order[:n]]
            found[f"{way} +{n}"] = trained(f"{way}_{n}", queries)
    return found


def main(argv=None):
    settings = parse({"toy": Settings()}, argv, __doc__)
    runs = [runs_of(settings, seed) for seed in settings.seeds]
    for system in ("teacher", "student"):
        places = {way: [(of_seed[way], system) for of_seed in runs] for way in runs[0]}
        table, differences = comparison.measure(comparison.read_conditions(places), settings.resamples)
        than_random = [row for row in differences if row["minus"].split(" ")[0] == "random"]
        print(comparison.flat_table(system, table, ["condition"]))
        print(comparison.flat_table("difference", than_random, ["condition", "minus"]))


if __name__ == "__main__":
    run_main(main)
