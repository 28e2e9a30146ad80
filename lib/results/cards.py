"""Model cards: README.md of teacher/ and student/ in the form of the Hugging Face hub, from card_*.md.

The card in a model's folder says what is known when it is trained;
stage 05 writes RUN/report/cards/NAME.md, the same card with the metrics on evaluation queries. To publish:

    hf upload USER/NAME RUN/student .
    hf upload USER/NAME RUN/report/cards/student.md README.md
"""

import contextlib
import dataclasses
import re
from pathlib import Path

import pyarrow.parquet as pq

from lib.results.report import ALL, METRICS, UNTRAINED, cell, markdown_table, metrics_of, systems_of
from lib.stages.files import read_json, whole_file

EVALUATION = "## Evaluation"
UNTIL_THEN = """On queries of the training data that were held out, when training ended: {scores}.
These are for eyes; the metrics on the evaluation queries, with intervals, are in the run's `report/`, and in
the card `report/cards/{name}.md`."""
NOT_FLAGS = ("preset", "run", "overwrite", "device")  # they do not change the result


def template(kind):
    """The text of a card."""
    return Path(__file__).with_name(f"card_{kind}.md").read_text(encoding="utf-8")


def front_matter(**fields):
    """YAML at the top of a card; a field of None is left out, a tuple is a list."""
    lines = ["---"]
    for name, value in fields.items():
        if isinstance(value, (list, tuple)):
            lines += [f"{name}:", *(f"- {item}" for item in value)]
        elif value is not None:
            lines.append(f"{name}: {value}")
    return "\n".join([*lines, "---", "", ""])


def command_line(script, settings, presets):
    """The command that makes the folder again: flags whose value is not the preset's. Models by name only."""
    words = ["python", script, "--preset", settings.preset, "--run", "RUN"]
    for setting in dataclasses.fields(settings):
        name, value = setting.name, getattr(settings, setting.name)
        if name in NOT_FLAGS or value == getattr(presets[settings.preset], name):
            continue
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{name.replace('_', '-')}")
        elif value is not None:
            values = value if isinstance(value, tuple) else (value,)
            words += [flag, *(public_name(str(value)) for value in values)]
    return " ".join(words)


def public_name(model):
    """A hub id as it is, a folder by its last name: where it stands is nobody's business."""
    return Path(model).name if Path(model).is_absolute() or Path(model).is_dir() else model


def licence_of(model):
    """(licence id or None, in words) of a model folder or hub id, from its card, or a file of that name."""
    card = None
    if Path(model).is_dir():
        folder = Path(model)
        card = folder / "README.md"
        files = sorted(path.name for path in folder.iterdir() if path.name.lower().startswith("licen"))
    else:
        files = []
        with contextlib.suppress(Exception):  # no network, no card, no such model: not known
            from huggingface_hub import hf_hub_download

            card = Path(hf_hub_download(model, "README.md", etag_timeout=5))
    if card is not None and card.exists():
        head = card.read_text(encoding="utf-8", errors="replace").split("\n---")[0]
        found = re.search(r"^license: *[\"']?([\w.+-]+)", head, re.MULTILINE)
        if found:
            return found[1], f"`{found[1]}`, as its card says"
    if files:
        return None, f"in its file `{files[0]}`"
    return None, "not stated in its folder" if Path(model).is_dir() else "see its page on the hub"


def languages_of(features):
    """Languages of the queries in features/, sorted."""
    column = pq.read_table(features / "queries.parquet", columns=["language"])["language"]
    return sorted(language for language in column.unique().to_pylist() if language)


def data_line(features):
    """What the data of a features/ folder are, as its stage.json says: 02 checks no file of impressions."""
    about, counts = read_json(features / "stage.json"), {"queries": 0, "pins": 0, "impressions": 0}
    for file, made in about["outputs"].items():
        table = file.partition("/")[0].removesuffix(".parquet")
        if table in counts:
            counts[table] += made["rows"]
    parts = [f"{count:,} {name}" for name, count in counts.items()]
    dataset = about.get("dataset")
    name = f"Dataset `{Path(dataset).name}`: " if dataset else ""
    return f"{name}{', '.join(parts)}; queries in {', '.join(languages_of(features))}."


def scores_line(log):
    """The held-out scores of the last epoch in a training log, in words."""
    lines = [line for line in log if any(name.startswith("held_out") for name in line)]
    shown = []
    for name, value in (lines[-1] if lines else {}).items():
        if name.startswith("held_out_") and isinstance(value, float):
            metric = name.removeprefix("held_out_").replace("auroc_", "AUROC ≥").replace("_", " ")
            shown.append(f"{metric} {value:.3f}")
    return ", ".join(shown) or "none, there are too few queries"


