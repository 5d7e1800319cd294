"""Plugins: what is installed under an entry-point group, without importing it until it is used."""

import ast
import importlib.machinery
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from bpf import __version__
from bpf.errors import UsageError, did_you_mean

ALGORITHMS, DATASETS, TRACKERS = "bpf.algorithms", "bpf.datasets", "bpf.trackers"
Source = Callable[[str], Iterable[metadata.EntryPoint]]
_MOST_REEXPORTS = 8


def installed(group: str) -> Iterable[metadata.EntryPoint]:
    """The entry points that installed distributions declare under `group`."""
    found: metadata.EntryPoints = _declared(tuple((place, _changed(place)) for place in sys.path)).select(group=group)
    return found


@lru_cache(maxsize=1)
def _declared(places: tuple[tuple[str, int], ...]) -> Any:
    """All entry points of the import path. To read them takes longer than all else that a short command does."""
    return metadata.entry_points()  # of a type of its own in Python 3.11, with the same `select`


def _changed(place: str) -> int:
    try:
        return os.stat(place or os.curdir).st_mtime_ns  # noqa: PTH116 - for an entry of sys.path, which is a string
    except OSError:
        return 0


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
        owner, version = _distribution(first)
        if len(entry_points) > 1:
            owners, cure = _owners(entry_points)
            return Plugin(name, first.value, owners, "", problem=f"declared by {owners}; {cure}")
        summary, attributes, problem = _read_source(first)
        return Plugin(name, first.value, owner, version, summary, attributes, problem)

    def load(self, name: str) -> Any:
        """Import the plugin and return what its entry point names.

        Raises UsageError for an unknown name, for a name that two distributions declare, and for a plugin
        that cannot be imported (naming the distribution and the cause).
        """
        entry_points = self._entry_points(name)
        if len(entry_points) > 1:
            owners, cure = _owners(entry_points)
            raise UsageError(f"The {self.kind} {name!r} is declared by {owners}. {cure.capitalize()}.")
        try:
            return entry_points[0].load()
        except (Exception, SystemExit) as error:  # whatever a plugin raises at import must not look like ours
            raise self.refusal(name, f"{type(error).__name__}: {error}", "loaded") from error

    def load_class(self, name: str, base: type) -> Any:
        """As `load`, of a class that can stand where bpf has a `base`. Raises UsageError for anything else."""
        kind = self.load(name)
        if problem := _misfit(kind, base):
            raise self.refusal(name, problem)
        return kind

    def called(self, name: str) -> str:
        """A plugin in words: what it is, and of which distribution."""
        owners = " and ".join(" ".join(_distribution(one)).strip() for one in self._by_name.get(name, ()))
        return f"{self.kind} {name!r} of {owners}" if owners else f"{self.kind} {name!r}, which is not installed,"

    def refusal(self, name: str, problem: str, how: str = "used") -> UsageError:
        """Why an installed plugin cannot be used, and what can be done about it."""
        first = self._entry_points(name)[0]
        package = _distribution(first)[0] if first.dist is not None else "what it is of"
        cure = f"Mend, update or reinstall {package}, or leave {name!r} out."
        return UsageError(f"The {self.called(name)} ({first.value}) cannot be {how}: {problem.rstrip('.')}. {cure}")

    def _entry_points(self, name: str) -> list[metadata.EntryPoint]:
        if name not in self._by_name:
            raise UsageError(f"Unknown {self.kind} {name!r}.{did_you_mean(name, self._by_name)}")
        return self._by_name[name]


def _identity(entry_point: metadata.EntryPoint) -> tuple[str, str]:
    return _distribution(entry_point)[0], entry_point.value


def _owners(entry_points: Iterable[metadata.EntryPoint]) -> tuple[str, str]:
    """The distributions that declare one name, and what to do about it."""
    owners = [" ".join(_distribution(entry_point)).strip() for entry_point in entry_points]
    foreign = [owner for owner in owners if owner.partition(" ")[0] != "bpf"]
    return " and ".join(owners), f"uninstall {foreign[0] if len(foreign) == 1 else 'one of them'}"


def _distribution(entry_point: metadata.EntryPoint) -> tuple[str, str]:
    dist = entry_point.dist
    if dist is None:
        return "no distribution", ""
    try:
        return dist.name or "a nameless distribution", dist.version or ""
    except KeyError:  # its metadata are damaged
        return "a nameless distribution", ""


