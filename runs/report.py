"""Results as text: tables, report.md. No method is in this file.

A table here is {(system, language, metric): interval with value, low, high}; the language of all rows is "".
"""

import html
import re
import shlex
import sys
import time
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from runs.files import read_json

ALL = ""  # "language" of a metric over all rows
HUMAN = {  # --human-rows of 04
    "none": "not used",
    "teacher": "with the teacher's labels too",
    "human": "with the human labels",
    "half": "with the mean of human and teacher's labels",
}
FEW_QUERIES = 30  # an interval on fewer is marked


class Metric(NamedTuple):
    """How a metric stands in a table."""

    heading: str
    percent: bool
    meaning: str


METRICS = {
    "accuracy": Metric("accuracy %", True, "rows whose most probable level is the human one"),
    "within_one": Metric("within one %", True, "rows whose most probable level is at most one off"),
    "auroc_3": Metric(
        "AUROC ≥3", False, "chance that P(level ≥ 3) of a row of level 3 to 5 is the higher one"
    ),
    "auroc_4": Metric("AUROC ≥4", False, "likewise for levels 4 and 5 against 1 to 3"),
    "auroc_5": Metric("AUROC ≥5", False, "likewise for level 5 against 1 to 4"),
    "ndcg_20": Metric("nDCG@20", False, "gain 2^(level − 1) − 1, mean over queries that have a gain"),
    "ece": Metric("ECE", False, "expected calibration error of the most probable level, 15 bins"),
    "kl_to_teacher": Metric("KL to teacher", False, "mean KL(teacher ‖ student), nats"),
}

# Accuracy on the paper's human evaluation set: of which system here, of what there, in the paper.
PAPER = (
    ("teacher", "Llama-3-8B, QLoRA", 0.602),
    ("student", "given by one summary of the paper", 0.548),
    ("(embedding baseline)", "SearchSage, derived from a stated relative gain of 19.7 %", 0.503),
)

CAPTIONS = {
    "accuracy.png": "Accuracy by system, with intervals.",
    "accuracy_by_language.png": "Accuracy by language of the query and system, with intervals.",
    "confusion.png": "For each human level (row), how often each level is the most probable one (columns).",
    "reliability.png": "How often the most probable level is right, by its probability: on the dotted "
    "line the probability can be taken at its word. Dashed: at the temperature of the table above.",
}


# ------------------------------------------------------------------------------------------------------------
# Tables


def systems_of(table):
    """The systems of a table, in its order."""
    return list(dict.fromkeys(system for system, _, _ in table))


def languages_of(table):
    """The languages of a table."""
    return list(dict.fromkeys(language for _, language, _ in table if language != ALL))


def metrics_of(table):
    """The metrics of a table, in the order of METRICS."""
    found = {metric for _, _, metric in table}
    return [metric for metric in METRICS if metric in found]


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


def nested(table):
    """A table in the shape of metrics.json: systems, overall or by language, metrics."""
    systems = {}
    for (system, language, metric), found in table.items():
        parts = systems.setdefault(system, {"overall": {}, "by_language": {}})
        part = parts["overall"] if language == ALL else parts["by_language"].setdefault(language, {})
        part[metric] = found._asdict()
    return {"systems": systems}


def cell(m, percent=True):
    """A metric's value, low and high as `value [low, high]`."""
    if m is None or m.value is None:
        return "–"
    if percent:
        return f"{100 * m.value:.1f} [{100 * m.low:.1f}, {100 * m.high:.1f}]"
    return f"{m.value:.3f} [{m.low:.3f}, {m.high:.3f}]"


def escaped(text):
    """Anybody's text as plain text on one line of Markdown: no table, heading, link or HTML comes of it."""
    text = html.escape(" ".join(str(text).split()), quote=False)
    return re.sub(r"([\\`*\[\]#|~])", r"\\\1", text)


def markdown_table(head, lines):
    """A Markdown table between empty lines."""
    rule = "|---" * len(head) + "|"
    return ["", f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(line)} |" for line in lines), ""]


def below_bm25(table):
    """Lines on trained systems that are worse than BM25."""
    lines = []
    for system in systems_of(table):
        for metric in ("auroc_4", "ndcg_20"):
            found, bm25 = (table.get((name, ALL, metric)) for name in (system, "bm25"))
            trained = system == "teacher" or system.startswith("student")
            if trained and found and None not in (found.value, bm25.value) and found.value < bm25.value:
                worse = f"{METRICS[metric].heading} {found.value:.3f}, BM25 {bm25.value:.3f}"
                lines.append(f"{system} is below BM25: {worse}")
    return lines


def summary(table):
    """Lines for the terminal."""
    lines = []
    for system in systems_of(table):
        accuracy, ndcg = cell(table[system, ALL, "accuracy"]), cell(table[system, ALL, "ndcg_20"], False)
        lines.append(f"  {system:<24} accuracy {accuracy:<20}  nDCG@20 {ndcg}")
    return [*lines, *below_bm25(table)]


# ------------------------------------------------------------------------------------------------------------
# report.md


