"""Kill bpf's processes: at named places of the code, or by a signal at any moment.

Run as a script, this file is the command line `bpf` with places where it may kill itself, and so may its workers.
Imported, it starts such commands, hears what happens in their processes and compares what came out.
"""

import faulthandler
import functools
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import closing, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import optuna
import pytest
from optuna.samplers import GridSampler

from bpf import api
from bpf.cli import app as cli
from bpf.experiment.directory import open_experiment
from bpf.results import summary
from bpf.study.cells import Row
from bpf.workers import process, supervisor
from bpf.workers.job import Job
from waiting import SECONDS

FIFO, TOKEN = "BPF_CHAOS_FIFO", "BPF_CHAOS_TOKEN"

# Where a process may kill itself, before a function or after it, and about how often a cohort passes there.
TRAINING = {
    "worker": {
        "os:fsync": 50.0,  # in the midst of writing a file, and after its renaming
        "bpf.training.checkpoint:save": 25.0,
        "bpf.results.models:save": 1.0,
        "bpf.nn.optim:StackedOptimizer.step": 550.0,
        "bpf.study.plan:keep_histories": 1.0,
        "bpf.study.study:Study.claim": 1.0,
        "bpf.study.study:Study.finish": 1.0,
        "bpf.study.study:Study.progressed": 2.0,
        "bpf.training.cohort:Cohort.run_epoch": 24.0,
        "bpf.study.trials:Trials.begin": 1.0,  # in the transaction of `Study.claim`
        "bpf.study.trials:Trials.end": 1.0,  # in that of `Study.finish`
        "bpf.workers.files:Folder.clear": 1.0,
        "bpf.workers.files:Folder.discard": 1.0,
        "bpf.workers.worker:Worker.run": 0.1,
    },
    "supervisor": {
        "bpf.workers.supervisor:Supervisor._gone": 0.1,
        "bpf.workers.supervisor:Supervisor._hear": 50.0,
        "bpf.workers.supervisor:Supervisor._listen": 50.0,
        "bpf.workers.supervisor:Supervisor._start": 0.1,
    },
}
PLANNING = {
    "supervisor": {
        "os:fsync": 1.0,
        "bpf.experiment.directory:Experiment.save": 1.0,
        "bpf.study.plan:insert": 1.0,  # in the transaction of `Study.plan`
        "bpf.study.schema:add_experiment": 1.0,
        "bpf.study.study:Study.create": 1.0,
        "bpf.study.study:Study.plan": 1.0,
        "bpf.workers.supervisor:Supervisor._start": 1.0,
    }
}
STORED = ("bpf.training.checkpoint:save", "bpf.study.study:Study.finish")


