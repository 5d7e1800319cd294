"""Workers: many at once, rules that harm their process, a full disk, and requests to stop."""

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
import torch
from optuna.samplers import GridSampler

from bpf import api
from bpf.algorithms.dfa import DirectFeedbackAlignment
from bpf.cli import app as cli
from bpf.errors import RunError
from bpf.experiment.directory import Experiment, open_experiment
from bpf.experiment.places import model_path
from bpf.results import models, summary
from bpf.spec.grid import GridSpec
from bpf.study.cells import Axis, Cell, Row
from bpf.study.owner import Owner
from bpf.study.study import Study
from bpf.workers import worker
from bpf.workers.events import Event, Trained
from bpf.workers.files import Folder
from bpf.workers.job import Job, Terms
from bpf.workers.worker import Worker
from invented import IN_SCRIPTS
from waiting import SECONDS, eventually

ROOT = Path(__file__).parents[1]
GUILTY, DEADLY, FATAL, GOOD = "frenkel", "lecun", "nokland", "ortho"

# A rule that does what a file says, whose path is in the environment, where a run has a certain feedback. Each line
# says "feedback deed". In a file beside it, a line tells that a process has come so far.
RULE = '''
import ctypes, os, signal, time
from pathlib import Path
from types import SimpleNamespace

import torch

from bpf.algorithms.dfa import DirectFeedbackAlignment


class Troubled(DirectFeedbackAlignment):
    """Direct feedback alignment that may harm its process."""

    def prepare(self, network, runs):
        super().prepare(network, runs)
        self.feedbacks = {init for _, init in runs}

    def gradients(self, step):
        super().gradients(step)
        wanted = Path(os.environ["TROUBLE"])
        for line in wanted.read_text().splitlines():
            feedback, deed = line.split()
            if feedback in self.feedbacks:
                getattr(self, deed)(wanted)

    def killed(self, wanted):
        os.kill(os.getpid(), signal.SIGKILL)

    def exits(self, wanted):
        os._exit(7)

    def segfaults(self, wanted):
        ctypes.string_at(0)

    def waits(self, wanted):
        with wanted.with_name("come").open("a") as file:
            file.write(f"{os.getpid()}\\n")
        while "waits" in wanted.read_text():
            time.sleep(0.01)

    def dawdles(self, wanted):
        time.sleep(0.3)
'''
SHAPE = {"dataset": "digits", "arch": ["8"], "activation": ["tanh"], "batch_norm": [False], "lr": [0.01]}
SHAPE |= {"epochs": 3, "examples_frac": 0.2}
BPF = "import sys; from bpf.cli.app import main; main(sys.argv[1:])"


def planned(directory: Path, algorithm: str = "dfa", **spec: Any) -> Experiment:
    grid = GridSpec.model_validate({**SHAPE, "algorithm": [algorithm], **spec})
    experiment = api.open_tune(directory, grid, directory.parent / "data")
    api.store_plan(experiment, ["bpf"])
    return experiment


def outcomes(experiment: Experiment) -> dict[str, Any]:
    """Every cell's state, value, executions and history by its parameters, without times."""
    found = {}
    for row in summary.rows(experiment):
        executions = [{k: v for k, v in e.items() if k != "seconds"} for e in (row.result or {}).get("executions", [])]
        histories = [{k: v for k, v in e.items() if k != "seconds"} for e in summary.history(experiment, row.key)]
        found[json.dumps(row.params)] = (row.state, row.value, executions, histories)
    return found


def by_feedback(experiment: Experiment) -> dict[str, Row]:
    return {str(row.params["bw_init"]): row for row in summary.rows(experiment)}


