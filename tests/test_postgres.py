"""A study on a PostgreSQL server: what SQLite does, and what only many machines and a network can do wrong."""

import itertools
import json
import math
import os
import secrets
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import optuna
import pytest
import sqlalchemy as sa
from optuna.distributions import CategoricalDistribution
from optuna.samplers import GridSampler
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from bpf import api
from bpf.cli import app as cli
from bpf.cluster.remote import Line
from bpf.errors import RunError, UsageError
from bpf.experiment.directory import Experiment, Place
from bpf.spec.grid import GridSpec
from bpf.spec.run import digest
from bpf.study import owner as owners
from bpf.study import plan, schema
from bpf.study.cells import Axis, Cell, Claim, Finished
from bpf.study.database import Database
from bpf.study.owner import Owner
from bpf.study.study import Fenced, Study
from bpf.study.trials import Trials
from bpf.study.view import StudyView
from bpf.workers.events import Ended, Event, Trained, Trouble
from bpf.workers.job import Job, Terms
from bpf.workers.worker import Worker
from clusters import needed_ray
from invented import DIVERGED, IN_SCRIPTS, RECORD, record, result
from servers import PostgresServer
from waiting import SECONDS, eventually

pytestmark = pytest.mark.slow  # a server, and a database of its own for each test

ROOT = Path(__file__).parents[1]
ARCH = Axis("arch", ["100", "500-500"])
RATE = Axis("lr", [0.1, 0.01, 0.001], low=1e-10, high=1e3, log=True)


def cells_of(axes: list[Axis], rule: str = "dfa", epochs: int = 3) -> list[Cell]:
    """Every point; the architecture is what a cohort must share."""
    points = itertools.product(*(axis.values for axis in axes))
    named = [dict(zip([axis.name for axis in axes], point, strict=True)) for point in points]
    return [
        Cell(digest([rule, epochs, params]), rule, f"{rule}/{params.get('arch')}", params, {"epochs": epochs, **params})
        for params in named
    ]


def planned(url: str, axes: list[Axis], name: str = "mine") -> Study:
    study = Study.create(url, name, {"objective": "loss"})
    study.plan({"dfa": axes}, cells_of(axes))
    return study


def many(count: int) -> Axis:
    return Axis("lr", [float(1 + number) for number in range(count)], low=1e-10, high=1e3, log=True)


def claimed(study: Study, owner: Owner, size: int = 1) -> Claim:
    claim = study.claim(owner, lambda row: size)
    assert claim is not None
    return claim


def finish_all(study: Study, owner: Owner, value: float = 1.0) -> int:
    """Complete whatever there is to claim; returns how many cells that were."""
    count = 0
    while (claim := study.claim(owner, lambda row: 2)) is not None:
        for row in claim.rows:
            study.finish(
                claim, Finished(row.key, value + row.ordinal, "complete", result(value + row.ordinal, loss=value))
            )
            count += 1
    return count


def optuna_study(url: str, name: str = "mine/dfa") -> optuna.Study:
    """As a notebook would open it."""
    driver = url.replace("postgresql://", "postgresql+psycopg://")
    storage = RDBStorage(driver, engine_kwargs={"poolclass": sa.NullPool})
    return optuna.load_study(study_name=name, storage=storage)


def query(url: str, statement: str) -> list[tuple[Any, ...]]:
    import psycopg

    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(statement)
        return cursor.fetchall() if cursor.description else []


class Child:
    """A process that runs a script, tells by lines and is told by lines. Its standard error must stay empty."""

    def __init__(self, script: str, *arguments: str) -> None:
        program = IN_SCRIPTS + textwrap.dedent(script)
        command = [sys.executable, "-c", program, *arguments]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        self.process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True, **pipes)

    def hear(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.stderr and self.process.stderr.read()
        return line.rstrip("\n")

    def tell(self, line: str = "go") -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self) -> list[str]:
        """What it told since, after it has ended well."""
        told, complaints = self.process.communicate(timeout=SECONDS)
        assert (self.process.returncode, complaints) == (0, "")
        return told.splitlines()


@pytest.fixture
def child() -> Iterator[Callable[..., Child]]:
    children: list[Child] = []

    def start(script: str, *arguments: str) -> Child:
        children.append(Child(script, *arguments))
        return children[-1]

    yield start
    for started in children:
        started.process.kill()
        started.process.communicate()


@pytest.fixture
def url(postgres_url: str) -> str:
    return postgres_url


@pytest.fixture
def study(url: str) -> Iterator[Study]:
    """Six cells, two structures of three, in plan order."""
    with planned(url, [ARCH, RATE]) as study:
        yield study


@pytest.fixture
def owner(study: Study) -> Iterator[Owner]:
    with Owner(study.locks) as owner:
        yield owner


# As on SQLite


def test_optuna_reads_the_grid_as_its_own(url: str, study: Study, owner: Owner) -> None:
    sampler = GridSampler(study.search_space("dfa"))
    for done in range(6):
        assert not sampler.is_exhausted(optuna_study(url)), f"exhausted after {done} of 6"
        claim = claimed(study, owner)
        study.finish(claim, Finished(claim.rows[0].key, float(done), "complete", result(float(done), loss=[done])))
    assert study.claim(owner, lambda row: 1) is None

    read = optuna_study(url)
    assert sampler.is_exhausted(read)
    assert (read.best_value, read.best_trial.params) == (0.0, {"arch": "100", "lr": 0.1})
    assert [trial.number for trial in read.trials] == list(range(6))
    assert [trial.value for trial in read.trials] == [row.value for row in study.rows()]
    assert [trial.params for trial in read.trials] == [row.params for row in study.rows()]
    assert {trial.state for trial in read.trials} == {TrialState.COMPLETE}
    row = study.rows()[3]
    assert read.trials[3].user_attrs == {
        "name": row.name,
        "cell": row.key,
        "attempt": 1,
        "result": result(3.0, loss=[3]),
    }
    assert_ids_agree(url, study)