def evaluation(name, log):
    """The section that stage 05 replaces."""
    return f"{EVALUATION}\n\n{UNTIL_THEN.format(name=name, scores=scores_line(log))}"


def teacher_card(about, command, run, counts, log):
    """README.md of teacher/. about: teacher.json; command: that makes it again; counts: {train, held_out}
    rows; log: training_log.jsonl."""
    model = about["model"]
    licence, in_words = licence_of(model)
    languages = languages_of(run / "features")
    head = front_matter(
        license=licence,
        base_model=None if public_name(model) != model else model,
        language=languages,
        pipeline_tag="text-ranking",
        tags=("cross-encoder", "search-relevance", "knowledge-distillation", "arxiv:2410.17152"),
    )
    how = {"full": "trained in full", "lora": "with LoRA", "qlora": "with LoRA on 4-bit weights (QLoRA)"}
    return head + template("teacher").format(
        title=f"Search relevance teacher on {public_name(model)}",
        model=public_name(model),
        kind=about["kind"],
        how=how[about["finetuning"]],
        pooling="last" if about["kind"] == "decoder" else "first",
        fields=", ".join(about["fields"]),
        max_tokens=about["max_tokens"],
        data=data_line(run / "features"),
        command=command,
        evaluation=evaluation("teacher", log),
        licence=in_words,
        **counts,
    )


def write_teacher_card(about, settings, presets, counts, log, folder):
    """The teacher's README.md; the empty form that peft leaves beside LoRA's weights goes."""
    (folder / "adapter" / "README.md").unlink(missing_ok=True)
    command = command_line("02_train_teacher.py", settings, presets)
    write_text(folder / "README.md", teacher_card(about, command, settings.run, counts, log))


def student_card(name, spec, command, run, counts, log):
    """README.md of a student's folder `name`. spec: its features.json; counts: {train, held_out} rows."""
    human = "labels human" in command
    learned = f"It learned the teacher's probabilities of {counts['train']:,} pairs."
    taught = "by a teacher whose card names its base model"
    if human:
        learned = f"It learned the human labels of {counts['train']:,} pairs, without a teacher."
        taught = "on human labels"
    sources = [f"`{model['name']}`" for model in spec["sources"].values() if "name" in model]
    sizes = [f"{source} [{size}]" for source, size in spec["embeddings"].items()]
    head = front_matter(
        language=languages_of(run / "features"),
        library_name="onnx",
        tags=("search-relevance", "learning-to-rank", "knowledge-distillation", "arxiv:2410.17152"),
    )
    return head + template("student").format(
        title="Search relevance student" + " on human labels" * human,
        inputs=", ".join([*sizes, *spec["categories"], *spec["numbers"], *spec["match"]]),
        hidden=", ".join(str(width) for width in spec["hidden"]) or "none",
        data=data_line(run / "features"),
        learned=learned,
        command=command,
        evaluation=evaluation(name, log),
        taught=taught,
        sources=" and ".join(sources) or "the user",
    )


def write_student_card(student, settings, presets, counts, log, folder):
    """The student's README.md."""
    command = command_line("04_train_student.py", settings, presets)
    card = student_card(settings.name, student.spec, command, settings.run, counts, log)
    write_text(folder / "README.md", card)


# ------------------------------------------------------------------------------------------------------------
# Stage 05


def with_metrics(card, table, system, counts):
    """A card with a system's metrics on the evaluation queries. table: {(system, language, metric):
    Interval}; counts: {rows, queries}."""
    metrics = metrics_of(table)

    def cells(system, language):
        return [cell(table.get((system, language, name)), METRICS[name].percent) for name in metrics]

    languages = dict.fromkeys(language for name, language, _ in table if name == system)
    lines = [[language or "all", *cells(system, language)] for language in languages]
    for other in [name for name in systems_of(table) if name in UNTRAINED]:
        lines.append([f"all: {other}, untrained", *cells(other, ALL)])
    head = ["language", *(METRICS[name].heading for name in metrics)]
    of = f"On {counts['rows']:,} human-labelled pairs of {counts['queries']:,} evaluation queries"
    text = [EVALUATION, "", f"{of}; in brackets 95 % bootstrap intervals over queries."]
    section = "\n".join([*text, *markdown_table(head, lines)])
    start = card.index(EVALUATION)
    return card[:start] + section + card[card.index("\n## ", start) :]


def write_cards(run, table, counts, folder):
    """report/cards/NAME.md of the teacher and of every student that has a card."""
    for system in dict.fromkeys(name for name, _, _ in table):
        path = run / system / "README.md"
        if path.exists():
            card = with_metrics(path.read_text(encoding="utf-8"), table, system, counts)
            write_text(folder / f"{system}.md", card)


def write_text(path, text):
    """A text file, whole or absent."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
