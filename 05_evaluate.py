"""Stage 05: every system against the human labels of the evaluation queries.

Paper: the offline evaluation (accuracy on five levels, AUROC at levels 3, 4, 5), and nDCG@20, its online
relevance metric. Intervals are 95 % bootstrap intervals over queries.

Reads   RUN/features/, RUN/labels/labelled.parquet, RUN/teacher/stage.json, every RUN/student*/
Writes  RUN/report/     metrics.json, temperatures.json, report.md, plots as PNG;
                        queries.csv, every evaluation query by every system;
                        cards/NAME.md, the models' cards with their metrics

Toy     python 05_evaluate.py
Paper   python 05_evaluate.py --preset paper --run /runs/search

Shapes: B rows (pairs of query and pin with a human label), Q queries, C = 5 levels.
"""

import re
from dataclasses import dataclass, replace
from typing import Annotated, NamedTuple

import numpy as np
import torch
from sklearn.metrics import ndcg_score

from common import NUM_LEVELS, THRESHOLDS, Student, at_least, at_temperature, expected_level
from lib.inputs.inherited import require_systems, students_of
from lib.inputs.match import match_names
from lib.inputs.pairs import read_labelled
from lib.inputs.pool import POOL
from lib.inputs.regression import fit_regression, one_hot, stacked
from lib.inputs.student_inputs import StudentInputs
from lib.results import cards, pictures, queries, report
from lib.results.temperatures import fit_temperatures
from lib.stages.files import write_json
from lib.stages.settings import Range, Size, StageSettings, parse
from lib.stages.stage import Stage
from lib.stages.terminal import Stop, run_main


@dataclass(frozen=True)
class Settings(StageSettings):
    """Settings of stage 05."""

    resamples: Annotated[int, Range(2, 10**9)] = 1_000  # bootstrap resamples of the queries
    search_pages: Size = 4  # queries shown as pictures: pins ranked by BM25, student, teacher
    gains: str = ""  # 5=1,4=0.1,3=0.01: adds nDCG of whole lists with these gains of levels, and macro-F1
    seed: Size = 0  # of the bootstrap


TOY = Settings()
SMALL = replace(TOY, preset="small")
PAPER = replace(TOY, preset="paper", search_pages=10)  # our choice
PRESETS = {"toy": TOY, "small": SMALL, "paper": PAPER}
READS = ("pins.parquet", "queries.parquet", "labelled.parquet", "*_embedding.npy", POOL)  # features/, labels/
GAINS = 2.0 ** np.arange(NUM_LEVELS) - 1  # Burges et al., 2005, with the lowest level at gain 0


# ------------------------------------------------------------------------------------------------------------
# Metrics. y: labels [B] in 1..5; p: probabilities [B, C]; w: weight of each row [B], its query's count in a
# bootstrap resample


def predicted_level(p):
    """The most probable level of each row [B]."""
    return p.argmax(1) + 1


def accuracy(y, p, w):
    """Share of rows whose most probable level is the label."""
    return np.average(predicted_level(p) == y, weights=w)


def within_one(y, p, w):
    """Share of rows whose most probable level is at most one off."""
    distance = np.abs(predicted_level(p) - y)
    return np.average(distance <= 1, weights=w)


def ranked(score):
    """Score [B] -> row order from low to high, and for each place the number of its group of equal scores:
    what auroc() needs, sorted once for all resamples."""
    order = np.argsort(score, kind="stable")
    rises = np.diff(score[order]) > 0
    return order, np.concatenate([[0], np.cumsum(rises)])


def auroc(positive, ranks, w):
    """Area under the ROC curve: the chance that a positive row scores above a negative one, ties half.
    ranks: ranked(score). NaN without both kinds."""
    order, group = ranks
    pos = np.bincount(group, (w * positive)[order])
    neg = np.bincount(group, (w * ~positive)[order])
    pairs = pos.sum() * neg.sum()
    if pairs == 0:
        return np.nan
    below = np.cumsum(neg) - neg / 2
    return (pos * below).sum() / pairs


def macro_f1(y, p, w):
    """Mean F1 of the most probable level over the levels that are labels. (Micro-F1 is the accuracy.)"""
    guess = predicted_level(p)
    right = np.bincount(y, w * (guess == y), minlength=NUM_LEVELS + 1)
    labelled, guessed = (np.bincount(level, w, minlength=NUM_LEVELS + 1) for level in (y, guess))
    there = labelled > 0
    return (2 * right[there] / (labelled + guessed)[there]).mean()


