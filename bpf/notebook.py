"""bpf in Python: the commands as functions, for notebooks. `import bpf` is enough to reach them.

>>> import bpf
>>> experiment = bpf.tune({"dataset": "digits", "algorithm": ["bp", "dfa"]}, "runs/mine")   # doctest: +SKIP
>>> experiment.results().groupby("algorithm").test_error.min()                              # doctest: +SKIP
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bpf import api
from bpf.console import tables
from bpf.console.progress import LiveProgress
from bpf.errors import BpfError, UsageError, did_you_mean
from bpf.experiment import handover
from bpf.experiment.directory import Experiment, Place, open_experiment
from bpf.experiment.places import model_path
from bpf.extras import need
from bpf.interrupts import NOTHING_BEGUN, interruptible, told_in_one_line
from bpf.results import exporting, summary
from bpf.spec.fields import build
from bpf.spec.grid import GridSpec
from bpf.spec.run import RunSpec
from bpf.study.ranking import as_json
from bpf.words import counted
from bpf.workers import processes
from bpf.workers.effort import Effort

if TYPE_CHECKING:
    import pandas

GridLike = GridSpec | Mapping[str, Any]
RunLike = RunSpec | Mapping[str, Any]


@dataclass(frozen=True)
class Opened:
    """An experiment on disk. Tables are pandas DataFrames (`pip install pandas`), read anew at each call."""

    experiment: Experiment

    def __repr__(self) -> str:
        experiment, grid = self.experiment, self.experiment.grid
        cells = ""
        if experiment.is_here and not experiment.database.missing():  # no server is asked
            with suppress(BpfError), closing(experiment.read_study()) as study:
                cells = f"{counted(sum(study.counts().values()), 'cell')}: "
        return f"bpf.open({str(self.directory)!r})  # {cells}{', '.join(grid.algorithm)} on {grid.dataset}"

    @property
    def directory(self) -> Path:
        return self.experiment.directory

    def results(self) -> "pandas.DataFrame":
        """A row per cell: parameters, state, objective and test scores (mean and std over executions)."""
        return self._frame("results")

    def history(self) -> "pandas.DataFrame":
        """A row per epoch of each execution: training and validation loss and error."""
        return self._frame("history")

    def trackers(self) -> "pandas.DataFrame":
        """A row per measurement of each execution."""
        return self._frame("trackers")

    def status(self) -> dict[str, Any]:
        """How far it is, as `bpf status --json` tells it."""
        return summary.status(self.experiment)

    def best(self, top: int = 10) -> list[dict[str, Any]]:
        """The best cells, as `bpf best --json` tells them."""
        return as_json(summary.best(self.experiment, top), self.experiment.grid.objective)

    def best_model(self, rule: str) -> Path | None:
        """The file of a rule's best network, for `bpf.load`; None if nothing of it is complete yet.

        Raises UsageError for a rule that the experiment does not have.
        """
        if rule not in self.experiment.grid.algorithm:
            known = did_you_mean(rule, self.experiment.grid.algorithm)
            raise UsageError(f"{self.directory} has no rule {rule!r}.{known}")
        with closing(self.experiment.read_study()) as study:
            found = study.best(rule)
        return model_path(self.experiment.files / "models", rule, found[0]) if found else None

    def _frame(self, what: str) -> "pandas.DataFrame":
        pandas = need("pandas", "A DataFrame", "pandas", "notebook")
        with closing(self.experiment.read_study()) as study:
            table = exporting.table(study, what)
            return pandas.DataFrame(list(table), columns=list(table.columns))


def tune(
    spec: GridLike,
    directory: str | Path,
    *,
    lr_from: str | Path | None = None,
    data_dir: str | Path = "data",
    workers: int | None = None,
    on: str | None = None,
    workers_per_gpu: int = 1,
    max_hours: float | None = None,
    keep_checkpoints: bool = False,
    quiet: bool = False,
) -> Opened:
    """Run a grid search in worker processes, or go on with it, and return the experiment.

    `spec` has the fields of a spec file; `on` is a Ray cluster, as in `bpf tune --on`.

    With a `val_*` objective and no learning rate it takes those of the earlier
    phase, as `bpf tune` does: from `lr_from`, or from `directory`, and then lies in a directory inside it. Raises
    UsageError for a mistake, and Interrupted when it was stopped, by Ctrl-C or SIGTERM; the same call again goes on. A
    script that does not catch it ends in one line, with exit code 130. It can call this anywhere: the workers do not
    run it again.
    """
    with _interruptible(Path(directory)):
        grid = spec if isinstance(spec, GridSpec) else build(GridSpec, spec)
        effort = Effort(workers, max_hours=max_hours, on=on, workers_per_gpu=workers_per_gpu)
        if on is None:
            processes.warm_up()
        place = Place(keep_checkpoints=keep_checkpoints)
        where, grid, taken = handover.begin(Path(directory), grid, Path(lr_from) if lr_from else None, place)
        experiment = api.open_tune(where, grid, Path(data_dir), place)
        if taken is not None and not quiet:
            tables.show_taken(taken)
        return _run(experiment, effort, quiet)


def train(
    spec: RunLike,
    directory: str | Path,
    *,
    data_dir: str | Path = "data",
    max_hours: float | None = None,
    keep_checkpoints: bool = False,
    quiet: bool = False,
) -> Opened:
    """Train one network in this process, or go on with it, and return the experiment."""
    with _interruptible(Path(directory)):
        run = spec if isinstance(spec, RunSpec) else build(RunSpec, spec)
        place = Place(keep_checkpoints=keep_checkpoints)
        experiment = api.open_train(Path(directory), run, Path(data_dir), place)
        return _run(experiment, Effort(1, max_hours=max_hours), quiet)


def open(directory: str | Path) -> Opened:
    """The experiment in a directory. Raises UsageError if there is none."""
    return Opened(open_experiment(Path(directory)))


@contextmanager
def _interruptible(directory: Path) -> Iterator[None]:
    """Raise Interrupted for Ctrl-C and SIGTERM at any moment, saying what is stored."""

    def told() -> str:
        begun = (directory / "experiment.yaml").exists()
        last = f"Nothing finished is lost; the same call goes on in {directory}."
        return f"Interrupted at once. {last}" if begun else NOTHING_BEGUN

    with told_in_one_line(), interruptible(told):
        yield


def _run(experiment: Experiment, effort: Effort, quiet: bool) -> Opened:
    # A notebook's cell has no command line; what was called is in the spec.
    command = [f"bpf.{experiment.kind}", str(experiment.directory)]
    api.run(experiment, lambda outset: LiveProgress(outset, quiet), command, effort)
    sys.stderr.flush()
    return Opened(experiment)
