"""Conditions of an experiment side by side, several seeds each: intervals, differences, tables, plots.

    compare("d", {"title": [("outputs/a", "teacher"), ("outputs/b", "teacher")], "+ caption": […]}, into)

A condition is a label and its systems, one a seed: (run, "teacher") or (run, name of a student's folder).
Writes into/findings.json, findings.md and finding_KEY.png.
"""

import importlib
import os
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq

from common import RELEVANT
from lib.inputs.pairs import read_labelled
from lib.results.pictures import drawable, in_percent, picture_file
from lib.results.report import ALL, cell, escaped, markdown_table
from lib.stages.files import hashed, read_json, whole_file, write_json
from lib.stages.finished import remake, require_finished
from lib.stages.terminal import Stop

evaluate = importlib.import_module("05_evaluate")

# The paper's findings: what it says, and the figures that it gives.
FINDINGS = {
    "a": (
        "A larger language model is a better teacher",
        "The paper's table of teachers says so.",
    ),
    "b": (
        "More teacher-labelled impressions make a better student",
        "The paper says so, at about 10, 50 and 100 times the human set; its figures could not be read. One "
        "summary gives its student 54.8 %.",
    ),
    "c": (
        "A teacher trained on English labels carries over to other languages, and so does its student",
        "The paper says so; its figures by language could not be read.",
    ),
    "d": (
        "Richer pin text makes a better teacher",
        "The paper says so, and calls it significant; its figures by text source could not be read.",
    ),
}
# Accuracy in the paper, of base sizes and of Llama-3-8B with QLoRA
PAPER_TEACHERS = {"BERT": 0.535, "T5": 0.569, "DeBERTa": 0.580, "Llama": 0.602}
COMPARED = {"accuracy": "accuracy %", f"auroc_{RELEVANT}": f"AUROC ≥{RELEVANT}", "ndcg_20": "nDCG@20"}
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito


# ------------------------------------------------------------------------------------------------------------
# Reading


@dataclass
class System:
    """A trained system on the evaluation rows, in the order of their ids."""

    rows: dict  # label, query_index, language [B]
    ids: list  # of queries and pins [B]
    p: np.ndarray  # [B, C]
    score: np.ndarray  # [B]
    facts: dict  # how it was made


def read_system(run, name):
    """Asks for nothing that it does not use: a teacher needs labels/labelled.parquet, a student its own
    folder."""
    run = Path(run)
    is_teacher = name == "teacher"
    features, folder = run / "features", run / ("labels" if is_teacher else name)
    teach, learn = (
        f"03_label.py --run {run} --only-labelled",
        f"04_train_student.py --run {run} --name {name}",
    )
    made = require_finished(features, f"01_build_features.py --run {run}", evaluate.READS)
    about = require_finished(
        folder, teach if is_teacher else learn, ("labelled.parquet", "model.safetensors")
    )
    if about["inputs"]["features"] != made["identity"]:
        how = remake(folder, teach if is_teacher else learn)
        raise Stop(f"{folder}: of other features than {features} holds now; {how}")
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
        "made": about["identity"],
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
        read[label] = []
        for run, name in places:
            system = read_system(run, name)
            first = first or (run, system)
            same = system.ids == first[1].ids and (system.rows["label"] == first[1].rows["label"]).all()
            if not same:
                raise Stop(
                    f"{run} has other evaluation rows than {first[0]}: compare runs on the same labels"
                )
            read[label].append(system)
    return read


# ------------------------------------------------------------------------------------------------------------
# Measuring


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


def measure(read, resamples):
    """{label: [System]} -> two flat tables of rows: metrics of each condition, and differences of any two on
    the same resamples (hence tighter than two intervals). accuracy_kept: accuracy in a language over that in
    the language of the human labels."""
    first = next(iter(read.values()))[0]
    home, language_of = first.facts["home_language"], first.rows["language"]
    found, table, differences = {}, [], []
    languages = [ALL, *sorted(set(language_of), key=lambda language: (language != home, language))]
    for language in languages:
        at = np.ones(len(language_of), dtype=bool) if language == ALL else language_of == language
        for number, (label, systems) in enumerate(read.items()):
            for metric, measured in measure_condition(systems, at, resamples, number).items():
                found[label, language, metric] = measured
    for (label, language, metric), (value, drawn, seeds) in found.items():
        row = {"condition": label, "language": language, "metric": metric}
        table.append(
            {**row, **evaluate.interval(value, drawn)._asdict(), "seeds": [round(float(v), 6) for v in seeds]}
        )
        at_home = found.get((label, home, "accuracy"))
        if metric == "accuracy" and language not in (ALL, home) and at_home:
            with np.errstate(divide="ignore", invalid="ignore"):  # a resample without a right row
                kept = evaluate.interval(value / at_home[0], drawn / at_home[1])
            table.append({**row, "metric": "accuracy_kept", **kept._asdict()})
    for minus, label in combinations(read, 2):
        for language in languages:
            for metric in COMPARED:
                a, b = found[label, language, metric], found[minus, language, metric]
                row = {"condition": label, "minus": minus, "language": language, "metric": metric}
                differences.append({**row, **evaluate.interval(a[0] - b[0], a[1] - b[1])._asdict()})
    return table, differences


