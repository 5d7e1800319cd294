"""The study of an experiment: its plan and one Optuna study per learning rule, in one database.

This is the only module that knows Optuna. Stock `GridSampler`, `optuna-dashboard` and a notebook read what is
written here as an ordinary grid search, but the cells are handed out by the plan table of `plan.py`, because
Optuna's own ways re-read every trial for each new one, lose interrupted trials and may begin one twice.

Each step (claim, finish, ...) writes our rows and Optuna's in **one** transaction, so that a process killed
at any moment leaves either both or neither. For this, Optuna's storage is bound to our connection meanwhile.
"""

import errno
import itertools
import json
import math
import os
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

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

from bpf import database, plan
from bpf.errors import RunError, UsageError, did_you_mean
from bpf.owner import Owner, sweep
from bpf.plan import Axis, Cell, Claim, Point, Row, Value

__all__ = ["Axis", "Cell", "Claim", "Owner", "Row", "Study", "Value"]


class Study:
    """One experiment's cells. Each process opens its own; the threads of one process may share it.

    `locks` is the directory of the owners' lock files, beside the database.
    """

    def __init__(self, path: Path, experiment: str, settings: dict[str, Any]) -> None:
        self.experiment = experiment
        self.settings = settings
        self.locks = path.parent / "locks"
        self._engine = database.connect(path)
        self._storage = _optuna_storage(path)
        self._grids: dict[str, tuple[dict[str, list[Value]], dict[Point, int]]] = {}
        self._lock = threading.Lock()

    @classmethod
    def create(cls, where: str | Path, experiment: str, settings: dict[str, Any]) -> Self:
        """A new experiment in the database at `where` (a path or an `sqlite:///` URL), made if need be.

        Raises `UsageError` if the experiment exists, or if there can be no such database.
        """
        _check_optuna()
        path = database.database_path(where)
        with _explained(path):
            database.prepare(path)
            study = cls(path, experiment, settings)
        try:
            with study._transaction() as connection:
                plan.metadata.create_all(connection)
                plan.add_experiment(connection, path, experiment, settings)
        except BaseException:
            study.close()
            raise
        return study

    @classmethod
    def open(cls, where: str | Path, experiment: str | None = None) -> Self:
        """The experiment in the database at `where`; its name may be left out if there is only one.

        Raises `UsageError` if it is not a study database, is one of another version, or has no such
        experiment.
        """
        _check_optuna()
        path = database.database_path(where)
        if not path.exists():
            raise UsageError(f"There is no study database {path}.")
        with _explained(path):
            name, settings = plan.read_experiment(path, experiment)
            return cls(path, name, settings)

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
            stored = self._stored(connection)
            begun = [
                self._begin(connection, replace(row, cohort=cohort), owner.token, *stored[row.rule]) for row in rows
            ]
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

    def finish(self, claim: Claim, key: str, value: float | None, state: str, result: dict[str, Any]) -> None:
        """Store the outcome of a cell, `complete` or `diverged`, and end its trial.

        A diverged cell is a result without a value: never the best, never tried again. Raises `RunError` if
        the cell is no longer the claim's, and stores nothing then.
        """
        if state not in ("complete", "diverged"):
            raise ValueError(f"A cell finishes as 'complete' or 'diverged', not as {state!r}.")
        if state == "complete" and (value is None or not math.isfinite(value)):
            raise ValueError(f"A complete cell has a finite value, not {value}; did it diverge?")
        with self._transaction() as connection:
            value = value if state == "complete" else None
            trial_id = self._settle(connection, claim, key, state=state, value=value, result=result)
            self._end_trial(trial_id, value, "result", result, _ENDS[state])

    def fail(self, claim: Claim, key: str, error: str) -> None:
        """Store that a cell raised, with the text of its traceback. Fenced like `finish`."""
        with self._transaction() as connection:
            trial_id = self._settle(connection, claim, key, state="failed", error=error)
            self._end_trial(trial_id, None, "error", error, _ENDS["failed"])

    def retry_failed(self) -> int:
        """Make the failed cells pending again; returns how many there were.

        Each gets a new trial with a new name, as Optuna never revives a failed one.
        """
        with self._transaction() as connection:
            failed = plan.rows(connection, self.experiment, state="failed")
            names = plan.fresh_names(connection, self.experiment)
            blank = {"cohort": None, "attempt": 0, "trial_id": None, "trial_number": None, "error": None}
            for row, name in zip(failed, names, strict=False):
                plan.update(connection, self.experiment, {"key": row.key}, state="pending", name=name, **blank)
        return len(failed)

    def repair(self) -> int:
        """Clear up after dead processes, at a start; returns how many cells they left interrupted.

        There is never a half-written cell to mend: see the top of this module.
        """
        with self._transaction() as connection:
            left = plan.interrupt_dead(connection, self.experiment, self.locks)
            sweep(self.locks)
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
                f"The parameters of {rule!r} are {names[0]} in this experiment, not {names[1]}; start a new experiment."
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
        space = _space(axes)
        points = plan.points(connection, self.experiment, rule, sorted(space))
        whole = set(itertools.product(*(space[name] for name in sorted(space))))
        if len(points) != len(whole) or set(points) != whole:
            raise UsageError(
                f"The grid of {rule!r} must be whole: its values make {len(whole)} points, but {len(points)} "
                f"cells at {len(whole & set(points))} of them are planned. Give each parameter all its "
                "values, the earlier ones too, and leave the fixed settings as they were."
            )

    def _begin(self, connection: sa.Connection, row: Row, token: str, study_id: int, axes: list[Axis]) -> Row:
        """Give a cell to the owner: with a new trial if it has none, otherwise in its old one."""
        attempt = row.attempt + 1
        if row.trial_id is None:
            trial_id = self._storage.create_new_trial(study_id, self._template(row, axes))
            number = connection.scalar(sa.select(_trials.c.number).where(_trials.c.trial_id == trial_id))
            row = replace(row, trial_id=trial_id, trial_number=number)
        else:
            self._storage.set_trial_user_attr(row.trial_id, "attempt", attempt)
        row = replace(row, state="running", attempt=attempt)
        changed = ("state", "cohort", "attempt", "trial_id", "trial_number")
        values = {name: getattr(row, name) for name in changed}
        plan.update(connection, self.experiment, {"key": row.key}, owner=token, **values)
        return row

    def _template(self, row: Row, axes: list[Axis]) -> optuna.trial.FrozenTrial:
        """A running trial with all that Optuna and GridSampler want to know: so it is one write."""
        space = _space(axes)
        if row.rule not in self._grids or self._grids[row.rule][0] != space:
            self._grids[row.rule] = space, _grid_ids(space)
        point = tuple(row.params[name] for name in sorted(space))
        return optuna.create_trial(
            state=TrialState.RUNNING,
            params=dict(row.params),
            distributions={axis.name: _distribution(axis) for axis in axes},
            user_attrs={"name": row.name, "cell": row.key, "attempt": 1},
            system_attrs={"search_space": space, "grid_id": self._grids[row.rule][1][point]},
        )

    def _settle(self, connection: sa.Connection, claim: Claim, key: str, **values: Any) -> int:
        """End a cell that the claim still owns; returns the trial that is to be ended with it."""
        row = next(row for row in claim.rows if row.key == key)
        owned = {"key": key, "owner": claim.token, "state": "running"}
        if plan.update(connection, self.experiment, owned, owner=None, **values) != 1 or row.trial_id is None:
            raise RunError(
                f"The cell {row.name} ({key}) is no longer owned by this process; its outcome was not stored."
            )
        return row.trial_id

    def _end_trial(self, trial_id: int, value: float | None, attribute: str, content: Any, state: TrialState) -> None:
        try:
            self._storage.set_trial_user_attr(trial_id, attribute, content)
            values = None if value is None else [value]
            self._storage.set_trial_state_values(trial_id, state, values)
        except (KeyError, UpdateFinishedTrialError):
            raise RunError(
                f"Another program has deleted or ended the Optuna trial with the id {trial_id}, "
                "which bpf was running; the outcome of its cell was not stored."
            ) from None


