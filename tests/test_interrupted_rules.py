"""Every rule that is installed, killed in the midst of its training, goes on to the numbers of an undisturbed run.

Run as a script, this file is the command line `bpf` whose workers stop, each with a cohort of a rule that has not been
interrupted yet, in an epoch after its second checkpoint, and wait to be killed.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bpf.cli import app as cli
from bpf.experiment.directory import open_experiment
from bpf.experiment.plugins import load_rules
from bpf.nn.optim import StackedOptimizer
from bpf.registry import ALGORITHMS, Registry
from bpf.results import summary
from bpf.training import checkpoint
from bpf.training.cohort import Cohort
from bpf.workers import process, supervisor, worker
from bpf.workers.claims import ClaimTraining
from bpf.workers.job import Job
from chaos import outcomes
from waiting import SECONDS

MARKS = "BPF_INTERRUPTED_RULES"
WORKERS, SAVED, STEPS = 6, 2, 3
"""Rules that are interrupted at a time; after so many checkpoints, and so many more calls of the optimizer."""
RULES = Registry(ALGORITHMS).names()
GRID = [
    *("--dataset", "digits", "--algorithm", ",".join(RULES), "--arch", "9-8", "--activation", "tanh", "--batch-norm"),
    *("--objective", "val_loss", "--dropout", "0.2", "--bw-init", "ortho", "--lr", "0.001,0.01", "--epochs", "4"),
    *("--executions-per-trial", "2", "--checkpoint-every", "0", "--device", "cpu", "--quiet"),
]
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("in_this_process")]  # what is not to be interrupted


def install(marks: Path) -> None:
    """Make this worker stop where it is to be killed; `marks` has a file for each rule that has been."""
    train, save, step, load = worker.Worker._train, checkpoint.save, StackedOptimizer.step, Cohort.load
    now = {"rule": "", "saved": 0, "steps": 0}

    def training(self: worker.Worker, claimed: ClaimTraining) -> None:
        now.update(rule=claimed.specs[0].algorithm, saved=0, steps=0)
        train(self, claimed)

    def saving(*args: Any) -> None:
        save(*args)
        now["saved"] += 1

    def stepping(self: StackedOptimizer, *args: Any) -> None:
        step(self, *args)
        now["steps"] += now["saved"] == SAVED
        mark = marks / str(now["rule"])
        if now["steps"] == STEPS and not mark.exists():
            mark.write_text(f"{os.getpid()}\n")
            time.sleep(SECONDS)

    def loading(self: Cohort, state: dict[str, Any]) -> None:
        load(self, state)
        with (marks / self.specs[0].algorithm).open("a") as file:
            file.write(f"gone on with from epoch {self.epoch}\n")

    for owner, name, function in (
        (worker.Worker, "_train", training),
        (checkpoint, "save", saving),
        (StackedOptimizer, "step", stepping),
        (Cohort, "load", loading),
    ):
        setattr(owner, name, function)


def interrupted(marks: Path, at_least: int, *arguments: str) -> int:
    """Run a command until so many rules wait, and kill it and its workers. Its exit code."""
    log = marks.with_suffix(".log")
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, __file__, *arguments],
            env=os.environ | {MARKS: str(marks), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    end = time.monotonic() + SECONDS
    try:
        while len(list(marks.iterdir())) < at_least and process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
    with suppress(ProcessLookupError):
        while time.monotonic() < end:  # until nobody is left
            os.killpg(process.pid, 0)
            time.sleep(0.02)
    assert "Traceback" not in log.read_text()
    return code


def test_every_rule_goes_on_to_the_same_numbers(tmp_path: Path) -> None:
    load_rules(RULES)
    undisturbed, directory, marks = tmp_path / "undisturbed", tmp_path / "grid", tmp_path / "marks"
    with pytest.raises(SystemExit) as end:
        cli.main(["tune", str(undisturbed), *GRID, "--workers", "1"])
    assert not end.value.code
    marks.mkdir()
    command = ["tune", str(directory), *GRID]
    for reached in [*range(WORKERS, len(RULES), WORKERS), len(RULES)]:
        code = interrupted(marks, reached, *command, "--workers", str(WORKERS))
        assert code == -signal.SIGKILL, marks.with_suffix(".log").read_text()
        command = ["resume", str(directory), "--checkpoint-every", "0", "--quiet"]
    assert interrupted(marks, len(RULES) + 1, *command, "--workers", "2") == 0
    assert sorted(path.name for path in marks.iterdir()) == RULES
    for mark in marks.iterdir():
        process, *resumed = mark.read_text().splitlines()
        assert process.isdigit()
        assert resumed[0] == f"gone on with from epoch {SAVED}", mark.name
    rows = summary.rows(open_experiment(directory))
    assert {row.rule for row in rows if row.attempt >= 2} == set(RULES)
    assert outcomes(directory) == outcomes(undisturbed)
    models = {path.relative_to(directory): load_file(path) for path in directory.glob("models/*/*.safetensors")}
    assert {path.parent.name for path in models} == set(RULES)
    for path, tensors in models.items():
        others = load_file(undisturbed / path)
        assert tensors.keys() == others.keys()
        assert [name for name, tensor in tensors.items() if not torch.equal(tensor, others[name])] == [], path


def work(job: Job, connection: Connection) -> None:
    """The life of a worker process that waits to be killed."""
    install(Path(os.environ[MARKS]))
    process.work(job, connection)


if __name__ == "__main__":
    import test_interrupted_rules  # as workers import it

    supervisor.work = test_interrupted_rules.work
    cli.main(sys.argv[1:])
