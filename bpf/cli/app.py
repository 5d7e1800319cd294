"""The command line. The only place that turns errors into text and exit codes."""

import os
import re
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bpf import __version__
from bpf.cli import viewing
from bpf.cli.arguments import (
    RUNS,
    TOP,
    AsJson,
    CheckpointEvery,
    Checkpoints,
    DataDir,
    Directory,
    ExperimentName,
    KeepCheckpoints,
    MaxHours,
    Notify,
    Quiet,
    SpecFile,
    Storage,
    Verbose,
    Workers,
    opened,
    place_of,
    print_json,
)
from bpf.cli.options import is_value, merge, with_spec_options
from bpf.errors import BpfError, RunError, UsageError
from bpf.registry import ALGORITHMS, TRACKERS, Registry
from bpf.spec.fields import build, json_schema
from bpf.spec.run import GridSpec, RunSpec, digest
from bpf.words import counted

if TYPE_CHECKING:
    from bpf.api import Effort
    from bpf.console.progress import LiveProgress
    from bpf.experiment.directory import Experiment
    from bpf.results.summary import Outset

    Observer = Callable[[Outset], LiveProgress]

app = typer.Typer(
    help="Train fully connected networks without backpropagation, and compare learning rules by grid search.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    rich_markup_mode="rich",
)
MAX_WORKERS = 1024
SPEC_SUFFIXES = (".yaml", ".yml", ".toml", ".json")


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"bpf {__version__}")
        raise typer.Exit


@app.callback()
def _bpf(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error (also BPF_DEBUG=1).")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    if debug:
        os.environ["BPF_DEBUG"] = "1"


@app.command()
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
    if not (dry_run or plan_only):
        _warm_up()
    from bpf import api
    from bpf.console import tables
    from bpf.experiment import handover

    effort = _effort(workers, None, checkpoint_every, max_hours)
    _check_targets(notify)
    directory = directory or RUNS / f"{_slug(grid.dataset)}-{'+'.join(grid.algorithm)}-{grid.objective}"
    place = place_of(storage, experiment_name, checkpoints, keep_checkpoints)
    directory, grid, taken = handover.begin(_new(directory), grid, lr_from, place)
    if taken is not None and not (quiet or as_json):
        tables.show_taken(taken)
    experiment = api.open_tune(directory, grid, data_dir, place)
    planned = api.plan(experiment)
    if as_json and dry_run:
        print_json(planned.as_json() | {"handed_over": taken.as_json() if taken else None})
    elif not as_json and (dry_run or not quiet):
        tables.show_plan(planned.grid, grid.executions_per_trial, planned.cohorts, directory)
    if plan_only and not dry_run:
        api.store_plan(experiment, _command())
    elif not dry_run:
        _run(experiment, effort, _observer(quiet or as_json, verbose), notify=notify)
        _show_ranking(experiment, as_json)


@app.command()
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
    from bpf import api

    effort = _effort("1", None, checkpoint_every, max_hours)
    _check_targets(notify)

    run = build(RunSpec, merge(_read_spec(spec), given), "field" if spec else "option")
    name = f"train-{_slug(run.dataset)}-{run.algorithm}-{digest(run.model_dump(mode='json', exclude={'device'}))[:8]}"
    place = place_of(None, None, None, keep_checkpoints)
    experiment = api.open_train(_new(directory or RUNS / name), run, data_dir, place)
    _run(experiment, effort, _observer(quiet or as_json, verbose), notify=notify)
    _show_run(experiment, as_json)


@app.command()
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
    max_hours: MaxHours = None,
    storage: Storage = None,
    checkpoint_every: CheckpointEvery = 30.0,
    notify: Notify = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: AsJson = False,
) -> None:
    """Go on with an experiment where it stopped (by default the newest unfinished one in runs/)."""
    from bpf import api

    effort = _effort(workers, device, checkpoint_every, max_hours)
    _check_targets(notify)
    place = place_of(storage, None, None, False)
    experiment = opened(directory, storage) if directory else api.newest_unfinished(RUNS, place)
    if experiment.kind == "tune":
        _warm_up()
    if data_dir is not None:
        experiment = replace(experiment, data_dir=data_dir.resolve())
    if not (quiet or as_json):
        typer.echo(f"Going on with {experiment.directory}", err=True)
    _run(experiment, effort, _observer(quiet or as_json, verbose), retry_failed, notify)
    (_show_run if experiment.kind == "train" else _show_ranking)(experiment, as_json)