def _space(axes: Iterable[Axis]) -> dict[str, list[Value]]:
    return {axis.name: list(axis.values) for axis in axes}


def _grid_ids(space: Mapping[str, Sequence[Value]]) -> dict[Point, int]:
    """Which id each point (values in the order of the sorted names) has for GridSampler's default seed."""
    points = list(itertools.product(*(space[name] for name in sorted(space))))
    np.random.RandomState(0).shuffle(points)
    return {point: number for number, point in enumerate(points)}


def _distribution(axis: Axis) -> BaseDistribution:
    if axis.low is None or axis.high is None:
        return CategoricalDistribution(axis.choices or axis.values)
    if axis.kind == "int":
        return IntDistribution(int(axis.low), int(axis.high), log=axis.log)
    return FloatDistribution(axis.low, axis.high, log=axis.log)


def _rewrite_trials(connection: sa.Connection, study_id: int, before: Sequence[Axis], after: Sequence[Axis]) -> None:
    """Tell the trials of a study that its grid has grown. The only place that edits Optuna's tables by SQL.

    Optuna offers no way to do it, and three things stored with each trial describe the whole grid: the
    search space (GridSampler ignores trials of another one), the grid id (an index into a shuffled list, and
    the list is another one now), and each parameter's distribution (Optuna refuses trials whose choices
    differ). A categorical value is stored as its index into the choices; as these are only ever appended to,
    the index stays right.
    """
    mine = sa.select(_trials.c.trial_id).where(_trials.c.study_id == study_id)
    space = (_system.c.key == "search_space", _system.c.trial_id.in_(mine))
    connection.execute(sa.update(_system).where(*space).values(value_json=json.dumps(_space(after))))

    old, new = _grid_ids(_space(before)), _grid_ids(_space(after))
    moved = {str(number): str(new[point]) for point, number in old.items()}
    grid_id = (_system.c.key == "grid_id", _system.c.trial_id.in_(mine))
    stored = connection.execute(sa.select(_system.c.trial_id, _system.c.value_json).where(*grid_id)).all()
    if stored:
        change = sa.update(_system).where(_system.c.key == "grid_id", _system.c.trial_id == sa.bindparam("at"))
        records = [{"at": trial_id, "value_json": moved[number]} for trial_id, number in stored]
        connection.execute(change.values(value_json=sa.bindparam("value_json")), records)

    for axis in after:
        parameter = (_params.c.param_name == axis.name, _params.c.trial_id.in_(mine))
        written = distribution_to_json(_distribution(axis))
        connection.execute(sa.update(_params).where(*parameter).values(distribution_json=written))


