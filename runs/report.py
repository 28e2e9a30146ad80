"""How results are shown: tables, plots, pages of search results, report.md. No method is in it."""

import textwrap

import numpy as np
import pyarrow.parquet as pq
from matplotlib.figure import Figure
from PIL import ImageOps
from sklearn.calibration import CalibrationDisplay
from sklearn.metrics import ConfusionMatrixDisplay

from common import LEVELS, NUM_LEVELS
from data.images import load_image

# Accuracy on the paper's human evaluation set: of which system here, of what there, in the paper.
PAPER = (
    ("teacher", "Llama-3-8B, QLoRA", 0.602),
    ("student", "given by one summary of the paper", 0.548),
    ("(embedding baseline)", "SearchSage, derived from a stated relative gain of 19.7 %", 0.503),
)

# Okabe and Ito's colors, told apart by the color-blind and in grey by their lightness.
COLORS = {
    "majority": "#999999",
    "bm25": "#E69F00",
    "student_human_labels": "#56B4E9",
    "student": "#0072B2",
    "teacher": "#D55E00",
}
OTHER_COLOR = "#009E73"  # of further students
LEVEL_COLORS = {1: "#B2182B", 2: "#EF8A62", 3: "#CCCCCC", 4: "#67A9CF", 5: "#2166AC"}

METRICS = {  # in tables: heading, and whether as a percentage
    "accuracy": ("accuracy %", True),
    "within_one": ("within one %", True),
    "auroc_3": ("AUROC ≥3", False),
    "auroc_4": ("AUROC ≥4", False),
    "auroc_5": ("AUROC ≥5", False),
    "ndcg_20": ("nDCG@20", False),
    "ece": ("ECE", False),
    "kl_to_teacher": ("KL to teacher", False),
}
ALL = ""  # "language" of a metric over all rows


# ------------------------------------------------------------------------------------------------------------
# Tables and report.md


def systems_of(table):
    """The systems of a table {(system, language, metric): Interval}, in its order."""
    return list(dict.fromkeys(system for system, _, _ in table))


def languages_of(table):
    """The languages of a table."""
    return list(dict.fromkeys(language for _, language, _ in table if language != ALL))


def cell(m, percent=True):
    """A metric's value, low and high as `value [low, high]` for a table."""
    if m is None or m.value is None:
        return "–"
    if percent:
        return f"{100 * m.value:.1f} [{100 * m.low:.1f}, {100 * m.high:.1f}]"
    return f"{m.value:.3f} [{m.low:.3f}, {m.high:.3f}]"


def markdown_table(head, lines):
    """A Markdown table, with an empty line before it."""
    rule = "|---" * len(head) + "|"
    return ["", f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(line)} |" for line in lines), ""]


def report(table, counts, pages):
    """report.md."""
    systems, languages = systems_of(table), languages_of(table)
    lines = [f"# Evaluation\n\n{counts['rows']:,} human-labelled rows of {counts['queries']:,} queries. "
             "In brackets: 95 % bootstrap interval over queries."]  # fmt: skip
    head = ["system", *(heading for heading, _ in METRICS.values())]
    body = []
    for system in systems:
        cells = [cell(table.get((system, ALL, metric)), percent) for metric, (_, percent) in METRICS.items()]
        body.append([system, *cells])
    lines += markdown_table(head, body)
    lines.append("## Beside the paper\n\nThe paper's rows are its own data and models; they are here for "
                 "orientation, not for comparison of the numbers.")  # fmt: skip
    head = ["", "accuracy here %", "accuracy in the paper %", "the paper's system"]
    body = []
    for system, what, value in PAPER:
        body.append([system, cell(table.get((system, ALL, "accuracy"))), f"{100 * value:.1f}", what])
    lines += markdown_table(head, body)
    lines.append("## Accuracy by language, %")
    body = []
    for system in systems:
        body.append([system, *(cell(table[system, language, "accuracy"]) for language in languages)])
    lines += markdown_table(["system", *languages], body)
    plots = ("accuracy.png", "accuracy_by_language.png", "confusion.png", "reliability.png", *pages)
    lines += ["## Plots", "", *(f"![{name}]({name})" for name in plots)]
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------------------------------
# Plots


def shown(system):
    """A system's name in a plot."""
    return system.replace("_", " ")


def in_percent(found):
    """Metrics with value, low, high [N] -> values [N] in % and their error bars [2, N]."""
    value, low, high = (100 * np.array([[m.value, m.low, m.high] for m in found], dtype=float)).T
    return value, np.maximum([value - low, high - value], 0)


