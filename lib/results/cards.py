"""Model cards in the form of the Hugging Face hub: RUN/report/cards/NAME.md of the teacher and every student,
filled from the stage.json of their folders and the metrics of stage 05. To publish a model:

    hf upload USER/NAME RUN/student .
    hf upload USER/NAME RUN/report/cards/student.md README.md
"""

from pathlib import Path

import pyarrow.parquet as pq
import yaml

from lib.results.report import ALL, METRICS, UNTRAINED, cell, escaped, markdown_table, metrics_of
from lib.stages.files import public_name, whole_file
from lib.stages.stage import PLACES

TAGS = ["search-relevance", "knowledge-distillation", "arxiv:2410.17152"]
HEADS = {
    "teacher": {"pipeline_tag": "text-ranking", "tags": ["cross-encoder", *TAGS]},
    "student": {"library_name": "onnx", "tags": ["learning-to-rank", *TAGS]},
}


def metrics_table(table, system):
    """A system's metrics, overall and by language, and those of the untrained ones, as Markdown. table:
    {(system, language, metric): Interval}."""
    metrics = metrics_of(table)
    head = ["system", "language", *(METRICS[metric].heading for metric in metrics)]
    rows = {}
    for name, language, _ in table:
        if name == system or (name in UNTRAINED and language == ALL):
            rows[name, language] = [escaped(name), escaped(language or "all")]
    for (name, language), line in rows.items():
        for metric in metrics:
            value = table.get((name, language, metric))
            line.append(cell(value, METRICS[metric].percent))
    return "\n".join(markdown_table(head, rows.values())).strip()


def counted(numbers):
    """{"train": 1000, …} -> "1,000 train, …"."""
    words = []
    for name, number in numbers.items():
        what = name.replace("_", " ")
        words.append(f"{number:,} {what}")
    return ", ".join(words)


def taught_by(teacher):
    """In words, whose labels a student learned. teacher: of its stage.json, {"model", "folder"}, or None."""
    if teacher is None:
        return "human labels alone"
    run = f" of the run {escaped(Path(teacher['folder']).parent.name)}" if teacher["folder"] else ""
    return f"labels of the teacher {escaped(public_name(teacher['model']))}{run}"


def card(kind, about, features, languages, evaluation):
    """README.md of a "teacher" or a "student". about, features: stage.json of its folder and of stage 01;
    languages: of the queries; evaluation: metrics_table()."""
    arguments = about["arguments"]
    languages = [" ".join(language.split()) for language in languages]
    head = {**HEADS[kind], "language": languages}
    model = arguments.get("model", "")
    if model and public_name(model) == model:
        head["base_model"] = model
    settings = [f"{name} {value}" for name, value in arguments.items() if name not in PLACES]
    text = Path(__file__).with_name(f"card_{kind}.md").read_text(encoding="utf-8")
    filled = text.format(
        model=escaped(public_name(model)),
        dataset=escaped(Path(features.get("dataset", "")).name),
        counts=counted(features.get("rows", {})),
        languages=escaped(", ".join(languages)),
        rows=counted(about.get("rows", {})),
        taught=taught_by(about.get("teacher")),
        settings=escaped(", ".join(settings)),
        evaluation=evaluation,
    )
    return f"---\n{yaml.safe_dump(head, allow_unicode=True, sort_keys=False)}---\n\n{filled}"


def write_cards(run, read, table, folder):
    """The cards of the systems of `table` that have a folder in the run. read: {folder: stage.json}."""
    column = pq.read_table(run / "features" / "queries.parquet", columns=["language"])["language"]
    languages = sorted(language for language in column.unique().to_pylist() if language)
    for system in dict.fromkeys(name for name, _, _ in table if name in read):
        kind = "teacher" if system == "teacher" else "student"
        text = card(kind, read[system], read["features"], languages, metrics_table(table, system))
        with whole_file(folder / f"{system}.md") as temporary:
            temporary.write_text(text, encoding="utf-8")