# The columns of Optuna's tables that are read or, in `_rewrite_trials`, written here.
_trials = sa.table("trials", *map(sa.column, ("trial_id", "study_id", "number")))
_system = sa.table("trial_system_attributes", *map(sa.column, ("trial_id", "key", "value_json")))
_params = sa.table("trial_params", *map(sa.column, ("trial_id", "param_name", "distribution_json")))

# GridSampler takes each of them as visited. Only a complete trial can be the best one.
_ENDS = {"complete": TrialState.COMPLETE, "diverged": TrialState.PRUNED, "failed": TrialState.FAIL}


_DISK_FAILURES = {"database or disk is full", "disk I/O error", os.strerror(errno.ENOSPC), os.strerror(errno.EFBIG)}


def _check_optuna() -> None:
    """Refuse an Optuna that numbers its grids otherwise: the stored ids would be wrong without a sign."""
    if optuna.__version__.split(".")[0] != "5":
        raise UsageError(f"bpf needs optuna 5, but {optuna.__version__} is installed: pip install 'optuna>=5,<6'")
    space: dict[str, list[Value]] = {"rate": [0.1, 0.2, 0.3], "arch": ["a", "b"]}
    sampler, no_study = GridSampler(space), cast(optuna.Study, None)
    for point, number in _grid_ids(space).items():
        trial = optuna.create_trial(state=TrialState.RUNNING, system_attrs={"grid_id": number})
        for name, value in zip(sorted(space), point, strict=True):
            anything = CategoricalDistribution(space[name])
            if sampler.sample_independent(no_study, trial, name, anything) != value:
                raise UsageError(
                    f"optuna {optuna.__version__} numbers the points of a grid differently from optuna 5.0, "
                    "which bpf was made for: pip install optuna==5.0.0"
                )


def _optuna_storage(path: Path) -> RDBStorage:
    """Optuna's storage, its tables made if need be. From here on it uses the connections it is bound to."""
    storage = RDBStorage(database.ENGINE_URL, engine_kwargs=database.engine_options(path))
    storage.remove_session()
    storage.engine.dispose()
    return storage


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """What can be wrong with a database that is opened, in words for its user."""
    try:
        yield
    except (sa.exc.DBAPIError, sqlite3.Error, OSError) as error:
        kind = RunError if _cause(error) in _DISK_FAILURES else UsageError
        raise kind(f"{path} cannot be used as a study database: {_cause(error)}.") from error
    except (RuntimeError, ImportError, OptunaError) as error:  # Optuna's: its tables' version, a driver
        raise UsageError(f"{path} cannot be used with this optuna: {error}") from error


@contextmanager
def _failing() -> Iterator[None]:
    try:
        yield
    except (sa.exc.DBAPIError, OptunaError) as error:
        raise RunError(f"The study database failed: {_cause(error)}.") from error


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error.strerror if isinstance(error, OSError) else error)
