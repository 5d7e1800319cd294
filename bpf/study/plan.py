"""The plan table: which cells an experiment has, who trains them and what came out.

Optuna is not known here. It has no notion of a cell that is planned but not begun, of a process that owns a
trial, or of a cohort, so these live in tables of our own beside Optuna's, in the same database. A state only
ever changes inside a transaction that `study.py` opens.
"""

import hashlib
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import sqlalchemy as sa

from bpf.study import stored
from bpf.study.cells import OPEN, Axis, Cell, Point, Row, Tally
from bpf.study.names import fresh_names
from bpf.study.schema import cells, histories, rules

KILLS = 3
"""A cell whose worker has died as often, without getting any further in between, is set aside."""

LOOKED_AT = 1000
"""So many cells at most are looked at for those that come next."""

_ROW_NAMES = [field.name for field in fields(Row)]
_TALLIED = [field.name for field in fields(Tally)]
_ROW_COLUMNS = [cells.c[name] for name in _ROW_NAMES]


def study_name(experiment: str, rule: str) -> str:
    """The name of the Optuna study that holds the trials of a rule."""
    return f"{experiment}/{rule}"


def axes(connection: sa.Connection, experiment: str) -> dict[str, tuple[int, list[Axis]]]:
    """The rules that are planned, each with the id of its Optuna study and its parameters."""
    found = connection.execute(sa.select(rules).where(rules.c.experiment == experiment)).all()
    return {stored.rule(one.rule): (one.study_id, stored.axes(one.axes, one.rule)) for one in found}


def insert(connection: sa.Connection, experiment: str, wanted: Iterable[Cell]) -> int:
    """Append the cells whose key is not yet planned, as pending; returns how many there were."""
    mine = cells.c.experiment == experiment
    known = {stored.word(key) for key in connection.scalars(sa.select(cells.c.key).where(mine))}
    new = {cell.key: cell for cell in wanted if cell.key not in known}
    last = connection.scalar(sa.select(sa.func.max(cells.c.ordinal)).where(mine))
    ordinals = itertools.count(0 if last is None else last + 1)
    blank = {"experiment": experiment, "state": "pending", "attempt": 0}
    records = [
        {**blank, **vars(cell), "ordinal": ordinal, "name": name}
        for cell, ordinal, name in zip(new.values(), ordinals, free_names(connection, experiment), strict=False)
    ]
    if records:
        connection.execute(sa.insert(cells), records)
    return len(records)


def free_names(connection: sa.Connection, experiment: str) -> Iterator[str]:
    """Endless names that no cell of the experiment has yet."""
    return fresh_names(connection.scalars(sa.select(cells.c.name).where(cells.c.experiment == experiment)))


def take(connection: sa.Connection, experiment: str, size: Callable[[Row], int]) -> list[Row]:
    """An interrupted cohort, whole, or else up to `size(first)` pending cells of one structure.

    A cohort is never mixed anew: its checkpoint holds exactly its members.
    """
    query = sa.select(*_ROW_COLUMNS).where(cells.c.experiment == experiment).order_by(cells.c.ordinal)
    interrupted = query.where(cells.c.state == "interrupted")
    for first in _rows(connection, interrupted.limit(1)):
        return list(_rows(connection, interrupted.where(cells.c.cohort == first.cohort)))
    pending = query.where(cells.c.state == "pending")
    for first in _rows(connection, pending.limit(1)):
        alike = pending.where(cells.c.structure == first.structure, _is(cells.c.max_runs, first.max_runs))
        return list(_rows(connection, alike.limit(max(1, size(first)))))
    return []


def upcoming(connection: sa.Connection, experiment: str, limit: int) -> list[Row]:
    """The first pending cell of each structure and `max_runs`, of so many kinds at most, among the next cells."""
    pending = (cells.c.experiment == experiment, cells.c.state == "pending")
    query = sa.select(cells.c.structure, cells.c.max_runs, cells.c.ordinal).where(*pending)
    first: dict[tuple[str, int | None], int] = {}
    for one in connection.execute(query.order_by(cells.c.ordinal).limit(LOOKED_AT)).all():
        first.setdefault((one.structure, one.max_runs), one.ordinal)
    chosen = sa.select(*_ROW_COLUMNS).where(*pending, cells.c.ordinal.in_(list(first.values())[:limit]))
    return list(_rows(connection, chosen.order_by(cells.c.ordinal)))


def update(connection: sa.Connection, experiment: str, where: Mapping[str, Any], **values: Any) -> int:
    """Set columns of this experiment's cells that equal `where`; returns how many there were."""
    equal = [_is(cells.c[column], value) for column, value in where.items()]
    change = sa.update(cells).where(cells.c.experiment == experiment, *equal).values(**values)
    return connection.execute(change).rowcount


def interrupt(connection: sa.Connection, experiment: str, token: str, blame: bool = True) -> list[Row]:
    """Take its cells from an owner that has died; returns them as they stand now.

    They go on from their checkpoint, in the same cohort, as numbers are the same bit for bit only there. At the
    third death without getting further the cells of a cohort are trained apart, one run at a time, as one of them may
    crash the process; that one is set aside at its next death, and a cell that was alone all the time at the third.
    A cell alone that has never got anywhere is trained one run at a time after its second death: it may need too much
    memory. Without `blame` the death does not count.
    """
    left = rows(connection, experiment, owner=token, state="running")
    alone = len(left) == 1
    for row in left:
        kills = row.kills + blame
        change: dict[str, Any] = {"owner": None, "kills": kills, "cause": "killed", "state": "interrupted"}
        if not blame:
            change["cause"] = row.cause
        elif kills >= KILLS and alone:
            error = f"It killed its worker {kills} times: a crash of the whole process, or too little memory."
            change |= {"state": "failed", "error": error}
        elif kills >= KILLS or (kills == KILLS - 1 and alone and not row.reached):
            change |= {"state": "pending", "cohort": None, "max_runs": 1}
        update(connection, experiment, {"key": row.key}, **change)
    return [row for old in left for row in rows(connection, experiment, key=old.key)]


