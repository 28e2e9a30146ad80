"""Stage 05: every system against the human labels of the evaluation queries.

Paper: the offline evaluation (accuracy on five levels, AUROC at levels 3, 4, 5), and nDCG@20, its online
relevance metric. Intervals are 95 % bootstrap intervals over queries.

Reads   RUN/features/, RUN/labels/labelled.parquet, RUN/teacher/stage.json, every RUN/student*/
Writes  RUN/report/     metrics.json, temperatures.json, report.md, plots as PNG;
                        cards/NAME.md, the models' cards with their metrics

Toy     python 05_evaluate.py
Paper   python 05_evaluate.py --preset paper --run /runs/search

Shapes: B rows (pairs of query and pin with a human label), Q queries, C = 5 levels.
"""

from dataclasses import dataclass, replace
from typing import Annotated, NamedTuple

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import ndcg_score

from common import NUM_LEVELS, Student, StudentInputs
from data.splits import in_hash_split
from runs import cards, pictures, report
from runs.files import write_json
from runs.inherited import require_systems, students_of
from runs.pairs import read_labelled
from runs.settings import Range, Size, StageSettings, parse
from runs.stage import Stage
from runs.terminal import run_main


@dataclass(frozen=True)
class Settings(StageSettings):
    """What stage 05 is told."""

    resamples: Annotated[int, Range(2, 10**9)] = 1_000  # bootstrap resamples of the queries
    search_pages: Size = 4  # queries shown as pictures: pins ranked by BM25, student, teacher
    temperatures: bool = False  # measure probabilities at the temperatures fitted on held-out queries
    seed: Size = 0  # of the bootstrap


TOY = Settings()
SMALL = replace(TOY, preset="small")
PAPER = replace(TOY, preset="paper", search_pages=10)  # our choice
PRESETS = {"toy": TOY, "small": SMALL, "paper": PAPER}
READS = ("pins.parquet", "queries.parquet", "labelled.parquet", "*_embedding.npy")  # of features/ and labels/


# ------------------------------------------------------------------------------------------------------------
# Metrics. y: labels [B] in 1..5; p: probabilities [B, C]; w: weight of each row [B], its query's count in a
# bootstrap resample


def accuracy(y, p, w):
    """Share of rows whose most probable level is the label."""
    return np.average(p.argmax(1) + 1 == y, weights=w)


def within_one(y, p, w):
    """Share of rows whose most probable level is at most one off."""
    return np.average(np.abs(p.argmax(1) + 1 - y) <= 1, weights=w)


def ranked(score):
    """Score [B] -> row order from low to high, and for each place the number of its group of equal scores:
    what auroc() needs, sorted once for all resamples."""
    order = np.argsort(score, kind="stable")
    return order, np.concatenate([[0], np.cumsum(np.diff(score[order]) > 0)])


def auroc(positive, ranks, w):
    """Area under the ROC curve: the chance that a positive row scores above a negative one, ties half.
    ranks: ranked(score). NaN without both kinds."""
    order, group = ranks
    pos = np.bincount(group, (w * positive)[order])
    neg = np.bincount(group, (w * ~positive)[order])
    if pos.sum() == 0 or neg.sum() == 0:
        return np.nan
    below = np.cumsum(neg) - neg / 2
    return (pos * below).sum() / (pos.sum() * neg.sum())


def ndcg(y, score, k=20):
    """nDCG@k of one query's rows, gain 2^(label-1) - 1 (Burges et al., 2005, with the lowest level at gain
    0). Rows of equal score share the mean gain of the places they take. NaN where no row has a gain."""
    gain = 2.0 ** (y - 1) - 1
    if gain.max() == 0:
        return np.nan
    return ndcg_score([gain], [score], k=k, ignore_ties=False) if len(y) > 1 else 1.0


def ece(y, p, w, bins=15):
    """Expected calibration error of the most probable level, equal-width bins of confidence, closed on the
    right (Guo et al., 2017, eq. 3)."""
    confidence, right = p.max(1), p.argmax(1) + 1 == y
    bin_of = np.searchsorted(np.arange(1, bins) / bins, confidence)
    return np.abs(np.bincount(bin_of, w * (confidence - right), minlength=bins)).sum() / w.sum()


def kl(teacher, p, w):
    """Mean KL(teacher || p), natural logarithm."""
    t, p = np.maximum(teacher.astype(np.float64), 1e-12), np.maximum(p.astype(np.float64), 1e-12)
    return np.average((t * np.log(t / p)).sum(1), weights=w)


