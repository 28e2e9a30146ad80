"""Model cards in the form of the Hugging Face hub: RUN/report/cards/NAME.md of the teacher and every student,
card_teacher.md and card_student.md filled from stage.json and stage 05's metrics. To publish a model:

    hf upload USER/NAME RUN/student .
    hf upload USER/NAME RUN/report/cards/student.md README.md
"""

import json
from pathlib import Path

import pyarrow.parquet as pq

from lib.results.report import UNTRAINED, escaped, metric_table
from lib.stages.files import public_name, whole_file
from lib.stages.stage import PLACES


def evaluated(table, system):
    """A system's metrics, overall and by language, and those of the untrained ones, as Markdown."""
    lines = []
    for name, parts in table.items():
        if name in (system, *UNTRAINED):
            lines.append([escaped(name), "all", parts["overall"]])
        if name == system:
            lines += [[name, escaped(language), found] for language, found in parts["by_language"].items()]
    return "\n".join(metric_table(table, ["system", "language"], lines)).strip()


def counted(numbers):
    """{"train": 1000, …} -> "1,000 train, …"."""
    return ", ".join(f"{number:,} {name.replace('_', ' ')}" for name, number in numbers.items())


def card(kind, about, features, languages, evaluation):
    """README.md of a "teacher" or a "student". about, features: stage.json of its folder and of stage 01;
    languages: of the queries; evaluation: evaluated()."""
    arguments, teacher = about["arguments"], about.get("teacher")
    languages = [" ".join(language.split()) for language in languages]
    model = arguments.get("model", "")
    is_public = model and public_name(model) == model
    settings = [f"{name} {value}" for name, value in arguments.items() if name not in PLACES]
    taught = "human labels"
    if teacher:
        taught = f"labels of the teacher {escaped(public_name(teacher['model']))}"
    text = Path(__file__).with_name(f"card_{kind}.md").read_text(encoding="utf-8")
    return text.format(
        codes=json.dumps(languages, ensure_ascii=False),  # JSON is YAML
        base=f"base_model: {json.dumps(model)}\n" if is_public else "",
        model=escaped(public_name(model)),
        dataset=escaped(Path(features.get("dataset", "")).name),
        counts=counted(features.get("rows", {})),
        languages=escaped(", ".join(languages)),
        rows=counted(about.get("rows", {})),
        taught=taught,
        settings=escaped(", ".join(settings)),
        evaluation=evaluation,
    )


def write_cards(run, read, table, folder):
    """The cards of the systems of `table` that have a folder in the run. read: {folder: stage.json}."""
    column = pq.read_table(run / "features" / "queries.parquet", columns=["language"])["language"]
    languages = sorted(language for language in column.unique().to_pylist() if language)
    for system in [name for name in table if name in read]:
        kind = "teacher" if system == "teacher" else "student"
        text = card(kind, read[system], read["features"], languages, evaluated(table, system))
        with whole_file(folder / f"{system}.md") as temporary:
            temporary.write_text(text, encoding="utf-8")
