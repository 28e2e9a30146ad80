"""What a stage inherits from earlier ones, checked.

A folder that is read stays locked as long as its entry of `read`, {folder: its stage.json}, lives.
"""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from lib import models
from lib.inputs.rows import content_order, hash_rows
from lib.stages.files import hashed, read_json
from lib.stages.finished import read_about, remake, require_finished
from lib.stages.terminal import Stop
from lib.tables.languages import is_spoken


def require_teacher(run, folder, model=None):
    """What stage 03 reads, {"features", "teacher": stage.json}; teacher.json; and where the teacher's model
    is (`model`, if it was moved), which must be the one that 02 trained on. folder: the teacher's."""
    read = {"features": require_finished(run / "features", f"01_build_features.py --run {run}")}
    read["teacher"] = require_finished(folder, f"02_train_teacher.py --run {folder.parent}")
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
    """Stop if the teacher was trained on other human labels, or other text, than the features hold now.
    trained: stage.json of 02; rows: token ids of the human-labelled pairs."""
    table = pq.read_table(run / "features" / "labelled.parquet", columns=["label", "split"])
    train = np.flatnonzero(table["split"].to_numpy(zero_copy_only=False) == "train")
    rows, levels = [rows[row] for row in train], table["label"].to_numpy().astype(np.int64)[train] - 1
    order = content_order(rows, levels)
    if hash_rows([rows[row] for row in order], levels[order]) != trained["inputs"]["rows"]:
        what = f"trained on other labelled rows than {run / 'features'} holds now"
        raise Stop(f"{run / 'teacher'}: {what}: {remake(run / 'teacher', '02_train_teacher.py')}")


def require_pairs(run, reads, labels=True, impressions=False):
    """What stages 04 and 05 read: {"features", "labels": stage.json}. reads: patterns of file names.
    impressions: the labels must be those of impressions too."""
    read = {"features": require_finished(run / "features", f"01_build_features.py --run {run}", reads)}
    if labels:
        folder, command = run / "labels", f"03_label.py --run {run}"
        read["labels"] = require_finished(run / "labels", command, reads)
        if read["labels"]["inputs"]["features"] != read["features"]["identity"]:
            raise Stop(f"{folder}: of other features than those here; {remake(folder, command)}")
        teacher = Path(read["labels"]["arguments"].get("teacher") or run / "teacher")
        trained = read_about(teacher, damaged_is_fine=True)
        if trained and read["labels"]["inputs"].get("teacher") not in (None, teacher_identity(trained)):
            raise Stop(f"{folder}: of another teacher than {teacher}; {remake(folder, command)}")
        if impressions and read["labels"]["arguments"].get("only_labelled"):
            how = remake(folder, command, without=["--only-labelled"])
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
    student beside the main one that does not fit is named and left out; after 03 --only-labelled, which is
    to measure a teacher, the main one too."""
    read = require_pairs(run, reads)
    unfinished = [path.name[1:].partition(".unfinished-")[0] for path in run.glob(".student*.unfinished-*")]
    finished = [path.name for path in run.glob("student*") if path.is_dir()]
    for name in sorted({"student", *finished, *unfinished}):
        try:
            read[name] = require_student(run, name, read)
        except Stop as why:
            if name == "student" and not read["labels"]["arguments"].get("only_labelled"):
                raise
            print(f"left out: {why}")
    teacher = Path(read["labels"].get("teacher", {}).get("folder") or run / "teacher")
    if teacher.exists():
        command = f"02_train_teacher.py --run {teacher.parent}"
        read["teacher"] = require_finished(teacher, command, ["teacher.json"])
    return read


def whose_labels(labels):
    """In words, which teacher labels are of: its model, and its folder if that is another run's. labels:
    stage.json of 03."""
    teacher = labels.get("teacher") or {"model": "a teacher", "folder": None}
    return teacher["model"] + (f", trained in {Path(teacher['folder']).parent}" if teacher["folder"] else "")


def whence(counts):
    """In words, where labels are from: counts of count_labels()."""
    looked_up = [f"{labels:,} looked up in {run}" for run, labels in counts["looked_up"].items()]
    made = [f"{counts['passes']:,} by a pass of the teacher", *looked_up]
    again = counts["rows"] - counts["passes"] - sum(counts["looked_up"].values())
    return f"{counts['rows']:,} rows, {', '.join(made)}, {again:,} of pairs that stand several times"


def require_student(run, name, read):
    """stage.json of a student, whose features and labels must be those that were read."""
    command = f"04_train_student.py --run {run}" + f" --name {name}" * (name != "student")
    student = require_finished(run / name, command)
    for folder, identity in student["inputs"].items():
        if identity != read[folder]["identity"]:
            raise Stop(f"{run / name}: trained on other {folder}; {remake(run / name, command)}")
    return student


def students_of(read):
    """Names of the students that were read, the main one last."""
    names = [name for name in read if name.startswith("student")]
    return sorted(names, key=lambda name: (name == "student", name))
