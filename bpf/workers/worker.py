"""Claim a cohort, train it, tell: the loop of one worker process.

The study is the truth: whatever runs this loop, and however often it dies, no finished cell is lost or run
twice, and an interrupted cohort goes on from its checkpoint to the same numbers.
"""

import math
import socket
import time
import traceback
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import torch

import bpf
from bpf.data.cache import Data, load
from bpf.errors import BpfError, DiskFull, PluginError, RunError
from bpf.experiment.grid import resolve_options
from bpf.experiment.plugins import load_rules, load_trackers
from bpf.experiment.settings import stored_grid
from bpf.interrupts import Interrupted
from bpf.registry import ALGORITHMS, Registry
from bpf.results import models
from bpf.spec.run import RunSpec
from bpf.study.cells import Claim, Row
from bpf.study.holder import Progress
from bpf.study.seam import PATIENCE_SECONDS, Fenced, WorkerStudy
from bpf.training import checkpoint
from bpf.training.cohort import Cohort
from bpf.training.hardware import choose_device, cohort_cells, settle
from bpf.workers.claims import ClaimTraining, Outcome, stored_run
from bpf.workers.events import Began, Ended, Event, GivenUp, Saved, Trained, Trouble
from bpf.workers.files import Files, open_files
from bpf.workers.job import Job, Terms
from bpf.workers.stopping import CutShort, Stop

if TYPE_CHECKING:
    from bpf.study.study import Study

FULL_DISK_SECONDS = 5.0
NOTE_SECONDS = 5.0
"""Least time between two notes of how far a cohort is; the first epoch is noted in any case if it took a while."""
LONG_EPOCH_SECONDS = 1.0
LEAST_PAUSE = 10
"""So many times as long as a checkpoint took to store, it is trained before the next one, unless each epoch has one."""