def assert_ids_agree(url: str, study: Study) -> None:
    """GridSampler, asked for the point of a trial's grid id, gives the trial's own parameters."""
    read, space = optuna_study(url), study.search_space("dfa")
    sampler = GridSampler(space)
    for trial in read.trials:
        for name, value in trial.params.items():
            assert sampler.sample_independent(read, trial, name, CategoricalDistribution(space[name])) == value


def test_rows_are_the_planned_cells_and_planning_again_changes_nothing(study: Study, owner: Owner) -> None:
    rows = study.rows()
    assert [Cell(row.key, row.rule, row.structure, row.params, row.spec) for row in rows] == cells_of([ARCH, RATE])
    assert [row.ordinal for row in rows] == list(range(6))
    assert {row.state for row in rows} == {"pending"}
    finish_all(study, owner)
    before = study.rows()
    assert study.plan({"dfa": [ARCH, RATE]}, cells_of([ARCH, RATE]), {"objective": "error"}) == 0
    assert study.rows() == before
    with StudyView.open(study.database) as read:
        assert (read.rows(), read.settings) == (before, {"objective": "error"})


def test_a_plan_that_cannot_be_is_refused_whole(url: str, study: Study) -> None:
    before = study.rows(), study.axes("dfa")
    with pytest.raises(UsageError, match="The grid of 'dfa' must be whole"):
        study.plan({"dfa": [Axis("arch", ["900"]), RATE]}, [])
    assert (study.rows(), study.axes("dfa")) == before
    assert query(url, "SELECT count(*) FROM trials") == [(0,)]


def test_an_extended_grid_runs_only_what_is_new(url: str, study: Study, owner: Owner) -> None:
    first = claimed(study, owner)
    study.finish(first, Finished(first.rows[0].key, 0.25, "complete", result(0.25)))
    claim = claimed(study, owner, size=2)
    study.finish(claim, Finished(claim.rows[0].key, None, "diverged", DIVERGED | {"loss": math.nan}))
    study.fail(claim, claim.rows[1].key, "Traceback")
    assert study.retry_failed() == 1
    running = claimed(study, owner)

    wider = [Axis("arch", ["10", *ARCH.values]), Axis("lr", [10, *RATE.values], low=1e-12, high=1e4, log=True)]
    assert study.plan({"dfa": wider}, cells_of(wider)) == 6
    assert not GridSampler(study.search_space("dfa")).is_exhausted(optuna_study(url))
    study.finish(running, Finished(running.rows[0].key, 0.5, "complete", result(0.5)))
    assert finish_all(study, owner) == 9

    read = optuna_study(url)
    assert GridSampler(study.search_space("dfa")).is_exhausted(read)
    assert (read.best_value, len(read.trials)) == (0.25, 13), "only the failed cell has two trials"
    assert len({str(trial.distributions) for trial in read.trials}) == 1
    assert_ids_agree(url, study)


def test_a_failed_and_a_diverged_cell(url: str, study: Study, owner: Owner) -> None:
    claim = claimed(study, owner, size=2)
    study.fail(claim, claim.rows[0].key, "Traceback: no such rule", "memory")
    study.finish(
        claim, Finished(claim.rows[1].key, None, "diverged", DIVERGED | {"epoch": 3, "loss": math.nan}, [RECORD])
    )
    failed, diverged = study.rows()[:2]
    assert (failed.state, failed.error, failed.cause) == ("failed", "Traceback: no such rule", "memory")
    assert (diverged.state, diverged.value, diverged.result and diverged.result["epoch"]) == ("diverged", None, 3)
    assert study.history(diverged.key) == [RECORD]
    assert [trial.state for trial in optuna_study(url).trials] == [TrialState.FAIL, TrialState.PRUNED]

    assert study.retry_failed() == 1
    row = claimed(study, owner).rows[0]
    assert (row.key, row.trial_number, row.attempt, row.error, row.cause) == (failed.key, 2, 1, None, None)
    assert row.name != failed.name


def test_a_released_cohort_goes_on_in_its_trials(url: str, study: Study, owner: Owner) -> None:
    claim = claimed(study, owner, size=2)
    claimed(study, owner, size=3)
    assert (study.release(claim), study.release(claim)) == (2, 0)
    with pytest.raises(Fenced):
        study.finish(claim, Finished(claim.rows[0].key, 1.0, "complete", result(1.0)))
    again = claimed(study, owner, size=1)
    assert again.cohort == claim.cohort
    assert [(row.trial_id, row.attempt) for row in again.rows] == [(row.trial_id, 2) for row in claim.rows]
    assert study.release(again, max_runs=1, cause="memory") == 2
    smaller = claimed(study, owner, size=1)
    assert (smaller.rows[0].key, smaller.rows[0].cause) == (claim.rows[0].key, "memory")
    assert smaller.cohort != claim.cohort
    assert [trial.state for trial in optuna_study(url).trials] == [TrialState.RUNNING] * 3


def test_finished_cells_are_opened_again(url: str, study: Study, owner: Owner) -> None:
    claim = claimed(study, owner)
    row = claim.rows[0]
    losses = (0, [1.0] * 3), (0, [0.5] * 5), (1, [0.0] * 5)
    made = [record(*one) for one in losses]
    short, long, other = ({k: v for k, v in one.items() if k not in ("history", "tracked")} for one in made)
    study.finish(claim, Finished(row.key, 1.0, "complete", result(1.0, executions=[short]), [RECORD]))
    longer = cells_of([ARCH, RATE], epochs=5)
    renamed = {old.key: new for old, new in zip(cells_of([ARCH, RATE]), longer, strict=True)}
    assert study.plan({"dfa": [ARCH, RATE]}, longer, reopened=renamed) == 0
    assert [cell.key for cell in study.rows()] == [cell.key for cell in longer]
    assert study.history(longer[0].key) == [RECORD]
    again = claimed(study, owner)
    assert again.resumed
    assert (again.rows[0].trial_id, again.rows[0].spec["epochs"]) == (row.trial_id, 5)
    study.finish(again, Finished(longer[0].key, 0.5, "complete", result(0.5, executions=[long])))

    assert study.plan({"dfa": [ARCH, RATE]}, longer, executions=2) == 0
    more = claimed(study, owner)
    assert (more.rows[0].key, more.rows[0].done, more.rows[0].trial_id) == (longer[0].key, 1, row.trial_id)
    study.finish(more, Finished(longer[0].key, 0.25, "complete", result(0.25, executions=[long, other])))
    assert [(trial.state, trial.value) for trial in optuna_study(url).trials] == [(TrialState.COMPLETE, 0.25)]