def ndcg(y, score, k=20, gains=GAINS):
    """nDCG@k of one query's rows, k None: of all; gains: of the levels [C]. Rows of equal score share the
    mean gain of the places they take. NaN where no row has a gain."""
    gain = gains[y - 1]
    if gain.max() == 0:
        return np.nan
    return ndcg_score([gain], [score], k=k, ignore_ties=False) if len(y) > 1 else 1.0


def ece(y, p, w, bins=15):
    """Expected calibration error of the most probable level, equal-width bins of confidence, closed on the
    right (Guo et al., 2017, eq. 3)."""
    confidence = p.max(1)
    right = predicted_level(p) == y
    edges = np.arange(1, bins) / bins
    bin_of = np.searchsorted(edges, confidence)
    gaps = np.bincount(bin_of, w * (confidence - right), minlength=bins)
    return np.abs(gaps).sum() / w.sum()


def kl(teacher, p, w):
    """Mean KL(teacher || p), natural logarithm."""
    t = np.maximum(teacher.astype(np.float64), 1e-12)
    p = np.maximum(p.astype(np.float64), 1e-12)
    divergence = (t * np.log(t / p)).sum(1)
    return np.average(divergence, weights=w)


def mean_ndcg(of_queries, weight):
    """nDCG and weight of each query [Q] -> mean over those that have a gain; NaN if none has."""
    gains = np.isfinite(of_queries) & (weight > 0)
    return np.average(of_queries[gains], weights=weight[gains]) if gains.any() else np.nan


class Measured:
    """One system on B rows of Q queries: its metrics under any weights of the queries."""

    def __init__(self, y, p, score, query, teacher=None, gains=None):
        self.y, self.p, self.teacher = y, p, teacher
        _, self.query, sizes = np.unique(query, return_inverse=True, return_counts=True)  # [B] below Q, [Q]
        by_query = np.argsort(self.query, kind="stable")
        rows_of = np.split(by_query, np.cumsum(sizes)[:-1])
        self.ndcg = {"ndcg_20": np.array([ndcg(y[rows], score[rows]) for rows in rows_of])}
        if gains is not None:
            self.ndcg["ndcg"] = np.array([ndcg(y[rows], score[rows], None, gains) for rows in rows_of])
        self.ranks = {}
        for level in THRESHOLDS:
            self.ranks[level] = ranked(at_least(p, level))

    def metrics(self, weight):
        """Weight of each query [Q] -> {metric: value}."""
        w = weight[self.query]
        out = {"accuracy": accuracy(self.y, self.p, w)}
        out["within_one"] = within_one(self.y, self.p, w)
        for level, ranks in self.ranks.items():
            out[f"auroc_{level}"] = auroc(self.y >= level, ranks, w)
        for name, of_queries in self.ndcg.items():
            out[name] = mean_ndcg(of_queries, weight)
        if "ndcg" in self.ndcg:
            out["macro_f1"] = macro_f1(self.y, self.p, w)
        out["ece"] = ece(self.y, self.p, w)
        if self.teacher is not None:
            out["kl_to_teacher"] = kl(self.teacher, self.p, w)
        return out

    def bootstrap(self, resamples, seed):
        """Every metric's value, and its values on the resamples [R] of the queries: two dicts. The resamples
        depend on the seed and the number of queries alone: systems are compared on the same ones."""
        n = len(self.ndcg["ndcg_20"])
        value = self.metrics(np.ones(n))
        rng = np.random.default_rng(seed)
        drawn = {name: np.empty(resamples) for name in value}
        for resample in range(resamples):
            queries = rng.integers(0, n, n)
            weight = np.bincount(queries, minlength=n).astype(float)
            for name, found in self.metrics(weight).items():
                drawn[name][resample] = found
        return value, drawn


class Interval(NamedTuple):
    """A metric's value and its 95 % interval; None where it does not exist."""

    value: float | None
    low: float | None
    high: float | None


