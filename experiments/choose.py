"""Which queries to label next: a queue of pairs for people (serving/page.py takes it).

    python experiments/choose.py --run outputs/toy --queries 100 --pins 20 --out queue.csv

Queries without a human label are drawn by their traffic (impressions), proportionally within strata. The pins
of each are the tops of BM25 and of the student, in turn, and a few from further down. OUT, a line a pair:
query_id, pin_id, query, stratum, and weight, the share of the traffic that a query stands for, as
experiments/judge.py --strata takes it.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lib.models import quiet_libraries  # noqa: E402
from lib.stages.settings import ROOT, Count, Share, Size, parse  # noqa: E402
from lib.stages.terminal import Stop, run_main  # noqa: E402
from lib.tables.splits import query_key  # noqa: E402
from serving.ranker import Ranker  # noqa: E402


@dataclass(frozen=True)
class Settings:
    """Settings of the draw."""

    run: Path = ROOT / "outputs" / "toy"  # run directory, through stage 04
    queries: Count = 100  # to be drawn
    pins: Count = 20  # of each query
    further: Share = 0.2  # share of the pins from below the tops
    strata: tuple[str, ...] = ("language",)  # columns of queries; popularity: traffic in thirds
    out: Path = Path("queue.csv")
    seed: Size = 0


def traffic_of(run, n):
    """Impressions of each query [Q]."""
    traffic = np.zeros(n)
    for path in sorted((run / "features").glob("impressions/part-*.parquet")):
        query = pq.read_table(path, columns=["query_index"])["query_index"].to_numpy()
        traffic += np.bincount(query, minlength=n)
    return traffic


def strata_of(queries, traffic, names):
    """Stratum of each query [Q], a text: its values of some columns of the table `queries`."""
    stratum = np.full(len(queries), "", object)
    for name in names:
        if name == "popularity":  # thirds of the traffic, not of the queries
            ranked = pd.Series(traffic).sort_values(ascending=False, kind="stable")
            before = (ranked.cumsum() - ranked).sort_index() / max(traffic.sum(), 1)
            values = pd.cut(before, [-1, 1 / 3, 2 / 3, 1], right=False, labels=["head", "torso", "tail"])
        elif name in queries:
            values = queries[name]
        else:
            raise Stop(f"--strata {name}: no column of queries; there are {', '.join(queries)}")
        stratum += [f" / {value}" for value in values]
    return np.array([name.removeprefix(" / ") for name in stratum])


def draw(stratum, traffic, open_to, n, rng):
    """Draws n of the queries [Q] that are `open_to` labelling: of each stratum its share of the traffic (by
    largest remainders), in it by traffic. Returns row numbers, and each one's share of the traffic."""
    traffic = np.where(open_to, traffic, 0)
    names, which = np.unique(stratum, return_inverse=True)
    share = np.bincount(which, traffic) / max(traffic.sum(), 1)
    most = np.bincount(which, traffic > 0)
    count = np.minimum(np.floor(share * n), most).astype(int)
    for h in np.argsort(count - share * n, kind="stable"):
        count[h] += int(count.sum() < n and count[h] < most[h])
    rows, weights = [], []
    for h in np.flatnonzero(count):
        inside = np.where(which == h, traffic, 0)
        drawn = rng.choice(len(traffic), count[h], replace=False, p=inside / inside.sum())
        rows += drawn.tolist()
        weights += [share[h] / count[h]] * count[h]
    return rows, weights


def pins_of(found, settings, rng):
    """Pins of a query for people: the tops of BM25 and student in turn, and some from further down. found:
    the ranker's Scores of all pins, best first."""
    below = round(settings.further * settings.pins)
    top, rest = np.split(np.array(found.in_turn()), [settings.pins - below])
    chosen = [*top, *rng.permutation(rest)[:below]]
    return [found.pins[row] for row in rng.permutation(chosen)]  # people must not see the order of a system


def main(argv=None):
    settings = parse({"toy": Settings()}, argv, __doc__)
    quiet_libraries()
    features, rng = settings.run / "features", np.random.default_rng(settings.seed)
    ranker = Ranker(settings.run)
    queries = pd.read_parquet(features / "queries.parquet")
    labelled = pd.read_parquet(features / "labelled.parquet", columns=["query_index"])["query_index"]
    keys = queries["query"].map(query_key)
    open_to = ~keys.isin(keys[labelled]).to_numpy()
    traffic = traffic_of(settings.run, len(queries))
    stratum = strata_of(queries, traffic, settings.strata)
    rows, weights = draw(stratum, traffic, open_to, settings.queries, rng)
    print(f"{len(rows):,} of {(open_to & (traffic > 0)).sum():,} queries that are shown and have no label")
    pairs = []
    for row, weight in zip(rows, weights):
        query_id, text = queries.loc[row, ["query_id", "query"]]
        for pin_id in pins_of(ranker.rank(text), settings, rng):
            pairs.append((query_id, pin_id, text, stratum[row], weight))
    table = pd.DataFrame(pairs, columns=["query_id", "pin_id", "query", "stratum", "weight"])
    table.to_csv(settings.out, index=False, float_format="%.6g")
    print(f"wrote {settings.out}")


if __name__ == "__main__":
    run_main(main)
