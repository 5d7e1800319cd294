"""The plan table: which cells an experiment has, who trains them and what came out.

Optuna is not known here. It has no notion of a cell that is planned but not begun, of a process that owns a
trial, or of a cohort, so these live in tables of our own beside Optuna's, in the same database. A state only
ever changes inside a transaction that `study.py` opens.
"""

import hashlib
import itertools
import json
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from bpf.database import connect
from bpf.errors import UsageError, did_you_mean
from bpf.owner import is_alive

SCHEMA_VERSION = 1
STATES = ("pending", "interrupted", "running", "complete", "diverged", "failed")

Value = str | int | float | bool
Point = tuple[Value, ...]


@dataclass(frozen=True)
class Cell:
    """One point of the grid. `key` is the hash of the whole resolved cell, never an index.

    `params` are the tunable parameters as Optuna shows them, `spec` is everything the training needs, and
    `structure` is what must be equal for two cells to be trained in one cohort.
    """

    key: str
    rule: str
    structure: str
    params: dict[str, Value]
    spec: dict[str, Any]


@dataclass(frozen=True)
class Row(Cell):
    """A cell as it stands in the plan: its place, its state (one of `STATES`), its trial and its outcome.

    `attempt` counts how often the trial was claimed; `interrupted` means that nobody trains the cell now and
    that it goes on, in the same cohort and the same trial, from its checkpoint.
    """

    ordinal: int
    name: str
    state: str
    cohort: str | None
    attempt: int
    trial_id: int | None
    trial_number: int | None
    value: float | None
    result: dict[str, Any] | None
    error: str | None


@dataclass(frozen=True)
class Claim:
    """Cells of one cohort that one owner may train until it finishes, fails or releases them.

    A cohort that goes on has fewer cells than it began with if some had finished before.
    """

    token: str
    cohort: str
    rows: list[Row]

    @property
    def resumed(self) -> bool:
        """Whether the cohort was begun before, so that there may be a checkpoint of it."""
        return any(row.attempt > 1 for row in self.rows)


@dataclass(frozen=True)
class Axis:
    """How a tunable parameter appears in Optuna: categorical, or a range from `low` to `high`.

    Without `low` and `high` it is categorical; `choices` then lists what may ever be chosen (the values, if
    left out). Optuna freezes the choices of a study, so declare them all where they are known. A range with
    an `int` as `low` holds integers, otherwise floats; make it wide, so that the grid can be extended.
    """

    name: str
    values: Sequence[Value]
    choices: Sequence[Value] | None = None
    low: float | None = None
    high: float | None = None
    log: bool = False

    @property
    def kind(self) -> str:
        if self.low is None or self.high is None:
            return "categorical"
        return "int" if isinstance(self.low, int) else "float"

    def extended(self, new: "Axis") -> "Axis":
        """This axis and what `new` adds to it, appended: stored choice indices must stay valid."""
        if (self.kind, self.log) != (new.kind, new.log):
            raise UsageError(
                f"The parameter {self.name!r} is {self._described()} in this experiment, not "
                f"{new._described()}; start a new experiment."
            )
        values = _union(self.values, new.values)
        if self.low is None or self.high is None or new.low is None or new.high is None:
            choices = _union(self.choices or self.values, new.choices or new.values)
            return Axis(self.name, values, choices=_union(choices, values))
        low, high = min(self.low, new.low), max(self.high, new.high)
        outside = [value for value in values if isinstance(value, str) or not low <= value <= high]
        if outside:
            raise UsageError(f"The parameter {self.name!r} takes {low} to {high}, not {outside[0]!r}.")
        return Axis(self.name, values, low=low, high=high, log=self.log)

    def _described(self) -> str:
        return f"{self.kind}, on a log scale" if self.log else self.kind


def _union(old: Sequence[Value], new: Sequence[Value]) -> list[Value]:
    return list(dict.fromkeys([*old, *new]))


