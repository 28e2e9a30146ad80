"""Both notebooks, every cell as committed, on a tiny finished run; and the state they are committed in."""

import json
import re

import nbformat
import pytest
from finished_run import finished_run
from helpers import ROOT, stage
from nbclient import NotebookClient

NOTEBOOKS = ROOT / "notebooks"


@pytest.fixture
def finished(features, models):
    return finished_run(features, models["llama"])


def execute(name):
    """Runs every cell in a fresh kernel, in the notebook's folder. Fails on the first error; returns the executed notebook."""
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
    return notebook


def printed(notebook):
    return "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", []))


def test_walkthrough(finished, toy, monkeypatch):
    monkeypatch.setenv("WALKTHROUGH_RUN", str(finished))
    monkeypatch.setenv("WALKTHROUGH_DATA", str(toy))
    text = printed(execute("walkthrough.ipynb"))
    accuracy = json.loads((finished / "report" / "metrics.json").read_text())["systems"]["student"]["overall"]["accuracy"]["value"]
    assert f"student                accuracy {accuracy:.3f}" in text  # it is this run that it shows
    assert "[12, 40, 8]" in text


def test_paper_findings(finished, tmp_path, monkeypatch):
    title, into = finished.parent / "title", tmp_path / "findings"
    for finding, arms in (("a", [f"BERT={title}", f"T5={title}", f"DeBERTa={finished}", f"Llama={finished},{title}"]),
                          ("b", [f"human={finished}:student_human_labels", f"200={finished}:student_200", f"all={finished}:student"]),
                          ("c", [f"teacher={finished}", f"student={finished}:student", f"fewer={finished}:student_200", f"home={finished}:student_200"]),
                          ("d", [f"title={title}", f"+ description={title}", f"+ caption={finished}"])):
        stage("05").main(["--compare", *arms, "--into", str(into), "--finding", finding, "--resamples", "50"])
    monkeypatch.setenv("FINDINGS", str(into))
    notebook = execute("paper_findings.ipynb")
    summary = "".join(notebook.cells[-2].outputs[0]["data"]["text/markdown"])
    assert len(re.findall(r"\| \*\*(yes|no)\*\* \|", summary)) == 6
    # Verdicts come from the intervals: arms that are one and the same run differ by nothing, clearly.
    assert "title -> + description: +0.0 [+0.0, +0.0] points; difference clear of 0: no; disjoint intervals: no" in printed(notebook)


@pytest.mark.parametrize("name", ["walkthrough.ipynb", "paper_findings.ipynb"])
def test_committed_with_outputs(name):
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))  # run once, top to bottom
    outputs = [o for cell in cells for o in cell.outputs]
    assert sum(o.output_type in ("display_data", "execute_result") and any(k.startswith("image/") for k in o.data) for o in outputs) >= 4
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    text = "".join(str(o.get("text", "")) + str(o.get("data", {}).get("text/plain", "")) + str(o.get("data", {}).get("text/markdown", "")) for o in outputs)
    assert not re.search(r"(/home/|/root/|/tmp/|/Users/|/work/|[A-Z]:\\)", text), "an absolute path in an output"
    assert (NOTEBOOKS / name).stat().st_size < 2_000_000
