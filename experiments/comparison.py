"""Conditions of an experiment side by side, several seeds each: intervals, differences, tables, plots.

    compare("d", {"title": [("outputs/a", "teacher"), ("outputs/b", "teacher")], "+ caption": […]}, into)

A condition is a label and its systems, one a seed: (run, "teacher") or (run, name of a student's folder).
Writes into/findings.json, findings.md and finding_KEY.png.
"""

import importlib
import os
from itertools import combinations
from pathlib import Path
from statistics import mode
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from common import RELEVANT
from lib.inputs.inherited import refuse, require
from lib.inputs.pairs import read_labelled
from lib.results.pictures import drawable, picture_file
from lib.results.report import METRICS, cell, escaped, markdown_table, signed
from lib.stages.files import read_json, whole_file, write_json
from lib.stages.terminal import Stop

evaluate = importlib.import_module("05_evaluate")

FINDINGS = {
    "a": "A larger language model is a better teacher",
    "b": "More teacher-labelled impressions make a better student",
    "c": "A teacher trained on English labels carries over to other languages, and so does its student",
    "d": "Richer pin text makes a better teacher",
}
# Accuracy in the paper, of base sizes and of Llama-3-8B with QLoRA
PAPER_TEACHERS = {"BERT": 0.535, "T5": 0.569, "DeBERTa": 0.580, "Llama": 0.602}
COMPARED = {name: METRICS[name].heading for name in ("accuracy", f"auroc_{RELEVANT}", "ndcg_20")}
BLUE = "#0072B2"
ALL = ""  # "language" of a row over all languages


class System(NamedTuple):
    """A trained system on the evaluation rows, in the order of query and pin."""

    rows: dict  # label, query, language; key of the query, pin_id [B]
    p: np.ndarray  # [B, C]
    score: np.ndarray  # [B]
    about: dict  # stage.json of its student, or of the labels


def read_system(run, name):
    """Asks for nothing that it does not use: a teacher needs labels/labelled.parquet, a student its own
    folder."""
    run, labels = Path(run), "labels" if name == "teacher" else None
    features, folder = run / "features", run / (labels or name)
    made = require(features, evaluate.READS)
    about = require(folder, ("labelled.parquet", "model.safetensors"))
    if about["inputs"]["features"] != made["identity"]:
        refuse(folder, f"of other features than {features} holds now")
    _, rows = read_labelled(run, labels)
    pins = pq.read_table(features / "pins.parquet", columns=["pin_id"])["pin_id"]
    rows["pin_id"] = pins.take(rows["pin_index"]).to_numpy(zero_copy_only=False)
    order = np.lexsort([rows["pin_id"], rows["key"]])
    rows = {name: column[order] for name, column in rows.items()}
    return System(rows, *evaluate.trained_system(run, name, rows), about)


def home_language(run):
    """The language of most human training labels."""
    train, _ = read_labelled(Path(run), None)
    return mode(train["language"])


def measure_condition(systems, at, resamples, number):
    """Metrics on the rows `at`: a table of each seed's, and one of resampled means over seeds [R].

    A resample draws queries with replacement (the same ones for every seed and condition) and, with
    replacement, as many of the condition's seeds as it has, and averages those (the pigeonhole bootstrap,
    Owen, 2007). Few seeds understate how far seeds differ, so their values stand beside the interval."""
    runs = []
    for system in systems:
        y, query = system.rows["label"][at], system.rows["query"][at]
        runs.append(evaluate.Measured(y, system.p[at], system.score[at], query).bootstrap(resamples, seed=0))
    seeds, drawn = zip(*runs)
    drawn = np.stack([pd.DataFrame(of_seed) for of_seed in drawn], axis=1)  # [R, seeds, metrics]
    drawn_seeds = np.random.default_rng([0, number]).integers(0, len(runs), (resamples, len(runs)))
    means = np.take_along_axis(drawn, drawn_seeds[:, :, None], axis=1).mean(axis=1)
    return pd.DataFrame(seeds), pd.DataFrame(means, columns=list(seeds[0]))


def rows_of(value, resampled, **which):
    """A flat row a metric: its value, and interval by its values on resamples. Tables, a column a metric."""
    rows = []
    for metric in COMPARED:
        found = evaluate.interval(value[metric], resampled[metric])
        rows.append({**which, "metric": metric, **vars(found)})
    return rows


def measure(read, resamples, languages=()):
    """{label: [System]} -> two flat tables of rows, overall and by these languages: metrics of each
    condition, and differences of any two on the same resamples (hence tighter than two intervals)."""
    [[first, *_], *_] = read.values()
    language_of, table, differences = first.rows["language"], [], []
    for language in [ALL, *languages]:
        at = (language_of == language) | (language == ALL)
        found = {}
        for number, (label, systems) in enumerate(read.items()):
            seeds, means = measure_condition(systems, at, resamples, number)
            found[label] = seeds.mean(), means
            for row in rows_of(*found[label], condition=label, language=language):
                table.append({**row, "seeds": seeds[row["metric"]].round(6).tolist()})
        for minus, label in combinations(read, 2):
            (a, of_a), (b, of_b) = found[label], found[minus]
            differences += rows_of(a - b, of_a - of_b, condition=label, minus=minus, language=language)
    return table, differences


def find(rows, **which):
    """The row of a flat table with these values, as attributes; overall unless `language` is given; or None.
    find(entry["table"], condition="title", metric="accuracy").value"""
    which = {"language": ALL, **which}
    return next((SimpleNamespace(**row) for row in rows if which.items() <= row.items()), None)


