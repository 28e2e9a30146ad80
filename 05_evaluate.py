"""Stage 05: every system against the human labels of the evaluation queries.

Paper: the offline evaluation (accuracy on five levels, AUROC at levels 3, 4, 5) and nDCG@20, its online relevance metric. Intervals are 95 %
bootstrap intervals over queries.

Reads   RUN/features/, RUN/labels/labelled.parquet, every RUN/student*/
Writes  RUN/report/     metrics.json, report.md, plots as PNG, stage.json

Toy     python 05_evaluate.py
Paper   python 05_evaluate.py --preset paper --run /runs/search

With --compare it sets arms of an experiment side by side instead, several seeds an arm (runs/findings.sh does so for the paper's four findings):

        python 05_evaluate.py --compare "six fields=outputs/toy,outputs/seed1" "title=outputs/title0,outputs/title1" --into outputs/findings --finding d
        python 05_evaluate.py --compare "all=outputs/toy:student" "6,000=outputs/toy:student_6000" --into outputs/findings --finding b
Writes  DIR/findings.json, findings.md, finding_KEY.png
"""

import argparse
import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageOps
from sklearn.linear_model import LogisticRegression

import common
from common import C, LEVELS, MATCH_FEATURES, Stage, Student, StudentInputs

PRESETS = {"toy": dict(resamples=1_000, search_pages=4), "paper": dict(resamples=1_000, search_pages=10)}  # our choice

# Accuracy on the human evaluation set; PAPER = the paper's Table of language models, other sources named.
PAPER = {"teacher": ("Llama-3-8B, QLoRA", 0.602), "student": ("given by one summary of the paper", 0.548),
         "(embedding baseline)": ("SearchSage, derived from a stated relative gain of 19.7 %", 0.503)}

# Okabe and Ito's colours, told apart by the colour-blind and in grey by their lightness.
COLOURS = {"majority": "#999999", "bm25": "#E69F00", "student_human_labels": "#56B4E9", "student": "#0072B2", "teacher": "#D55E00"}
LEVEL_COLOURS = {1: "#B2182B", 2: "#EF8A62", 3: "#CCCCCC", 4: "#67A9CF", 5: "#2166AC"}
METRICS = ("accuracy", "within_one", "auroc_3", "auroc_4", "auroc_5", "ndcg_20", "ece", "kl_to_teacher")

# The paper's findings, by the key that --finding takes: what it says, and the figures that it gives (accuracy of a teacher).
FINDINGS = {
    "a": ("A larger language model is a better teacher", "Accuracy on the paper's human evaluation set stands in the last column."),
    "b": ("More teacher-labelled impressions make a better student", "The paper says so, at about 10, 50 and 100 times the human set; its figures could not be read. One summary gives its student 54.8 %."),
    "c": ("A teacher trained on English labels carries over to other languages, and so does its student", "The paper says so; its figures by language could not be read."),
    "d": ("Richer pin text makes a better teacher", "The paper says so, and calls it significant; its figures by text source could not be read."),
}
PAPER_TEACHERS = {"BERT": 0.535, "T5": 0.569, "DeBERTa": 0.580, "Llama": 0.602}  # base sizes, and Llama-3-8B with QLoRA
COMPARED = {"accuracy": "accuracy %", "auroc_4": "AUROC ≥4", "ndcg_20": "nDCG@20"}


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--resamples", type=int, metavar="N", help="bootstrap resamples of the queries")
    p.add_argument("--search-pages", type=int, metavar="N", help="queries shown as pictures: pins ranked by BM25, student, teacher")
    p.add_argument("--seed", type=int, default=0)
    g = p.add_argument_group("comparison of runs (--run is not used then)")
    g.add_argument("--compare", nargs="+", type=arm_of, metavar="ARM", help="LABEL=RUN[:SYSTEM][,RUN[:SYSTEM]…]: the runs are the arm's seeds; SYSTEM: teacher (default), or the name of a student's folder")
    g.add_argument("--into", type=Path, metavar="DIR", help="folder of findings.json, findings.md and the plot")
    g.add_argument("--finding", choices=list(FINDINGS), metavar="KEY", help="which of the paper's findings the comparison tests: " + ", ".join(FINDINGS))
    g.add_argument("--title", metavar="TEXT", help="what the comparison shows (default: the paper's finding)")
    args = common.parse(p, PRESETS, argv)
    if args.compare and not (args.into and args.finding):
        p.error("--compare needs --into and --finding")
    if not args.compare and (args.into or args.finding or args.title):
        p.error("--into, --finding and --title go with --compare")
    return args


def arm_of(text):
    """LABEL=RUN[:SYSTEM][,…] -> (label, [(run, system), …])."""
    label, _, runs = text.partition("=")
    seeds = [(Path(run), system or "teacher") for run, _, system in (r.partition(":") for r in runs.split(",") if r)]
    if not label or not seeds:
        raise argparse.ArgumentTypeError(f"{text!r} is not LABEL=RUN[:SYSTEM][,RUN[:SYSTEM]…]")
    return label, seeds


