"""The paper's four findings, as experiments on a run directory that has been through the five stages.

    bash runs/findings.sh                   the toy: python -m experiments.findings --more outputs/toy_more
    python -m experiments.findings [--run RUN]     into RUN/../findings: findings.md, findings.json, plots
    python -m experiments.findings --run RUN --findings a d --models SmolLM2=HuggingFaceTB/SmolLM2-135M

The findings: compare_models() … below. A condition is trained with several seeds, and with the flags that RUN
was made with; RUN itself stands for the first seed of those that equal it. Killed or run again, it continues:
finished stages do nothing. The toy takes an hour on two CPU cores.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from common import FIELDS
from experiments.comparison import compare, home_language
from lib.inputs.inherited import require
from lib.inputs.pairs import PairFiles
from lib.stages.settings import ROOT, Count, Size, parse
from lib.stages.terminal import Stop, run_main

TOY = ROOT / "data" / "toy" / "models"
MODELS = tuple(f"{name}={TOY / name.lower()}" for name in ("BERT", "T5", "DeBERTa"))
ON_HUMAN = "student_human_labels"
SCRIPTS = {"teacher": "02_train_teacher.py", "labels": "03_label.py"}  # of students: 04


@dataclass(frozen=True)
class Settings:
    """Settings of the experiments."""

    run: Path = ROOT / "outputs" / "toy"  # a run that has been through the five stages
    findings: tuple[Literal["a", "b", "c", "d"], ...] = ("a", "b", "c", "d")  # those to be measured
    into: Path | None = None  # experiments and results (default: findings, beside RUN)
    more: Path | None = None  # run for (b): the same human labels, more impressions (default: RUN)
    models: tuple[str, ...] = MODELS  # teachers of (a) beside RUN's own: NAME=FOLDER or NAME=HUB-ID
    run_teacher: str = "Llama"  # what RUN's own teacher is called in (a)
    # pin text of (d) in the order it is added, here the paper's; RUN's teacher must have read all of it
    fields: tuple[str, ...] = ("caption", "title+description", "links", "boards", "queries")
    seeds: tuple[Size, ...] = (0, 1, 2)  # of teachers and students
    jobs: Count = 2  # experiments at a time; 1 where there is a GPU
    resamples: Count = 1_000  # bootstrap resamples of queries and seeds


class Experiments:
    """Teachers and students in folders below INTO: noted first, then worked off, some at a time. A trained
    system is a pair (run, "teacher") or (run, name of a student's folder)."""

    def __init__(self, settings):
        self.settings, self.run, self.noted = settings, settings.run, {}  # name -> command lines of stages

    def command(self, stage, *flags):
        """A stage's command line: RUN's own flags, and these, which win."""
        script, made = SCRIPTS.get(stage, "04_train_student.py"), require(self.run / stage, ())
        return [sys.executable, ROOT / script, *made["command"], *flags]

    def link(self, folder, run, *names):
        """INTO/folder, with links to some folders of a run."""
        target = self.settings.into / folder
        target.mkdir(parents=True, exist_ok=True)
        for name in names:
            if not os.path.lexists(target / name):
                (target / name).symlink_to((run / name).resolve())
            if (target / name).resolve() != (run / name).resolve():
                raise Stop(f"{target / name}: not of {run}: --into another folder, or remove this one")
        return target

    def seeds_beside(self, first):
        """Seeds to be trained where RUN's own systems `first` stand for as many of them: for those that they
        have, else for the first ones."""
        own = [require(run / name, ())["arguments"]["seed"] for run, name in first]
        others = [seed for seed in self.settings.seeds if seed not in own]
        return others[len(first) + len(others) - len(self.settings.seeds) :]

    def teachers(self, name, *flags, first=()):
        """A teacher of each seed on RUN's human labels, and its labels of the human-labelled rows; `first`
        stands for that of the first seed."""
        systems = [*first]
        for seed in self.seeds_beside(first):
            folder = self.link(f"{name}_{seed}", self.run, "features")
            self.noted[folder.name] = [
                self.command("teacher", "--run", folder, "--seed", seed, *flags),
                self.command("labels", "--run", folder, "--only-labelled"),
            ]
            systems.append((folder, "teacher"))
        return systems

    def students(self, run, name, *flags, first=(), like="student"):
        """A student of each seed on a run's soft labels, trained as RUN's student of that name was (like);
        `first` stands for that of the first seed."""
        folder = self.link("students" if run == self.run else "more", run, "features", "labels")
        systems = [*first]
        for seed in self.seeds_beside(first):
            student = f"{name}_{seed}"
            own = "--run", folder, "--name", student, "--seed", seed
            self.noted[f"{folder.name}_{student}"] = [self.command(like, *own, *flags)]
            systems.append((folder, student))
        return systems

    def epochs_for(self, impressions):
        """Epochs that take as many optimizer steps on so many impressions, and the human-labelled rows, as
        RUN's student took: at equal epochs a small set would be trained too little."""
        made = require(self.run / "student", ())
        rows = impressions + made["rows"]["human"]
        return "--epochs", max(1, round(made["arguments"]["epochs"] * made["rows"]["train"] / rows))

    def work(self):
        """Trains all that was noted, JOBS at a time; each has its log in INTO/logs."""
        print(f"{len(self.noted)} experiments, {self.settings.jobs} at a time")
        with ThreadPoolExecutor(self.settings.jobs) as pool:
            for name in pool.map(self.train, self.noted):  # the first failure ends it
                print(f"  {name}: done")
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
        return name


def compare_models(experiments, own):
    """(a): teachers of other models, and RUN's own. Returns {label: systems}, as those below do."""
    conditions = {}
    for entry in experiments.settings.models:
        name, _, place = entry.partition("=")
        conditions[name] = experiments.teachers(f"teacher_{name}", "--model", place)
    return {**conditions, experiments.settings.run_teacher: own}


def compare_sources(experiments, own):
    """(d): pin text that grows, source by source; RUN's own teacher reads all of it."""
    *groups, last = experiments.settings.fields
    conditions, read = {}, set()
    for group in groups:
        read |= set(group.split("+"))
        fields = [field for field in FIELDS if field in read]
        name = f"fields_to_{group.replace('+', '_')}"
        label = f"+ {group}" if conditions else group
        conditions[label] = experiments.teachers(name, "--fields", *fields)
    return {**conditions, f"+ {last}": own}


def compare_amounts(experiments, own):
    """(b): students on a growing number of impressions, and on human labels alone."""
    run, more = experiments.run, experiments.settings.more
    # in its own epochs: in as many steps it learns rows by heart
    alone = experiments.students(run, "student_human", first=[(run, ON_HUMAN)], like=ON_HUMAN)
    conditions = {"student on human labels": alone}
    rows = require(more / "features", ())["rows"]
    for n in sizes(rows["labelled_train"], rows["impressions"]):
        flags = "--rows", n, *experiments.epochs_for(n)
        conditions[f"{n:,} impressions"] = experiments.students(more, f"student_{n}", *flags)
    first = [(run, "student")] if more == run else []
    flags = () if first else experiments.epochs_for(rows["impressions"])
    every = experiments.students(more, "student_all", *flags, first=first)
    return {**conditions, "all impressions": every}


def compare_languages(experiments, own):
    """(c): RUN's teacher and its student, if any, by language, and students on fewer impressions: of all
    languages, and as many of the home language alone, which tells fewer rows from fewer languages."""
    run = experiments.run
    if not (run / "student" / "stage.json").exists():
        return {"teacher": own}
    home = home_language(run)
    files = PairFiles(run, [home])
    counts = [int(files.count(path).sum()) for path in files.shards]
    rows = sum(counts) * 9 // 10  # 04 holds out a tenth at most
    flags = "--rows", rows, *experiments.epochs_for(rows)
    alone = experiments.students(run, "student_home", "--languages", home, *flags)
    return {
        "teacher": own,
        "student": experiments.students(run, "student_all", first=[(run, "student")]),
        "student, fewer impressions": experiments.students(run, "student_fewer", *flags),
        f"student, fewer, {home} only": alone,
    }


def sizes(human, impressions):
    """1, 3, 10, 30, 100 times the human set, as far as the impressions go; a tenth of them where that is not
    even ten times."""
    found = {times * human for times in (1, 3, 10, 30, 100) if times * human < 0.9 * impressions}
    if 10 * human >= 0.9 * impressions:
        found.add(impressions // 10)
    return sorted(found)


CONDITIONS = {"a": compare_models, "b": compare_amounts, "c": compare_languages, "d": compare_sources}


def main(argv=None):
    # 1. The run
    settings = parse({"toy": Settings()}, argv, __doc__)
    into = settings.into or settings.run.parent / "findings"
    experiments = Experiments(replace(settings, more=settings.more or settings.run, into=into))
    into.mkdir(parents=True, exist_ok=True)

    # 2. Experiments
    own = None
    if {*settings.findings} != {"b"}:  # which compares students alone
        first = [(settings.run, "teacher")]
        own = experiments.teachers(f"teacher_{settings.run_teacher}", first=first)
    conditions = {key: CONDITIONS[key](experiments, own) for key in settings.findings}
    experiments.work()

    # 3. The comparisons
    for key in conditions:
        compare(key, conditions[key], into, settings.resamples)
    print((into / "findings.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    run_main(main)
