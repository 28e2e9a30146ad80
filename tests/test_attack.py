"""benchmarks/attack.py finds what passes in silence, on a careless script and on a stage; no stage takes a
wrong value of a flag."""

import functools

import attack
import numpy as np
import pytest
from helpers import STAGES, stage, synthetic

from benchmarks import attacked
from runs.settings import parse

SCRIPT = STAGES["04"]
CARELESS = """
import shutil, sys
from pathlib import Path

def main(argv):
    run, how = Path(argv[0]), argv[1]
    text = (run / "read" / "file").read_bytes()
    if how == "copies":
        (run / "made" / "file").write_bytes(text)
    if how == "loses":
        shutil.rmtree(run / "other")
    if how in ("loses", "names"):
        sys.exit(f"error: {run / 'read'}: not whole")
    if how == "tells":
        sys.exit("error: something is wrong")
    if how == "fails":
        raise ValueError(str(run / "read"))
"""


@pytest.fixture
def careless(tmp_path, monkeypatch):
    """What flip() says of a script that does with a file, cut at a byte, as it is told."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "careless.py").write_text(CARELESS)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    whole = tmp_path / "whole"
    for name in ("read", "made", "other"):
        (whole / name).mkdir(parents=True)
        (whole / name / "file").write_text("as it was")
    attacked.prepare_server([SCRIPT])

    def verdict(how, makes="made"):
        argv = [tmp_path / "attacked", how]
        right = attacked.contents(whole / makes)
        case = attack.Case("read", how, "careless", argv, whole, makes, right)
        return attack.flip(case, np.random.default_rng(1), tmp_path, {})[0]

    return verdict


def test_every_way_to_take_a_damaged_file(careless):
    verdicts = {how: careless(how) for how in ("copies", "names", "tells", "fails", "loses", "ignores")}
    assert verdicts.pop("copies") == "silent" and verdicts.pop("ignores") == "harmless"
    assert verdicts == {"names": "clear", "tells": "unclear", "fails": "traceback", "loses": "loss"}
    assert careless("ignores", makes="read") == "silent"  # what is damaged stays so


def test_a_draw_is_the_same_again(tmp_path):
    path, seen = tmp_path / "file", {}
    for seed in [*range(60), *range(60)]:
        path.write_bytes(b"0123456789")
        done = attack.damage(path, np.random.default_rng(seed))
        content = path.read_bytes() if path.exists() else None
        assert content != b"0123456789" and seen.setdefault(seed, (done, content)) == (done, content)
    kinds = {done.split(" at ")[0] for done, _ in seen.values()}
    assert kinds == {"changed", "cut", "a byte longer", "removed"}


def test_a_stage_on_damaged_files_and_wrong_flags(tmp_path, monkeypatch, capsys):
    attacked.prepare_server([SCRIPT])
    (tmp_path / "whole").mkdir()
    synthetic(tmp_path / "whole")
    step = attacked.STAGES["04"]
    attacked.make(tmp_path, *attacked.command(step, tmp_path / "whole"))
    monkeypatch.setattr(attack, "STEPS", [step])
    for name in ("search_cases", "next_day_cases"):
        monkeypatch.setattr(attack, name, lambda root: [])
    monkeypatch.setattr(attack, "report_without", lambda root, student: None)
    assert attack.attack_files(tmp_path, attack.Settings(draws=8)) == []
    *_, counts, _ = capsys.readouterr().out.splitlines()
    counts = [int(cell) for cell in counts.split("|")[3:-1]]
    assert sum(counts) == 8 and not sum(counts[-4:])
    give = functools.partial(attack.give, step, root=tmp_path, limit=None)
    assert give({"--overwrite": None, "--epochs": "many"})[0] == "clear"
    assert give({"--overwrite": None, "--epochs": "2"})[0] == "accepted"
    assert give({"--run": str(tmp_path / "nowhere")})[0] == "clear"


# What parse() must refuse, of all that a stage is given.
REFUSED = {"", "many", "1.5", "-1", "nan", "1e30", str(10**12), str(10**30), "inf", "maybe", "nonsense"}


@pytest.mark.parametrize("number", STAGES)
def test_no_stage_takes_a_wrong_value(number, tmp_path, capsys):
    for flag, hint in attack.flags_of(STAGES[number]).items():
        values = attack.wrong_values(hint, tmp_path)
        assert len(values) >= 3
        for value in REFUSED.intersection(values) - ({""} if flag == "--levels" else set()):
            with pytest.raises(SystemExit) as end:
                parse(stage(number).PRESETS, ["--run", str(tmp_path), flag, value])
            said = capsys.readouterr().err
            assert end.value.code == 2 and said.count("\n") == 1, (flag, value)
            assert flag in said or value in said, (flag, value, said)
    assert not list(tmp_path.iterdir())