class Json(sa.TypeDecorator[Any]):
    """JSON as text: a loss may be NaN, which the databases' own JSON types refuse."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> str | None:
        return None if value is None else json.dumps(value)

    def process_result_value(self, value: str | None, dialect: sa.Dialect) -> Any:
        return None if value is None else json.loads(value)


metadata = sa.MetaData()
experiments = sa.Table(
    "bpf_experiment",
    metadata,
    sa.Column("name", sa.String(200), primary_key=True),
    sa.Column("schema_version", sa.Integer, nullable=False),
    sa.Column("settings", Json, nullable=False),
)
rules = sa.Table(
    "bpf_rules",
    metadata,
    sa.Column("experiment", sa.String(200), primary_key=True),
    sa.Column("rule", sa.String(100), primary_key=True),
    sa.Column("study_id", sa.Integer, nullable=False),
    sa.Column("axes", Json, nullable=False),
)
cells = sa.Table(
    "bpf_cells",
    metadata,
    sa.Column("experiment", sa.String(200), primary_key=True),
    sa.Column("key", sa.String(100), primary_key=True),
    sa.Column("rule", sa.String(100), nullable=False),
    sa.Column("structure", sa.String(200), nullable=False),
    sa.Column("params", Json, nullable=False),
    sa.Column("spec", Json, nullable=False),
    sa.Column("ordinal", sa.Integer, nullable=False),
    sa.Column("name", sa.String(100), nullable=False),
    sa.Column("state", sa.String(20), nullable=False),
    sa.Column("cohort", sa.String(100)),
    sa.Column("owner", sa.String(100)),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("trial_id", sa.Integer),
    sa.Column("trial_number", sa.Integer),
    sa.Column("value", sa.Double),
    sa.Column("result", Json),
    sa.Column("error", sa.Text),
    sa.UniqueConstraint("experiment", "name"),
    # A claim asks for the first cell of a state, and for the next ones of its structure.
    sa.Index("bpf_cells_by_state", "experiment", "state", "ordinal"),
    sa.Index("bpf_cells_by_structure", "experiment", "structure", "state", "ordinal"),
)
_ROW_COLUMNS = [cells.c[field.name] for field in fields(Row)]


def add_experiment(connection: sa.Connection, path: Path, name: str, settings: dict[str, Any]) -> None:
    versions = _versions(connection)
    if name in versions:
        raise UsageError(f"The experiment {name!r} exists already in {path}.")
    for version in versions.values():
        _check_version(path, version)
    record = {"name": name, "schema_version": SCHEMA_VERSION, "settings": settings}
    connection.execute(sa.insert(experiments).values(record))


def read_experiment(path: Path, wanted: str | None) -> tuple[str, dict[str, Any]]:
    """The name and the settings of an experiment, before anything is written into the database."""
    engine = connect(path)
    try:
        with engine.connect().execution_options(bpf_reading=True) as connection:
            if not sa.inspect(connection).has_table(experiments.name):
                raise UsageError(f"{path} is a database, but no bpf study.")
            versions = _versions(connection)
            name = next(iter(versions)) if wanted is None and len(versions) == 1 else wanted
            if name is None or name not in versions:
                said = "has several experiments" if name is None else f"has no experiment {name!r}"
                raise UsageError(f"{path} {said}." + did_you_mean(name or "", versions))
            _check_version(path, versions[name])
            settings = sa.select(experiments.c.settings).where(experiments.c.name == name)
            return name, connection.execute(settings).scalar_one()
    finally:
        engine.dispose()


def _versions(connection: sa.Connection) -> dict[str, int]:
    query = sa.select(experiments.c.name, experiments.c.schema_version)
    return {record.name: record.schema_version for record in connection.execute(query)}


def _check_version(path: Path, version: int) -> None:
    if version != SCHEMA_VERSION:
        made_by = "a newer" if version > SCHEMA_VERSION else "an older"
        raise UsageError(
            f"{path} was made by {made_by} bpf (format {version}, this one reads {SCHEMA_VERSION}); "
            "go on with the bpf that made it."
        )


def insert(connection: sa.Connection, experiment: str, wanted: Iterable[Cell]) -> int:
    """Append the cells whose key is not yet planned, as pending; returns how many there were."""
    mine = cells.c.experiment == experiment
    known = set(connection.scalars(sa.select(cells.c.key).where(mine)))
    new = {cell.key: cell for cell in wanted if cell.key not in known}
    last = connection.scalar(sa.select(sa.func.max(cells.c.ordinal)).where(mine))
    ordinals = itertools.count(0 if last is None else last + 1)
    names = fresh_names(connection, experiment)
    blank = {"experiment": experiment, "state": "pending", "attempt": 0}
    records = [
        {**blank, **vars(cell), "ordinal": ordinal, "name": name}
        for cell, ordinal, name in zip(new.values(), ordinals, names, strict=False)
    ]
    if records:
        connection.execute(sa.insert(cells), records)
    return len(records)


def take(connection: sa.Connection, experiment: str, size: Callable[[Row], int]) -> list[Row]:
    """An interrupted cohort, whole, or else up to `size(first)` pending cells of one structure.

    A cohort is never mixed anew: its checkpoint holds exactly its members. On PostgreSQL the rows are locked
    and the ones that another claim has locked are passed over; SQLite has the whole database locked anyway.
    """
    query = sa.select(*_ROW_COLUMNS).where(cells.c.experiment == experiment).order_by(cells.c.ordinal)
    query = query.with_for_update(skip_locked=True)
    interrupted = query.where(cells.c.state == "interrupted")
    for first in _rows(connection, interrupted.limit(1)):
        return list(_rows(connection, interrupted.where(cells.c.cohort == first.cohort)))
    pending = query.where(cells.c.state == "pending")
    for first in _rows(connection, pending.limit(1)):
        alike = pending.where(cells.c.structure == first.structure)
        return list(_rows(connection, alike.limit(max(1, size(first)))))
    return []


def update(connection: sa.Connection, experiment: str, where: dict[str, Any], **values: Any) -> int:
    """Set columns of this experiment's cells that equal `where`; returns how many there were."""
    equal = [cells.c[column] == value for column, value in where.items()]
    change = sa.update(cells).where(cells.c.experiment == experiment, *equal).values(**values)
    return connection.execute(change).rowcount