# ---------------------------------------------------------------------------------------------------------------------
# Metrics. y: labels [B] in 1..5; p: probabilities [B, C]; w: weight of each row [B] (its query's count in a bootstrap resample)


def accuracy(y, p, w):
    """Share of rows whose most probable level is the label."""
    return np.average(p.argmax(1) + 1 == y, weights=w)


def within_one(y, p, w):
    """Share of rows whose most probable level is at most one off."""
    return np.average(np.abs(p.argmax(1) + 1 - y) <= 1, weights=w)


def ranked(score):
    """Score [B] -> row order from low to high, and for each place the number of its group of equal scores: what auroc() needs, sorted once."""
    order = np.argsort(score, kind="stable")
    return order, np.concatenate([[0], np.cumsum(np.diff(score[order]) > 0)])


def auroc(positive, ranks, w):
    """Area under the ROC curve: the chance that a positive row scores above a negative one, ties half. ranks: ranked(score). NaN without both kinds."""
    order, group = ranks
    pos, neg = np.bincount(group, (w * positive)[order]), np.bincount(group, (w * ~positive)[order])
    if pos.sum() == 0 or neg.sum() == 0:
        return np.nan
    return (pos * (np.cumsum(neg) - neg / 2)).sum() / (pos.sum() * neg.sum())


def ndcg(y, score, k=20):
    """nDCG@k of one query's rows, gain 2^(label-1) - 1 (Burges et al., 2005, with the lowest level at gain 0). Rows of equal score share the mean gain of the
    places they take (McSherry and Najork, 2008). NaN where no row has a gain."""
    gain = 2.0 ** (y - 1) - 1
    discount = np.where(np.arange(len(y)) < k, 1 / np.log2(np.arange(len(y)) + 2), 0)
    best = (np.sort(gain)[::-1] * discount).sum()
    if best == 0:
        return np.nan
    _, group, size = np.unique(-score, return_inverse=True, return_counts=True)
    mean_gain = np.bincount(group, gain) / size
    place = np.repeat(np.arange(len(size)), size)
    return (mean_gain[place] * discount).sum() / best


def ece(y, p, w, bins=15):
    """Expected calibration error of the most probable level, equal-width bins of confidence (Guo et al., 2017, eq. 3)."""
    confidence, right = p.max(1), p.argmax(1) + 1 == y
    bin_ = np.minimum((confidence * bins).astype(int), bins - 1)
    return np.abs(np.bincount(bin_, w * (confidence - right), minlength=bins)).sum() / w.sum()


def kl(teacher, p, w):
    """Mean KL(teacher || p), natural logarithm."""
    t, p = np.maximum(teacher.astype(np.float64), 1e-12), np.maximum(p.astype(np.float64), 1e-12)
    return np.average((t * np.log(t / p)).sum(1), weights=w)


def all_metrics(y, p, ranks, w, query_ndcg, query_weight, teacher=None):
    """Every metric of one system. ranks: {k: ranked(score)} for AUROC at level k; query_ndcg [Q]: each query's nDCG@20."""
    out = {"accuracy": accuracy(y, p, w), "within_one": within_one(y, p, w)}
    for k in (3, 4, 5):
        out[f"auroc_{k}"] = auroc(y >= k, ranks[k], w)
    known = np.isfinite(query_ndcg)
    out["ndcg_20"] = np.average(query_ndcg[known], weights=query_weight[known]) if (query_weight[known] > 0).any() else np.nan
    out["ece"] = ece(y, p, w)
    if teacher is not None:
        out["kl_to_teacher"] = kl(teacher, p, w)
    return out


def bootstrap(y, p, score, query, resamples, seed, teacher=None):
    """Every metric's value, and its value on each of the resamples [R] of the queries: two dicts.
    The resamples depend on the seed and the number of queries alone: systems are compared on the same ones."""
    queries, query = np.unique(query, return_inverse=True)
    n = len(queries)
    order = np.argsort(query, kind="stable")
    bounds = np.searchsorted(query[order], np.arange(n + 1))
    rows = [order[a:b] for a, b in zip(bounds, bounds[1:])]
    query_ndcg = np.array([ndcg(y[r], score[r]) for r in rows])
    ranks = {k: ranked(p[:, k - 1:].sum(1)) for k in (3, 4, 5)}  # by P(label >= k)
    metrics = lambda weight: all_metrics(y, p, ranks, weight[query], query_ndcg, weight, teacher)
    value = metrics(np.ones(n))
    rng = np.random.default_rng(seed)
    drawn = [metrics(np.bincount(rng.integers(0, n, n), minlength=n).astype(float)) for _ in range(resamples)]
    return value, {name: np.array([d[name] for d in drawn]) for name in value}


def interval(value, sample):
    """{value, low, high}: 95 % percentile bootstrap interval (Efron and Tibshirani, 1993, section 13.3). sample: the values on the resamples [R]."""
    sample = sample[np.isfinite(sample)]
    low, high = np.percentile(sample, [2.5, 97.5]) if len(sample) else (np.nan, np.nan)
    return {k: (round(float(v), 6) if np.isfinite(v) else None) for k, v in (("value", value), ("low", low), ("high", high))}


