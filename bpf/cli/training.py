"""Commands that train: `tune`, `train`, `resume`, `worker`."""

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bpf.cli.arguments import (
    RUNS,
    AsJson,
    CheckpointEvery,
    Checkpoints,
    DataDir,
    Directory,
    ExperimentName,
    KeepCheckpoints,
    MaxHours,
    Notify,
    On,
    Quiet,
    SpecFile,
    Storage,
    Verbose,
    Workers,
    WorkersPerGpu,
    opened,
    place_of,
    print_json,
)
from bpf.cli.options import is_value, merge, with_spec_options
from bpf.cli.session import check_targets, command_line, interruptible, observer, show_ranking, show_run, train_all
from bpf.console.screen import tell
from bpf.errors import UsageError
from bpf.extras import importing
from bpf.spec.fields import build
from bpf.spec.grid import GridSpec
from bpf.spec.run import RunSpec, digest

if TYPE_CHECKING:
    from bpf.workers.effort import Effort

MAX_WORKERS = 1024
DRY_RUN_SECONDS, PLAN_SECONDS = 2.5, 1.0
"""How long a plan may measure; before it is carried out, only where that takes more than `SHORT_SECONDS`."""
SHORT_SECONDS = 60.0
SPEC_SUFFIXES = (".yaml", ".yml", ".toml", ".json")


@with_spec_options(GridSpec)
def tune(
    given: dict[str, Any],
    directory: Directory = None,
    spec: SpecFile = None,
    data_dir: DataDir = Path("data"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    plan_only: Annotated[
        bool, typer.Option("--plan-only", help="Store the plan and stop; `bpf worker` trains it.")
    ] = False,
    workers: Workers = "auto",
    on: On = None,
    workers_per_gpu: WorkersPerGpu = 1,
    max_hours: MaxHours = None,
    storage: Storage = None,
    experiment_name: ExperimentName = None,
    checkpoints: Checkpoints = None,
    keep_checkpoints: KeepCheckpoints = False,
    checkpoint_every: CheckpointEvery = 30.0,
    lr_from: Annotated[
        Path | None,
        typer.Option(
            "--lr-from",
            help="For val_* objectives: take the learning rate of each setup from this experiment with objective loss "
            "or error; by default from the one beside it, or from DIRECTORY itself.",
            metavar="DIR",
            show_default=False,
        ),
    ] = None,
    notify: Notify = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: AsJson = False,
) -> None:
    """Run a grid search; the same command again goes on where it stopped.

    What you fix is not tuned. A list is given as `--lr 1e-3,1e-2` or by repeating the option.
    """
    grid = build(GridSpec, merge(_read_spec(spec), given), "field" if spec else "option")
    effort = effort_of(workers, None, checkpoint_every, max_hours, on, workers_per_gpu)
    if not (dry_run or plan_only):
        warm_up(effort, grid.device)
    place = place_of(storage, experiment_name, checkpoints, keep_checkpoints)
    effort.check_storage(place.storage)
    with importing():
        from bpf import api
        from bpf.console import tables
        from bpf.experiment import handover

    check_targets(notify)
    directory = directory or RUNS / f"{_slug(grid.dataset)}-{'+'.join(grid.algorithm)}-{grid.objective}"
    directory, grid, taken = handover.begin(_new(directory), grid, lr_from, place, data_dir)
    if taken is not None and not (quiet or as_json):
        tables.show_taken(taken)
    experiment = api.open_tune(directory, grid, data_dir, place)
    shown = dry_run or not (quiet or as_json)
    budget = DRY_RUN_SECONDS if dry_run else PLAN_SECONDS if shown and not (plan_only or effort.elsewhere) else 0.0
    planned = api.plan(experiment, effort, budget, 0.0 if dry_run else SHORT_SECONDS)
    if as_json and dry_run:
        print_json(planned.as_json() | {"handed_over": taken.as_json() if taken else None})
    elif shown:
        tables.show_plan(planned, grid, directory, dry_run)
    if plan_only and not dry_run:
        api.store_plan(experiment, command_line())
    elif not dry_run:
        train_all(experiment, effort, observer(quiet or as_json, verbose), notify=notify)
        show_ranking(experiment, as_json)


@with_spec_options(RunSpec)
def train(
    given: dict[str, Any],
    directory: Directory = None,
    spec: SpecFile = None,
    data_dir: DataDir = Path("data"),
    max_hours: MaxHours = None,
    keep_checkpoints: KeepCheckpoints = False,
    checkpoint_every: CheckpointEvery = 30.0,
    notify: Notify = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: AsJson = False,
) -> None:
    """Train one network; the same command again goes on where it stopped."""
    with importing():
        from bpf import api

    effort = effort_of("1", None, checkpoint_every, max_hours)
    check_targets(notify)

    run = build(RunSpec, merge(_read_spec(spec), given), "field" if spec else "option")
    settings = run.model_dump(mode="json", exclude={"device", *run.unchanged})
    name = f"train-{_slug(run.dataset)}-{run.algorithm}-{digest(settings)[:8]}"
    place = place_of(None, None, None, keep_checkpoints)
    experiment = api.open_train(_new(directory or RUNS / name), run, data_dir, place)
    train_all(experiment, effort, observer(quiet or as_json, verbose), notify=notify)
    show_run(experiment, as_json)


def resume(
    directory: Directory = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(envvar="BPF_DATA_DIR", help="Where data sets live, if they have moved.", metavar="DIR"),
    ] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try failed cells again.")] = False,
    workers: Workers = "auto",
    device: Annotated[
        str | None,
        typer.Option(help="Where to train now, as in `bpf tune`.", metavar="DEVICE", show_default=False),
    ] = None,
    on: On = None,
    workers_per_gpu: WorkersPerGpu = 1,
    max_hours: MaxHours = None,
    storage: Storage = None,
    checkpoint_every: CheckpointEvery = 30.0,
    notify: Notify = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: AsJson = False,
) -> None:
    """Go on with an experiment where it stopped (by default the newest unfinished one in runs/)."""
    with importing():
        from bpf import api

    effort = effort_of(workers, device, checkpoint_every, max_hours, on, workers_per_gpu)
    check_targets(notify)
    place = place_of(storage, None, None, False)
    effort.check_storage(place.storage)
    experiment = opened(directory, storage) if directory else api.newest_unfinished(RUNS, place)
    if experiment.kind == "tune":
        warm_up(effort, experiment.grid.device)
    if data_dir is not None:
        experiment = replace(experiment, data_dir=data_dir.resolve())
    if not (quiet or as_json):
        tell(f"Going on with {experiment.directory}")
    train_all(experiment, effort, observer(quiet or as_json, verbose), retry_failed, notify)
    (show_run if experiment.kind == "train" else show_ranking)(experiment, as_json)


