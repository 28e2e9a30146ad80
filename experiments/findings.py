"""The paper's four findings, as experiments on a run directory that has been through the five stages.

    bash runs/findings.sh                   the toy: python -m experiments.findings --more outputs/toy_more
    python -m experiments.findings [--run RUN]     into RUN/../findings: findings.md, findings.json, plots
    python -m experiments.findings --run RUN --findings a d --models SmolLM2=HuggingFaceTB/SmolLM2-135M

(a) teachers BERT, T5, DeBERTa, Llama       (b) students on more and more impressions, beside the student on
human labels alone      (c) teacher and student by language, the student also without impressions in other
languages       (d) the teacher's pin text, source by source

A condition is trained with several seeds, and with the flags that RUN was made with; RUN itself stands for
the first seed of those that equal it. Killed or run again, it continues: finished stages do nothing. The toy
takes an hour on two CPU cores.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pyarrow.compute as pc
import pyarrow.parquet as pq

from common import FIELDS
from experiments.comparison import compare, impressions_learnt
from lib.stages.files import read_json
from lib.stages.settings import ROOT, Count, Size, parse
from lib.stages.terminal import Stop, run_main

TOY_MODELS = ROOT / "data" / "toy" / "models"
SCRIPTS = {"teacher": "02_train_teacher.py", "labels": "03_label.py", "student": "04_train_student.py"}


@dataclass(frozen=True)
class Settings:
    """Settings of the experiments."""

    run: Path = ROOT / "outputs" / "toy"  # a run that has been through the five stages
    findings: tuple[Literal["a", "b", "c", "d"], ...] = ("a", "b", "c", "d")  # those to be measured
    into: Path | None = None  # experiments and results (default: findings, beside RUN)
    more: Path | None = None  # run for (b): the same human labels, more impressions (default: RUN)
    models: tuple[str, ...] = tuple(
        f"{name}={TOY_MODELS / name.lower()}" for name in ("BERT", "T5", "DeBERTa")
    )  # teachers of (a) beside RUN's own: NAME=FOLDER or NAME=HUB-ID
    run_teacher: str = "Llama"  # what RUN's own teacher is called in (a)
    fields: tuple[str, ...] = ("caption", "title+description", "links", "boards", "queries")
    # pin text of (d) in the order it is added, here the paper's; RUN's teacher must have read all of it
    home_language: str = "en"  # language of the human training labels
    seeds: tuple[Size, ...] = (0, 1, 2)  # of teachers and students
    jobs: Count = 2  # experiments at a time; 1 where there is a GPU
    resamples: Count = 1_000  # bootstrap resamples of queries and seeds


# ------------------------------------------------------------------------------------------------------------
# Experiments: noted first, then worked off, some at a time. A trained system is a pair (run, "teacher") or
# (run, name of a student's folder); a condition is a label and its systems, one a seed.


class Experiments:
    """Teachers and students to be trained in folders below INTO."""

    def __init__(self, settings):
        self.settings, self.noted = settings, {}  # name -> command lines of stages

    def made(self, folder):
        """stage.json of a folder of RUN."""
        return read_json(self.settings.run / folder / "stage.json")

    def command(self, stage, *flags):
        """A stage's command line: RUN's own flags, and these, which win."""
        return [sys.executable, ROOT / SCRIPTS[stage], *self.made(stage)["command"], *flags]

    def link(self, folder, run, *names):
        """INTO/folder, with links to some folders of a run."""
        target = self.settings.into / folder
        target.mkdir(parents=True, exist_ok=True)
        for name in names:
            if not (target / name).exists():
                (target / name).symlink_to((run / name).resolve())
        return target

    def teachers(self, name, *flags, run_is_first=False):
        """A teacher of each seed on RUN's human labels, and its labels of the human-labelled rows."""
        systems = []
        for seed in self.settings.seeds:
            folder = self.settings.run
            if not run_is_first or systems:
                folder = self.link(f"{name}_{seed}", self.settings.run, "features")
                self.noted[folder.name] = (
                    self.command("teacher", "--run", folder, "--seed", seed, *flags),
                    self.command("labels", "--run", folder, "--only-labelled"),
                )
            systems.append((folder, "teacher"))
        return systems

    def students(self, run, name, *flags, first=None):
        """A student of each seed on a run's soft labels; `first` stands for that of the first seed."""
        folder = self.link("students" if run == self.settings.run else "more", run, "features", "labels")
        systems = [first] if first else []
        for seed in self.settings.seeds[len(systems) :]:
            student = f"{name}_{seed}"
            own = "--run", folder, "--name", student, "--seed", seed
            self.noted[f"{folder.name}_{student}"] = (self.command("student", *own, *flags),)
            systems.append((folder, student))
        return systems

    def epochs_for(self, impressions):
        """Epochs that take as many optimizer steps on so many impressions as RUN's student took: at equal
        epochs a small set would be trained too little, and a curve would show that instead. All students but
        that on human labels also learn the human-labelled rows, as RUN's does."""
        made = self.made("student")
        rows = impressions + made["rows"]["human"]
        return "--epochs", max(1, round(made["arguments"]["epochs"] * made["rows"]["train"] / rows))

    def work(self):
        """Trains all that was noted, JOBS at a time; each has its log in INTO/logs."""
        print(f"{len(self.noted)} experiments, {self.settings.jobs} at a time")
        with ThreadPoolExecutor(self.settings.jobs) as pool:
            running = [pool.submit(self.train, name) for name in self.noted]
            try:
                for experiment in running:
                    experiment.result()
            except Stop:
                pool.shutdown(cancel_futures=True)
                raise
        self.noted = {}

    def train(self, name):
        """Runs the stages of one experiment."""
        log = self.settings.into / "logs" / f"{name}.txt"
        log.parent.mkdir(exist_ok=True)
        threads = max(1, (os.cpu_count() or 1) // self.settings.jobs)
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        with open(log, "w") as out:
            for command in self.noted[name]:
                done = subprocess.run([*map(str, command)], stdout=out, stderr=out, env=environment)
                if done.returncode:
                    raise Stop(f"{name} failed ({log}): {log.read_text().strip().splitlines()[-1]}")
        print(f"  {name}: done")


# ------------------------------------------------------------------------------------------------------------
# The conditions of each finding: {label: systems}


def compare_models(experiments, own):
    """(a): teachers of other models, and RUN's own."""
    conditions = {}
    for entry in experiments.settings.models:
        name, _, place = entry.partition("=")
        conditions[name] = experiments.teachers(f"teacher_{name}", "--model", place)
    return {**conditions, experiments.settings.run_teacher: own}


def compare_sources(experiments, own):
    """(d): pin text that grows, source by source; RUN's own teacher reads all of it."""
    groups = experiments.settings.fields
    conditions, read = {}, set()
    for group in groups[:-1]:
        read |= set(group.split("+"))
        fields = [field for field in FIELDS if field in read]
        name = f"fields_to_{group.replace('+', '_')}"
        label = f"+ {group}" if conditions else group
        conditions[label] = experiments.teachers(name, "--fields", *fields)
    return {**conditions, f"+ {groups[-1]}": own}


def compare_amounts(experiments):
    """(b): students on a growing number of impressions, and on human labels alone."""
    run, more = experiments.settings.run, experiments.settings.more
    human = experiments.made("student_human_labels")["rows"]["train"]
    flags = experiments.epochs_for(human - experiments.made("student")["rows"]["human"])
    conditions = {
        "student on human labels": experiments.students(run, "student_human", "--labels", "human", *flags)
    }
    features = read_json(more / "features" / "stage.json")["rows"]
    for n in sizes(features["labelled_train"], features["impressions"]):
        flags = "--rows", n, *experiments.epochs_for(n)
        conditions[f"{n:,} impressions"] = experiments.students(more, f"student_{n}", *flags)
    first = (run, "student") if more == run else None
    flags = () if first else experiments.epochs_for(features["impressions"])
    every = experiments.students(more, "student_all", *flags, first=first)
    return {**conditions, "all impressions": every}


def compare_languages(experiments):
    """(c): RUN's student, if any, and students on fewer impressions: of the home language, of all."""
    run, home = experiments.settings.run, experiments.settings.home_language
    if not (run / "student" / "stage.json").exists():
        return {}
    student = experiments.students(run, "student_all", first=(run, "student"))
    steps = experiments.epochs_for(impressions_in(run / "features", home))
    alone = experiments.students(run, "student_home", "--languages", home, *steps)
    experiments.work()
    # As few rows as in the home language alone, of all languages: tells fewer rows from fewer languages.
    rows = impressions_learnt(read_json(alone[0][0] / alone[0][1] / "stage.json"))
    fewer = experiments.students(run, "student_fewer", "--rows", rows, *steps)
    return {"student": student, "student, fewer impressions": fewer, f"student, fewer, {home} only": alone}


def sizes(human, impressions):
    """1, 3, 10, 30, 100 times the human set, as far as the impressions go; a tenth of them where that is not
    even ten times."""
    found = {times * human for times in (1, 3, 10, 30, 100) if times * human < 0.9 * impressions}
    if 10 * human >= 0.9 * impressions:
        found.add(impressions // 10)
    return sorted(found)


def impressions_in(features, language):
    """Number of impressions of queries in a language."""
    is_home = pc.equal(pq.read_table(features / "queries.parquet")["language"], language)
    query = pq.ParquetDataset(features / "impressions").read(columns=["query_index"])["query_index"]
    return pc.sum(is_home.take(query)).as_py() or 0


def main(argv=None):
    # 1. The run
    settings = parse({"toy": Settings()}, argv, __doc__)
    run, wanted = settings.run, settings.findings
    needed = ["features", "teacher", "labels"] + ["student_human_labels", "student"] * ("b" in wanted)
    for stage in needed:
        if not (run / stage / "stage.json").exists():
            raise Stop(f"{run / stage}: missing; take {run} through the five stages first")
    into = settings.into or run.parent / "findings"
    settings = replace(settings, more=settings.more or run, into=into)
    into.mkdir(parents=True, exist_ok=True)

    # 2. Experiments
    experiments, conditions = Experiments(settings), {}
    if {*wanted} != {"b"}:  # which compares students alone
        own = experiments.teachers(f"teacher_{settings.run_teacher}", run_is_first=True)
    if "a" in wanted:
        conditions["a"] = compare_models(experiments, own)
    if "b" in wanted:
        conditions["b"] = compare_amounts(experiments)
    if "c" in wanted:
        conditions["c"] = {"teacher": own, **compare_languages(experiments)}
    if "d" in wanted:
        conditions["d"] = compare_sources(experiments, own)
    experiments.work()

    # 3. The comparisons
    for key in conditions:
        compare(key, conditions[key], into, settings.resamples)
    print((into / "findings.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    run_main(main)
