"""Stage 05: every system against the human labels of the evaluation queries.

Paper: the offline evaluation (accuracy on five levels, AUROC at levels 3, 4, 5), and nDCG@20, its online
relevance metric. Intervals are 95 % bootstrap intervals over queries.

Reads   RUN/features/, RUN/labels/labelled.parquet, every RUN/student*/
Writes  RUN/report/     metrics.json, report.md, plots as PNG

Toy     python 05_evaluate.py
Paper   python 05_evaluate.py --preset paper --run /runs/search

Shapes: B rows (pairs of query and pin with a human label), Q queries, C = 5 levels.
"""

from dataclasses import dataclass, replace
from typing import Annotated, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import ndcg_score

from common import MATCH_FEATURES, NUM_LEVELS, Student, StudentInputs
from runs import report
from runs.stage import Range, Size, Stage, StageSettings, Stop, parse, require_finished, run_main, write_json


@dataclass(frozen=True)
class Settings(StageSettings):
    """What stage 05 is told."""

    resamples: Annotated[int, Range(2)] = 1_000  # bootstrap resamples of the queries
    search_pages: Size = 4  # queries shown as pictures: pins ranked by BM25, student, teacher
    seed: Size = 0  # of the bootstrap


TOY = Settings()
PRESETS = {"toy": TOY, "small": TOY, "paper": replace(TOY, search_pages=10)}  # our choice
READS = ("pins.parquet", "queries.parquet", "labelled.parquet", "*_embedding.npy")  # of features/ and labels/

ALL = ""  # "language" of a metric over all rows


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
    """Expected calibration error of the most probable level, equal-width bins of confidence (Guo et al.,
    2017, eq. 3)."""
    confidence, right = p.max(1), p.argmax(1) + 1 == y
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    return np.abs(np.bincount(bin_of, w * (confidence - right), minlength=bins)).sum() / w.sum()


def kl(teacher, p, w):
    """Mean KL(teacher || p), natural logarithm."""
    t, p = np.maximum(teacher.astype(np.float64), 1e-12), np.maximum(p.astype(np.float64), 1e-12)
    return np.average((t * np.log(t / p)).sum(1), weights=w)


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


def measure(systems, rows, resamples, seed):
    """All metrics of all systems, overall and by language: {(system, language, metric): Interval}."""
    table = {}
    for system, (p, score) in systems.items():
        teacher = rows["teacher"] if system.startswith("student") else None
        for language in [report.ALL, *sorted(set(rows["language"]))]:
            at = np.ones(len(p), dtype=bool) if language == report.ALL else rows["language"] == language
            part = None if teacher is None else teacher[at]
            measured = Measured(rows["label"][at], p[at], score[at], rows["query_index"][at], part)
            value, drawn = measured.bootstrap(resamples, seed)
            for metric in value:
                table[system, language, metric] = interval(value[metric], drawn[metric])
    return table


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
    inputs, p = StudentInputs(features, student.spec), []
    match = torch.from_numpy(np.stack([rows[name] for name in MATCH_FEATURES], axis=1))
    for start in range(0, len(match), chunk):
        at = slice(start, start + chunk)
        logits = student(*inputs.gather(rows["query_index"][at], rows["pin_index"][at]), match[at])
        p.append(logits.double().softmax(1).numpy())
    p = np.concatenate(p)
    return p, expected_level(p)


def read_rows(run, teacher=True):
    """(train, evaluation) rows of labelled.parquet as dicts of arrays, with `language` and the teacher's p1 …
    p5 as `teacher` [B, C]."""
    table = pq.read_table(run / "features" / "labelled.parquet")
    rows = {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}
    rows["label"] = rows["label"].astype(np.int64)
    if teacher:
        labels = pq.read_table(run / "labels" / "labelled.parquet")
        p = [labels[f"p{level}"].to_numpy() for level in range(1, NUM_LEVELS + 1)]
        rows["teacher"] = np.stack(p, axis=1).astype(np.float64)
    languages = pq.read_table(run / "features" / "queries.parquet", columns=["language"])["language"]
    rows["language"] = np.array(languages.to_pylist(), dtype=object)[rows["query_index"]]
    splits = []
    for split in ("train", "eval"):
        splits.append({name: column[rows["split"] == split] for name, column in rows.items()})
    return splits