@app.command()
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
    from bpf import api
    from bpf.study.database import Database

    effort, files = _effort("1", device, checkpoint_every, max_hours), None
    if directory is not None:
        experiment = opened(directory, storage)
        files = experiment.files  # which its database does not know if the directory has been moved
        data_dir = data_dir or experiment.data_dir
        where, experiment_name = experiment.database, experiment.name
    elif storage is not None:
        where = Database.at(storage)
    else:
        raise UsageError("Name the experiment's directory, or the --storage that its study is kept in.")
    with _interruptible("The cells go on with `bpf resume`, or another `bpf worker`."):
        joined = api.join(where, experiment_name, data_dir, checkpoints, _observer(quiet, verbose), effort, files)
    if not quiet:
        typer.echo(f"Nothing is left to claim in {joined}.", err=True)


for command in viewing.COMMANDS:
    app.command()(command)


@app.command()
def algorithms(
    name: Annotated[
        str | None, typer.Argument(help="A learning rule, for its equation and options.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the learning rules, or describe one."""
    from bpf.cli import listing

    if name is None:
        _list_plugins(ALGORITHMS, as_json)
    else:
        description = listing.describe_algorithm(name)
        print_json(description) if as_json else typer.echo(listing.algorithm_text(description))


@app.command()
def trackers(as_json: AsJson = False) -> None:
    """List the trackers: what can be measured during training."""
    _list_plugins(TRACKERS, as_json)


@app.command()
def datasets(
    name: Annotated[str | None, typer.Argument(help="A data set, for what to put where.", show_default=False)] = None,
    data_dir: DataDir = Path("data"),
    as_json: AsJson = False,
) -> None:
    """List the data sets and whether they are on disk, or describe one."""
    from bpf.cli import listing

    infos = listing.datasets(data_dir) if name is None else [listing.dataset(name, data_dir)]
    if as_json:
        print_json([listing.dataset_json(info) for info in infos] if name is None else listing.dataset_json(infos[0]))
    else:
        typer.echo(listing.datasets_text(infos) if name is None else listing.dataset_text(infos[0]))


@app.command()
def schema(
    run: Annotated[bool, typer.Option("--run", help="The schema of a single run instead of a grid's.")] = False,
) -> None:
    """Print the JSON schema of spec files."""
    print_json(json_schema(RunSpec if run else GridSpec))


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 a mistake in the request, 130 interrupted, 141 unread."""
    try:
        app(args=arguments, prog_name="bpf")
    except BpfError as error:
        _fail(f"{'' if error.exit_code == 130 else 'Error: '}{error}", error.exit_code)
    except KeyboardInterrupt:
        _fail("Interrupted. Nothing finished is lost; go on with `bpf resume`.", 130)
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # which typer and rich end with 1 for
            _unread()
        raise
    except BrokenPipeError:
        _unread()
    except PermissionError as error:
        _fail(f"Error: {error.filename} cannot be used: {error.strerror}. Choose another place.", 2)
    except Exception as error:  # ours, not the user's: say so, and how to see more
        _fail(
            f"bpf failed: {type(error).__name__}: {error}\nThis is a bug in bpf or a plugin; BPF_DEBUG=1 shows where.",
            1,
        )


def _unread() -> None:
    """End as a program does that SIGPIPE kills: whoever read the output, such as `head`, has gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(141)


def _fail(message: str, exit_code: int) -> None:
    if os.environ.get("BPF_DEBUG"):
        traceback.print_exc()
    typer.echo(message, err=True)
    sys.exit(exit_code)


def _warm_up() -> None:
    """Let workers' imports begin, as soon as it is known that there will be workers: this process has its own to do."""
    from bpf.workers import processes

    processes.warm_up()


def _run(
    experiment: "Experiment",
    effort: "Effort",
    observe: "Observer",
    retry_failed: bool = False,
    notify: list[str] | None = None,
) -> None:
    from bpf import api
    from bpf.workers.supervisor import Crashed

    directory = shlex.quote(str(experiment.directory))
    with (
        _notifying(experiment, notify or []),
        _interruptible(f"Go on with: bpf resume {directory}", lambda: experiment.begun),
    ):
        try:
            api.run(experiment, observe, _command(), effort, retry_failed)
        except Crashed as error:
            raise Crashed(f"{error} See `bpf status {directory}`; go on with: bpf resume {directory}") from error


def _check_targets(notify: list[str] | None) -> None:
    from bpf.results.notifying import check

    check(notify or [])


@contextmanager
def _notifying(experiment: "Experiment", targets: list[str]) -> Iterator[None]:
    """Tell the targets how the work ended."""
    from bpf.results.notifying import Notifier, summarize
    from bpf.workers.stopping import Interrupted

    began, event, message = time.monotonic(), "finished", ""
    try:
        yield
    except Interrupted as stopped:
        event, message = "stopped", str(stopped)
        raise
    except BpfError as error:
        event, message = "failed", str(error)
        raise
    finally:
        if targets and experiment.begun:
            for warning in Notifier(targets).send(
                event, summarize(experiment, event, time.monotonic() - began, message)
            ):
                typer.echo(warning, err=True)


def _command() -> list[str]:
    """As an experiment remembers it; where notifications go is a secret."""
    from bpf.results.notifying import hidden

    return hidden(["bpf", *sys.argv[1:]])


def _observer(quiet: bool, verbose: bool) -> "Observer":
    from bpf.console.progress import LiveProgress

    return lambda outset: LiveProgress(outset, quiet, verbose)


@contextmanager
def _interruptible(go_on: str, begun: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Say how to go on after the work was stopped."""
    from bpf.workers.stopping import Interrupted

    try:
        yield
    except Interrupted as stopped:
        raise Interrupted(f"{stopped} {go_on}") from None
    except KeyboardInterrupt:
        last = f"Nothing finished is lost. {go_on}" if begun() else "Nothing was begun."
        raise Interrupted(f"Interrupted at once. {last}") from None


def _effort(workers: str, device: str | None, checkpoint_every: float, max_hours: float | None) -> "Effort":
    from bpf.api import Effort

    if workers != "auto" and not (workers.isdecimal() and 1 <= int(workers) <= MAX_WORKERS):
        raise UsageError(f"--workers {workers}: give auto, or a number from 1 to {MAX_WORKERS}.")
    return Effort(None if workers == "auto" else int(workers), device, checkpoint_every, max_hours)


def _show_ranking(experiment: "Experiment", as_json: bool) -> None:
    from bpf.console import tables
    from bpf.experiment.grid import MAX_CELLS
    from bpf.results import summary

    ranking = summary.ranking(experiment, MAX_CELLS if as_json else TOP)
    if as_json:
        print_json([entry.as_json(experiment.grid.objective) for entry in ranking.top])
    else:
        tables.show_results(ranking, experiment.grid.objective, experiment.directory)
    failed = ranking.counts["failed"]
    if failed:
        raise RunError(
            f"{counted(failed, 'cell')} failed: see `bpf status {experiment.directory} --failed`; "
            f"`bpf resume {experiment.directory} --retry-failed` tries again."
        )


def _show_run(experiment: "Experiment", as_json: bool) -> None:
    from bpf.console import tables
    from bpf.results import summary

    report = summary.train_report(experiment)
    print_json(report) if as_json else tables.show_run(report)


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


def _list_plugins(group: str, as_json: bool) -> None:
    from bpf.cli import listing

    plugins = Registry(group).plugins()
    print_json(listing.plugins_json(plugins)) if as_json else typer.echo(listing.plugins_text(plugins))


def _read_spec(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    from bpf.spec.file import read_spec

    return read_spec(path)


def _slug(dataset: str) -> str:
    kind, _, source = dataset.partition(":")
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", f"{kind}-{Path(source).stem}" if source else kind)
