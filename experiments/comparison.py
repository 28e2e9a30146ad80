"""Conditions of an experiment side by side, several seeds each: intervals, differences, tables, plots.

    compare("d", {"title": [("outputs/a", "teacher"), ("outputs/b", "teacher")], "+ caption": […]}, into)

A condition is a label and its systems, one a seed: (run, "teacher") or (run, name of a student's folder).
Writes into/findings.json, findings.md and finding_KEY.png.
"""

import importlib
import os
from itertools import combinations, product
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq

from common import RELEVANT
from lib.inputs.inherited import refuse, require
from lib.inputs.pairs import read_labelled
from lib.results.pictures import drawable, picture_file
from lib.results.report import cell, escaped, markdown_table, signed
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
COMPARED = {"accuracy": "accuracy %", f"auroc_{RELEVANT}": f"AUROC ≥{RELEVANT}", "ndcg_20": "nDCG@20"}
BLUE = "#0072B2"
ALL = ""  # "language" of a row over all languages


class System(NamedTuple):
    """A trained system on the evaluation rows, in the order of their ids."""

    rows: dict  # label, query_index, language [B]
    ids: list  # of queries and pins [B]
    p: np.ndarray  # [B, C]
    score: np.ndarray  # [B]
    facts: dict  # how it was made


def read_system(run, name):
    """Asks for nothing that it does not use: a teacher needs labels/labelled.parquet, a student its own
    folder."""
    run, is_teacher = Path(run), name == "teacher"
    features, folder = run / "features", run / ("labels" if is_teacher else name)
    made = require(features, evaluate.READS)
    about = require(folder, ("labelled.parquet", "model.safetensors"))
    if about["inputs"]["features"] != made["identity"]:
        refuse(folder, f"of other features than {features} holds now")
    train, rows = read_labelled(run, "labels" if is_teacher else None)
    p, score = evaluate.trained_system(run, name, rows)
    ids = []
    for side, table in (("pin", "pins.parquet"), ("query", "queries.parquet")):
        column = pq.read_table(features / table, columns=[f"{side}_id"])[f"{side}_id"]
        ids.append(column.take(rows[f"{side}_index"]).to_numpy(zero_copy_only=False))
    order = np.lexsort(ids)
    rows = {column: rows[column][order] for column in ("label", "query_index", "language")}
    languages, count = np.unique(train["language"], return_counts=True)
    facts = {
        "home_language": str(languages[count.argmax()]),  # of the human training labels
        "learnt_from": "human labels" if is_teacher else f"{about['arguments']['labels']} labels",
        "training_rows": None if is_teacher else impressions_learnt(about),
    }
    return System(rows, [column[order].tolist() for column in ids], p[order], score[order], facts)


def impressions_learnt(about):
    """Impressions that a student learnt, or human labels where there were none. about: its stage.json."""
    rows = about["rows"]
    return rows["train"] - (rows["human"] if about["arguments"]["labels"] == "teacher" else 0)


def read_conditions(conditions):
    """{label: [System]}; Stop unless all were evaluated on the same rows."""
    read, first = {}, None
    for label, places in conditions.items():
        read[label] = [read_system(run, name) for run, name in places]
        for (run, _), system in zip(places, read[label]):
            first = first or (run, system)
            if system.ids != first[1].ids or (system.rows["label"] != first[1].rows["label"]).any():
                raise Stop(f"{run} has other evaluation rows than {first[0]}: compare the same labels")
    return read


def measure_condition(systems, at, resamples, number):
    """{metric: (mean over seeds, resampled means [R], each seed's value)} on the rows `at`.

    A resample draws queries with replacement (the same ones for every seed and condition) and, with
    replacement, as many of the condition's seeds as it has, and averages those (the pigeonhole bootstrap,
    Owen, 2007). Few seeds understate how far seeds differ, so their values stand beside the interval."""
    runs = []
    for system in systems:
        y, query = system.rows["label"][at], system.rows["query_index"][at]
        runs.append(evaluate.Measured(y, system.p[at], system.score[at], query).bootstrap(resamples, seed=0))
    drawn_seeds = np.random.default_rng([0, number]).integers(0, len(runs), (resamples, len(runs)))
    found = {}
    for metric in COMPARED:
        values = [value[metric] for value, _ in runs]
        drawn = np.stack([drawn[metric] for _, drawn in runs], axis=1)  # [R, seeds]
        found[metric] = np.mean(values), np.take_along_axis(drawn, drawn_seeds, axis=1).mean(axis=1), values
    return found


