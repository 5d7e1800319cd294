"""What the commands do, as functions on experiments that return plain values. Nothing here prints."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bpf.data.cache import Data, describe, load
from bpf.data.cache import extent as extent_of
from bpf.data.scaling import check_channels
from bpf.data.subsets import subset
from bpf.errors import BpfError, RunError, UsageError
from bpf.experiment import places
from bpf.experiment.bucket import Bucket, check_url
from bpf.experiment.directory import NOWHERE_ELSE, Experiment, Place, open_experiment, prepare
from bpf.experiment.grid import Grid, as_grid, check_run, expand, resolve_options
from bpf.experiment.plugins import load_rules
from bpf.experiment.provenance import naming_versions
from bpf.experiment.settings import stored_grid
from bpf.results import summary
from bpf.results.summary import Outset
from bpf.spec.grid import GridSpec
from bpf.spec.run import RunSpec
from bpf.study.database import Database
from bpf.study.seam import PATIENCE_SECONDS
from bpf.workers.effort import AS_USUAL, Effort
from bpf.workers.events import Trouble

if TYPE_CHECKING:
    from bpf.cluster.engine import Engine
    from bpf.experiment.forecast import Forecast, Stack
    from bpf.study.cells import Row
    from bpf.study.study import Study
    from bpf.workers.events import Observe

FEW_CELLS = 5_000


@dataclass(frozen=True)
class Planned:
    """What a grid amounts to, and how long it takes if that was asked for and can be told.

    `cohorts` is None when the data set's shape is not known without reading it; `done` says that nothing is left to do.
    """

    grid: Grid
    cohorts: int | None
    forecast: "Forecast | None" = None
    done: bool = False

    def as_json(self) -> dict[str, Any]:
        rules = {name: sum(cell.rule == name for cell in self.grid.cells) for name in self.grid.axes}
        left_out = [{"algorithm": o.rule, "cells": o.cells, "reason": o.reason} for o in self.grid.left_out]
        return {
            "cells": len(self.grid.cells),
            "by_algorithm": rules,
            "cohorts": self.cohorts,
            "left_out": left_out,
            "seconds": self.forecast.as_json() if self.forecast else None,
            "tracking": self.forecast.tracking_as_json() if self.forecast else None,
        }


def open_tune(directory: Path, grid: GridSpec, data_dir: Path, place: Place = NOWHERE_ELSE) -> Experiment:
    """The experiment of a grid in `directory`, new, gone on with or extended. Nothing is written yet."""
    with naming_versions(directory):
        return prepare(directory, "tune", resolve_options(grid, load_rules(grid.algorithm)), data_dir, place)


def open_train(directory: Path, run: RunSpec, data_dir: Path, place: Place = NOWHERE_ELSE) -> Experiment:
    """The experiment of a single execution in `directory`. Nothing is written yet."""
    with naming_versions(directory):
        rules = load_rules([run.algorithm])
        check_run(run, rules[run.algorithm])
    if "," in run.device:
        raise UsageError(f"device {run.device}: a single execution is trained on one device. Give one of them.")
    return prepare(directory, "train", resolve_options(as_grid(run), rules), data_dir, place)


def plan(experiment: Experiment, effort: Effort = AS_USUAL, budget: float = 0.0, enough: float = 0.0) -> Planned:
    """Expand the experiment's grid; writes and downloads nothing, and needs no data.

    With a `budget` of so many seconds it also tells how long that takes in workers as `effort` has them, measured on
    this machine or known from finished cells; not if it is certain to be done within `enough` seconds.
    """
    from bpf.experiment import forecast
    from bpf.training import hardware
    from bpf.training.estimate import Pace, measure

    rules, trackers, spec = experiment.rules(), experiment.trackers(), experiment.grid
    grid = expand(spec, rules)
    info = describe(spec.dataset, experiment.data_dir)
    extent = extent_of(spec.dataset, experiment.data_dir, spec.image_size)
    if info.problem:
        raise UsageError(f"The dataset {spec.dataset!r} cannot be used: {info.problem}")
    if extent is None or effort.elsewhere:  # other machines stack other numbers
        return Planned(grid, None)
    devices = hardware.devices(effort.device or spec.device, effort.workers)
    device = hardware.choose_device(devices[0])
    rows = _rows(experiment) if budget else []
    stacks, cohorts = forecast.stacks(grid.cells, rows, extent, spec.executions_per_trial, device)

    def pace(stack: "Stack", seconds: float) -> Pace | None:
        try:
            rule = rules[stack.spec.algorithm]
            return measure(stack.specs(), rule, trackers, extent, stack.examples, device, seconds)
        except (Exception, SystemExit):  # of a rule, or of a lack of memory: training deals with it, and not a plan
            return None

    if not budget:
        return Planned(grid, cohorts)
    earlier, finished = forecast.paces(rows, extent)
    means, workers = forecast.Means(pace, budget, enough), len(devices)
    crowding = hardware.crowding(device, workers)
    told = forecast.forecast(stacks, earlier, finished, means, workers, crowding)
    return Planned(grid, cohorts, told, done=not stacks)


def _rows(experiment: Experiment) -> list["Row"]:
    """The cells that were planned on this machine before, unless they are too many to be looked at in a plan."""
    if not (experiment.begun and experiment.is_here) or experiment.database.missing():
        return []
    with suppress(BpfError), closing(experiment.read_study()) as study:
        return study.rows() if sum(study.counts().values()) <= FEW_CELLS else []
    return []


def run(
    experiment: Experiment,
    observe: "Callable[[Outset], AbstractContextManager[Observe]]",
    command: Sequence[str],
    effort: Effort,
    retry_failed: bool = False,
) -> None:
    """Plan what is missing and train until nothing is left.

    Everything that can be wrong with the request is found before anything is written. A grid is trained by worker
    processes, a single execution in this one. Raises Interrupted after a request to stop.
    """
    from bpf.training import hardware
    from bpf.workers import supervisor
    from bpf.workers.job import Job, Terms
    from bpf.workers.stopping import Stop
    from bpf.workers.worker import Worker

    if effort.on:  # imported while Ray starts
        from bpf.cluster.driver import Driver

    spec = experiment.grid
    alone = experiment.kind == "train"
    if alone:
        effort.check_one_device()
        if effort.on:
            raise UsageError("A single execution is trained in this process; --on is for grids.")
    device = effort.device or spec.device
    devices = [] if effort.on else hardware.devices(device, 1 if alone else effort.workers)
    loaded = _check(experiment)
    with (
        _cluster(effort, device, experiment) as engine,
        experiment.running(),
        closing(_planned(experiment, command)) as study,
    ):
        places.take(experiment.files, experiment.directory, experiment.mark)
        if experiment.checkpoints:
            _bucket(experiment.checkpoints, experiment.name).take(experiment.mark)
        if retry_failed:
            study.retry_failed()
        outset = Outset.of(study, spec.objective, spec.executions_per_trial)
        where = (experiment.database, experiment.name, experiment.data_dir, experiment.files.resolve())
        jobs = [
            Job(*where, Terms(device, devices.count(device), effort.checkpoint_seconds), experiment.checkpoints)
            for device in devices[: max(1, outset.open)]
        ]
        if not outset.open:
            _tidy(experiment, study)
            with observe(outset):
                return
        stop = Stop(effort.max_hours)
        with observe(outset) as observer, stop.on_signals():
            study.patience = PATIENCE_SECONDS
            study.on_wait = lambda reason: observer(0, Trouble(reason))
            if engine is not None:
                Driver(engine, experiment, study, loaded, device, effort, observer, stop).run()
            elif alone:
                Worker.of(jobs[0], study, partial(observer, 1), stop, loaded).run()
            else:
                del loaded
                supervisor.Supervisor(jobs, study, observer, stop).run()
        _tidy(experiment, study)


def _tidy(experiment: Experiment, study: "Study") -> None:
    """Remove what those that were killed after their last cells could not; that it fails is no failure of the grid."""
    from bpf.workers.files import Folder

    study.patience, files = 0.0, Folder(experiment.files)
    with suppress(RunError):
        study.repair()
        for rule in experiment.grid.algorithm:
            files.clear(study, rule)


def _cluster(effort: Effort, device: str, experiment: Experiment) -> "AbstractContextManager[Engine | None]":
    """The Ray cluster that is asked for, if any."""
    if effort.on is None:
        return nullcontext()
    effort.check_storage(experiment.database)
    from bpf.cluster.engine import connected

    return connected(effort.on, effort.workers, device, effort.workers_per_gpu)


def store_plan(experiment: Experiment, command: Sequence[str]) -> None:
    """Plan what is missing, for `join` to train."""
    _check(experiment)
    with experiment.running():
        _planned(experiment, command).close()


def _check(experiment: Experiment) -> Data:
    """Find what can be wrong with a request before anything is written; returns the data."""
    spec = experiment.grid
    with naming_versions(experiment.directory):
        experiment.trackers()
        expand(spec, experiment.rules())
        loaded = load(spec.dataset, experiment.data_dir, spec.image_size)
    for each in spec.grids().values():
        check_channels(each.scaler, loaded.shape[0])
        _check_subsets(each, loaded)
    if not experiment.is_here:
        experiment.is_unplanned()  # a server that cannot be reached says so now
    places.check(experiment.files, experiment.directory, experiment.mark)
    if experiment.checkpoints:
        _bucket(experiment.checkpoints, experiment.name).check(experiment.mark)
    return loaded


def _bucket(url: str, name: str) -> Bucket:
    """The checkpoints at a URL that a file or a database names, which may be any."""
    return Bucket(check_url(url), name)


def _planned(experiment: Experiment, command: Sequence[str]) -> "Study":
    """The study with every cell in it; `experiment.yaml` remembers the command."""
    begun = experiment.begun
    if not begun:  # first of all, so that whatever happens next, `bpf resume` can go on
        experiment.save(command)
    with naming_versions(experiment.directory):
        study, _ = experiment.plan()
    if begun:  # last, so that a grid that cannot be extended is not recorded
        experiment.save(command)
    return study


def join(
    storage: "Database",
    name: str | None,
    data_dir: Path | None,
    checkpoints: Path | str | None,
    observe: "Callable[[Outset], AbstractContextManager[Observe]]",
    effort: Effort,
    files: Path | None = None,
) -> str:
    """Work on an experiment that is planned in a database, in this process, until nothing is left to claim.

    Returns the experiment's name. Its checkpoints lie in `checkpoints`, or where the experiment keeps them (`files`, or
    as its database says) if that folder is here as well, or in a folder of this machine's own. Raises Interrupted after
    a request to stop.
    """
    from bpf.study.study import Study
    from bpf.workers.job import Job, Terms
    from bpf.workers.stopping import Stop
    from bpf.workers.worker import Worker

    effort.check_one_device()
    with closing(Study.open(storage, name)) as study:
        spec = stored_grid(study.spec)
        files = files.resolve() if files else Path(study.settings.get("files", ""))
        if isinstance(checkpoints, Path):
            files = checkpoints.resolve() / study.experiment
        elif not files.is_absolute() or not files.is_dir():
            files = Path("bpf-checkpoints").resolve() / study.experiment
        mark: places.Mark = {"experiment": study.experiment, "created": study.settings.get("created")}
        places.take(files, None, mark)
        outset = Outset.of(study, spec.objective, spec.executions_per_trial)
        terms = Terms(effort.device or "auto", 1, effort.checkpoint_seconds)
        url = checkpoints if isinstance(checkpoints, str) else study.settings.get("checkpoints")
        where = (Database.at(storage), study.experiment, data_dir or Path("data"), files)
        if url:
            _bucket(url, study.experiment).take(mark)
        job = Job(*where, terms, check_url(url) if url else None)
        stop = Stop(effort.max_hours)
        with observe(outset) as observer, stop.on_signals():
            Worker.of(job, study, partial(observer, 1), stop).run()
        return study.experiment


def clean(experiment: Experiment, kept_checkpoints: bool = False, dry_run: bool = False) -> dict[str, Any]:
    """Remove what is not needed any more; returns the `files` and how many `bytes` they have."""
    from bpf.experiment.upkeep import superfluous, superfluous_stored

    found, stored = superfluous(experiment, kept_checkpoints), {}
    files, size = [str(path) for path in found], sum(path.stat().st_size for path in found)
    if experiment.checkpoints:
        bucket = _bucket(experiment.checkpoints, experiment.name)
        stored = superfluous_stored(experiment, bucket)
        files, size = files + [bucket.at(name) for name in sorted(stored)], size + sum(stored.values())
    if not dry_run:
        for path in found:
            path.unlink(missing_ok=True)
        for name in stored:
            bucket.remove(name)
    return {"files": files, "bytes": size}


def newest(root: Path, place: Place = NOWHERE_ELSE) -> Experiment:
    """The experiment below `root` that was touched last."""
    found = places.find(root)
    if not found:
        raise UsageError(f"There is no experiment in {root}. Start one with `bpf tune`, or name its directory.")
    return open_experiment(found[0], place)


def newest_unfinished(root: Path, place: Place = NOWHERE_ELSE) -> Experiment:
    """The experiment below `root` that was touched last and has something left to do."""
    newest(root, place)
    for directory in places.find(root):
        experiment = open_experiment(directory, place)
        if experiment.database.missing() or summary.counts_open(summary.status(experiment)["cells"]):
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