@pytest.fixture
def bpf(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """A command in this process; returns its exit code and what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("BPF_DEBUG", "BPF_STORAGE", "BPF_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            cli.main(list(arguments))
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return run


class Process:
    """A command in a process of its own, with the troubled rule installed; `text` grows with what it says."""

    def __init__(self, work: Path, *arguments: str, script: str = BPF, **options: Any) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("BPF_")}
        environment = {**kept, "PYTHONPATH": f"{work / 'site'}:{ROOT}", "TROUBLE": str(work / "trouble")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, *arguments],
            cwd=work,
            env={**environment, "COLUMNS": "200"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            **options,
        )
        self.text = ""
        self._listener = threading.Thread(target=self._listen)
        self._listener.start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.text += line

    def until(self, said: str) -> None:
        eventually(lambda: said in self.text or self.process.poll() is not None)
        assert said in self.text, self.text

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self) -> int:
        """Its exit code."""
        code = self.process.wait(SECONDS)
        self._listener.join()
        return code

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._listener.join()
        assert self.process.stdout is not None
        self.process.stdout.close()


class Troubled:
    """A directory with an installed rule `troubled`, and what that rule shall do."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.come = work / "come"
        info = work / "site" / "troubled-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: troubled\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[bpf.algorithms]\ntroubled = troubled:Troubled\n")
        (work / "site" / "troubled.py").write_text(RULE)
        self.does()

    def does(self, **deeds: str) -> None:
        written = self.work / "trouble.new"
        written.write_text("".join(f"{feedback} {deed}\n" for feedback, deed in deeds.items()))
        written.replace(self.work / "trouble")

    def comers(self) -> list[int]:
        """The processes that wait in the rule, in the order of their coming."""
        return [int(line) for line in self.come.read_text().splitlines()] if self.come.exists() else []


@pytest.fixture
def troubled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Troubled]:
    made = Troubled(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "site")  # this process reads what the others have trained
    yield made
    sys.modules.pop("troubled", None)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    with ExitStack() as stack:

        def started(*arguments: str, **options: Any) -> Process:
            process = Process(tmp_path, *arguments, **options)
            stack.callback(process.kill)
            return process

        yield started


# Many at once