def places(of: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Places in words, such as `worker before bpf.study.study:Study.claim`."""
    return {
        f"{role} {when} {function}": passes
        for role, functions in of.items()
        for function, passes in functions.items()
        for when in ("before", "after")
    }


def install(role: str) -> None:
    """Make each place of a role, supervisor or worker, one where this process may kill itself."""
    faulthandler.register(signal.SIGUSR2)  # to see where a process hangs
    passes: Counter[tuple[str, str]] = Counter()
    token = Path(os.environ[TOKEN])
    fifo = os.open(os.environ[FIFO], os.O_WRONLY | os.O_NONBLOCK)  # open until the end: that is how one learns of it

    def tell(kind: str, place: str = "-") -> None:
        with suppress(OSError):  # nobody listens any more
            os.write(fifo, f"{kind} {os.getpid()} {role} {place}\n".encode())

    def passing(place: str) -> None:
        try:
            armed = json.loads(token.read_text())
        except FileNotFoundError:
            return
        if place not in armed["places"]:
            return
        at = (armed["id"], place)
        passes[at] += 1
        if passes[at] < armed["places"][place]:
            return
        try:
            token.unlink()  # only one process gets it, and so dies
        except FileNotFoundError:
            return
        tell("killed", place)
        os.kill(os.getpid(), signal.SIGKILL)

    def wrap(function: str) -> None:
        module, _, name = function.partition(":")
        owner: Any = importlib.import_module(module)
        *path, last = name.split(".")
        for part in path:
            owner = getattr(owner, part)
        original = getattr(owner, last)

        @functools.wraps(original)
        def deadly(*args: Any, **kwargs: Any) -> Any:
            passing(f"{role} before {function}")
            result = original(*args, **kwargs)
            if function in STORED:
                tell("stored", function)
            passing(f"{role} after {function}")
            return result

        setattr(owner, last, deadly)

    for function in {function for of in (TRAINING, PLANNING) for functions in of.values() for function in functions}:
        wrap(function)  # in either role, as `bpf train` has but one process
    tell("started")


class Event(NamedTuple):
    """`kind` is started, stored or killed; `place` says where."""

    kind: str
    pid: int
    role: str
    place: str


class Hang(AssertionError):
    """Nothing has happened for too long."""


class Command:
    """A `bpf` command in a session of its own. Whoever leaves the context ends what is left of it."""

    def __init__(self, work: Path, *arguments: str, faults: Mapping[str, int] | None = None) -> None:
        """Start it; `work` is a folder for its output and the like. `faults` are places and the pass that kills."""
        work.mkdir(parents=True)
        self.arguments, self._token, self._log = arguments, work / "token", work / "output"
        self._times_armed, self._is_armed = 0, False
        self.workers: list[int] = []
        if faults:
            self.arm(faults)
        fifo = work / "fifo"
        os.mkfifo(fifo)
        self._fifo = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        writer = os.open(fifo, os.O_WRONLY)  # it inherits this, so that its death is heard even before it opens its own
        environment = os.environ | {FIFO: str(fifo), TOKEN: str(self._token), "OMP_NUM_THREADS": "1"}
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, __file__, *arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                pass_fds=[writer],
            )
        os.close(writer)
        self._heard = b""

    def arm(self, faults: Mapping[str, int]) -> None:
        """Let the first process die that passes one of the places for the given time from here on."""
        self._times_armed, self._is_armed = self._times_armed + 1, True
        new = self._token.with_suffix(".new")
        new.write_text(json.dumps({"id": self._times_armed, "places": faults}))
        new.replace(self._token)

    def disarm(self) -> bool:
        """Let nobody die any more. False if somebody has, of which is to be heard yet."""
        if self._is_armed:
            try:
                self._token.unlink()
            except FileNotFoundError:
                return False
            self._is_armed = False
        return True

    def hear(self, seconds: float | None = None) -> Event | None:
        """What happens next; None when the command and all its workers have ended.

        Raises TimeoutError after so many `seconds`. Without them raises Hang if nothing happens for too long.
        """
        end = time.monotonic() + (SECONDS if seconds is None else seconds)
        while b"\n" not in self._heard:
            if not select.select([self._fifo], [], [], max(0.0, end - time.monotonic()))[0]:
                if seconds is None:
                    raise self._hang()
                raise TimeoutError
            more = os.read(self._fifo, 65536)
            if not more:
                return None
            self._heard += more
        line, self._heard = self._heard.split(b"\n", 1)
        kind, pid, role, place = line.decode().split(" ", 3)
        event = Event(kind, int(pid), role, place)
        if kind == "started" and role == "worker":
            self.workers.append(event.pid)
        if kind == "killed":
            self._is_armed = False
        if kind == "killed" and role == "worker":
            self.workers.remove(event.pid)
        elif kind == "killed":
            self.process.wait()
        return event

    def until(self, kind: str) -> Event | None:
        """The next event of this kind; None if there is none until the end."""
        while (event := self.hear()) is not None and event.kind != kind:
            pass
        return event

    def kill(self, pid: int) -> bool:
        """Kill one of its processes, if it still lives."""
        try:
            if os.getsid(pid) != self.process.pid:  # a number that was given again
                return False
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return False
        finally:
            if pid in self.workers:
                self.workers.remove(pid)
        if pid == self.process.pid:
            self.process.wait()
        return True

    def wait(self) -> int:
        """Wait for the end of the command and all its workers; its exit code, or minus the signal that ended it."""
        while self.hear() is not None:
            pass
        return self.process.wait(SECONDS)

    def wait_for_nobody(self) -> None:
        """Wait until no process is left in the session, also none of multiprocessing's own."""
        end = time.monotonic() + SECONDS
        while left := self.left_over():
            if time.monotonic() > end:
                raise Hang(f"Processes are left over of {' '.join(self.arguments)}: {left}")
            time.sleep(0.01)  # they are not ours, so that nobody tells of their end

    def left_over(self) -> dict[int, str]:
        """The processes of the session that live, with their command lines, where the system tells."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError, ValueError):
                state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(session) == self.process.pid and state not in "ZX":
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
                    found[int(entry.name)] = command.decode(errors="replace")
        return found

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def _hang(self) -> Hang:
        left = self.left_over()
        for pid in (self.process.pid, *self.workers):
            if pid in left:
                os.kill(pid, signal.SIGUSR2)
        time.sleep(1.0)
        return Hang(f"{' '.join(self.arguments)} hangs.\n{left}\n{self.output}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fifo)
        for pid in (self.process.pid, *self.left_over()):
            self.kill(pid)
        self.process.wait()


def outcomes(directory: Path) -> dict[str, Any]:
    """Every cell's state, value, executions and histories by its key, without times."""
    experiment = open_experiment(directory)

    def timeless(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{name: value for name, value in record.items() if name != "seconds"} for record in records]

    return {
        row.key: (
            row.state,
            row.value,
            timeless(row.result["executions"]),
            timeless(summary.history(experiment, row.key)),
        )
        for row in summary.rows(experiment)
        if row.result
    }


def assert_undisturbed(directory: Path, expected: Mapping[str, Any]) -> int:
    """A finished grid has the `outcomes` that are expected; returns how many cells had to be trained apart.

    Their numbers are the same but for rounding.
    """
    apart = {row.key for row in summary.rows(open_experiment(directory)) if row.max_runs is not None}
    found = outcomes(directory)
    assert found.keys() == expected.keys()
    together = found.keys() - apart
    assert {key: found[key] for key in together} == {key: expected[key] for key in together}
    for key in apart:
        assert found[key][:2] == ("complete", pytest.approx(expected[key][1], rel=0.01))
    return len(apart)


def assert_ran_once(directory: Path, set_aside: int = 0) -> None:
    """Each cell has one trial, complete, and stock Optuna sees a finished grid.

    Besides those trials there are the failed ones of cells that were `set_aside` and tried again.
    """
    experiment = open_experiment(directory)
    rows = summary.rows(experiment)
    with closing(experiment.open_study()) as study:
        rules = experiment.grid.algorithm
        spaces = {rule: (study.study_name(rule), study.search_space(rule)) for rule in rules}
    failed = 0
    for rule, (name, space) in spaces.items():
        loaded = optuna.load_study(study_name=name, storage=f"sqlite:///{experiment.database}")
        trials = [trial for trial in loaded.get_trials() if trial.state != optuna.trial.TrialState.FAIL]
        failed += len(loaded.get_trials()) - len(trials)
        cells = [row for row in rows if row.rule == rule]
        assert [trial.state for trial in trials] == [optuna.trial.TrialState.COMPLETE] * len(cells)
        assert {trial.number: trial.value for trial in trials} == {row.trial_number: row.value for row in cells}
        assert GridSampler(space).is_exhausted(loaded)
        assert loaded.best_value == min(row.value for row in cells if row.value is not None)
        loaded._storage.remove_session()
    assert failed == set_aside


def files(directory: Path) -> list[str]:
    """What lies in an experiment's directory, but for what SQLite keeps beside an open database."""
    found = (str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
    return sorted(path for path in found if path not in ("study.db-shm", "study.db-wal"))


def assert_tidy(directory: Path) -> None:
    """Nothing lies there but what is needed, logs, and what a process could not remove before it was killed."""
    removed = api.clean(open_experiment(directory))["files"]
    unexpected = [path for path in removed if ".pt" not in path and ".experiment.yaml." not in path]
    assert not unexpected  # others were cut short, or not discarded any more
    assert [name for name in files(directory) if not name.startswith("logs/")] == needed(directory)


def needed(directory: Path) -> list[str]:
    """What should lie in the directory of a finished grid: of checkpoints none, of models each rule's best."""
    rows = summary.rows(open_experiment(directory))
    best: dict[str, Row] = {}
    for row in sorted((row for row in rows if row.state == "complete"), key=lambda row: (row.value, row.ordinal)):
        best.setdefault(row.rule, row)
    models = [f"models/{rule}/{row.key}.safetensors" for rule, row in best.items()]
    return sorted(["experiment.yaml", "locks/making-tables", "running.lock", "study.db", *models])


def work(job: Job, connection: Connection) -> None:
    """The life of a worker process that may kill itself."""
    install("worker")
    process.work(job, connection)


def main() -> None:
    install("supervisor")
    supervisor.work = work
    cli.main(sys.argv[1:])


if __name__ == "__main__":
    import chaos  # as workers import it

    chaos.main()
