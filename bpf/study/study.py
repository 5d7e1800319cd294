"""The study of an experiment: its plan and one Optuna study per learning rule, in one database.

Stock `GridSampler`, `optuna-dashboard` and a notebook read what is written here as an ordinary grid search, but
the cells are handed out by the plan table of `plan.py`, because Optuna's own ways re-read every trial for each new
one, lose interrupted trials and may begin one twice.

Each step (claim, finish, ...) writes our rows and Optuna's in **one** transaction, so that a process killed at any
moment leaves either both or neither. A failure that time mends is waited out, and the whole step done again.
"""

import itertools
import math
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import wraps
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Self, TypeVar, cast

import sqlalchemy as sa

from bpf.errors import BpfError, RunError, UsageError, did_you_mean
from bpf.study import owner as owners
from bpf.study import plan, schema
from bpf.study.database import Database, LostConnection, cause, disk_is_full, passes
from bpf.study.owner import Owner
from bpf.study.plan import Axis, Cell, Claim, Row, Tally, Value

if TYPE_CHECKING:
    from bpf.study.trials import Trials

__all__ = ["Axis", "Cell", "Claim", "Fenced", "Owner", "Row", "Study", "Tally", "Value"]

PATIENCE_SECONDS = 600.0
"""How long a worker waits for a database that is away. It waits for a full disk as long as it takes."""
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0

P = ParamSpec("P")
R = TypeVar("R")


class Fenced(RunError):
    """The cell belongs to another process by now; the outcome was not stored."""


class _Passing(RunError):
    """A failure of the database that time mends."""

    full = False


def _patient(step: "Callable[Concatenate[Study, P], R]") -> "Callable[Concatenate[Study, P], R]":
    """Do a step again, as long as the study has patience, when the database fails in a way that passes."""

    @wraps(step)
    def patiently(self: "Study", *args: P.args, **kwargs: P.kwargs) -> R:
        began, pause = time.monotonic(), FIRST_PAUSE
        self._uncertain = False
        while True:
            try:
                return step(self, *args, **kwargs)
            except _Passing as failure:
                self._uncertain, self._failed_at = True, time.monotonic()
                if not self.patience or (not failure.full and time.monotonic() - began > self.patience):
                    raise RunError(str(failure)) from failure
                self.on_wait(str(failure))
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    return cast("Callable[Concatenate[Study, P], R]", patiently)


