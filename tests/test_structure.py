"""The layers of docs/architecture.md: imports point down and have no cycles; shared test helpers are in one place."""

import ast
import re
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from support.repository import ROOT

FLOORS = (
    ("knowledge",),
    ("model",),
    ("data",),
    ("retrieval",),
    ("train", "generation"),
    ("plan", "evaluate", "search"),
    ("report", "publish"),
    ("sweep", "serve"),
    ("commands",),
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS, start=1) for name in names}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in (ROOT / "amp").rglob("*.py")}


def imports(path: Path) -> set[str]:
    """Modules of this package that a file imports, also inside functions and for types only."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "amp":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in MODULES}
    return found - {"amp", module_of(path)}


def floor_of(module: str) -> int:
    """Layer of a module: 0 for the files directly in `amp`; the command line is above all others."""
    if module == "amp.__main__":
        return len(FLOORS) + 1
    name = module.split(".")[1]
    assert name in FLOOR or f"amp.{name}" == module, f"amp/{name} has no floor: give it one here and in architecture.md"
    return FLOOR.get(name, 0)


def test_arrows_point_down():
    upward = []
    for module in MODULES.keys() - {"amp"}:
        for imported in imports(MODULES[module]):
            inside = module.split(".")[:2] == imported.split(".")[:2]
            both_at_ground = floor_of(module) == floor_of(imported) == 0
            if not inside and not both_at_ground and floor_of(imported) >= floor_of(module):
                upward.append(f"{module} -> {imported}")
    assert upward == []


def test_no_files_import_each_other_in_a_circle():
    graph = defaultdict(set, {module: imports(path) for module, path in MODULES.items()})
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None


def test_the_page_has_every_floor():
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    for name, floor in FLOOR.items():
        assert f"| {floor} | `amp.{name}` |" in page


def test_what_tests_share_is_in_support():
    """Test modules must not import each other, and helpers belong in `support`, so that they aren't duplicated."""
    tests = ROOT / "tests"
    modules = sorted(path for path in tests.rglob("*.py") if tests / "support" not in path.parents)
    assert [str(path) for path in modules if not path.match("tests/test_*.py") and path.name != "conftest.py"] == []
    taken = []
    for path in modules:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            taken += [f"{path.name}: {name}" for name in names if re.match(r"test_|conftest\b", name)]
    assert taken == []