@pytest.mark.slow
def test_eight_processes_train_300_cells_in_one_file_once(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    rates = Axis("lr", [float(1 + number) for number in range(300)], low=1e-10, high=1e3, log=True)
    cells = [Cell(f"lr-{rate:.0f}", "dfa", "one", {"lr": rate}, {"epochs": 1}) for rate in rates.values]
    with Study.create(path, "mine", {}) as study:
        study.plan({"dfa": [rates]}, cells)
    script = """
        import sys
        from bpf.study.owner import Owner
        from bpf.study.study import Study

        with Study.open(sys.argv[1]) as study, Owner(study.locks) as owner:
            while (claim := study.claim(owner, lambda row: 3)) is not None:
                for row in claim.rows:
                    value = row.params["lr"]
                    study.finish(claim, Finished(row.key, value, "complete", result(value), [RECORD]))
                    print(row.key)
    """
    program = IN_SCRIPTS + textwrap.dedent(script)
    command = [sys.executable, "-c", program, str(path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    children = [subprocess.Popen(command, env=environment, **pipes) for _ in range(8)]  # type: ignore[call-overload]
    told = [child.communicate(timeout=SECONDS) for child in children]
    assert [(child.returncode, complaints) for child, (_, complaints) in zip(children, told, strict=True)] == [
        (0, "")
    ] * 8
    assert sorted(key for done, _ in told for key in done.splitlines()) == sorted(cell.key for cell in cells)
    with Study.open(path) as study:
        assert [(row.state, row.value, row.attempt) for row in study.rows()] == [
            ("complete", rate, 1) for rate in rates.values
        ]
        storage = optuna.storages.RDBStorage(f"sqlite:///{path}", engine_kwargs={"poolclass": sa.NullPool})
        read = optuna.load_study(study_name="mine/dfa", storage=storage)
        assert sorted(trial.number for trial in read.trials) == list(range(300))
        assert GridSampler(study.search_space("dfa")).is_exhausted(read)


@pytest.mark.slow
def test_a_supervisor_waits_for_workers_elsewhere_and_takes_over_from_dead_ones(
    tmp_path: Path, start: Callable[..., Process]
) -> None:
    """This process is the other worker: alive with one cohort, and as an owner of another one that then dies."""
    experiment = planned(tmp_path / "grid", arch=["8", "6"], bw_init=[GOOD], lr=[0.1, 0.01])
    command: list[Process] = []

    def tell(event: Event) -> None:
        if isinstance(event, Trained) and not command:
            with Owner(study.locks) as dying, experiment.open_study() as other:
                assert other.claim(dying, lambda row: 2) is not None
                command.append(start("resume", "grid", "--workers", "2", "--quiet"))
                command[0].until("Waiting for 4 cells that workers elsewhere train.\n")
            command[0].until("Waiting for 2 cells that workers elsewhere train.\n")
            with experiment.read_study() as other:
                assert other.counts()["complete"] == 2

    with experiment.open_study() as study:
        job = Job(experiment.database, experiment.name, experiment.data_dir, experiment.files, Terms("cpu"))
        Worker.of(job, study, tell).run()
    assert command[0].end() == 0, command[0].text
    assert command[0].text.count("Waiting for") == 2, "once each"
    assert [row.state for row in summary.rows(experiment)] == ["complete"] * 4
    assert sorted(row.attempt for row in summary.rows(experiment)) == [1, 1, 2, 2]


# Rules that harm their process


@pytest.mark.slow
def test_cells_that_kill_their_process_are_set_aside_and_the_others_complete(
    troubled: Troubled, start: Callable[..., Process], bpf: Callable[..., tuple[int, str, str]]
) -> None:
    """By a signal, by leaving, and by a fault; all of them at first together with cells that do no harm."""
    feedbacks = (GUILTY, GOOD, DEADLY, "principled", FATAL)
    experiment = planned(troubled.work / "grid", "troubled", bw_init=feedbacks, lr=[0.01])
    troubled.does(**{GUILTY: "killed", DEADLY: "exits", FATAL: "segfaults"})
    command = start("resume", "grid", "--workers", "1", "--quiet")
    assert command.end() == 1, command.text
    assert "Worker 1 crashed (by signal SIGKILL) and is started again.\n" in command.text
    assert "Worker 1 crashed (by exiting with code 7) and is started again.\n" in command.text
    assert "Worker 1 crashed (by signal SIGSEGV) and is started again.\n" in command.text
    assert command.text.endswith(
        "Error: 3 cells failed: see `bpf status grid --failed`; `bpf resume grid --retry-failed` tries again.\n"
    )

    rows = by_feedback(experiment)
    assert {feedback: row.state for feedback, row in rows.items()} == {
        GUILTY: "failed", GOOD: "complete", DEADLY: "failed", "principled": "complete", FATAL: "failed",
    }  # fmt: skip
    code, out, err = bpf("status", "grid")
    assert (code, err) == (0, "")
    assert "5 cells: 2 complete, 3 failed" in out
    assert re.search(r"worker died: .*3 failed", out)
    code, out, err = bpf("status", "grid", "--failed")
    assert out == "".join(
        f"{rows[feedback].name}: troubled arch=8 act=tanh bn=no feedback={feedback} init=orthogonal optimizer=adam "
        "lr=0.01 weight_decay=0 batch_size=64 dropout=0 skew=none\n"
        "It killed its worker 4 times: a crash of the whole process, or too little memory.\n"
        for feedback in (GUILTY, DEADLY, FATAL)
    )

    troubled.does()
    again = start("resume", "grid", "--retry-failed", "--workers", "1", "--quiet")
    assert again.end() == 0, again.text
    assert {row.state for row in summary.rows(experiment)} == {"complete"}
    undisturbed = planned(troubled.work / "alone" / "grid", bw_init=feedbacks, lr=[0.01])
    assert train_here(undisturbed) == []
    values = {feedback: row.value for feedback, row in by_feedback(undisturbed).items()}
    assert {feedback: row.value for feedback, row in by_feedback(experiment).items()} == pytest.approx(values)


@pytest.mark.slow
def test_a_rule_that_always_kills_ends_the_run(troubled: Troubled, start: Callable[..., Process]) -> None:
    experiment = planned(troubled.work / "grid", "troubled", bw_init=[GUILTY], lr=[0.1, 0.03, 0.01, 0.001])
    troubled.does(**{GUILTY: "killed"})
    command = start("resume", "grid", "--workers", "1", "--quiet")
    assert command.end() == 1, command.text
    assert command.text.splitlines()[-1] == (
        "Error: 5 workers in a row have crashed, the last one by signal SIGKILL, while troubled with arch 8. Nothing "
        "finished is lost. See `bpf status grid`; go on with: bpf resume grid"
    )
    assert summary.status(experiment)["cells"]["running"] == 0


def train_here(experiment: Experiment, raised: str = "") -> list[Event]:
    """Train in this process; returns the troubles."""
    events: list[Event] = []
    with experiment.open_study() as study:
        job = Job(experiment.database, experiment.name, experiment.data_dir, experiment.files, Terms("cpu"))
        Worker.of(job, study, events.append).run()
    return [event for event in events if type(event).__name__ == "Trouble"]


class Faulty(DirectFeedbackAlignment):
    """Fails where a test's `fault`, called with a rule's feedback initialisations, raises."""

    fault: Callable[[list[str]], object] = staticmethod(lambda feedbacks: None)

    def prepare(self, network: Any, runs: Any) -> None:
        super().prepare(network, runs)
        self.feedbacks = [init for _, init in runs]

    def gradients(self, step: Any) -> None:
        super().gradients(step)
        type(self).fault(self.feedbacks)


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[list[str]], object]], None]:
    """Makes dfa a rule that fails by a function."""

    def make(fault: Callable[[list[str]], object]) -> None:
        monkeypatch.setattr(Faulty, "fault", staticmethod(fault))
        monkeypatch.setattr(worker, "load_rules", lambda names: dict.fromkeys(names, Faulty))

    return make


