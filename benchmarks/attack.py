"""Attacks on a finished run: damaged files, and wrong values of every flag. Nothing may pass in silence.

    python benchmarks/attack.py --parts flips --draws 300
    python benchmarks/attack.py --parts flips --seed 17 --draws 1        one of these once more
    python benchmarks/attack.py --parts flags --stages 02 04

flips   A byte of one file of a tiny run is changed, the file is cut, gets a byte more, or is removed. Every
        file of every folder may be drawn, and the folders' locks. Then something that reads the folder is
        run: a stage whose own folder is not there yet; the folder's own stage again, with and without
        --overwrite; 01 --update and 03 on a dataset that has grown; runs/search.py. It must end with one line
        that names the folder and leave everything as it was, or make what it makes of the undamaged run, byte
        for byte (of stage.json all but the time it took, of report.md all but the line with the date).
        "left out": 05 names a student that stands beside the main one, and makes the report without it.
flags   Every flag of every stage gets values that are wrong for its type, with and without --overwrite. The
        stage must end with a line or two that name the flag or the value, and leave the run as it was. What
        is accepted, or still at work after --limit seconds, is listed, for eyes.

Each script runs in a process of its own. Exit status 1 if anything was silent, unclear, lost, a traceback.
"""

import dataclasses
import datetime
import importlib
import itertools
import shutil
import sys
import tempfile
import types
import typing
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks import attacked  # noqa: E402
from benchmarks.attacked import STAGES, STEPS, STUDENTS, command, contents, copied, make, start  # noqa: E402
from runs.files import remove  # noqa: E402
from runs.settings import Count, Positive, Size, parse, ranges_of  # noqa: E402
from runs.terminal import progress_bar, run_main  # noqa: E402

HARMLESS = ("clear", "harmless", "remade", "left out")
FAULTS = ("silent", "unclear", "traceback", "loss")


@dataclass(frozen=True)
class Settings:
    """What the attack is told."""

    parts: tuple[Literal["flips", "flags"], ...] = ("flips", "flags")
    draws: Count = 300  # damaged files
    seed: Size = 0  # of the first draw; the next one has the next seed
    stages: tuple[Literal["01", "02", "03", "04", "05"], ...] = tuple(STAGES)  # whose flags
    scale: Positive = 0.02  # size of the toy world; 0.02: 40 pins
    limit: Count = 60  # seconds that a stage with a wrong value is given


# ------------------------------------------------------------------------------------------------------------
# Damaged files


class Case(NamedTuple):
    """A folder that is damaged in a copy of the run `state`, and what then reads it."""

    damaged: str
    reader: str  # in words
    script: str
    argv: list
    state: Path
    makes: str | None  # folder; None: it prints
    right: Any  # what it makes of the undamaged run
    anew: bool = False  # the folder that it makes is not there yet


def stage_cases(root):
    """Of the run root/whole each stage once more, and each that reads what others made."""
    found, run, whole = [], root / "attacked", root / "whole"
    for step in STEPS:
        number = step.script[:2]
        data = {"--data": root / "data"} if number == "01" else {}
        todo = whole, step.makes, contents(whole / step.makes)
        for folder in step.reads:
            found.append(Case(folder, number, *command(step, run, data), *todo, anew=True))
        overwrite = {**data, "--overwrite": None}
        found.append(Case(step.makes, f"{number} again", *command(step, run, data), *todo))
        found.append(Case(step.makes, f"{number} --overwrite", *command(step, run, overwrite), *todo))
    return found


def search_cases(root):
    """A query's pins, as the student ranks them."""
    whole, query = root / "whole", "red chair"
    right = make(root, "runs.search", [query, "--run", whole])
    found = []
    for folder in ("features", "student"):
        argv = [query, "--run", root / "attacked"]
        found.append(Case(folder, "search", "runs.search", argv, whole, None, right))
    return found