class Study:
    """One experiment's cells. Each process opens its own; the threads of one process may share it.

    `locks` is the directory of this machine's owners' lock files: beside an SQLite file, otherwise in the temporary
    directory. `patience` is how many seconds to wait for a database that fails in a way that passes; `on_wait` is
    told each time what the matter is, and may raise to give up.
    """

    def __init__(self, database: Database, experiment: str, settings: dict[str, Any], trials: "Trials | None") -> None:
        self.database = database
        self.experiment = experiment
        self.settings = settings
        self.locks = _locks(database)
        self.patience = 0.0
        self.on_wait: Callable[[str], object] = lambda reason: None
        self._engine = database.connect(reading=trials is None)
        self._trials = trials
        self._lock = threading.Lock()
        self._uncertain = False
        self._failed_at = -math.inf

    @classmethod
    def create(cls, where: str | Path | Database, experiment: str, settings: dict[str, Any]) -> Self:
        """A new experiment in the database at `where` (a path or a URL); a file is made if need be.

        Raises `UsageError` if the experiment exists, or if there can be no such database.
        """
        from bpf.study.trials import Trials, check_optuna

        check_optuna()
        database = Database.at(where)
        with _explained(database):
            database.prepare()
            with database.alone(_locks(database)):
                trials = Trials(database, create=True)
                study = cls(database, experiment, settings, trials)
        try:
            with study._transaction() as connection:
                database.take_turn(connection, "")  # whoever makes another experiment makes the same tables
                schema.metadata.create_all(connection)
                schema.add_experiment(connection, database, experiment, settings)
        except BaseException:
            study.close()
            raise
        return study

    @classmethod
    def open(cls, where: str | Path | Database, experiment: str | None = None, reading: bool = False) -> Self:
        """The experiment in the database at `where`; its name may be left out if there is only one.

        For `reading` no Optuna is needed and nothing is written. Raises `UsageError` if it is not a study
        database, is one of another version, or has no such experiment.
        """
        database = Database.at(where)
        trials = None
        if not reading:
            from bpf.study.trials import Trials, check_optuna

            check_optuna()
        if database.missing():
            raise UsageError(f"There is no study database {database}.")
        with _explained(database):
            name, settings = _opened(database, experiment, reading)
            if not reading:
                trials = Trials(database)
            return cls(database, name, settings, trials)

    @classmethod
    def exists(cls, where: str | Path | Database, experiment: str) -> bool:
        """Whether a database holds an experiment of this name. Raises `UsageError` if it cannot be read."""
        database = Database.at(where)
        with _explained(database):
            engine = database.connect(reading=True)
            try:
                with engine.connect().execution_options(bpf_reading=True) as connection:
                    return schema.holds(connection, experiment)
            finally:
                engine.dispose()

    @_patient
    def plan(
        self,
        axes: Mapping[str, Sequence[Axis]],
        cells: Iterable[Cell],
        settings: dict[str, Any] | None = None,
        reopened: "Mapping[str, Cell] | None" = None,
        executions: int | None = None,
    ) -> int:
        """Insert the cells that are not there yet, as pending; returns how many were new.

        `axes` gives the parameters of each rule. What they add to the stored axes extends the grid; nothing
        is ever removed, and no cell runs again. Every point of the extended grid must be planned. `settings`
        replace those of the experiment. `reopened` says which cells are to be trained for more epochs and what they
        become, by their old key; with `executions` the complete cells that have fewer get the missing ones.
        """
        cells = list(cells)
        with self._transaction() as connection:
            for rule, wanted in axes.items():
                self._extend(connection, rule, wanted)
            if reopened:
                self._lengthen(connection, reopened)
            if executions:
                self._add_executions(connection, executions)
            new = plan.insert(connection, self.experiment, cells)
            for rule in {cell.rule for cell in cells} | set(axes):
                self._check_full(connection, rule)
            if settings is not None:
                mine = schema.experiments.c.name == self.experiment
                connection.execute(sa.update(schema.experiments).where(mine).values(settings=settings))
        self.settings = self.settings if settings is None else settings
        return new

    @_patient
    def claim(self, owner: Owner, size: Callable[[Row], int]) -> Claim | None:
        """Cells to train: an interrupted cohort, or else up to `size(first pending cell)` of its structure.

        None if nobody left anything and nothing is pending. `size` must not use the study.
        """
        with self._transaction() as connection:
            owners.enroll(connection, self.experiment, owner)
            mine = plan.rows(connection, self.experiment, owner=owner.token, state="running") if self._uncertain else []
            if mine:  # claimed before, but the answer was lost
                return Claim(owner.token, mine[0].cohort or "", mine)
            self._bury(connection)
            rows = plan.take(connection, self.experiment, size)
            if not rows:
                return None
            cohort = rows[0].cohort or plan.cohort_id(rows)
            stored = self._stored(connection)
            begun = [
                self._begin(connection, replace(row, cohort=cohort), owner.token, *stored[row.rule]) for row in rows
            ]
        return Claim(owner.token, cohort, begun)

    @_patient
    def progressed(self, claim: Claim, epoch: int) -> None:
        """Note that a cohort that goes on has a checkpoint of `epoch`: deaths before it are forgiven."""
        with self._transaction() as connection:
            for row in claim.rows:
                if epoch > row.reached:
                    owned = {"key": row.key, "owner": claim.token, "state": "running"}
                    plan.update(connection, self.experiment, owned, reached=epoch, kills=0)

    @_patient
    def release(self, claim: Claim, *, max_runs: int | None = None, cause: str | None = None) -> int:
        """Give back what is unfinished of a claim; returns how many cells that are.

        They go on in the same trials, which Optuna shows as running meanwhile: so their start time stays,
        and no stock sampler takes them. With `max_runs` they become pending, to be begun anew with no more runs
        stacked than that; `cause` says why.
        """
        left = {"owner": claim.token, "cohort": claim.cohort, "state": "running"}
        change: dict[str, Any] = {"state": "interrupted"}
        if max_runs is not None:
            change = {"state": "pending", "cohort": None, "max_runs": max_runs, "cause": cause, "kills": 0}
        with self._transaction() as connection:
            return plan.update(connection, self.experiment, left, owner=None, **change)

    @_patient
    def finish(
        self, claim: Claim, key: str, value: float | None, state: str, result: dict[str, Any], history: Any = None
    ) -> None:
        """Store the outcome of a cell, `complete` or `diverged`, with its history, and end its trial.

        A diverged cell is a result without a value: never the best, never tried again. Raises `Fenced` if
        the cell is no longer the claim's, and stores nothing then.
        """
        if state not in ("complete", "diverged"):
            raise ValueError(f"A cell finishes as 'complete' or 'diverged', not as {state!r}.")
        if state == "complete" and (value is None or not math.isfinite(value)):
            raise ValueError(f"A complete cell has a finite value, not {value}; did it diverge?")
        value = value if state == "complete" else None
        with self._transaction() as connection:
            changed = {"state": state, "value": value, "result": result, "seconds": result.get("seconds")}
            row = self._settle(connection, claim, key, **changed, error=None, kills=0)
            if row is not None and row.trial_id is not None:
                if history is not None:
                    plan.keep_history(connection, self.experiment, key, history)
                self._optuna.end(row.trial_id, state, value, result=result)

    @_patient
    def fail(self, claim: Claim, key: str, error: str, cause: str = "exception") -> None:
        """Store that a cell failed: with the text of its traceback, or out of memory. Fenced like `finish`."""
        with self._transaction() as connection:
            row = self._settle(connection, claim, key, state="failed", error=error, cause=cause)
            if row is not None and row.trial_id is not None:
                self._optuna.end(row.trial_id, "failed", None, error=error, cause=cause)

    @_patient
    def retry_failed(self) -> int:
        """Make the failed cells pending again; returns how many there were.

        Each gets a new trial with a new name, as Optuna never revives a failed one.
        """
        with self._transaction() as connection:
            failed = plan.rows(connection, self.experiment, state="failed")
            names = plan.free_names(connection, self.experiment)
            blank = {"owner": None, "cohort": None, "attempt": 0, "trial_id": None, "trial_number": None}
            blank |= {"error": None, "cause": None, "kills": 0, "reached": 0, "max_runs": None}
            for row, name in zip(failed, names, strict=False):
                plan.update(connection, self.experiment, {"key": row.key}, state="pending", name=name, **blank)
        return len(failed)

    @_patient
    def repair(self, blame: bool = True) -> int:
        """Clear up after dead processes; returns how many cells they left.

        Without `blame` their deaths do not count against the cells, as when a person has killed them on purpose.
        There is never a half-written cell to mend: see the top of this module.
        """
        with self._transaction() as connection:
            left = self._bury(connection, blame)
            if self.database.path:  # elsewhere other experiments' locks lie beside ours
                owners.sweep(self.locks)
        return left

    @contextmanager
    def renewing(self, owner: Owner) -> Iterator[None]:
        """Keep the owner's lease alive meanwhile, in a thread; where the lock alone decides there is none."""
        if self.database.path:
            yield
            return
        stop = threading.Event()

        def renew() -> None:
            while not stop.wait(owners.RENEW_SECONDS):
                lost = owner.lost  # of this token: the owner may get another one meanwhile
                try:
                    with self._engine.begin() as connection:
                        owners.renew(connection, self.experiment, owner)
                        if owners.is_retired(connection, self.experiment, owner):
                            lost.set()
                except (sa.exc.DBAPIError, LostConnection):  # it comes back, or the lease runs out
                    self._failed_at = time.monotonic()

        thread = threading.Thread(target=renew, name="bpf-lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    @_patient
    def retire(self, owner: Owner) -> None:
        """Note that an owner ends its work; what it has not released counts as interrupted from here on."""
        with self._transaction() as connection:
            owners.retire(connection, self.experiment, owner.token)

    @_patient
    def counts(self, rule: str | None = None) -> dict[str, int]:
        """How many cells are in each state. Only cells whose owner is alive count as running."""
        counted = dict.fromkeys(plan.STATES, 0)
        for tally in self.tally():
            if rule in (None, tally.rule):
                counted[tally.state] += tally.count
        return counted

    @_patient
    def tally(self) -> list[Tally]:
        """The cells by rule, state and cause. Those whose owner has died count as interrupted."""
        with self._reading() as connection:
            return plan.tally(connection, self.experiment, self._dead(connection))

    @_patient
    def rows(self, state: str | None = None, rule: str | None = None) -> list[Row]:
        """The cells in plan order. It reads all of them: for reports, not for polling."""
        with self._reading() as connection:
            rows = plan.rows(connection, self.experiment, rule=rule)
            dead = self._dead(connection) if any(row.state == "running" for row in rows) else ()
        rows = [replace(r, state="interrupted") if r.state == "running" and r.owner in dead else r for r in rows]
        return [row for row in rows if state in (None, row.state)]

    @_patient
    def best(self, rule: str) -> tuple[str, float] | None:
        """The key and value of the best complete cell of a rule."""
        with self._reading() as connection:
            return plan.best(connection, self.experiment, rule)

    @_patient
    def leaders(self, rule: str, limit: int) -> list[Row]:
        """The best complete cells of a rule, best first. It reads only these."""
        with self._reading() as connection:
            return plan.leaders(connection, self.experiment, rule, limit)

    @_patient
    def finished(self, keys: Iterable[str]) -> set[str]:
        """Which of the cells will not be trained any more."""
        with self._reading() as connection:
            return plan.finished(connection, self.experiment, list(keys))

    @_patient
    def history(self, key: str) -> Any:
        """What `finish` was given as the history of a cell, or None."""
        with self._reading() as connection:
            return plan.history(connection, self.experiment, key)

    @_patient
    def workers(self) -> list[dict[str, Any]]:
        """Who works on the experiment now: `token`, `pid`, `machine`, `facts`, `began`."""
        with self._reading() as connection:
            return owners.living(connection, self.experiment, self.locks if self.database.path else None)

    @_patient
    def rules(self) -> list[str]:
        """The learning rules that are planned."""
        with self._reading() as connection:
            return list(self._stored(connection))

    @_patient
    def axes(self, rule: str) -> list[Axis]:
        """The parameters of a rule, with every value that was ever planned."""
        with self._reading() as connection:
            stored = self._stored(connection)
        if rule not in stored:
            raise UsageError(f"No learning rule {rule!r} in {self.experiment!r}." + did_you_mean(rule, stored))
        return stored[rule][1]

    def varying(self) -> frozenset[str]:
        """The parameters with more than one value: what never changes says nothing in a table."""
        names = {axis.name for rule in self.rules() for axis in self.axes(rule) if len(axis.values) > 1}
        return frozenset(names | ({"lr"} if self.settings["spec"].get("lr_from") else set()))

    def search_space(self, rule: str) -> dict[str, list[Value]]:
        """What `optuna.samplers.GridSampler` needs to read the rule's Optuna study as its own grid."""
        return {axis.name: list(axis.values) for axis in self.axes(rule)}

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

    @property
    def _optuna(self) -> "Trials":
        assert self._trials is not None, "a study that was opened for reading"
        return self._trials

    @contextmanager
    def _transaction(self) -> Iterator[sa.Connection]:
        """One write transaction for our tables and for Optuna's; one at a time per experiment."""
        with self._lock, _failing(self.database), self._engine.begin() as connection:
            self.database.take_turn(connection, self.experiment)
            with self._optuna.within(connection):
                yield connection

    @contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        with self._lock, _failing(self.database), self._engine.connect() as connection:
            yield connection.execution_options(bpf_reading=True)

    def _stored(self, connection: sa.Connection) -> dict[str, tuple[int, list[Axis]]]:
        query = sa.select(schema.rules).where(schema.rules.c.experiment == self.experiment)
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
            study_id = self._optuna.new_study(self.study_name(rule))
            record = {**where, "study_id": study_id, "axes": [asdict(axis) for axis in after]}
            connection.execute(sa.insert(schema.rules).values(record))
        elif after != before:
            change = sa.update(schema.rules).where(*(schema.rules.c[name] == where[name] for name in where))
            connection.execute(change.values(axes=[asdict(axis) for axis in after]))
            self._optuna.extend(connection, study_id, before, after)

    def _lengthen(self, connection: sa.Connection, reopened: Mapping[str, Cell]) -> None:
        """Make cells those of longer runs. The complete ones go on from the checkpoint of their cohort."""
        going_on = []
        for row in plan.rows(connection, self.experiment):
            if row.key not in reopened:
                continue
            change: dict[str, Any] = {k: v for k, v in vars(reopened[row.key]).items() if k not in ("rule", "params")}
            if row.state == "complete" and ran_to_the_end(row):
                change |= {"state": "interrupted", "value": None, "result": None, "seconds": None}
                going_on.append(row.trial_id)
            plan.update(connection, self.experiment, {"key": row.key}, **change)
            plan.rename_history(connection, self.experiment, row.key, reopened[row.key].key)
        self._optuna.reopen(connection, [trial_id for trial_id in going_on if trial_id is not None])

    def _add_executions(self, connection: sa.Connection, executions: int) -> None:
        """Open the complete cells that have fewer executions; they keep the results of those they have."""
        short = [row for row in plan.rows(connection, self.experiment, state="complete") if row.done < executions]
        for row in short:
            blank = {"state": "pending", "cohort": None, "value": None, "reached": 0}
            plan.update(connection, self.experiment, {"key": row.key}, **blank)
        self._optuna.reopen(connection, [row.trial_id for row in short if row.trial_id is not None])

    def _check_full(self, connection: sa.Connection, rule: str) -> None:
        """GridSampler knows only whole grids; one with holes would never be exhausted."""
        _, axes = self._stored(connection)[rule]
        space = {axis.name: list(axis.values) for axis in axes}
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
        row = replace(row, state="running", owner=token, attempt=row.attempt + 1)
        if row.trial_id is None:
            trial_id, number = self._optuna.begin(connection, row, study_id, axes)
            row = replace(row, trial_id=trial_id, trial_number=number)
        else:
            self._optuna.note(row.trial_id, attempt=row.attempt)
        changed = ("state", "cohort", "owner", "attempt", "trial_id", "trial_number")
        plan.update(connection, self.experiment, {"key": row.key}, **{name: getattr(row, name) for name in changed})
        return row

    def _settle(self, connection: sa.Connection, claim: Claim, key: str, **values: Any) -> Row | None:
        """End a cell that the claim still owns; returns it, or None if that is done already."""
        row = next(row for row in claim.rows if row.key == key)
        owned = {"key": key, "owner": claim.token, "state": "running"}
        if plan.update(connection, self.experiment, owned, **values) == 1:  # `owner` stays: it says who did it
            return row
        done = {"key": key, "owner": claim.token, "state": values["state"]}
        if self._uncertain and plan.rows(connection, self.experiment, **done):  # but the answer was lost
            return None
        raise Fenced(f"The cell {row.name} ({key}) is no longer owned by this process; its outcome was not stored.")

    def _bury(self, connection: sa.Connection, blame: bool = True) -> int:
        """Take the cells of owners that have died; returns how many there were."""
        left = 0
        for token in self._dead(connection):
            owners.retire(connection, self.experiment, token)
            for row in plan.interrupt(connection, self.experiment, token, blame):
                left += 1
                if row.trial_id is not None and row.state == "failed":
                    self._optuna.end(row.trial_id, "failed", None, error=row.error, cause=row.cause)
                elif row.trial_id is not None:
                    self._optuna.note(row.trial_id, cause=row.cause)
            if self.database.path:
                (self.locks / f"{token}.lock").unlink(missing_ok=True)
        return left

    def _dead(self, connection: sa.Connection) -> set[str]:
        tokens = plan.owners_at_work(connection, self.experiment)
        # After an outage of the database everyone's lease has run out: they need time to renew them.
        trust_leases = time.monotonic() - self._failed_at > owners.LEASE_SECONDS
        return owners.dead(
            connection, self.experiment, tokens, self.locks if self.database.path else None, trust_leases
        )


def ran_to_the_end(row: Row) -> bool:
    """Whether any execution of a finished cell ended because its epochs were over, and not earlier."""
    executions = (row.result or {}).get("executions", [])
    return any(execution["epochs"] >= row.spec["epochs"] for execution in executions)


def _locks(database: Database) -> Path:
    if database.path:
        return database.path.parent / "locks"
    return Path(tempfile.gettempdir()) / f"bpf-locks-{_user()}"


def _user() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return "unknown"


def _opened(database: Database, experiment: str | None, reading: bool) -> tuple[str, dict[str, Any]]:
    """The name and the settings of an experiment, which is brought to this format if need be."""
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


@contextmanager
def _explained(database: Database) -> Iterator[None]:
    """What can be wrong with a database that is opened, in words for its user."""
    try:
        yield
    except BpfError:
        raise
    except (sa.exc.SQLAlchemyError, LostConnection, OSError, RuntimeError, ImportError, ValueError) as error:
        raise _explanation(database, error) from error
    except Exception as error:
        if not type(error).__module__.startswith(("sqlite3", "psycopg", "optuna")):
            raise
        raise _explanation(database, error) from error


def _explanation(database: Database, error: BaseException) -> BpfError:
    if isinstance(error, RuntimeError | ImportError):  # Optuna's: its tables' version, a driver
        return UsageError(f"{database} cannot be used with this optuna: {error}")
    if disk_is_full(error):
        return RunError(f"{database} cannot be used as a study database: {cause(error)}.")
    if database.path:
        return UsageError(f"{database} cannot be used as a study database: {cause(error)}.")
    said = cause(error).rstrip(".")
    if "password" in said or "authentication" in said:
        cure = "Check the user and the password; PGPASSWORD or ~/.pgpass keep it out of command lines."
    elif "does not exist" in said:
        cure = "Create it on the server, or check the URL."
    else:
        cure = "Check that the server runs and can be reached from here."
    return UsageError(f"The study database {database} cannot be used: {said}. {cure}")


@contextmanager
def _failing(database: Database) -> Iterator[None]:
    try:
        yield
    except BpfError:
        raise
    except Exception as error:
        if not isinstance(error, sa.exc.SQLAlchemyError | LostConnection) and not type(error).__module__.startswith(
            ("optuna", "sqlite3", "psycopg")
        ):
            raise
        if not passes(error):
            raise RunError(f"The study database failed: {cause(error)}.") from error
        failure = _Passing(f"The study database failed: {cause(error)}.")
        failure.full = disk_is_full(error)
        raise failure from error