def test_who_works_is_known(study: Study) -> None:
    before = time.time()
    with Owner(study.locks, {"host": "a", "device": "cpu"}) as owner:
        claimed(study, owner)
        (worker,) = study.workers()
        assert (worker["token"], worker["pid"], worker["facts"]) == (owner.token, os.getpid(), owner.facts)
        assert before - 1 < worker["began"] < time.time() + 1
        assert worker["lease"] - worker["began"] == pytest.approx(owners.LEASE_SECONDS, abs=1)
        assert study.spent() is None
        owner.facts = owner.facts | {"spent": 90.0}
        study.retire(owner)
        assert (study.workers(), study.spent()) == ([], 90.0)
    assert study.counts()["interrupted"] == 1


def test_a_dead_process_of_this_machine_is_found_at_once(url: str, study: Study, child: Any, owner: Owner) -> None:
    script = """
        import os, signal, sys
        from bpf.study.owner import Owner
        from bpf.study.study import Study

        study = Study.open(sys.argv[1])
        claim = study.claim(Owner(study.locks), lambda row: 3)
        study.finish(claim, Finished(claim.rows[0].key, 0.5, "complete", result(0.5)))
        os.kill(os.getpid(), signal.SIGKILL)
    """
    assert child(script, url).process.wait(SECONDS) == -signal.SIGKILL
    assert {state: count for state, count in study.counts().items() if count} == {
        "pending": 3, "interrupted": 2, "complete": 1,
    }  # fmt: skip
    assert study.workers() == []
    claim = claimed(study, owner)
    assert claim.resumed
    assert [(row.attempt, row.kills, row.cause) for row in claim.rows] == [(2, 1, "killed")] * 2
    assert finish_all(study, owner) == 3


def test_experiments_in_one_database_do_not_mix(url: str, study: Study, owner: Owner) -> None:
    with planned(url, [RATE], "yours") as yours, Owner(yours.locks) as other:
        claimed(yours, other)
        assert finish_all(study, owner) == 6
        assert study.claim(owner, lambda row: 1) is None
        assert {state: count for state, count in yours.counts().items() if count} == {"pending": 2, "running": 1}
        assert [worker["token"] for worker in yours.workers()] == [other.token]
        assert yours.study_name("dfa") == "yours/dfa"
        assert len(optuna_study(url, "yours/dfa").trials) == 1
    with pytest.raises(UsageError) as raised:
        Study.open(url)
    assert str(raised.value) == f"{study.database} has several experiments. Known: mine, yours."


def test_four_processes_create_at_once(url: str, child: Any) -> None:
    script = """
        import sys
        from bpf.errors import UsageError
        from bpf.study.cells import Axis, Cell
        from bpf.study.study import Study

        name = sys.argv[2]
        print("ready", flush=True)
        sys.stdin.readline()
        try:
            study = Study.create(sys.argv[1], name, {})
        except UsageError as error:
            print(error)
        else:
            study.plan({"bp": [Axis("lr", [0.1])]}, [Cell("key", "bp", "any", {"lr": 0.1}, {"epochs": 1})])
            print("made", study.counts()["pending"])
    """
    children = [child(script, url, name) for name in ("a", "a", "b", "c")]
    assert [started.hear() for started in children] == ["ready"] * 4
    for started in children:
        started.tell()
    told = [started.end() for started in children]
    exists = f"The experiment 'a' exists already in {Database.at(url)}."
    assert sorted(told[:2]) == sorted([["made 1"], [exists]])
    assert told[2:] == [["made 1"]] * 2
    assert Study.exists(url, "a")
    assert not Study.exists(url, "d")


def test_two_that_find_no_tables_do_not_both_make_them(url: str) -> None:
    together = threading.Barrier(2)

    def meet(*arguments: Any, **options: Any) -> None:
        with suppress(threading.BrokenBarrierError):
            together.wait(1.0)

    made: list[Study] = []
    threads = [threading.Thread(target=lambda name=name: made.append(Study.create(url, name, {}))) for name in "ab"]
    sa.event.listen(schema.metadata, "before_create", meet)  # after it was looked which tables there are
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sa.event.remove(schema.metadata, "before_create", meet)
    assert sorted(study.experiment for study in made) == ["a", "b"]
    for study in made:
        study.close()


# A server that fails

COMPLAINING_CHILD = """
    import logging, sys
    from bpf.study.study import Study

    Study.open(sys.argv[1]).close()
    logging.getLogger("psycopg").warning("error ignored terminating the connection")
    logging.getLogger("sqlalchemy.pool.impl.QueuePool").error("Exception during reset or similar")
"""


def test_what_the_driver_logs_is_not_printed(postgres_url: str, child: Any) -> None:
    planned(postgres_url, [many(2)]).close()
    assert child(COMPLAINING_CHILD, postgres_url).end() == []


BUSY_CHILD = """
    import sys
    from bpf.study import patience
    from bpf.study.owner import Owner
    from bpf.study.study import Study

    patience.LONGEST_PAUSE = 0.5
    with Study.open(sys.argv[1]) as study, Owner(study.locks) as owner, study.renewing(owner):
        study.patience = 60.0
        study.on_wait = lambda reason: print("waits", reason, flush=True)
        print("ready", flush=True)
        sys.stdin.readline()
        while (claim := study.claim(owner, lambda row: 3)) is not None:
            for row in claim.rows:
                value = row.params["lr"]
                study.finish(claim, Finished(row.key, value, "complete", result(value, owner=owner.token), [RECORD]))
                print("done", row.key, flush=True)
        study.retire(owner)
"""