def interval(value, sample):
    """95 % percentile bootstrap interval (Efron and Tibshirani, 1993, section 13.3). sample: the values on
    the resamples [R]."""
    sample = sample[np.isfinite(sample)]
    low, high = np.percentile(sample, [2.5, 97.5]) if len(sample) else (np.nan, np.nan)
    found = []
    for number in (value, low, high):
        found.append(round(float(number), 6) if np.isfinite(number) else None)
    return Interval(*found)


def gains_of(text):
    """'5=1,4=0.1' -> gains [C] of the levels, 0 where none is given; '': None."""
    gains = np.zeros(NUM_LEVELS)
    for part in text.split(",") if text else ():
        found = re.fullmatch(r"\s*([1-5])=(\d+\.?\d*)\s*", part)
        if not found:
            raise Stop(f"--gains {text}: write LEVEL=GAIN,…, levels 1 to 5: 5=1,4=0.1,3=0.01")
        gains[int(found[1]) - 1] = float(found[2])
    return gains if text else None


def measure(systems, rows, levels, resamples, seed, gains=None):
    """All metrics of all systems, overall and by language: {(system, language, metric): Interval}; and
    differences(), overall."""
    table, overall, shown = {}, {}, report.meaningful(levels)
    groups = {report.ALL: np.full(len(rows["label"]), True)}
    for language in sorted(set(rows["language"])):
        groups[language] = rows["language"] == language
    for system, (p, score) in systems.items():
        for language, some in groups.items():
            y, query = rows["label"][some], rows["query_index"][some]
            teacher = rows["learnt"][some] if system.startswith("student") else None
            measured = Measured(y, p[some], score[some], query, teacher, gains)
            value, drawn = measured.bootstrap(resamples, seed)
            for metric in value:
                if metric in shown:
                    table[system, language, metric] = interval(value[metric], drawn[metric])
            if language == report.ALL:
                overall[system] = value, drawn
    auroc = next((name for name in report.AUROCS if name in shown), None)
    return table, differences(overall, [name for name in (auroc, "ndcg_20") if name])


def differences(overall, metrics):
    """What training brings: every trained system less each untrained one, student and teacher less the
    student on human labels, the teacher less the student: {(system, other, metric): Interval}, on the same
    resamples of the queries for both. overall: {system: (values, values on resamples)}."""
    found = {}
    for metric in metrics:
        value = {system: values[metric] for system, (values, _) in overall.items()}
        trained = [name for name in value if name not in ("majority", *report.UNTRAINED)]
        pairs = [(name, other) for name in trained for other in report.UNTRAINED]
        pairs += [(name, "student_human_labels") for name in ("student", "teacher", "pooled")]
        pairs += [("teacher", "student"), ("pooled", "teacher")]
        for first, second in pairs:
            if first in overall and second in overall:
                drawn = [overall[name][1][metric] for name in (first, second)]
                found[first, second, metric] = interval(value[first] - value[second], drawn[0] - drawn[1])
    return found


# ------------------------------------------------------------------------------------------------------------
# Systems: probabilities [B, C] and ranking score [B] on the evaluation rows


def majority_system(train_labels, rows):
    """The shares of the levels among the training labels, for every row."""
    counts = np.bincount(train_labels - 1, minlength=NUM_LEVELS)
    shares = counts / len(train_labels)
    return np.tile(shares, (rows, 1)), np.zeros(rows)


def bm25_system(train, evaluation):
    """Ranks by BM25. Its probabilities: regression of the human training labels on the BM25 score and whether
    it is 0."""

    def inputs(rows):
        return np.stack([rows["bm25"], rows["bm25"] > 0], axis=1)

    p = fit_regression(inputs(train), one_hot(train["label"])).probabilities(inputs(evaluation))
    return p, evaluation["bm25"].astype(np.float64)


def embedding_system(train, evaluation):
    """Ranks by the cosine of the text encoder's embeddings of query and pin, as it came. Its probabilities:
    regression of the human training labels on the cosine. (The paper's baseline is an embedding, too.)"""
    p, _ = match_system(["text_cosine"], train, evaluation)
    return p, evaluation["text_cosine"].astype(np.float64)


def match_system(names, train, evaluation):
    """Regression of the human training labels on match features of these names."""
    regression = fit_regression(stacked(train, names), one_hot(train["label"]))
    p = regression.probabilities(stacked(evaluation, names))
    return p, expected_level(p)


