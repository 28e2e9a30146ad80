"""The floors of the house: a room imports rooms of floors below its own, never beside or above."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAGES = [path.stem for path in sorted(ROOT.glob("0?_*.py"))]
FLOORS = [["lib.stages", "lib.levels"], ["lib.tables", "lib.models"], ["common"], ["lib.inputs"]]
FLOORS += [["lib.results"], STAGES, ["serving"], ["experiments", "benchmarks"]]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def room_of(module):
    """The room that a dotted module stands in, or None."""
    return next((room for room in FLOOR if f"{module}.".startswith(f"{room}.")), None)


def imported(path):
    """Names of the modules that a file imports, as `from a import b` names a.b."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            yield from (str(argument.value) for argument in node.args if isinstance(argument, ast.Constant))


def test_no_import_goes_up_or_beside():
    wrong, seen = [], set()
    for path in [
        *ROOT.glob("*.py"),
        *(path for top in ("lib", "serving") for path in (ROOT / top).rglob("*.py")),
    ]:
        room = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for module in imported(path):
            other = room_of(module)
            seen.add(other)
            if room and other and other != room and FLOOR[other] >= FLOOR[room]:
                wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not wrong and {"lib.stages", "lib.models", "common", "lib.inputs"} <= seen
    assert not list((ROOT / "runs").glob("*.py"))
