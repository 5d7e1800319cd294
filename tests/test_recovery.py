"""Any process may be killed at any moment: the grid goes on to the numbers of an undisturbed run."""

import signal
from pathlib import Path
from typing import Any

import pytest

from bpf.cli import app as cli
from bpf.errors import RunError
from bpf.experiment.directory import open_experiment
from bpf.results import summary
from chaos import Command, assert_ran_once, assert_tidy, outcomes

RULES = ("bp", "drtp", "ll-cce")
GRID = [
    *("--dataset", "digits", "--algorithm", ",".join(RULES), "--arch", "12,9-7", "--activation", "tanh"),
    *("--batch-norm", "--bw-init", "ortho", "--lr", "0.001,0.01", "--epochs", "4", "--examples-frac", "1"),
    *("--executions-per-trial", "2", "--checkpoint-every", "0", "--quiet"),
]
pytestmark = pytest.mark.usefixtures("in_this_process")  # what this process goes on with
RESTARTED = "Worker 1 crashed (by signal SIGKILL) and is started again."


def run(*arguments: str) -> int:
    try:
        cli.main(list(arguments))
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("undisturbed") / "grid"
    assert run("tune", str(directory), *GRID, "--workers", "1") == 0
    return outcomes(directory)


def assert_undisturbed(directory: Path, undisturbed: dict[str, Any]) -> None:
    assert outcomes(directory) == undisturbed
    assert_ran_once(directory)
    assert_tidy(directory)