@torch.inference_mode()
def student_system(folder, features, rows, chunk=16_384):
    """The student in `folder` on rows (dict of arrays)."""
    student = Student.load(folder)
    inputs = StudentInputs(features, student.spec)
    match = stacked(rows, student.spec["match"]).astype(np.float32)
    p = np.empty((len(match), NUM_LEVELS))
    for start in range(0, len(match), chunk):
        some = slice(start, start + chunk)
        logits = student(inputs.gather(rows["query_index"][some], rows["pin_index"][some], match[some]))
        p[some] = logits.double().softmax(1).numpy()
    return p, expected_level(p)


def trained_system(run, name, rows):
    """The teacher, alone or pooled, or the student in RUN/NAME, on rows."""
    if name in ("teacher", "pooled"):
        return rows[name], expected_level(rows[name])
    return student_system(run / name, run / "features", rows)


def all_systems(run, students, train, evaluation):
    """{name: (probabilities [B, C], ranking score [B])}, weakest kind first. students: names of folders."""
    systems = {"majority": majority_system(train["label"], len(evaluation["label"]))}
    systems["bm25"] = bm25_system(train, evaluation)
    systems["embedding"] = embedding_system(train, evaluation)
    names = match_names(run / "features" / "labelled.parquet")
    systems["match"] = match_system(names, train, evaluation)
    for name in [*students, "teacher", *(["pooled"] if "pooled" in train else [])]:
        systems[name] = trained_system(run, name, evaluation)
    return systems


def calibrated(systems, temperatures, y, query, settings):
    """The trained systems' probabilities at their temperatures, {name: [B, C]}. Notes in `temperatures` the
    expected calibration errors before and after, with intervals."""
    scaled = {}
    for name, fitted in temperatures.items():
        p = systems[name][0]
        scaled[name] = at_temperature(torch.from_numpy(p), fitted["temperature"]).numpy()
        for error, probabilities in (("ece", p), ("ece_at_temperature", scaled[name])):
            measured = Measured(y, probabilities, expected_level(probabilities), query)
            value, drawn = measured.bootstrap(settings.resamples, settings.seed)
            fitted[error] = interval(value["ece"], drawn["ece"])._asdict()
    return scaled


# ------------------------------------------------------------------------------------------------------------


def main(argv=None):
    # 1. Settings, what is inherited, and the folder
    settings = parse(PRESETS, argv, __doc__)
    run, gains = settings.run, gains_of(settings.gains)
    read = require_systems(run, READS)
    identities = {folder: about["identity"] for folder, about in read.items()}
    stage = Stage(run / "report", settings, identities)
    if stage.done:
        return

    # 2. Systems on the evaluation rows
    train, evaluation = read_labelled(run)
    systems = all_systems(run, students_of(read), train, evaluation)
    y, query = evaluation["label"], evaluation["query_index"]
    counts = {"rows": len(y), "queries": len(np.unique(query))}
    print(f"evaluation: {counts['rows']:,} rows of {counts['queries']:,} queries")
    for line in report.few_queries(counts["queries"]):
        print(line)

    # 3. Temperatures
    temperatures = fit_temperatures(read, train, run, trained_system)
    scaled = calibrated(systems, temperatures, y, query, settings)

    # 4. Metrics
    levels = np.union1d(train["label"], y)
    table, compared = measure(systems, evaluation, levels, settings.resamples, settings.seed, gains)
    write_json(stage.folder / "metrics.json", report.nested(table, compared))
    write_json(stage.folder / "temperatures.json", temperatures)
    print("\n".join(report.summary(table, compared)))

    # 5. Plots, pages of search results, report.md
    pictures.plots(table, y, systems, scaled, levels, stage.folder)
    each = queries.one_by_one(run / "features", evaluation, ndcg, systems)
    queries.write_csv(each, stage.folder / "queries.csv")
    shown = queries.for_pages(each, settings.search_pages)
    pages = pictures.search_pages(run, evaluation, systems, shown, stage.folder)
    facts = report.facts(read, evaluation)
    one_by_one = queries.worst(each, systems)
    text = report.report(table, compared, facts, temperatures, evaluation, one_by_one, pages)
    (stage.folder / "report.md").write_text(text, encoding="utf-8")
    cards.write_cards(run, read, table, stage.folder / "cards")
    stage.finish(rows=counts)
    print(f"report: {stage.place / 'report.md'}")


if __name__ == "__main__":
    run_main(main)
