"""What Optuna sees: one study per learning rule, and one trial per cell that was begun.

This is the only module that knows Optuna. Its rows are written as stock `GridSampler` would write them, with
`GridSampler`'s own attributes, in our own transaction and in a handful of statements however many cells there are.
Optuna's storage makes the same rows (`tests/test_study.py` compares them) one by one, each in a session of its own.
"""

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple, cast

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
from optuna.samplers import GridSampler
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from bpf.errors import RunError, UsageError
from bpf.study import stored
from bpf.study.cells import Axis, Point, Row, Value
from bpf.study.database import Database

__all__ = ["Ending", "Trials", "check_optuna", "make_tables", "search_space", "viewed"]

# GridSampler takes each of them as visited. Only a complete trial can be the best one.
_ENDS = {"complete": TrialState.COMPLETE, "diverged": TrialState.PRUNED, "failed": TrialState.FAIL}

# The columns of Optuna's tables that are read or written here.
_trials = sa.table(
    "trials",
    *map(sa.column, ("trial_id", "study_id", "number", "state")),
    *(sa.column(name, sa.DateTime) for name in ("datetime_start", "datetime_complete")),
)
_studies = sa.table("studies", *map(sa.column, ("study_id", "study_name")))
_directions = sa.table("study_directions", *map(sa.column, ("study_id", "objective", "direction")))
_values = sa.table("trial_values", *map(sa.column, ("trial_id", "objective", "value", "value_type")))
_user = sa.table("trial_user_attributes", *map(sa.column, ("trial_id", "key", "value_json")))
_system = sa.table("trial_system_attributes", *map(sa.column, ("trial_id", "key", "value_json")))
_params = sa.table("trial_params", *map(sa.column, ("trial_id", "param_name", "param_value", "distribution_json")))
_RUNNING: Any = sa.literal_column("'RUNNING'")


class Ending(NamedTuple):
    """How a trial ends, complete, diverged or failed, and the user attributes that it then has."""

    trial_id: int
    state: str
    value: float | None
    attributes: dict[str, Any]


def make_tables(database: Database) -> None:
    """Make Optuna's tables where they are missing.

    Raises RuntimeError for tables of an Optuna that has others.
    """
    storage = RDBStorage(database.engine_url, engine_kwargs=database.engine_options())
    storage.remove_session()
    storage.engine.dispose()