def next_day_cases(root):
    """01 --update on a dataset with more impressions, and 03 after it, which keeps old labels."""
    run, whole, grown, labelled = (root / name for name in ("attacked", "whole", "grown", "labelled"))
    data = shutil.copytree(root / "data", root / "next_data")
    impressions = pq.read_table(data / "impressions" / "part-00000.parquet")
    pq.write_table(impressions.slice(0, 150), data / "impressions" / "part-99999.parquet")
    update = {"--data": data, "--update": None}
    make(root, *command(STAGES["01"], copied(whole, grown), update))
    make(root, *command(STAGES["03"], copied(grown, labelled)))
    right = contents(grown / "features")
    argv = command(STAGES["01"], run, update)
    found = [Case("features", "01 --update", *argv, whole, "features", right)]
    right = contents(labelled / "labels")
    for folder in ("features", "teacher", "labels"):
        argv = command(STAGES["03"], run)
        found.append(Case(folder, "03 the next day", *argv, grown, "labels", right))
    return found


def damage(path, rng):
    """Changes one file; returns what was done."""
    content = path.read_bytes()
    how = ("changed", "changed", "cut", "longer", "removed")[rng.integers(5)]
    place = int(rng.integers(max(len(content), 1)))
    byte = int(rng.integers(1, 256))
    if how == "removed":
        path.unlink()
        return how
    if how == "longer" or not content:
        path.write_bytes(content + bytes([byte]))
        return "a byte longer"
    end = b""
    if how == "changed":
        end = bytes([content[place] ^ byte]) + content[place + 1 :]
    path.write_bytes(content[:place] + end)
    return f"{how} at byte {place}"


def flip(case, rng, root, left_out):
    """One draw: (verdict, what happened). left_out: {student: the report without it}."""
    run = copied(case.state, root / "attacked")
    folder = run / case.damaged
    locks = list(run.glob(f".{case.damaged}.lock"))
    files = [path for path in folder.rglob("*") if path.is_file()]
    path = sorted([*locks, *files])[rng.integers(len(locks) + len(files))]
    done = f"{path.relative_to(run)} {damage(path, rng)}"
    if case.anew:
        remove(run / case.makes)
    before = contents(run)
    was = contents(folder) if case.makes == case.damaged else case.right
    ended = start(case.script, case.argv, root / "here")
    made = contents(run / case.makes) if case.makes else ended.out
    happened = f"{done}, then {case.reader}: {ended.last_line()}"
    if ended.code:
        verdict = attacked.refusal(ended, [str(folder), *map(str, locks)])
        is_lost = verdict == "clear" and contents(run) != before
        return "loss" if is_lost else verdict, happened
    if made == case.right:
        return "remade" if was != case.right else "harmless", happened
    is_named = f"left out: {folder}" in ended.out
    return "left out" if is_named and made == left_out.get(case.damaged) else "silent", happened


def report_without(root, student):
    """What 05 makes where a student beside the main one is not there."""
    run = copied(root / "whole", root / "without")
    remove(run / student)
    remove(run / "report")
    make(root, *command(STAGES["05"], run))
    return contents(run / "report")


def attack_files(root, settings):
    """Damaged files: prints the table; returns the faults."""
    cases = [*stage_cases(root), *search_cases(root), *next_day_cases(root)]
    left_out = {STUDENTS[0]: report_without(root, STUDENTS[0])}
    counts, faults = Counter(), []
    seeds = range(settings.seed, settings.seed + settings.draws)
    for seed in progress_bar(iterable=seeds, desc="damaged files"):
        rng = np.random.default_rng(seed)
        case = cases[rng.integers(len(cases))]
        verdict, happened = flip(case, rng, root, left_out)
        counts[case.damaged, case.reader, verdict] += 1
        if verdict in FAULTS:
            faults.append(f"{verdict}: --seed {seed} --draws 1: {happened}")
    rows = sorted((case.damaged, case.reader) for case in cases)
    print_table(("damaged", "then run"), rows, counts, (*HARMLESS, *FAULTS))
    return faults


# ------------------------------------------------------------------------------------------------------------
# Wrong values of flags

WRONG = {  # by type; ROOT: a folder in which there is a file
    bool: ("maybe", "2"),
    int: ("many", "1.5", "-1", "nan", "1e30", "999999999", str(10**12), str(10**30)),
    float: ("many", "-1", "nan", "inf", "1e300", "1e-300"),
    str: ("ROOT/nowhere", "no such thing", "x" * 5000, "two\nlines"),
    Path: ("ROOT/nowhere", "ROOT/file", "ROOT/file/below", "x" * 5000),
    datetime.date: ("yesterday", "2024-13-45", "0001-01-01", "9999-12-31"),
}


