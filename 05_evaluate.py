"""Stage 05: every system against the human labels of the evaluation queries.

Paper: the offline evaluation (accuracy on five levels, AUROC at levels 3, 4, 5), and nDCG@20, its online
relevance metric. Intervals are 95 % bootstrap intervals over queries.

    1  settings; what is inherited
    2  systems on the evaluation rows: what needs no training, students, the teacher, alone and pooled
    3  metrics, differences, and temperatures (ours)
    4  plots, pages of search results, the report, cards

Reads   RUN/features/, RUN/labels/labelled.parquet, RUN/teacher/stage.json, every RUN/student*/
Writes  RUN/report/     metrics.json, temperatures.json, report.md, plots as PNG;
                        queries.csv, every evaluation query that has a gain by every system;
                        cards/NAME.md, the models' cards with their metrics

Toy     python 05_evaluate.py
Paper   python 05_evaluate.py --preset paper --run /runs/search

Shapes: B rows (pairs of query and pin with a human label), Q queries, C = 5 levels.
"""

import itertools
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Annotated

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from scipy.special import rel_entr
from sklearn.metrics import ndcg_score

from common import NUM_LEVELS, Student, at_least, at_temperature, expected_level
from lib.inputs.inherited import require_systems, students_of
from lib.inputs.match import match_names
from lib.inputs.pairs import read_labelled
from lib.inputs.pool import POOL
from lib.inputs.regression import fit_regression, one_hot, stacked
from lib.inputs.student_inputs import StudentInputs
from lib.levels import THRESHOLDS
from lib.results import cards, pictures, queries, report
from lib.stages.files import write_json
from lib.stages.settings import NonNegative, Range, Size, StageSettings, parse, refuse
from lib.stages.stage import Stage
from lib.stages.terminal import run_main
from lib.tables.splits import in_hash_split


@dataclass(frozen=True)
class Settings(StageSettings):
    """Settings of stage 05."""

    resamples: Annotated[int, Range(2, 10**9)] = 1_000  # bootstrap resamples of the queries
    search_pages: Size = 4  # queries shown as pictures: pins ranked by BM25, student, teacher
    # of levels 1 to 5, as 0 0 0.01 0.1 1: adds nDCG of whole lists with these gains, and macro-F1
    gains: tuple[(NonNegative,) * NUM_LEVELS] | None = None
    seed: Size = 0  # of the bootstrap


PAPER = replace(Settings(), preset="paper", search_pages=10)  # our choice
PRESETS = {"toy": Settings(), "small": replace(Settings(), preset="small"), "paper": PAPER}
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
    parts = (y, w * (guess == y)), (y, w), (guess, w)
    right, labelled, guessed = (np.bincount(*part, minlength=NUM_LEVELS + 1) for part in parts)
    there = labelled > 0
    return (2 * right[there] / (labelled + guessed)[there]).mean()


def ndcg(y, score, k=20, gains=GAINS):
    """nDCG@k of one query's rows, k None: of all; gains: of the levels [C]. Rows of equal score share the
    mean gain of the places they take. NaN where no row has a gain."""
    gain = np.take(gains, y - 1)
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


class Measured:
    """One system on B rows of Q queries: its metrics under any weights of the queries."""

    def __init__(self, y, p, score, query, teacher=None, gains=None):
        self.y, self.p = y, p
        self.kl = None
        if teacher is not None:  # KL(teacher || p) of each row [B], natural logarithm
            self.kl = rel_entr(teacher, np.maximum(p, 1e-12)).sum(1)
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
        distance = np.abs(predicted_level(self.p) - self.y)
        out["within_one"] = np.average(distance <= 1, weights=w)
        for level, ranks in self.ranks.items():
            out[f"auroc_{level}"] = auroc(self.y >= level, ranks, w)
        for name, of_queries in self.ndcg.items():
            has_gain = np.isfinite(of_queries) & (weight > 0)
            mean = np.nan
            if has_gain.any():
                mean = np.average(of_queries[has_gain], weights=weight[has_gain])
            out[name] = mean
        if "ndcg" in self.ndcg:
            out["macro_f1"] = macro_f1(self.y, self.p, w)
        out["ece"] = ece(self.y, self.p, w)
        if self.kl is not None:
            out["kl_to_teacher"] = np.average(self.kl, weights=w)
        return out

    def bootstrap(self, resamples, seed):
        """Every metric's value, and its values on the resamples [R] of the queries: two dicts. The resamples
        depend on the seed and the number of queries alone: systems are compared on the same ones."""
        n = len(self.ndcg["ndcg_20"])
        value = self.metrics(np.ones(n))
        rng, samples = np.random.default_rng(seed), []
        for _ in range(resamples):
            queries = rng.integers(0, n, n)
            weight = np.bincount(queries, minlength=n).astype(float)
            samples.append(self.metrics(weight))
        return value, {name: np.array([sample[name] for sample in samples]) for name in value}


