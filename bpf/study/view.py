"""A study as it is read: counts, cells and histories, for whoever shows or exports them.

Nothing here writes, but what brings the tables of an older bpf to this form when they are opened.
"""

import math
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import sqlalchemy as sa

from bpf.errors import Damaged, UsageError, did_you_mean
from bpf.locks import private
from bpf.machine import user
from bpf.study import owner as owners
from bpf.study import plan, schema
from bpf.study.cells import STATES, Axis, Row, Tally, Value
from bpf.study.database import Database
from bpf.study.patience import explained, failing, patient


class StudyView:
    """One experiment's cells, for reading. The threads of one process may share it.

    `locks` is the directory of this machine's owners' lock files: beside an SQLite file, otherwise in the temporary
    directory. `patience` is how many seconds to wait for a database that fails in a way that passes; `on_wait` is
    told each time what the matter is, and may raise to give up.
    """

    def __init__(self, database: Database, experiment: str, settings: dict[str, Any], engine: sa.Engine) -> None:
        self.database = database
        self.experiment = experiment
        self.settings = settings
        self.locks = locks_of(database)
        self.patience = 0.0
        self.on_wait: Callable[[str], object] = lambda reason: None
        self.uncertain = False
        self.failed_at = -math.inf
        self._engine = engine
        self._lock = threading.Lock()

    @classmethod
    def open(cls, where: str | Path | Database, experiment: str | None = None) -> Self:
        """The experiment in the database at `where`; its name may be left out if there is only one.

        No Optuna is needed, and nothing is written but a format of bpf 0.1 brought to this one. Raises `UsageError`
        if it is not a study database, is one of another version, or has no such experiment.
        """
        database = Database.at(where)
        name, settings = read_settings(database, experiment, reading=True)
        with explained(database):
            return cls(database, name, settings, database.connect(reading=True))

    @staticmethod
    def exists(where: str | Path | Database, experiment: str) -> bool:
        """Whether a database holds an experiment of this name. Raises `UsageError` if it cannot be read."""
        database = Database.at(where)
        with explained(database):
            engine = database.connect(reading=True)
            try:
                with engine.connect().execution_options(bpf_reading=True) as connection:
                    return schema.holds(connection, experiment)
            finally:
                engine.dispose()

    @patient
    def counts(self, rule: str | None = None) -> dict[str, int]:
        """How many cells are in each state. Only cells whose owner is alive count as running."""
        counted = dict.fromkeys(STATES, 0)
        for tally in self.tally():
            if rule in (None, tally.rule):
                counted[tally.state] += tally.count
        return counted

    @patient
    def tally(self) -> list[Tally]:
        """The cells by rule, state and cause. Those whose owner has died count as interrupted."""
        with self._reading() as connection:
            return plan.tally(connection, self.experiment, self._dead(connection))

    @patient
    def rows(self, state: str | None = None, rule: str | None = None) -> list[Row]:
        """The cells in plan order. It reads all of them: for reports, not for polling."""
        with self._reading() as connection:
            rows = plan.rows(connection, self.experiment, rule=rule)
            dead = self._dead(connection) if any(row.state == "running" for row in rows) else ()
        rows = [replace(r, state="interrupted") if r.state == "running" and r.owner in dead else r for r in rows]
        return [row for row in rows if state in (None, row.state)]

    @patient
    def best(self, rule: str) -> tuple[str, float] | None:
        """The key and value of the best complete cell of a rule."""
        with self._reading() as connection:
            return plan.best(connection, self.experiment, rule)

    @patient
    def upcoming(self, limit: int) -> list[Row]:
        """The first cell of each kind (structure and `max_runs`) that will be claimed soon, of so many at most."""
        with self._reading() as connection:
            return plan.upcoming(connection, self.experiment, limit)

    @patient
    def leaders(self, rule: str, limit: int) -> list[Row]:
        """The best complete cells of a rule, best first. It reads only these."""
        with self._reading() as connection:
            return plan.leaders(connection, self.experiment, rule, limit)

    @patient
    def finished(self, keys: Iterable[str]) -> set[str]:
        """Which of the cells, or of what were cells before they got more epochs, will not be trained any more."""
        keys = list(keys)
        with self._reading() as connection:
            return plan.finished(connection, self.experiment, keys) | (self.former & set(keys))

    @patient
    def history(self, key: str) -> Any:
        """What `finish` was given as the history of a cell, or None."""
        with self._reading() as connection:
            return plan.history(connection, self.experiment, key)

    @patient
    def workers(self) -> list[dict[str, Any]]:
        """Who works on the experiment now: `token`, `pid`, `machine`, `facts`, `began`."""
        with self._reading() as connection:
            return owners.living(connection, self.experiment, self.locks, self.database.path is not None)

    @patient
    def spent(self) -> float | None:
        """Device-seconds of all workers there ever were, with lost and idle work; None if none has noted any.

        Workers that share a device share its seconds. The last ones of a worker that was killed are missing.
        """
        with self._reading() as connection:
            return owners.spent(connection, self.experiment)

    @patient
    def rules(self) -> list[str]:
        """The learning rules that are planned."""
        with self._reading() as connection:
            return list(plan.axes(connection, self.experiment))

    @patient
    def axes(self, rule: str) -> list[Axis]:
        """The parameters of a rule, with every value that was ever planned."""
        with self._reading() as connection:
            stored = plan.axes(connection, self.experiment)
        if rule not in stored:
            raise UsageError(f"No learning rule {rule!r} in {self.experiment!r}." + did_you_mean(rule, stored))
        return stored[rule][1]

    def varying(self) -> frozenset[str]:
        """The parameters with more than one value: what never changes says nothing in a table."""
        names = {axis.name for rule in self.rules() for axis in self.axes(rule) if len(axis.values) > 1}
        return frozenset(names | ({"lr"} if self.spec.get("lr_from") else set()))

    @property
    def spec(self) -> dict[str, Any]:
        """The grid as it was written down, unvalidated. Raises Damaged if there is none."""
        if "spec" not in self.settings:
            raise Damaged(self.database, f"it does not say what {self.experiment!r} is")
        spec: dict[str, Any] = self.settings["spec"]
        return spec

    @property
    def former(self) -> set[str]:
        """The keys of cells that had a saved model when they got more epochs, and with that another key."""
        return set(self.settings.get("former", ()))

    def search_space(self, rule: str) -> dict[str, list[Value]]:
        """What `optuna.samplers.GridSampler` needs to read the rule's Optuna study as its own grid."""
        return {axis.name: list(axis.values) for axis in self.axes(rule)}

    def study_name(self, rule: str) -> str:
        """The name under which `optuna.load_study` finds the trials of a rule."""
        return plan.study_name(self.experiment, rule)

    def close(self) -> None:
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        with self._lock, failing(self.database), self._engine.connect() as connection:
            yield connection.execution_options(bpf_reading=True)

    def _dead(self, connection: sa.Connection) -> set[str]:
        # After an outage of the database everyone's lease has run out: they need time to renew them.
        trust_leases = time.monotonic() - self.failed_at > owners.LEASE_SECONDS
        here_only = self.database.path is not None
        return owners.dead(connection, self.experiment, self.locks, here_only, trust_leases)


