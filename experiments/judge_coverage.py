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
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
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


def differences(rows, rankings, top, p, how):
    """nDCG@top of the second ranking less the first, by query [Q]; NaN where no pin has a gain."""
    gain, relevant = estimates.gains(p, how)
    judged = pd.DataFrame({"query": rows["query_index"], "gain": gain, "relevant": relevant})
    found = []
    for ranking in rankings:
        places = 0
        for name in ranking.split("+"):
            score = pd.Series(-rows[name].astype(float))
            places += score.groupby(judged["query"]).rank("first")
        place = places.groupby(judged["query"]).rank("first")
        shown = judged.assign(rank=place.astype(int) - 1)
        shown = shown[shown["rank"] < top]
        metrics = estimates.list_metrics(shown, judged, top)
        found.append(metrics["ndcg"])
    return (found[1] - found[0]).to_numpy()


def study(people, judge, n, settings):
    """Table of value, holds, width, weight (of the judge): means over the repetitions by way, with n queries
    that people have judged. people, judge [Q]: differences of the same queries under their labels."""
    rng, found = np.random.default_rng([settings.seed, n]), []
    for _ in range(settings.repetitions):
        some = rng.integers(0, len(people), n)
        others = judge[rng.integers(0, len(people), len(people))]
        corrected, tuned = estimates.corrected_mean(people[some], judge[some], others)
        ways = [
            ("people alone", estimates.mean(people[some]), 0),
            ("judge alone", estimates.mean(others), 1),
            ("corrected", corrected, tuned),
        ]
        for way, one, weight in ways:
            holds = one.low <= people.mean() <= one.high
            found.append((way, one.value, holds, one.high - one.low, weight))
    table = pd.DataFrame(found, columns=["way", "value", "holds", "width", "weight"])
    return table.groupby("way", sort=False).mean()


def main(argv=None):
    settings = parse({"toy": Settings()}, argv, __doc__)
    _, rows = read_labelled(settings.run)
    how, _ = estimates.nearer(rows["label"], rows["teacher"], rows["query_index"])
    options = rows, settings.rankings, settings.top
    people = differences(*options, estimates.certain(rows["label"]), "probable")
    judge = differences(*options, rows["teacher"], how)
    both = np.isfinite(people) & np.isfinite(judge)
    people, judge = people[both], judge[both]
    correlation = np.corrcoef(people, judge)[0, 1]
    compared = " against ".join(settings.rankings)
    print(f"{compared}, nDCG@{settings.top}: {both.sum():,} queries, {how} gain")
    print(f"truth {people.mean():+.4f}, the judge {judge.mean():+.4f}, correlation {correlation:.2f}")
    lines = []
    for n in settings.people:
        for way, m in study(people, judge, n, settings).iterrows():
            figures = f"{m.value:+.4f}", f"{m.holds:.1%}", f"{m.width:.4f}", f"{m.weight:.2f}"
            lines.append([str(n), way, *figures])
    head = ["queries of people", "figures of", "mean", "coverage", "width", "weight of the judge"]
    print("\n".join(markdown_table(head, lines)))


if __name__ == "__main__":
    run_main(main)
