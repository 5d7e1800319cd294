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
from bpf.files import explaining, write_text
from bpf.grid import Grid, expand
from bpf.registry import ALGORITHMS, TRACKERS, Registry
from bpf.spec import TUNABLE, GridSpec, build
from bpf.study import Study

if TYPE_CHECKING:
    from bpf.algorithms import Algorithm
    from bpf.trackers import Tracker

FORMAT = 1
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
        with explaining(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
        if self.database.exists():
            study = self.open_study()
        else:
            study = Study.create(self.database, self.name, {"spec": self.grid.model_dump(mode="json")})
        study.plan(grid.axes, grid.cells)
        return study, grid

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
    if not (directory / "experiment.yaml").exists():
        if not directory.is_dir() or any(_foreign(directory)):
            raise UsageError(f"{directory} is not an experiment, and not empty. Choose another directory.")
        return wanted
    present = open_experiment(directory)
    return replace(present, grid=_merge(present.grid, grid, directory), data_dir=wanted.data_dir)


def open_experiment(directory: Path) -> Experiment:
    """The experiment in `directory`. Raises UsageError if it holds none, or one that cannot be read."""
    path = directory / "experiment.yaml"
    if not path.is_file():
        hint = "" if directory.exists() else " (there is no such directory)"
        raise UsageError(f"{directory} is not an experiment: it has no experiment.yaml{hint}.")
    content = _read(path)
    return Experiment(
        directory,
        content["kind"],
        content["name"],
        build(GridSpec, _explicit(content["spec"])),
        Path(content["data_dir"]),
        content["created"],
    )


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
    found = [path.parent for path in root.glob("*/experiment.yaml")]
    return sorted(
        found,
        key=lambda path: (path / "study.db").stat().st_mtime if (path / "study.db").exists() else 0.0,
        reverse=True,
    )


def versions() -> dict[str, str]:
    """What the numbers depend on."""
    names = ("torch", "optuna", "numpy")
    return {"bpf": bpf.__version__, "python": platform.python_version()} | {n: metadata.version(n) for n in names}


def _read(path: Path) -> dict[str, Any]:
    damaged = f"{path} is damaged: it is not the file that bpf wrote"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{damaged} ({type(error).__name__}).") from error
    if not isinstance(content, dict) or "format" not in content:
        raise UsageError(f"{damaged}.")
    if content["format"] != FORMAT:
        raise UsageError(f"{path} is of format {content['format']}; this bpf reads format {FORMAT}.")
    missing = {"kind", "name", "created", "commands", "data_dir", "spec"} - set(content)
    if missing or not isinstance(content["spec"], dict):
        raise UsageError(f"{damaged} (without {', '.join(sorted(missing)) or 'a spec'}).")
    return content


def _merge(old: GridSpec, new: GridSpec, directory: Path) -> GridSpec:
    differences = []
    merged: dict[str, Any] = {}
    before, after = old.model_dump(mode="json"), new.model_dump(mode="json")
    for name, was in before.items():
        now = after[name]
        if name in TUNABLE and set(was) <= set(now):
            merged[name] = [*was, *(value for value in now if value not in was)]
        elif was == now or name in FREE_TO_CHANGE:
            merged[name] = now
        else:
            differences.append(f"  {name}: {_show(was)} there, {_show(now)} now")
    if differences:
        raise UsageError(
            f"{directory} holds an experiment with other settings:\n" + "\n".join(differences) + "\n"
            "A grid can be extended (lists may grow), not changed. Give another directory, or the same settings."
        )
    return build(GridSpec, _explicit(merged))


def _explicit(values: dict[str, Any]) -> dict[str, Any]:
    """Without an imbalance factor that means nothing, which a spec refuses."""
    return {k: v for k, v in values.items() if k != "imbalance_factor" or set(values["skew_type"]) != {"none"}}


def _show(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else json.dumps(value)


def _foreign(directory: Path) -> Iterator[Path]:
    """What in a directory is not left over from an experiment that was being created."""
    own = {"study.db", "study.db-wal", "study.db-shm", "locks", "running.lock"}
    return (entry for entry in directory.iterdir() if entry.name not in own)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
