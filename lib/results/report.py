"""Results as text: tables, report.md.

A table here is {system: {"overall": {metric: m}, "by_language": {language: {metric: m}}}}, m an object with
value, low and high; compared: a list of such of differences, with system, minus and metric (stage 05).
"""

import html
import re
import shlex
import sys
import time
from collections import namedtuple

import numpy as np

from lib.inputs.inherited import whence, whose_labels
from lib.levels import RELEVANT, THRESHOLDS

UNTRAINED = ("bm25", "embedding", "match")  # systems that one has without a teacher and a network
FEW_QUERIES = 30  # an interval on fewer is marked
FEWEST = 5  # queries: a difference on fewer has no interval, and nothing follows from it
ENOUGH_FITTED = 15  # queries to fit a temperature on: experiments/RESULTS.md, "Temperatures of few queries"
# Systems are compared by the first of these that means something.
AUROCS = {f"auroc_{level}": level for level in (RELEVANT, *THRESHOLDS)}
WHAT_TO_DO = {  # where a trained system is below another one
    "student_human_labels": "the teacher's labels cost more than they bring",
    "student": "the teacher is the weaker one: other settings of stage 02, or more labels",
    "teacher": "03_label.py --pool none leaves the teacher alone",
}

Metric = namedtuple("Metric", "heading percent meaning")  # how a metric stands in a table
ABOVE = "chance that P(level ≥ {0}) of a row of a level ≥ {0} is higher than that of another row"
METRICS = {
    "accuracy": Metric("accuracy %", True, "rows whose most probable level is the human one; micro-F1 too"),
    "within_one": Metric("within one %", True, "rows whose most probable level is at most one off"),
    **{f"auroc_{k}": Metric(f"AUROC ≥{k}", False, ABOVE.format(k)) for k in THRESHOLDS},
    "ndcg_20": Metric("nDCG@20", False, "gain 2^(level − 1) − 1, mean over queries that have a gain"),
    "ndcg": Metric("nDCG, given gains", False, "likewise of all rows of a query, gains as --gains says"),
    "macro_f1": Metric("macro-F1", False, "mean over the levels of F1 of the most probable level"),
    "ece": Metric("ECE", False, "expected calibration error of the most probable level, 15 bins"),
    "kl_to_teacher": Metric("KL to teacher", False, "mean KL(what students learn ‖ student), nats"),
}

# Accuracy on the paper's human evaluation set: of which system here, of what there, in the paper.
PAPER = (
    ("teacher", "Llama-3-8B, QLoRA", 0.602),
    ("student", "given by one summary of the paper", 0.548),
    ("(embedding baseline)", "SearchSage, derived from a stated relative gain of 19.7 %", 0.503),
)

CAPTIONS = {
    "accuracy.png": "Accuracy by system, overall and by language of the query, with intervals.",
    "confusion.png": "For each human level (row), how often each level is the most probable one (columns).",
    "reliability.png": "How often the most probable level is right, by its probability: on the dotted "
    "line the probability can be taken at its word. Dashed: at the temperature of the table above.",
}


# ------------------------------------------------------------------------------------------------------------
# Tables


def metrics_of(table):
    """The metrics of a table, in the order of METRICS."""
    found = {metric for parts in table.values() for metric in parts["overall"]}
    return [metric for metric in METRICS if metric in found]


def meaningful(levels):
    """Metrics that mean something where only these levels are in use; one of AUROCs that would tell the same
    levels apart."""
    found, splits = {"accuracy", "ndcg_20", "ndcg", "macro_f1", "ece", "kl_to_teacher"}, set()
    if len(levels) > 2 and (np.diff(levels) == 1).any():
        found.add("within_one")
    for name, level in AUROCS.items():
        above = sum(used >= level for used in levels)
        if 0 < above < len(levels) and above not in splits:
            found.add(name)
            splits.add(above)
    return found


def cell(m, percent=True):
    """A metric's value, low and high as `value [low, high]`."""
    if m is None or m.low is None:
        return "–"
    if percent:
        return f"{100 * m.value:.1f} [{100 * m.low:.1f}, {100 * m.high:.1f}]"
    return f"{m.value:.3f} [{m.low:.3f}, {m.high:.3f}]"


def escaped(text):
    """Escapes a text for one line of Markdown: no table, heading, link or HTML comes of it."""
    text = html.escape(" ".join(str(text).split()), quote=False)
    return re.sub(r"([\\`*\[\]#|~])", r"\\\1", text)


def metric_table(table, names, lines):
    """All metrics as a Markdown table. names: headings; lines: cells, then {metric: its interval}."""
    metrics, body = metrics_of(table), []
    for *first, found in lines:
        values = [cell(found.get(metric), METRICS[metric].percent) for metric in metrics]
        body.append([*first, *values])
    headings = [METRICS[metric].heading for metric in metrics]
    return markdown_table([*names, *headings], body)


