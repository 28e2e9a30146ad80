"""Results as pictures: plots, pages of search results."""

import contextlib
import functools
import re
import textwrap

import matplotlib
import numpy as np
import pyarrow.parquet as pq
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import ImageOps
from sklearn.calibration import CalibrationDisplay
from sklearn.metrics import ConfusionMatrixDisplay

from common import LEVELS
from lib.stages.files import read_json
from lib.tables.images import load_image

# Okabe and Ito's colors, told apart by the color-blind and in grey by their lightness.
COLORS = {
    "majority": "#999999",
    "bm25": "#E69F00",
    "embedding": "#F0E442",
    "match": "#CC79A7",
    "student_human_labels": "#56B4E9",
    "student": "#0072B2",
    "teacher": "#D55E00",
    "pooled": "#000000",
}
SHOWN = ["title", "description", "caption", "image"]  # of a pin
OTHER_COLOR = "#009E73"  # of further students
LEVEL_COLORS = {1: "#B2182B", 2: "#EF8A62", 3: "#CCCCCC", 4: "#67A9CF", 5: "#2166AC"}


@functools.cache
def glyphs(path):
    """The characters that a font file draws; of a broken file none."""
    with contextlib.suppress(Exception):
        return frozenset(font_manager.get_font(path).get_charmap())
    return frozenset()


@functools.cache
def family_of(character):
    """The font family to draw a character with; None: no font of this machine has it."""

    def last(font):
        return font.name != "DejaVu Sans", font.style != "normal", font.weight != 400, font.fname

    for font in sorted(font_manager.fontManager.ttflist, key=last):
        is_fit = not re.search("Color|Last ?Resort", font.name)  # not drawn in color; a frame for all
        if is_fit and ord(character) in glyphs(font.fname):
            return font.name
    return None


def drawable(text):
    """A text on one line, □ for what no font draws; fonts join those of picture_file()'s figure."""
    text = "".join(c for c in " ".join(str(text).split()) if c.isprintable())
    families = {c: family_of(c) for c in text}
    known = dict.fromkeys([*matplotlib.rcParams["font.family"], *filter(None, families.values())])
    matplotlib.rcParams["font.family"] = list(known)
    return "".join(c if families[c] else "□" for c in text)


@contextlib.contextmanager
def picture_file(path, figsize):
    """Yields a figure that is written to `path`. Texts are drawn as they are, never read as formulas; those
    of anybody go through drawable()."""
    style = {"axes.spines.top": False, "axes.spines.right": False}
    style |= {"text.parse_math": False, "font.family": ["DejaVu Sans"]}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=figsize, layout="constrained")
        yield figure
        for text in figure.findobj(Text):  # one of an axis may be older than its font's place in the list
            text.set_fontfamily(matplotlib.rcParams["font.family"])
        figure.savefig(path, dpi=150, format="png")


def plots(table, y, systems, scaled, levels, folder):
    """All plots of the report. y: labels [B]; systems: {name: (probabilities [B, C], score [B])}; scaled:
    {name: probabilities at the fitted temperature}; levels: those in use."""
    trained = [name for name in ("student_human_labels", "student", "teacher") if name in systems]
    p = {name: systems[name][0] for name in trained}
    plot_accuracy(table, folder / "accuracy.png")
    plot_confusion(y, p, levels, folder / "confusion.png")
    fitted = [name for name in trained if name in scaled]
    at_temperature = {name: scaled[name] for name in fitted}
    plot_reliability(y, p, at_temperature, folder / "reliability.png")


def plot_accuracy(table, path):
    """Accuracy by system, of all queries and, where there are several, by language."""
    groups = ["all", *next(iter(table.values()))["by_language"]]
    groups = groups if len(groups) > 2 else ["all"]
    bar = 0.8 / len(table)
    with picture_file(path, (max(6, 1.2 * len(groups) + 3), 3.6)) as figure:
        ax = figure.subplots()
        for number, (system, parts) in enumerate(table.items()):
            found = [parts["overall"], *parts["by_language"].values()][: len(groups)]
            found = [metrics["accuracy"] for metrics in found]
            low, value, high = 100 * np.array([[m.low, m.value, m.high] for m in found]).T
            error = np.maximum([value - low, high - value], 0)
            places = np.arange(len(groups)) + (number - (len(table) - 1) / 2) * bar
            style = {"color": COLORS.get(system, OTHER_COLOR), "label": system, "capsize": 2}
            bars = ax.bar(places, value, 0.92 * bar, yerr=error, **style)
            ax.bar_label(bars, fmt="%.0f", fontsize=6)
        ax.set_xticks(range(len(groups)), map(drawable, groups))
        ax.set(xlabel="language of the query", ylabel="accuracy, %\n(95 % interval over queries)")
        ax.set_ylim(0, 105)
        figure.legend(loc="outside upper center", ncols=3, frameon=False)