def find(rows, **which):
    """The row of a flat table with these values, as attributes; overall unless `language` is given; or None.
    find(entry["table"], condition="title", metric="accuracy").value"""
    which = {"language": ALL, **which}
    for row in rows:
        if which.items() <= row.items():
            return SimpleNamespace(**row)
    return None


# ------------------------------------------------------------------------------------------------------------
# Showing


def points(m):
    """A difference of two shares, in points: +3.1 [+1.0, +5.2]."""
    if m.value is None:
        return "–"
    return f"{100 * m.value:+.1f} [{100 * m.low:+.1f}, {100 * m.high:+.1f}]"


def languages_of(entry):
    """Languages of an entry's table, that of the human labels first."""
    return list(dict.fromkeys(row["language"] for row in entry["table"] if row["language"] != ALL))


def finding_text(key, entry):
    """A finding's section of findings.md, as lines."""
    table, labels, shown = entry["table"], list(entry["conditions"]), entry["shown"]
    paper = key == "a" and shown == "accuracy" and bool(PAPER_TEACHERS.keys() & set(labels))
    lines = [f"## ({key}) {escaped(entry['title'])}", ""]
    lines.append(f"{FINDINGS[key][1]} {entry['rows']:,} human-labelled rows of {entry['queries']:,} queries.")
    lines += ["", f"![finding {key}](finding_{key}.png)"]
    body = []
    for number, label in enumerate(labels):
        accuracy, auroc, ndcg = (find(table, condition=label, metric=metric) for metric in COMPARED)
        seeds = ", ".join(f"{100 * value:.1f}" for value in find(table, condition=label, metric=shown).seeds)
        before = {"condition": label, "minus": labels[number - 1], "metric": shown}
        step = points(find(entry["differences"], **before)) if number else ""
        line = [label, cell(accuracy), seeds, step, cell(auroc, False), cell(ndcg, False)]
        there = PAPER_TEACHERS.get(label)
        body.append([escaped(label), *line[1:]] + [f"{100 * there:.1f}" if there else "–"] * paper)
    by_seed = f"each seed: {COMPARED[shown].removesuffix(' %')} × 100"
    head = ["condition", "accuracy %", by_seed, "points above the one before", "AUROC ≥4", "nDCG@20"]
    lines += markdown_table(head + ["the paper, accuracy %"] * paper, body)
    shown = COMPARED if key == "c" else {"accuracy": COMPARED["accuracy"]}
    if key == "c":
        shown = {**shown, "accuracy_kept": f"accuracy kept, % of that in {entry['home_language']}"}
    for metric, title in shown.items():
        body = []
        for label in labels:
            found = [find(table, condition=label, language=tag, metric=metric) for tag in languages_of(entry)]
            body.append([escaped(label), *(cell(m, metric.startswith("accuracy")) for m in found)])
        tags = [escaped(tag) for tag in languages_of(entry)]
        lines += markdown_table([f"{title} by language", *tags], body)
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


def dots(ax, x, found, color, marker="o", label=None):
    """Means in % with their intervals, and each seed as a small ring. found: rows of a table."""
    value, error = in_percent(found)
    ax.errorbar(x, value, yerr=error, fmt=marker, color=color, capsize=3, ms=6, lw=1.4, label=label)
    for place, m in zip(x, found):
        seeds = [100 * seed for seed in m.seeds]
        ax.plot([place] * len(seeds), seeds, "o", mfc="white", mec=color, ms=3.5, mew=0.9, zorder=3)


def plot_amounts(ax, entry):
    """(b): a curve over training rows, and what the human labels alone give."""
    curve, x, others = [], [], list(PALETTE[1:])
    for label, about in entry["conditions"].items():
        m = find(entry["table"], condition=label, metric=entry["shown"])
        if about["learnt_from"] == "teacher labels":
            curve.append(m)
            x.append(about["training_rows"])
        else:
            color = others.pop(0)
            ax.axhline(100 * m.value, color=color, ls="--", lw=1.4, label=drawable(label))
            ax.axhspan(100 * m.low, 100 * m.high, color=color, alpha=0.13, lw=0)
    ax.plot(x, [100 * m.value for m in curve], color=PALETTE[0], lw=1.2)
    dots(ax, x, curve, PALETTE[0], label="student on the teacher's labels")
    ax.set(xscale="log", xlabel="teacher-labelled impressions trained on, rows (logarithmic)")
    ax.set_xticks(x, [f"{n:,}" for n in x])
    ax.minorticks_off()