def interval(value, sample):
    """A metric's `value`, and `low` and `high` of its 95 % percentile bootstrap interval (Efron and
    Tibshirani, 1993, section 13.3); None where they do not exist. sample: its values on the resamples [R]."""
    sample = sample[np.isfinite(sample)]
    low, high = np.percentile(sample, [2.5, 97.5]) if len(sample) else (np.nan, np.nan)
    found = {}
    for name, number in (("value", value), ("low", low), ("high", high)):
        found[name] = round(float(number), 6) if np.isfinite(number) else None
    return SimpleNamespace(**found)


def measure(systems, rows, levels, settings):
    """The table of all metrics of all systems (report.py), their differences() overall, and {system: nDCG@20
    of each query [Q]}."""
    table, overall, of_queries, shown = {}, {}, {}, report.meaningful(levels)
    groups = {None: np.full(len(rows["label"]), True)}
    for language in sorted(set(rows["language"])):
        groups[language] = rows["language"] == language
    for system, (p, score) in systems.items():
        parts = {}
        for language, some in groups.items():
            y, query = rows["label"][some], rows["query"][some]
            teacher = rows["learnt"][some] if system.startswith("student") else None
            measured = Measured(y, p[some], score[some], query, teacher, settings.gains)
            value, drawn = measured.bootstrap(settings.resamples, settings.seed)
            parts[language] = {}
            for metric in value:
                if metric in shown:
                    parts[language][metric] = interval(value[metric], drawn[metric])
            if language is None:
                overall[system] = value, drawn
                of_queries[system] = measured.ndcg["ndcg_20"]
        table[system] = {"overall": parts.pop(None), "by_language": parts}
    compared = [name for name in report.AUROCS if name in shown][:1] + ["ndcg_20"]
    has_gain = np.isfinite(of_queries[system])
    counts = dict.fromkeys(compared, len(has_gain)) | {"ndcg_20": has_gain.sum()}
    return table, differences(overall, counts), of_queries


def differences(overall, counts):
    """What training brings: every trained system less each untrained one, student and teacher less the
    student on human labels, the teacher less the student: `system`, `minus`, `metric` and their interval(),
    on the same resamples of the queries; without low and high where these are too few. overall: {system:
    (values, values on resamples)}; counts: {metric: queries that count in it}."""
    trained = [name for name in overall if name not in ("majority", *report.UNTRAINED)]
    pairs = [(name, other) for name in trained for other in report.UNTRAINED]
    pairs += [(name, "student_human_labels") for name in ("student", "teacher", "pooled")]
    pairs += [("teacher", "student"), ("pooled", "teacher")]
    found = []
    for metric, (system, minus) in itertools.product(counts, pairs):
        if system in overall and minus in overall:
            (value, drawn), (less, less_drawn) = overall[system], overall[minus]
            sample = drawn[metric] - less_drawn[metric]
            if counts[metric] < report.FEWEST:
                sample = sample[:0]
            m = interval(value[metric] - less[metric], sample)
            found.append(SimpleNamespace(system=system, minus=minus, metric=metric, **vars(m)))
    return found


# ------------------------------------------------------------------------------------------------------------
# Systems: probabilities [B, C] and ranking score [B] on the evaluation rows


def regression_system(names, train, evaluation, ranks_by=None):
    """Regression of the human training labels on some columns; ranks by one as it is, or its own levels."""
    regression = fit_regression(stacked(train, names), one_hot(train["label"]))
    p = regression.probabilities(stacked(evaluation, names))
    if ranks_by:
        return p, evaluation[ranks_by].astype(np.float64)
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
    """{name: (probabilities [B, C], ranking score [B])}, weakest kind first. majority: the shares of the
    levels among the training labels; bm25: of its score, and whether it is 0; embedding: of the cosine of the
    text encoder's embeddings (the paper's baseline is an embedding, too); match: of all match features."""
    train, rows = ({**rows, "is_found": rows["bm25"] > 0} for rows in (train, evaluation))
    names = match_names(run / "features" / "labelled.parquet")
    n = len(rows["label"])
    shares = one_hot(train["label"]).mean(axis=0)
    systems = {"majority": (np.tile(shares, (n, 1)), np.zeros(n))}
    systems["bm25"] = regression_system(["bm25", "is_found"], train, rows, ranks_by="bm25")
    systems["embedding"] = regression_system(["text_cosine"], train, rows, ranks_by="text_cosine")
    systems["match"] = regression_system(names, train, rows)
    for name in [*students, "teacher"]:
        systems[name] = trained_system(run, name, rows)
    if "pooled" in rows:
        systems["pooled"] = trained_system(run, "pooled", rows)
    return systems