def points(m):
    """A difference of two shares, in points: +3.1 [+1.0, +5.2]."""
    return "–" if m.low is None else f"{100 * m.value:+.1f} [{100 * m.low:+.1f}, {100 * m.high:+.1f}]"


def table_of(title, head, rows, **which):
    """Rows of measure() that have these values as a Markdown table: a line a condition, or two of them."""
    lines = {}
    for row in rows:
        m, name = SimpleNamespace(**row), row["condition"]
        percent = METRICS[m.metric].percent
        text = cell(m, percent)
        if "minus" in row:
            name, text = f"{name} − {m.minus}", points(m) if percent else signed(m)
        if which.items() <= row.items():
            lines.setdefault(name, [escaped(name)]).append(text)
    return markdown_table([title, *map(escaped, head)], lines.values())


def languages_of(entry):
    """Languages of an entry's table, that of the human labels first."""
    return list(dict.fromkeys(row["language"] for row in entry["table"] if row["language"] != ALL))


def findings_report(findings):
    """findings.md."""
    about = (
        "Mean over a condition's seeds; in brackets a 95 % interval that covers the choice of evaluation "
        "queries and of seeds (experiments/comparison.py, measure_condition). Differences are taken on the "
        "same resamples."
    )
    lines = ["# The paper's findings, measured", "", about]
    for key, entry in sorted(findings.items()):
        lines += ["", f"## ({key}) {entry['title']}", ""]
        lines += [f"{entry['rows']:,} human-labelled rows of {entry['queries']:,} queries.", ""]
        lines += [f"![finding {key}](finding_{key}.png)"]
        lines += table_of("condition", COMPARED.values(), entry["table"], language=ALL)
        if entry["differences"]:  # there are none of one condition
            lines += table_of("difference", COMPARED.values(), entry["differences"], language=ALL)
        if languages := languages_of(entry):
            title = f"{COMPARED[entry['shown']]} by language"
            lines += table_of(title, ["all", *languages], entry["table"], metric=entry["shown"])
    return "\n".join(lines) + "\n"


def plot_intervals(path, panels):
    """Metrics in a picture, a line each, with their intervals, and each seed as a ring. panels: {heading:
    {line's label: value, low, high, perhaps seeds}}, the same labels in each."""
    [labels, *_] = panels.values()
    size = 4 + 3 * len(panels), 1 + 0.25 * len(labels)
    places = range(len(labels))
    with whole_file(path) as temporary, picture_file(temporary, size) as figure:
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for ax, (heading, rows) in zip(axes, panels.items()):
            found = pd.DataFrame(rows.values(), columns=["value", "low", "high"], dtype=float)
            ax.hlines(places, found["low"], found["high"], color=BLUE, lw=1.4)
            ax.plot(found["value"], places, "o", color=BLUE, ms=6)
            for place, row in enumerate(rows.values()):
                seeds = row.get("seeds", [])
                ax.plot(seeds, [place] * len(seeds), "o", mfc="white", mec=BLUE, ms=3.5)
            ax.set_xlabel(f"{heading}, 95 % interval")
            ax.grid(axis="x", lw=0.3)
        axes[0].set_yticks(places, map(drawable, labels))
        axes[0].invert_yaxis()


def compare(key, conditions, into, resamples=1_000):
    """Measures {label: systems} as finding `key` and puts it into the folder `into`."""
    # 1. Systems; all on the same evaluation rows
    into, read, about, rows = Path(into), {}, {}, None
    for label, places in conditions.items():
        read[label] = [read_system(run, name) for run, name in places]
        for (run, _), system in zip(places, read[label]):
            rows = rows or system.rows
            for column in ("key", "pin_id", "label"):
                if not np.array_equal(system.rows[column], rows[column]):
                    raise Stop(f"{run} has other evaluation rows than the first: compare the same labels")
        made = read[label][0].about
        labels = made["arguments"].get("labels", "human")
        learnt = made["rows"].get("train")
        if labels == "teacher":
            learnt -= made["rows"]["human"]  # which it learns beside the impressions
        places = [f"{os.path.relpath(run, into)}:{name}" for run, name in places]
        about[label] = {"learnt_from": f"{labels} labels", "runs": places, "training_rows": learnt}
    [[(first, _), *_], *_] = conditions.values()
    home = home_language(first)

    # 2. Metrics
    tags = sorted(set(rows["language"]), key=lambda tag: (tag != home, tag))
    table, differences = measure(read, resamples, tags if len(tags) > 1 else ())
    two_levels = len(set(rows["label"])) == 2  # accuracy says little then
    entry = {
        "title": FINDINGS[key],
        "rows": len(rows["label"]),
        "queries": len(np.unique(rows["query"])),
        "home_language": home,
        "shown": f"auroc_{RELEVANT}" if two_levels else "accuracy",
        "conditions": about,
        "table": table,
        "differences": differences,
    }

    # 3. Plot, tables
    shown, languages = {}, languages_of(entry) if key == "c" else []
    for row in table:
        if row["metric"] == entry["shown"] and row["language"] in (languages or [ALL]):
            shown[f"{row['condition']}, {row['language']}".removesuffix(", ")] = row
    plot_intervals(into / f"finding_{key}.png", {COMPARED[entry["shown"]].removesuffix(" %"): shown})
    path = into / "findings.json"
    findings = {**(read_json(path) if path.exists() else {}), key: entry}
    write_json(path, dict(sorted(findings.items())))
    with whole_file(into / "findings.md") as path:
        path.write_text(findings_report(findings), encoding="utf-8")
    print(f"({key}) {FINDINGS[key]}: {into / 'findings.md'}")