def test_after_the_death_of_a_worker_and_then_of_the_command_the_numbers_are_the_same(
    undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    """In short what the others here do at every place."""
    directory = tmp_path / "grid"
    arguments = ("tune", str(directory), *GRID, "--workers", "1")
    with Command(tmp_path / "command", *arguments) as command:
        command.until("stored")
        command.arm({"worker after bpf.training.checkpoint:save": 1})
        assert command.until("killed") is not None, command.output
        assert command.until("stored") is not None, "by the worker that is started again"
        assert command.kill(command.process.pid)
        assert command.wait() == -signal.SIGKILL
        command.wait_for_nobody()
        assert RESTARTED in command.output
        assert "Traceback" not in command.output
    assert {row.state for row in summary.rows(open_experiment(directory))} != {"complete"}
    assert run(*arguments) == 0
    assert_undisturbed(directory, undisturbed)


@pytest.mark.usefixtures("in_workers")
@pytest.mark.parametrize(
    "places",
    [
        pytest.param(
            (
                "before bpf.study.study:Study.claim",
                "after bpf.study.trials:Trials.begin",
                "after bpf.study.study:Study.claim",
            ),
            id="claim",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("before bpf.training.cohort:Cohort.run_epoch", "after bpf.training.cohort:Cohort.run_epoch"),
            id="epoch",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("after bpf.nn.optim:StackedOptimizer.step", "before bpf.workers.worker:Worker.run"),
            id="step",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            (
                "before bpf.training.checkpoint:save",
                "before os:fsync",
                "after os:fsync",
                "after bpf.training.checkpoint:save",
            ),
            id="checkpoint",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("before bpf.results.models:save", "after bpf.results.models:save"), id="model", marks=pytest.mark.slow
        ),
        pytest.param(
            (
                "before bpf.study.study:Study.finish",
                "after bpf.study.trials:Trials.end",
                "after bpf.study.study:Study.finish",
            ),
            id="finish",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            (
                "before bpf.workers.files:Folder.clear",
                "before bpf.workers.files:Folder.discard",
                "after bpf.workers.files:Folder.discard",
            ),
            id="discard",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_worker_killed_at_any_place_is_started_again_and_the_numbers_are_the_same(
    places: tuple[str, ...], undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    directory = tmp_path / "grid"
    with Command(tmp_path / "command", "tune", str(directory), *GRID, "--workers", "1") as command:
        for place in places:
            command.until("stored")
            command.arm({f"worker {place}": 1})
            if place.endswith("Worker.run"):  # which only a worker that is started again passes
                assert command.kill(command.workers[0])
            assert command.until("killed") is not None, f"{place} was not passed\n{command.output}"
        assert command.wait() == 0, command.output
        command.wait_for_nobody()
        assert RESTARTED in command.output
        assert "Traceback" not in command.output
    assert_undisturbed(directory, undisturbed)


@pytest.mark.slow
@pytest.mark.usefixtures("in_workers")
@pytest.mark.parametrize(
    "places",
    [
        {
            "before bpf.experiment.directory:Experiment.save": 1,
            "before os:fsync": 1,
            "after os:fsync": 1,
            "after bpf.experiment.directory:Experiment.save": 1,
            "before bpf.study.schema:add_experiment": 1,
            "after bpf.study.study:Study.create": 1,
            "after bpf.study.plan:insert": 1,
            "after bpf.study.study:Study.plan": 1,
        },
        {
            "after bpf.workers.supervisor:Supervisor._start": 1,
            "before bpf.workers.supervisor:Supervisor._hear": 10,
            "after bpf.workers.supervisor:Supervisor._hear": 12,
        },
    ],
    ids=["planning", "training"],
)
def test_a_supervisor_killed_at_any_place_takes_its_workers_along_and_the_command_goes_on(
    places: dict[str, int], undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    directory = tmp_path / "grid"
    arguments = ("tune", str(directory), *GRID, "--workers", "2")
    for number, (place, passes) in enumerate(places.items()):
        faults = {f"supervisor {place}": passes}
        with Command(tmp_path / f"command {number}", *arguments, faults=faults) as command:
            assert command.wait() == -signal.SIGKILL, f"{place} was not passed\n{command.output}"
            if number == len(places) - 1:  # it takes a while, as what workers are forked from ends its imports first
                command.wait_for_nobody()
            assert command.output == ""
    assert run(*arguments) == 0
    assert_undisturbed(directory, undisturbed)


@pytest.mark.slow
@pytest.mark.usefixtures("in_workers")
def test_the_command_goes_on_while_the_workers_of_a_killed_one_still_end(
    undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    directory = tmp_path / "grid"
    arguments = ("tune", str(directory), *GRID, "--workers", "2")
    with Command(tmp_path / "first", *arguments) as first:
        first.until("stored")
        assert first.kill(first.process.pid)
        assert run(*arguments) == 0
        assert first.wait() == -signal.SIGKILL
        first.wait_for_nobody()
    assert_undisturbed(directory, undisturbed)


@pytest.mark.slow
@pytest.mark.usefixtures("in_workers")
def test_deaths_before_a_checkpoint_do_not_count_after_it(undisturbed: dict[str, Any], tmp_path: Path) -> None:
    """As long as a cohort gets further it is not trained apart, which would throw its checkpoint away."""
    directory = tmp_path / "grid"
    with Command(tmp_path / "command", "tune", str(directory), *GRID, "--workers", "1") as command:
        for place, passes in (
            ("before bpf.training.cohort:Cohort.run_epoch", 1),
            ("before bpf.training.cohort:Cohort.run_epoch", 1),
            ("after bpf.training.checkpoint:save", 3),
        ):
            command.arm({f"worker {place}": passes})
            assert command.until("killed") is not None, command.output
        assert command.wait() == 0, command.output
    rows = summary.rows(open_experiment(directory))
    assert {row.max_runs for row in rows} == {None}
    assert max(row.attempt for row in rows) == 4
    assert_undisturbed(directory, undisturbed)


@pytest.mark.slow
@pytest.mark.usefixtures("in_workers")
@pytest.mark.skipif(not Path("/proc").exists(), reason="the process is found in /proc")
def test_the_death_of_the_process_that_workers_are_forked_from_does_no_harm(
    undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    """It has bpf's modules in memory, so the system may choose it when memory is short."""
    directory = tmp_path / "grid"
    with Command(tmp_path / "command", "tune", str(directory), *GRID, "--workers", "2") as command:
        for _ in range(3):
            command.until("started")
        left = {pid for pid, line in command.left_over().items() if "multiprocessing.forkserver" in line}
        (server,) = left - set(command.workers)
        assert command.kill(server)
        command.until("stored")
        command.arm({"worker after bpf.training.checkpoint:save": 1})
        assert command.until("killed") is not None
        assert command.wait() == 0, command.output
        command.wait_for_nobody()
        assert "is started again" in command.output
        assert "Traceback" not in command.output
    assert_undisturbed(directory, undisturbed)


@pytest.mark.slow
@pytest.mark.usefixtures("in_workers")
def test_a_resume_really_continues_and_does_not_start_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bpf.training.cohort import Cohort

    directory = tmp_path / "run"
    arguments = ("--dataset", "digits", "--algorithm", "dfa", "--epochs", "5", "--arch", "8", "--quiet")
    # a single run is trained by the command's own process
    faults = {"supervisor after bpf.training.checkpoint:save": 3}
    with Command(
        tmp_path / "command", "train", str(directory), *arguments, "--checkpoint-every", "0", faults=faults
    ) as c:
        assert c.wait() == -signal.SIGKILL, c.output
    epochs = []
    original = Cohort.run_epoch
    monkeypatch.setattr(Cohort, "run_epoch", lambda self: (epochs.append(self.epoch), original(self)))
    assert run("resume", str(directory), "--quiet") == 0
    assert epochs == [3, 4]


def test_what_the_last_process_left_when_it_was_killed_is_removed(undisturbed: dict[str, Any], tmp_path: Path) -> None:
    directory = tmp_path / "grid"
    assert run("tune", str(directory), *GRID, "--workers", "1") == 0
    [best] = (directory / "models/bp").iterdir()
    rows = summary.rows(open_experiment(directory))
    worse = next(row.key for row in rows if row.rule == "bp" and row.key != best.stem)
    foreign = directory / "locks/mine.lock"
    for path in (directory / f"models/bp/{worse}.safetensors", directory / "locks/0123456789abcdef.lock", foreign):
        path.touch()
    assert run("resume", str(directory), "--quiet") == 0
    assert list((directory / "models/bp").iterdir()) == [best]
    assert sorted(path.name for path in (directory / "locks").iterdir()) == ["making-tables", "mine.lock"]
    foreign.unlink()
    assert_undisturbed(directory, undisturbed)


def test_that_nothing_could_be_cleared_up_is_no_failure_of_a_grid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*arguments: object) -> None:
        raise RunError("The database cannot be reached.")

    directory = tmp_path / "grid"
    assert run("tune", str(directory), *GRID, "--workers", "1") == 0
    monkeypatch.setattr("bpf.workers.files.Folder.clear", away)  # here it is only asked for at the end
    assert run("resume", str(directory), "--quiet") == 0