def facts(run, read, evaluation):
    """What the report rests on, as pairs of a name and a text. read: {folder: its stage.json}."""
    features, command = read["features"], [sys.argv[0].rpartition("/")[2], *sys.argv[1:]]
    teacher_file = run / "teacher" / "teacher.json"
    index, query = np.unique(evaluation["query_index"], return_inverse=True)
    best = np.zeros(len(index), int)
    np.maximum.at(best, query, evaluation["label"])
    known = [
        ("dataset", features.get("dataset")),
        ("evaluation", f"{len(query):,} human-labelled rows of {len(index):,} queries, none trained on; "
                       f"{(best == 1).sum():,} queries have no gain and do not count in nDCG"),
        ("text encoder", features["arguments"].get("text_encoder")),
        ("captions by", features["arguments"].get("caption_model")),
        ("teacher", read_json(teacher_file)["model"] if teacher_file.exists() else None),
    ]  # fmt: skip
    for name, about in read.items():
        told, rows = about["arguments"], about.get("rows", {})
        if name == "teacher":
            known.append(("the teacher learnt from", f"{rows.get('train', 0):,} human-labelled rows"))
        elif name.startswith("student"):
            learnt = f"{rows.get('train', 0):,} rows, the {told['labels']} labels"
            if told["labels"] == "teacher":
                learnt += (
                    f"; {rows.get('human', 0):,} of them human-labelled rows, {HUMAN[told['human_rows']]}"
                )
            known.append((f"{name} learnt from", learnt))
    known += [("made", f"{time.strftime('%Y-%m-%d')} by `{shlex.join(command)}`")]
    return [(name, str(value)) for name, value in known if value]


def report(table, about, temperatures, evaluation, pages):
    """report.md. about: pairs of facts(); evaluation: columns of its rows; pages: {file: caption}."""
    systems, metrics = systems_of(table), metrics_of(table)
    languages = sorted(languages_of(table))
    lines = ["# Evaluation", ""]
    for name, value in about:
        lines.append(f"- {name}: {value if name == 'made' else escaped(value)}")
    lines += ["", "In brackets: 95 % bootstrap interval over queries, the same resamples for every system."]
    body = []
    for system in systems:
        found = [cell(table.get((system, ALL, metric)), METRICS[metric].percent) for metric in metrics]
        body.append([escaped(system), *found])
    lines += markdown_table(["system", *(METRICS[metric].heading for metric in metrics)], body)
    lines += [f"- {METRICS[metric].heading}: {METRICS[metric].meaning}" for metric in metrics]
    lines += ["", *(f"**{line}**\n" for line in map(escaped, below_bm25(table)))]
    lines += [*beside_the_paper(table), "## Accuracy by language, %"]
    body = []
    for system in systems:
        found = [cell(table[system, language, "accuracy"]) for language in languages]
        body.append([escaped(system), *found])
    few = []
    for language in languages:
        queries = np.unique(evaluation["query_index"][evaluation["language"] == language])
        few += [language] * (len(queries) < FEW_QUERIES)
    head = [f"{escaped(language)}{' †' * (language in few)}" for language in languages]
    lines += markdown_table(["system", *head], body)
    if few:
        lines += [f"† fewer than {FEW_QUERIES} queries: an interval of so few is a rough guess.", ""]
    lines += [*of_temperatures(temperatures), "## Plots", ""]
    for name, caption in {**CAPTIONS, **pages}.items():
        lines += [f"![{name}]({name})", "", escaped(caption), ""]
    return "\n".join(lines)


def beside_the_paper(table):
    """The paper's figures, where five levels make them comparable at all."""
    if {"auroc_3", "auroc_4", "auroc_5"} - set(metrics_of(table)):
        return []
    lines = ["## Beside the paper", "", "The paper's rows are its own data and models; they are here for "
             "orientation, not for comparison of the numbers."]  # fmt: skip
    body = []
    for system, what, value in PAPER:
        body.append([system, cell(table.get((system, ALL, "accuracy"))), f"{100 * value:.1f}", what])
    head = ["", "accuracy here %", "accuracy in the paper %", "the paper's system"]
    return lines + markdown_table(head, body)


def of_temperatures(temperatures):
    """What one temperature a system does for its probabilities (Guo et al., 2017)."""
    lines = ["## Can the probabilities be taken at their word?", ""]
    if not temperatures:
        return [*lines, "No training query was held out to tell, or there were too few.", ""]
    lines += [
        "One temperature a system, fitted on human-labelled training rows of queries that it was not trained "
        "on. It is in temperatures.json; `05_evaluate.py --temperatures` measures with it."
    ]
    body = []
    for system, found in temperatures.items():
        errors = [cell(SimpleNamespace(**found[name]), False) for name in ("ece", "ece_at_temperature")]
        fitted = f"{found['rows']:,} rows of {found['queries']:,} queries"
        body.append([escaped(system), f"{found['temperature']:.2f}", fitted, *errors])
    return lines + markdown_table(["system", "temperature", "fitted on", "ECE before", "ECE after"], body)