FOUR = [GOOD, GUILTY, DEADLY, FATAL]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Four cells of two executions, in one cohort."""
    experiment = planned(tmp_path_factory.mktemp("undisturbed") / "grid", bw_init=FOUR, executions_per_trial=2)
    assert train_here(experiment) == []
    return outcomes(experiment)


def test_a_rule_that_raises_for_one_cell_fails_there_only(
    faulty: Any, undisturbed: dict[str, Any], bpf: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    experiment = planned(tmp_path / "grid", bw_init=FOUR, executions_per_trial=2)

    def fault(feedbacks: list[str]) -> None:
        if GUILTY in feedbacks:
            raise ZeroDivisionError("no such feedback")

    faulty(fault)
    code, out, err = bpf("worker", "grid", "--device", "cpu", "--quiet")
    blamed = "(by the algorithm 'dfa' of bpf 0.2.0: mend or update it)"
    trouble = f"ZeroDivisionError: no such feedback {blamed}: its cohort is tried again, each cell alone.\n"
    assert (code, out, err) == (0, "", trouble)
    guilty = by_feedback(experiment)[GUILTY]
    assert (guilty.state, guilty.cause, guilty.result) == ("failed", "exception", None)
    code, out, err = bpf("status", "grid", "--failed")
    assert out.startswith(f"{guilty.name}: dfa arch=8 act=tanh bn=no feedback=frenkel ")
    assert "\nTraceback (most recent call last):\n" in out
    assert 'in fault\n    raise ZeroDivisionError("no such feedback")\n' in out
    assert out.rstrip().endswith(f"\nZeroDivisionError: no such feedback {blamed}")
    assert "rule raised: 3 now complete, 1 failed\n" in bpf("status", "grid")[1]
    assert_close(experiment, undisturbed, set(FOUR) - {GUILTY})


def assert_close(experiment: Experiment, undisturbed: dict[str, Any], feedbacks: set[str]) -> None:
    """Stacked otherwise, the same cells come out: the same but for the order of additions."""
    found = outcomes(experiment)
    for params, (state, value, executions, histories) in undisturbed.items():
        if json.loads(params)["bw_init"] in feedbacks:
            assert found[params][0] == state == "complete"
            assert found[params][1] == pytest.approx(value, rel=1e-4)
            assert [e["seed"] for e in found[params][2]] == [e["seed"] for e in executions]
            assert [e["history"]["loss"] for e in found[params][3]] == [
                pytest.approx(e["history"]["loss"], rel=1e-4) for e in histories
            ]


@pytest.mark.parametrize("kind", [MemoryError, torch.OutOfMemoryError])
def test_out_of_memory_fewer_runs_are_stacked(
    kind: type[Exception], faulty: Any, undisturbed: dict[str, Any], bpf: Any, tmp_path: Path
) -> None:
    experiment = planned(tmp_path / "grid", bw_init=FOUR, executions_per_trial=2)
    stacked: list[int] = []

    def fault(feedbacks: list[str]) -> None:
        stacked.append(len(feedbacks))
        if len(feedbacks) > 1:
            raise kind

    faulty(fault)
    code, out, err = bpf("worker", "grid", "--device", "cpu", "--quiet")
    what = "Out of memory training dfa with arch 8 and batch_size 64"
    assert (code, out, err.splitlines()[:3]) == (
        0,
        "",
        [f"{what}, {runs} executions together; it is tried again with {runs // 2}." for runs in (8, 4, 2)],
    )
    assert [*dict.fromkeys(stacked)] == [8, 4, 2, 1]
    assert {row.cause for row in summary.rows(experiment)} == {"memory"}
    assert "out of memory: 4 now complete" in bpf("status", "grid")[1]
    assert_close(experiment, undisturbed, set(FOUR))


def test_out_of_memory_with_one_run_a_cell_fails(
    faulty: Any, undisturbed: dict[str, Any], bpf: Any, tmp_path: Path
) -> None:
    experiment = planned(tmp_path / "grid", bw_init=FOUR, executions_per_trial=2)

    def fault(feedbacks: list[str]) -> None:
        if GUILTY in feedbacks:
            raise MemoryError

    faulty(fault)
    assert bpf("worker", "grid", "--device", "cpu", "--quiet")[0] == 0
    guilty = by_feedback(experiment)[GUILTY]
    assert (guilty.state, guilty.cause) == ("failed", "memory")
    assert guilty.error == (
        "Out of memory training dfa with arch 8 and batch_size 64 on cpu, one execution alone. Use a smaller arch or "
        "batch_size."
    )
    assert_close(experiment, undisturbed, set(FOUR) - {GUILTY})


# A full disk

LIMITED = """
import resource, sys
from bpf.study import patience
from bpf.workers import worker
from bpf.cli.app import main

