"""What the documents name is there: files, functions, links, commands and their flags; and their size."""

import ast
import re

import pytest
from helpers import ROOT

NAMES = ["README.md", "CONTRIBUTING.md", "data/README.md", "data/toy/README.md", "experiments/RESULTS.md"]
NAMES += ["benchmarks/RESULTS.md"]
HELD_IN_LENGTH = {"README.md": 150, "benchmarks/RESULTS.md": 150}


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


def anchors(text):
    """The names that a document's headings have in links, as GitHub makes them."""
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def defined(path):
    """Functions, classes and their methods (Class.method) of a module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return found


def commands(text):
    """(script, flags) of every `python SCRIPT …`, `… launch SCRIPT …`, `bash SCRIPT …`; a command ends with
    its line, with a backtick or with a comment."""
    joined = re.sub(r"\\\n\s*", "", text)
    for line in re.findall(r"(?:python|launch|bash) +([^\n`#|]*)", joined):
        found = re.search(r"[\w/]+\.(?:py|sh)\b", line)
        if found:
            yield found[0], re.findall(r"(?<!\S)--([a-z][\w-]*)", line[found.end() :])


@pytest.mark.parametrize("name", NAMES)
def test_prose_is_at_most_110_wide(name):
    lines = [line for line in text_of(name).splitlines() if not line.startswith("|")]
    assert [line for line in lines if len(line) > 110] == []


def test_recipes_are_at_most_110_wide():
    for path in (ROOT / "runs").glob("*.sh"):
        assert [line for line in path.read_text(encoding="utf-8").splitlines() if len(line) > 110] == [], path


@pytest.mark.parametrize("name", HELD_IN_LENGTH)
def test_length(name):
    assert len(text_of(name).splitlines()) <= HELD_IN_LENGTH[name]


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(name)):
        if not re.match(r"https?:", link):
            path, _, anchor = link.partition("#")
            target = (ROOT / name).parent / path if path else ROOT / name
            assert target.exists(), link
            assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


def test_where_the_paper_is_in_the_code():
    table = text_of("README.md").partition("## Where the paper is in the code")[2].partition("\n## ")[0]
    checked = 0
    for row in re.findall(r"^\|.*\|.*\|(.*)\|$", table, re.MULTILINE):
        path = None
        for name in re.findall(r"`([^`]*)`", row):
            if name.endswith(".py") or name.isdigit():
                [path] = ROOT.glob(f"{name}_*.py") if name.isdigit() else [ROOT / name]
                assert path.exists(), name
            else:
                assert name in defined(path), f"{name} in {path.name}"
            checked += 1
    assert checked > 20


@pytest.mark.parametrize("name", NAMES)
def test_commands_name_what_is_there(name):
    settings = (ROOT / "lib" / "stages" / "settings.py").read_text(encoding="utf-8")
    for script, flags in commands(text_of(name)):
        assert (ROOT / script).exists(), script
        source = (ROOT / script).read_text(encoding="utf-8") + settings
        for flag in flags:
            assert re.search(rf"\b{flag}\b|\b{flag.replace('-', '_')}\b", source), f"{script} --{flag}"


def test_the_python_lines_of_readme_run_against_the_ranker_as_it_is():
    blocks = re.findall(r"^```python\n(.*?)^```", text_of("README.md"), re.DOTALL | re.MULTILINE)
    for node in ast.walk(ast.parse("\n".join(blocks))):
        if isinstance(node, ast.ImportFrom):
            path = ROOT / f"{node.module.replace('.', '/')}.py"
            source = path.read_text(encoding="utf-8")
            assert all(re.search(rf"\b{alias.name}\b", source) for alias in node.names)
