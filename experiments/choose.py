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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lib.inputs.pairs import PairFiles  # noqa: E402
from lib.models import quiet_libraries  # noqa: E402
from lib.stages.files import whole_file  # noqa: E402
from lib.stages.settings import ROOT, Count, Share, Size, parse  # noqa: E402
from lib.stages.terminal import Stop, run_main  # noqa: E402
from lib.tables.files import plain_cell  # noqa: E402
from serving.ranker import Ranker  # noqa: E402


@dataclass(frozen=True)
class Settings:
    """Settings of the draw."""

    run: Path = ROOT / "outputs" / "toy"  # run directory, through stage 04
    queries: Count = 100  # to be drawn
    pins: Count = 20  # of each query
    further: Share = 0.2  # share of the pins from below the tops
    strata: tuple[str, ...] = ("language",)  # columns of queries; popularity: traffic in thirds
    out: Path = Path("queue.csv")  # the queue
    seed: Size = 0  # of the draw


def popularity(traffic):
    """Traffic of queries, a pandas column -> head, torso, tail: thirds of the traffic, not of the queries."""
    ranked = traffic.sort_values(ascending=False, kind="stable")
    before = (ranked.cumsum() - ranked) / traffic.sum()
    return pd.cut(before, [-1, 1 / 3, 2 / 3, 1], right=False, labels=["head", "torso", "tail"])


def draw(queries, n, rng):
    """Draws n queries of a table with stratum and traffic: of each stratum its share of the traffic, in it by
    traffic (Efraimidis and Spirakis, 2006). Adds their weight, the share of the traffic each stands for."""
    stratum, traffic = queries["stratum"], queries["traffic"]
    share = traffic.groupby(stratum).transform("sum") / traffic.sum()
    key = rng.exponential(size=len(queries)) / traffic
    turn = (key.groupby(stratum).rank() - 0.5) / share  # strata take turns by their shares (Sainte-Laguë)
    first = turn.nsmallest(n).index
    drawn = queries.assign(weight=share).loc[first]
    drawn["weight"] /= drawn.groupby("stratum")["weight"].transform("size")
    return drawn


def pins_of(found, settings, rng):
    """Pins of a query for people: the tops of BM25 and student in turn, and some from further down. found:
    the ranker's Scores of all pins, best first."""
    top, turn = settings.pins - round(settings.further * settings.pins), found.in_turn()
    turn[top:] = rng.permutation(turn[top:])
    chosen = rng.permutation(turn[: settings.pins])  # people must not see the order of a system
    return [found.pins[row] for row in chosen]


def write_queue(drawn, path):
    """Queries with their pins -> a line a pair; no text is a formula to a spreadsheet."""
    queue = drawn.explode("pin_id")[["query_id", "pin_id", "query", "stratum", "weight"]]
    for name in ("query", "stratum"):
        queue[name] = queue[name].map(plain_cell)
    with whole_file(path) as temporary:
        queue.to_csv(temporary, index=False, float_format="%.6g")


def main(argv=None):
    settings = parse({"toy": Settings()}, argv, __doc__)
    quiet_libraries()
    rng = np.random.default_rng(settings.seed)
    ranker, files = Ranker(settings.run), PairFiles(settings.run)
    queries = pd.read_parquet(settings.run / "features" / "queries.parquet")
    queries["traffic"] = sum(files.count(path) for path in files.shards)
    queries["popularity"] = popularity(queries["traffic"])
    for name in settings.strata:
        if name not in queries:
            raise Stop(f"--strata {name}: no column of queries; there are {', '.join(queries)}")
    queries["stratum"] = queries[[*settings.strata]].map(str).agg(" / ".join, axis=1)
    keys, (labelled, *_) = pd.Series(files.keys), files.labelled()
    is_open = (queries["traffic"] > 0) & ~keys.isin(keys[labelled["query"]])
    drawn = draw(queries[is_open], settings.queries, rng)
    print(f"{len(drawn):,} of {is_open.sum():,} queries that are shown and have no label")
    drawn["pin_id"] = [pins_of(ranker.rank(text), settings, rng) for text in drawn["query"]]
    write_queue(drawn, settings.out)
    print(f"wrote {settings.out}")


if __name__ == "__main__":
    run_main(main)