@dataclass
class Worker:
    """One process's work on an experiment, whose cells and files are wherever `study` and `files` have them."""

    study: WorkerStudy[Any]
    files: Files
    data: Data
    terms: Terms
    tell: Callable[[Event], None]
    stop: Stop = field(default_factory=Stop)

    @classmethod
    def of(
        cls,
        job: Job,
        study: "Study",
        tell: Callable[[Event], None],
        stop: Stop | None = None,
        data: Data | None = None,
    ) -> Self:
        """A worker where the study can be opened; `data` is loaded if it is not given."""
        grid = stored_grid(study.spec)
        data = data or load(grid.dataset, job.data_dir, grid.image_size)
        return cls(study, open_files(job), data, job.terms, tell, stop or Stop())

    def __post_init__(self) -> None:
        grid = stored_grid(self.study.spec)
        self._executions, self._precision = grid.executions_per_trial, grid.matmul_precision
        self._keep = bool(self.study.settings.get("keep_checkpoints"))
        self._device = choose_device(self.terms.device)
        self._data = self.data.to(self._device)
        self._rules, self._trackers = load_rules(grid.algorithm), load_trackers(grid.trackers)
        resolve_options(grid, self._rules)  # so that those of another version are refused
        self._noticed: set[str] = set()
        self.holder: Any = None

    def run(self) -> None:
        """Train until nothing is pending.

        Raises Interrupted after a request to stop, and BpfError when the work cannot go on; what was claimed is
        released in either case.
        """
        settle(self._device, self._precision)
        self.study.patience, self.study.on_wait = PATIENCE_SECONDS, self._wait
        self.files.on_wait = self._wait
        self.study.repair()
        with closing(self.files), self.study.enrolled(self._facts) as owner:
            self.holder = owner
            try:
                while not self.stop.asked and (claim := self.study.claim(owner, self._cohort_size)):
                    self._attend(claim)
            finally:
                self._reckon()
        counts = self.study.counts()
        if self.stop.asked and (counts["pending"] or counts["interrupted"]):
            raise self.stop.interruption()

    @cached_property
    def _facts(self) -> dict[str, Any]:
        return {
            "host": socket.gethostname(),
            "device": str(self._device),
            "bpf": bpf.__version__,
            "torch": torch.__version__,
            **self.terms.facts,
        }

    def _attend(self, claim: Claim) -> None:
        """Train a claim, or give it back for a reason."""
        training: ClaimTraining | None = None
        try:
            training = self._open(claim)
            self._train(training)
        except Fenced:
            self.tell(Trouble("Another worker has taken over a cohort here; it is left to that one."))
            self.tell(GivenUp())
        except (BpfError, KeyboardInterrupt) as error:
            with suppress(RunError, Interrupted):  # with the database away, the lock says as much
                self.study.patience = 0.0
                self.study.release(claim)
            raise error
        except (MemoryError, torch.OutOfMemoryError):
            self._out_of_memory(claim, training.stacked if training else self._runs(claim))
        except (Exception, SystemExit) as error:
            of = Registry(ALGORITHMS).called(claim.rows[0].rule)
            blame = f"\n{error}" if isinstance(error, PluginError) else f" (by the {of}: mend or update it)"
            self._raised(claim, f"{traceback.format_exc().rstrip()}{blame}\n")

    def _open(self, claim: Claim) -> ClaimTraining:
        path, limit = self.files.checkpoint(claim.cohort, claim.resumed), claim.rows[0].max_runs
        try:
            training = ClaimTraining(claim, self._executions, limit, path, self._cohort)
        except checkpoint.Unusable as problem:  # with the file away, it begins anew
            aside = self.files.set_aside(claim.cohort)
            self.tell(Trouble(f"{problem}. It is kept as {aside}, and its cells are trained from their start."))
            training = ClaimTraining(claim, self._executions, limit, path, self._cohort)
        if training.epoch:
            self.study.progressed(claim, training.epoch)
        return training

    def _runs(self, claim: Claim) -> int:
        """How many runs of a claim are stacked."""
        runs = sum(self._executions - row.done for row in claim.rows)
        return min(runs, claim.rows[0].max_runs or runs)

    def _cohort(self, specs: list[RunSpec]) -> Cohort:
        rule = self._rules[specs[0].algorithm]
        return Cohort(specs, rule, self._data, self._trackers, self._device, keep_final=self._keep, notice=self._notice)

    def _notice(self, text: str) -> None:
        """Tell what a cohort has to say, once."""
        if text not in self._noticed:
            self._noticed.add(text)
            self.tell(Trouble(text))

    def _train(self, training: ClaimTraining) -> None:
        claim, first = training.claim, training.specs[0]
        shape = (first.algorithm, first.arch, first.activation, len(claim.rows), len(training.specs))
        self.tell(Began(*shape, training.epoch, training.epochs, training.cost))
        at = self._begun(training)
        self._note(at)
        saved = noted = time.monotonic()
        pause = least = self.terms.checkpoint_seconds
        while not training.done:
            began = time.perf_counter()
            training.run_epoch()
            took = time.perf_counter() - began
            speed = training.examples * training.stacked / took
            at = at.after(training.epoch, took, speed)
            self.tell(Trained(training.epoch, speed, training.objective))
            is_long = training.epoch == at.began + 1 and took >= LONG_EPOCH_SECONDS
            if is_long or time.monotonic() - noted >= NOTE_SECONDS:
                self._note(at)
                noted = time.monotonic()
            if self.holder.lost.is_set():
                raise Fenced("The lease has run out.")
            if self.stop.asked or time.monotonic() - saved >= pause:
                storing = self._save(training)
                pause = max(least, LEAST_PAUSE * storing) if least else 0.0
                saved = time.monotonic()
            if self.stop.asked and not training.done:
                raise self.stop.interruption()
        if self._keep:
            self._save(training)
        try:
            self._finish(training)
        except Fenced:
            raise
        except RunError:  # the database is gone for good: what is trained need not be trained again
            self._store(training)
            raise

    def _note(self, at: Progress) -> None:
        self._reckon()
        self.study.note(self.holder, at)

    def _reckon(self) -> None:
        self.holder.reckon(1 if self._device.type == "cpu" else self.terms.sharers)  # each has a core of its own

    def _begun(self, training: ClaimTraining) -> Progress:
        """How far a cohort is that begins, or goes on, here."""
        rows, first = training.claim.rows, training.specs[0]
        return Progress.model_construct(  # unchecked, as readers check: nothing that is noted may end the training
            rule=first.algorithm,
            arch=first.arch,
            activation=first.activation,
            cells=len(rows),
            executions=training.stacked,
            began=training.epoch,
            epoch=training.epoch,
            epochs=training.epochs,
            speed=0.0,
            seconds=0.0,
            cost=sum(row.cost * (self._executions - row.done) for row in rows) / self._executions,
        )

    def _save(self, training: ClaimTraining) -> float:
        """Store a checkpoint; returns how many seconds that took."""
        began = time.monotonic()
        self._write(lambda: self._store(training))
        if any(row.kills for row in training.claim.rows):  # it got further, so what killed its workers is forgiven
            self.study.progressed(training.claim, training.epoch)
        self.tell(Saved())
        return time.monotonic() - began

    def _store(self, training: ClaimTraining) -> None:
        training.save()
        self.files.store(training.claim.cohort)

    def _finish(self, training: ClaimTraining) -> None:
        facts = {"device": str(self._device), "examples": training.examples}
        outcomes = list(training.outcomes(lambda row: self.study.history(row.key), facts))
        self._keep_model(training, outcomes)
        self.study.finish(training.claim, *(outcome.finished for outcome in outcomes))
        for outcome in outcomes:
            self._tell_ended(outcome.row, outcome.finished.state, outcome.finished.value)
        self.files.clear(self.study, training.claim.rows[0].rule, None if self._keep else training.claim.cohort)

    def _keep_model(self, training: ClaimTraining, outcomes: list[Outcome]) -> None:
        """Write the network of a cell that would be the best of its rule. Before it is: a crash must not lose it."""
        ranks = [math.inf if outcome.finished.value is None else outcome.finished.value for outcome in outcomes]
        first = outcomes[ranks.index(min(ranks))]  # of equal ones, as the study has it
        row, value, run = first.row, first.finished.value, first.run
        if value is None or run is None:
            return
        best = self.study.best(row.rule)
        if best is not None and best[1] < value:  # of equal ones either may become it
            return
        network = training.network(run)
        if network is not None:
            spec, shape, classes = training.specs[run], self._data.shape, self._data.classes
            content = models.content(network, spec, shape, classes, self._rules[row.rule])
            self._write(lambda: self.files.save_model(row.rule, row.key, content))

    def _out_of_memory(self, claim: Claim, stacked: int) -> None:
        """Stack half as many runs; if it was one, the cell cannot be trained here."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        spec = claim.rows[0].spec
        what = (
            f"Out of memory training {claim.rows[0].rule} with arch {spec['arch']} and batch_size {spec['batch_size']}"
        )
        if stacked > 1:
            text = f"{what}, {stacked} executions together; it is tried again with {stacked // 2}."
            return self._begin_anew(claim, stacked // 2, "memory", text)
        cure = "Use a smaller arch or batch_size."
        self._fail(claim, f"{what} on {self._device}, one execution alone. {cure}", "memory")

    def _raised(self, claim: Claim, trace: str) -> None:
        """A rule raised: its cell has failed. In a cohort each is tried alone, so that only the guilty one fails."""
        if len(claim.rows) > 1:
            text = f"{trace.strip().splitlines()[-1]}: its cohort is tried again, each cell alone."
            self._begin_anew(claim, self._executions, "exception", text)
        else:
            self._fail(claim, trace, "exception")

    def _begin_anew(self, claim: Claim, max_runs: int, cause: str, text: str) -> None:
        """Give a claim back, to be trained from its start; what is another worker's by now keeps its checkpoint."""
        if self.study.release(claim, max_runs=max_runs, cause=cause):
            self.files.discard(claim.cohort)
            self.tell(Trouble(text))
        self.tell(GivenUp())

    def _fail(self, claim: Claim, error: str, cause: str) -> None:
        with suppress(Fenced):
            for row in claim.rows:
                self.study.fail(claim, row.key, error, cause)
                self._tell_ended(row, "failed", None)
            self.files.discard(claim.cohort)

    def _tell_ended(self, row: Row, state: str, value: float | None) -> None:
        self.tell(
            Ended(row.key, row.name, row.rule, row.chosen, state, value, row.cost * (self._executions - row.done))
        )

    def _cohort_size(self, row: Row) -> int:
        if row.max_runs:
            return max(1, row.max_runs // self._executions)
        spec = stored_run(row)
        channels, height, width = self._data.shape
        inputs = channels * height * width
        targets = inputs if spec.problem_type == "reconstruction" else len(self._data.classes)
        rule, examples = self._rules[spec.algorithm], len(self._data.train_labels)
        return cohort_cells(spec, rule, self._executions, inputs, targets, examples, self._device, self.terms.sharers)

    def _wait(self, reason: str) -> None:
        """Let a person know, and go on waiting unless asked to stop."""
        self.tell(Trouble(reason))
        if self.stop.asked:
            raise CutShort

    def _write(self, write: Callable[[], None]) -> None:
        """Write a file; with the disk full, wait for space."""
        while True:
            try:
                return write()
            except DiskFull as error:
                self._wait(f"The disk is full: {error.path} cannot be written. The work goes on when there is space.")
            time.sleep(FULL_DISK_SECONDS)
