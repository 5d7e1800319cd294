"""One experiment: a directory with its resolved spec, its study, checkpoints and models.

Moving the directory moves everything. `experiment.yaml` makes a directory an experiment. Its study may lie on a
server instead, so that other machines can join, and its checkpoints in a folder that they share.
"""

import datetime
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from filelock import FileLock, Timeout

from bpf.errors import UsageError
from bpf.experiment import longer, places
from bpf.experiment.file import FORMAT, Session, read
from bpf.experiment.grid import Grid, expand
from bpf.experiment.plugins import load_rules, load_trackers
from bpf.experiment.provenance import provenance, redacted
from bpf.experiment.settings import merged, stored_grid
from bpf.files import exists, explaining, is_dir, write_text
from bpf.locks import PROBE_SECONDS, is_held
from bpf.registry import ALGORITHMS, DATASETS, TRACKERS, Registry
from bpf.spec.grid import GridSpec
from bpf.study.cells import Row
from bpf.study.database import Database
from bpf.study.view import StudyView

if TYPE_CHECKING:
    from bpf.algorithms import Algorithm
    from bpf.study.study import Study
    from bpf.trackers import Tracker


@dataclass(frozen=True)
class Place:
    """Where the parts of an experiment lie if not in its directory, as asked for on the command line.

    `storage` is the database, `name` the experiment's name in it, `checkpoints` a folder for the checkpoints and
    models of many experiments, or a URL for their checkpoints alone. A `storage` that is but the `usual` one is for new
    experiments: one that lies elsewhere stays there.
    """

    storage: Database | None = None
    name: str | None = None
    checkpoints: Path | str | None = None
    keep_checkpoints: bool = False
    usual: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.checkpoints, str) and self.keep_checkpoints:
            raise UsageError(
                f"--keep-checkpoints keeps them on this machine, not at {self.checkpoints}. Leave out one of them."
            )

    @property
    def folder(self) -> Path | None:
        return None if isinstance(self.checkpoints, str) else self.checkpoints

    @property
    def url(self) -> str | None:
        return self.checkpoints if isinstance(self.checkpoints, str) else None


NOWHERE_ELSE = Place()