def markdown_table(head, lines):
    """A Markdown table between empty lines."""
    rule = "|---" * len(head) + "|"
    return ["", f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(line)} |" for line in lines), ""]


def section(title, text, head, body):
    """A part of report.md: its title, a text and a table."""
    return [f"## {title}", "", text, *markdown_table(head, body)]


def signed(m):
    """A difference as `+value [low, high]`, or of too few queries `+value`."""
    if m.value is None:
        return "–"
    return f"{m.value:+.3f}" + (f" [{m.low:+.3f}, {m.high:+.3f}]" if m.low is not None else "")


def beside_best(compared):
    """Of the differences from an untrained system those from the best, by each system and metric."""
    untrained = [m for m in compared if m.minus in UNTRAINED and m.value is not None]
    best = {}
    for m in untrained:
        best[m.system, m.metric] = min(m.value, best.get((m.system, m.metric), m.value))
    return [m for m in untrained if m.value == best[m.system, m.metric]]


def below(compared):
    """Lines on systems that are below what they are compared with, by the whole interval; of the untrained
    ones the best by each metric."""
    worse, best = {}, beside_best(compared)
    for m in compared:
        counts = m.minus not in UNTRAINED or m in best
        if counts and m.high is not None and m.high < 0:
            found = f"{METRICS[m.metric].heading} {signed(m)}"
            worse.setdefault((m.system, m.minus), []).append(found)
    lines = []
    for (system, other), found in worse.items():
        advice = WHAT_TO_DO.get(other, "serve that instead, or label more queries")
        lines.append(f"{system} is below {other}: {', '.join(found)}; {advice}")
    return lines


def in_short(compared):
    """What a reader who reads no further should know: the system to serve beside bm25, the best of those that
    one has without a teacher, and human labels alone."""
    lines, best = [], beside_best(compared)
    served = "student" if "student" in {m.system for m in compared} else "teacher"
    for m in compared:
        is_shown = m.minus in ("bm25", "student_human_labels") or m in best
        if m.system == served and is_shown and m.value is not None:
            verdict = "no clear difference"
            if m.low is None:
                verdict = "too few queries to tell"
            elif m.low > 0:
                verdict = "better"
            elif m.high < 0:
                verdict = "worse"
            heading = METRICS[m.metric].heading
            lines.append(f"- {served} beside {m.minus}, {heading}: {signed(m)}: **{verdict}**")
    return ["## In short", "", *lines, ""] if lines else []


def more_labels(curve):
    """One sentence on whether more labels would help. curve: of with_dropout() in stage 04."""
    (few, many), (before, after) = curve["queries"], curve["student"]
    learned = f"from {few:,} to {many:,} labelled queries its KL on others goes {before:.3f} -> {after:.3f}"
    beside = f"(the regression's {curve['match'][0]:.3f} -> {curve['match'][1]:.3f})"
    help = "labels of more queries help" if after < 0.98 * before else "more labels bring little"
    return f"student on human labels: {learned} {beside}: {help}"


def few_queries(n):
    """A line where so few queries were judged that an interval says little; or none."""
    line = f"only {n} evaluation queries: an interval of fewer than {FEW_QUERIES} is a rough guess"
    return [line] if n < FEW_QUERIES else []


def summary(table, compared):
    """Lines for the terminal, by the AUROC that systems are compared by."""
    lines, metrics = [], metrics_of(table)
    shown = [name for name in AUROCS if name in metrics][:1] + ["ndcg_20"]
    for system, parts in table.items():
        found = parts["overall"]
        cells = [f"  {system:<22} accuracy {cell(found['accuracy']):<18}"]
        cells += [f"{METRICS[name].heading} {cell(found[name], False)}" for name in shown]
        lines.append("  ".join(cells))
    return [*lines, *below(compared)]


# ------------------------------------------------------------------------------------------------------------
# report.md


def facts(read, n, queries, gainful):
    """What the report rests on, {name: text}. read: {folder: its stage.json}; n: evaluation rows, of so many
    queries, of which so many have a gain."""
    features, labels = read["features"], read["labels"]
    used = features.get("models", {})
    rows = f"{n:,} human-labelled rows of {queries:,} queries, none trained on"
    known = {
        "dataset": features.get("dataset"),
        "evaluation": f"{rows}; {queries - gainful:,} queries have no gain and do not count in nDCG",
        "text encoder": used.get("text encoder", {}).get("name", "none: the user's own embeddings"),
        "captions by": used.get("caption model", {}).get("name", "nobody: no picture can be read"),
        "teacher": "teacher" in labels and whose_labels(labels),
        "its labels": "labels" in labels and whence(labels["labels"]),
    }
    for name, about in read.items():
        rows = about.get("rows", {})
        learnt = f"{rows.get('train', 0):,}"
        if name == "teacher":
            of = f" of {rows['train_queries']:,} queries" if "train_queries" in rows else ""
            known["the teacher learnt from"] = f"{learnt} human-labelled rows{of}"
        elif name.startswith("student"):
            labels = about["arguments"]["labels"]
            learnt += " rows, the human labels" if labels == "human" else " rows, the teacher's labels"
            if labels == "teacher":
                learnt += f"; {rows.get('human', 0):,} of them are human-labelled too: there the mean of both"
            known[f"{name} learnt from"] = learnt
            if about.get("curve"):
                known["would more labels help"] = more_labels(about["curve"])
    return {name: str(value) for name, value in known.items() if value}