def with_intervals(y, p, score, query, resamples, seed, teacher=None):
    """{metric: {value, low, high}}."""
    value, drawn = bootstrap(y, p, score, query, resamples, seed, teacher)
    return {name: interval(value[name], drawn[name]) for name in value}


# ---------------------------------------------------------------------------------------------------------------------
# Systems: name -> probabilities [B, C] and ranking score [B] on the evaluation rows


def expected_level(p):
    """Ranking score of a system that gives probabilities: the expected level."""
    return p.astype(np.float64) @ np.arange(1, C + 1)


def majority_system(train_labels, rows):
    """The shares of the levels among the training labels, for every row."""
    share = np.bincount(train_labels - 1, minlength=C) / len(train_labels)
    return np.tile(share, (rows, 1)), np.zeros(rows)


def bm25_system(train, evaluation):
    """Ranks by BM25. Its probabilities: multinomial logistic regression of the human training labels on the BM25 score and whether it is 0."""
    inputs = lambda t: np.stack([t["bm25"] / 10, t["bm25"] > 0], 1).astype(np.float64)
    present = np.unique(train["label"])
    p = np.zeros((len(evaluation["label"]), C))
    if len(present) == 1:
        p[:, present[0] - 1] = 1
    else:
        model = LogisticRegression(C=100.0, max_iter=1_000).fit(inputs(train), train["label"])
        p[:, model.classes_ - 1] = model.predict_proba(inputs(evaluation))
    return p, evaluation["bm25"].astype(np.float64)


@torch.inference_mode()
def student_system(folder, features, rows, chunk=16_384):
    """Probabilities of the student in `folder` on rows (dict of arrays)."""
    student = Student.load(folder)
    inputs, out = StudentInputs(features, student.spec), []
    for start in range(0, len(rows["label"]), chunk):
        at = slice(start, start + chunk)
        match = torch.from_numpy(np.stack([rows[name][at] for name in MATCH_FEATURES], 1))
        out.append(student(*inputs.gather(rows["query_index"][at], rows["pin_index"][at]), match).double().softmax(1).numpy())
    p = np.concatenate(out)
    return p, expected_level(p)


def read_rows(run, teacher=True):
    """(train, evaluation) rows of labelled.parquet as dicts of arrays, with `language` and the teacher's p1 … p5 as `teacher` [B, C]."""
    table = pq.read_table(run / "features" / "labelled.parquet")
    rows = {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}
    rows["label"] = rows["label"].astype(np.int64)
    if teacher:
        labels = pq.read_table(run / "labels" / "labelled.parquet")
        rows["teacher"] = np.stack([labels[f"p{level}"].to_numpy() for level in range(1, C + 1)], 1).astype(np.float64)
    queries = pq.read_table(run / "features" / "queries.parquet", columns=["query", "language"])
    rows["language"] = np.array(queries["language"].to_pylist(), dtype=object)[rows["query_index"]]
    return tuple({k: v[rows["split"] == split] for k, v in rows.items()} for split in ("train", "eval"))


def all_systems(run, train, evaluation):
    """{name: (probabilities [B, C], ranking score [B])}, weakest kind first."""
    systems = {"majority": majority_system(train["label"], len(evaluation["label"])), "bm25": bm25_system(train, evaluation)}
    students = sorted(p.name for p in run.glob("student*") if (p / "stage.json").exists())
    for name in sorted(students, key=lambda n: (n == "student", n)):
        common.need(run / name, f"04_train_student.py --run {run}")
        systems[name] = student_system(run / name, run / "features", evaluation)
    systems["teacher"] = (evaluation["teacher"], expected_level(evaluation["teacher"]))
    return systems


# ---------------------------------------------------------------------------------------------------------------------
# Report


def colour(name):
    """A system's colour, the same in every plot; further students share one."""
    return COLOURS.get(name, "#009E73")