# ------------------------------------------------------------------------------------------------------------
# Temperatures (ours: the paper ranks by scores, and needs no calibrated probabilities)


def fit_temperature(y, p):
    """The temperature that makes labels [B] most probable (Guo et al., 2017, section 4.2)."""
    p, rows = torch.from_numpy(p).clamp(min=1e-12), np.arange(len(y))

    def loss(log_temperature):
        scaled = at_temperature(p, np.exp(log_temperature))
        return -scaled[rows, y - 1].log().mean().item()

    return float(np.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded").x))


def fit_temperatures(run, read, train):
    """{trained system: its temperature, and on how many rows of how many queries it was fitted}: training
    queries that its stage has held out; of too few it is 1. read: {folder: stage.json}."""
    found = {}
    for name in [*students_of(read), "teacher"]:
        split = read.get(name, {}).get("held_out", {"share": 0.0, "salt": ""})
        held_out = in_hash_split(train["key"], **split)
        if held_out.any():
            rows = {column: values[held_out] for column, values in train.items()}
            p, _ = trained_system(run, name, rows)
            queries = len(np.unique(rows["query"]))
            fitted = {"temperature": 1.0, "rows": len(p), "queries": queries}
            if queries >= report.ENOUGH_FITTED:
                fitted["temperature"] = round(fit_temperature(rows["label"], p), 4)
            found[name] = fitted
    return found


def calibrated(systems, temperatures, table, rows, settings):
    """The trained systems' probabilities at their temperatures, {name: [B, C]}. Notes in `temperatures` the
    expected calibration errors before and after, with intervals."""
    scaled = {}
    for name, fitted in temperatures.items():
        p = at_temperature(torch.from_numpy(systems[name][0]), fitted["temperature"]).numpy()
        measured = Measured(rows["label"], p, expected_level(p), rows["query"])
        value, drawn = measured.bootstrap(settings.resamples, settings.seed)
        fitted["ece"] = table[name]["overall"]["ece"]
        fitted["ece_at_temperature"] = interval(value["ece"], drawn["ece"])
        scaled[name] = p
    return scaled


# ------------------------------------------------------------------------------------------------------------


def main(argv=None):
    # 1. Settings, what is inherited, and the folder
    settings = parse(PRESETS, argv, __doc__)
    if settings.gains and not any(settings.gains):
        refuse("--gains: all are 0, and nDCG has no gain")
    run = settings.run
    read = require_systems(run, READS)
    identities = {folder: about["identity"] for folder, about in read.items()}
    stage = Stage(run / "report", settings, identities)
    if stage.done:
        return

    # 2. Systems on the evaluation rows
    train, evaluation = read_labelled(run)
    systems = all_systems(run, students_of(read), train, evaluation)
    y = evaluation["label"]
    n, n_queries = len(y), len(np.unique(evaluation["query"]))
    print(f"evaluation: {n:,} rows of {n_queries:,} queries")
    for line in report.few_queries(n_queries):
        print(line)

    # 3. Metrics, and temperatures (ours)
    levels = np.union1d(train["label"], y)
    table, compared, ndcg = measure(systems, evaluation, levels, settings)
    write_json(stage.folder / "metrics.json", {"systems": table, "differences": compared})
    temperatures = fit_temperatures(run, read, train)
    scaled = calibrated(systems, temperatures, table, evaluation, settings)
    write_json(stage.folder / "temperatures.json", temperatures)
    print("\n".join(report.summary(table, compared)))

    # 4. Plots, pages of search results, report.md, cards
    pictures.plots(table, y, systems, scaled, levels, stage.folder)
    each = queries.one_by_one(run / "features", evaluation, ndcg)
    queries.write_csv(each, stage.folder / "queries.csv")
    shown = queries.for_pages(each, settings.search_pages)
    pages = pictures.search_pages(run, evaluation, systems, shown, stage.folder)
    facts = report.facts(read, n, n_queries, len(each))
    one_by_one = queries.worst(each, systems)
    text = report.report(table, compared, facts, temperatures, evaluation, one_by_one, pages)
    (stage.folder / "report.md").write_text(text, encoding="utf-8")
    cards.write_cards(run, read, table, stage.folder / "cards")
    stage.finish(rows={"rows": n, "queries": n_queries})
    print(f"report: {stage.place / 'report.md'}")


if __name__ == "__main__":
    run_main(main)
