"""The architecture page describes the tree: its table names every module, and imports point downwards in it."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "bpf"
PAGE = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
MODULES = sorted(PACKAGE.rglob("*.py"))
DOORS = {"__init__.py", "__main__.py"}
"""The package itself, and how Python runs it."""
LONGEST = 350


def table() -> list[tuple[list[str], list[str]]]:
    """The wings of each row, from the outside in, and the modules that it names."""
    section = PAGE.partition("## Wings")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("| `")]
    return [(re.findall(r"`([^`]+)`", wings), re.findall(r"`(\w+\.py)`", modules)) for wings, _, modules in rows]


def wing(path: Path) -> str:
    """How the table calls the place of a module: its file, or its folder."""
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) == 1 else f"{parts[0]}/"


def imported(path: Path) -> set[Path]:
    """The modules of bpf that a module imports anything from, wherever in the module it does."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "bpf":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("bpf.")]
        else:
            continue
        for name in names:
            parts = name.split(".")[1:]
            while parts and (module := located(parts)) is None:
                parts.pop()
            found |= {module} if parts and module else set()
    return found - {path}


def located(parts: list[str]) -> Path | None:
    place = PACKAGE.joinpath(*parts)
    file, package = place.with_suffix(".py"), place / "__init__.py"
    return file if file.exists() else package if package.exists() else None


def test_the_table_names_every_wing_and_module_and_no_other() -> None:
    assert {name for wings, _ in table() for name in wings} == {wing(path) for path in MODULES} - DOORS
    for wings, modules in table():
        if wings[0].endswith("/"):
            here = {path.name for path in (PACKAGE / wings[0]).glob("*.py")} - DOORS
            assert sorted(modules) == sorted(here), wings[0]


def test_a_wing_imports_only_from_wings_below_it() -> None:
    row = {name: number for number, (wings, _) in enumerate(table()) for name in wings}
    upwards = {
        (str(path.relative_to(PACKAGE)), wing(module))
        for path in MODULES
        if wing(path) not in DOORS
        for module in imported(path)
        if wing(module) not in DOORS and wing(module) != wing(path) and row[wing(module)] < row[wing(path)]
    }
    assert upwards == set()


def test_modules_never_import_each_other_in_a_circle() -> None:
    """Also within a wing, in functions, and where only types are needed; the doors of packages do not count."""
    graph = {path: {m for m in imported(path) if m.name not in DOORS} for path in MODULES if path.name not in DOORS}
    TopologicalSorter(graph).prepare()


def test_a_wing_says_what_it_holds() -> None:
    for door in PACKAGE.glob("*/__init__.py"):
        assert ast.get_docstring(ast.parse(door.read_text(encoding="utf-8"))), door


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_can_be_read_at_a_sitting(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST


def test_only_the_trials_know_optuna() -> None:
    knowing = {path.name for path in MODULES if re.search(r"^\s*(import|from) optuna", path.read_text(), re.MULTILINE)}
    assert knowing == {"trials.py"}