def worker(
    directory: Directory = None,
    storage: Storage = None,
    experiment_name: ExperimentName = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            envvar="BPF_DATA_DIR", help="Where data sets live on this machine.", metavar="DIR", show_default="data"
        ),
    ] = None,
    checkpoints: Checkpoints = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.", metavar="DEVICE")] = "auto",
    max_hours: MaxHours = None,
    checkpoint_every: CheckpointEvery = 30.0,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Help with an experiment from another terminal or machine, until nothing is left to claim.

    Give the experiment's directory where it can be seen, or the `--storage` that its `bpf tune` was given. On another
    machine without a shared `--checkpoints` folder, a cohort that was begun elsewhere begins anew here.
    """
    with importing():
        from bpf import api
    from bpf.experiment.bucket import place_at
    from bpf.study.database import Database

    effort, files = effort_of("1", device, checkpoint_every, max_hours), None
    kept = place_at(checkpoints) if checkpoints else None
    if directory is not None:
        experiment = opened(directory, storage)
        files = experiment.files  # which its database does not know if the directory has been moved
        data_dir = data_dir or experiment.data_dir
        where, experiment_name = experiment.database, experiment.name
    elif storage is not None:
        where = Database.at(storage)
    else:
        raise UsageError("Name the experiment's directory, or the --storage that its study is kept in.")
    with interruptible("The cells go on with `bpf resume`, or another `bpf worker`."):
        joined = api.join(where, experiment_name, data_dir, kept, observer(quiet, verbose), effort, files)
    if not quiet:
        tell(f"Nothing is left to claim in {joined}.")


def warm_up(effort: "Effort", device: str) -> None:
    """Let workers' imports begin, as soon as it is known that there will be workers: this process has its own to do.

    Or let Ray begin, whose nodes have workers.
    """
    if effort.on:
        from bpf.cluster import engine

        engine.begin(effort.on, effort.workers, effort.device or device, effort.workers_per_gpu)
        return
    from bpf.workers import processes

    processes.warm_up()


def effort_of(
    workers: str,
    device: str | None,
    checkpoint_every: float,
    max_hours: float | None,
    on: str | None = None,
    workers_per_gpu: int = 1,
) -> "Effort":
    from bpf.workers.effort import Effort

    if workers != "auto" and not (re.fullmatch("[0-9]+", workers) and 1 <= int(workers) <= MAX_WORKERS):
        raise UsageError(f"--workers {workers}: give auto, or a number from 1 to {MAX_WORKERS}.")
    count = None if workers == "auto" else int(workers)
    return Effort(count, device, checkpoint_every, max_hours, on, workers_per_gpu)


def _new(directory: Path) -> Path:
    """Refuse what is more likely a stray value, such as the second of `--lr 0.1 0.01`, than a directory."""
    word = str(directory)
    if directory.is_file() and directory.suffix in SPEC_SUFFIXES:
        raise UsageError(f"{word} is a file, not an experiment's directory. A spec file is given with --spec {word}.")
    if not directory.exists() and is_value(word):
        raise UsageError(
            f"{word!r} would be the experiment's directory. Give lists with commas, such as --lr 0.1,0.01; "
            f"if a directory is meant, write {RUNS / word}."
        )
    return directory


def _read_spec(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    from bpf.spec.file import read_spec

    return read_spec(path)


def _slug(dataset: str) -> str:
    kind, _, source = dataset.partition(":")
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", f"{kind}-{Path(source).stem}" if source else kind)


COMMANDS = (tune, train, resume, worker)