def interrupt_dead(connection: sa.Connection, experiment: str, locks: Path) -> int:
    """Give up the cells whose owner has died; returns how many there were.

    Only ever called inside a write transaction: two processes that looked at a dead owner's lock at once
    would each take the other for the living owner.
    """
    running = sa.select(cells.c.owner).where(cells.c.experiment == experiment, cells.c.state == "running")
    dead = [token for token in connection.scalars(running.distinct()) if not is_alive(locks, token)]
    left = {"state": "interrupted", "owner": None}
    return sum(update(connection, experiment, {"owner": token, "state": "running"}, **left) for token in dead)


def rows(connection: sa.Connection, experiment: str, **where: str | None) -> list[Row]:
    """The experiment's cells in plan order, filtered by the given columns that are not None."""
    equal = [cells.c[column] == value for column, value in where.items() if value is not None]
    query = sa.select(*_ROW_COLUMNS).where(cells.c.experiment == experiment, *equal)
    return list(_rows(connection, query.order_by(cells.c.ordinal)))


def _rows(connection: sa.Connection, query: sa.Select[Any]) -> Iterator[Row]:
    return (Row(**record) for record in connection.execute(query).mappings().all())


def points(connection: sa.Connection, experiment: str, rule: str, names: Sequence[str]) -> list[Point]:
    """Where the planned cells of a rule lie in its grid."""
    query = sa.select(cells.c.params).where(cells.c.experiment == experiment, cells.c.rule == rule)
    return [tuple(params[name] for name in names) for params in connection.scalars(query)]


def counts(connection: sa.Connection, experiment: str, rule: str | None) -> dict[str, int]:
    """How many cells are in each of `STATES`, counted by the database."""
    query = sa.select(cells.c.state, sa.func.count()).where(cells.c.experiment == experiment)
    if rule is not None:
        query = query.where(cells.c.rule == rule)
    counted = {record[0]: record[1] for record in connection.execute(query.group_by(cells.c.state))}
    return {state: counted.get(state, 0) for state in STATES}


def cohort_id(members: Iterable[Cell]) -> str:
    """The same cells make the same cohort, in whatever order they were claimed."""
    return hashlib.sha256("\n".join(sorted(cell.key for cell in members)).encode()).hexdigest()[:16]


_ADJECTIVES = """
    able amber brave bright brisk calm candid clever cosmic curious daring deft eager early fair fancy fleet
    gentle glad golden grand happy hardy honest humble jolly keen kind light lively loyal lucid lucky mellow
    merry mighty neat nimble noble patient placid plucky polite proud quick quiet rapid ready royal serene
    sharp silent silver smart snug solar sound spry stable steady stout sunny swift tidy tranquil true vivid
    warm wise witty zesty
"""
_ANIMALS = """
    adder alpaca badger beaver bison bobcat camel caribou cheetah cobra condor cougar crane crow dingo dolphin
    eagle egret falcon ferret finch fox gecko gibbon hare hawk heron hornet ibex ibis iguana impala jackal
    jaguar kestrel koala lark lemur leopard lion llama lynx magpie marlin marmot marten mole moose newt ocelot
    orca osprey otter owl panda parrot pelican puffin puma quail rabbit raven robin salmon seal shrew sparrow
    stork swan tapir tiger toucan trout turtle viper walrus weasel wombat yak zebra
"""


def fresh_names(connection: sa.Connection, experiment: str) -> Iterator[str]:
    """Endless names like `brave-otter-417` that no cell of the experiment has yet."""
    taken = set(connection.scalars(sa.select(cells.c.name).where(cells.c.experiment == experiment)))
    adjectives, animals = _ADJECTIVES.split(), _ANIMALS.split()
    while True:
        name = f"{secrets.choice(adjectives)}-{secrets.choice(animals)}-{secrets.randbelow(1000)}"
        if name not in taken:
            taken.add(name)
            yield name