def rows(connection: sa.Connection, experiment: str, **where: str | None) -> list[Row]:
    """The experiment's cells in plan order, filtered by the given columns that are not None."""
    equal = [cells.c[column] == value for column, value in where.items() if value is not None]
    query = sa.select(*_ROW_COLUMNS).where(cells.c.experiment == experiment, *equal)
    return stored.alike(list(_rows(connection, query.order_by(cells.c.ordinal))))


def _rows(connection: sa.Connection, query: sa.Select[Any]) -> Iterator[Row]:
    return map(stored.row, connection.execute(query).mappings().all())


def _is(column: sa.Column[Any], value: Any) -> sa.ColumnElement[bool]:
    return column.is_(None) if value is None else column == value


def points(connection: sa.Connection, experiment: str, rule: str, names: Sequence[str]) -> list[Point]:
    """Where the planned cells of a rule lie in its grid."""
    query = sa.select(cells.c.key, cells.c.params).where(cells.c.experiment == experiment, cells.c.rule == rule)
    return [stored.point(one.params, names, one.key) for one in connection.execute(query).all()]


def tally(connection: sa.Connection, experiment: str, dead: Collection[str] = ()) -> list[Tally]:
    """How many cells there are of each rule, state and cause, added up by the database.

    Those that `dead` owners were training count as interrupted.
    """
    state: sa.ColumnElement[str] = cells.c.state
    if dead:
        state = sa.case((sa.and_(state == "running", cells.c.owner.in_(dead)), "interrupted"), else_=state)
    by = (cells.c.rule, state.label("standing"), cells.c.cause)
    sums = (sa.func.coalesce(sa.func.sum(column), 0.0) for column in (cells.c.cost, cells.c.seconds))
    query = sa.select(*by, sa.func.count(), *sums).where(cells.c.experiment == experiment)
    query = query.group_by(cells.c.rule, sa.text("standing"), cells.c.cause)
    return [stored.tally(dict(zip(_TALLIED, record, strict=True))) for record in connection.execute(query).all()]


def best(connection: sa.Connection, experiment: str, rule: str) -> tuple[str, float] | None:
    """The key and the value of the best complete cell of a rule, the first of equal ones."""
    mine = (cells.c.experiment == experiment, cells.c.rule == rule, cells.c.state == "complete")
    query = sa.select(cells.c.key, cells.c.value).where(*mine).order_by(cells.c.value, cells.c.ordinal).limit(1)
    found = connection.execute(query).first()
    return None if found is None else (stored.word(found.key), stored.value(found.value))


def leaders(connection: sa.Connection, experiment: str, rule: str, limit: int) -> list[Row]:
    """The best complete cells of a rule, best first."""
    mine = (cells.c.experiment == experiment, cells.c.rule == rule, cells.c.state == "complete")
    query = sa.select(*_ROW_COLUMNS).where(*mine).order_by(cells.c.value, cells.c.ordinal).limit(limit)
    return list(_rows(connection, query))


def finished(connection: sa.Connection, experiment: str, keys: Sequence[str]) -> set[str]:
    """Which of the cells are planned and in none of the `OPEN` states."""
    mine = (cells.c.experiment == experiment, cells.c.key.in_(keys), cells.c.state.not_in(OPEN))
    return set(connection.scalars(sa.select(cells.c.key).where(*mine)))


def states(connection: sa.Connection, experiment: str, token: str, keys: Sequence[str]) -> dict[str, str]:
    """The states of those of the cells that an owner has or had last, by their keys."""
    mine = (cells.c.experiment == experiment, cells.c.key.in_(keys), cells.c.owner == token)
    return {found.key: found.state for found in connection.execute(sa.select(cells.c.key, cells.c.state).where(*mine))}


def change(connection: sa.Connection, experiment: str, changes: Sequence[Mapping[str, Any]]) -> None:
    """Set columns of cells, each of which is named by the `key` among its values."""
    where = (cells.c.experiment == experiment, cells.c.key == sa.bindparam("at"))
    records = [{"at" if name == "key" else name: value for name, value in one.items()} for one in changes]
    connection.execute(sa.update(cells).where(*where), records)


def keep_histories(connection: sa.Connection, experiment: str, records: Mapping[str, Any]) -> None:
    """Keep the histories of cells, by their keys, in place of earlier ones."""
    if records:
        where = (histories.c.experiment == experiment, histories.c.key.in_(list(records)))
        connection.execute(sa.delete(histories).where(*where))
        new = [{"experiment": experiment, "key": key, "records": kept} for key, kept in records.items()]
        connection.execute(sa.insert(histories), new)


def rename_history(connection: sa.Connection, experiment: str, old: str, new: str) -> None:
    where = (histories.c.experiment == experiment, histories.c.key == old)
    connection.execute(sa.update(histories).where(*where).values(key=new))


def history(connection: sa.Connection, experiment: str, key: str) -> list[dict[str, Any]] | None:
    where = (histories.c.experiment == experiment, histories.c.key == key)
    records = connection.scalar(sa.select(histories.c.records).where(*where))
    return None if records is None else stored.history(records, key)


def cohort_id(members: Iterable[Row]) -> str:
    """The same cells, with the same executions left to do, make the same cohort in whatever order."""
    marks = sorted(f"{row.key}:{row.done}" if row.done else row.key for row in members)
    return hashlib.sha256("\n".join(marks).encode()).hexdigest()[:16]
