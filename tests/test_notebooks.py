"""The notebooks, every cell as committed, on a tiny finished run; and the state they are committed in."""

import json
import os
import re
from pathlib import Path

import nbformat
import pytest
from finished_run import finished_run
from helpers import ROOT
from nbclient import NotebookClient

from experiments.comparison import compare

NOTEBOOKS = ROOT / "notebooks"
PICTURES = {"walkthrough.ipynb": 4, "paper_findings.ipynb": 4, "solutions.ipynb": 1}  # at least


@pytest.fixture
def finished(features, models):
    return finished_run(features, models["llama"])


def execute(name):
    """Runs every cell in a fresh kernel, in the notebook's folder. Fails on the first error; returns the
    executed notebook."""
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    where = {"metadata": {"path": str(NOTEBOOKS)}}
    NotebookClient(notebook, timeout=None, kernel_name="python3", resources=where).execute()
    return notebook


def printed(notebook):
    return "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", []))


def test_walkthrough(finished, toy, monkeypatch):
    monkeypatch.setenv("WALKTHROUGH_RUN", str(finished))
    monkeypatch.setenv("WALKTHROUGH_DATA", str(toy))
    text = printed(execute("walkthrough.ipynb"))
    accuracy = json.loads((finished / "report" / "metrics.json").read_text())["systems"]["student"][
        "overall"
    ]["accuracy"]["value"]
    assert f"student                accuracy {accuracy:.3f}" in text  # it is this run that it shows
    assert "[12, 40, 8]" in text


def test_solutions(finished, toy, monkeypatch):
    monkeypatch.setenv("WALKTHROUGH_RUN", str(finished))
    monkeypatch.setenv("WALKTHROUGH_DATA", str(toy))
    before = sorted(path.name for path in finished.iterdir())
    text = printed(execute("solutions.ipynb"))
    assert sorted(path.name for path in finished.iterdir()) == before  # its students are trained elsewhere
    first_token = re.search(r"first token: .* rows (\d\.\d+)", text)
    assert float(first_token[1]) < 1e-3  # a decoder's first token sees no other
    eight_bits = re.search(r" 8 bits: .* probability (\d\.\d+)", text)
    assert float(eight_bits[1]) < 0.1


def test_paper_findings(finished, tmp_path, monkeypatch):
    into, own, title = tmp_path / "findings", (finished, "teacher"), (finished.parent / "title", "teacher")
    all_rows, fewer = (finished, "student"), (finished, "student_200")
    by_finding = {
        "a": {"BERT": [title], "T5": [title], "DeBERTa": [own], "Llama": [own, title]},
        "b": {"human": [(finished, "student_human_labels")], "200": [fewer], "all": [all_rows]},
        "c": {"teacher": [own], "student": [all_rows], "fewer": [fewer], "home": [fewer]},
        "d": {"title": [title], "+ description": [title], "+ caption": [own]},
    }
    for key, conditions in by_finding.items():
        compare(key, conditions, into, resamples=50)
    monkeypatch.setenv("FINDINGS", str(into))
    notebook = execute("paper_findings.ipynb")
    summary = "".join(notebook.cells[-4].outputs[0]["data"]["text/markdown"])
    assert len(re.findall(r"\| \*\*(yes|no)\*\* \|", summary)) == 6
    # Verdicts come from the intervals: conditions that are one and the same run differ by nothing, clearly.
    same = (
        "title -> + description: +0.0 [+0.0, +0.0] points; difference clear of 0: no; disjoint intervals: no"
    )
    assert same in printed(notebook)


@pytest.mark.parametrize("name", PICTURES)
def test_committed_with_outputs(name):
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(
        range(1, len(cells) + 1)
    )  # run once, top to bottom
    outputs = [o for cell in cells for o in cell.outputs]
    assert (
        sum(
            o.output_type in ("display_data", "execute_result")
            and any(k.startswith("image/") for k in o.data)
            for o in outputs
        )
        >= PICTURES[name]
    )
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    text = ""
    for o in outputs:
        data = o.get("data", {})
        assert data.get("text/markdown", "a table"), "a table that shows nothing"
        text += f"{o.get('text', '')}{data.get('text/plain', '')}{data.get('text/markdown', '')}"
    assert not re.search(r"(/home/|/root/|/tmp/|/Users/|/work/|[A-Z]:\\)", text), (
        "an absolute path in an output"
    )
    assert (NOTEBOOKS / name).stat().st_size < 2_000_000


@pytest.mark.parametrize("name", PICTURES)
def test_source_is_at_most_110_wide(name):
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    assert [line for source in code for line in source.splitlines() if len(line) > 110] == []


@pytest.mark.parametrize("name", ["walkthrough", "paper_findings"])
def test_the_clone_is_found_beside_a_folder_that_cannot_be_read(name, tmp_path, monkeypatch):
    """As lost+found is: Path.exists() raises a PermissionError there."""
    (tmp_path / "clone").mkdir()
    (tmp_path / "lost+found").mkdir()
    for script in ("01_build_features.py", "05_evaluate.py"):
        (tmp_path / "clone" / script).write_text("")
    cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())["cells"]
    source = "".join(next(cell["source"] for cell in cells if cell["cell_type"] == "code"))
    lines = source[source.index("here = ") : source.index("assert ROOT")]
    stat = os.stat

    def refused(path, **options):
        if "lost+found" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **options)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "stat", refused)
    found = {"os": os, "Path": Path}
    exec(lines, found)
    assert found["ROOT"] == tmp_path / "clone"
