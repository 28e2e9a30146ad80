"""The recipes in runs/: what they hand to the scripts, by a `python` that writes down how it is called."""

import os
import subprocess

import pytest
from helpers import ROOT

TABLE = "| system | nDCG |\n| --- | --- |\n" + "| student | 0.9 |\n" * 3_000 + "\n"


@pytest.mark.parametrize("slash", ["", "/"])
def test_seeds_stand_beside_the_run_and_every_report_is_shown(tmp_path, slash):
    """With a slash at its end too, as a shell completes the name of a folder."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/called\n[ "$1" != -c ] || echo {tmp_path}\n')
    python.chmod(0o755)
    for name in ("run", "run.seed1", "run.mean"):
        (tmp_path / name / "report").mkdir(parents=True)
        (tmp_path / name / "report" / "report.md").write_text(f"{name}\n\n{TABLE}text\n\n{TABLE}")
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "VIRTUAL_ENV": "any", "GPUS": "1"}
    command = ["bash", str(ROOT / "runs" / "seeds.sh"), f"{tmp_path}/run{slash}", "1"]
    made = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    called = (tmp_path / "called").read_text().splitlines()
    assert f"02_train_teacher.py --preset small --run {tmp_path}/run.seed1 --seed 1" in called
    assert f"--mean {tmp_path}/run {tmp_path}/run.seed1" in "".join(called)
    assert made.stdout.endswith(
        "".join(f"\n{tmp_path}/{n}\n{TABLE}" for n in ("run", "run.seed1", "run.mean"))
    )
