"""Any process may be killed at any moment: the grid goes on to the numbers of an undisturbed run."""

import signal
from pathlib import Path
from typing import Any

import pytest

from bpf import api, cli
from bpf.experiment import open_experiment
from chaos import Command, assert_ran_once, files, needed, outcomes

RULES = ("bp", "drtp", "ll-cce")
GRID = [
    *("--dataset", "digits", "--algorithm", ",".join(RULES), "--arch", "12,9-7", "--activation", "tanh"),
    *("--batch-norm", "--bw-init", "ortho", "--lr", "0.001,0.01", "--epochs", "4", "--examples-frac", "1"),
    *("--executions-per-trial", "2", "--checkpoint-every", "0", "--quiet"),
]
RESTARTED = "Worker {} crashed (by signal SIGKILL) and is started again."


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
    print("CLEANED", api.clean(open_experiment(directory))["files"])
    assert files(directory) == needed(directory)


@pytest.mark.parametrize(
    ("place", "passes"),
    [
        ("before bpf.worker:Worker.run", 1),
        ("before bpf.study:Study.claim", 2),
        ("after bpf.trials:Trials.begin", 1),
        ("after bpf.study:Study.claim", 2),
        ("before bpf.training:Cohort.run_epoch", 3),
        ("after bpf.optim:StackedOptimizer.step", 30),
        ("after bpf.training:Cohort.run_epoch", 6),
        ("before bpf.checkpoint:save", 4),
        ("before os:fsync", 3),
        ("after os:fsync", 5),
        ("after bpf.checkpoint:save", 3),
        ("before bpf.models:save", 1),
        ("after bpf.models:save", 1),
        ("before bpf.study:Study.finish", 2),
        ("after bpf.trials:Trials.end", 1),
        ("after bpf.study:Study.finish", 3),
        ("before bpf.worker:Worker._discard_models", 1),
        ("before bpf.worker:Worker._discard_checkpoint", 1),
    ],
)
def test_a_worker_killed_at_any_place_is_started_again_and_the_numbers_are_the_same(
    place: str, passes: int, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    directory = tmp_path / "grid"
    faults = {f"worker {place}": passes}
    with Command(tmp_path / "command", "tune", str(directory), *GRID, "--workers", "2", faults=faults) as command:
        killed = command.until("killed")
        assert killed is not None, "the place was not passed"
        assert command.wait() == 0, command.output
        command.wait_for_nobody()
        assert any(RESTARTED.format(number) in command.output for number in (1, 2))
        assert "Traceback" not in command.output
    assert_undisturbed(directory, undisturbed)


@pytest.mark.parametrize(
    ("place", "passes"),
    [
        ("before bpf.experiment:Experiment.save", 1),
        ("before os:fsync", 1),
        ("after os:fsync", 1),
        ("after bpf.experiment:Experiment.save", 1),
        ("before bpf.schema:add_experiment", 1),
        ("after bpf.study:Study.create", 1),
        ("after bpf.plan:insert", 1),
        ("after bpf.study:Study.plan", 1),
        ("after bpf.supervisor:Supervisor._start", 1),
        ("after bpf.supervisor:Supervisor._hear", 12),
    ],
)
def test_a_supervisor_killed_at_any_place_takes_its_workers_along_and_the_command_goes_on(
    place: str, passes: int, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    directory = tmp_path / "grid"
    faults = {f"supervisor {place}": passes}
    with Command(tmp_path / "command", "tune", str(directory), *GRID, "--workers", "2", faults=faults) as command:
        assert command.wait() == -signal.SIGKILL, command.output
        command.wait_for_nobody()
        assert command.output == ""
    assert run("tune", str(directory), *GRID, "--workers", "2") == 0
    assert_undisturbed(directory, undisturbed)


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


def test_killed_again_and_again_it_resumes_to_the_same_numbers(undisturbed: dict[str, Any], tmp_path: Path) -> None:
    """Each worker of a grid dies several times, and the supervisor as well."""
    directory = tmp_path / "grid"
    commands = [
        ("tune", str(directory), *GRID, "--workers", "2"),
        ("resume", str(directory), "--quiet", "--checkpoint-every", "0", "--workers", "1"),
    ]
    for number, arguments in enumerate(commands):
        with Command(tmp_path / f"command {number}", *arguments) as command:
            for place, passes in (("after bpf.checkpoint:save", 2), ("after bpf.study:Study.finish", 1)):
                command.until("stored")
                command.arm({f"worker {place}": passes})
                assert command.until("killed") is not None, command.output
            command.until("stored")
            assert command.kill(command.process.pid)
            assert command.wait() == -signal.SIGKILL
            command.wait_for_nobody()
    assert run("resume", str(directory), "--quiet") == 0
    assert_undisturbed(directory, undisturbed)


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
        command.arm({"worker after bpf.checkpoint:save": 1})
        assert command.until("killed") is not None
        assert command.wait() == 0, command.output
        command.wait_for_nobody()
        assert "is started again" in command.output
        assert "Traceback" not in command.output
    assert_undisturbed(directory, undisturbed)


def test_a_resume_really_continues_and_does_not_start_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bpf.training import Cohort

    directory = tmp_path / "run"
    arguments = ("--dataset", "digits", "--algorithm", "dfa", "--epochs", "5", "--arch", "8", "--quiet")
    # a single run is trained by the command's own process
    faults = {"supervisor after bpf.checkpoint:save": 3}
    with Command(
        tmp_path / "command", "train", str(directory), *arguments, "--checkpoint-every", "0", faults=faults
    ) as c:
        assert c.wait() == -signal.SIGKILL, c.output
    epochs = []
    original = Cohort.run_epoch
    monkeypatch.setattr(Cohort, "run_epoch", lambda self: (epochs.append(self.epoch), original(self)))
    assert run("resume", str(directory), "--quiet") == 0
    assert epochs == [3, 4]