def plot_accuracy(metrics, path):
    """Accuracy by system with intervals."""
    import matplotlib.pyplot as plt

    names = list(metrics["systems"])[::-1]
    fig, ax = plt.subplots(figsize=(7, 0.55 * len(names) + 1.1), layout="constrained")
    for i, name in enumerate(names):
        m = metrics["systems"][name]["overall"]["accuracy"]
        ax.barh(i, 100 * m["value"], color=colour(name), height=0.62)
        ax.errorbar(100 * m["value"], i, xerr=[[100 * (m["value"] - m["low"])], [100 * (m["high"] - m["value"])]], color="black", capsize=3, lw=1)
        ax.text(100 * m["high"] + 1, i, f"{100 * m['value']:.1f}", va="center")
    ax.set_yticks(range(len(names)), [n.replace("_", " ") for n in names])
    ax.set_xlabel("accuracy on human evaluation labels, % (95 % interval over queries)")
    ax.set_xlim(0, 105)
    ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def plot_languages(metrics, path):
    """Accuracy by language and system with intervals."""
    import matplotlib.pyplot as plt

    names = list(metrics["systems"])
    languages = list(metrics["systems"][names[0]]["by_language"])
    fig, ax = plt.subplots(figsize=(max(6, 1.2 * len(languages) + 3), 3.6), layout="constrained")
    width = 0.8 / len(names)
    for s, name in enumerate(names):
        m = [metrics["systems"][name]["by_language"][lang]["accuracy"] for lang in languages]
        x = np.arange(len(languages)) + (s - (len(names) - 1) / 2) * width
        value = np.array([100 * v["value"] for v in m])
        ax.bar(x, value, width * 0.92, color=colour(name), label=name.replace("_", " "))
        ax.errorbar(x, value, yerr=[value - [100 * v["low"] for v in m], [100 * v["high"] for v in m] - value], fmt="none", color="black", capsize=2, lw=0.8)
    ax.set_xticks(range(len(languages)), languages)
    ax.set(xlabel="language of the query", ylabel="accuracy, %\n(95 % interval over queries)", ylim=(0, 105))
    ax.spines[["top", "right"]].set_visible(False)
    fig.legend(loc="outside upper center", ncols=3, frameon=False)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def plot_confusion(y, systems, names, path):
    """Confusion matrices, rows normalised: human level against most probable level."""
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, len(names), figsize=(3.6 * len(names), 3.5), layout="constrained", squeeze=False)
    for ax, name in zip(axes[0], names):
        counts = np.zeros((C, C))
        np.add.at(counts, (y - 1, systems[name][0].argmax(1)), 1)
        share = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
        ax.imshow(share, cmap="Blues", vmin=0, vmax=100)
        for i in range(C):
            for j in range(C):
                ax.text(j, i, f"{share[i, j]:.0f}", ha="center", va="center", color="white" if share[i, j] > 55 else "black", fontsize=9)
        ax.set(title=name.replace("_", " "), xlabel="most probable level", ylabel="human level", xticks=range(C), yticks=range(C))
        ax.set_xticklabels(range(1, C + 1))
        ax.set_yticklabels(range(1, C + 1))
    fig.suptitle("share of the human level's rows, %", fontsize=10)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def plot_reliability(y, systems, names, path, bins=10):
    """Reliability diagram: how often the most probable level is right, by its probability."""
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(4.6, 4.2), layout="constrained")
    ax.plot([0, 1], [0, 1], color="black", lw=0.8, ls=":", label="perfectly calibrated")
    for name, marker in zip(names, "osD^v"):
        p = systems[name][0]
        confidence, right = p.max(1), p.argmax(1) + 1 == y
        bin_ = np.minimum((confidence * bins).astype(int), bins - 1)
        n = np.bincount(bin_, minlength=bins)
        used = n >= 10
        mean = lambda v: np.bincount(bin_, v, minlength=bins)[used] / n[used]
        ax.plot(mean(confidence), mean(right.astype(float)), color=colour(name), marker=marker, ms=5, label=name.replace("_", " "))
    ax.set(xlabel="probability given to the most probable level", ylabel="share of rows where it is right", xlim=(0, 1), ylim=(0, 1))
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def plot_search_page(rows, systems, query, pins, dataset, path, top=6):
    """One query's results as pictures: the `top` pins by BM25, student and teacher, the human level as a coloured frame."""
    import matplotlib.pyplot as plt

    at = np.flatnonzero(rows["query_index"] == query["index"])
    names = [n for n in ("bm25", "student", "teacher") if n in systems]
    fig, axes = plt.subplots(len(names), top, figsize=(1.25 * top + 1, 1.75 * len(names) + 0.6), squeeze=False, layout="constrained")
    for line, name in zip(axes, names):
        best = at[np.argsort(-systems[name][1][at], kind="stable")][:top]
        for ax, r in zip(line, [*best, *[None] * (top - len(best))]):
            ax.set(xticks=[], yticks=[])
            if r is None:
                ax.axis("off")
                continue
            pin = pins[int(rows["pin_index"][r])]
            image = picture(dataset, pin["image"])
            if image is not None:
                ax.imshow(image, aspect="auto")
            else:
                ax.text(0.5, 0.5, "\n".join((pin["title"] or pin["caption"] or "no text")[i:i + 14] for i in range(0, 42, 14)), ha="center", va="center", fontsize=7)
                ax.set(xlim=(0, 1), ylim=(0, 1))
            for spine in ax.spines.values():
                spine.set(color=LEVEL_COLOURS[rows["label"][r]], linewidth=4, visible=True)
            ax.set_xlabel(f"{rows['label'][r]} {LEVELS[rows['label'][r]]}", fontsize=7)
        line[0].set_ylabel(name, fontsize=9)
    fig.suptitle(f"“{query['query']}” ({query['language']}): best first; frame and text: human level", fontsize=9)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def picture(dataset, path, size=160):
    """A pin's image as RGB, or None; never from outside the dataset."""
    if not path:
        return None
    try:
        with Image.open(common.inside(dataset, path)) as image:
            return ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (size, size))
    except Exception:  # a broken image; stage 01 has listed it
        return None