def measure(read, resamples, languages=()):
    """{label: [System]} -> two flat tables of rows, overall and by these languages: metrics of each
    condition, and differences of any two on the same resamples (hence tighter than two intervals)."""
    language_of = next(iter(read.values()))[0].rows["language"]
    found, table, differences = {}, [], []
    languages = [ALL, *languages]
    for language in languages:
        at = (language_of == language) | (language == ALL)
        for number, (label, systems) in enumerate(read.items()):
            for metric, measured in measure_condition(systems, at, resamples, number).items():
                found[label, language, metric] = measured
    for (label, language, metric), (value, drawn, seeds) in found.items():
        row = {"condition": label, "language": language, "metric": metric}
        row |= vars(evaluate.interval(value, drawn))
        table.append({**row, "seeds": [round(float(seed), 6) for seed in seeds]})
    for (minus, label), language, metric in product(combinations(read, 2), languages, COMPARED):
        a, b = found[label, language, metric], found[minus, language, metric]
        row = {"condition": label, "minus": minus, "language": language, "metric": metric}
        differences.append({**row, **vars(evaluate.interval(a[0] - b[0], a[1] - b[1]))})
    return table, differences


def find(rows, **which):
    """The row of a flat table with these values, as attributes; overall unless `language` is given; or None.
    find(entry["table"], condition="title", metric="accuracy").value"""
    which = {"language": ALL, **which}
    return next((SimpleNamespace(**row) for row in rows if which.items() <= row.items()), None)


def points(m):
    """A difference of two shares, in points: +3.1 [+1.0, +5.2]."""
    return "–" if m.value is None else f"{100 * m.value:+.1f} [{100 * m.low:+.1f}, {100 * m.high:+.1f}]"


def flat_table(title, rows, names):
    """Overall rows of measure() as a Markdown table, a line a condition, or two of them. names: columns that
    tell which."""
    lines = {}
    for row in rows:
        name, m = " − ".join(row[name] for name in names), SimpleNamespace(**row)
        text = signed(m) if "minus" in names else cell(m, False)
        lines.setdefault(name, [name]).append(text)
    head = [heading.removesuffix(" %") for heading in COMPARED.values()]
    return "\n".join(markdown_table([title, *head], lines.values()))


def languages_of(entry):
    """Languages of an entry's table, that of the human labels first."""
    return list(dict.fromkeys(row["language"] for row in entry["table"] if row["language"] != ALL))


def finding_text(key, entry):
    """A finding's section of findings.md, as lines."""
    table, labels, shown = entry["table"], list(entry["conditions"]), entry["shown"]
    by_seed = f"each seed: {COMPARED[shown].removesuffix(' %')} × 100"
    head = ["condition", *COMPARED.values(), by_seed, "points above the one before"]
    body = []
    for before, label in zip([None, *labels], labels):
        line = [find(table, condition=label, metric=metric) for metric in COMPARED]
        line = [escaped(label), cell(line[0]), *(cell(m, False) for m in line[1:])]
        seeds = find(table, condition=label, metric=shown).seeds
        line.append(", ".join(f"{100 * value:.1f}" for value in seeds))
        step = find(entry["differences"], condition=label, minus=before, metric=shown)
        line.append(points(step) if step else "")
        body.append(line)
    lines = [
        f"## ({key}) {entry['title']}",
        "",
        f"{entry['rows']:,} human-labelled rows of {entry['queries']:,} queries.",
        "",
        f"![finding {key}](finding_{key}.png)",
        *markdown_table(head, body),
    ]
    tags = languages_of(entry)
    if tags:
        body = []
        for label in labels:
            found = [find(table, condition=label, language=tag, metric=shown) for tag in tags]
            body.append([escaped(label), *(cell(m, shown == "accuracy") for m in found)])
        lines += markdown_table([f"{COMPARED[shown]} by language", *map(escaped, tags)], body)
    return lines


