"""The architecture page describes the tree: every module stands in its table, and imports point downwards in it."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
MODULES = sorted((ROOT / "bpf").rglob("*.py"))
OUTSIDE = {"__init__.py", "__main__.py", "testing.py"}
"""The package itself, and the suite that plugin authors run, which may use everything."""


def table() -> dict[str, int]:
    """The row of each file or directory, counted from the outside in."""
    section = PAGE.partition("## Modules")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`[^|]*`) \|", section, re.MULTILINE)
    return {name: row for row, cell in enumerate(rows) for name in re.findall(r"`([^`]+)`", cell)}


def place(path: Path) -> str:
    """How the table calls a module: by its file, or by its directory."""
    parts = path.relative_to(ROOT / "bpf").parts
    return parts[0] if len(parts) == 1 else f"{parts[0]}/"


def imported(path: Path) -> set[str]:
    """The places in the table that a module imports anything from, wherever in the module it does."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "bpf":
            names = [node.module] if node.module != "bpf" else [f"bpf.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("bpf.")]
        else:
            continue
        for name in names:
            child = name.split(".")[1]
            found |= {f"{child}.py"} if (ROOT / "bpf" / f"{child}.py").exists() else set()
            found |= {f"{child}/"} if (ROOT / "bpf" / child).is_dir() else set()
    return found


def test_the_table_names_every_module_and_no_other() -> None:
    assert {place(path) for path in MODULES} - OUTSIDE == set(table())


def test_imports_point_downwards() -> None:
    row = table()
    upwards = {
        (place(path), name)
        for path in MODULES
        if place(path) not in OUTSIDE
        for name in imported(path)
        if row[name] < row[place(path)]
    }
    assert upwards == set()


def test_only_the_trials_know_optuna() -> None:
    knowing = {path.name for path in MODULES if re.search(r"^\s*(import|from) optuna", path.read_text(), re.MULTILINE)}
    assert knowing == {"trials.py"}