class Trials:
    """Optuna's tables in a database. What is read and written there is in the transaction of a `connection`."""

    def __init__(self) -> None:
        self._grids: dict[str, tuple[dict[str, list[Value]], dict[Point, int]]] = {}

    def new_study(self, connection: sa.Connection, name: str) -> int:
        """A study of Optuna's, whose best value is the least; returns its id."""
        study = sa.insert(_studies).values(study_name=name).returning(_studies.c.study_id)
        study_id = cast(int, connection.scalar(study))
        least: Any = sa.literal_column("'MINIMIZE'")
        connection.execute(sa.insert(_directions).values(study_id=study_id, objective=0, direction=least))
        return study_id

    def begin(
        self, connection: sa.Connection, rows: Sequence[Row], study_id: int, axes: Sequence[Axis]
    ) -> dict[str, tuple[int, int]]:
        """Running trials for cells of one rule; returns the id and the number of each, by the cells' keys."""
        studies = sa.select(_studies.c.study_id).where(_studies.c.study_id == study_id)
        if connection.scalar(studies) is None:
            raise stored.Damage(f"there is no Optuna study with the id {study_id}, which {rows[0].rule!r} has")
        space, grid_ids = self._grid(rows[0].rule, axes)
        points = [stored.point(row.params, sorted(space), row.key) for row in rows]
        for row, point in zip(rows, points, strict=True):
            if point not in grid_ids:
                raise stored.Damage(f"the cell {row.key!r} is no point of the grid of its rule")
        mine = sa.select(_trials.c.number).where(_trials.c.study_id == study_id)
        last = connection.scalar(mine.order_by(_trials.c.trial_id.desc()).limit(1))
        numbers = {row.key: number for number, row in enumerate(rows, start=0 if last is None else last + 1)}
        new = sa.insert(_trials).values(state=_RUNNING).returning(_trials.c.number, _trials.c.trial_id)
        same = {"study_id": study_id, "datetime_start": _now()}
        made = connection.execute(new, [same | {"number": number} for number in numbers.values()])
        by_number = {one.number: one.trial_id for one in made}
        ids = {key: by_number[number] for key, number in numbers.items()}
        if axes:
            connection.execute(sa.insert(_params), _parameters({ids[row.key]: row.params for row in rows}, axes))
        user, system = {}, {}
        for row, point in zip(rows, points, strict=True):
            handed_over = {name: value for name, value in row.chosen.items() if name not in row.params}
            user[ids[row.key]] = {"name": row.name, "cell": row.key, "attempt": row.attempt} | handed_over
            system[ids[row.key]] = {"search_space": space, "grid_id": grid_ids[point]}
        connection.execute(sa.insert(_user), _records(user))
        connection.execute(sa.insert(_system), _records(system))
        return {key: (ids[key], number) for key, number in numbers.items()}

    def note(self, connection: sa.Connection, attributes: Mapping[int, Mapping[str, Any]]) -> None:
        """Set user attributes of running trials, by their ids."""
        for gone in self._not_running(connection, attributes):
            raise stored.Damage(f"there is no running trial with the id {gone}, which a cell has")
        self._set(connection, attributes)

    def end(self, connection: sa.Connection, endings: Sequence[Ending]) -> None:
        """End running trials. Raises RunError if another program has deleted or ended one of them."""
        for gone in self._not_running(connection, [ending.trial_id for ending in endings]):
            raise RunError(
                f"Another program has deleted or ended the Optuna trial with the id {gone}, "
                "which bpf was running; the outcome of its cell was not stored."
            )
        self._set(connection, {ending.trial_id: ending.attributes for ending in endings})
        values = [
            {"trial_id": ending.trial_id, "objective": 0, "value": ending.value}
            for ending in endings
            if ending.value is not None
        ]
        if values:
            connection.execute(sa.insert(_values).values(value_type=sa.literal_column("'FINITE'")), values)
        for state in {_ENDS[ending.state] for ending in endings}:
            mine = [ending.trial_id for ending in endings if _ENDS[ending.state] == state]
            change = {"state": sa.literal_column(f"'{state.name}'"), "datetime_complete": _now()}
            connection.execute(sa.update(_trials).where(_trials.c.trial_id.in_(mine)).values(**change))

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

    def _grid(self, rule: str, axes: Sequence[Axis]) -> tuple[dict[str, list[Value]], dict[Point, int]]:
        """The search space of a rule, and which id each of its points has."""
        space = search_space(axes)
        if rule not in self._grids or self._grids[rule][0] != space:
            self._grids[rule] = space, _grid_ids(space)
        return self._grids[rule]

    @staticmethod
    def _not_running(connection: sa.Connection, ids: Iterable[int]) -> list[int]:
        """Those of the trials that are not there or have ended."""
        wanted = set(ids)
        running = sa.select(_trials.c.trial_id).where(_trials.c.trial_id.in_(wanted), _trials.c.state == _RUNNING)
        return sorted(wanted - set(connection.scalars(running)))

    @staticmethod
    def _set(connection: sa.Connection, attributes: Mapping[int, Mapping[str, Any]]) -> None:
        """Set user attributes of trials, in place of earlier ones."""
        names = {name for told in attributes.values() for name in told}
        old = (_user.c.trial_id.in_(list(attributes)), _user.c.key.in_(names))
        connection.execute(sa.delete(_user).where(*old))
        connection.execute(sa.insert(_user), _records(attributes))


def _parameters(chosen: Mapping[int, Mapping[str, Value]], axes: Sequence[Axis]) -> list[dict[str, Any]]:
    """The parameters of trials, by their ids, as Optuna's table has them."""
    kinds = {axis.name: _distribution(axis) for axis in axes}
    told = {name: distribution_to_json(distribution) for name, distribution in kinds.items()}
    return [
        {
            "trial_id": trial_id,
            "param_name": name,
            "param_value": kinds[name].to_internal_repr(value),
            "distribution_json": told[name],
        }
        for trial_id, params in chosen.items()
        for name, value in params.items()
    ]


def _records(attributes: Mapping[int, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Attributes of trials as Optuna's tables have them."""
    return [
        {"trial_id": trial_id, "key": key, "value_json": json.dumps(value)}
        for trial_id, told in attributes.items()
        for key, value in told.items()
    ]


def _now() -> datetime:
    """The time as Optuna keeps it."""
    return datetime.now(UTC).replace(tzinfo=None)


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