def plot_confusion(y, p, levels, path):
    """Confusion matrices, rows normalized: human level against most probable level. p: {system: [B, C]}."""
    style = {"cmap": "Blues", "values_format": ".2f", "colorbar": False, "normalize": "true"}
    with picture_file(path, (3.6 * len(p), 3.5)) as figure:
        for ax, (name, probabilities) in zip(figure.subplots(1, len(p), squeeze=False)[0], p.items()):
            guess = probabilities.argmax(1) + 1
            labels = np.union1d(levels, guess)
            ConfusionMatrixDisplay.from_predictions(y, guess, labels=labels, ax=ax, **style)
            ax.set(title=name, xlabel="most probable level", ylabel="human level")
        figure.suptitle("share of the human level's rows", fontsize=10)


def plot_reliability(y, p, scaled, path):
    """Reliability diagram: how often the most probable level is right, by its probability. p, scaled:
    {system: [B, C]}, as they are and at the fitted temperature."""
    bins = {"n_bins": 10, "strategy": "quantile", "markersize": 4}
    with picture_file(path, (4.6, 4.2)) as figure:
        ax = figure.subplots()
        for curves, line, more in ((p, "-", ""), (scaled, "--", " at its temperature")):
            for name, probabilities in curves.items():
                right, style = probabilities.argmax(1) + 1 == y, {"linestyle": line, "name": name + more}
                style["color"] = COLORS.get(name, OTHER_COLOR)
                CalibrationDisplay.from_predictions(right, probabilities.max(1), ax=ax, **bins, **style)
        ax.set_xlabel("probability given to the most probable level")
        ax.set_ylabel("share of rows where it is right")
        ax.legend(fontsize=7)


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


def draw_pins(lines, dataset, title, path):
    """Pins as pictures, a line for each of `lines`: its name, and its pins, each a row of pins.parquet, the
    level whose color the frame has, and the words below."""
    width = max(len(pins) for _, pins in lines)
    with picture_file(path, (1.5 * width + 1, 2 * len(lines) + 0.6)) as figure:
        for axes, (name, pins) in zip(figure.subplots(len(lines), width, squeeze=False), lines):
            for ax in axes[len(pins) :]:
                ax.axis("off")
            for ax, (pin, level, words) in zip(axes, pins):
                show_pin(ax, pin, level, dataset, words)
            axes[0].set_ylabel(name, fontsize=9)
        figure.suptitle(drawable(title), fontsize=9)


def show_pin(ax, pin, level, dataset, words):
    """A pin in a frame of its level's color, `words` below: its picture, else a card of its text."""
    image = picture(dataset, pin["image"])
    if image is not None:
        ax.imshow(image)
    else:
        title = pin["title"] or pin["caption"] or pin["description"] or "no text"
        heads = textwrap.wrap(drawable(title), 17)[:3]
        more = "" if title == pin["description"] else pin["description"] or ""
        lines = textwrap.wrap(drawable(more), 22)[: 9 - 2 * len(heads)]
        ax.set_facecolor("#F4F1EA")
        at = {"transform": ax.transAxes, "va": "top", "clip_on": True}
        ax.text(0.06, 0.93, "\n".join(heads), fontsize=6.5, **at)
        ax.text(0.06, 0.88 - 0.09 * len(heads), "\n".join(lines), fontsize=5.5, color="#444444", **at)
    ax.set(xticks=[], yticks=[], box_aspect=1)
    ax.spines[:].set(color=LEVEL_COLORS[level], linewidth=4, visible=True)
    ax.set_xlabel(words, fontsize=7)


def best_pins(rows, systems, query, table, top=6):
    """Lines for draw_pins(): the `top` judged pins of a query, its row number, by BM25, student and teacher,
    in the color of the human level. table: pins.parquet."""
    at, lines = np.flatnonzero(rows["query"] == query), []
    names = [name for name in ("bm25", "student", "teacher") if name in systems]
    for name in names if len(names) > 1 else ("bm25", "match"):
        best = at[np.argsort(-systems[name][1][at], kind="stable")][:top]
        pins, levels = table.take(rows["pin_index"][best]).to_pylist(), rows["label"][best]
        words = [f"{level} {LEVELS[level]}" for level in levels]
        lines.append((name, [*zip(pins, levels, words)]))
    return lines


def search_pages(run, rows, systems, queries, folder):
    """Search result pages of queries (of queries.one_by_one). Returns {file name: caption}."""
    dataset = read_json(run / "features" / "stage.json")["dataset"]
    table, pages = pq.read_table(run / "features" / "pins.parquet", columns=SHOWN), {}
    for number, query in enumerate(queries, 1):
        lines, path = best_pins(rows, systems, query["index"], table), folder / f"search_{number}.png"
        title = f"“{query['query']}” ({query['language']}): best first; frame and text: human level"
        draw_pins(lines, dataset, title, path)
        found = ", ".join(f"{name} {query[name]:.2f}" for name, _ in lines)
        caption = f"“{query['query']}”, its judged pins only, ranked by each system. nDCG@20: {found}."
        pages[path.name] = caption
    return pages
