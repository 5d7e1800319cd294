"""The study of an experiment: its plan and one Optuna study per learning rule, in one database.

This is the only module that knows Optuna. Stock `GridSampler`, `optuna-dashboard` and a notebook read what is
written here as an ordinary grid search, but the cells are handed out by the plan table of `plan.py`, because
Optuna's own ways re-read every trial for each new one, lose interrupted trials and may begin one twice.

Each step (claim, finish, ...) writes our rows and Optuna's in **one** transaction, so that a process killed at
any moment leaves either both or neither. For this, Optuna's storage is bound to our connection meanwhile.
"""

import itertools
import json
import math
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import optuna
import sqlalchemy as sa
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
)
from optuna.exceptions import OptunaError, UpdateFinishedTrialError
from optuna.samplers import GridSampler
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from optuna.trial import TrialState

from bpf import plan
from bpf.errors import RunError, UsageError, did_you_mean
from bpf.plan import Axis, Cell, Claim, Owner, Point, Row, Value

__all__ = ["Axis", "Cell", "Claim", "Owner", "Row", "Study", "Value"]

BUSY_SECONDS = 60.0
_NETWORK_FILE_SYSTEMS = {"afs", "beegfs", "ceph", "cifs", "gpfs", "lustre", "nfs", "nfs4", "smb3", "smbfs"}