def all_systems(run, train, evaluation):
    """{name: (probabilities [B, C], ranking score [B])}, weakest kind first."""
    systems = {
        "majority": majority_system(train["label"], len(evaluation["label"])),
        "bm25": bm25_system(train, evaluation),
    }
    students = [folder.name for folder in run.glob("student*") if (folder / "stage.json").exists()]
    for name in sorted(students, key=lambda name: (name == "student", name)):
        systems[name] = student_system(run / name, run / "features", evaluation)
    systems["teacher"] = (evaluation["teacher"], expected_level(evaluation["teacher"]))
    return systems


# ------------------------------------------------------------------------------------------------------------
# Report


def nested(table):
    """The table in the shape of metrics.json: systems, overall or by language, metrics."""
    systems = {}
    for (system, language, metric), found in table.items():
        parts = systems.setdefault(system, {"overall": {}, "by_language": {}})
        part = parts["overall"] if language == report.ALL else parts["by_language"].setdefault(language, {})
        part[metric] = found._asdict()
    return {"systems": systems}


# ------------------------------------------------------------------------------------------------------------


def inherited(run):
    """What is read, checked: {folder: its stage.json} of features, labels, and every student."""
    read = {
        "features": require_finished(run / "features", f"01_build_features.py --run {run}", READS),
        "labels": require_finished(run / "labels", f"03_label.py --run {run}", READS),
    }
    for path in sorted(run.glob("student*/stage.json")):
        name, command = path.parent.name, f"04_train_student.py --run {run} --name {path.parent.name}"
        student = require_finished(path.parent, command)
        for folder, identity in student["inputs"].items():
            if identity != read[folder]["identity"]:
                raise Stop(f"{path.parent} was trained on other {folder}: run {command} --overwrite")
        read[name] = student
    if "student" not in read:
        raise Stop(f"{run / 'student'}: missing; make it with: python 04_train_student.py --run {run}")
    return read


def main(argv=None):
    # 1. Settings, what is inherited, and the folder
    settings = parse(PRESETS, argv, __doc__)
    run = settings.run
    read = inherited(run)
    identities = {folder: about["identity"] for folder, about in read.items()}
    stage = Stage(run / "report", settings, identities)
    if stage.done:
        return

    # 2. Systems on the evaluation rows
    train, evaluation = read_rows(run)
    systems = all_systems(run, train, evaluation)
    y = evaluation["label"]
    counts = {"rows": len(y), "queries": len(np.unique(evaluation["query_index"]))}
    print(f"evaluation: {counts['rows']:,} rows of {counts['queries']:,} queries")

    # 3. Metrics
    table = measure(systems, evaluation, settings.resamples, settings.seed)
    write_json(stage.work / "metrics.json", nested(table))
    for system in systems:
        accuracy_cell = report.cell(table[system, report.ALL, "accuracy"])
        ndcg_cell = report.cell(table[system, report.ALL, "ndcg_20"], percent=False)
        print(f"  {system:<24} accuracy {accuracy_cell:<20}  nDCG@20 {ndcg_cell}")

    # 4. Plots, pages of search results, report.md
    names = [name for name in ("student_human_labels", "student", "teacher") if name in systems]
    report.plot_accuracy(table, stage.work / "accuracy.png")
    report.plot_languages(table, stage.work / "accuracy_by_language.png")
    report.plot_confusion(y, systems, names, stage.work / "confusion.png")
    report.plot_reliability(y, systems, names, stage.work / "reliability.png")
    pages = report.search_pages(
        run, evaluation, systems, read["features"]["dataset"], settings.search_pages, stage.work
    )
    text = report.report(table, counts, pages)
    (stage.work / "report.md").write_text(text, encoding="utf-8")
    stage.finish(rows=counts)
    print(f"report: {stage.folder / 'report.md'}")


if __name__ == "__main__":
    run_main(main)