def search_pages(run, rows, systems, dataset, n, folder):
    """Search result pages for `n` evaluation queries with many labelled pins, one language after another. Returns file names."""
    queries = pq.read_table(run / "features" / "queries.parquet", columns=["query", "language"])
    index, count = np.unique(rows["query_index"], return_counts=True)
    by_language = {}
    for i in index[np.lexsort((index, -count))]:
        by_language.setdefault(queries["language"][int(i)].as_py(), []).append(int(i))
    turns = [i for turn in range(n) for line in by_language.values() for i in line[turn:turn + 1]][:n]
    table = pq.read_table(run / "features" / "pins.parquet", columns=["title", "caption", "image"])
    names = []
    for number, i in enumerate(turns, 1):
        at = np.unique(rows["pin_index"][rows["query_index"] == i])
        pins = dict(zip(at.tolist(), table.take(at).to_pylist()))
        names.append(f"search_{number}.png")
        plot_search_page(rows, systems, {"index": i, "query": queries["query"][i].as_py(), "language": queries["language"][i].as_py()},
                         pins, dataset, folder / names[-1])
    return names


def cell(m, percent=True):
    """value [low, high] for a table."""
    if m is None or m["value"] is None:
        return "–"
    show = (lambda v: f"{100 * v:.1f}") if percent else (lambda v: f"{v:.3f}")
    return f"{show(m['value'])} [{show(m['low'])}, {show(m['high'])}]"


