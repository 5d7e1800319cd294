"""The study: cells are handed out once, survive any kill, and Optuna reads them as a grid of its own."""

import itertools
import math
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import GridSampler
from optuna.trial import FrozenTrial, TrialState

import bpf.study.owner
import bpf.study.trials
from bpf.errors import BpfError, Damaged, RunError, UsageError
from bpf.spec.run import digest
from bpf.study import database, schema
from bpf.study.cells import Axis, Cell, Claim, Finished, Row
from bpf.study.owner import Owner
from bpf.study.seam import Fenced
from bpf.study.study import Study
from bpf.study.trials import Ending, Trials, search_space
from invented import DIVERGED, IN_SCRIPTS, RECORD, result

ROOT = Path(__file__).parents[1]

ARCH = Axis("arch", ["100", "500-500"])
RATE = Axis("lr", [0.1, 0.01, 0.001], low=1e-10, high=1e3, log=True)
STATES = {"complete": TrialState.COMPLETE, "diverged": TrialState.PRUNED, "failed": TrialState.FAIL}
BATCH = Axis("batch_size", [32, 64], low=1, high=65536)


def key_of(rule: str, params: Mapping[str, Any]) -> str:
    return digest({"rule": rule, **params})


def cells_of(axes: list[Axis], rule: str = "dfa") -> list[Cell]:
    """Every point; the architecture is what a cohort must share."""
    points = itertools.product(*(axis.values for axis in axes))
    named = [dict(zip([axis.name for axis in axes], point, strict=True)) for point in points]
    return [
        Cell(key_of(rule, params), rule, f"{rule}/{params.get('arch')}", params, {"epochs": 3, **params})
        for params in named
    ]


def planned(path: Path, axes: list[Axis]) -> Study:
    study = Study.create(path, "mine", {"objective": "loss"})
    study.plan({"dfa": axes}, cells_of(axes))
    return study


def claimed(study: Study, owner: Owner, size: int = 1) -> Claim:
    claim = study.claim(owner, lambda row: size)
    assert claim is not None
    return claim


def finish_all(study: Study, owner: Owner, value: float = 1.0) -> int:
    """Complete whatever there is to claim; returns how many cells that were."""
    count = 0
    while (claim := study.claim(owner, lambda row: 2)) is not None:
        values = {row.key: value + row.ordinal for row in claim.rows}
        study.finish(claim, *(Finished(key, value, "complete", result(value)) for key, value in values.items()))
        count += len(values)
    return count


def optuna_study(path: Path, rule: str = "dfa") -> optuna.Study:
    """As a notebook would open it."""
    return optuna.load_study(study_name=f"mine/{rule}", storage=storage(path))


def storage(path: Path) -> optuna.storages.RDBStorage:
    return optuna.storages.RDBStorage(f"sqlite:///{path}", engine_kwargs={"poolclass": sa.NullPool})


