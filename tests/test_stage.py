"""lib/stages: settings, whole files, a stage's folder through kills and refusals, one-line errors."""

import ast
import errno
import functools
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tokenize
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import ROOT, stage, stop_line
from torch import nn

from lib.inputs.captions import reuse_captions
from lib.stages.checkpoint import Checkpoints
from lib.stages.files import fingerprint, read_json, whole_file, write_json, write_parquet
from lib.stages.finished import remake, require_finished, sealed
from lib.stages.hardware import pick_device
from lib.stages.processes import start_stage
from lib.stages.settings import Count, NonNegative, Share, Size, StageSettings, parse, typed
from lib.stages.stage import Stage
from lib.stages.streams import keep_chunks
from lib.stages.terminal import Stop, run_main, stop_on_error


@dataclass(frozen=True)
class Settings(StageSettings):
    """A stage of the tests."""

    epochs: Count = 3  # passes over the rows
    hidden: tuple[Count, ...] = (8, 4)  # widths
    warmup: Share = 0.1  # share of the steps
    rows: Count | None = None  # rows (default: all)
    gains: tuple[NonNegative, NonNegative] | None = None  # gains
    merge: bool = True  # merge
    balance: bool = False  # balance
    workers: Size = 0  # cannot change a result
    seed: Size = 0  # seed


PRESETS = {"toy": Settings(), "small": Settings(), "paper": replace(Settings(), preset="paper", epochs=9)}


def settings_of(run, **more):
    return replace(Settings(), run=run, **more)


def make(run, text="one", inputs=None, **more):
    """A finished folder RUN/s with one file."""
    stage = Stage(run / "s", settings_of(run, **more), inputs or {"data": "d"})
    (stage.folder / "file.txt").write_text(text)
    stage.finish(rows=1)
    return run / "s"


