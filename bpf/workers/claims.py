"""The training of what a worker has claimed: from its start or its checkpoint to the outcomes of its cells."""

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError
from torch import Tensor

from bpf.errors import Damaged
from bpf.experiment.grid import PER_RUN, execution
from bpf.spec.run import RunSpec, digest, work
from bpf.study.cells import Claim, Finished, Row
from bpf.training import checkpoint
from bpf.training.cohort import Cohort

MakeCohort = Callable[[list[RunSpec]], Cohort]


@dataclass(frozen=True)
class Outcome:
    """What came out of a cell; its value is the mean objective of its executions, and its history is as JSON has it.

    `run` is the best run of this training, to be asked for its network.
    """

    row: Row
    finished: Finished
    run: int | None


class ClaimTraining:
    """A claim in training. All its runs are stacked, or in parts of at most `max_runs`, one part after the other."""

    def __init__(self, claim: Claim, executions: int, max_runs: int | None, path: Path, make: MakeCohort) -> None:
        """Go on from the checkpoint at `path` if the claim was begun before, otherwise start.

        Raises checkpoint.Unusable for a checkpoint that cannot be used.
        """
        self.claim, self._path, self._make = claim, path, make
        self._max_runs, self._executions = max_runs, executions
        self._states: list[dict[str, Any]] = []  # of the parts that are done
        self._stored: list[dict[str, Any]] = []  # of the parts that the checkpoint holds
        if claim.resumed and path.exists():
            self._load()
        else:
            numbered = [(row, number) for row in claim.rows for number in range(row.done, executions)]
            self.cells = [row.name for row, _ in numbered]
            self.specs = [execution(stored_run(row), number) for row, number in numbered]
            self._begin_part()

    @property
    def done(self) -> bool:
        return self._part.done and len(self._states) + 1 == len(self._parts)

    @property
    def stacked(self) -> int:
        """How many runs are trained together now."""
        return len(self._part.specs)

    @property
    def examples(self) -> int:
        """Training examples of one epoch of one run."""
        return self._part.examples

    @property
    def objective(self) -> float | None:
        """The best objective of the runs in training in the last epoch, if any is finite."""
        name, epoch = self.specs[0].objective, self._part.epoch
        last = [record.history[name][-1] for record in self._part.records if record.epochs == epoch > 0]
        return min((value for value in last if math.isfinite(value)), default=None)

    @property
    def epoch(self) -> int:
        """Epochs that are done; those of the parts are added up."""
        others = [*self._states, *self._stored[len(self._states) + 1 :]]
        return self._part.epoch + sum(int(state["epoch"]) for state in others)

    @property
    def epochs(self) -> int:
        return len(self._parts) * self.specs[0].epochs

    @property
    def cost(self) -> float:
        """The work that is left."""
        share = 1 - self.epoch / self.epochs
        return share * sum(work(spec.model_dump()) for spec in self.specs)

    def run_epoch(self) -> None:
        if self._part.done:
            self._states.append(self._part.state())
            self._begin_part()
        self._part.run_epoch()

    def save(self) -> None:
        """Write the checkpoint."""
        states = [*self._states, self._part.state(), *self._stored[len(self._states) + 1 :]]
        checkpoint.save(self._path, self.claim.cohort, self.cells, self.specs, states)

    def outcomes(self, earlier: Callable[[Row], list[dict[str, Any]]], facts: dict[str, Any]) -> Iterator[Outcome]:
        """What came out of each cell that is still claimed, with more `facts` in its result.

        `earlier` gives the histories of a cell's executions that were done before.
        """
        states = [*self._states, self._part.state()]
        records = [record for state in states for record in state["records"]]
        for row in self.claim.rows:
            runs = [run for run, name in enumerate(self.cells) if name == row.name]
            new = [records[run] for run in runs]
            executions = [*(row.result["executions"] if row.result and row.done else ()), *map(_without_history, new)]
            history = [*(earlier(row) if row.done else ()), *(_logged(record) for record in new)]
            state, value, result = outcome(executions)
            if row.done:
                result["added"] = True
            complete = [run for run in runs if records[run]["status"] == "complete"]
            best = min(complete, key=lambda run: records[run]["objective"], default=None)
            yield Outcome(row, Finished(row.key, value, state, result | facts, history), best)

    def network(self, run: int) -> dict[str, Tensor] | None:
        """The network of a run's best epoch, or None if its checkpoint is of a bpf that did not keep it."""
        for number, part in enumerate(self._parts):
            if run in part:
                cohort = self._part
                if number < len(self._states):
                    cohort = self._make(self.specs[part.start : part.stop])
                    cohort.load(self._states[number])
                try:
                    return cohort.best_network(run - part.start)
                except KeyError:
                    return None
        raise IndexError(run)

    @property
    def _parts(self) -> list[range]:
        size = self._max_runs or len(self.specs)
        return [range(at, min(at + size, len(self.specs))) for at in range(0, len(self.specs), size)]

    def _begin_part(self) -> None:
        number = len(self._states)
        part = self._parts[number]
        self._part = self._make(self.specs[part.start : part.stop])
        if number < len(self._stored):
            self._part.load(self._stored[number])

    def _load(self) -> None:
        content = checkpoint.load(self._path, self.claim.cohort)
        names = {row.key: row.name for row in self.claim.rows}  # bpf 0.1 wrote keys
        self.cells = [names.get(cell, cell) for cell in content["cells"]]
        epochs = self.claim.rows[0].spec["epochs"]  # may have grown since
        with checkpoint.fitting(self._path):
            self.specs = [RunSpec.model_validate(spec | {"epochs": epochs}) for spec in content["specs"]]
            self._check_specs()
            self._stored = content["states"]
            self._max_runs = len(self._stored[0]["records"])
            self._begin_part()
            while self._part.done and len(self._states) + 1 < len(self._stored):
                self._states.append(self._part.state())
                self._begin_part()

    def _check_specs(self) -> None:
        """Raise ValueError if the runs of a checkpoint are not those of the cells that are claimed, and alike."""
        for row in self.claim.rows:
            mine = [spec for spec, name in zip(self.specs, self.cells, strict=True) if name == row.name]
            wanted = [execution(stored_run(row), number) for number in range(row.done, self._executions)]
            if [spec.identity() for spec in mine] != [spec.identity() for spec in wanted]:
                raise ValueError(f"The executions of {row.name} are others.")
        if len({digest(spec.model_dump(exclude=set(PER_RUN), mode="json")) for spec in self.specs}) > 1:
            raise ValueError("The runs are of different structures.")