@dataclass(frozen=True)
class Experiment:
    """`kind` is tune or train; `name` is its name in `database`; `data_dir` is where its data sets lie.

    `files` is where checkpoints and models lie, or the latter alone if there is a URL for `checkpoints`;
    `keep_checkpoints` keeps those of finished cells.
    """

    directory: Path
    kind: str
    name: str
    grid: GridSpec
    data_dir: Path
    created: str
    database: Database
    files: Path
    keep_checkpoints: bool = False
    checkpoints: str | None = None

    @property
    def begun(self) -> bool:
        """Whether anything of it is on disk, so that it is gone on with."""
        return (self.directory / "experiment.yaml").exists()

    @property
    def mark(self) -> places.Mark:
        """What it leaves where its files lie outside its directory."""
        return {"experiment": self.name, "created": self.created}

    @property
    def is_here(self) -> bool:
        """Whether its study is the file in its own directory."""
        return self.database == _own_database(self.directory)

    def rules(self) -> "dict[str, type[Algorithm]]":
        return load_rules(self.grid.algorithm)

    def trackers(self) -> "dict[str, Tracker]":
        return load_trackers(self.grid.trackers)

    def open_study(self) -> "Study":
        """The study, for training; raises UsageError if there is none that can be read."""
        from bpf.study.study import Study

        self._check_planned()
        return Study.open(self.database, self.name)

    def read_study(self) -> StudyView:
        """The study, for reading; raises UsageError if there is none that can be read."""
        self._check_planned()
        return StudyView.open(self.database, self.name)

    def _check_planned(self) -> None:
        if self.database.missing() and not self._has_trained():
            if self.held_since() is not None:
                raise UsageError(f"{self.directory} is starting: nothing is planned in it yet. Look again in a while.")
            raise UsageError(
                f"Nothing is planned in {self.directory} yet, as its start was cut short. "
                f"Go on with `bpf resume {self.directory}`."
            )
        if self.database.missing():
            raise UsageError(
                f"{self.database} is missing, and with it the results of {self.directory}. "
                "Put it back, or start anew in another directory."
            )

    def held_since(self) -> float | None:
        """When the process that is training in the directory began (seconds since 1970); None if there is none."""
        lock = self.directory / "running.lock"
        return lock.stat().st_mtime if is_held(lock, None) else None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Hold the directory while training in it. Raises UsageError if another process does."""
        path = self.directory / "running.lock"
        with explaining(path):
            lock = FileLock(path, thread_local=False)
            try:
                lock.acquire(timeout=PROBE_SECONDS)
                path.touch()
            except Timeout:
                raise UsageError(
                    f"Another bpf process is training in {self.directory}. Watch it with "
                    f"`bpf status {self.directory}`, or help it with `bpf worker {self.directory}`."
                ) from None
        try:
            yield
        finally:
            lock.release()

    def plan(self) -> "tuple[Study, Grid]":
        """The study with every cell of the grid in it; what is there already stays as it is."""
        grid = expand(self.grid, self.rules())
        study = self._create_study() if self.is_unplanned() else self.open_study()
        try:
            before = stored_grid(study.spec)
            reopened = longer.reopened(study, before, self.grid, grid, self.rules(), self.files)
            more = self.grid.executions_per_trial
            models = self.files / "models"
            kept = {key for key, cell in reopened.items() if places.model_path(models, cell.rule, key).exists()}
            former = study.former | kept
            study.plan(
                grid.axes,
                grid.cells,
                self._settings() | ({"former": sorted(former)} if former else {}),
                reopened,
                more if more > before.executions_per_trial else None,
            )
        except BaseException:
            study.close()
            raise
        return study, grid

    def _settings(self) -> dict[str, Any]:
        """What a worker on another machine must know; kept in the database."""
        return {
            "kind": self.kind,
            "spec": self.grid.model_dump(mode="json"),
            "created": self.created,
            "files": str(self.files.resolve()),
            "keep_checkpoints": self.keep_checkpoints,
            **({"checkpoints": self.checkpoints} if self.checkpoints else {}),
        }

    def can_go_on(self, row: Row) -> bool:
        """Whether one checkpoint holds the ends of all executions of a finished cell."""
        return longer.can_go_on(row, self.files)

    def is_unplanned(self) -> bool:
        if self.database.missing():
            return not self._has_trained()
        return not self.is_here and not StudyView.exists(self.database, self.name)

    def _create_study(self) -> "Study":
        from bpf.study.study import Study

        if not self.is_here:
            return Study.create(self.database, self.name, self._settings())
        # Made beside its place, so that a crash or a full disk leaves none rather than half of one.
        made = self.directory / "study.new.db"
        with explaining(made):
            self._discard(made)
            try:
                Study.create(made, self.name, self._settings()).close()
                made.replace(self.directory / "study.db")
            finally:
                self._discard(made)
        return self.open_study()

    def _discard(self, database: Path) -> None:
        for end in ("", "-wal", "-shm", "-journal"):
            database.with_name(database.name + end).unlink(missing_ok=True)

    def _has_trained(self) -> bool:
        return any(any((self.files / name).glob("*")) for name in ("models", "checkpoints"))

    def save(self, command: Sequence[str]) -> None:
        """Write `experiment.yaml`, remembering how and on what the experiment was made, extended or gone on with."""
        path = self.directory / "experiment.yaml"
        earlier = read(path).sessions if path.exists() else []
        session = {"time": _now(), "command": redacted(command), **provenance(self._plugins())}
        content = {
            "format": FORMAT,
            "kind": self.kind,
            "name": self.name,
            "created": self.created,
            "storage": None if self.is_here else self.database.public,
            "files": None if self.files == self.directory else str(self.files),
            "keep_checkpoints": self.keep_checkpoints,
            **({"checkpoints": self.checkpoints} if self.checkpoints else {}),
            "data_dir": str(self.data_dir),
            "spec": self.grid.model_dump(mode="json"),
            "sessions": [*earlier, session],
        }
        write_text(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))

    def sessions(self) -> list[Session]:
        """Each start: its time, command, versions, git state and hardware, the first one first."""
        return read(self.directory / "experiment.yaml").sessions

    def _plugins(self) -> Iterator[Any]:
        names = {ALGORITHMS: self.grid.algorithm, TRACKERS: self.grid.trackers}
        names[DATASETS] = (self.grid.dataset.partition(":")[0],)
        for group, wanted in names.items():
            registry = Registry(group)
            yield from (registry.describe(name) for name in wanted if name in registry.names())


def prepare(directory: Path, kind: str, grid: GridSpec, data_dir: Path, place: Place = NOWHERE_ELSE) -> Experiment:
    """The experiment in `directory` for these settings. Nothing is written.

    An experiment that is there already is gone on with if its settings are the same, or extended if only lists,
    epochs or executions grew. Raises UsageError, showing the difference, if they differ otherwise, or if the
    directory holds something else.
    """
    name = places.named(place.name or places.default_name(directory.resolve()))
    files = place.folder.resolve() / name if place.folder else directory
    wanted = Experiment(
        directory,
        kind,
        name,
        grid,
        data_dir.resolve(),
        _now(),
        place.storage or _own_database(directory),
        files,
        place.keep_checkpoints,
        place.url,
    )
    if not directory.exists():
        return wanted
    if not directory.is_dir():
        raise UsageError(f"{directory} is a file. Choose another directory.")
    if not (directory / "experiment.yaml").exists():
        if any(_foreign(directory)):
            raise UsageError(f"{directory} is not an experiment, and not empty. Choose another directory.")
        return wanted
    present = open_experiment(directory, place)
    if present.kind != kind:
        kinds = {"tune": "a grid search (bpf tune)", "train": "a single execution (bpf train)"}
        raise UsageError(f"{directory} holds {kinds[present.kind]}, not {kinds[kind]}. Choose another directory.")
    return replace(present, grid=merged(present.grid, grid, directory, kind), data_dir=wanted.data_dir)


def open_experiment(directory: Path, place: Place = NOWHERE_ELSE) -> Experiment:
    """The experiment in `directory`.

    Raises UsageError if it holds none, one that cannot be read, or one that lies in another `place`.
    """
    path = directory / "experiment.yaml"
    if not is_dir(directory):
        found = "it is a file" if exists(directory) else f"there is no such directory{places.unexpanded(directory)}"
        raise UsageError(f"{directory} is not an experiment: {found}.")
    if not path.is_file():
        raise UsageError(f"{directory} is not an experiment: it has no experiment.yaml.")
    places.check_links(directory)
    content = read(path)
    try:
        grid = stored_grid(content.spec)
    except UsageError as error:
        raise UsageError(f"The spec in {path} is not one that this bpf accepts:\n{error}") from error
    stored = Database.at(content.storage) if content.storage else _own_database(directory)
    database = place.storage or stored  # the one given may know the password
    if place.usual and database.public != stored.public:
        database = stored
    files = Path(content.files) if content.files else directory
    moved = place.folder.resolve() / content.name if place.folder else files
    for what, asked, there in (
        ("study is kept in", database.public, stored.public),
        ("name is", place.name or content.name, content.name),
        ("checkpoints lie in", moved, files),
        ("checkpoints lie at", place.url or content.checkpoints, content.checkpoints),
    ):
        if asked != there:
            raise UsageError(
                f"The experiment in {directory} cannot be moved: its {what} {there or files}, not {asked}."
            )
    kept = content.keep_checkpoints or place.keep_checkpoints
    replace(place, checkpoints=content.checkpoints, keep_checkpoints=kept)  # may not be both
    data_dir, created = Path(content.data_dir), content.created
    lying = (database, files, kept, content.checkpoints)
    return Experiment(directory, content.kind, content.name, grid, data_dir, created, *lying)


def _own_database(directory: Path) -> Database:
    return Database.at(directory / "study.db")


def _foreign(directory: Path) -> Iterator[Path]:
    """What in a directory is not left over from an experiment that was being created."""
    own = ("running.lock", ".experiment.yaml.", "locks")
    return (entry for entry in directory.iterdir() if not entry.name.startswith(own))


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