def names(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


# ------------------------------------------------------------------------------------------------------------
# Settings


def test_presets_fill_in_and_flags_win():
    assert parse(PRESETS, []).epochs == 3
    assert parse(PRESETS, ["--preset", "paper"]).epochs == 9
    assert parse(PRESETS, ["--preset=paper"]).epochs == 9
    given = parse(PRESETS, ["--preset", "paper", "--epochs", "7", "--hidden", "5", "--no-merge"])
    assert (given.epochs, given.hidden, given.merge, given.preset) == (7, (5,), False, "paper")


@pytest.mark.parametrize(
    "argv, word",
    [
        (["--unknown"], "unknown"),
        (["--overwrit"], "overwrit"),
        (["--preset", "nonsense"], "preset"),
        (["--preset"], "'--preset'"),
        (["--epochs", "0"], "--epochs 0: must be at least 1"),
        (["--epochs", "1.5"], "epochs"),
        (["--rows", "-5"], "rows"),
        (["--rows", "many"], "--rows: needs INT or None, not 'many'"),
        (["--gains", "5=1"], "--gains: needs FLOAT FLOAT or None, not '5=1'"),
        (["--gains"], "--gains: needs FLOAT FLOAT or None; no value is given; --help"),
        (["--hidden", "4", "0"], "--hidden 0"),
        (["--hidden", "256,x"], "hidden"),
        (["--warmup", "1"], "--warmup 1.0: must be at least 0 and below 1"),
        (["--warmup", "nan"], "--warmup nan"),
        (["--seed", "-1"], "seed"),
        (["--seed", str(10**9)], "--seed 1000000000: must be at least 0 and below 1e+09"),
        (["--epochs", str(10**30)], "must be at least 1 and below 1e+09"),
        (["--run", ""], "--run '': an empty value"),
        (["--run="], "--run '': an empty value"),
        (["--model", ""], "--model '': an empty value"),
        (["--epochs", "7", ""], "7 '': an empty value"),
    ],
)
def test_bad_values_end_with_a_message_and_status_2(argv, word, capsys):
    with pytest.raises(SystemExit) as end:
        parse(PRESETS, argv)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
    assert not set(said) & set("│─╭╯")
    assert word in said


@pytest.mark.parametrize(
    "argv, found",
    [
        (["--preset", "paper"], ""),
        (["--epochs=7", "--no-merge", "--run", "epochs"], "--epochs --no-merge"),
        (["--hidden", "5", "--preset", "paper"], ""),
        (["--epochs", "3"], "--epochs"),  # the default, but asked for
    ],
)
def test_flags_that_were_typed(argv, found):
    assert typed(parse(PRESETS, argv), "epochs", "rows", "merge", "no-merge") == found


def test_help_shows_the_values_of_the_preset_in_force(capsys):
    with pytest.raises(SystemExit) as end:
        parse(PRESETS, ["--preset", "paper", "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "passes over the rows (default: 9)" in text and "--run" in text and "--overwrite" in text


@pytest.mark.parametrize("number", ["01", "02", "03", "04", "05"])
def test_every_flag_has_its_help(number, capsys, monkeypatch):
    """The comment of a setting that is broken over lines was lost."""
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        parse(stage(number).PRESETS, ["--help"])
    text = re.sub(r"[│╭╮╰╯─]|\{.*?\}", " ", capsys.readouterr().out)
    flags = re.findall(r"(?m)^\s+(--[a-z][\w-]*)(.*?)\(default", text, re.S)
    without = [flag for flag, said in flags if not re.search("[a-z]{2}", said)]
    assert len(flags) > 5 and not without


def test_no_line_of_a_help_is_lost():
    """tyro shows the comment behind a setting, or else the lines above it, never both."""
    paths = [path for where in ("*.py", "*/*.py", "lib/stages/*.py") for path in ROOT.glob(where)]
    wrong, seen = [], 0
    for path in [path for path in paths if path.parent.name != "tests"]:
        text = path.read_text(encoding="utf-8")
        lines, tokens = text.splitlines(), tokenize.generate_tokens(io.StringIO(text).readline)
        commented = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
        for kind in ast.walk(ast.parse(text)):
            if isinstance(kind, ast.ClassDef) and re.fullmatch(r"\w*Settings|Options|Plan", kind.name):
                fields = [field for field in kind.body if isinstance(field, ast.AnnAssign)]
                for field in fields if kind.decorator_list else ():
                    above = lines[field.lineno - 2].lstrip().startswith("#")
                    behind = field.end_lineno in commented
                    wrong += [f"{path.name} {field.target.id}"] if above == behind else []
                    seen += 1
    assert seen > 100 and wrong == []


# ------------------------------------------------------------------------------------------------------------
# Whole files, fingerprints, checkpoints


def test_a_file_is_whole_or_absent(tmp_path):
    (tmp_path / "f").write_text("old")
    with pytest.raises(RuntimeError), whole_file(tmp_path / "f") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert (tmp_path / "f").read_text() == "old"
    with whole_file(tmp_path / "f") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "f").read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["f"]


def test_fingerprint_of_a_large_file_sees_a_byte_anywhere(tmp_path):
    """300 MB: earlier only samples of files over 256 MiB were read."""
    path = tmp_path / "large"
    with open(path, "wb") as f:
        f.truncate(300_000_000)
    first = fingerprint(path)
    with open(path, "r+b") as f:
        f.seek(1_700_001)
        f.write(b"x")
    assert fingerprint(path) != first


def test_a_checkpoint_gives_back_weights_moments_and_state(tmp_path):
    torch.manual_seed(0)
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    optimizer = torch.optim.AdamW([{"params": model.parameters(), "peak": 0.5}], lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    begun = Checkpoints(tmp_path, model, optimizer, {"step": 0})
    begun.state |= {"step": 4, "log": [{"loss": 0.5}]}
    begun.save()
    second = torch.optim.AdamW([{"params": other.parameters(), "peak": 0.5}], lr=0.9)
    assert Checkpoints(tmp_path, other, second, {"step": 0}).state == begun.state
    assert torch.equal(model.weight, other.weight)
    moments = [optimizer.state[model.weight]["exp_avg"], second.state[other.weight]["exp_avg"]]
    assert torch.equal(*moments) and second.param_groups[0]["lr"] == 0.1


def test_a_checkpoint_of_another_version_is_named(tmp_path):
    """A training killed before an upgrade that keeps other state: not a traceback when it is continued."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    Checkpoints(tmp_path, model, optimizer, {"number": 4}).save()
    line = stop_line(lambda: Checkpoints(tmp_path, model, optimizer, {"step": 0}))
    assert str(tmp_path / "checkpoint.pt") in line and "--overwrite" in line


# ------------------------------------------------------------------------------------------------------------
# A stage's folder


def test_finished_once_is_finished(tmp_path, capsys):
    folder = make(tmp_path)
    about = read_json(folder / "stage.json")
    assert about["finished"] and about["rows"] == 1 and about["outputs"]["file.txt"]["bytes"] == 3
    assert {"arguments", "inputs", "seed", "versions", "seconds", "identity"} <= about.keys()
    assert Stage(folder, settings_of(tmp_path), {"data": "d"}).done
    assert "nothing to do" in capsys.readouterr().out
    assert names(tmp_path) == [".s.lock", "s/file.txt", "s/stage.json"]


def test_other_settings_and_inputs_are_named(tmp_path):
    folder = make(tmp_path)
    line = stop_line(Stage, folder, settings_of(tmp_path, epochs=4, balance=True), {"data": "e"})
    assert "--epochs was 3, is 4" in line and "--balance was False, is True" in line
    assert "data was 'd', is 'e'" in line and "--overwrite" in line


def test_settings_that_cannot_change_a_result_are_free(tmp_path):
    folder = make(tmp_path, workers=1)
    assert Stage(folder, settings_of(tmp_path, workers=8, preset="paper"), {"data": "d"}).done


def test_a_switch_of_a_later_version_changes_nothing_while_it_is_off(tmp_path):
    folder = make(tmp_path)
    about = read_json(folder / "stage.json")
    assert about["arguments"].pop("balance") is False  # an earlier version had no --balance
    write_json(folder / "stage.json", sealed(about))
    assert Stage(folder, settings_of(tmp_path), {"data": "d"}).done


def test_killed_work_continues_and_half_written_files_go(tmp_path):
    stage = Stage(tmp_path / "s", settings_of(tmp_path), {})
    (stage.folder / "labels").mkdir()
    (stage.folder / "labels" / ".part-0.parquet.tmp").write_text("half")
    (stage.folder / ".tmpAb3x").write_text("half, by a library's own naming")
    write_json(stage.folder / "labels" / "part-1.txt", "whole")
    del stage
    stage = Stage(tmp_path / "s", settings_of(tmp_path), {})
    assert names(stage.folder) == [".made-0", "labels/part-1.txt", "stage.json"]


def test_work_begun_with_other_settings_is_named(tmp_path, capsys):
    """Hours of it go when the stage is finished with new ones."""
    begun = Stage(tmp_path / "s", settings_of(tmp_path), {}).folder
    assert not capsys.readouterr().out
    stage = Stage(tmp_path / "s", settings_of(tmp_path, epochs=9), {})
    assert f"{begun}: begun with other settings" in capsys.readouterr().out
    stage.finish()
    assert not begun.exists()


def test_intermediate_results_go_only_when_the_rest_is_whole(tmp_path, monkeypatch):
    stage = Stage(tmp_path / "s", settings_of(tmp_path), {})
    for name in ("checkpoint.pt", "work/a/b", "file.txt"):
        (stage.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (stage.folder / name).write_text("x")
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(os, "replace", lambda *paths: raises(OSError())())
        stage.finish(["checkpoint.pt", "work"])
    assert (stage.folder / "checkpoint.pt").exists()
    stage.finish(["checkpoint.pt", "work"])
    assert names(tmp_path / "s") == ["file.txt", "stage.json"]
    assert not (tmp_path / "s" / "work").exists()


def test_overwrite_leaves_the_old_folder_until_the_new_one_is_finished(tmp_path):
    folder = make(tmp_path, "old")
    stage = Stage(folder, settings_of(tmp_path, overwrite=True, seed=5), {"data": "d"})
    assert stage.old == folder and (folder / "file.txt").read_text() == "old"
    write_json(stage.folder / "file.txt", "new")
    del stage  # killed: the old folder counts, and the same command continues what it had begun
    assert require_finished(folder, "x.py")["arguments"]["seed"] == 0
    stage = Stage(folder, settings_of(tmp_path, overwrite=True, seed=5), {"data": "d"})
    assert read_json(stage.folder / "file.txt") == "new"
    stage.finish()
    assert read_json(folder / "file.txt") == "new"
    assert names(tmp_path) == [".s.lock", "s/file.txt", "s/stage.json"]


@pytest.mark.parametrize("moment", [1, 2, 3])
@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_while_the_new_folder_takes_its_place(tmp_path, monkeypatch, moment, when):
    """At each rename of finish(): stage.json, the old folder aside, the new one into its place."""
    folder, rename, done = make(tmp_path, "old"), os.replace, 0
    settings = settings_of(tmp_path, overwrite=True, seed=5)
    stage = Stage(folder, settings, {"data": "d"})
    write_json(stage.folder / "file.txt", "new")

    def killed(*paths):
        nonlocal done
        done += 1
        if (done, when) == (moment, "before"):
            raise KeyboardInterrupt
        rename(*paths)
        if (done, when) == (moment, "after"):
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        stage.finish()
    monkeypatch.undo()
    del stage
    began = (moment, when) != (1, "before")  # its stage.json says finished: the next start completes it
    stage = Stage(folder, replace(settings, overwrite=not began), {"data": "d"})
    assert stage.done == began
    if not stage.done:
        stage.finish()
    assert read_json(folder / "file.txt") == "new"
    assert names(tmp_path) == [".s.lock", "s/file.txt", "s/stage.json"]


def test_work_of_other_settings_is_left_alone_until_the_stage_is_finished(tmp_path):
    first = Stage(tmp_path / "s", settings_of(tmp_path), {})
    (first.folder / "file.txt").write_text("first")
    work = first.folder
    del first
    second = Stage(tmp_path / "s", settings_of(tmp_path, seed=1), {})  # a first try refuses no second one
    assert (work / "file.txt").exists() and second.folder != work
    second.finish()
    assert not work.exists()


def test_a_cache_is_reused(tmp_path):
    """But for what is not as it was written."""
    stage = Stage(tmp_path / "s", settings_of(tmp_path), {"data": "d"})
    for number in range(3):
        write_json(stage.folder / "captions" / "m" / f"part-{number}", number)
    stage.finish()
    folder = tmp_path / "s"
    (folder / "captions" / "m" / "part-1").write_text("9\n")
    (folder / "captions" / "m" / "part-9").write_text("of nobody")
    stage = Stage(folder, settings_of(tmp_path, overwrite=True), {"data": "e"})
    reuse_captions([stage.old, None], stage.folder)
    assert names(stage.folder) == [".made-0", "captions/m/part-0", "captions/m/part-2", "stage.json"]


def test_a_link_to_another_run_is_not_written_through(tmp_path):
    folder = make(tmp_path / "owner")
    (tmp_path / "borrower").mkdir()
    (tmp_path / "borrower" / "s").symlink_to(folder)
    settings = settings_of(tmp_path / "borrower", overwrite=True)
    line = stop_line(Stage, tmp_path / "borrower" / "s", settings, {"data": "d"})
    assert "link" in line and str(tmp_path / "owner") in line and (folder / "file.txt").exists()
    assert Stage(tmp_path / "borrower" / "s", replace(settings, overwrite=False), {"data": "d"}).done


def test_a_run_directory_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("mine")
    for run in (tmp_path / "file" / "run", Path("/proc/run")):
        assert f"--run {run}: " in stop_line(Stage, run / "s", settings_of(run), {})
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for run in (tmp_path / ("x" * 300), tmp_path / "loop"):
        line = ended(functools.partial(Stage, run / "s", settings_of(run), {}))
        assert line.startswith("error: ") and str(run) in line and "\n" not in line


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_no_stage_made_is_never_emptied(tmp_path, overwrite):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "thesis.txt").write_text("mine")
    line = stop_line(Stage, tmp_path / "s", settings_of(tmp_path, overwrite=overwrite), {})
    assert "no stage made it" in line and (tmp_path / "s" / "thesis.txt").read_text() == "mine"


DAMAGED = ["", "null", "[]", "{", '{"finished": true}', "\x00\xff", '{"a": 1', "[" * 100_000]
OUTPUTS = ["[]", '{"file.txt": 1}', '{"../x": {"bytes": 1, "hash": ""}}', '{"/x": {"bytes": 1, "hash": ""}}']
ABOUT = '{"finished": true, "identity": "", "arguments": {}, "inputs": {}, "outputs": '
DAMAGED += [f"{ABOUT}{outputs}}}" for outputs in OUTPUTS]


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_stage_json_is_one_line(tmp_path, content):
    folder = make(tmp_path)
    (folder / "stage.json").write_bytes(content.encode("latin-1"))
    for call in (
        lambda: require_finished(folder, "01.py --run x"),
        lambda: Stage(folder, settings_of(tmp_path), {"data": "d"}),
    ):
        line = stop_line(call)
        assert "stage.json" in line and "--overwrite" in line
    stage = Stage(folder, settings_of(tmp_path, overwrite=True), {"data": "d"})
    stage.finish()
    assert require_finished(folder, "01.py")["finished"]


def test_what_its_stage_did_not_write_is_named(tmp_path):
    folder = make(tmp_path, "0123456789")
    data = bytearray((folder / "file.txt").read_bytes())
    data[4] ^= 1
    (folder / "file.txt").write_bytes(bytes(data))
    line = stop_line(require_finished, folder, "01.py --run x")
    assert "file.txt" in line and f"python 01.py --run {tmp_path} --overwrite" in line
    line = stop_line(Stage, folder, settings_of(tmp_path), {"data": "d"})  # it said: nothing to do
    assert "file.txt: not what its stage wrote; --overwrite" in line
    assert require_finished(folder, "01.py", reads=("other*",))["finished"]  # only what is read is checked
    (folder / "file.txt").unlink()
    assert "file.txt: missing" in stop_line(require_finished, folder, "01.py")


@pytest.mark.parametrize("was, now", [('"seed": 0', '"seed": 1'), ('"rows": 1', '"rows": 2'), ('"d"', '"e"')])
def test_a_changed_stage_json_is_one_line(tmp_path, was, now):
    """Facts in it are read by later stages: a teacher's held-out queries, a student's models."""
    folder = make(tmp_path)
    text = (folder / "stage.json").read_text()
    assert was in text
    (folder / "stage.json").write_text(text.replace(was, now))
    line = stop_line(require_finished, folder, "01.py")
    assert "stage.json: not what its stage wrote" in line and "--overwrite" in line
    about = read_json(folder / "stage.json")
    del about["digest"]  # an earlier version wrote none
    write_json(folder / "stage.json", about)
    assert require_finished(folder, "01.py")["finished"]


def test_missing_and_unfinished_name_the_command(tmp_path):
    assert "python 01.py --run x" in stop_line(require_finished, tmp_path / "s", "01.py --run x")
    stage = Stage(tmp_path / "s", settings_of(tmp_path), {})
    assert "missing or unfinished" in stop_line(require_finished, tmp_path / "s", "01.py --run x")
    del stage


def test_one_writes_or_many_read(tmp_path):
    folder = make(tmp_path)
    overwrite = settings_of(tmp_path, overwrite=True)
    one, two = require_finished(folder, "01.py"), require_finished(folder, "01.py")
    line = stop_line(Stage, folder, overwrite, {"data": "d"})
    assert "another process" in line and str(folder) in line
    del one, two
    stage = Stage(folder, overwrite, {"data": "d"})
    assert "rebuilding it" in stop_line(require_finished, folder, "01.py")
    assert "another process" in stop_line(Stage, folder, overwrite, {"data": "d"})
    del stage
    assert require_finished(folder, "01.py")


def test_a_damaged_lock_is_named(tmp_path):
    """sqlite3 said so in a traceback."""
    folder = make(tmp_path)
    lock = tmp_path / ".s.lock"
    lock.write_bytes(b"x" * 5000)
    for call in (require_finished, folder, "01.py"), (Stage, folder, settings_of(tmp_path), {"data": "d"}):
        line = stop_line(*call)
        assert str(lock) in line and "remove" in line
    lock.unlink()
    assert require_finished(folder, "01.py")


def test_another_process_is_seen(tmp_path):
    folder = make(tmp_path)
    code = (
        "import sys, time; from pathlib import Path; from lib.stages.finished import hold; "
        "lock = hold(Path(sys.argv[1]), 'write'); print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "held\n"
        assert "rebuilding it" in stop_line(require_finished, folder, "01.py")
    finally:
        other.kill()
        other.wait()
    assert require_finished(folder, "01.py")  # a killed process holds nothing


# ------------------------------------------------------------------------------------------------------------
# One-line errors


def ended(main):
    with pytest.raises(SystemExit) as end:
        run_main(main)
    return end.value.code


def raises(error):
    def main():
        raise error

    return main


def test_what_went_wrong_is_one_line(tmp_path, capsys):
    assert ended(raises(Stop("the line"))) == "error: the line"
    assert ended(raises(KeyboardInterrupt())) == 130
    assert "the same command continues" in capsys.readouterr().err
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "file")
    assert "the disk is full" in ended(raises(full))
    assert "the disk is full" in ended(
        raises(RuntimeError("I/O error: No space left on device (os error 28)"))
    )
    assert ended(raises(OSError(errno.EROFS, "Read-only file system", "/x/y"))).startswith(
        "error: /x/y: cannot"
    )
    with pytest.raises(ZeroDivisionError):  # a fault of ours keeps its traceback
        run_main(raises(ZeroDivisionError()))


def test_debug_shows_what_lies_behind_a_line(monkeypatch):
    def main():
        with stop_on_error("no model"):
            raise KeyError("hidden_size")

    assert ended(main) == "error: no model (no 'hidden_size')"
    monkeypatch.setenv("DEBUG", "1")
    with pytest.raises(Stop) as shown:
        run_main(main)
    assert isinstance(shown.value.__cause__, KeyError)


def test_what_is_told_in_one_line_stays_that_line():
    with pytest.raises(Stop, match="^nothing here; make it$"), stop_on_error("not written"):
        raise Stop("nothing here; make it")


TOO_LARGE = "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to …"


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried …"), RuntimeError(TOO_LARGE)]
)
def test_too_little_memory_is_one_line(error):
    line = ended(raises(error))
    assert line.startswith("error: not enough memory") and "smaller" in line and "\n" not in line


def test_a_pipe_that_is_closed_is_quiet(tmp_path):
    code = (
        "from lib.stages.terminal import run_main\n"
        "def main():\n    for i in range(100_000): print('a line', i, flush=True)\n"
        "run_main(main)"
    )
    command = f'{sys.executable} -c "$CODE" | head -1'
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env={**os.environ, "CODE": code}, capture_output=True, text=True
    )
    assert done.stdout == "a line 0\n" and done.stderr == ""


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_disk_full_or_read_only_leaves_earlier_results_whole(tmp_path, monkeypatch, number):
    write_json(tmp_path / "metrics.json", {"a": 1})
    before = (tmp_path / "metrics.json").read_bytes()

    def full(self, *args, **options):
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(Path, "write_text", full)
    line = ended(lambda: write_json(tmp_path / "metrics.json", {"b": 2}))
    assert line.startswith("error: ") and "\n" not in line
    assert (tmp_path / "metrics.json").read_bytes() == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_checkpoint_on_a_full_disk_is_one_line(tmp_path):
    model = nn.Linear(300, 300)
    begun = Checkpoints(tmp_path, model, torch.optim.AdamW(model.parameters()), {})
    begun.path.with_name(f".{begun.path.name}.tmp").symlink_to("/dev/full")
    line = ended(begun.save)
    assert str(begun.path) in line and "is the disk full?" in line


def test_a_gpu_that_is_not_there_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device cuda" in stop_line(pick_device, "cuda")
    assert pick_device("auto").type == "cpu"


@pytest.mark.parametrize("delay,fewest,most", [("", 0, 0), (", delay=0", 1, 3)])
def test_progress_in_a_file_is_lines_after_half_a_minute(delay, fewest, most):
    code = (
        "from lib.stages.terminal import progress_bar\n"
        f"bar = progress_bar(total=200_000, desc='rows', unit=' rows'{delay})\n"
        "for i in range(200_000): bar.update()\n"
        "bar.close()"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TQDM_DISABLE"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    lines = [line for line in done.stderr.replace("\r", "\n").split("\n") if line.strip()]
    assert fewest <= len(lines) <= most and all("200000" in line for line in lines[-1:])


def test_the_settings_of_a_finished_folder_are_plain_json(tmp_path):
    folder = make(tmp_path)
    shutil.copytree(folder, tmp_path / "copy")
    json.loads((folder / "stage.json").read_text(), parse_constant=lambda c: pytest.fail(f"{c} is no JSON"))


def test_a_refused_stage_holds_no_lock(tmp_path):
    """The exception's traceback must not keep it, also not in a circle that only a collector would find."""
    import gc

    from accelerate import Accelerator

    folder = make(tmp_path)
    gc.disable()
    try:
        with pytest.raises(Stop) as refused:
            Stage(folder, settings_of(tmp_path, epochs=4), {"data": "d"})
        assert require_finished(folder, "01.py") and refused.value
        accelerator = Accelerator(cpu=True)
        stop_line(start_stage, accelerator, folder, settings_of(tmp_path, epochs=4), {"data": "d"})
        assert Stage(folder, settings_of(tmp_path), {"data": "d"}).done
    finally:
        gc.enable()


# ------------------------------------------------------------------------------------------------------------
# Unfinished work that is damaged, and what lies where a stage writes


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def as_folder(path):
    path.unlink()
    path.mkdir()
    (path / "x").write_text("x")


def as_link(path):
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def as_pipe(path):
    path.unlink()
    os.mkfifo(path)


DAMAGE = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "flipped": flipped,
    "another's": lambda path: path.write_bytes((path.parent / "part-1.parquet").read_bytes()),
    "rotated": lambda path: write_it(path, [3, 1, 2]),
    "folder": as_folder,
    "link": as_link,
    "pipe": as_pipe,
}


def write_it(path, values):
    """As another program would: no journal knows of it."""
    pq.write_table(pa.table({"a": values}), path)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_part_of_unfinished_work_is_made_again(tmp_path, damage, capsys):
    """It was a traceback, a hang, or silently another result."""
    stage = Stage(tmp_path / "s", settings_of(tmp_path), {})
    for number, values in enumerate(([1, 2, 3], [4, 5, 6])):
        write_parquet(stage.folder / "parts" / f"part-{number}.parquet", {"a": values})
    path = stage.folder / "parts" / "part-0.parquet"
    DAMAGE[damage](path)
    del stage
    Stage(tmp_path / "s", settings_of(tmp_path), {})
    assert not os.path.lexists(path) and f"{path}: not as it was written" in capsys.readouterr().out
    assert pq.read_table(path.with_name("part-1.parquet"))["a"].to_pylist() == [4, 5, 6]
    made = keep_chunks(path.parent, [[1, 2, 3]], lambda chunk: {"a": chunk}, 3, "parts")
    assert pq.read_table(next(made))["a"].to_pylist() == [1, 2, 3]


def test_a_checkpoint_is_of_the_journal_or_made_again(tmp_path):
    """Killed between the journal's line and the rename, the checkpoint before counts; a cut line is none."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    stage = Stage(tmp_path / "s", settings_of(tmp_path), {})
    checkpoints = Checkpoints(stage.folder, model, optimizer, {"step": 0})
    checkpoints.state["step"] = 7
    checkpoints.save()
    with open(stage.folder / ".made-0", "a") as journal:
        journal.write('["checkpoint.pt", 9, "of the next one, that was never renamed"]\n["checkp')
    del stage
    stage = Stage(tmp_path / "s", settings_of(tmp_path), {})
    assert Checkpoints(stage.folder, model, optimizer, {"step": 0}).state["step"] == 7
    del stage
    (tmp_path / "x").symlink_to(tmp_path / "s")
    for path in tmp_path.glob(".s.unfinished-*/checkpoint.pt"):
        path.write_bytes(path.read_bytes()[:-7])
    stage = Stage(tmp_path / "s", settings_of(tmp_path), {})
    assert not Checkpoints(stage.folder, model, optimizer, {"step": 0}).continues


def test_work_that_is_a_link_leads_nowhere(tmp_path):
    """01 wrote into the link's target and removed its hidden files."""
    stage = Stage(tmp_path / "s", settings_of(tmp_path), {})
    work = stage.folder
    del stage
    work.rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / ".mine").write_text("mine")
    work.symlink_to(tmp_path / "elsewhere")
    line = stop_line(Stage, tmp_path / "s", settings_of(tmp_path), {})
    assert str(work) in line and "remove it" in line
    assert (tmp_path / "elsewhere" / ".mine").read_text() == "mine"


def test_what_is_no_regular_file_is_one_line(tmp_path):
    """Pipes hung, folders were tracebacks, a sparse terabyte was too little memory."""
    folder = make(tmp_path)
    for number, change in enumerate((as_pipe, as_folder, DAMAGE["empty"])):
        shutil.copytree(folder, tmp_path / str(number) / "s")
        about = tmp_path / str(number) / "s" / "stage.json"
        change(about)
        assert "stage.json: not what its stage wrote" in stop_line(require_finished, about.parent, "01.py")
    with open(folder / "stage.json", "r+b") as sparse:
        sparse.truncate(1 << 40)
    assert "not what its stage wrote" in stop_line(require_finished, folder, "01.py")
    for change in (as_pipe, as_folder, as_link):
        run = tmp_path / change.__name__
        lock = make(run).with_name(".s.lock")
        change(lock)
        assert f"{lock}: no lock of ours" in stop_line(require_finished, run / "s", "01.py")


def test_work_left_by_a_kill_after_the_last_rename_goes(tmp_path):
    """But not what was begun since, with other settings."""
    older = Stage(tmp_path / "s", settings_of(tmp_path, seed=1), {"data": "d"}).folder
    kept = tmp_path / "kept"
    older.rename(kept)
    folder = make(tmp_path)
    kept.rename(older)
    os.utime(older / "stage.json", (1, 1))
    newer = Stage(folder, settings_of(tmp_path, seed=2, overwrite=True), {"data": "d"}).folder
    os.utime(newer / "stage.json", (2**33, 2**33))
    assert Stage(folder, settings_of(tmp_path), {"data": "d"}).done
    assert not older.exists() and newer.exists()


def test_every_file_has_the_mode_that_umask_says(tmp_path):
    """safetensors writes 0600: a service of another user could not read it."""
    before = os.umask(0o022)
    try:
        stage = Stage(tmp_path / "s", settings_of(tmp_path), {})
        (stage.folder / "model.safetensors").write_text("x")
        (stage.folder / "model.safetensors").chmod(0o600)
        stage.finish()
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "s").iterdir()} == {0o644}


