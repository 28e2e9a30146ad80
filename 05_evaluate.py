"""Stage 05: every system against the human labels of the evaluation queries.

Paper: the offline evaluation (accuracy on five levels, AUROC at levels 3, 4, 5) and nDCG@20, its online relevance metric. Intervals are 95 %
bootstrap intervals over queries.

Reads   RUN/features/, RUN/labels/labelled.parquet, every RUN/student*/
Writes  RUN/report/     metrics.json, report.md, plots as PNG, stage.json

Toy     python 05_evaluate.py
Paper   python 05_evaluate.py --preset paper --run /runs/search
"""

import argparse
import json
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


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--resamples", type=int, metavar="N", help="bootstrap resamples of the queries")
    p.add_argument("--search-pages", type=int, metavar="N", help="queries shown as pictures: pins ranked by BM25, student, teacher")
    p.add_argument("--seed", type=int, default=0)
    return common.parse(p, PRESETS, argv)


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


def with_intervals(y, p, score, query, resamples, seed, teacher=None):
    """{metric: {value, low, high}} with 95 % percentile bootstrap intervals over queries (Efron and Tibshirani, 1993, section 13.3).
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
    out = {}
    for name in value:
        sample = np.array([d[name] for d in drawn])
        sample = sample[np.isfinite(sample)]
        low, high = np.percentile(sample, [2.5, 97.5]) if len(sample) else (np.nan, np.nan)
        out[name] = {k: (round(float(v), 6) if np.isfinite(v) else None) for k, v in (("value", value[name]), ("low", low), ("high", high))}
    return out


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


def read_rows(run):
    """(train, evaluation) rows of labelled.parquet as dicts of arrays, with the teacher's p1 … p5 as `teacher` [B, C] and `language`."""
    table = pq.read_table(run / "features" / "labelled.parquet")
    rows = {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}
    rows["label"] = rows["label"].astype(np.int64)
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
    full = (Path(dataset) / path).resolve()
    if not full.is_relative_to(Path(dataset).resolve()):
        return None
    try:
        with Image.open(full) as image:
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


def main(argv=None):
    args = parse_args(argv)
    import matplotlib

    matplotlib.use("Agg")
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