def meaningful(levels):
    """Metrics that mean something where only these levels are in use; one of AUROCs that would tell the same
    levels apart."""
    found, splits = {"accuracy", "ndcg_20", "ece", "kl_to_teacher"}, set()
    if len(levels) > 2 and (np.diff(levels) == 1).any():
        found.add("within_one")
    for level in (4, 3, 5):
        above = sum(used >= level for used in levels)
        if 0 < above < len(levels) and above not in splits:
            found.add(f"auroc_{level}")
            splits.add(above)
    return found


class Measured:
    """One system on B rows of Q queries: its metrics under any weights of the queries."""

    def __init__(self, y, p, score, query, teacher=None):
        self.y, self.p, self.teacher = y, p, teacher
        queries, self.query = np.unique(query, return_inverse=True)  # [Q], [B] numbers below Q
        rows_of = np.split(np.argsort(self.query, kind="stable"), np.cumsum(np.bincount(self.query))[:-1])
        self.query_ndcg = np.array([ndcg(y[rows], score[rows]) for rows in rows_of])
        self.ranks = {level: ranked(p[:, level - 1 :].sum(1)) for level in (3, 4, 5)}  # by P(label >= level)

    def metrics(self, weight):
        """Weight of each query [Q] -> {metric: value}."""
        w = weight[self.query]
        out = {"accuracy": accuracy(self.y, self.p, w), "within_one": within_one(self.y, self.p, w)}
        for level, ranks in self.ranks.items():
            out[f"auroc_{level}"] = auroc(self.y >= level, ranks, w)
        gains = np.isfinite(self.query_ndcg) & (weight > 0)
        found = gains.any()
        out["ndcg_20"] = np.average(self.query_ndcg[gains], weights=weight[gains]) if found else np.nan
        out["ece"] = ece(self.y, self.p, w)
        if self.teacher is not None:
            out["kl_to_teacher"] = kl(self.teacher, self.p, w)
        return out

    def bootstrap(self, resamples, seed):
        """Every metric's value, and its values on the resamples [R] of the queries: two dicts. The resamples
        depend on the seed and the number of queries alone: systems are compared on the same ones."""
        n = len(self.query_ndcg)
        value = self.metrics(np.ones(n))
        rng = np.random.default_rng(seed)
        drawn = {name: np.empty(resamples) for name in value}
        for resample in range(resamples):
            count = np.bincount(rng.integers(0, n, n), minlength=n).astype(float)
            for name, found in self.metrics(count).items():
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
    return Interval(*(round(float(v), 6) if np.isfinite(v) else None for v in (value, low, high)))


def measure(systems, rows, levels, resamples, seed):
    """All metrics of all systems, overall and by language: {(system, language, metric): Interval}."""
    table, means_something = {}, meaningful(levels)
    for system, (p, score) in systems.items():
        for language in [report.ALL, *sorted(set(rows["language"]))]:
            some = np.full(len(p), True) if language == report.ALL else rows["language"] == language
            teacher = rows["teacher"][some] if system.startswith("student") else None
            y, query = rows["label"][some], rows["query_index"][some]
            value, drawn = Measured(y, p[some], score[some], query, teacher).bootstrap(resamples, seed)
            for metric in value:
                if metric in means_something:
                    table[system, language, metric] = interval(value[metric], drawn[metric])
    return table


# ------------------------------------------------------------------------------------------------------------
# Probabilities to be trusted: one temperature, fitted on training queries that the system was not trained on


