"""Do the judge's intervals hold? Two rankings of a run's evaluation queries, whose pins people have labelled.

    python experiments/judge_coverage.py --run outputs/msrd --rankings bm25 text_cosine

Truth: the mean difference of the two rankings under people's labels, over all evaluation queries. Repeated
many times: some queries, drawn at random, have people's labels, as many others as the run has the judge's
alone; both with replacement, as if there were many more. Coverage: how often the 95 % interval holds the
truth, of people alone, of the judge alone, and of the judge corrected by people (experiments/estimates.py).
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import NUM_LEVELS  # noqa: E402
from experiments import estimates  # noqa: E402
from lib.inputs.pairs import read_labelled  # noqa: E402
from lib.results.report import markdown_table  # noqa: E402
from lib.stages.settings import ROOT, Count, Size, parse  # noqa: E402
from lib.stages.terminal import run_main  # noqa: E402


@dataclass(frozen=True)
class Settings:
    """Settings of the study."""

    run: Path = ROOT / "outputs" / "toy"  # a run through stage 03
    rankings: tuple[str, str] = ("bm25", "text_cosine")  # match features; "A+B": the sum of their ranks
    people: tuple[Count, ...] = (30, 60, 120)  # queries that people judge
    top: Count = 10  # places that count
    repetitions: Count = 500
    seed: Size = 0  # of the draws


def ranks(values, query):
    """Place of each row [N] in its query by descending values, from 0."""
    order = np.lexsort((-values, query))
    _, start, size = np.unique(query[order], return_index=True, return_counts=True)
    place = np.empty(len(query), np.int64)
    place[order] = np.arange(len(query)) - np.repeat(start, size)
    return place


def ranking(rows, name):
    """Places of the rows [N] by a match feature, or by the sum of the places by several."""
    places = [ranks(rows[part], rows["query_index"]) for part in name.split("+")]
    return places[0] if len(places) == 1 else ranks(-sum(places).astype(float), rows["query_index"])


def differences(rows, rankings, top, p, how):
    """nDCG@top of the second ranking less the first, for each query [Q]; NaN where no pin has a gain."""
    queries, of_row = np.unique(rows["query_index"], return_inverse=True)
    gain, relevant = estimates.gains(p, how)
    judged = np.full((len(queries), np.bincount(of_row).max()), -1)
    judged[of_row, ranks(np.zeros(len(of_row)), rows["query_index"])] = np.arange(len(of_row))
    values = []
    for name in rankings:
        place = ranking(rows, name)
        pairs = np.full((len(queries), top), -1)
        pairs[of_row[place < top], place[place < top]] = np.flatnonzero(place < top)
        values.append(estimates.list_metrics(pairs, judged, gain, relevant)["ndcg"])
    return values[1] - values[0]


def study(people, judge, n, settings):
    """{way: (mean, coverage, mean width, mean lambda)} with n queries that people have judged. people, judge
    [Q]: differences of the same queries under their labels."""
    rng, found = np.random.default_rng([settings.seed, n]), {}
    for _ in range(settings.repetitions):
        some, others = rng.integers(0, len(people), n), rng.integers(0, len(people), len(people))
        corrected, tuned = estimates.corrected_mean(people[some], judge[some], judge[others])
        made = {"people alone": (estimates.mean(people[some]), 0)}
        made["judge alone"] = estimates.mean(judge[others]), 1
        for way, (one, weight) in {**made, "corrected": (corrected, tuned)}.items():
            holds = one.low <= people.mean() <= one.high
            found.setdefault(way, []).append((one.value, holds, one.high - one.low, weight))
    return {way: np.mean(rows, axis=0) for way, rows in found.items()}


def main(argv=None):
    settings = parse({"toy": Settings()}, argv, __doc__)
    _, rows = read_labelled(settings.run)
    how, _ = estimates.nearer(rows["label"], rows["teacher"], rows["query_index"])
    of_people, options = np.eye(NUM_LEVELS)[rows["label"] - 1], (rows, settings.rankings, settings.top)
    people, judge = differences(*options, of_people, "probable"), differences(*options, rows["teacher"], how)
    both = np.isfinite(people) & np.isfinite(judge)
    people, judge = people[both], judge[both]
    correlation = np.corrcoef(people, judge)[0, 1]
    print(f"{' against '.join(settings.rankings)}, nDCG@{settings.top}: {both.sum():,} queries, {how} gain")
    of_judge = f"the judge {judge.mean():+.4f}, correlation of the queries {correlation:.2f}"
    print(f"truth {people.mean():+.4f}; {of_judge}")
    lines = []
    for n in settings.people:
        for way, (value, coverage, width, tuned) in study(people, judge, n, settings).items():
            lines.append([str(n), way, f"{value:+.4f}", f"{coverage:.1%}", f"{width:.4f}", f"{tuned:.2f}"])
    head = ["queries of people", "figures of", "mean", "coverage", "width", "weight of the judge"]
    print("\n".join(markdown_table(head, lines)))


if __name__ == "__main__":
    run_main(main)
