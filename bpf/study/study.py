"""The study of an experiment: its plan and one Optuna study per learning rule, in one database.

Stock `GridSampler`, `optuna-dashboard` and a notebook read what is written here as an ordinary grid search, but
the cells are handed out by the plan table of `plan.py`, because Optuna's own ways re-read every trial for each new
one, lose interrupted trials and may begin one twice.

Each step (claim, finish, ...) writes our rows and Optuna's in **one** transaction, so that a process killed at any
moment leaves either both or neither. A failure that time mends is waited out, and the whole step done again.
"""

import json
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, cast

import sqlalchemy as sa

from bpf.errors import BpfError, RunError
from bpf.files import explaining
from bpf.study import owner as owners
from bpf.study import plan, schema
from bpf.study.cells import Axis, Cell, Claim, Finished, Row
from bpf.study.database import Database, LostConnection
from bpf.study.growth import Growth
from bpf.study.holder import Holder, Progress
from bpf.study.owner import Owner
from bpf.study.patience import explained, failing, patient
from bpf.study.seam import Fenced
from bpf.study.trials import Ending, Trials, check_optuna, make_tables
from bpf.study.view import StudyView, locks_of, read_settings


class Study(StudyView):
    """One experiment's cells, to be planned and trained. Each process opens its own."""

    def __init__(self, database: Database, experiment: str, settings: dict[str, Any]) -> None:
        super().__init__(database, experiment, settings, database.connect())
        self._optuna = Trials()
        self._waits_for_cells = False

    @classmethod
    def create(cls, where: str | Path | Database, experiment: str, settings: dict[str, Any]) -> Self:
        """A new experiment in the database at `where` (a path or a URL); a file is made if need be.

        Raises `UsageError` if the experiment exists, or if there can be no such database.
        """
        check_optuna()
        database = Database.at(where)
        with explained(database):
            database.prepare()
            with database.alone(locks_of(database)):
                make_tables(database)
                study = cls(database, experiment, settings)
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
    def open(cls, where: str | Path | Database, experiment: str | None = None) -> Self:
        """As `StudyView.open`, for writing. Raises UsageError also for an Optuna that bpf cannot work with."""
        database = Database.at(where)
        check_optuna()
        name, settings = read_settings(database, experiment, reading=False)
        with explained(database):
            return cls(database, name, settings)

    @patient
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
            growth = Growth(connection, self.experiment, self._optuna)
            for rule, wanted in axes.items():
                growth.extend(rule, wanted)
            if reopened:
                growth.lengthen(reopened)
            if executions:
                growth.add_executions(executions)
            new = plan.insert(connection, self.experiment, cells)
            for rule in {cell.rule for cell in cells} | set(axes):
                growth.check_full(rule)
            if settings is not None:
                mine = schema.experiments.c.name == self.experiment
                connection.execute(sa.update(schema.experiments).where(mine).values(settings=settings))
        self.settings = self.settings if settings is None else settings
        return new

    @patient
    def claim(self, owner: Owner, size: Callable[[Row], int]) -> Claim | None:
        """Cells to train: an interrupted cohort, or else up to `size(first pending cell)` of its structure.

        None if nobody left anything and nothing is pending. `size` must not use the study.
        """
        with self._empty_handed(), self._transaction() as connection:
            owners.enroll(connection, self.experiment, owner)
            mine = plan.rows(connection, self.experiment, owner=owner.token, state="running") if self.uncertain else []
            if mine:  # claimed before, but the answer was lost
                return Claim(owner.token, mine[0].cohort or "", mine)
            self._bury(connection)
            rows = plan.take(connection, self.experiment, size)
            if not rows:
                return None
            cohort = rows[0].cohort or plan.cohort_id(rows)
            begun = self._begin(connection, [replace(row, cohort=cohort) for row in rows], owner.token)
        return Claim(owner.token, cohort, begun)

    @patient
    def progressed(self, claim: Claim, epoch: int) -> None:
        """Note that a cohort that goes on has a checkpoint of `epoch`: deaths before it are forgiven."""
        with self._transaction() as connection:
            for row in claim.rows:
                if epoch > row.reached:
                    owned = {"key": row.key, "owner": claim.token, "state": "running"}
                    plan.update(connection, self.experiment, owned, reached=epoch, kills=0)

    @patient
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

    @patient
    def finish(self, claim: Claim, *finished: Finished) -> None:
        """Store what came out of cells of a claim with their histories, and end their trials: of all of them, or none.

        Raises `Fenced` if any is no longer the claim's, and stores nothing then.
        """
        same = {"error": None, "kills": 0}
        changes = [
            {"key": one.key, "state": one.state, "value": one.value, "result": one.result, "seconds": one.seconds}
            | same
            for one in finished
        ]
        histories = {one.key: one.history for one in finished if one.history is not None}
        with self._transaction() as connection:
            trials = self._settle(connection, claim, changes)
            if trials:
                plan.keep_histories(connection, self.experiment, histories)
                ends = [Ending(trials[one.key], one.state, one.value, {"result": one.result}) for one in finished]
                self._optuna.end(connection, ends)

    @patient
    def fail(self, claim: Claim, key: str, error: str, cause: str = "exception") -> None:
        """Store that a cell failed: with the text of its traceback, or out of memory. Fenced like `finish`."""
        with self._transaction() as connection:
            change = {"key": key, "state": "failed", "error": error, "cause": cause}
            for trial_id in self._settle(connection, claim, [change]).values():
                self._optuna.end(connection, [Ending(trial_id, "failed", None, {"error": error, "cause": cause})])

    @patient
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

    @patient
    def repair(self, blame: bool = True, gone: Collection[str] = ()) -> int:
        """Clear up after dead processes; returns how many cells they left.

        Without `blame` their deaths do not count against the cells, as when a person has killed them on purpose. `gone`
        are tokens of owners that are known to be dead. There is never a half-written cell to mend: see the top of this
        module.
        """
        with self._transaction() as connection:
            left = self._bury(connection, blame, gone)
            if self.database.path:  # elsewhere other experiments' locks lie beside ours
                owners.sweep(self.locks)
        return left

    @contextmanager
    def enrolled(self, facts: dict[str, Any]) -> Iterator[Owner]:
        """Be an owner of cells, known as alive meanwhile. Whoever leaves by itself is retired, with its last facts."""
        with explaining(self.locks):
            owner = Owner(self.locks, facts)
        with owner, self.renewing(owner):
            try:
                yield owner
            except BpfError:
                self.patience = 0.0
                with suppress(RunError):  # with the database away, the lock says as much
                    self.retire(owner)
                raise
            self.retire(owner)

    @contextmanager
    def renewing(self, owner: Owner) -> Iterator[None]:
        """Keep the owner's lease alive meanwhile, in a thread; where the lock alone decides there is none.

        Not while it waits for its turn to claim: it has nothing to lose then, and a thousand that wait would each need
        a second connection.
        """
        if self.database.path:
            yield
            return
        stop = threading.Event()

        def renew() -> None:
            while not stop.wait(owners.RENEW_SECONDS):
                if self._waits_for_cells:
                    continue
                lost = owner.lost  # of this token: the owner may get another one meanwhile
                try:
                    with self._engine.begin() as connection:
                        owners.renew(connection, self.experiment, owner)
                        if owners.is_retired(connection, self.experiment, owner):
                            lost.set()
                except (sa.exc.DBAPIError, LostConnection):  # it comes back, or the lease runs out
                    self.failed_at = time.monotonic()

        thread = threading.Thread(target=renew, name="bpf-lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    @contextmanager
    def _empty_handed(self) -> Iterator[None]:
        """The owner has nothing now, unless it is `uncertain` what it has."""
        self._waits_for_cells = not self.uncertain
        try:
            yield
        finally:
            self._waits_for_cells = False

    def note(self, owner: Holder, progress: Progress) -> None:
        """Let readers know how far the owner is. It never waits and never fails: a busy or absent database is left so.

        On a server it is written together with the lease, every `RENEW_SECONDS`.
        """
        owner.facts = owner.facts | {"at": progress.model_dump()}
        if self.database.path is None:
            return
        change = "UPDATE bpf_owners SET facts = ? WHERE experiment = ? AND token = ? AND lease > 0"
        values = (json.dumps(owner.facts), self.experiment, owner.token)
        place = f"{self.database.path.as_uri()}?mode=rw"
        with (
            suppress(sqlite3.Error),
            closing(sqlite3.connect(place, uri=True, timeout=0, isolation_level=None)) as connection,
        ):
            connection.execute(change, values)

    @patient
    def retire(self, owner: Holder) -> None:
        """Note that an owner ends its work; what it has not released counts as interrupted from here on."""
        with self._transaction() as connection:
            owners.retire(connection, self.experiment, owner.token, owner.facts)

    @contextmanager
    def _transaction(self) -> Iterator[sa.Connection]:
        """One write transaction for our tables and for Optuna's; one at a time per experiment."""
        with self._lock, failing(self.database), self._engine.begin() as connection:
            self.database.take_turn(connection, self.experiment)
            yield connection

    def _begin(self, connection: sa.Connection, rows: list[Row], token: str) -> list[Row]:
        """Give cells to the owner: those that have no trial get one, the others go on in theirs."""
        begun = [replace(row, state="running", owner=token, attempt=row.attempt + 1) for row in rows]
        stored = plan.axes(connection, self.experiment)
        trials: dict[str, tuple[int, int]] = {}
        for rule in {row.rule for row in begun if row.trial_id is None}:
            new = [row for row in begun if row.rule == rule and row.trial_id is None]
            trials |= self._optuna.begin(connection, new, *stored[rule])
        old = {row.trial_id: {"attempt": row.attempt} for row in begun if row.trial_id is not None}
        if old:
            self._optuna.note(connection, old)
        begun = [
            replace(row, trial_id=trials[row.key][0], trial_number=trials[row.key][1]) if row.key in trials else row
            for row in begun
        ]
        changed = ("key", "state", "cohort", "owner", "attempt", "trial_id", "trial_number")
        plan.change(connection, self.experiment, [{name: getattr(row, name) for name in changed} for row in begun])
        return begun

    def _settle(self, connection: sa.Connection, claim: Claim, changes: list[dict[str, Any]]) -> dict[str, int]:
        """End cells that the claim still owns; returns their trials by their keys, or none if that is done already."""
        rows = {row.key: row for row in claim.rows}
        states = plan.states(connection, self.experiment, claim.token, [change["key"] for change in changes])
        lost = [rows[change["key"]] for change in changes if states.get(change["key"]) != "running"]
        if not lost:
            plan.change(connection, self.experiment, changes)  # `owner` stays: it says who did it
            return {change["key"]: cast(int, rows[change["key"]].trial_id) for change in changes}
        if self.uncertain and all(states.get(change["key"]) == change["state"] for change in changes):
            return {}  # it was done, but the answer was lost
        [row, *_] = lost
        raise Fenced(f"The cell {row.name} ({row.key}) is no longer owned by this process; its outcome was not stored.")

    def _bury(self, connection: sa.Connection, blame: bool = True, gone: Collection[str] = ()) -> int:
        """Take the cells of owners that have died; returns how many there were."""
        left = 0
        for token in self._dead(connection).union(gone):
            owners.retire(connection, self.experiment, token)
            for row in plan.interrupt(connection, self.experiment, token, blame):
                left += 1
                if row.trial_id is not None and row.state == "failed":
                    why = {"error": row.error, "cause": row.cause}
                    self._optuna.end(connection, [Ending(row.trial_id, "failed", None, why)])
                elif row.trial_id is not None:
                    self._optuna.note(connection, {row.trial_id: {"cause": row.cause}})
            if self.database.path:
                lock = self.locks / f"{token}.lock"
                if lock in owners.lock_files(self.locks):
                    lock.unlink(missing_ok=True)
        return left