def _misfit(kind: Any, base: type) -> str:
    """Why something cannot stand where bpf has a `base`, or nothing: its methods must be callable in the same way."""
    if not (isinstance(kind, type) and issubclass(kind, base)):
        return f"it is no subclass of {base.__module__}.{base.__name__}"
    lacking = set(getattr(kind, "__abstractmethods__", ()))
    seam = [parent for parent in kind.__mro__ if parent.__module__ == base.__module__]
    methods = {name: inspect.getattr_static(kind, name) for parent in seam for name in vars(parent)}
    for parent in seam:
        replaced = parent is not base and any(  # so what its own methods call may be missing
            inspect.isfunction(function) and name in vars(base) and methods[name] is not function
            for name, function in vars(parent).items()
        )
        for name, function in vars(parent).items():
            own = methods[name]
            if not inspect.isfunction(function) or (name.startswith("_") and name != "__init__"):
                continue
            if own is function and not replaced and "NotImplementedError" in function.__code__.co_names:
                lacking.add(name)
            if not (callable(own) or isinstance(own, staticmethod | classmethod)):
                return f"its {name} is no method"
            if own is not function and inspect.isfunction(own):
                try:
                    inspect.signature(own).bind(*inspect.signature(function).parameters)
                except TypeError:
                    return (
                        f"its {name}{_parameters(own)} cannot be called as bpf {__version__} does, "
                        f"{name}{_parameters(function)}, so that it is for another bpf"
                    )
    return f"it lacks {', '.join(sorted(lacking))}" if lacking else ""


def _parameters(function: Any) -> str:
    return f"({', '.join(inspect.signature(function).parameters)})"


def _read_source(entry_point: metadata.EntryPoint) -> tuple[str, tuple[tuple[str, Any], ...], str]:
    """(summary, literal class attributes, problem) of the class an entry point names, from its source."""
    if not entry_point.pattern.match(entry_point.value) or not entry_point.attr:
        return "", (), f"its entry point {entry_point.value!r} is not of the form module:Class"
    found = _find_class(entry_point.module, entry_point.attr)
    if not isinstance(found, ast.ClassDef):
        return "", (), found
    summary = (ast.get_docstring(found) or "").partition("\n")[0].rstrip(".")
    return summary, tuple(_literals(found)), ""


def _find_class(module: str, name: str) -> ast.ClassDef | str:
    """The definition of a class, followed through `from ... import`, or why there is none.

    The reason is empty where the source does not tell, such as for a compiled module.
    """
    for _ in range(_MOST_REEXPORTS):
        path = _module_file(module)
        if path is None:
            return f"module {module} is not installed"
        if path.suffix != ".py":
            return ""
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (OSError, SyntaxError, ValueError) as error:
            return f"{path.name} cannot be read: {error}"
        for needed in _imported_roots(tree):
            if _find_spec(needed) is None:
                return f"needs the module {needed}, which is not installed"
        binding = _binding(tree, name)
        if isinstance(binding, ast.ClassDef):
            return binding
        if not isinstance(binding, ast.ImportFrom):
            return "" if _may_define(source, name) else f"{module} defines no class {name}"
        name = next(alias.name for alias in binding.names if name in (alias.asname, alias.name))
        module = _absolute(binding, module, path)
    return ""


def _binding(tree: ast.Module, name: str) -> ast.stmt | None:
    """The top-level class or `from ... import` that gives a module this name."""
    for node in reversed(tree.body):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node
        if isinstance(node, ast.ImportFrom) and any((alias.asname or alias.name) == name for alias in node.names):
            return node
    return None


def _may_define(source: str, name: str) -> bool:
    """Whether a module may bind a name in a way that cannot be followed: by assignment, a star import, a condition."""
    return re.search(rf"\b{name.partition('.')[0]}\b|import \*|__getattr__", source) is not None


def _absolute(node: ast.ImportFrom, module: str, path: Path) -> str:
    """The dotted module that a `from ... import` in `module` (whose source is `path`) names."""
    parts = module.split(".")
    up = node.level - (path.name == "__init__.py")
    base = parts[: len(parts) - up] if node.level else []
    return ".".join([*base, *([node.module] if node.module else [])])


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
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "frozenset":
            value = value.args[0] if value.args else ast.Tuple([], ast.Load())
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
        for candidate in (base / "__init__.py", base.with_suffix(".py")):
            if candidate.is_file():
                return candidate
        for candidate in base.parent.glob(f"{base.name}.*.so"):
            return candidate
    return None
