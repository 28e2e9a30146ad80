"""Which queries to label next: a queue of pairs for people (serving/page.py takes it).

    python experiments/choose.py --run outputs/toy --queries 100 --pins 20 --out queue.csv

Queries without a human label are drawn by their traffic (impressions), within strata: language, a column of
queries, popularity; proportionally, so that no stratum is left out by chance. The pins of each are the tops
of BM25 and of the student, in turn, and a few from further down: what no system finds is seen, too.

Writes  OUT: query_id, pin_id, query, stratum, weight, a line a pair. weight: the share of the traffic that a
        query stands for, as experiments/judge.py --strata takes it
"""

import csv
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lib.models import quiet_libraries  # noqa: E402
from lib.stages.files import whole_file  # noqa: E402
from lib.stages.settings import ROOT, Count, Share, Size, parse  # noqa: E402
from lib.stages.terminal import Stop, progress_bar, run_main  # noqa: E402
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
    """Stratum of each query [Q], a text: its values of some columns."""
    parts = []
    for name in names:
        if name == "popularity":  # thirds of the traffic, not of the queries
            order = np.argsort(-traffic, kind="stable")
            third = np.empty(len(traffic), int)
            before = traffic[order].cumsum() - traffic[order]
            third[order] = np.minimum(3 * before / max(traffic.sum(), 1), 2)
            parts.append(np.array(["head", "torso", "tail"])[third])
        elif name in queries.column_names:
            parts.append(np.array([str(value) for value in queries[name].to_pylist()]))
        else:
            raise Stop(f"--strata {name}: no column of queries; there are {', '.join(queries.column_names)}")
    return np.array([" / ".join(values) for values in zip(*parts)] if parts else ["all"] * len(traffic))


def draw(stratum, traffic, open_to, n, rng):
    """Draws n of the queries [Q] that are `open_to` labelling: of each stratum its share of the traffic,
    rounded so that they sum to n (largest remainders), in it by traffic. Returns row numbers, and the share
    of the traffic that each stands for."""
    names, which = np.unique(stratum, return_inverse=True)
    share = np.bincount(which, traffic * open_to) / max((traffic * open_to).sum(), 1)
    most = np.bincount(which, open_to & (traffic > 0))
    count = np.minimum(np.floor(share * n), most).astype(int)
    for h in np.argsort(count - share * n, kind="stable"):
        count[h] += int(count.sum() < n and count[h] < most[h])
    rows, weights = [], []
    for h in range(len(names)):
        inside = np.flatnonzero((which == h) & open_to & (traffic > 0))
        if count[h]:
            rows += rng.choice(
                inside, count[h], replace=False, p=traffic[inside] / traffic[inside].sum()
            ).tolist()
            weights += [share[h] / count[h]] * count[h]
    return rows, weights


def pins_of(found, settings, rng):
    """Pins of a query for people: the tops of BM25 and student in turn, and some from further down. found:
    the ranker's Scores of all pins, best first."""
    by_bm25 = np.argsort(-found.match["bm25"], kind="stable").tolist()
    tops = [row for both in zip(range(len(found.pins)), by_bm25) for row in both]
    order = np.array(list(dict.fromkeys(tops)))
    below = round(settings.further * settings.pins)
    top, rest = np.split(order, [settings.pins - below])
    chosen = [*top, *rng.permutation(rest)[:below]]
    return [found.pins[row] for row in rng.permutation(chosen)]  # people must not see the order of a system


def main(argv=None):
    settings = parse({"toy": Settings()}, argv, __doc__)
    quiet_libraries()
    features, rng = settings.run / "features", np.random.default_rng(settings.seed)
    ranker = Ranker(settings.run)
    queries = pq.read_table(features / "queries.parquet")
    labelled = pq.read_table(features / "labelled.parquet", columns=["query_index"])["query_index"].unique()
    keys = np.array([query_key(text) for text in queries["query"].to_pylist()], object)
    open_to = ~np.isin(keys, keys[labelled.to_numpy()])
    traffic = traffic_of(settings.run, len(queries))
    stratum = strata_of(queries, traffic, settings.strata)
    rows, weights = draw(stratum, traffic, open_to, settings.queries, rng)
    print(f"{len(rows):,} of {(open_to & (traffic > 0)).sum():,} queries that are shown and have no label")
    with whole_file(settings.out) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(("query_id", "pin_id", "query", "stratum", "weight"))
        for row, weight in zip(progress_bar(iterable=rows, desc="queries", unit=""), weights):
            about = queries.slice(row, 1).to_pylist()[0]
            for pin_id in pins_of(ranker.rank(about["query"]), settings, rng):
                lines.writerow((about["query_id"], pin_id, about["query"], stratum[row], f"{weight:.6g}"))
    print(f"wrote {settings.out}")


if __name__ == "__main__":
    run_main(main)
