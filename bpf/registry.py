"""Plugins: what is installed under an entry-point group, without importing it until it is used."""

import ast
import importlib.machinery
import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from bpf.errors import UsageError, did_you_mean

ALGORITHMS, DATASETS, TRACKERS = "bpf.algorithms", "bpf.datasets", "bpf.trackers"
Source = Callable[[str], Iterable[metadata.EntryPoint]]


def installed(group: str) -> Iterable[metadata.EntryPoint]:
    """The entry points that installed distributions declare under `group`."""
    return metadata.entry_points(group=group)


@dataclass(frozen=True)
class Plugin:
    """One entry point and what can be said of it without importing it.

    `summary` (first line of the class docstring) and `attributes` (literal class attributes) are read from
    the source text; `problem` says why it cannot work, or is empty.
    """

    name: str
    target: str
    distribution: str
    version: str
    summary: str = ""
    attributes: tuple[tuple[str, Any], ...] = ()
    problem: str = ""

    def attribute(self, name: str, default: Any = None) -> Any:
        return dict(self.attributes).get(name, default)


class Registry:
    """The plugins of one entry-point group.

    `source` yields entry points for a group; tests pass their own and install nothing.
    """

    def __init__(self, group: str, source: Source = installed) -> None:
        self.group = group
        self._by_name: dict[str, list[metadata.EntryPoint]] = {}
        for entry_point in source(group):
            same = self._by_name.setdefault(entry_point.name, [])
            if all(_identity(entry_point) != _identity(other) for other in same):
                same.append(entry_point)

    @property
    def kind(self) -> str:
        return self.group.rpartition(".")[2].removesuffix("s")

    def names(self) -> list[str]:
        return sorted(self._by_name)

    def plugins(self) -> list[Plugin]:
        """Every plugin of the group, broken ones with their reason. Imports none of them."""
        return [self.describe(name) for name in self.names()]

    def describe(self, name: str) -> Plugin:
        entry_points = self._entry_points(name)
        first = entry_points[0]
        where = ", ".join(_distribution(entry_point)[0] for entry_point in entry_points)
        version = _distribution(first)[1]
        if len(entry_points) > 1:
            return Plugin(name, first.value, where, version, problem=f"declared by both {where}")
        summary, attributes, problem = _read_source(first)
        return Plugin(name, first.value, where, version, summary, attributes, problem)

    def load(self, name: str) -> Any:
        """Import the plugin and return what its entry point names.

        Raises UsageError for an unknown name, for a name that two distributions declare, and for a plugin
        that cannot be imported (naming the distribution and the cause).
        """
        entry_points = self._entry_points(name)
        if len(entry_points) > 1:
            owners = " and ".join(_distribution(entry_point)[0] for entry_point in entry_points)
            raise UsageError(f"The {self.kind} {name!r} is declared by both {owners}. Uninstall one of them.")
        try:
            return entry_points[0].load()
        except Exception as error:  # whatever a plugin raises at import must not look like ours
            owner = " ".join(_distribution(entry_points[0])).strip()
            raise UsageError(
                f"The {self.kind} {name!r} of {owner} ({entry_points[0].value}) cannot be loaded: "
                f"{type(error).__name__}: {error}"
            ) from error

    def _entry_points(self, name: str) -> list[metadata.EntryPoint]:
        if name not in self._by_name:
            raise UsageError(f"Unknown {self.kind} {name!r}.{did_you_mean(name, self._by_name)}")
        return self._by_name[name]


def _identity(entry_point: metadata.EntryPoint) -> tuple[str, str]:
    return _distribution(entry_point)[0], entry_point.value


def _distribution(entry_point: metadata.EntryPoint) -> tuple[str, str]:
    dist = entry_point.dist
    return (dist.name, dist.version) if dist is not None else ("unknown distribution", "")


def _read_source(entry_point: metadata.EntryPoint) -> tuple[str, tuple[tuple[str, Any], ...], str]:
    """(summary, literal class attributes, problem) of the class an entry point names, from its source."""
    path = _module_file(entry_point.module)
    if path is None:
        return "", (), f"module {entry_point.module} is not installed"
    if path.suffix != ".py":
        return "", (), ""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError) as error:
        return "", (), f"{path.name} cannot be read: {error}"
    for module in _imported_roots(tree):
        if _find_spec(module) is None:
            return "", (), f"needs the module {module}, which is not installed"
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == entry_point.attr:
            summary = (ast.get_docstring(node) or "").partition("\n")[0].rstrip(".")
            return summary, tuple(_literals(node)), ""
    return "", (), f"{entry_point.module} defines no class {entry_point.attr}"


def _literals(node: ast.ClassDef) -> Iterable[tuple[str, Any]]:
    for statement in node.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            name, value = statement.targets[0].id, statement.value
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            if statement.value is None:
                continue
            name, value = statement.target.id, statement.value
        else:
            continue
        if isinstance(value, ast.Call) and value.args:  # frozenset({...})
            value = value.args[0]
        try:
            yield name, ast.literal_eval(value)
        except ValueError:
            continue


def _imported_roots(tree: ast.Module) -> Iterable[str]:
    for node in tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


def _find_spec(module: str) -> importlib.machinery.ModuleSpec | None:
    try:
        return importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None


def _module_file(module: str) -> Path | None:
    """Where a dotted module's source lies. Only top-level finders are asked, so no parent is imported."""
    root, *rest = module.split(".")
    spec = _find_spec(root)
    if spec is None:
        return None
    if not rest:
        return Path(spec.origin) if spec.origin else None
    for location in spec.submodule_search_locations or ():
        base = Path(location).joinpath(*rest)
        for candidate in (base.with_suffix(".py"), base / "__init__.py"):
            if candidate.is_file():
                return candidate
        for candidate in base.parent.glob(f"{base.name}.*.so"):
            return candidate
    return None