def plot_languages(ax, entry):
    """(c): conditions by language."""
    labels, languages, metric = list(entry["conditions"]), languages_of(entry), entry["shown"]
    for number, label in enumerate(labels):
        found = [find(entry["table"], condition=label, language=tag, metric=metric) for tag in languages]
        shift = 0.7 * (number - (len(labels) - 1) / 2) / len(labels)
        style = {
            "color": PALETTE[number % len(PALETTE)],
            "marker": "osD^vP"[number % 6],
            "label": drawable(label),
        }
        dots(ax, np.arange(len(languages)) + shift, found, **style)
    ax.set_xticks(range(len(languages)), map(drawable, languages))
    ax.set_xlabel(f"language of the query (human training labels: {drawable(entry['home_language'])})")


def plot_conditions(ax, entry, key):
    """(a), (d): conditions beside each other."""
    labels = list(entry["conditions"])
    found = [find(entry["table"], condition=label, metric=entry["shown"]) for label in labels]
    dots(ax, range(len(labels)), found, PALETTE[0], label="here")
    if key == "a" and entry["shown"] == "accuracy" and PAPER_TEACHERS.keys() & set(labels):
        there = [100 * PAPER_TEACHERS.get(label, np.nan) for label in labels]
        ax.plot(there, "D", color=PALETTE[1], ms=6, label="the paper (other data and models)")
    ax.set_xticks(range(len(labels)), map(drawable, labels))
    ax.set_xlabel("teacher" if key == "a" else "text the teacher reads of a pin")
    ax.set_xlim(-0.5, len(labels) - 0.5)


def plot_finding(key, entry, path):
    """finding_KEY.png."""
    texts = [*entry["conditions"], *languages_of(entry)]
    with whole_file(path) as temporary, picture_file(temporary, (7, 3.8), texts) as figure:
        ax = figure.subplots()
        if key == "b":
            plot_amounts(ax, entry)
        elif key == "c":
            plot_languages(ax, entry)
        else:
            plot_conditions(ax, entry, key)
        ax.set_ylabel(f"{COMPARED[entry['shown']].removesuffix(' %')} × 100\n(95 % interval; rings: seeds)")
        ax.grid(axis="y", color="#DDDDDD", lw=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        if len(ax.get_legend_handles_labels()[0]) > 1:
            figure.legend(loc="outside upper center", ncols=2, frameon=False)


# ------------------------------------------------------------------------------------------------------------


def compare(key, conditions, into, resamples=1_000, title=None):
    """Measures {label: systems} as finding `key` and puts it into the folder `into`."""
    # 1. Systems; all on the same evaluation rows
    into = Path(into)
    read = read_conditions(conditions)

    # 2. What is known already
    findings_path, plot = into / "findings.json", into / f"finding_{key}.png"
    findings = read_json(findings_path) if findings_path.exists() else {}
    title = title or FINDINGS[key][0]
    made = {label: [system.facts["made"] for system in systems] for label, systems in read.items()}
    rows = next(iter(read.values()))[0].rows
    two_levels = len(np.unique(rows["label"])) == 2  # accuracy says little then
    shown = f"auroc_{RELEVANT}" if two_levels else "accuracy"
    identity = hashed([title, list(made.items()), resamples, shown])
    if findings.get(key, {}).get("identity") == identity and plot.exists():
        print(f"{into}: finding {key} was measured before on the same conditions, nothing to do")
        return

    # 3. Metrics
    table, differences = measure(read, resamples)
    about = {}
    for label, systems in read.items():
        facts = systems[0].facts
        runs = [f"{os.path.relpath(run, into)}:{name}" for run, name in conditions[label]]
        learnt = [system.facts["training_rows"] for system in systems]
        known = [n for n in learnt if n is not None]
        about[label] = {"learnt_from": facts["learnt_from"], "runs": runs}
        about[label]["training_rows"] = round(np.mean(known)) if known else None
    findings[key] = {
        "title": title,
        "identity": identity,
        "rows": len(rows["label"]),
        "queries": len(np.unique(rows["query_index"])),
        "home_language": facts["home_language"],
        "shown": shown,
        "conditions": about,
        "table": table,
        "differences": differences,
    }

    # 4. Plot, tables
    plot_finding(key, findings[key], plot)
    write_json(findings_path, dict(sorted(findings.items())))
    with whole_file(into / "findings.md") as path:
        path.write_text(findings_report(findings), encoding="utf-8")
    print(f"({key}) {title}: {into / 'findings.md'}")