def run_child(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    program = IN_SCRIPTS + textwrap.dedent(script)
    command = [sys.executable, "-c", program, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


KILLED_WHILE_TRAINING = """
    import os, signal, sys
    from bpf.study.owner import Owner
    from bpf.study.study import Study

    study = Study.open(sys.argv[1])
    claim = study.claim(Owner(study.locks), lambda row: int(sys.argv[2]))
    for row in claim.rows[:int(sys.argv[3])]:
        study.finish(claim, Finished(row.key, 0.5, "complete", result(0.5)))
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "study.db"


@pytest.fixture
def study(path: Path) -> Iterator[Study]:
    """Six cells, two structures of three, in plan order."""
    with planned(path, [ARCH, RATE]) as study:
        yield study


@pytest.fixture
def owner(study: Study) -> Iterator[Owner]:
    with Owner(study.locks) as owner:
        yield owner


# What Optuna reads


def test_optuna_reads_the_grid_as_its_own(path: Path, study: Study, owner: Owner) -> None:
    sampler = GridSampler(study.search_space("dfa"))
    for done in range(6):
        assert not sampler.is_exhausted(optuna_study(path)), f"exhausted after {done} of 6"
        claim = claimed(study, owner)
        study.finish(claim, Finished(claim.rows[0].key, float(done), "complete", result(float(done), loss=[done])))
    assert study.claim(owner, lambda row: 1) is None

    read = optuna_study(path)
    assert sampler.is_exhausted(read)
    assert read.best_trial.params == {"arch": "100", "lr": 0.1}
    assert read.best_value == 0.0
    assert [trial.number for trial in read.trials] == list(range(6))
    assert [trial.value for trial in read.trials] == [row.value for row in study.rows()]
    assert [trial.params for trial in read.trials] == [row.params for row in study.rows()]
    assert {trial.state for trial in read.trials} == {TrialState.COMPLETE}
    assert read.trials[3].user_attrs == {
        "name": study.rows()[3].name,
        "cell": study.rows()[3].key,
        "attempt": 1,
        "result": result(3.0, loss=[3]),
    }


def test_grid_ids_are_those_of_the_sampler(path: Path, study: Study, owner: Owner) -> None:
    finish_all(study, owner)
    assert_ids_agree(path, study)


def assert_ids_agree(path: Path, study: Study) -> None:
    """GridSampler, asked for the point of a trial's grid id, gives the trial's own parameters."""
    read = optuna_study(path)
    sampler = GridSampler(study.search_space("dfa"))
    for trial in read.trials:
        for name, value in trial.params.items():
            anything = CategoricalDistribution(study.search_space("dfa")[name])
            assert sampler.sample_independent(read, trial, name, anything) == value


def test_distributions_are_wide_ranges_and_choices(path: Path) -> None:
    arch = Axis("arch", ["100"], choices=["100", "200"])
    with planned(path, [arch, RATE, BATCH]) as study, Owner(study.locks) as owner:
        claimed(study, owner)
    assert optuna_study(path).trials[0].distributions == {
        "arch": CategoricalDistribution(["100", "200"]),
        "lr": FloatDistribution(1e-10, 1e3, log=True),
        "batch_size": IntDistribution(1, 65536),
    }


def test_a_rule_without_parameters_is_a_grid_of_one_cell(path: Path) -> None:
    with planned(path, []) as study, Owner(study.locks) as owner:
        assert finish_all(study, owner) == 1
        assert GridSampler(study.search_space("dfa")).is_exhausted(optuna_study(path))


def test_each_rule_is_an_optuna_study(path: Path, study: Study, owner: Owner) -> None:
    assert study.plan({"bp": [RATE]}, cells_of([RATE], "bp")) == 3
    finish_all(study, owner)
    assert len(optuna_study(path, "dfa").trials) == 6
    assert len(optuna_study(path, "bp").trials) == 3
    assert study.counts("bp")["complete"] == 3
    assert [row.rule for row in study.rows(rule="bp")] == ["bp"] * 3
    assert study.study_name("bp") == "mine/bp"


def test_a_trial_is_made_as_optuna_makes_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(raw: sqlite3.Connection, table: str) -> list[tuple[object, ...]]:
        order = "study_id" if table.startswith("stud") else "trial_id"
        rows = raw.execute(f"SELECT * FROM {table} ORDER BY {order}, 1").fetchall()
        return [tuple(value for value in row if not _is_moment(value)) for row in rows]

    def _is_moment(value: object) -> bool:
        return isinstance(value, str) and re.match(r"\d{4}-\d\d-\d\d ", value) is not None

    @contextmanager
    def within(connection: sa.Connection) -> Iterator[optuna.storages.RDBStorage]:
        own = storage(place)
        own.remove_session()  # as its making has one
        own.scoped_session.configure(bind=connection, join_transaction_mode="create_savepoint")
        yield own
        own.remove_session()

    def new_study(trials: Trials, connection: sa.Connection, name: str) -> int:
        with within(connection) as own:
            return own.create_new_study([optuna.study.StudyDirection.MINIMIZE], name)

    def begin(
        trials: Trials, connection: sa.Connection, rows: list[Row], study_id: int, axes: list[Axis]
    ) -> dict[str, tuple[int, int]]:
        found = {}
        ids = bpf.study.trials._grid_ids(search_space(axes))
        with within(connection) as own:
            for row in rows:
                trial = optuna.create_trial(
                    state=TrialState.RUNNING,
                    params=row.params,
                    distributions={axis.name: bpf.study.trials._distribution(axis) for axis in axes},
                    user_attrs={"name": row.name, "cell": row.key, "attempt": row.attempt},
                    system_attrs={
                        "search_space": search_space(axes),
                        "grid_id": ids[tuple(row.params[name] for name in sorted(row.params))],
                    },
                )
                made = own.create_new_trial(study_id, trial)
                found[row.key] = (made, own.get_trial(made).number)
        return found

    def end(trials: Trials, connection: sa.Connection, endings: list[Ending]) -> None:
        with within(connection) as own:
            for ending in endings:
                for name, value in ending.attributes.items():
                    own.set_trial_user_attr(ending.trial_id, name, value)
                values = None if ending.value is None else [ending.value]
                own.set_trial_state_values(ending.trial_id, STATES[ending.state], values)

    tables = (
        "studies",
        "study_directions",
        "trials",
        "trial_params",
        "trial_user_attributes",
        "trial_system_attributes",
        "trial_values",
    )
    found = []
    for way in ("ours", "Optuna's"):
        if way != "ours":
            monkeypatch.setattr(Trials, "new_study", new_study)
            monkeypatch.setattr(Trials, "begin", begin)
            monkeypatch.setattr(Trials, "end", end)
        place = path.with_name(f"{way}.db")
        with planned(place, [ARCH, RATE, BATCH]) as study, Owner(study.locks) as owner:
            study.plan({"bp": [RATE]}, cells_of([RATE], "bp"))
            claim = claimed(study, owner, size=2)
            study.finish(claim, Finished(claim.rows[0].key, None, "diverged", DIVERGED))
            study.fail(claim, claim.rows[1].key, "Traceback", "memory")
            finish_all(study, owner)
        with closing(sqlite3.connect(place)) as raw:
            raw.execute("UPDATE trial_user_attributes SET value_json = 'any' WHERE key = 'name'")
            found.append({table: told(raw, table) for table in tables})
    assert all(found[0].values())
    assert found[0] == found[1]


@pytest.fixture
def tokyo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("tokyo")
def test_times_are_stored_in_utc_and_read_in_local_time(path: Path, study: Study, owner: Owner) -> None:
    before = datetime.now(UTC)
    finish_all(study, owner)
    after = datetime.now(UTC)
    with closing(sqlite3.connect(path)) as raw:
        stored = raw.execute("SELECT datetime_start, datetime_complete FROM trials").fetchall()
    for moment in itertools.chain(*stored):
        assert before <= datetime.fromisoformat(moment).replace(tzinfo=UTC) <= after
    for trial in optuna_study(path).trials:
        assert before <= trial.datetime_start.astimezone(UTC) <= after
        assert timedelta(0) <= trial.duration <= after - before


def test_nothing_is_logged(path: Path) -> None:
    script = """
        import sys
        import optuna
        from bpf.study.owner import Owner
        from bpf.study.cells import Axis, Cell
        from bpf.study.study import Study

        with Study.create(sys.argv[1], "mine", {}) as study, Owner(study.locks) as owner:
            study.plan({"bp": []}, [Cell("key", "bp", "any", {}, {"epochs": 1})])
            claim = study.claim(owner, lambda row: 1)
            study.finish(claim, Finished("key", 1.0, "complete", {}))
        assert optuna.logging.get_verbosity() == optuna.logging.INFO, "a notebook's own setting"
    """
    child = run_child(script, path)
    assert (child.returncode, child.stdout, child.stderr) == (0, "", "")


# The plan


def test_planning_again_changes_nothing(study: Study, owner: Owner) -> None:
    finish_all(study, owner)
    before = study.rows()
    assert study.plan({"dfa": [ARCH, RATE]}, cells_of([ARCH, RATE])) == 0
    assert study.rows() == before


def test_rows_are_the_planned_cells_in_order(study: Study) -> None:
    rows = study.rows()
    assert [Cell(row.key, row.rule, row.structure, row.params, row.spec) for row in rows] == cells_of([ARCH, RATE])
    assert [row.ordinal for row in rows] == list(range(6))
    assert {row.state for row in rows} == {"pending"}
    assert study.counts() == {
        "pending": 6, "interrupted": 0, "running": 0, "complete": 0, "diverged": 0, "failed": 0,
    }  # fmt: skip


def test_names_are_friendly_and_unique(study: Study) -> None:
    rates = Axis("lr", [0.1, 0.01, 0.001, *(1 + n for n in range(997))], low=1e-10, high=1e3, log=True)
    study.plan({"dfa": [ARCH, rates]}, cells_of([ARCH, rates]))
    names = [row.name for row in study.rows()]
    assert len(set(names)) == len(names) == 2000
    assert all(re.fullmatch(r"[a-z]+-[a-z]+-\d{1,3}", name) for name in names)


@pytest.mark.parametrize(
    "wider",
    [
        [ARCH, Axis("lr", [1.0, 0.1, 0.01, 0.001], low=1e-12, high=1e4, log=True)],
        [Axis("arch", ["10", "100", "500-500"]), RATE],
        [
            Axis("arch", ["500-500", "200", "100"]),
            Axis("lr", [10, 0.1, 0.01, 0.001], low=1e-9, high=1e3, log=True),
        ],
    ],
    ids=["numbers", "choices", "both, in another order"],
)
def test_an_extended_grid_runs_only_what_is_new(path: Path, study: Study, owner: Owner, wider: list[Axis]) -> None:
    first = claimed(study, owner)
    study.finish(first, Finished(first.rows[0].key, 0.25, "complete", result(0.25)))
    claim = claimed(study, owner, size=2)
    study.finish(claim, Finished(claim.rows[0].key, None, "diverged", DIVERGED))
    study.fail(claim, claim.rows[1].key, "Traceback")
    study.retry_failed()
    running = claimed(study, owner)
    before = optuna_study(path).trials

    size = math.prod(len(axis.values) for axis in wider)
    assert study.plan({"dfa": wider}, cells_of(wider)) == size - 6
    assert GridSampler(study.search_space("dfa")).is_exhausted(optuna_study(path)) is False
    study.finish(running, Finished(running.rows[0].key, 0.5, "complete", result(0.5)))
    assert finish_all(study, owner) == size - 3

    read = optuna_study(path)
    assert GridSampler(study.search_space("dfa")).is_exhausted(read)
    assert read.best_value == 0.25
    assert len(read.trials) == size + 1, "only the failed cell has two trials"
    assert [trial.params for trial in read.trials[: len(before)]] == [trial.params for trial in before]
    assert read.trials[0].value == 0.25
    assert len({str(trial.distributions) for trial in read.trials}) == 1
    assert_ids_agree(path, study)


def test_values_and_choices_are_only_appended(study: Study) -> None:
    wider = [Axis("arch", ["10"], choices=["9", "10"]), Axis("lr", [1.0], low=1e-12, high=1e2, log=True)]
    whole = [Axis("arch", ["100", "500-500", "10"]), Axis("lr", [0.1, 0.01, 0.001, 1.0])]
    study.plan({"dfa": wider}, cells_of(whole))
    assert study.axes("dfa") == [
        Axis("arch", ["100", "500-500", "10"], choices=["100", "500-500", "9", "10"]),
        Axis("lr", [0.1, 0.01, 0.001, 1.0], low=1e-12, high=1e3, log=True),
    ]


def test_an_older_study_object_follows_an_extension(path: Path, study: Study, owner: Owner) -> None:
    claimed(study, owner)
    wider = [Axis("arch", ["100", "500-500", "10"]), RATE]
    with Study.open(path) as other:
        other.plan({"dfa": wider}, cells_of(wider))
    finish_all(study, owner)
    assert_ids_agree(path, study)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (
            [ARCH, Axis("lr", [0.5], low=1e-10, high=1e3, log=True)],
            "The grid of 'dfa' must be whole: its values make 8 points, but 7 cells at 7 of them are "
            "planned. Give each parameter all its values, the earlier ones too, and leave the fixed settings "
            "as they were.",
        ),
        (
            [Axis("arch", ["900"]), RATE],
            "The grid of 'dfa' must be whole: its values make 9 points, but 6 cells at 6 of them are "
            "planned. Give each parameter all its values, the earlier ones too, and leave the fixed settings "
            "as they were.",
        ),
        (
            [ARCH, RATE, BATCH],
            "The parameters of 'dfa' are arch, lr in this experiment, not arch, batch_size, lr; start a new "
            "experiment.",
        ),
        (
            [ARCH, Axis("lr", [0.5])],
            "The parameter 'lr' is float, on a log scale in this experiment, not categorical; start a new experiment.",
        ),
        (
            [ARCH, Axis("lr", [5e4], low=1e-10, high=1e3, log=True)],
            "The parameter 'lr' takes 1e-10 to 1000.0, not 50000.0.",
        ),
    ],
)
def test_a_plan_that_cannot_be_is_refused_whole(study: Study, axes: list[Axis], message: str) -> None:
    before = study.rows(), study.axes("dfa")
    with pytest.raises(UsageError) as raised:
        study.plan({"dfa": axes}, cells_of([Axis("arch", ["100"]), *axes[1:]]))
    assert str(raised.value) == message
    assert (study.rows(), study.axes("dfa")) == before


def test_a_changed_fixed_setting_is_refused(study: Study) -> None:
    changed = [
        Cell(f"epochs=9:{cell.key}", cell.rule, cell.structure, cell.params, cell.spec)
        for cell in cells_of([ARCH, RATE])
    ]
    with pytest.raises(UsageError, match="12 cells at 6 of them are planned"):
        study.plan({"dfa": [ARCH, RATE]}, changed)


def test_an_unknown_rule_is_named(study: Study) -> None:
    with pytest.raises(UsageError) as raised:
        study.search_space("dfb")
    assert str(raised.value) == "No learning rule 'dfb' in 'mine'. Did you mean 'dfa'?"


# Claims


def test_a_claim_is_a_cohort_of_one_structure(study: Study, owner: Owner) -> None:
    asked: list[Row] = []
    claim = study.claim(owner, lambda row: asked.append(row) or 5)
    assert claim is not None
    assert [row.key for row in asked] == [study.rows()[0].key]
    assert [row.params["arch"] for row in claim.rows] == ["100"] * 3
    assert claim.rows == study.rows(state="running")
    assert {row.cohort for row in claim.rows} == {claim.cohort}
    assert [row.attempt for row in claim.rows] == [1, 1, 1]
    assert not claim.resumed
    assert claimed(study, owner, size=2).rows == study.rows()[3:5]


def test_the_cohort_is_named_after_its_members(path: Path, tmp_path: Path, study: Study, owner: Owner) -> None:
    with planned(tmp_path / "again.db", [ARCH, Axis("lr", [0.001, 0.1, 0.01], low=1e-10, high=1e3, log=True)]) as same:
        assert claimed(study, owner, 3).cohort == claimed(same, owner, 3).cohort
        assert claimed(study, owner, 3).cohort != claimed(same, owner, 2).cohort


def test_nothing_to_claim_is_none(study: Study, owner: Owner) -> None:
    while study.claim(owner, lambda row: 2):
        pass
    assert study.counts()["running"] == 6
    assert study.claim(owner, lambda row: 1) is None


@pytest.mark.slow
def test_four_processes_claim_each_cell_once(path: Path) -> None:
    rates = Axis("lr", [float(1 + n) for n in range(200)], low=1e-10, high=1e3, log=True)
    planned(path, [rates]).close()
    script = """
        import sys
        from bpf.study.cells import Finished
        from bpf.study.owner import Owner
        from bpf.study.study import Study

        with Study.open(sys.argv[1]) as study, Owner(study.locks) as owner:
            while (claim := study.claim(owner, lambda row: 3)) is not None:
                for row in claim.rows:
                    study.finish(claim, Finished(row.key, row.params["lr"], "complete", {"owner": owner.token}))
                    print(row.key)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(path)]
    children = [
        subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    done = [child.communicate()[0].splitlines() for child in children]
    assert [child.returncode for child in children] == [0, 0, 0, 0]
    assert sorted(itertools.chain(*done)) == sorted(cell.key for cell in cells_of([rates]))
    with Study.open(path) as study:
        assert study.counts()["complete"] == 200
        read = optuna_study(path)
        assert sorted(trial.number for trial in read.trials) == list(range(200))
        assert GridSampler(study.search_space("dfa")).is_exhausted(read)


def test_threads_may_share_a_study(study: Study) -> None:
    counts: list[int] = []

    def work() -> None:
        with Owner(study.locks) as owner:
            counts.append(finish_all(study, owner))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(counts) == 6
    assert study.counts()["complete"] == 6


def test_claiming_and_finishing_use_an_index_for_everything(path: Path, study: Study, owner: Owner) -> None:
    statements: list[tuple[str, Any]] = []

    def note(_: object, cursor: object, statement: str, parameters: Any, context: object, many: bool) -> None:
        if statement.startswith(("SELECT", "UPDATE", "DELETE")):
            statements.append((statement, parameters[0] if many else parameters))

    sa.event.listen(sa.Engine, "before_cursor_execute", note)
    try:
        claim = claimed(study, owner, size=2)
        study.release(claim)
        claim = claimed(study, owner, size=2)
        study.finish(claim, Finished(claim.rows[0].key, 1.0, "complete", result(1.0)))
        study.fail(claim, claim.rows[1].key, "Traceback")
        study.repair()
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", note)
    assert len(statements) > 15
    with closing(sqlite3.connect(path)) as raw:
        for statement, parameters in statements:
            for *_, step in raw.execute(f"EXPLAIN QUERY PLAN {statement}", parameters).fetchall():
                assert not step.startswith("SCAN"), statement
                assert not step.endswith("(experiment=?)") or "bpf_rules" in step, statement
                assert "structure = ?" not in statement or "structure=?" in step, statement


# Outcomes


def test_a_diverged_cell_is_never_best_and_never_retried(path: Path, study: Study, owner: Owner) -> None:
    claim = claimed(study, owner, size=2)
    study.finish(claim, Finished(claim.rows[0].key, None, "diverged", DIVERGED | {"epoch": 3, "loss": math.nan}))
    study.finish(claim, Finished(claim.rows[1].key, 2.0, "complete", result(2.0)))
    assert study.retry_failed() == 0
    row = study.rows(state="diverged")[0]
    assert row.value is None
    assert row.result is not None
    assert row.result["epoch"] == 3
    assert math.isnan(row.result["loss"])
    read = optuna_study(path)
    assert read.best_value == 2.0
    assert read.trials[0].state == TrialState.PRUNED
    assert read.trials[0].value is None
    assert read.trials[0].user_attrs["result"]["epoch"] == 3


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_complete_needs_a_finite_value(value: float | None) -> None:
    with pytest.raises(ValueError, match=r"A complete cell has a finite value, not .*; did it diverge"):
        Finished("key", value, "complete", {})
    with pytest.raises(ValueError, match="A cell finishes as 'complete' or 'diverged', not as 'done'"):
        Finished("key", 1.0, "done", {})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="A diverged cell has no value"):
        Finished("key", -5.0, "diverged", {})


def test_a_failed_cell_is_tried_again_in_a_new_trial(path: Path, study: Study, owner: Owner) -> None:
    claim = claimed(study, owner)
    study.fail(claim, claim.rows[0].key, "Traceback: no such rule")
    failed = study.rows(state="failed")[0]
    assert (failed.error, failed.trial_number) == ("Traceback: no such rule", 0)
    assert optuna_study(path).trials[0].state == TrialState.FAIL
    assert optuna_study(path).trials[0].user_attrs["error"] == "Traceback: no such rule"
    assert claimed(study, owner).rows[0].ordinal == 1, "not retried unasked"

    assert study.retry_failed() == 1
    again = claimed(study, owner)
    row = again.rows[0]
    assert (row.key, row.trial_number, row.attempt, row.error) == (failed.key, 2, 1, None)
    assert row.name != failed.name
    study.finish(again, Finished(row.key, 0.0, "complete", result(0.0)))
    assert optuna_study(path).best_trial.number == 2


def lost(row: Row) -> str:
    return f"The cell {row.name} ({row.key}) is no longer owned by this process; its outcome was not stored."


def test_a_cell_is_finished_once(path: Path, study: Study, owner: Owner) -> None:
    claim = claimed(study, owner)
    row = claim.rows[0]
    study.finish(claim, Finished(row.key, 1.0, "complete", result(1.0)))
    with pytest.raises(RunError) as raised:
        study.finish(claim, Finished(row.key, 2.0, "complete", result(2.0)))
    assert str(raised.value) == lost(row)
    with pytest.raises(RunError) as raised:
        study.fail(claim, row.key, "Traceback")
    assert str(raised.value) == lost(row)
    assert [trial.value for trial in optuna_study(path).trials] == [1.0]


def test_cells_of_a_claim_are_finished_together_or_not_at_all(path: Path, study: Study, owner: Owner) -> None:
    claim = claimed(study, owner, size=3)
    values = {row.key: 1.0 + row.ordinal for row in claim.rows}
    outcomes = [Finished(key, value, "complete", result(value), [RECORD]) for key, value in values.items()]
    study.finish(claim, outcomes[1])
    with pytest.raises(Fenced) as raised:
        study.finish(claim, *outcomes)
    assert str(raised.value) == lost(claim.rows[1])
    assert [row.state for row in study.rows()[:3]] == ["running", "complete", "running"]
    assert [trial.state for trial in optuna_study(path).trials].count(TrialState.COMPLETE) == 1
    assert study.history(outcomes[0].key) is None
    study.finish(claim, outcomes[0], outcomes[2])
    assert [row.value for row in study.rows(state="complete")] == [1.0, 2.0, 3.0]
    assert [trial.value for trial in optuna_study(path).trials] == [1.0, 2.0, 3.0]
    assert all(study.history(one.key) == [RECORD] for one in outcomes)


def test_a_released_cell_cannot_be_finished(study: Study, owner: Owner) -> None:
    claim = claimed(study, owner)
    assert study.release(claim) == 1
    assert study.release(claim) == 0
    with pytest.raises(RunError) as raised:
        study.finish(claim, Finished(claim.rows[0].key, 2.0, "complete", result(2.0)))
    assert str(raised.value) == lost(claim.rows[0])
    assert study.counts()["interrupted"] == 1


def test_the_value_of_the_new_owner_stays(path: Path, study: Study, owner: Owner) -> None:
    late = Owner(study.locks)
    stale = claimed(study, late)
    late.close()
    claim = claimed(study, owner)
    row = claim.rows[0]
    assert row.key == stale.rows[0].key
    with pytest.raises(RunError) as raised:
        study.finish(stale, Finished(row.key, 7.0, "complete", result(7.0, by="old")))
    assert str(raised.value) == lost(row)
    study.finish(claim, Finished(row.key, 1.0, "complete", result(1.0, by="new")))
    with pytest.raises(RunError) as raised:
        study.finish(stale, Finished(row.key, 8.0, "complete", result(8.0, by="old")))
    assert str(raised.value) == lost(row)
    assert study.rows(state="complete")[0].value == 1.0
    assert [(trial.value, trial.user_attrs["result"]) for trial in optuna_study(path).trials] == [
        (1.0, result(1.0, by="new"))
    ]


# What survives


def test_a_killed_process_leaves_its_cohort_to_the_next_at_once(path: Path, study: Study, owner: Owner) -> None:
    assert run_child(KILLED_WHILE_TRAINING, path, 3, 1).returncode == -signal.SIGKILL
    before = optuna_study(path).trials
    assert study.counts() == {
        "pending": 3, "interrupted": 2, "running": 0, "complete": 1, "diverged": 0, "failed": 0,
    }  # fmt: skip
    left = study.rows(state="interrupted")

    claim = claimed(study, owner, size=1)
    assert claim.resumed
    assert claim.cohort == study.rows(state="complete")[0].cohort
    assert [(row.key, row.trial_id, row.trial_number, row.name, row.attempt) for row in claim.rows] == [
        (row.key, row.trial_id, row.trial_number, row.name, 2) for row in left
    ]
    for row in claim.rows:
        study.finish(claim, Finished(row.key, 1.0, "complete", result(1.0)))
    after = optuna_study(path).trials
    assert [trial.user_attrs["attempt"] for trial in after] == [1, 2, 2]
    assert [(trial.number, trial.datetime_start, trial.params) for trial in after] == [
        (trial.number, trial.datetime_start, trial.params) for trial in before
    ]
    assert not claimed(study, owner).resumed


def test_a_released_cohort_goes_on_before_new_ones(path: Path, study: Study, owner: Owner) -> None:
    claim = claimed(study, owner, size=2)
    claimed(study, owner, size=3)
    study.release(claim)
    again = claimed(study, owner, size=1)
    assert (again.cohort, [row.key for row in again.rows]) == (claim.cohort, [row.key for row in claim.rows])
    assert [row.trial_id for row in again.rows] == [row.trial_id for row in claim.rows]
    assert [trial.state for trial in optuna_study(path).trials[:2]] == [TrialState.RUNNING] * 2


def test_a_dissolved_cohort_goes_on_in_smaller_ones(path: Path, study: Study, owner: Owner) -> None:
    big = claimed(study, owner, size=3)
    assert study.release(big, max_runs=2) == 3
    assert study.counts()["pending"] == 6
    small = claimed(study, owner, size=2)
    assert small.cohort != big.cohort
    assert [(row.trial_id, row.attempt) for row in small.rows] == [(row.trial_id, 2) for row in big.rows[:2]]
    assert len(optuna_study(path).trials) == 3


KILLED_INSIDE = """
    import os, signal, sys
    from bpf.study import plan
    from bpf.study.owner import Owner
    from bpf.study.study import Study
    from bpf.study.trials import Trials

    def killed(*arguments, **options):
        if sys.argv[3] == "after":
            original(*arguments, **options)
        os.kill(os.getpid(), signal.SIGKILL)

    study = Study.open(sys.argv[1])
    owner = plan if hasattr(plan, sys.argv[2]) else Trials
    original = getattr(owner, sys.argv[2])
    setattr(owner, sys.argv[2], killed)
    claim = study.claim(Owner(study.locks), lambda row: 1)
    study.finish(claim, Finished(claim.rows[0].key, 0.5, "complete", result(0.5, loss=0.5), [RECORD]))
"""


@pytest.mark.parametrize(
    ("step", "moment"),
    [
        ("begin", "after"),  # in a claim
        ("end", "after"),  # in what stores an outcome
        *(
            pytest.param(*other, marks=pytest.mark.slow)
            for other in (
                *(("begin", "before"), ("end", "before")),
                *(("keep_histories", "before"), ("keep_histories", "after")),
            )
        ),
    ],
)
def test_a_kill_between_our_write_and_optunas_leaves_neither(
    path: Path, study: Study, owner: Owner, step: str, moment: str
) -> None:
    assert run_child(KILLED_INSIDE, path, step, moment).returncode == -signal.SIGKILL
    began = step != "begin"
    assert study.repair() == began
    assert study.counts()["complete"] == 0
    assert [trial.state for trial in optuna_study(path).trials] == [TrialState.RUNNING] * began

    assert finish_all(study, owner) == 6
    read = optuna_study(path)
    assert [(trial.number, trial.state) for trial in read.trials] == [(n, TrialState.COMPLETE) for n in range(6)]
    assert read.trials[0].user_attrs["attempt"] == 1 + began
    assert GridSampler(study.search_space("dfa")).is_exhausted(read)


def test_a_forked_child_does_not_keep_its_dead_parent_alive(path: Path, study: Study) -> None:
    script = """
        import os, signal, sys
        from bpf.study.owner import Owner
        from bpf.study.study import Study

        study = Study.open(sys.argv[1])
        owner = Owner(study.locks)
        study.claim(owner, lambda row: 1)
        if os.fork() == 0:
            try:
                owner.close()
            finally:
                print("forked", flush=True)
                sys.stdin.read()
        else:
            signal.pause()
    """
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script), str(path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with parent:
        try:
            assert parent.stdout is not None
            assert parent.stdout.readline() == "forked\n"
            assert study.counts()["running"] == 1, "what the child does with its copy leaves the owner alone"
        finally:
            parent.kill()
        parent.wait()
        assert study.counts()["interrupted"] == 1


def test_the_locks_of_this_process_need_no_look(study: Study, owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Owner(study.locks)
    claimed(study, owner)
    claimed(study, other)
    looked: list[Path] = []
    monkeypatch.setattr(bpf.study.owner, "is_held", lambda lock, *_: looked.append(lock))
    assert study.counts()["running"] == 2
    assert not looked
    other.close()
    assert study.counts()["running"] == 1
    assert looked == [other.lock]


def test_lock_files_of_the_dead_are_removed(path: Path, study: Study, owner: Owner) -> None:
    run_child(KILLED_WHILE_TRAINING, path, 1, 0)
    run_child(KILLED_WHILE_TRAINING, path, 1, 1)
    assert len(list(study.locks.glob("*.lock"))) == 2, "the second one's claim removed the first one's"
    assert study.repair() == 0, "the second one finished what the first had left"
    assert [file.stem for file in study.locks.glob("*.lock")] == [owner.token]
    owner.close()
    assert list(study.locks.glob("*.lock")) == []


def test_a_moved_experiment_goes_on(tmp_path: Path) -> None:
    with planned(tmp_path / "here" / "study.db", [ARCH, RATE]) as study:
        owner = Owner(study.locks)
        claim = claimed(study, owner, size=2)
        owner.close()
    shutil.move(tmp_path / "here", tmp_path / "the re")
    with Study.open(tmp_path / "the re" / "study.db", "mine") as study, Owner(study.locks) as owner:
        assert study.settings == {"objective": "loss"}
        assert claimed(study, owner).cohort == claim.cohort
        finish_all(study, owner)
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize("name", ["sp ace", "br{ac}e", "100%25", "what?x=1#y"])
def test_any_path_will_do(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with planned(Path(name) / "study.db", [RATE]) as study:
        monkeypatch.chdir("/")
        assert study.counts()["pending"] == 3
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert (tmp_path / name / "study.db").is_file()


# Opening


def opening_fails(where: str | Path, experiment: str | None = None) -> str:
    with pytest.raises(BpfError) as raised:
        Study.open(where, experiment)
    return str(raised.value)


def test_a_url_opens_the_same_study(path: Path, study: Study) -> None:
    with Study.open(f"sqlite:///{path}") as same:
        assert same.rows() == study.rows()


def test_other_databases_are_refused() -> None:
    assert opening_fails("mysql://host/bpf") == (
        "A study is kept in SQLite or PostgreSQL, not in 'mysql': give a path, sqlite:///PATH or "
        "postgresql://USER@HOST/DATABASE. Did you mean 'sqlite'?"
    )


def test_a_missing_database_is_not_made(path: Path) -> None:
    assert opening_fails(path) == f"There is no study database {path}."
    assert not path.exists()


def test_a_text_file_is_no_database(path: Path) -> None:
    path.write_text("lr: 0.1\n" * 200)
    reason = f"{path} is damaged: file is not a database. Put back a copy of it, or start anew elsewhere."
    assert opening_fails(path) == reason
    with pytest.raises(Damaged) as raised:
        Study.create(path, "mine", {})
    assert str(raised.value) == reason


def test_a_directory_is_no_database(tmp_path: Path) -> None:
    assert opening_fails(tmp_path) == (
        f"{tmp_path} is a directory; the study is a file in it, such as {tmp_path / 'study.db'}."
    )


def test_a_foreign_database_is_left_as_it_is(path: Path) -> None:
    with closing(sqlite3.connect(path)) as raw, raw:
        raw.execute("CREATE TABLE mine (x)")
    before = path.read_bytes()
    assert opening_fails(path) == f"{path} is a database, but no bpf study."
    assert path.read_bytes() == before


@pytest.mark.parametrize(("version", "made_by"), [(0, "an older"), (schema.SCHEMA_VERSION + 1, "a newer")])
def test_another_format_is_refused(path: Path, study: Study, version: int, made_by: str) -> None:
    with closing(sqlite3.connect(path)) as raw, raw:
        raw.execute("UPDATE bpf_experiment SET schema_version = ?", [version])
    assert opening_fails(path) == (
        f"{path} was made by {made_by} bpf (format {version}, this one reads {schema.SCHEMA_VERSION}); "
        "go on with the bpf that made it."
    )
    with pytest.raises(UsageError, match=f"was made by {made_by} bpf"):
        Study.create(path, "yours", {})


def test_an_unknown_experiment_is_refused(path: Path, study: Study) -> None:
    assert opening_fails(path, "mime") == f"{path} has no experiment 'mime'. Did you mean 'mine'?"
    Study.create(path, "yours", {}).close()
    assert opening_fails(path) == f"{path} has several experiments. Known: mine, yours."


def test_an_experiment_is_made_once(path: Path, study: Study) -> None:
    with pytest.raises(UsageError) as raised:
        Study.create(path, "mine", {"objective": "error"})
    assert str(raised.value) == f"The experiment 'mine' exists already in {path}."
    assert study.counts()["pending"] == 6


def test_experiments_in_one_database_do_not_mix(path: Path, study: Study, owner: Owner) -> None:
    with Study.create(path, "yours", {}) as yours:
        yours.plan({"dfa": [RATE]}, cells_of([RATE]))
        finish_all(study, owner)
        assert yours.counts()["pending"] == 3
        assert study.counts()["complete"] == 6


def test_another_optuna_is_refused(path: Path, study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optuna, "__version__", "4.9.0")
    assert opening_fails(path) == "bpf needs optuna 5, but 4.9.0 is installed: pip install 'optuna>=5,<6'"


def test_an_optuna_that_numbers_otherwise_is_refused(path: Path, study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bpf.study.trials, "GridSampler", lambda space: GridSampler(space, seed=1))
    assert opening_fails(path) == (
        f"optuna {optuna.__version__} numbers the points of a grid differently from optuna 5.0, "
        "which bpf was made for: pip install optuna==5.0.0"
    )


def test_a_network_file_system_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "_file_system", lambda directory, mounts: "nfs4")
    with pytest.raises(UsageError) as raised:
        Study.create(path, "mine", {})
    assert str(raised.value) == (
        f"{path} is on a network file system (nfs4), where SQLite cannot lock reliably; "
        "keep the experiment on a local disk, or its study on a server with "
        "--storage postgresql://USER@HOST/DATABASE."
    )


def test_the_innermost_mount_tells_the_file_system(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "none / overlay rw 0 0\nserver:/x /home nfs4 rw 0 0\nnone /home/me/disk ext4 rw 0 0\nnone / xfs rw\n"
    )
    found = [database._file_system(Path(place), mounts) for place in ("/tmp", "/home/me", "/home/me/disk/exp")]
    assert found == ["xfs", "nfs4", "ext4"]


# A database that fails


def test_a_locked_database_is_a_run_error(
    path: Path, study: Study, owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "BUSY_SECONDS", 0)
    with Study.open(path) as impatient, closing(sqlite3.connect(path, isolation_level=None)) as raw:
        raw.execute("BEGIN IMMEDIATE")
        with pytest.raises(RunError) as raised:
            impatient.claim(owner, lambda row: 1)
        assert str(raised.value) == "The study database failed: database is locked."
        raw.execute("ROLLBACK")
        assert impatient.claim(owner, lambda row: 1) is not None


def ended_from_outside(path: Path, trial: FrozenTrial) -> None:
    optuna_study(path).tell(trial.number, 0.0)


def deleted_from_outside(path: Path, trial: FrozenTrial) -> None:
    optuna.delete_study(study_name="mine/dfa", storage=storage(path))


@pytest.mark.parametrize("meddle", [ended_from_outside, deleted_from_outside])
def test_a_trial_that_another_program_ended_is_reported(
    path: Path, study: Study, owner: Owner, meddle: Callable[[Path, FrozenTrial], None]
) -> None:
    claim = claimed(study, owner)
    meddle(path, optuna_study(path).trials[0])
    with pytest.raises(RunError) as raised:
        study.finish(claim, Finished(claim.rows[0].key, 1.0, "complete", result(1.0)))
    assert str(raised.value) == (
        f"Another program has deleted or ended the Optuna trial with the id {claim.rows[0].trial_id}, "
        "which bpf was running; the outcome of its cell was not stored."
    )
    assert study.counts()["running"] == 1