worker.FULL_DISK_SECONDS, patience.LONGEST_PAUSE = 0.05, 0.2
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
main(sys.argv[2:])
"""


@pytest.mark.slow
def test_a_full_disk_is_waited_out(tmp_path: Path, start: Callable[..., Process]) -> None:
    experiment = planned(tmp_path / "grid", arch=["500-200"], bw_init=[GOOD, GUILTY], lr=[0.001])
    undisturbed = tmp_path / "undisturbed"
    shutil.copytree(tmp_path / "grid", undisturbed)
    arguments = ("worker", "grid", "--device", "cpu", "--checkpoint-every", "0", "--quiet")
    command = start(str(10**6), *arguments, script=LIMITED)
    command.until("The work goes on when there is space.\n")
    assert summary.status(experiment)["cells"]["running"] == 2

    resource.prlimit(command.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    assert command.end() == 0, command.text
    (checkpoint,) = {row.cohort for row in summary.rows(experiment)}
    assert command.text == (
        f"The disk is full: {tmp_path}/grid/checkpoints/{checkpoint}.pt cannot be written. The work goes on when "
        "there is space.\n"
    )
    assert train_here(open_experiment(undisturbed)) == []
    assert outcomes(experiment) == outcomes(open_experiment(undisturbed))
    assert not list((tmp_path / "grid").rglob(".*.pt.*"))


@pytest.mark.slow
def test_a_study_on_a_full_disk_is_waited_out_and_ctrl_c_ends_the_wait(
    tmp_path: Path, start: Callable[..., Process]
) -> None:
    experiment = planned(tmp_path / "grid", bw_init=[GOOD], lr=[0.001])
    for end in (signal.SIGINT, None):
        command = start("32768", "worker", "grid", "--device", "cpu", "--quiet", script=LIMITED)
        command.until("The study database failed: ")
        assert summary.status(experiment)["cells"]["pending"] == 1
        if end is not None:
            command.signal(end)
            assert command.end() == 130, command.text
            assert command.text.splitlines()[1:] == [
                "Stopped. What could not be stored is trained again from the last checkpoint. The cells go on with "
                "`bpf resume`, or another `bpf worker`."
            ]
        else:
            resource.prlimit(command.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
            assert command.end() == 0, command.text
            assert len(command.text.splitlines()) == 1, "said once"
    assert [row.state for row in summary.rows(experiment)] == ["complete"]


def test_ctrl_c_ends_the_wait_for_a_checkpoint_and_releases(
    bpf: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = planned(tmp_path / "grid", bw_init=[GOOD, GUILTY])
    waited: list[int] = []

    def full(descriptor: int) -> None:
        waited.append(descriptor)
        if len(waited) == 3:
            signal.raise_signal(signal.SIGINT)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(worker, "FULL_DISK_SECONDS", 0.01)
    with monkeypatch.context() as patch:
        patch.setattr("bpf.files.os.fsync", full)
        code, out, err = bpf("worker", "grid", "--device", "cpu", "--checkpoint-every", "0", "--quiet")
    assert (code, out) == (130, "")
    assert re.fullmatch(
        r"The disk is full: \S+\.pt cannot be written\. The work goes on when there is space\.\n"
        r"Stopped\. What could not be stored is trained again from the last checkpoint\. The cells go on with "
        r"`bpf resume`, or another `bpf worker`\.\n",
        err,
    )
    assert len(waited) == 3
    assert [row.state for row in summary.rows(experiment)] == ["interrupted"] * 2


def test_a_database_that_is_gone_for_good_costs_no_epoch(
    bpf: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is trained and cannot be stored is found again in the checkpoint."""
    experiment = planned(tmp_path / "grid", bw_init=[GOOD])

    def gone(*arguments: Any) -> None:
        raise RunError("The study database failed: it is gone.")

    with monkeypatch.context() as patch:
        patch.setattr(Study, "finish", gone)
        told = bpf("worker", "grid", "--device", "cpu", "--quiet")
    assert told == (1, "", "Error: The study database failed: it is gone.\n")
    assert [row.state for row in summary.rows(experiment)] == ["interrupted"]
    monkeypatch.setattr("bpf.training.cohort.Cohort.run_epoch", gone)
    assert bpf("worker", "grid", "--device", "cpu", "--quiet") == (0, "", "")
    assert [row.state for row in summary.rows(experiment)] == ["complete"]


