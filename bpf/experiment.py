"""One experiment: a directory with its resolved spec, its study, checkpoints and logs.

Moving the directory moves everything. `experiment.yaml` makes a directory an experiment.
"""

import datetime
import json
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from filelock import FileLock, Timeout

import bpf
from bpf.errors import UsageError
from bpf.fields import build
from bpf.files import explaining, write_text
from bpf.grid import Grid, expand
from bpf.registry import ALGORITHMS, TRACKERS, Registry
from bpf.spec import TUNABLE, GridSpec
from bpf.study import Study

if TYPE_CHECKING:
    from bpf.algorithms import Algorithm
    from bpf.trackers import Tracker

FORMAT = 1
_CONTENT = {"kind": str, "name": str, "created": str, "commands": list, "data_dir": str, "spec": dict}
FREE_TO_CHANGE = frozenset({"device"})
"""Settings that say where to train, not what."""


@dataclass(frozen=True)
class Experiment:
    """`kind` is tune or train; `name` is its name in the database; `data_dir` is where its data sets lie."""

    directory: Path
    kind: str
    name: str
    grid: GridSpec
    data_dir: Path
    created: str

    @property
    def database(self) -> Path:
        return self.directory / "study.db"

    @property
    def begun(self) -> bool:
        """Whether anything of it is on disk, so that it is gone on with."""
        return (self.directory / "experiment.yaml").exists()

    def checkpoint(self, cohort: str) -> Path:
        return self.directory / "checkpoints" / f"{cohort}.pt"

    def log(self, key: str) -> Path:
        """Where the history of a cell's executions lies, as JSON."""
        return self.directory / "logs" / f"{key}.json"

    def rules(self) -> "dict[str, type[Algorithm]]":
        return load_rules(self.grid.algorithm)

    def trackers(self) -> "dict[str, Tracker]":
        registry = Registry(TRACKERS)
        return {name: registry.load(name)() for name in self.grid.trackers}

    def open_study(self) -> Study:
        """The study in this directory; raises UsageError if there is none that can be read."""
        if not self.database.exists() and not self._has_trained():
            raise UsageError(
                f"Nothing is planned in {self.directory} yet, as its start was cut short. "
                f"Go on with `bpf resume {self.directory}`."
            )
        if not self.database.exists():
            raise UsageError(
                f"{self.database} is missing, and with it what the logs in {self.directory} belong to. "
                "Put it back, or start anew in another directory."
            )
        return Study.open(self.database, self.name)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Hold the directory while training in it. Raises UsageError if another process does."""
        path = self.directory / "running.lock"
        with explaining(path):
            lock = FileLock(path, thread_local=False)
            try:
                lock.acquire(blocking=False)
            except Timeout:
                raise UsageError(
                    f"Another bpf process is training in {self.directory}. Wait for it, or watch it with "
                    f"`bpf status {self.directory}`."
                ) from None
        try:
            yield
        finally:
            lock.release()

    def plan(self) -> tuple[Study, Grid]:
        """The study with every cell of the grid in it; what is there already stays as it is."""
        grid = expand(self.grid, self.rules())
        if not self.database.exists() and not self._has_trained():
            self._create_study()
        study = self.open_study()
        study.plan(grid.axes, grid.cells)
        return study, grid

    def _create_study(self) -> None:
        """Make the database beside its place, so that a crash or a full disk leaves none rather than half of one."""
        made = self.directory / "study.new.db"
        with explaining(made):
            self._discard(made)
            try:
                Study.create(made, self.name, {"spec": self.grid.model_dump(mode="json")}).close()
                made.replace(self.database)
            finally:
                self._discard(made)

    def _discard(self, database: Path) -> None:
        for path in self.directory.glob(f"{database.name}*"):
            path.unlink()

    def _has_trained(self) -> bool:
        return any(any((self.directory / name).glob("*")) for name in ("logs", "checkpoints"))

    def save(self, command: Sequence[str]) -> None:
        """Write `experiment.yaml`, remembering the commands that made and extended the experiment."""
        path = self.directory / "experiment.yaml"
        earlier = _read(path)["commands"] if path.exists() else []
        content = {
            "format": FORMAT,
            "kind": self.kind,
            "name": self.name,
            "created": self.created,
            "commands": [*earlier, " ".join(command)],
            "versions": versions(),
            "data_dir": str(self.data_dir),
            "spec": self.grid.model_dump(mode="json"),
        }
        write_text(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def prepare(directory: Path, kind: str, grid: GridSpec, data_dir: Path) -> Experiment:
    """The experiment in `directory` for these settings. Nothing is written.

    An experiment that is there already is gone on with if its settings are the same, or extended if only lists
    grew. Raises UsageError, showing the difference, if they differ otherwise, or if the directory holds
    something else.
    """
    wanted = Experiment(directory, kind, directory.resolve().name, grid, data_dir.resolve(), _now())
    if not directory.exists():
        return wanted
    if not directory.is_dir():
        raise UsageError(f"{directory} is a file. Choose another directory.")
    if not (directory / "experiment.yaml").exists():
        if any(_foreign(directory)):
            raise UsageError(f"{directory} is not an experiment, and not empty. Choose another directory.")
        return wanted
    present = open_experiment(directory)
    if present.kind != kind:
        kinds = {"tune": "a grid search (bpf tune)", "train": "a single run (bpf train)"}
        raise UsageError(f"{directory} holds {kinds[present.kind]}, not {kinds[kind]}. Choose another directory.")
    return replace(present, grid=_merge(present.grid, grid, directory, kind), data_dir=wanted.data_dir)


def open_experiment(directory: Path) -> Experiment:
    """The experiment in `directory`. Raises UsageError if it holds none, or one that cannot be read."""
    path = directory / "experiment.yaml"
    if not directory.is_dir():
        found = "it is a file" if directory.exists() else "there is no such directory"
        raise UsageError(f"{directory} is not an experiment: {found}.")
    if not path.is_file():
        raise UsageError(f"{directory} is not an experiment: it has no experiment.yaml.")
    content = _read(path)
    try:
        grid = build(GridSpec, _explicit(content["spec"]))
    except UsageError as error:
        raise UsageError(f"The spec in {path} is not one that this bpf accepts:\n{error}") from error
    return Experiment(directory, content["kind"], content["name"], grid, Path(content["data_dir"]), content["created"])


def load_rules(names: Sequence[str]) -> "dict[str, type[Algorithm]]":
    """The learning rules of these names. Raises UsageError for one that is unknown, broken or not a rule."""
    from bpf.algorithms import Algorithm

    registry = Registry(ALGORITHMS)
    rules = {}
    for name in names:
        rule = registry.load(name)
        if not (isinstance(rule, type) and issubclass(rule, Algorithm)):
            raise UsageError(f"The algorithm {name!r} ({registry.describe(name).target}) is not a bpf Algorithm.")
        rules[name] = rule
    return rules


def find(root: Path) -> list[Path]:
    """The experiments below `root`, the one touched last first."""

    def touched(directory: Path) -> float:
        files = (directory / name for name in ("experiment.yaml", "study.db", "study.db-wal"))
        return max(path.stat().st_mtime for path in files if path.exists())

    return sorted((path.parent for path in root.glob("*/experiment.yaml")), key=touched, reverse=True)


def versions() -> dict[str, str]:
    """What the numbers depend on."""
    names = ("torch", "optuna", "numpy")
    return {"bpf": bpf.__version__, "python": platform.python_version()} | {n: metadata.version(n) for n in names}


def _read(path: Path) -> dict[str, Any]:
    damaged = f"{path} is damaged: it is not the file that bpf wrote"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from error
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"{damaged} ({type(error).__name__}).") from error
    if not isinstance(content, dict) or "format" not in content:
        raise UsageError(f"{damaged}.")
    if content["format"] != FORMAT:
        raise UsageError(f"{path} is of format {content['format']}; this bpf reads format {FORMAT}.")
    wrong = [name for name, kind in _CONTENT.items() if not isinstance(content.get(name), kind)]
    if wrong or content["kind"] not in ("tune", "train"):
        raise UsageError(f"{damaged} (look at {', '.join(wrong) or 'kind'}).")
    return content


def _merge(old: GridSpec, new: GridSpec, directory: Path, kind: str) -> GridSpec:
    differences = []
    merged: dict[str, Any] = {}
    before, after = old.model_dump(mode="json"), new.model_dump(mode="json")
    for name, was in before.items():
        now = after[name]
        if name in TUNABLE and set(was) <= set(now):
            merged[name] = [*was, *(value for value in now if value not in was)]
        elif name == "options" and (grown := _grown_options(was, now)) is not None:
            merged[name] = grown
        elif was == now or name in FREE_TO_CHANGE:
            merged[name] = now
        else:
            differences.append(f"  {name}: {_show(was)} there, {_show(now)} now")
    if differences:
        extend = "A grid can be extended (lists may grow), not changed. " if kind == "tune" else ""
        raise UsageError(
            f"{directory} holds an experiment with other settings:\n" + "\n".join(differences) + "\n"
            f"{extend}Give another directory, or the same settings."
        )
    return build(GridSpec, _explicit(merged))


def _grown_options(was: dict[str, Any], now: dict[str, Any]) -> dict[str, Any] | None:
    """The union of two rules' resolved options, or None if anything of the first is missing in the second."""
    merged = {rule: dict(options) for rule, options in now.items()}
    for rule, options in was.items():
        for option, values in options.items():
            added = now.get(rule, {}).get(option, [])
            if not set(values) <= set(added):
                return None
            merged[rule][option] = [*values, *(value for value in added if value not in values)]
    return merged


def _explicit(values: dict[str, Any]) -> dict[str, Any]:
    """Without an imbalance factor that means nothing, which a spec refuses."""
    skewed = values.get("skew_type") != ["none"]
    return {name: value for name, value in values.items() if name != "imbalance_factor" or skewed}


def _show(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_show, value)) or "none"
    return value if isinstance(value, str) else json.dumps(value)


def _foreign(directory: Path) -> Iterator[Path]:
    """What in a directory is not left over from an experiment that was being created."""
    own = ("running.lock", ".experiment.yaml.")
    return (entry for entry in directory.iterdir() if not entry.name.startswith(own))


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