def read_settings(database: Database, experiment: str | None, reading: bool) -> tuple[str, dict[str, Any]]:
    """The name and the settings of an experiment, which is brought to this format if need be.

    Raises `UsageError` as `StudyView.open` does.
    """
    if database.missing():
        raise UsageError(f"There is no study database {database}.")
    with explained(database):
        engine = database.connect(reading)
        try:
            with engine.connect().execution_options(bpf_reading=True) as connection:
                name, version = schema.read_experiment(connection, database, experiment)
            if version < schema.SCHEMA_VERSION:
                if reading:
                    engine.dispose()
                    engine = database.connect()
                with engine.begin() as connection:
                    if schema.read_experiment(connection, database, name)[1] < schema.SCHEMA_VERSION:
                        schema.migrate(connection, (database.path or Path()).parent / "logs")
            with engine.connect().execution_options(bpf_reading=True) as connection:
                return name, schema.read_settings(connection, name)
        finally:
            engine.dispose()


def locks_of(database: Database) -> Path:
    """Where this machine's owners keep their lock files: beside an SQLite file, else in a directory of this user's.

    Raises UsageError if somebody else can write there, who could make a living worker look dead.
    """
    if database.path:
        return database.path.parent / "locks"
    return private(Path(tempfile.gettempdir()) / f"bpf-locks-{user()}")