def test_eight_processes_and_two_restarts_run_each_cell_once(postgres_own_server: PostgresServer, child: Any) -> None:
    url, rates = postgres_own_server.url(), many(300)
    planned(url, [rates]).close()
    children = [child(BUSY_CHILD, url) for _ in range(8)]
    assert [started.hear() for started in children] == ["ready"] * 8
    told: list[str] = []

    def listen(one: Child) -> None:
        assert one.process.stdout is not None
        told.extend(line.rstrip("\n") for line in one.process.stdout)

    def done() -> list[str]:
        return [line.removeprefix("done ") for line in list(told) if line.startswith("done ")]

    listeners = [threading.Thread(target=listen, args=(one,)) for one in children]
    for one, listener in zip(children, listeners, strict=True):
        listener.start()
        one.tell()
    for mode, count in (("fast", 60), ("immediate", 160)):
        eventually(lambda count=count: len(done()) >= count)
        assert len(done()) < 300, "they were not working any more"
        postgres_own_server.restart(mode)
    for listener in listeners:
        listener.join(SECONDS)
    assert [one.end() for one in children] == [[]] * 8

    assert sorted(done()) == sorted(cell.key for cell in cells_of([rates]))
    reasons = [line for line in told if line.startswith("waits ")]
    assert all(reason.startswith("waits The study database failed: ") for reason in reasons)
    assert len(reasons) >= 8
    with Study.open(url) as study:
        rows = study.rows()
        assert [(row.state, row.value) for row in rows] == [("complete", row.params["lr"]) for row in rows]
        assert {row.kills for row in rows} == {0}
        read = optuna_study(url)
        assert sorted(trial.number for trial in read.trials) == list(range(300))
        assert sorted(trial.params["lr"] for trial in read.trials) == list(rates.values)
        assert {trial.state for trial in read.trials} == {TrialState.COMPLETE}
        assert GridSampler(study.search_space("dfa")).is_exhausted(read)


class Failures:
    """Lets one call of a function fail as a lost connection does; `told` is what a study said while it waited."""

    def __init__(self, study: Study) -> None:
        self.told: list[str] = []
        self._study = study
        study.patience, study.on_wait = SECONDS, self.told.append

    def lose_the_answer(self) -> None:
        """Of the next commit: it is done, and then the connection is gone."""
        import psycopg

        dialect: Any = self._study._engine.dialect
        commit = dialect.do_commit

        def commit_and_fail(connection: Any) -> None:
            del dialect.do_commit
            commit(connection)
            connection.driver_connection.close()
            raise psycopg.OperationalError("the connection is lost")

        dialect.do_commit = commit_and_fail


@pytest.fixture
def failures(study: Study) -> Failures:
    return Failures(study)


LOST = ["The study database failed: the connection is lost."]


def test_a_claim_whose_answer_was_lost_is_not_claimed_twice(
    url: str, study: Study, owner: Owner, failures: Failures
) -> None:
    failures.lose_the_answer()
    claim = claimed(study, owner, size=2)
    assert failures.told == LOST
    assert [row.key for row in claim.rows] == [row.key for row in study.rows()[:2]]
    assert [row.attempt for row in claim.rows] == [1, 1]
    assert (study.counts()["running"], len(optuna_study(url).trials)) == (2, 2)
    for row in claim.rows:
        study.finish(claim, Finished(row.key, 1.0, "complete", result(1.0)))
    assert finish_all(study, owner) == 4


def test_an_outcome_whose_answer_was_lost_is_stored_once(
    url: str, study: Study, owner: Owner, failures: Failures
) -> None:
    claim = claimed(study, owner, size=3)
    keys = [row.key for row in claim.rows]
    failures.lose_the_answer()
    study.finish(claim, Finished(keys[0], 1.0, "complete", result(1.0, by="me"), [RECORD]))
    failures.lose_the_answer()
    study.finish(claim, Finished(keys[1], None, "diverged", DIVERGED))
    failures.lose_the_answer()
    study.fail(claim, keys[2], "Traceback")
    assert failures.told == LOST * 3
    assert [row.state for row in study.rows()[:3]] == ["complete", "diverged", "failed"]
    assert study.history(keys[0]) == [RECORD]
    assert [(trial.state, trial.value) for trial in optuna_study(url).trials] == [
        (TrialState.COMPLETE, 1.0), (TrialState.PRUNED, None), (TrialState.FAIL, None),
    ]  # fmt: skip
    with pytest.raises(Fenced):
        study.finish(claim, Finished(keys[0], 2.0, "complete", result(2.0)))


def test_the_other_steps_may_be_done_again(study: Study, owner: Owner, failures: Failures) -> None:
    claim = claimed(study, owner, size=3)
    for step in (
        lambda: study.progressed(claim, 2),
        lambda: study.release(claim),
        lambda: study.plan({"dfa": [ARCH, RATE], "bp": [RATE]}, cells_of([ARCH, RATE]) + cells_of([RATE], "bp")),
        study.retry_failed,
        study.repair,
        lambda: study.retire(owner),
    ):
        failures.lose_the_answer()
        step()
    assert failures.told == LOST * 6
    assert [(row.state, row.reached) for row in study.rows()] == [("interrupted", 2)] * 3 + [("pending", 0)] * 6