def report(table, compared, about, temperatures, evaluation, one_by_one, pages):
    """report.md. about: facts(); evaluation: columns; one_by_one: lines; pages: {file: caption}."""
    command = shlex.join([sys.argv[0].rpartition("/")[2], *sys.argv[1:]])
    lines = ["# Evaluation", "", *(f"- {name}: {escaped(value)}" for name, value in about.items())]
    lines += [f"- made: {time.strftime('%Y-%m-%d')} by `{command}`", "", *in_short(compared)]
    lines += ["In brackets: 95 % bootstrap interval over queries, the same resamples for every system."]
    systems = [(escaped(system), parts["overall"]) for system, parts in table.items()]
    lines += metric_table(table, ["system"], systems)
    lines += [f"- {METRICS[metric].heading}: {METRICS[metric].meaning}" for metric in metrics_of(table)]
    warnings = few_queries(len(np.unique(evaluation["query"]))) + below(compared)
    lines += ["", *(f"**{escaped(line)}**\n" for line in warnings)]
    lines += [*of_differences(compared), *beside_the_paper(table), *by_language(table, evaluation)]
    lines += [*one_by_one, *of_temperatures(temperatures), "## Plots", ""]
    for name, caption in {**CAPTIONS, **pages}.items():
        lines += [f"![{name}]({name})", "", escaped(caption), ""]
    return "\n".join(lines)


def of_differences(compared):
    """What training brings, as a table."""
    lines, heads = {}, []
    for m in compared:
        lines.setdefault(f"{m.system} − {m.minus}", []).append(signed(m))
        heads.append(METRICS[m.metric].heading)
    text = "Differences on the same resamples of the queries: above zero, the first is the better one. "
    text += f"Fewer than {FEWEST} queries give no interval."
    head = ["difference", *dict.fromkeys(heads)]
    body = [[escaped(pair), *found] for pair, found in lines.items()]
    return section("What training brings", text, head, body)


def by_language(table, evaluation):
    """Accuracy by language, where there are several."""
    head, body = ["system"], []
    for language in sorted(set(evaluation["language"])):
        queries = np.unique(evaluation["query"][evaluation["language"] == language])
        head.append(escaped(language) + " †" * (len(queries) < FEW_QUERIES))
    for system, parts in table.items():
        found = [cell(metrics["accuracy"]) for metrics in parts["by_language"].values()]
        body.append([escaped(system), *found])
    text = f"† fewer than {FEW_QUERIES} queries: an interval of so few is a rough guess."
    return section("Accuracy by language, %", text, head, body) if len(head) > 2 else []


def beside_the_paper(table):
    """The paper's figures, where five levels make them comparable at all."""
    if AUROCS.keys() - set(metrics_of(table)):
        return []
    body = []
    for system, what, value in PAPER:
        ours = cell(table[system]["overall"]["accuracy"]) if system in table else "–"
        body.append([system, ours, f"{100 * value:.1f}", what])
    head = ["", "accuracy here %", "accuracy in the paper %", "the paper's system"]
    text = "The paper's rows are its own data and models: for orientation, not to compare the numbers."
    return section("Beside the paper", text, head, body)


def of_temperatures(temperatures):
    """What one temperature a system does for its probabilities (Guo et al., 2017)."""
    title, body = "Can the probabilities be taken at their word?", []
    if not temperatures:
        return [f"## {title}", "", "No training query was held out to tell, or there were too few.", ""]
    for system, found in temperatures.items():
        rows = f"{found['rows']:,} rows of {found['queries']:,} queries"
        rows += ": too few" * (found["queries"] < ENOUGH_FITTED)
        errors = [cell(found[name], False) for name in ("ece", "ece_at_temperature")]
        body.append([escaped(system), f"{found['temperature']:.2f}", rows, *errors])
    text = (
        "One temperature a system, fitted on human-labelled training rows of queries that it was not trained "
        "on; 1 where those are too few to tell. A service takes that of temperatures.json as TEMPERATURE."
    )
    return section(title, text, ["system", "temperature", "fitted on", "ECE before", "ECE after"], body)