def report(metrics, counts, pages):
    """report.md."""
    head = ["accuracy %", "within one %", "AUROC ≥3", "AUROC ≥4", "AUROC ≥5", "nDCG@20", "ECE", "KL to teacher"]
    lines = ["# Evaluation", "", f"{counts['rows']:,} human-labelled rows of {counts['queries']:,} queries. In brackets: 95 % bootstrap interval over queries.", "",
             f"| system | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    for name, m in metrics["systems"].items():
        lines.append(f"| {name} | " + " | ".join(cell(m["overall"].get(k), percent=k in ("accuracy", "within_one")) for k in METRICS) + " |")
    lines += ["", "## Beside the paper", "", "The paper's rows are its own data and models; they are here for orientation, not for comparison of the numbers.", "",
              "| | accuracy here % | accuracy in the paper % | the paper's system |", "|---|---|---|---|"]
    for name, (what, value) in PAPER.items():
        here = metrics["systems"].get(name, {}).get("overall", {}).get("accuracy")
        lines.append(f"| {name} | {cell(here)} | {100 * value:.1f} | {what} |")
    languages = list(next(iter(metrics["systems"].values()))["by_language"])
    lines += ["", "## Accuracy by language, %", "", f"| system | {' | '.join(languages)} |", "|---" * (len(languages) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(cell(m["by_language"][lang]["accuracy"]) for lang in languages) + " |" for name, m in metrics["systems"].items()]
    lines += ["", "## Plots", ""] + [f"![{n}]({n})" for n in ("accuracy.png", "accuracy_by_language.png", "confusion.png", "reliability.png", *pages)]
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# Comparison of runs: arms of an experiment, several seeds each


def read_arm(run, system):
    """One seed of an arm: its evaluation rows in the order of their ids, probabilities and ranking score on them, and facts about its make.
    Asks for nothing that it does not use: a teacher needs labels/labelled.parquet, a student its own folder."""
    features, folder = run / "features", run / ("labels" if system == "teacher" else system)
    made = common.need(features, f"01_build_features.py --run {run}")
    about = common.need(folder, f"03_label.py --run {run} --only-labelled" if system == "teacher" else f"04_train_student.py --run {run} --name {system}")
    if about["inputs"]["features"] != made["identity"]:
        raise common.Stop(f"{folder} was made from other features than {features} holds now: make it again with --overwrite")
    train, rows = read_rows(run, teacher=system == "teacher")
    p, score = (rows["teacher"], expected_level(rows["teacher"])) if system == "teacher" else student_system(folder, features, rows)
    ids = [pq.read_table(features / file, columns=[name])[name].take(rows[name.replace("_id", "_index")]).to_numpy(zero_copy_only=False)
           for name, file in (("pin_id", "pins.parquet"), ("query_id", "queries.parquet"))]
    order = np.lexsort(ids)
    rows = {"ids": [i[order].tolist() for i in ids], **{k: rows[k][order] for k in ("label", "query_index", "language")}}
    languages, count = np.unique(train["language"], return_counts=True)
    facts = {"made": common.fingerprint(folder / ("labelled.parquet" if system == "teacher" else "model.safetensors")),
             "home": str(languages[count.argmax()]),  # the language of the human training labels
             "learnt_from": "human labels" if system == "teacher" else f"{about['arguments']['labels']} labels",
             "training_rows": None if system == "teacher" else about["rows"]["train"]}
    return rows, p[order], score[order], facts


def arm_metrics(y, query, seeds, resamples, seed, number):
    """{metric: {value, low, high, seeds}} of an arm, the mean over its seeds, and the resampled means {metric: [R]}. seeds: [(p, score)].

    The interval covers the choice of queries and of seeds: a resample draws queries with replacement (the same ones for every seed and arm) and,
    with replacement, as many of the arm's seeds as it has, and averages those (the pigeonhole bootstrap, Owen, 2007). Few seeds
    understate how far seeds differ, so their values stand beside the interval."""
    runs = [bootstrap(y, p, score, query, resamples, seed) for p, score in seeds]
    drawn_seeds = np.random.default_rng([seed, number]).integers(0, len(seeds), (resamples, len(seeds)))
    out, means = {}, {}
    for name in COMPARED:
        values = [value[name] for value, _ in runs]
        means[name] = np.take_along_axis(np.stack([drawn[name] for _, drawn in runs], 1), drawn_seeds, 1).mean(1)
        out[name] = {**interval(np.mean(values), means[name]), "seeds": [round(float(v), 6) if np.isfinite(v) else None for v in values]}
    return out, means


def compare_arms(arms, args):
    """[(label, seeds as read_arm gives them)] -> the finding's entry in findings.json: metrics of every arm, overall and by language, the accuracy an arm keeps
    outside the language of the human labels, and the differences between any two arms (on the same resamples, hence tighter than two intervals)."""
    rows, _, _, facts = arms[0][1][0]
    y, query, home = rows["label"], rows["query_index"], facts["home"]
    parts = {"overall": np.ones(len(y), dtype=bool), **{lang: rows["language"] == lang for lang in sorted(set(rows["language"]), key=lambda lang: (lang != home, lang))}}
    out, drawn = [], []
    for number, (label, seeds) in enumerate(arms):
        found = {part: arm_metrics(y[at], query[at], [(p[at], score[at]) for _, p, score, _ in seeds], args.resamples, args.seed, number) for part, at in parts.items()}
        metrics, means = ({part: pair[i] for part, pair in found.items()} for i in (0, 1))
        known = [f["training_rows"] for *_, f in seeds if f["training_rows"] is not None]
        out.append({"label": label, "learnt_from": seeds[0][3]["learnt_from"], "training_rows": round(np.mean(known)) if known else None,
                    "overall": metrics.pop("overall"), "by_language": metrics})
        if home in metrics and metrics[home]["accuracy"]["value"]:
            with np.errstate(divide="ignore", invalid="ignore"):  # a resample without a right row
                out[-1]["accuracy_kept"] = {lang: interval(m["accuracy"]["value"] / metrics[home]["accuracy"]["value"], means[lang]["accuracy"] / means[home]["accuracy"])
                                            for lang, m in metrics.items() if lang != home}
        drawn.append(means)
    value = lambda arm, part, name: np.array((arm["overall"] if part == "overall" else arm["by_language"][part])[name]["value"], dtype=float)  # NaN for None
    minus = lambda i, j, part: {name: interval(value(out[i], part, name) - value(out[j], part, name), drawn[i][part][name] - drawn[j][part][name]) for name in COMPARED}
    differences = [{"arm": out[i]["label"], "minus": out[j]["label"], "overall": minus(i, j, "overall"),
                    "by_language": {lang: minus(i, j, lang) for lang in parts if lang != "overall"}} for i in range(len(out)) for j in range(i)]
    return {"rows": len(y), "queries": len(np.unique(query)), "language_of_human_labels": home, "resamples": args.resamples, "arms": out, "differences": differences}


def difference(entry, arm, minus):
    """{"overall", "by_language"} of `arm` less `minus`, an arm that stands before it."""
    return next(d for d in entry["differences"] if (d["arm"], d["minus"]) == (arm, minus))


def points(m):
    """A difference of two shares, in points: +3.1 [+1.0, +5.2]."""
    return "–" if m["value"] is None else f"{100 * m['value']:+.1f} [{100 * m['low']:+.1f}, {100 * m['high']:+.1f}]"


def findings_report(findings):
    """findings.md."""
    table = lambda head, lines: ["", f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(line)} |" for line in lines)]
    lines = ["# The paper's findings, measured", "",
             "Mean over an arm's seeds; in brackets a 95 % interval that covers the choice of evaluation queries and of seeds (05_evaluate.py, arm_metrics). Differences are taken on the same resamples."]
    for key, entry in sorted(findings.items()):
        arms, paper = entry["arms"], [PAPER_TEACHERS.get(arm["label"]) for arm in entry["arms"]]
        paper = paper if key == "a" else []
        lines += ["", f"## ({key}) {entry['title']}", "", f"{FINDINGS[key][1]} {entry['rows']:,} human-labelled rows of {entry['queries']:,} queries.", "", "!" + f"[finding {key}](finding_{key}.png)"]
        lines += table(["arm", "accuracy %", "each seed %", "points above the arm before", *list(COMPARED.values())[1:], *["the paper, accuracy %"] * bool(paper)], [
            [arm["label"], cell(arm["overall"]["accuracy"]), ", ".join(f"{100 * v:.1f}" for v in arm["overall"]["accuracy"]["seeds"]),
             points(difference(entry, arm["label"], arms[i - 1]["label"])["overall"]["accuracy"]) if i else "",
             cell(arm["overall"]["auroc_4"], False), cell(arm["overall"]["ndcg_20"], False), *[f"{100 * v:.1f}" if v else "–" for v in paper[i:i + 1]]]
            for i, arm in enumerate(arms)])
        languages, home = list(arms[0]["by_language"]), entry["language_of_human_labels"]
        for name, title in COMPARED.items() if key == "c" else [("accuracy", COMPARED["accuracy"])]:
            lines += table([f"{title} by language", *languages], [[arm["label"], *(cell(m[name], name == "accuracy") for m in arm["by_language"].values())] for arm in arms])
        if key == "c" and all("accuracy_kept" in arm for arm in arms):
            lines += table([f"accuracy kept, % of that in {home}", *languages[1:]], [[arm["label"], *map(cell, arm["accuracy_kept"].values())] for arm in arms])
    return "\n".join(lines) + "\n"


def dots(ax, x, arms, part, colour, fmt="o", **label):
    """Mean accuracy with its interval, and each seed as a small ring, at x [arms]."""
    m = [part(arm)["accuracy"] for arm in arms]
    value, low, high = (np.array([100 * v[k] for v in m]) for k in ("value", "low", "high"))
    ax.errorbar(x, value, yerr=[value - low, high - value], fmt=fmt, color=colour, capsize=3, ms=6, lw=1.4, **label)
    for at, v in zip(x, m):
        ax.plot([at] * len(v["seeds"]), [100 * s for s in v["seeds"]], "o", mfc="white", mec=colour, ms=3.5, mew=0.9, zorder=3)


def plot_finding(key, entry, path):
    """The finding's picture: (b) a curve over training rows, (c) arms by language, else arms beside each other."""
    import matplotlib.pyplot as plt

    arms, palette = entry["arms"], ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
    fig, ax = plt.subplots(figsize=(7, 3.8), layout="constrained")
    overall = lambda arm: arm["overall"]
    if key == "b":
        curve = [arm for arm in arms if arm["learnt_from"] == "teacher labels"]
        for arm, colour, style in zip([arm for arm in arms if arm not in curve], palette[1:], ("--", ":", "-.", "--", ":")):
            m = {k: 100 * arm["overall"]["accuracy"][k] for k in ("value", "low", "high")}
            ax.axhline(m["value"], color=colour, ls=style, lw=1.4, label=arm["label"])
            ax.axhspan(m["low"], m["high"], color=colour, alpha=0.13, lw=0)
        x = [arm["training_rows"] for arm in curve]
        ax.plot(x, [100 * arm["overall"]["accuracy"]["value"] for arm in curve], color=palette[0], lw=1.2)
        dots(ax, x, curve, overall, palette[0], label="student on the teacher's labels")
        ax.set(xscale="log", xlabel="teacher-labelled impressions trained on, rows (logarithmic)")
        ax.set_xticks(x, [f"{n:,}" for n in x])
        ax.minorticks_off()
    elif key == "c":
        languages = list(arms[0]["by_language"])
        for i, (arm, colour, marker) in enumerate(zip(arms, palette * len(arms), "osD^vP" * len(arms))):
            for j, lang in enumerate(languages):
                dots(ax, [j + 0.7 * (i - (len(arms) - 1) / 2) / len(arms)], [arm], lambda a: a["by_language"][lang], colour, marker, **({} if j else {"label": arm["label"]}))
        ax.set_xticks(range(len(languages)), languages)
        ax.set_xlabel(f"language of the query (human training labels: {entry['language_of_human_labels']})")
    else:
        dots(ax, range(len(arms)), arms, overall, palette[0], label="here")
        paper = [(i, 100 * PAPER_TEACHERS[arm["label"]]) for i, arm in enumerate(arms) if key == "a" and arm["label"] in PAPER_TEACHERS]
        if paper:
            ax.plot(*zip(*paper), "D", color=palette[1], ms=6, label="the paper (other data and models)")
        ax.set_xticks(range(len(arms)), [arm["label"] for arm in arms])
        ax.set(xlabel="teacher" if key == "a" else "text the teacher reads of a pin", xlim=(-0.5, len(arms) - 0.5))
    ax.set_ylabel("accuracy, %\n(95 % interval; rings: seeds)")
    ax.grid(axis="y", color="#DDDDDD", lw=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    if ax.get_legend_handles_labels()[0]:
        fig.legend(loc="outside upper center", ncols=2, frameon=False)
    with common.atomic(path) as tmp:
        fig.savefig(tmp, dpi=150, format="png")
    plt.close(fig)


def compare(args):
    """--compare: reads every seed of every arm, measures, and puts the result into DIR/findings.json."""
    # 1. Arms; all on the same evaluation rows
    labels = [label for label, _ in args.compare]
    if len(set(labels)) < len(labels):
        raise common.Stop(f"--compare: a label stands twice in {', '.join(labels)}")
    arms = [(label, [read_arm(run, system) for run, system in seeds]) for label, seeds in args.compare]
    first = arms[0][1][0][0]
    for (_, seeds), (_, where) in zip(arms, args.compare):
        for (rows, *_), (run, _) in zip(seeds, where):
            if rows["ids"] != first["ids"] or (rows["label"] != first["label"]).any():
                raise common.Stop(f"{run} has other evaluation rows than {args.compare[0][1][0][0]} ({len(rows['label']):,} and {len(first['label']):,} rows): compare runs on the same labels")

    # 2. What is known already
    path, plot = args.into / "findings.json", args.into / f"finding_{args.finding}.png"
    findings = common.read_json(path) if path.exists() else {}
    title = args.title or FINDINGS[args.finding][0]
    about = {"title": title, "made_from": [[label, [facts["made"] for *_, facts in seeds]] for label, seeds in arms], "resamples": args.resamples, "seed": args.seed}
    identity = common.hashed(about)
    if findings.get(args.finding, {}).get("identity") == identity and plot.exists() and not args.overwrite:
        print(f"{args.into}: finding {args.finding} was measured before on the same arms, nothing to do")
        return

    # 3. Metrics, plot, tables
    entry = {"title": title, "identity": identity, **compare_arms(arms, args)}
    for arm, (_, seeds) in zip(entry["arms"], args.compare):
        arm["runs"] = [os.path.relpath(run, args.into) + f":{system}" for run, system in seeds]
        print(f"  {arm['label']:<32} accuracy {cell(arm['overall']['accuracy']):<20}  nDCG@20 {cell(arm['overall']['ndcg_20'], False)}  ({len(seeds)} seeds)")
    plot_finding(args.finding, entry, plot)
    findings = {**findings, args.finding: entry}
    common.write_json(path, {key: findings[key] for key in sorted(findings)})
    with common.atomic(args.into / "findings.md") as tmp:
        tmp.write_text(findings_report(findings), encoding="utf-8")
    print(f"wrote {args.into / 'findings.md'}")


# ---------------------------------------------------------------------------------------------------------------------


def main(argv=None):
    args = parse_args(argv)
    import matplotlib

    matplotlib.use("Agg")
    if args.compare:
        return compare(args)
    run, folder = args.run, args.run / "report"

    # 1. What is inherited
    made = common.need(run / "features", f"01_build_features.py --run {run}")
    inputs = {"features": made["identity"], "labels": common.need(run / "labels", f"03_label.py --run {run}")["identity"]}
    for path in sorted(run.glob("student*/stage.json")):
        student = common.need(path.parent, f"04_train_student.py --run {run}")
        if student["inputs"]["features"] != made["identity"] or student["inputs"].get("labels", inputs["labels"]) != inputs["labels"]:
            raise common.Stop(f"{path.parent} was trained on other features or labels than {run} holds now: run 04_train_student.py --overwrite")
        inputs[path.parent.name] = common.fingerprint(path.parent / "model.safetensors")
    if "student" not in inputs:
        raise common.Stop(f"{run / 'student'}: missing; make it with: python 04_train_student.py --run {run}")
    stage = Stage(folder, args, inputs)
    if stage.done:
        return

    # 2. Systems on the evaluation rows
    train, evaluation = read_rows(run)
    y, query, language = evaluation["label"], evaluation["query_index"], evaluation["language"]
    systems = all_systems(run, train, evaluation)
    counts = {"rows": len(y), "queries": len(np.unique(query))}
    print(f"evaluation: {counts['rows']:,} rows of {counts['queries']:,} queries; systems: {', '.join(systems)}")

    # 3. Metrics
    metrics = {"systems": {}}
    for name, (p, score) in systems.items():
        teacher = evaluation["teacher"] if name.startswith("student") else None
        part = lambda at: with_intervals(y[at], p[at], score[at], query[at], args.resamples, args.seed, None if teacher is None else teacher[at])
        metrics["systems"][name] = {"overall": part(np.ones(len(y), dtype=bool)),
                                    "by_language": {lang: part(language == lang) for lang in sorted(set(language))}}
        m = metrics["systems"][name]["overall"]
        print(f"  {name:<24} accuracy {cell(m['accuracy']):<20}  nDCG@20 {cell(m['ndcg_20'], False)}")

    # 4. Report
    shown = [n for n in ("student_human_labels", "student", "teacher") if n in systems]
    plot_accuracy(metrics, folder / "accuracy.png")
    plot_languages(metrics, folder / "accuracy_by_language.png")
    plot_confusion(y, systems, shown, folder / "confusion.png")
    plot_reliability(y, systems, shown, folder / "reliability.png")
    pages = search_pages(run, evaluation, systems, made["dataset"], args.search_pages, folder)
    with common.atomic(folder / "report.md") as tmp:
        tmp.write_text(report(metrics, counts, pages), encoding="utf-8")
    with common.atomic(folder / "metrics.json") as tmp:
        tmp.write_text(json.dumps(metrics, indent=1, sort_keys=False) + "\n")
    stage.finish(rows=counts)
    print(f"report: {folder / 'report.md'}")


if __name__ == "__main__":
    common.run(main)