def wrong_values(hint, root):
    """Wrong values for a flag of this type: none at all, those of its kind, and just outside its range."""
    kind, values = hint, [""]
    while not isinstance(kind, type):  # Annotated, Literal, tuple[…], … | None
        if typing.get_origin(kind) is Literal:
            return [*values, "nonsense", typing.get_args(kind)[0].upper()]
        kind = next(inner for inner in typing.get_args(kind) if inner is not types.NoneType)
    values += [value.replace("ROOT", str(root)) for value in WRONG[kind]]
    for bounds in ranges_of(hint):
        outside = bounds.low - bounds.low_included, bounds.high
        values += [f"{limit:g}" for limit in outside if np.isfinite(limit)]
    return list(dict.fromkeys(values))


def flags_of(script):
    """{flag: its type} of a stage."""
    kind = type(importlib.import_module(script).PRESETS["toy"])
    hints = typing.get_type_hints(kind, include_extras=True)
    names = [field.name for field in dataclasses.fields(kind)]
    return {f"--{name.replace('_', '-')}": hints[name] for name in names}


def give(step, flags, root, limit):
    """A stage is given a wrong value, the last of `flags`: (verdict, what happened)."""
    run = copied(root / "whole", root / "attacked")
    remove(root / "nowhere")
    flag, value = list(flags.items())[-1]
    before = contents(run)
    ended = start(*command(step, run, flags), root / "here", limit)
    verdict = "accepted"
    if ended.code:
        names = [flag, value] if value else [flag]
        verdict = attacked.refusal(ended, names, lines=2)
    if (verdict == "clear" or ended.code is None) and contents(run) != before:
        verdict = "loss"
    overwrite = " --overwrite" * ("--overwrite" in flags and flag != "--overwrite")
    return verdict, f"{step.script} {flag} {str(value)[:40]!r}{overwrite}: {ended.last_line()}"


def attack_flags(root, settings):
    """Wrong values: prints the table, and what was accepted; returns the faults."""
    (root / "file").write_text("a file")
    counts, listed, rows = Counter(), {"accepted": []}, {}
    ways = {}, {"--overwrite": None}
    for step in (STAGES[number] for number in settings.stages):
        data = {"--data": root / "data"} if step.makes == "features" else {}
        known = flags_of(step.script)
        rows[step.script] = step.script, len(known)
        for flag, hint in progress_bar(iterable=known.items(), desc=step.script):
            for value, more in itertools.product(wrong_values(hint, root), ways):
                flags = {**data, **more}
                flags.pop(flag, None)
                flags[flag] = value  # the last one
                verdict, happened = give(step, flags, root, settings.limit)
                counts[*rows[step.script], verdict] += 1
                listed.setdefault(verdict, []).append(f"{verdict}: {happened}")
    print_table(("stage", "flags"), rows.values(), counts, ("clear", "accepted", *FAULTS[1:]))
    print("\n".join(listed["accepted"]))
    return [line for verdict in FAULTS for line in listed.get(verdict, [])]


# ------------------------------------------------------------------------------------------------------------


def print_table(head, rows, counts, verdicts):
    """A Markdown table of how often each verdict came. counts: {(*row, verdict): number}."""
    lines = [[*head, *verdicts], ["---"] * len(head) + ["---:"] * len(verdicts)]
    sums = Counter()
    for row in dict.fromkeys(rows):
        found = {verdict: counts[*row, verdict] for verdict in verdicts}
        sums.update(found)
        lines.append([*row, *found.values()])
    lines.append(["all", *[""] * (len(head) - 1), *sums.values()])
    print()
    for line in lines:
        print(f"| {' | '.join(map(str, line))} |")
    print()


def main(argv=None):
    settings = parse({"toy": Settings()}, argv, __doc__)
    attacked.prepare_server()
    faults = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        attacked.make_run(root, settings.scale)
        for part, attack in (("flips", attack_files), ("flags", attack_flags)):
            if part in settings.parts:
                faults += attack(root, settings)
    print("\n".join(faults or ["no faults"]))
    return int(bool(faults))


if __name__ == "__main__":
    run_main(lambda: sys.exit(main()))
