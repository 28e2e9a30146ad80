"""What a stage inherits from earlier ones, checked. A folder that is read stays locked as long as its entry
of `read`, {folder: its stage.json}, lives."""

from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lib import models
from lib.inputs.rows import content_order, hash_rows
from lib.stages.files import UNFINISHED, hashed, read_json
from lib.stages.finished import command_of_student, read_about, remake, require_finished
from lib.stages.terminal import Stop
from lib.tables.names import is_spoken

SCRIPTS = {"features": "01_build_features.py", "labels": "03_label.py"}  # of a run's folders


def command_of(folder):
    """The command that makes a folder of a run."""
    if folder.name.startswith("student"):
        return command_of_student(folder)
    script = SCRIPTS.get(folder.name, "02_train_teacher.py")  # a teacher may have any name
    return f"{script} --run {folder.parent}"


def require(folder, reads=("*",)):
    """stage.json of a folder of a run, finished, whose files that fit the patterns `reads` are whole."""
    return require_finished(folder, command_of(folder), reads)


def refuse(folder, why):
    """Stop: a folder has to be made again."""
    raise Stop(f"{folder}: {why}; {remake(folder, command_of(folder))}")


def require_teacher(run, folder, model=None):
    """What stage 03 reads, {"features", "teacher": stage.json}; teacher.json; and where the teacher's model
    is (`model`, if it was moved), which must be the one that 02 trained on. folder: the teacher's."""
    is_teacher = (folder / "teacher.json").exists()
    if folder.exists() and not is_teacher:
        raise Stop(f"{folder}: no teacher: --teacher RUN/teacher, a folder that stage 02 made")
    read = {"features": require(run / "features"), "teacher": require(folder)}
    about = read_json(folder / "teacher.json")
    if about["finetuning"] == "full":
        return read, about, folder / "backbone"
    model = model or about["model"]  # LoRA stands beside a model that may have changed or moved
    if not models.is_model(model, read["teacher"]["inputs"]["model"]):
        raise Stop(f"{model}: not the model that the teacher was trained on; --model says where that is")
    return read, about, model


def teacher_identity(trained):
    """Hash of what decides a teacher's labels. trained: stage.json of 02."""
    weights = {name: file["hash"] for name, file in trained["outputs"].items() if "safetensors" in name}
    return hashed([trained["identity"], weights])


def require_trained_on(run, trained, rows):
    """Stop if the teacher was trained on other rows than the features hold now. trained: stage.json of 02;
    rows: token ids of the human-labelled pairs."""
    table = pq.read_table(run / "features" / "labelled.parquet", columns=["label", "split"])
    train = np.flatnonzero(pc.equal(table["split"], "train"))
    levels = table["label"].to_numpy().astype(np.int64)[train] - 1
    rows = [rows[row] for row in train]
    order = content_order(rows, levels)
    if hash_rows([rows[row] for row in order], levels[order]) != trained["inputs"]["rows"]:
        refuse(run / "teacher", f"trained on other labelled rows than {run / 'features'} holds now")


def require_pairs(run, reads, labels=True, impressions=False):
    """What stages 04 and 05 read: {"features", "labels": stage.json}. reads: patterns of file names.
    impressions: the labels must be those of impressions too."""
    read = {"features": require(run / "features", reads)}
    if not labels:
        return read
    folder = run / "labels"
    made = read["labels"] = require(folder, reads)
    if made["inputs"]["features"] != read["features"]["identity"]:
        refuse(folder, "of other features than those here")
    teacher = Path(made["arguments"].get("teacher") or run / "teacher")
    trained = read_about(teacher, damaged_is_fine=True)
    if trained and made["inputs"].get("teacher") not in (None, teacher_identity(trained)):
        refuse(folder, f"of another teacher than {teacher}")
    if impressions and made["arguments"].get("only_labelled"):
        how = remake(folder, command_of(folder), without=["--only-labelled"])
        raise Stop(f"{folder}: made with --only-labelled; {how}")
    return read


def require_languages(run, languages):
    """Stop if no query is in one of these languages."""
    column = pq.read_table(run / "features" / "queries.parquet", columns=["language"])["language"]
    known = sorted(column.unique().to_pylist())
    for language in languages:
        if not any(is_spoken(tag, [language]) for tag in known):
            raise Stop(f"--languages {language}: no query is in this language; there are {' '.join(known)}")


def require_systems(run, reads):
    """What stage 05 reads: {"features", "labels", every student, "teacher" where it is there: stage.json}. A
    student that does not fit is named and left out, the main one after 03 --only-labelled alone."""
    read = require_pairs(run, reads)
    begun = [path.name[1:].partition(UNFINISHED)[0] for path in run.glob(f".student*{UNFINISHED}*")]
    finished = [path.name for path in run.glob("student*") if path.is_dir()]
    for name in sorted({"student", *finished, *begun}):
        try:
            read[name] = require_student(run, name, read)
        except Stop as why:
            if name == "student" and not read["labels"]["arguments"].get("only_labelled"):
                raise
            print(f"left out: {why}")
    made = read["labels"]
    teacher = Path(made.get("teacher", {}).get("folder") or run / "teacher")
    is_mean = "mean of" in made["inputs"]
    if teacher.exists() and not is_mean:
        read["teacher"] = require(teacher, ["teacher.json"])
    return read


def whose_labels(labels):
    """In words, which teacher labels are of. labels: stage.json of 03."""
    teacher = labels.get("teacher") or {"model": "a teacher", "folder": None}
    folder = teacher["folder"]
    return teacher["model"] + (f", trained in {Path(folder).parent}" if folder else "")


def whence(counts):
    """In words, where labels are from: counts of count_labels()."""
    parts = [f"{counts['rows']:,} rows", f"{counts['passes']:,} by a pass of the teacher"]
    for run, labels in counts["looked_up"].items():
        parts.append(f"{labels:,} looked up in {run}")
    again = counts["rows"] - counts["passes"] - sum(counts["looked_up"].values())
    return ", ".join([*parts, f"{again:,} of pairs that stand several times"])


def require_student(run, name, read):
    """stage.json of a student, whose features and labels must be those that were read."""
    student = require(run / name)
    for folder, identity in student["inputs"].items():
        if identity != read[folder]["identity"]:
            refuse(run / name, f"trained on other {folder}")
    return student


def students_of(read):
    """Names of the students that were read, the main one last."""
    names = [name for name in read if name.startswith("student")]
    return sorted(names, key=lambda name: (name == "student", name))