def at_temperature(p, temperature):
    """Probabilities [B, C] -> p^(1/T), normalized: the softmax of the logits divided by T."""
    log_p = np.log(np.maximum(p, 1e-12)) / temperature
    p = np.exp(log_p - log_p.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


def fit_temperature(y, p):
    """The temperature that makes labels [B] most probable (Guo et al., 2017, section 4.2)."""

    def loss(log_temperature):
        scaled = at_temperature(p, np.exp(log_temperature))
        return -np.log(scaled[np.arange(len(y)), y - 1]).mean()

    return float(np.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded").x))


def fit_temperatures(run, read, train):
    """{trained system: its temperature, and on how many rows of how many queries it was fitted}, of those
    whose stage has held queries out."""
    found = {}
    for name in [*students_of(read), "teacher"]:
        split = read.get(name, {}).get("held_out")
        held_out = in_hash_split(train["key"], **split) if split else np.zeros(1, bool)
        if not held_out.any():
            continue
        rows = {column: values[held_out] for column, values in train.items()}
        p = rows["teacher"]
        if name != "teacher":
            p, _ = student_system(run / name, run / "features", rows)
        temperature = round(fit_temperature(rows["label"], p), 4)
        queries = len(np.unique(rows["query_index"]))
        found[name] = {"temperature": temperature, "rows": len(p), "queries": queries}
    return found


def calibration_errors(y, p, scaled, query, settings):
    """Expected calibration error of probabilities before and after they are scaled, with intervals."""
    errors = {}
    for name, probabilities in (("ece", p), ("ece_at_temperature", scaled)):
        measured = Measured(y, probabilities, expected_level(probabilities), query)
        value, drawn = measured.bootstrap(settings.resamples, settings.seed)
        errors[name] = interval(value["ece"], drawn["ece"])._asdict()
    return errors


# ------------------------------------------------------------------------------------------------------------
# Systems: probabilities [B, C] and ranking score [B] on the evaluation rows


def expected_level(p):
    """Ranking score of a system that gives probabilities: the expected level."""
    return p.astype(np.float64) @ np.arange(1, NUM_LEVELS + 1)


def majority_system(train_labels, rows):
    """The shares of the levels among the training labels, for every row."""
    share = np.bincount(train_labels - 1, minlength=NUM_LEVELS) / len(train_labels)
    return np.tile(share, (rows, 1)), np.zeros(rows)


def bm25_system(train, evaluation):
    """Ranks by BM25. Its probabilities: multinomial logistic regression of the human training labels on the
    BM25 score and whether it is 0."""

    def inputs(rows):
        return np.stack([rows["bm25"] / 10, rows["bm25"] > 0], axis=1).astype(np.float64)

    levels = np.unique(train["label"])
    p = np.zeros((len(evaluation["label"]), NUM_LEVELS))
    if len(levels) == 1:
        p[:, levels[0] - 1] = 1
    else:
        model = LogisticRegression(C=100.0, max_iter=1_000).fit(inputs(train), train["label"])
        p[:, model.classes_ - 1] = model.predict_proba(inputs(evaluation))
    return p, evaluation["bm25"].astype(np.float64)


@torch.inference_mode()
def student_system(folder, features, rows, chunk=16_384):
    """The student in `folder` on rows (dict of arrays)."""
    student = Student.load(folder)
    inputs = StudentInputs(features, student.spec)
    match = np.stack([rows[name] for name in student.spec["match"]], axis=1).astype(np.float32)
    p = np.empty((len(match), NUM_LEVELS))
    for start in range(0, len(match), chunk):
        some = slice(start, start + chunk)
        columns = inputs.gather(rows["query_index"][some], rows["pin_index"][some])
        logits = student(*columns, torch.from_numpy(match[some]))
        p[some] = logits.double().softmax(1).numpy()
    return p, expected_level(p)


def all_systems(run, students, train, evaluation):
    """{name: (probabilities [B, C], ranking score [B])}, weakest kind first. students: names of folders."""
    systems = {
        "majority": majority_system(train["label"], len(evaluation["label"])),
        "bm25": bm25_system(train, evaluation),
    }
    for name in students:
        systems[name] = student_system(run / name, run / "features", evaluation)
    systems["teacher"] = (evaluation["teacher"], expected_level(evaluation["teacher"]))
    return systems


# ------------------------------------------------------------------------------------------------------------


def main(argv=None):
    # 1. Settings, what is inherited, and the folder
    settings = parse(PRESETS, argv, __doc__)
    run = settings.run
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

    # 3. Temperatures
    temperatures, scaled = fit_temperatures(run, read, train), {}
    for name, fitted in temperatures.items():
        p = systems[name][0]
        scaled[name] = at_temperature(p, fitted["temperature"])
        fitted |= calibration_errors(y, p, scaled[name], query, settings)
        if settings.temperatures:
            systems[name] = scaled[name], expected_level(scaled[name])

    # 4. Metrics
    levels = np.union1d(train["label"], y)
    table = measure(systems, evaluation, levels, settings.resamples, settings.seed)
    write_json(stage.work / "metrics.json", report.nested(table))
    write_json(stage.work / "temperatures.json", temperatures)
    print("\n".join(report.summary(table)))

    # 5. Plots, pages of search results, report.md
    shown = [name for name in ("student_human_labels", "student", "teacher") if name in systems]
    p = {name: systems[name][0] for name in shown}
    pictures.plot_accuracy(table, stage.work / "accuracy.png")
    pictures.plot_languages(table, stage.work / "accuracy_by_language.png")
    pictures.plot_confusion(y, p, levels, stage.work / "confusion.png")
    pictures.plot_reliability(y, p, scaled, stage.work / "reliability.png")
    pages = pictures.search_pages(run, evaluation, systems, settings.search_pages, stage.work)
    text = report.report(table, report.facts(run, read, evaluation), temperatures, evaluation, pages)
    (stage.work / "report.md").write_text(text, encoding="utf-8")
    cards.write_cards(run, table, counts, stage.work / "cards")
    stage.finish(rows=counts, temperatures=temperatures)
    print(f"report: {stage.folder / 'report.md'}")


if __name__ == "__main__":
    run_main(main)