def findings_report(findings):
    """findings.md."""
    lines = [
        "# The paper's findings, measured",
        "",
        "Mean over a condition's seeds; in brackets a 95 % interval that covers the choice of evaluation "
        "queries and of seeds (experiments/comparison.py, measure_condition). Differences are taken on the "
        "same resamples.",
    ]
    for key, entry in sorted(findings.items()):
        lines += ["", *finding_text(key, entry)]
    return "\n".join(lines) + "\n"


def plot_intervals(path, panels):
    """Metrics in a picture, a row each, with their intervals, and each seed as a ring. panels: {heading:
    {row's label: a metric with value, low, high, perhaps seeds}}, the same labels in each."""
    labels = list(next(iter(panels.values())))
    size = 4 + 3 * len(panels), 1 + 0.25 * len(labels)
    with whole_file(path) as temporary, picture_file(temporary, size) as figure:
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for ax, (heading, rows) in zip(axes, panels.items()):
            for place, m in enumerate(rows.values()):
                if m.value is not None:
                    ax.plot([m.low, m.high], [place, place], color=BLUE, lw=1.4)
                    ax.plot(m.value, place, "o", color=BLUE, ms=6)
                for seed in getattr(m, "seeds", ()):
                    ax.plot(seed, place, "o", mfc="white", mec=BLUE, ms=3.5)
            ax.set_xlabel(f"{heading}, 95 % interval")
            ax.grid(axis="x", color="#DDDDDD", lw=0.6)
        axes[0].set_yticks(range(len(labels)), map(drawable, labels))
        axes[0].invert_yaxis()


def compare(key, conditions, into, resamples=1_000):
    """Measures {label: systems} as finding `key` and puts it into the folder `into`."""
    # 1. Systems; all on the same evaluation rows
    into, read = Path(into), read_conditions(conditions)
    first = next(iter(read.values()))[0]
    rows, home = first.rows, first.facts["home_language"]
    about = {}
    for label, systems in read.items():
        learnt = [system.facts["training_rows"] for system in systems]
        about[label] = {
            "learnt_from": systems[0].facts["learnt_from"],
            "runs": [f"{os.path.relpath(run, into)}:{name}" for run, name in conditions[label]],
            "training_rows": None if None in learnt else round(np.mean(learnt)),
        }

    # 2. Metrics
    tags = sorted(set(rows["language"]), key=lambda tag: (tag != home, tag))
    table, differences = measure(read, resamples, tags if len(tags) > 1 else ())
    two_levels = len(np.unique(rows["label"])) == 2  # accuracy says little then
    entry = {
        "title": FINDINGS[key],
        "rows": len(rows["label"]),
        "queries": len(np.unique(rows["query_index"])),
        "home_language": home,
        "shown": f"auroc_{RELEVANT}" if two_levels else "accuracy",
        "conditions": about,
        "table": table,
        "differences": differences,
    }

    # 3. Plot, tables
    shown = {}
    for language in (languages_of(entry) if key == "c" else ()) or [ALL]:
        for label in about:
            m = find(table, condition=label, language=language, metric=entry["shown"])
            shown[f"{label}, {language}" if language else label] = m
    plot_intervals(into / f"finding_{key}.png", {COMPARED[entry["shown"]].removesuffix(" %"): shown})
    findings = read_json(into / "findings.json") if (into / "findings.json").exists() else {}
    findings[key] = entry
    write_json(into / "findings.json", dict(sorted(findings.items())))
    with whole_file(into / "findings.md") as path:
        path.write_text(findings_report(findings), encoding="utf-8")
    print(f"({key}) {FINDINGS[key]}: {into / 'findings.md'}")