@pytest.mark.parametrize(("where", "step"), [(Trials, "begin"), (plan, "keep_histories"), (Trials, "end")])
def test_a_connection_lost_inside_a_transaction(
    url: str,
    study: Study,
    owner: Owner,
    failures: Failures,
    where: Any,
    step: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = getattr(where, step)

    def cut(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(where, step, original)
        query(url, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'bpf'")
        return original(*arguments, **options)

    monkeypatch.setattr(where, step, cut)
    assert finish_all(study, owner) == 6
    assert len(failures.told) == 1, "and so it paused once, for `patience.FIRST_PAUSE`"
    assert [(row.state, row.attempt) for row in study.rows()] == [("complete", 1)] * 6
    assert [(trial.number, trial.state) for trial in optuna_study(url).trials] == [
        (number, TrialState.COMPLETE) for number in range(6)
    ]


def test_without_patience_and_after_it_the_failure_is_told(
    postgres_own_server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with planned(postgres_own_server.url(), [ARCH, RATE]) as study, Owner(study.locks) as owner:
        claim = claimed(study, owner)
        postgres_own_server.stop()
        address = f'connection to server at "127.0.0.1", port {postgres_own_server.port} failed: '
        with pytest.raises(RunError) as raised:
            study.counts()
        # what a connection of the pool was told last, and then what a new one is told
        with pytest.raises(RunError) as raised:
            study.counts()
        refused = f"The study database failed: connection failed: {address}Connection refused."
        assert str(raised.value) == refused

        told: list[str] = []
        study.patience, study.on_wait = 0.3, told.append
        with pytest.raises(RunError) as raised:
            study.finish(claim, Finished(claim.rows[0].key, 1.0, "complete", result(1.0)))
        assert str(raised.value) == refused
        assert told
        assert set(told) == {refused}

        study.patience = SECONDS
        back = threading.Thread(target=postgres_own_server.start)
        study.on_wait = lambda reason: back.ident or back.start()
        study.finish(claim, Finished(claim.rows[0].key, 1.0, "complete", result(1.0)))
        back.join()
        assert study.counts()["complete"] == 1


# Leases between machines

ELSEWHERE = """
    import sys
    from bpf.study import owner as owners
    from bpf.study.owner import Owner
    from bpf.study.study import Fenced, Study

    owners.machine = lambda: "elsewhere"
    owners.LEASE_SECONDS, owners.RENEW_SECONDS = float(sys.argv[2]), 0.1
    study = Study.open(sys.argv[1])
    owner = Owner(study.locks)
    with study.renewing(owner):
        claim = study.claim(owner, lambda row: 1)
        print(claim.rows[0].key, flush=True)
        sys.stdin.readline()
        try:
            study.finish(claim, Finished(claim.rows[0].key, 7.0, "complete", result(7.0, by="old")))
            print("stored")
        except Fenced as error:
            print(error)
        print(owner.lost.wait(600.0))
        again = study.claim(owner, lambda row: 1)
        print(again and again.rows[0].key, owner.lost.is_set())
        study.release(again)
"""


LEASE = 4.0
"""Longer than a busy machine holds up the thread that renews it."""


def lease_of(url: str, machine: str = "elsewhere") -> float:
    ((lease,),) = query(url, f"SELECT lease FROM bpf_owners WHERE machine = '{machine}'")
    return float(lease)


def test_a_process_that_stood_still_past_its_lease_is_fenced(
    url: str, study: Study, owner: Owner, child: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owners, "LEASE_SECONDS", LEASE)
    keys = [row.key for row in study.rows()]
    other = child(ELSEWHERE, url, str(LEASE))
    assert other.hear() == keys[0]
    first = lease_of(url)
    eventually(lambda: lease_of(url) > first + LEASE)  # longer than a lease
    mine = claimed(study, owner)
    assert mine.rows[0].key == keys[1], "a live lease is respected"

    other.signal(signal.SIGSTOP)
    taken = eventually(lambda: takes_over(study, owner))
    assert (taken.rows[0].key, taken.rows[0].attempt) == (keys[0], 2)
    assert lease_of(url) == 0.0
    other.signal(signal.SIGCONT)
    other.tell()
    row = taken.rows[0]
    assert other.hear() == (
        f"The cell {row.name} ({row.key}) is no longer owned by this process; its outcome was not stored."
    )
    assert other.hear() == "True", "it learns that it was declared dead"
    again = other.hear()
    assert again.endswith(" False"), "and begins anew"
    assert again.removesuffix(" False") in keys[2:]
    assert other.end() == []
    study.finish(taken, Finished(keys[0], 1.0, "complete", result(1.0, by="new")))
    stored = next(row for row in study.rows() if row.key == keys[0])
    assert (stored.value, stored.result) == (1.0, result(1.0, by="new"))
    assert [trial.value for trial in optuna_study(url).trials if trial.value is not None] == [1.0]


def takes_over(study: Study, owner: Owner) -> Claim | None:
    """A claim of what was interrupted; one of something new is given back."""
    claim = claimed(study, owner)
    if claim.resumed and claim.rows[0].cause == "killed":
        return claim
    study.release(claim)
    return None


def test_a_held_lock_on_this_machine_outweighs_a_lease_that_ran_out(url: str, study: Study, owner: Owner) -> None:
    claim = claimed(study, owner)
    query(url, "UPDATE bpf_owners SET lease = 1")
    with Study.open(url) as other, Owner(other.locks) as second:
        assert [worker["token"] for worker in other.workers()] == [owner.token]
        assert other.repair() == 0
        assert claimed(other, second).rows[0].key != claim.rows[0].key
    study.finish(claim, Finished(claim.rows[0].key, 1.0, "complete", result(1.0)))


@pytest.fixture
def far(study: Study, url: str) -> Iterator[Claim]:
    """Cells that an owner on another machine has claimed."""
    with pytest.MonkeyPatch.context() as patch, Owner(study.locks) as owner:
        patch.setattr(owners, "machine", lambda: "elsewhere")
        claim = claimed(study, owner, size=3)
        patch.undo()
        yield claim


def test_an_owner_that_is_not_known_yet_is_not_lost(
    study: Study, owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    renewed: list[bool] = []
    renew = owners.renew
    monkeypatch.setattr(owners, "RENEW_SECONDS", 0.01)
    monkeypatch.setattr(owners, "renew", lambda *arguments: renewed.append(renew(*arguments)) or renewed[-1])
    with study.renewing(owner):
        eventually(lambda: len(renewed) > 1)
        claimed(study, owner)
        eventually(lambda: renewed[-1])
    assert renewed[0] is False
    assert not owner.lost.is_set()


def test_who_waits_for_its_turn_to_claim_has_one_connection(
    url: str, study: Study, owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And whoever waits to finish what it owns keeps its lease meanwhile, by a second one."""
    renewed: list[float] = []
    renew = owners.renew
    monkeypatch.setattr(owners, "RENEW_SECONDS", 0.02)
    monkeypatch.setattr(owners, "renew", lambda *arguments: renewed.append(time.monotonic()) or renew(*arguments))
    claims: list[Claim] = []
    with closing(Study.open(url)) as other, study.renewing(owner), ThreadPoolExecutor(1) as pool:
        with other._transaction():
            claiming = pool.submit(lambda: claims.append(claimed(study, owner)))
            eventually(lambda: waiting(url) == 1)
            begun = time.monotonic()
            time.sleep(0.5)
            assert not [moment for moment in renewed if moment > begun]
        claiming.result(SECONDS)
        [claim] = claims
        done = Finished(claim.rows[0].key, 1.0, "complete", result(1.0))
        with other._transaction():
            finishing = pool.submit(study.finish, claim, done)
            eventually(lambda: waiting(url) == 1)
            begun = time.monotonic()
            eventually(lambda: [moment for moment in renewed if moment > begun])
        finishing.result(SECONDS)


def waiting(url: str) -> int:
    """How many of bpf's connections wait for a lock."""
    [[count]] = query(url, "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
    return int(count)


def test_leases_are_not_trusted_after_an_outage(
    url: str, study: Study, owner: Owner, far: Claim, monkeypatch: pytest.MonkeyPatch
) -> None:
    query(url, "UPDATE bpf_owners SET lease = 1")
    study.failed_at = time.monotonic()
    assert study.counts()["running"] == 3
    assert study.repair() == 0
    study.failed_at -= owners.LEASE_SECONDS
    assert study.counts()["interrupted"] == 3
    assert study.repair() == 3


def test_an_owner_elsewhere_is_alive_as_long_as_its_lease(url: str, study: Study, owner: Owner, far: Claim) -> None:
    assert study.counts()["running"] == 3
    assert study.repair() == 0
    assert not claimed(study, owner).resumed
    assert {worker["machine"] for worker in study.workers()} == {"elsewhere", owners.machine()}
    query(url, "UPDATE bpf_owners SET lease = 1 WHERE machine = 'elsewhere'")
    assert [worker["machine"] for worker in study.workers()] == [owners.machine()]
    assert study.repair() == 3
    with pytest.raises(Fenced):
        study.finish(far, Finished(far.rows[0].key, 1.0, "complete", result(1.0)))


def test_a_process_that_stands_still_inside_a_transaction_does_not_hold_up_the_others(
    url: str, study: Study, owner: Owner, child: Any
) -> None:
    script = """
        import os, signal, sys
        from bpf.study import database
        from bpf.study.owner import Owner
        from bpf.study.study import Study
        from bpf.study.trials import Trials

        def stand_still(*arguments, **options):
            Trials.begin = original
            print("inside", flush=True)
            os.kill(os.getpid(), signal.SIGSTOP)
            return original(*arguments, **options)

        database.IDLE_SECONDS = 3
        original, Trials.begin = Trials.begin, stand_still
        with Study.open(sys.argv[1]) as study, Owner(study.locks) as owner:
            study.patience, study.on_wait = 600.0, lambda reason: print(reason, flush=True)
            claim = study.claim(owner, lambda row: 1)
            print(claim.rows[0].key)
            study.finish(claim, Finished(claim.rows[0].key, 1.0, "complete", result(1.0)))
    """
    other = child(script, url)
    assert other.hear() == "inside"
    claim = claimed(study, owner)
    assert claim.rows[0].key == study.rows()[0].key
    other.signal(signal.SIGCONT)
    told = other.end()
    assert told == [
        "The study database failed: terminating connection due to idle-in-transaction timeout.",
        study.rows()[1].key,
    ]
    assert [trial.number for trial in optuna_study(url).trials] == [0, 1]


# Training

GRID = [
    *("--dataset", "digits", "--algorithm", "dfa,bp", "--arch", "8,6", "--activation", "tanh", "--no-batch-norm"),
    *("--bw-init", "ortho", "--lr", "0.001,0.01", "--epochs", "3", "--examples-frac", "0.2"),
    *("--executions-per-trial", "2", "--checkpoint-every", "0"),
]
BPF = [sys.executable, "-c", "import sys; from bpf.cli.app import main; main(sys.argv[1:])"]


def opened(directory: Path, where: str | Path, **spec: Any) -> Experiment:
    grid = {"dataset": "digits", "algorithm": ["dfa", "bp"], "arch": ["8", "6"], "activation": ["tanh"]}
    grid |= {"batch_norm": [False], "bw_init": ["ortho"], "lr": [0.001, 0.01], "epochs": 3, "examples_frac": 0.2}
    grid |= {"executions_per_trial": 2, **spec}
    place = Place(Database.at(where), "mine")
    return api.open_tune(directory, GridSpec.model_validate(grid), directory.parent / "data", place)


def stored_plan(experiment: Experiment) -> Study:
    api.store_plan(experiment, ["bpf"])
    return Study.open(experiment.database, experiment.name)


def worker_of(experiment: Experiment, study: Study, tell: Callable[[Event], object]) -> Worker:
    job = Job(experiment.database, experiment.name, experiment.data_dir, experiment.files, Terms("cpu"))
    return Worker.of(job, study, tell)  # type: ignore[arg-type]


def outcomes(study: Study) -> dict[str, Any]:
    """Every cell's state, value, executions and histories by its key, without times."""
    found = {}
    for row in study.rows():
        executions = [{k: v for k, v in e.items() if k != "seconds"} for e in (row.result or {})["executions"]]
        histories = [{k: v for k, v in e.items() if k != "seconds"} for e in study.history(row.key)]
        found[row.key] = (row.state, row.value, executions, histories)
    return found


@pytest.fixture(scope="module")
def in_sqlite(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What comes out of the same grid in a file."""
    directory = tmp_path_factory.mktemp("sqlite")
    experiment = opened(directory / "grid", directory / "study.db")
    with stored_plan(experiment) as study:
        worker_of(experiment, study, lambda event: None).run()
        return outcomes(study)


SECRET = "zQ7xPwd9"  # the part of each password that looks the same in whatever way it is written


@pytest.fixture
def account(url: str) -> Iterator[tuple[str, str]]:
    """The name and the password of a user, which a URL cannot hold as it is."""
    user, password = f"user {secrets.token_hex(4)}", f"{SECRET}/@:?#%&= ü"
    query(url, f"CREATE ROLE \"{user}\" SUPERUSER LOGIN PASSWORD '{password}'")
    yield user, password
    query(url, f'REASSIGN OWNED BY "{user}" TO bpf; DROP OWNED BY "{user}"; DROP ROLE "{user}"')


def urls_of(url: str, account: tuple[str, str]) -> dict[str, str]:
    """The ways to write who connects."""
    user, password = (quote(part, safe="") for part in account)
    address = url.partition("@")[2]
    return {
        "before the host": f"postgresql://{user}:{password}@{address}",
        "in the query": f"postgresql://{user}@{address}?password={password}",
        "nowhere": f"postgresql://{user}@{address}",
    }


def environment(**changed: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("BPF_", "PG"))}
    return {**kept, "PYTHONPATH": str(ROOT), **changed}


def bpf(work: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [*BPF, *arguments]
    return subprocess.run(
        command, cwd=work, env=environment(**variables), capture_output=True, text=True, timeout=SECONDS
    )


def dump(url: str) -> str:
    """Everything that is in the tables of a database."""
    tables = query(url, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
    return "\n".join(str(query(url, f'SELECT t::text FROM "{name}" t')) for (name,) in tables)


def assert_no_secret(work: Path, *texts: str) -> None:
    for text in texts:
        assert SECRET not in text
    for path in work.rglob("*"):
        assert SECRET not in path.name
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


def test_a_grid_on_a_server_gives_the_numbers_of_one_in_a_file(
    url: str, account: tuple[str, str], in_sqlite: dict[str, Any], tmp_path: Path
) -> None:
    """With two processes, and with a password that is afterwards found nowhere."""
    written = urls_of(url, account)
    storage = ("--storage", written["before the host"])
    done = bpf(tmp_path, "tune", "grid", *GRID, *storage, "--workers", "2", BPF_DEBUG="1")
    assert done.returncode == 0, done.stderr
    assert "8 cells complete." in done.stdout
    with Study.open(url, "grid") as study:
        assert outcomes(study) == in_sqlite
        assert {row.attempt for row in study.rows()} == {1}
        assert len({row.owner for row in study.rows()}) == 2
        assert study.workers() == []
        for rule in ("dfa", "bp"):
            read = optuna_study(url, f"grid/{rule}")
            assert GridSampler(study.search_space(rule)).is_exhausted(read)
            assert read.best_value == min(row.value for row in study.rows(rule=rule) if row.value is not None)
    assert not (tmp_path / "grid" / "study.db").exists()
    content = (tmp_path / "grid" / "experiment.yaml").read_text()
    assert f"storage: {Database.at(written['nowhere'])}\n" in content
    assert dump(url).count("grid") > 10
    assert_no_secret(tmp_path, done.stdout, done.stderr, dump(url))

    # It is found again, by a password from wherever, and with none it is asked for.
    status = bpf(tmp_path, "status", "grid", "--json", PGPASSWORD=account[1])
    assert (status.returncode, json.loads(status.stdout)["cells"]["complete"]) == (0, 8)
    without = bpf(tmp_path, "status", "grid")
    assert (without.returncode, without.stdout) == (2, "")
    assert without.stderr == (
        f"Error: The study database {Database.at(written['nowhere'])} cannot be used: connection failed: "
        f'connection to server at "127.0.0.1", port {sa.make_url(url).port} failed: fe_sendauth: no password '
        "supplied. Check the user and the password; PGPASSWORD or ~/.pgpass keep it out of command lines.\n"
    )


def test_a_worker_joins_with_what_the_environment_says(
    url: str, account: tuple[str, str], in_sqlite: dict[str, Any], tmp_path: Path
) -> None:
    with stored_plan(opened(tmp_path / "grid", url)) as study:
        arguments = ("worker", "--experiment", "mine", "--checkpoints", "kept", "--checkpoint-every", "0")
        variables = {"BPF_STORAGE": urls_of(url, account)["nowhere"], "PGPASSWORD": account[1], "BPF_DEBUG": "1"}
        done = bpf(tmp_path, *arguments, **variables)
        assert (done.returncode, done.stdout) == (0, "")
        assert done.stderr.endswith("Nothing is left to claim in mine.\n")
        assert outcomes(study) == in_sqlite
    kept = sorted(path.name for path in (tmp_path / "kept" / "mine").iterdir())
    assert kept == ["bpf-files.json", "checkpoints", "models"]
    assert not (tmp_path / "grid" / "models").exists()
    assert_no_secret(tmp_path, done.stdout, done.stderr, dump(url))


def test_a_worker_that_is_fenced_while_it_trains_goes_on_with_the_next_claim(
    url: str, in_sqlite: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owners, "RENEW_SECONDS", 0.02)
    experiment = opened(tmp_path / "grid", url)
    events: list[Event] = []
    taken: list[str] = []

    def tell(event: Event) -> None:
        events.append(event)
        if isinstance(event, Trained) and not taken:
            lost = worker.holder.lost
            with Study.open(url) as other, Owner(other.locks) as second, pytest.MonkeyPatch.context() as patch:
                patch.setattr(owners, "dead", lambda *arguments: {worker.holder.token})
                claim = claimed(other, second)
                for row in claim.rows:
                    other.finish(claim, Finished(row.key, 0.5, "complete", result(0.5), [RECORD]))
                    taken.append(row.key)
            assert lost.wait(SECONDS)

    with stored_plan(experiment) as study:
        worker = worker_of(experiment, study, tell)
        worker.run()
        found = outcomes(study)
    kinds = [type(event).__name__ for event in events]
    assert kinds.count("GivenUp") == 1
    assert kinds[:4] == ["Began", "Trained", "Trouble", "GivenUp"]
    assert events[2] == Trouble("Another worker has taken over a cohort here; it is left to that one.")
    assert {event.key for event in events if isinstance(event, Ended)} == set(found) - set(taken)
    assert taken
    assert {key: outcome for key, outcome in found.items() if key not in taken} == {
        key: outcome for key, outcome in in_sqlite.items() if key not in taken
    }
    assert {found[key] for key in taken if found.update({key: found[key][:2]}) is None} == {("complete", 0.5)}


# What a person is told


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., str]:
    """What a command says that is refused; without the password, with the traceback as well."""
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith(("BPF_", "PG")):
            monkeypatch.delenv(name)

    def run(*arguments: str, **variables: str) -> str:
        for debug in ("1", ""):
            monkeypatch.setenv("BPF_DEBUG", debug)
            for name, value in variables.items():
                monkeypatch.setenv(name, value)
            capsys.readouterr()
            with pytest.raises(SystemExit) as ended:
                cli.main(list(arguments))
            printed = capsys.readouterr()
            assert (ended.value.code, printed.out) == (2, "")
            assert ("Traceback" in printed.err) == bool(debug)
            assert_no_secret(tmp_path, printed.err)
        return printed.err

    return run


FORMS = ["before the host", "in the query"]


@pytest.mark.parametrize("form", FORMS)
def test_what_is_wrong_with_a_server_is_told_without_the_password(
    url: str, account: tuple[str, str], told: Callable[..., str], form: str, tmp_path: Path
) -> None:
    right = sa.make_url(urls_of(url, account)[form])
    wrong = {**right.query, "password": SECRET} if form == "in the query" else right.query
    user = account[0]
    for changed, reason in (
        (
            right.set(port=1),
            "Connection refused. Check that the server runs and can be reached from here.",
        ),
        (
            right.set(password=None if form == "in the query" else SECRET, query=wrong),
            f'FATAL:  password authentication failed for user "{user}". Check the user and the password; '
            "PGPASSWORD or ~/.pgpass keep it out of command lines.",
        ),
        (
            right.set(database="nowhere"),
            'FATAL:  database "nowhere" does not exist. Create it on the server, or check the URL.',
        ),
    ):
        public = f"postgresql://{user}@127.0.0.1:{changed.port}/{changed.database}"
        message = (
            f"Error: The study database {public} cannot be used: connection failed: connection to server at "
            f'"127.0.0.1", port {changed.port} failed: {reason}\n'
        )
        written = changed.render_as_string(hide_password=False)
        assert told("worker", "--storage", written, "--experiment", "mine") == message
        directory = f"grid-{changed.port}-{changed.database}"
        assert told("tune", directory, *GRID, "--quiet", "--storage", written) == message
        assert not list(tmp_path.glob("*/study.db"))


def test_a_worker_on_a_cluster_waits_for_a_server_that_does_not_answer(
    postgres_own_server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be busy, as many come at once; what is wrong for good is told at once."""
    needed_ray()
    from bpf.cluster import seated

    planned(postgres_own_server.url(), [many(1)]).close()
    told: list[str] = []

    def wait(reason: str) -> None:
        told.append(reason)
        postgres_own_server.start()

    def opened(database: str = "bpf") -> Study:
        order = {"storage": postgres_own_server.url(database), "experiment": "mine", "seat": "1-1"}
        study: Study = seated._study(order, Line(lambda asked, payload: (b"", b"")), wait)
        return study

    postgres_own_server.stop()
    with closing(opened()) as study:
        assert study.counts()["pending"] == 1
    assert ["cannot be used" in text for text in told] == [True]
    with pytest.raises(UsageError, match=r"does not exist.* Each node reaches the server by itself"):
        opened("nowhere")
    monkeypatch.setattr(seated, "REACH_SECONDS", 0.0)
    postgres_own_server.stop()
    with pytest.raises(UsageError, match=r"Connection refused.* Each node reaches the server by itself"):
        opened()
    assert len(told) == 1


@pytest.mark.parametrize("form", FORMS)
def test_an_experiment_that_is_not_there_is_told(
    url: str, account: tuple[str, str], told: Callable[..., str], form: str
) -> None:
    written = urls_of(url, account)
    public = Database.at(written["nowhere"])
    command = ("worker", "--storage", written[form], "--experiment", "mime")
    assert told(*command) == f"Error: {public} is a database, but no bpf study.\n"
    planned(url, [RATE]).close()
    assert told(*command) == f"Error: {public} has no experiment 'mime'. Did you mean 'mine'?\n"


def test_psycopg_is_asked_for(url: str, told: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    message = "Error: PostgreSQL needs psycopg: pip install 'bpf[postgres]'\n"
    assert told("worker", "--storage", "postgresql://me@host/db") == message
    assert told("tune", "grid", *GRID, "--quiet", "--storage", "postgresql://me@host/db") == message


@pytest.mark.parametrize("form", FORMS)
def test_a_database_says_nothing_of_its_password(url: str, account: tuple[str, str], form: str) -> None:
    written = urls_of(url, account)
    place = Database.at(written[form])
    for text in (str(place), repr(place), f"{place}", place.public, repr(Place(place)), place.engine_url):
        assert SECRET not in text
    assert Database.at(place.public) == Database.at(written["nowhere"])
    with planned(written[form], [RATE]) as study, Owner(study.locks) as owner:
        assert SECRET not in repr(study._engine) + repr(study.database) + repr(study.workers())
        claim = claimed(study, owner)
        query(url, "DROP TABLE bpf_histories")
        with pytest.raises(RunError) as raised:
            study.finish(claim, Finished(claim.rows[0].key, 1.0, "complete", result(1.0), [RECORD]))
        gone = 'relation "bpf_histories" does not exist'
        assert str(raised.value) == f"The study database {place.public} failed: {gone}."
        assert SECRET not in "".join(traceback.format_exception(raised.value))
    assert SECRET not in dump(url)
