"""Claim a cohort, train it, tell: the loop of one worker process.

The study is the truth: whatever runs this loop, and however often it dies, no finished cell is lost or run
twice, and an interrupted cohort goes on from its checkpoint to the same numbers.
"""

import math
import signal
import statistics
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from types import FrameType
from typing import Any, Protocol

import torch

from bpf import checkpoint
from bpf.data.cache import Data
from bpf.errors import BpfError, RunError
from bpf.experiment import Experiment
from bpf.files import explaining, write_json
from bpf.grid import execution
from bpf.hardware import choose_device, cohort_cells, settle
from bpf.owner import Owner
from bpf.plan import Claim, Row
from bpf.spec import RunSpec
from bpf.study import Study
from bpf.training import Cohort, Record

CHECKPOINT_SECONDS = 30.0


class Interrupted(BpfError):
    """The user or the system asked to stop; everything is stored and released."""

    exit_code = 130


class Observer(Protocol):
    """Who wants to know how the work goes on."""

    def began(self, claim: Claim, epoch: int) -> None:
        """A cohort starts, or goes on after `epoch`."""

    def trained(self, claim: Claim, cohort: Cohort) -> None:
        """An epoch of the cohort is done."""

    def ended(self, row: Row, state: str, value: float | None) -> None:
        """A cell is complete, diverged or failed."""


@dataclass
class Stop:
    """A request to stop after the current epoch."""

    asked: bool = False

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Ask on the first SIGINT or SIGTERM; the second SIGINT interrupts at once."""

        def ask(number: int, frame: FrameType | None) -> None:
            if self.asked and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.asked = True

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@dataclass
class Worker:
    """One process's work on an experiment; `checkpoint_seconds` is the least time between two checkpoints."""

    experiment: Experiment
    study: Study
    data: Data
    observer: Observer
    stop: Stop = field(default_factory=Stop)
    checkpoint_seconds: float = CHECKPOINT_SECONDS

    def __post_init__(self) -> None:
        grid = self.experiment.grid
        self.device = choose_device(grid.device)
        self.data = self.data.to(self.device)
        self._rules, self._trackers = self.experiment.rules(), self.experiment.trackers()

    def run(self) -> None:
        """Train until nothing is pending.

        Raises Interrupted after a request to stop, and BpfError when the work cannot go on; what was claimed is
        released in either case.
        """
        settle(self.device)
        self.study.repair()
        with explaining(self.study.locks):
            owner = Owner(self.study.locks)
        with owner:
            while not self.stop.asked and (claim := self.study.claim(owner, self._cohort_size)):
                try:
                    self._train(claim)
                except BpfError:
                    self.study.release(claim)
                    raise
                except (MemoryError, torch.OutOfMemoryError) as error:
                    self.study.release(claim)
                    spec = claim.rows[0].spec
                    raise RunError(
                        f"Out of memory training {claim.rows[0].rule} with arch {spec['arch']} and batch_size "
                        f"{spec['batch_size']} on {self.device}. Use a smaller arch or batch_size."
                    ) from error
                except Exception:
                    self._fail(claim, traceback.format_exc())
        counts = self.study.counts()
        if self.stop.asked and (counts["pending"] or counts["interrupted"]):
            raise Interrupted("Stopped.")

    def _cohort_size(self, row: Row) -> int:
        spec = RunSpec.model_validate(row.spec)
        channels, height, width = self.data.shape
        inputs = channels * height * width
        targets = inputs if spec.problem_type == "reconstruction" else len(self.data.classes)
        return cohort_cells(spec, self.experiment.grid.executions_per_trial, inputs, targets, self.device)

    def _train(self, claim: Claim) -> None:
        keys, cohort = self._begin(claim)
        self.observer.began(claim, cohort.epoch)
        saved = time.monotonic()
        while not cohort.done:
            cohort.run_epoch()
            self.observer.trained(claim, cohort)
            if self.stop.asked or time.monotonic() - saved >= self.checkpoint_seconds:
                self._save(claim, keys, cohort)
                saved = time.monotonic()
            if self.stop.asked and not cohort.done:
                raise Interrupted("Stopped.")
        if len(keys) > 1:  # a crash between two cells' results must find the others' again
            self._save(claim, keys, cohort)
        self._finish(claim, keys, cohort)

    def _begin(self, claim: Claim) -> tuple[list[str], Cohort]:
        path = self.experiment.checkpoint(claim.cohort)
        if claim.resumed and path.exists():
            content = checkpoint.load(path, claim.cohort)
            with checkpoint.fitting(path):
                specs = [RunSpec.model_validate(spec) for spec in content["specs"]]
            cohort = self._cohort(claim, specs)
            with checkpoint.fitting(path):
                cohort.load(content["state"])
            return content["keys"], cohort
        executions = range(self.experiment.grid.executions_per_trial)
        cells = [RunSpec.model_validate(row.spec) for row in claim.rows]
        cohort = self._cohort(claim, [execution(cell, number) for cell in cells for number in executions])
        return [row.key for row in claim.rows], cohort

    def _cohort(self, claim: Claim, specs: list[RunSpec]) -> Cohort:
        return Cohort(specs, self._rules[claim.rows[0].rule], self.data, self._trackers, self.device)

    def _save(self, claim: Claim, keys: list[str], cohort: Cohort) -> None:
        checkpoint.save(self.experiment.checkpoint(claim.cohort), claim.cohort, keys, cohort.specs, cohort.state())

    def _finish(self, claim: Claim, keys: list[str], cohort: Cohort) -> None:
        executions = len(cohort.records) // len(keys)
        rows = {row.key: row for row in claim.rows}
        for number, key in enumerate(keys):
            if key not in rows:  # finished before a crash
                continue
            records = cohort.records[number * executions : (number + 1) * executions]
            state, value, result = outcome(records)
            result |= {"device": str(self.device), "examples": cohort.examples}
            write_json(self.experiment.log(key), [_logged(record) for record in records])
            self.study.finish(claim, key, value, state, result)
            self.observer.ended(rows[key], state, value)
        self._discard_checkpoint(claim)

    def _fail(self, claim: Claim, trace: str) -> None:
        for row in claim.rows:
            self.study.fail(claim, row.key, trace)
            self.observer.ended(row, "failed", None)
        self._discard_checkpoint(claim)

    def _discard_checkpoint(self, claim: Claim) -> None:
        with suppress(OSError):  # of no more use, and no reason to fail
            self.experiment.checkpoint(claim.cohort).unlink(missing_ok=True)


def _logged(record: Record) -> dict[str, Any]:
    """A record as JSON has it, which knows no numbers that are not finite: null stands for them."""
    logged = asdict(record)
    for name, values in record.history.items():
        logged["history"][name] = [value if math.isfinite(value) else None for value in values]
    return logged


def outcome(records: list[Record]) -> tuple[str, float | None, dict[str, Any]]:
    """A cell's state, value (the mean objective of its executions) and result, without the histories.

    A cell with a diverged execution has diverged: a mean over the others would flatter it.
    """
    executions = [{k: v for k, v in asdict(record).items() if k != "history"} for record in records]
    result = {"executions": executions, "seconds": sum(record.seconds for record in records)}
    values = [record.objective for record in records if record.status == "complete" and record.objective is not None]
    if len(values) < len(records):
        return "diverged", None, result
    return "complete", statistics.fmean(values), result
