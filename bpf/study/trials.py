"""What Optuna sees: one study per learning rule, and one trial per cell that was begun.

This is the only module that knows Optuna. Its rows are written as stock `GridSampler` would write them, with
`GridSampler`'s own attributes, through Optuna's storage bound to the connection of our own transaction.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, cast

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
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.orm import Session

from bpf.errors import RunError, UsageError
from bpf.study import stored
from bpf.study.cells import Axis, Point, Row, Value
from bpf.study.database import Database

__all__ = ["OptunaError", "Trials", "check_optuna", "search_space", "viewed"]

# GridSampler takes each of them as visited. Only a complete trial can be the best one.
_ENDS = {"complete": TrialState.COMPLETE, "diverged": TrialState.PRUNED, "failed": TrialState.FAIL}

# The columns of Optuna's tables that are read or, in `_Storage`, `extend` and `reopen`, written here.
_trials = sa.table(
    "trials",
    *map(sa.column, ("trial_id", "study_id", "number", "state", "datetime_complete")),
    sa.column("datetime_start", sa.DateTime),
)
_values = sa.table("trial_values", sa.column("trial_id"))
_user = sa.table("trial_user_attributes", *map(sa.column, ("trial_id", "key", "value_json")))
_system = sa.table("trial_system_attributes", *map(sa.column, ("trial_id", "key", "value_json")))
_params = sa.table("trial_params", *map(sa.column, ("trial_id", "param_name", "param_value", "distribution_json")))
_RUNNING: Any = sa.literal_column("'RUNNING'")


class _Storage(RDBStorage):
    """Optuna's storage, which makes a running trial from a template in five statements, however many there are.

    Its own way makes the same rows (`tests/test_study.py` compares them), but it counts all earlier trials to number a
    new one, and looks for an earlier value of each parameter. An Optuna that has no such method goes that way.
    """

    def _get_prepared_new_trial(self, study_id: int, template_trial: FrozenTrial | None, session: Session) -> Any:
        assert template_trial is not None
        mine = sa.select(_trials.c.number).where(_trials.c.study_id == study_id)
        last = session.scalar(mine.order_by(_trials.c.trial_id.desc()).limit(1))
        number = 0 if last is None else int(last) + 1
        moment = cast(datetime, template_trial.datetime_start)
        begun = moment.astimezone(UTC).replace(tzinfo=None)  # as Optuna keeps it
        values = {"study_id": study_id, "number": number, "state": _RUNNING, "datetime_start": begun}
        trial_id = session.scalar(sa.insert(_trials).values(values).returning(_trials.c.trial_id))
        mark = {"trial_id": trial_id}
        params = []
        for name, value in template_trial.params.items():
            distribution = template_trial.distributions[name]
            written = {
                "param_value": distribution.to_internal_repr(value),
                "distribution_json": distribution_to_json(distribution),
            }
            params.append(mark | {"param_name": name} | written)
        if params:
            session.execute(sa.insert(_params), params)
        for table, attributes in ((_user, template_trial.user_attrs), (_system, template_trial.system_attrs)):
            records = [mark | {"key": key, "value_json": json.dumps(value)} for key, value in attributes.items()]
            session.execute(sa.insert(table), records)
        return SimpleNamespace(trial_id=trial_id, number=number, datetime_start=moment)  # all that is asked of it


class Trials:
    """Optuna's storage in a database. Everything but its making happens inside `within`."""

    def __init__(self, database: Database, create: bool = False) -> None:
        """Open the storage; `create` makes Optuna's tables where they are missing."""
        self._storage = _Storage(
            database.engine_url, engine_kwargs=database.engine_options(), skip_table_creation=not create
        )
        self._storage.remove_session()
        self._storage.engine.dispose()
        self._grids: dict[str, tuple[dict[str, list[Value]], dict[Point, int]]] = {}

    @contextmanager
    def within(self, connection: sa.Connection) -> Iterator[None]:
        """Write in the transaction of `connection` meanwhile."""
        sessions = self._storage.scoped_session
        sessions.configure(bind=connection, join_transaction_mode="create_savepoint")
        try:
            yield
        finally:
            sessions.remove()

    def new_study(self, name: str) -> int:
        verbosity = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            return self._storage.create_new_study([StudyDirection.MINIMIZE], name)
        finally:
            optuna.logging.set_verbosity(verbosity)

    def begin(self, connection: sa.Connection, row: Row, study_id: int, axes: Sequence[Axis]) -> tuple[int, int]:
        """A running trial for a cell; returns its id and number."""
        try:
            trial_id = self._storage.create_new_trial(study_id, self._template(row, axes))
        except KeyError as error:
            raise stored.Damage(f"there is no Optuna study with the id {study_id}, which {row.rule!r} has") from error
        number = connection.scalar(sa.select(_trials.c.number).where(_trials.c.trial_id == trial_id))
        return trial_id, cast(int, number)

    def note(self, trial_id: int, **attributes: Any) -> None:
        """Set user attributes of a running trial."""
        try:
            for name, value in attributes.items():
                self._storage.set_trial_user_attr(trial_id, name, value)
        except KeyError as error:
            raise stored.Damage(f"there is no trial with the id {trial_id}, which a cell has") from error

    def end(self, trial_id: int, state: str, value: float | None, **attributes: Any) -> None:
        """End a trial as complete, diverged or failed.

        Raises RunError if another program has deleted or ended it.
        """
        try:
            for name, attribute in attributes.items():
                self._storage.set_trial_user_attr(trial_id, name, attribute)
            self._storage.set_trial_state_values(trial_id, _ENDS[state], None if value is None else [value])
        except (KeyError, UpdateFinishedTrialError):
            raise RunError(
                f"Another program has deleted or ended the Optuna trial with the id {trial_id}, "
                "which bpf was running; the outcome of its cell was not stored."
            ) from None

    def reopen(self, connection: sa.Connection, trial_ids: Sequence[int]) -> None:
        """Make finished trials running ones again, for more executions or epochs. Optuna offers no way to do it."""
        if not trial_ids:
            return
        records = [{"at": trial_id} for trial_id in trial_ids]
        at: sa.BindParameter[int] = sa.bindparam("at")
        connection.execute(sa.delete(_values).where(_values.c.trial_id == at), records)
        running: dict[str, Any] = {"state": _RUNNING, "datetime_complete": None}
        connection.execute(sa.update(_trials).where(_trials.c.trial_id == at).values(**running), records)

    def extend(self, connection: sa.Connection, study_id: int, before: Sequence[Axis], after: Sequence[Axis]) -> None:
        """Tell the trials of a study that its grid has grown.

        Optuna offers no way to do it, and three things stored with each trial describe the whole grid: the
        search space (GridSampler ignores trials of another one), the grid id (an index into a shuffled list, and
        the list is another one now), and each parameter's distribution (Optuna refuses trials whose choices
        differ). A categorical value is stored as its index into the choices; as these are only ever appended to,
        the index stays right.
        """
        mine = sa.select(_trials.c.trial_id).where(_trials.c.study_id == study_id)
        space = (_system.c.key == "search_space", _system.c.trial_id.in_(mine))
        connection.execute(sa.update(_system).where(*space).values(value_json=json.dumps(search_space(after))))

        old, new = _grid_ids(search_space(before)), _grid_ids(search_space(after))
        moved = {str(number): str(new[point]) for point, number in old.items()}
        grid_id = (_system.c.key == "grid_id", _system.c.trial_id.in_(mine))
        numbered = connection.execute(sa.select(_system.c.trial_id, _system.c.value_json).where(*grid_id)).all()
        if not moved.keys() >= {number for _, number in numbered}:
            raise stored.Damage("a trial has a number that its grid does not have")
        if numbered:
            change = sa.update(_system).where(_system.c.key == "grid_id", _system.c.trial_id == sa.bindparam("at"))
            records = [{"at": trial_id, "value_json": moved[number]} for trial_id, number in numbered]
            connection.execute(change.values(value_json=sa.bindparam("value_json")), records)

        for axis in after:
            parameter = (_params.c.param_name == axis.name, _params.c.trial_id.in_(mine))
            written = distribution_to_json(_distribution(axis))
            connection.execute(sa.update(_params).where(*parameter).values(distribution_json=written))

    def _template(self, row: Row, axes: Sequence[Axis]) -> FrozenTrial:
        """A running trial with all that Optuna and GridSampler want to know: so it is one write."""
        space = search_space(axes)
        if row.rule not in self._grids or self._grids[row.rule][0] != space:
            self._grids[row.rule] = space, _grid_ids(space)
        point = stored.point(row.params, sorted(space), row.key)
        if point not in self._grids[row.rule][1]:
            raise stored.Damage(f"the cell {row.key!r} is no point of the grid of its rule")
        handed_over = {name: value for name, value in row.chosen.items() if name not in row.params}
        return optuna.create_trial(
            state=TrialState.RUNNING,
            params=dict(row.params),
            distributions={axis.name: _distribution(axis) for axis in axes},
            user_attrs={"name": row.name, "cell": row.key, "attempt": row.attempt} | handed_over,
            system_attrs={"search_space": space, "grid_id": self._grids[row.rule][1][point]},
        )


def viewed(database: Database) -> RDBStorage:
    """Optuna's own storage in a database, for programs that show it; nothing of it need be writable."""
    return RDBStorage(
        database.engine_url, engine_kwargs=database.engine_options(reading=True), skip_table_creation=True
    )


def search_space(axes: Iterable[Axis]) -> dict[str, list[Value]]:
    """What `GridSampler` calls the grid of these axes."""
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


def check_optuna() -> None:
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