def test_a_file_that_no_stage_wrote_is_not_read(tmp_path):
    """An extra part-*.parquet was labelled and trained on."""
    folder = make(tmp_path)
    for name in (".hidden.npy", "notes.txt"):
        (folder / name).write_text("mine")
    assert require_finished(folder, "01.py")
    write_it(folder / "part-9.parquet", [1])
    line = stop_line(require_finished, folder, "01.py")
    assert f"{folder / 'part-9.parquet'}: its stage did not write this file" in line
    assert require_finished(folder, "01.py", reads=("*.npy",))


# ------------------------------------------------------------------------------------------------------------
# Advice is a command: run as it stands, it makes what was there


def test_advice_repeats_what_a_folder_was_made_with(tmp_path):
    folder = tmp_path / "a run" / "s"
    given = ["--run", str(folder.parent), "--epochs", "7", "--overwrite", "--hidden", "5", "6", "--no-merge"]
    settings = parse(PRESETS, given)
    Stage(folder, settings, {"data": "d"}).finish()
    (folder / "x.parquet").write_text("x")
    line = stop_line(require_finished, folder, "04_train.py --run wrong")
    command = shlex.split(line.partition("make it again with: python ")[2])
    assert command[0] == "04_train.py" and command[-1] == "--overwrite"
    again = parse(PRESETS, command[1:])
    assert replace(again, given=()) == replace(settings, given=())
    (folder / "x.parquet").unlink()
    assert Stage(folder, replace(again, overwrite=False), {"data": "d"}).done


def test_advice_is_the_command_that_costs_least(tmp_path):
    """Unfinished work is continued with its own flags; --overwrite stands where something is replaced."""
    folder = tmp_path / "s"
    plain = f"python 03.py --run {tmp_path}"
    assert remake(folder, f"03.py --run {tmp_path}") == plain
    settings = parse(PRESETS, ["--run", str(tmp_path), "--epochs", "7", "--overwrite", "--no-merge"])
    begun = Stage(folder, settings, {})
    assert stop_line(require_finished, folder, f"03.py --run {tmp_path}").endswith(
        f"{plain} --epochs 7 --no-merge"
    )
    (begun.folder / "stage.json").write_text("[" * 100_000)
    assert remake(folder, f"03.py --run {tmp_path}") == plain
    begun.finish()
    assert (
        remake(folder, f"03.py --run {tmp_path}", without=["--no-merge"]) == f"{plain} --epochs 7 --overwrite"
    )
    (folder / "stage.json").write_text("{}")
    assert stop_line(require_finished, folder, f"03.py --run {tmp_path}").endswith(f"{plain} --overwrite")