# Requests to stop


@pytest.mark.slow
def test_signals_stop_a_worker_and_a_supervisor_which_release_everything(
    troubled: Troubled, start: Callable[..., Process], tmp_path: Path
) -> None:
    """SIGTERM to a worker, then SIGUSR1 to a supervisor, each in the midst of an epoch; then it goes on."""
    experiment = planned(tmp_path / "grid", "troubled", bw_init=[GOOD, GUILTY], arch=["8", "6"])
    go_on = {
        "worker": "The cells go on with `bpf resume`, or another `bpf worker`.",
        "resume": "Go on with: bpf resume grid",
    }
    for command, arguments, number in (
        ("worker", ("--device", "cpu"), signal.SIGTERM),
        ("resume", ("--workers", "2"), signal.SIGUSR1),
    ):
        troubled.come.unlink(missing_ok=True)
        troubled.does(**{GUILTY: "waits"})
        process = start(command, "grid", "--quiet", "--checkpoint-every", "1000", *arguments)
        at_work = 2 if command == "resume" else 1
        eventually(lambda at_work=at_work: len(set(troubled.comers())) == at_work)
        status = summary.status(experiment)
        assert (status["cells"]["running"], len(status["workers"])) == (2 * at_work, at_work)
        process.signal(number)
        troubled.does(**{GUILTY: "dawdles"})  # an epoch takes longer than a supervisor needs to pass it on
        assert process.end() == 130, process.text
        assert process.text == f"Stopped, and everything is stored. {go_on[command]}\n"
        status = summary.status(experiment)
        assert (status["cells"]["running"], status["workers"]) == (0, [])
        assert status["cells"]["interrupted"] == 2 * at_work
        assert len(list((tmp_path / "grid" / "checkpoints").glob("*.pt"))) == at_work
    troubled.does()
    last = start("resume", "grid", "--workers", "2", "--quiet")
    assert last.end() == 0, last.text

    undisturbed = planned(tmp_path / "alone" / "grid", bw_init=[GOOD, GUILTY], arch=["8", "6"])
    assert train_here(undisturbed) == []
    assert outcomes(experiment) == outcomes(undisturbed)


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once_what_hangs(
    troubled: Troubled, start: Callable[..., Process], tmp_path: Path
) -> None:
    experiment = planned(tmp_path / "grid", "troubled", bw_init=[GUILTY])
    troubled.does(**{GUILTY: "waits"})
    process = start("resume", "grid", "--workers", "1", "--quiet")
    (pid,) = eventually(troubled.comers)
    process.signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.process.wait(0.5)
    process.signal(signal.SIGINT)
    assert process.end() == 130, process.text
    assert process.text == "Interrupted at once. Nothing finished is lost. Go on with: bpf resume grid\n"
    eventually(lambda: not Path(f"/proc/{pid}").exists())
    assert [(row.state, row.kills) for row in summary.rows(experiment)] == [("interrupted", 0)]