class Study:
    """One experiment's cells. Each process opens its own; the threads of one process may share it.

    `locks` is the directory of the owners' lock files, beside the database.
    """

    def __init__(self, url: sa.URL, experiment: str, settings: dict[str, Any]) -> None:
        self.experiment = experiment
        self.settings = settings
        self.locks = Path(url.database or "").parent / "locks"
        self._engine = _engine(url)
        self._storage = _optuna_storage(url)
        self._grids: dict[str, tuple[list[Axis], dict[Point, int]]] = {}
        self._lock = threading.Lock()

    @classmethod
    def create(cls, where: str | Path, experiment: str, settings: dict[str, Any]) -> Self:
        """A new experiment in the database at `where` (a path, or an SQLAlchemy URL), made if need be.

        Raises `UsageError` if the experiment exists, or if there can be no such database.
        """
        _check_optuna()
        url = _url(where)
        with _explained(url):
            _prepare_sqlite(url)
            study = cls(url, experiment, settings)
        record = {"name": experiment, "schema_version": plan.SCHEMA_VERSION, "settings": settings}
        try:
            plan.metadata.create_all(study._engine)
            with study._transaction() as connection:
                connection.execute(sa.insert(plan.experiments).values(record))
        except sa.exc.IntegrityError:
            study.close()
            raise UsageError(f"The experiment {experiment!r} exists already in {_show(url)}.") from None
        return study

    @classmethod
    def open(cls, where: str | Path, experiment: str | None = None) -> Self:
        """The experiment in the database at `where`; its name may be left out if there is only one.

        Raises `UsageError` if it is not a study database, is one of another version, or has no such
        experiment.
        """
        _check_optuna()
        url = _url(where)
        if url.database is not None and url.get_backend_name() == "sqlite" and not Path(url.database).exists():
            raise UsageError(f"There is no study database {_show(url)}.")
        with _explained(url):
            name, settings = _read_experiment(url, experiment)
            return cls(url, name, settings)

    def plan(self, axes: Mapping[str, Sequence[Axis]], cells: Iterable[Cell]) -> int:
        """Insert the cells that are not there yet, as pending; returns how many were new.

        `axes` gives the parameters of each rule. What they add to the stored axes extends the grid; nothing
        is ever removed, and no cell runs again. Every point of the extended grid must be planned.
        """
        cells = list(cells)
        with self._transaction() as connection:
            for rule, wanted in axes.items():
                self._extend(connection, rule, wanted)
            new = plan.insert(connection, self.experiment, cells)
            for rule in {cell.rule for cell in cells} | set(axes):
                self._check_full(connection, rule)
        return new

    def claim(self, owner: Owner, size: Callable[[Row], int]) -> Claim | None:
        """Cells to train: an interrupted cohort, or else up to `size(first pending cell)` of its structure.

        None if nobody left anything and nothing is pending. `size` must not use the study.
        """
        with self._transaction() as connection:
            plan.interrupt_dead(connection, self.experiment, self.locks)
            rows = plan.take(connection, self.experiment, size)
            if not rows:
                return None
            cohort = rows[0].cohort or plan.cohort_id(rows)
            begun = [self._begin(connection, replace(row, cohort=cohort), owner.token) for row in rows]
        return Claim(owner.token, cohort, begun)

    def release(self, claim: Claim, *, keep_cohort: bool = True) -> int:
        """Give back what is unfinished of a claim; returns how many cells that are.

        They go on in the same trials, which Optuna shows as running meanwhile: so their start time stays,
        and no stock sampler takes them. Without `keep_cohort` (it did not fit into memory) they become
        pending, to be put into smaller cohorts and begun anew.
        """
        left = {"owner": claim.token, "cohort": claim.cohort, "state": "running"}
        state = {"state": "interrupted"} if keep_cohort else {"state": "pending", "cohort": None}
        with self._transaction() as connection:
            return plan.update(connection, self.experiment, left, owner=None, **state)

    def finish(
        self, claim: Claim, key: str, value: float | None, state: str, result: dict[str, Any]
    ) -> None:
        """Store the outcome of a cell, `complete` or `diverged`, and end its trial.

        A diverged cell is a result without a value: never the best, never tried again. Raises `RunError` if
        the cell is no longer the claim's, and stores nothing then.
        """
        if state not in ("complete", "diverged"):
            raise ValueError(f"A cell finishes as 'complete' or 'diverged', not as {state!r}.")
        if state == "complete" and (value is None or not math.isfinite(value)):
            raise ValueError(f"A complete cell has a finite value, not {value}; did it diverge?")
        with self._transaction() as connection:
            trial_id = self._settle(connection, claim, key, state=state, value=value, result=result)
            self._storage.set_trial_user_attr(trial_id, "result", result)
            if state == "complete" and value is not None:
                self._storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [value])
            else:
                self._storage.set_trial_state_values(trial_id, TrialState.PRUNED)

    def fail(self, claim: Claim, key: str, error: str) -> None:
        """Store that a cell raised, with the text of its traceback. Fenced like `finish`."""
        with self._transaction() as connection:
            trial_id = self._settle(connection, claim, key, state="failed", error=error)
            self._storage.set_trial_user_attr(trial_id, "error", error)
            self._storage.set_trial_state_values(trial_id, TrialState.FAIL)

    def retry_failed(self) -> int:
        """Make the failed cells pending again; returns how many there were.

        Each gets a new trial with a new name, as Optuna never revives a failed one.
        """
        with self._transaction() as connection:
            failed = plan.rows(connection, self.experiment, state="failed")
            names = plan.fresh_names(connection, self.experiment)
            blank = {"cohort": None, "attempt": 0, "trial_id": None, "trial_number": None, "error": None}
            for row, name in zip(failed, names, strict=False):
                plan.update(
                    connection, self.experiment, {"key": row.key}, state="pending", name=name, **blank
                )
        return len(failed)

    def repair(self) -> int:
        """Clear up after dead processes, at a start; returns how many cells they left interrupted.

        There is never a half-written cell to mend: see the top of this module.
        """
        with self._transaction() as connection:
            left = plan.interrupt_dead(connection, self.experiment, self.locks)
            plan.sweep(self.locks)
        return left

    def counts(self, rule: str | None = None) -> dict[str, int]:
        """How many cells are in each state. Only cells whose owner is alive now count as running."""
        with self._transaction() as connection:
            plan.interrupt_dead(connection, self.experiment, self.locks)
            return plan.counts(connection, self.experiment, rule)

    def rows(self, state: str | None = None, rule: str | None = None) -> list[Row]:
        """The cells in plan order. It reads all of them: for reports, not for polling."""
        with self._reading() as connection:
            return plan.rows(connection, self.experiment, state=state, rule=rule)

    def axes(self, rule: str) -> list[Axis]:
        """The parameters of a rule, with every value that was ever planned."""
        with self._reading() as connection:
            stored = self._stored(connection)
        if rule not in stored:
            raise UsageError(f"No learning rule {rule!r} in {self.experiment!r}." + did_you_mean(rule, stored))
        return stored[rule][1]

    def search_space(self, rule: str) -> dict[str, list[Value]]:
        """What `optuna.samplers.GridSampler` needs to read the rule's Optuna study as its own grid."""
        return _space(self.axes(rule))

    def study_name(self, rule: str) -> str:
        """The name under which `optuna.load_study` finds the trials of a rule."""
        return f"{self.experiment}/{rule}"

    def close(self) -> None:
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _transaction(self) -> Iterator[sa.Connection]:
        """One write transaction for our tables and for Optuna's."""
        with self._lock, _failing(), self._engine.begin() as connection:
            sessions = self._storage.scoped_session
            sessions.configure(bind=connection, join_transaction_mode="create_savepoint")
            try:
                yield connection
            finally:
                sessions.remove()

    @contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        with self._lock, _failing(), self._engine.connect() as connection:
            yield connection.execution_options(bpf_reading=True)

    def _stored(self, connection: sa.Connection) -> dict[str, tuple[int, list[Axis]]]:
        query = sa.select(plan.rules).where(plan.rules.c.experiment == self.experiment)
        return {
            record.rule: (record.study_id, [Axis(**axis) for axis in record.axes])
            for record in connection.execute(query)
        }

    def _extend(self, connection: sa.Connection, rule: str, wanted: Sequence[Axis]) -> None:
        """Store the axes of a rule, and let Optuna's trials know what they add to the ones before."""
        study_id, before = self._stored(connection).get(rule, (None, list(wanted)))
        if {axis.name for axis in before} != {axis.name for axis in wanted}:
            names = [", ".join(sorted(axis.name for axis in axes)) or "none" for axes in (before, wanted)]
            raise UsageError(
                f"The parameters of {rule!r} are {names[0]} in this experiment, not {names[1]}; "
                "start a new experiment."
            )
        added = {axis.name: axis for axis in wanted}
        after = [axis.extended(added[axis.name]) for axis in before]
        where = {"experiment": self.experiment, "rule": rule}
        if study_id is None:
            study_id = self._new_optuna_study(rule)
            record = {**where, "study_id": study_id, "axes": [asdict(axis) for axis in after]}
            connection.execute(sa.insert(plan.rules).values(record))
        elif after != before:
            change = sa.update(plan.rules).where(*(plan.rules.c[name] == where[name] for name in where))
            connection.execute(change.values(axes=[asdict(axis) for axis in after]))
            _rewrite_trials(connection, study_id, before, after)

    def _new_optuna_study(self, rule: str) -> int:
        verbosity = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            return self._storage.create_new_study([StudyDirection.MINIMIZE], self.study_name(rule))
        finally:
            optuna.logging.set_verbosity(verbosity)

    def _check_full(self, connection: sa.Connection, rule: str) -> None:
        """GridSampler knows only whole grids; one with holes would never be exhausted."""
        _, axes = self._stored(connection)[rule]
        points = [tuple(row.params[axis.name] for axis in axes) for row in
                  plan.rows(connection, self.experiment, rule=rule)]
        whole = math.prod(len(axis.values) for axis in axes)
        if len(points) != whole or len(set(points)) != whole:
            raise UsageError(
                f"The grid of {rule!r} must be whole: its values make {whole} cells, but {len(points)} cells at "
                f"{len(set(points))} points are planned. Give each parameter all its values, the earlier "
                "ones too, and leave the fixed settings as they were."
            )

    def _begin(self, connection: sa.Connection, row: Row, token: str) -> Row:
        """Give a cell to the owner: with a new trial if it has none, otherwise in its old one."""
        attempt = row.attempt + 1
        if row.trial_id is None:
            trial_id, number = self._new_trial(connection, row)
            row = replace(row, trial_id=trial_id, trial_number=number)
        else:
            self._storage.set_trial_user_attr(row.trial_id, "attempt", attempt)
        row = replace(row, state="running", attempt=attempt)
        changed = ("state", "cohort", "attempt", "trial_id", "trial_number")
        values = {name: getattr(row, name) for name in changed}
        plan.update(connection, self.experiment, {"key": row.key}, owner=token, **values)
        return row

    def _new_trial(self, connection: sa.Connection, row: Row) -> tuple[int, int]:
        """One running Optuna trial, written at once with everything in it; its id and its number."""
        study_id, axes = self._stored(connection)[row.rule]
        if row.rule not in self._grids or self._grids[row.rule][0] != axes:
            self._grids[row.rule] = axes, _grid_ids(_space(axes))
        ids = self._grids[row.rule][1]
        space = _space(axes)
        template = optuna.create_trial(
            state=TrialState.RUNNING,
            params=dict(row.params),
            distributions={axis.name: _distribution(axis) for axis in axes},
            user_attrs={"name": row.name, "cell": row.key, "attempt": 1},
            system_attrs={"search_space": space, "grid_id": ids[tuple(row.params[name] for name in space)]},
        )
        trial_id = self._storage.create_new_trial(study_id, template)
        number = connection.scalar(sa.select(_trials.c.number).where(_trials.c.trial_id == trial_id))
        return trial_id, int(number)

    def _settle(self, connection: sa.Connection, claim: Claim, key: str, **values: Any) -> int:
        """End a cell that the claim still owns; returns the trial that is to be ended with it."""
        row = next(row for row in claim.rows if row.key == key)
        owned = {"key": key, "owner": claim.token, "state": "running"}
        if plan.update(connection, self.experiment, owned, owner=None, **values) != 1 or row.trial_id is None:
            raise RunError(
                f"The cell {row.name} ({key}) is no longer owned by this process; its outcome was not stored."
            )
        return row.trial_id