def stored_run(row: Row) -> RunSpec:
    """The spec of a cell, which a database has kept. Raises Damaged."""
    try:
        return RunSpec.model_validate(row.spec)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        at = ".".join(map(str, first["loc"]))
        raise Damaged(f"The spec of the cell {row.name} in the study", f"{at}: {first['msg']}") from error


def outcome(
    executions: list[dict[str, Any]],
) -> tuple[Literal["complete", "diverged"], float | None, dict[str, Any]]:
    """A cell's state, value and result.

    A cell with a diverged execution has diverged: a mean over the others would flatter it.
    """
    result = {"executions": executions, "seconds": sum(execution["seconds"] for execution in executions)}
    values = [e["objective"] for e in executions if e["status"] == "complete" and e["objective"] is not None]
    if len(values) < len(executions):
        return "diverged", None, result
    return "complete", statistics.fmean(values), result


def _without_history(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in ("history", "tracked")}


def _logged(record: dict[str, Any]) -> dict[str, Any]:
    """A record as JSON has it, which knows no numbers that are not finite: null stands for them."""
    return record | {name: _finite(record.get(name, {})) for name in ("history", "tracked")}


def _finite(series: dict[str, list[float]]) -> dict[str, list[float | None]]:
    return {name: [value if math.isfinite(value) else None for value in values] for name, values in series.items()}