def plot_accuracy(table, path):
    """Accuracy by system."""
    systems = systems_of(table)[::-1]
    figure = Figure(figsize=(7, 0.55 * len(systems) + 1.1), layout="constrained")
    ax = figure.subplots()
    for place, system in enumerate(systems):
        m = table[system, ALL, "accuracy"]
        value, error = in_percent([m])
        ax.barh([place], value, 0.62, xerr=error, capsize=3, color=COLORS.get(system, OTHER_COLOR))
        ax.text(100 * m.high + 1, place, f"{100 * m.value:.1f}", va="center")
    ax.set_yticks(range(len(systems)), [shown(system) for system in systems])
    ax.set(xlabel="accuracy on human evaluation labels, % (95 % interval over queries)", xlim=(0, 105))
    ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def plot_languages(table, path):
    """Accuracy by language and system."""
    systems, languages = systems_of(table), languages_of(table)
    figure = Figure(figsize=(max(6, 1.2 * len(languages) + 3), 3.6), layout="constrained")
    ax, width = figure.subplots(), 0.8 / len(systems)
    for number, system in enumerate(systems):
        value, error = in_percent([table[system, language, "accuracy"] for language in languages])
        places = np.arange(len(languages)) + (number - (len(systems) - 1) / 2) * width
        style = {"color": COLORS.get(system, OTHER_COLOR), "label": shown(system)}
        ax.bar(places, value, 0.92 * width, yerr=error, capsize=2, **style)
    ax.set_xticks(range(len(languages)), languages)
    ax.set(xlabel="language of the query", ylabel="accuracy, %\n(95 % interval over queries)", ylim=(0, 105))
    ax.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=150)


def plot_confusion(y, systems, names, path):
    """Confusion matrices, rows normalized: human level against most probable level."""
    figure = Figure(figsize=(3.6 * len(names), 3.5), layout="constrained")
    levels = range(1, NUM_LEVELS + 1)
    for ax, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        guess = systems[name][0].argmax(1) + 1
        style = {"cmap": "Blues", "values_format": ".2f", "colorbar": False, "ax": ax}
        ConfusionMatrixDisplay.from_predictions(y, guess, labels=levels, normalize="true", **style)
        ax.set(title=shown(name), xlabel="most probable level", ylabel="human level")
    figure.suptitle("share of the human level's rows", fontsize=10)
    figure.savefig(path, dpi=150)


def plot_reliability(y, systems, names, path):
    """Reliability diagram: how often the most probable level is right, by its probability."""
    figure = Figure(figsize=(4.6, 4.2), layout="constrained")
    ax = figure.subplots()
    for name in names:
        p = systems[name][0]
        right, confidence = p.argmax(1) + 1 == y, p.max(1)
        style = {"color": COLORS.get(name, OTHER_COLOR), "name": shown(name), "ax": ax}
        CalibrationDisplay.from_predictions(right, confidence, n_bins=10, **style)
    ax.set(xlabel="probability given to the most probable level", ylabel="share of rows where it is right")
    figure.savefig(path, dpi=150)


# ------------------------------------------------------------------------------------------------------------
# Pages of search results


def picture(dataset, path, size=160):
    """A pin's image as RGB, or None; never from outside the dataset."""
    if not path:
        return None
    try:
        return ImageOps.fit(load_image(dataset, path), (size, size))
    except ValueError:  # a broken image; stage 01 has listed it
        return None


def plot_search_page(rows, systems, query, pins, dataset, path, top=6):
    """One query's results as pictures: the `top` pins by BM25, student and teacher, the human level as a
    colored frame. pins: {pin_index: row of pins.parquet}."""
    at = np.flatnonzero(rows["query_index"] == query["index"])
    names = [name for name in ("bm25", "student", "teacher") if name in systems]
    figure = Figure(figsize=(1.25 * top + 1, 1.75 * len(names) + 0.6), layout="constrained")
    for line, name in zip(figure.subplots(len(names), top, squeeze=False), names):
        line[0].set_ylabel(name, fontsize=9)
        best = at[np.argsort(-systems[name][1][at], kind="stable")][:top]
        for ax in line[len(best) :]:
            ax.axis("off")
        for ax, row in zip(line, best):
            pin, level = pins[int(rows["pin_index"][row])], rows["label"][row]
            image = picture(dataset, pin["image"])
            if image is not None:
                ax.imshow(image, aspect="auto")
            else:
                words = textwrap.fill((pin["title"] or pin["caption"] or "no text")[:42], 14)
                ax.text(0.5, 0.5, words, ha="center", va="center", fontsize=7)
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set(color=LEVEL_COLORS[level], linewidth=4, visible=True)
            ax.set_xlabel(f"{level} {LEVELS[level]}", fontsize=7)
    title = f"“{query['query']}” ({query['language']}): best first; frame and text: human level"
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=150)


def search_pages(run, rows, systems, dataset, n, folder):
    """Search result pages for `n` evaluation queries with many labelled pins, one language after another.
    Returns file names."""
    queries = pq.read_table(run / "features" / "queries.parquet", columns=["query", "language"])
    index, count = np.unique(rows["query_index"], return_counts=True)
    by_language = {}
    for number in index[np.lexsort((index, -count))].tolist():
        by_language.setdefault(queries["language"][number].as_py(), []).append(number)
    turns = []
    for turn in range(n):
        turns += [line[turn] for line in by_language.values() if turn < len(line)]
    table = pq.read_table(run / "features" / "pins.parquet", columns=["title", "caption", "image"])
    names = []
    for number in turns[:n]:
        at = np.unique(rows["pin_index"][rows["query_index"] == number])
        pins = dict(zip(at.tolist(), table.take(at).to_pylist()))
        query = {"index": number, **queries.slice(number, 1).to_pylist()[0]}
        names.append(f"search_{len(names) + 1}.png")
        plot_search_page(rows, systems, query, pins, dataset, folder / names[-1])
    return names
