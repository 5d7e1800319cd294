"""What the commands do, as functions on experiments that return plain values. Nothing here prints."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bpf.data.cache import Data, describe, load, open_dataset
from bpf.data.subsets import subset
from bpf.errors import RunError, UsageError
from bpf.experiment import Experiment, find, load_rules, open_experiment, prepare
from bpf.grid import Grid, as_grid, check_run, expand, resolve_options
from bpf.plan import Row
from bpf.results import Ranked, cost, rank
from bpf.spec import GridSpec, RunSpec

if TYPE_CHECKING:
    from bpf.worker import Observer, Stop

OPEN = ("pending", "interrupted", "running")


@dataclass(frozen=True)
class Planned:
    """What a grid amounts to; `cohorts` is None when the data set's shape is not known without reading it."""

    grid: Grid
    cohorts: int | None

    def as_json(self) -> dict[str, Any]:
        rules = {name: sum(cell.rule == name for cell in self.grid.cells) for name in self.grid.axes}
        left_out = [{"algorithm": o.rule, "cells": o.cells, "reason": o.reason} for o in self.grid.left_out]
        return {
            "cells": len(self.grid.cells),
            "by_algorithm": rules,
            "cohorts": self.cohorts,
            "left_out": left_out,
        }


def open_tune(directory: Path, grid: GridSpec, data_dir: Path) -> Experiment:
    """The experiment of a grid in `directory`, new, gone on with or extended. Nothing is written yet."""
    return prepare(directory, "tune", resolve_options(grid, load_rules(grid.algorithm)), data_dir)


def open_train(directory: Path, run: RunSpec, data_dir: Path) -> Experiment:
    """The experiment of a single run in `directory`. Nothing is written yet."""
    rules = load_rules([run.algorithm])
    check_run(run, rules[run.algorithm])
    return prepare(directory, "train", resolve_options(as_grid(run), rules), data_dir)


def plan(experiment: Experiment) -> Planned:
    """Expand the experiment's grid; writes and downloads nothing."""
    from bpf.hardware import choose_device, cohort_cells

    grid = expand(experiment.grid, experiment.rules())
    experiment.trackers()
    spec = experiment.grid
    dataset = open_dataset(spec.dataset, experiment.data_dir, spec.image_size)
    if dataset.takes_source:
        dataset.fingerprint()  # looks whether the source is there
    info = describe(spec.dataset, experiment.data_dir)
    if info.problem:
        raise UsageError(f"The dataset {spec.dataset!r} cannot be used: {info.problem}")
    if info.shape is None or info.class_count is None:
        return Planned(grid, None)
    inputs = info.shape[0] * info.shape[1] * info.shape[2]
    targets = inputs if spec.problem_type == "reconstruction" else info.class_count
    device = choose_device(spec.device)
    members: dict[str, list[RunSpec]] = {}
    for cell in grid.cells:
        members.setdefault(cell.structure, []).append(RunSpec.model_construct(**cell.spec))
    sizes = [
        (len(runs), cohort_cells(runs[0], spec.executions_per_trial, inputs, targets, device))
        for runs in members.values()
    ]
    return Planned(grid, sum(-(-count // size) for count, size in sizes))


def run(
    experiment: Experiment,
    observe: Callable[[list[Row]], "AbstractContextManager[Observer]"],
    command: Sequence[str],
    stop: "Stop",
    checkpoint_seconds: float,
    retry_failed: bool = False,
) -> None:
    """Plan what is missing and train until nothing is left.

    Everything that can be wrong with the request is found before anything is written. Raises Interrupted after a
    request to stop.
    """
    from bpf.hardware import choose_device
    from bpf.worker import Worker

    spec = experiment.grid
    choose_device(spec.device)
    experiment.trackers()
    expand(spec, experiment.rules())
    loaded = load(spec.dataset, experiment.data_dir, spec.image_size)
    _check_subsets(spec, loaded)
    with experiment.running():
        begun = experiment.begun
        if not begun:  # first of all, so that whatever happens next, `bpf resume` can go on
            experiment.save(command)
        study, _ = experiment.plan()
        with closing(study):
            if begun:  # last, so that a grid that cannot be extended is not recorded
                experiment.save(command)
            if retry_failed:
                study.retry_failed()
            with observe(study.rows()) as observer, stop.on_signals():
                Worker(experiment, study, loaded, observer, stop, checkpoint_seconds).run()


def rows(experiment: Experiment) -> list[Row]:
    """Every cell of the experiment, in plan order."""
    with closing(experiment.open_study()) as study:
        return study.rows()


def status(experiment: Experiment) -> dict[str, Any]:
    """Cells by state, seconds spent in finished cells, and seconds that the rest will take at that speed."""
    with closing(experiment.open_study()) as study:
        counts = study.counts()
        cells = study.rows()
    executions = experiment.grid.executions_per_trial
    finished = [row for row in cells if row.result is not None]
    elapsed = sum(row.result["seconds"] for row in finished if row.result is not None)
    done = sum(cost(row.spec, executions) for row in finished)
    left = sum(cost(row.spec, executions) for row in cells if row.state in OPEN)
    eta = 0.0 if not left else left * elapsed / done if done else None
    return {
        "experiment": str(experiment.directory),
        "cells": {"total": sum(counts.values()), **counts},
        "elapsed_seconds": round(elapsed, 3),
        "eta_seconds": None if eta is None else round(eta, 3),
    }


def best(experiment: Experiment, top: int | None = None) -> list[Ranked]:
    """The complete cells ranked by the objective, best first."""
    return rank(rows(experiment))[:top]


def train_report(experiment: Experiment) -> dict[str, Any]:
    """What came out of a single run. Raises RunError with the cause if the rule failed."""
    row = rows(experiment)[0]
    if row.state == "failed":
        last = (row.error or "").strip().splitlines()[-1]
        raise RunError(
            f"The run failed: {last}\nSee `bpf status {experiment.directory} --failed`; "
            f"`bpf resume {experiment.directory} --retry-failed` tries again."
        )
    result = row.result or {}
    record = result["executions"][0]
    return {
        "status": row.state,
        "dataset": row.spec["dataset"],
        "algorithm": row.rule,
        "seed": record["seed"],
        "device": result["device"],
        "epochs": record["epochs"],
        "train": record["train"],
        "val": record["val"],
        "test": record["test"],
        "seconds": {"total": record["seconds"], "per_epoch": record["seconds"] / record["epochs"]},
        "samples_per_second": result["examples"] * record["epochs"] / record["seconds"],
    }


def newest(root: Path) -> Experiment:
    """The experiment below `root` that was touched last."""
    found = find(root)
    if not found:
        raise UsageError(f"There is no experiment in {root}. Start one with `bpf tune`, or name its directory.")
    return open_experiment(found[0])


def newest_unfinished(root: Path) -> Experiment:
    """The experiment below `root` that was touched last and has something left to do."""
    newest(root)
    for directory in find(root):
        experiment = open_experiment(directory)
        if not experiment.database.exists() or any(status(experiment)["cells"][state] for state in OPEN):
            return experiment
    raise UsageError(f"Every experiment in {root} is finished. Start one with `bpf tune`, or name a directory.")


def _check_subsets(spec: GridSpec, loaded: Data) -> None:
    for skew in spec.skew_type:
        for factor in spec.imbalance_factor:
            subset(
                loaded.train_labels.numpy(),
                examples_frac=spec.examples_frac,
                val_frac=spec.val_frac,
                skew_type=skew,
                imbalance_factor=factor,
                data_seed=spec.data_seed,
            )