def test_a_worker_stops_by_itself_when_its_time_is_up(bpf: Any, tmp_path: Path) -> None:
    experiment = planned(tmp_path / "grid", bw_init=[GOOD], epochs=10_000)
    told = bpf("worker", "grid", "--device", "cpu", "--quiet", "--max-hours", "0.0001")
    assert told == (
        130,
        "",
        "Stopped (0.0001 hours are over), and everything is stored. The cells go on with `bpf resume`, or another "
        "`bpf worker`.\n",
    )
    assert [row.state for row in summary.rows(experiment)] == ["interrupted"]
    assert len(list((tmp_path / "grid" / "checkpoints").glob("*.pt"))) == 1


def test_a_model_that_becomes_the_best_meanwhile_is_not_removed(tmp_path: Path) -> None:
    """Another worker stores a better cell while this one looks for what it can remove."""

    class Meanwhile:
        better = "old"

        def best(self, rule: str) -> tuple[str, float]:
            return self.better, 0.5

        def finished(self, keys: Iterable[str]) -> set[str]:
            self.better = "new"
            return {*keys} - {"training"}

    for name in ("old", "new", "worse", "training"):
        path = model_path(tmp_path / "models", "bp", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    study: Any = Meanwhile()
    Folder(tmp_path).clear(study, "bp")
    assert set(models.kept(tmp_path / "models", "bp")) == {"new", "training"}
