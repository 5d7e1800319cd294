"""The command line. The only place that turns errors into text and exit codes."""

import json
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bpf import __version__
from bpf.errors import BpfError, RunError, UsageError, did_you_mean
from bpf.fields import build, json_schema
from bpf.options import is_value, merge, with_spec_options
from bpf.registry import ALGORITHMS, TRACKERS, Registry
from bpf.spec import GridSpec, RunSpec, digest

if TYPE_CHECKING:
    from bpf.api import Effort, Outset
    from bpf.console import LiveProgress
    from bpf.experiment import Experiment, Place

app = typer.Typer(
    help="Train fully connected networks without backpropagation, and compare learning rules by grid search.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    rich_markup_mode="rich",
)
RUNS = Path("runs")
MAX_WORKERS = 1024
SPEC_SUFFIXES = (".yaml", ".yml", ".toml", ".json")

Directory = Annotated[Path | None, typer.Argument(help="The experiment's directory.", show_default=False)]
SpecFile = Annotated[
    Path | None,
    typer.Option(
        "--spec",
        help="Read the settings from a YAML, TOML or JSON file; options win over it.",
        metavar="FILE",
    ),
]
DataDir = Annotated[
    Path,
    typer.Option(envvar="BPF_DATA_DIR", help="Where data sets live, in torchvision's own layout.", metavar="DIR"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts instead of text.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]
CheckpointEvery = Annotated[
    float,
    typer.Option("--checkpoint-every", min=0.0, help="Least seconds between two checkpoints.", metavar="SECONDS"),
]
MaxHours = Annotated[
    float | None,
    typer.Option(
        "--max-hours", min=0.0, help="Stop by itself after this time, as with Ctrl-C.", metavar="H", show_default=False
    ),
]
Workers = Annotated[
    str,
    typer.Option(
        "--workers",
        help="Processes that train; auto is one per GPU, or one per processor core.",
        metavar="auto|N",
    ),
]
Storage = Annotated[
    str | None,
    typer.Option(
        "--storage",
        envvar="BPF_STORAGE",
        show_envvar=True,
        help="Where the study is kept, if not in the experiment's directory: postgresql://USER@HOST/DATABASE "
        "or sqlite:///PATH. A password is better kept in PGPASSWORD or ~/.pgpass.",
        metavar="URL",
        show_default=False,
    ),
]
ExperimentName = Annotated[
    str | None,
    typer.Option(
        "--experiment",
        help="The experiment's name in the storage; by default that of its directory.",
        metavar="NAME",
        show_default=False,
    ),
]
Checkpoints = Annotated[
    Path | None,
    typer.Option(
        "--checkpoints",
        help="A folder, shared with other machines, for the checkpoints and models of experiments.",
        metavar="DIR",
        show_default=False,
    ),
]
KeepCheckpoints = Annotated[
    bool,
    typer.Option(
        "--keep-checkpoints", help="Keep those of finished cells, so that the same runs can go on for more epochs."
    ),
]


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
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Run a grid search; the same command again goes on where it stopped.

    What you fix is not tuned. A list is given as `--lr 1e-3,1e-2` or by repeating the option.
    """
    effort = _effort(workers, None, checkpoint_every, max_hours)
    from bpf import api, console

    grid = build(GridSpec, merge(_read_spec(spec), given), "field" if spec else "option")
    directory = directory or RUNS / f"{_slug(grid.dataset)}-{'+'.join(grid.algorithm)}-{grid.objective}"
    place = _place(storage, experiment_name, checkpoints, keep_checkpoints)
    experiment = api.open_tune(_new(directory), grid, data_dir, place)
    planned = api.plan(experiment)
    if as_json and dry_run:
        _print_json(planned.as_json())
    elif not as_json and (dry_run or not quiet):
        console.show_plan(planned.grid, grid.executions_per_trial, planned.cohorts, directory)
    if plan_only and not dry_run:
        api.store_plan(experiment, _command())
    elif not dry_run:
        _run(experiment, effort, quiet or as_json)
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
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train one network; the same command again goes on where it stopped."""
    from bpf import api

    effort = _effort("1", None, checkpoint_every, max_hours)

    run = build(RunSpec, merge(_read_spec(spec), given), "field" if spec else "option")
    name = f"train-{_slug(run.dataset)}-{run.algorithm}-{digest(run.model_dump(mode='json', exclude={'device'}))[:8]}"
    place = _place(None, None, None, keep_checkpoints)
    experiment = api.open_train(_new(directory or RUNS / name), run, data_dir, place)
    _run(experiment, effort, quiet or as_json)
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
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Go on with an experiment where it stopped (by default the newest unfinished one in runs/)."""
    from bpf import api

    effort = _effort(workers, device, checkpoint_every, max_hours)
    experiment = _open(directory, storage) if directory else api.newest_unfinished(RUNS)
    if data_dir is not None:
        experiment = replace(experiment, data_dir=data_dir.resolve())
    if not (quiet or as_json):
        typer.echo(f"Going on with {experiment.directory}", err=True)
    _run(experiment, effort, quiet or as_json, retry_failed)
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
) -> None:
    """Help with an experiment from another terminal or machine, until nothing is left to claim.

    Give the experiment's directory where it can be seen, or the `--storage` that its `bpf tune` was given. On another
    machine without a shared `--checkpoints` folder, a cohort that was begun elsewhere begins anew here.
    """
    from bpf import api
    from bpf.database import Database

    effort, files = _effort("1", device, checkpoint_every, max_hours), None
    if directory is not None:
        experiment = _open(directory, storage)
        files = experiment.files  # which its database does not know if the directory has been moved
        data_dir = data_dir or experiment.data_dir
        where, experiment_name = experiment.database, experiment.name
    elif storage is not None:
        where = Database.at(storage)
    else:
        raise UsageError("Name the experiment's directory, or the --storage that its study is kept in.")
    with _interruptible("The cells go on with `bpf resume`, or another `bpf worker`."):
        joined = api.join(where, experiment_name, data_dir, checkpoints, _observer(quiet), effort, files)
    if not quiet:
        typer.echo(f"Nothing is left to claim in {joined}.", err=True)


@app.command()
def status(
    directory: Directory = None,
    failed: Annotated[bool, typer.Option("--failed", help="Show why cells have failed.")] = False,
    storage: Storage = None,
    as_json: AsJson = False,
) -> None:
    """How far an experiment is (by default the newest in runs/)."""
    from bpf import api, console

    experiment = _open(directory, storage)
    if failed:
        rows = [row for row in api.rows(experiment) if row.state == "failed"]
        if as_json:
            _print_json(
                [
                    {
                        "cell": row.name,
                        "algorithm": row.rule,
                        "params": row.params,
                        "cause": row.cause,
                        "error": row.error,
                    }
                    for row in rows
                ]
            )
        else:
            console.show_failures(rows)
    elif as_json:
        _print_json(api.status(experiment))
    else:
        console.show_status(api.status(experiment))


@app.command()
def best(
    directory: Directory = None,
    top: Annotated[int, typer.Option(min=1, help="How many cells.", metavar="N")] = 10,
    storage: Storage = None,
    as_json: AsJson = False,
) -> None:
    """The best cells of an experiment (by default the newest in runs/), ranked by its objective."""
    from bpf import api, console

    experiment = _open(directory, storage)
    if as_json:
        _print_json([entry.as_json(experiment.grid.objective) for entry in api.best(experiment, top)])
    else:
        console.show_results(api.rows(experiment), experiment.grid.objective, top)


@app.command()
def show(directory: Directory = None, as_json: AsJson = False) -> None:
    """Where an experiment's numbers come from: its spec, and for each start the command, versions, git and hardware."""
    from bpf import api, console

    provenance = api.provenance(_open(directory, None))
    _print_json(provenance) if as_json else console.show_provenance(provenance)


@app.command()
def clean(
    directory: Directory = None,
    storage: Storage = None,
    checkpoints: Annotated[
        bool, typer.Option("--checkpoints", help="Also those that were kept of finished cells.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove what an experiment does not need any more: left-over checkpoints, models, temporary and lock files.

    Results, histories, the best model of each rule, and checkpoints of cells that go on are never touched.
    """
    from bpf import api, console

    removed = api.clean(_open(directory, storage), checkpoints, dry_run)
    _print_json(removed) if as_json else console.show_cleaned(removed, dry_run)


@app.command()
def export(
    directory: Directory = None,
    what: Annotated[str, typer.Option(help="results: a row per cell; history: a row per epoch.")] = "results",
    format_: Annotated[str, typer.Option("--format", help="csv or json.")] = "csv",
    storage: Storage = None,
) -> None:
    """Print every cell, or every epoch of every execution, for other programs."""
    from bpf import api

    for name, value, known in (("what", what, ("results", "history")), ("format", format_, ("csv", "json"))):
        if value not in known:
            raise UsageError(f"--{name} {value}: give {' or '.join(known)}.{did_you_mean(value, known)}")
    table = api.table(_open(directory, storage), what)
    if format_ == "json":
        _print_json(list(table))
        return
    import csv

    writer: csv.DictWriter[str] | None = None
    for record in table:
        if writer is None:
            writer = csv.DictWriter(sys.stdout, list(record), restval="", extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
        writer.writerow(record)


@app.command()
def algorithms(
    name: Annotated[
        str | None, typer.Argument(help="A learning rule, for its equation and options.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the learning rules, or describe one."""
    from bpf import listing

    if name is None:
        _list_plugins(ALGORITHMS, as_json)
    else:
        description = listing.describe_algorithm(name)
        _print_json(description) if as_json else typer.echo(listing.algorithm_text(description))


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
    from bpf import listing

    infos = listing.datasets(data_dir) if name is None else [listing.dataset(name, data_dir)]
    if as_json:
        _print_json([listing.dataset_json(info) for info in infos] if name is None else listing.dataset_json(infos[0]))
    else:
        typer.echo(listing.datasets_text(infos) if name is None else listing.dataset_text(infos[0]))


@app.command()
def schema(
    run: Annotated[bool, typer.Option("--run", help="The schema of a single run instead of a grid's.")] = False,
) -> None:
    """Print the JSON schema of spec files."""
    _print_json(json_schema(RunSpec if run else GridSpec))


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 a mistake in the request, 130 interrupted."""
    try:
        app(args=arguments, prog_name="bpf")
    except BpfError as error:
        _fail(f"{'' if error.exit_code == 130 else 'Error: '}{error}", error.exit_code)
    except KeyboardInterrupt:
        _fail("Interrupted. Nothing finished is lost; go on with `bpf resume`.", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except PermissionError as error:
        _fail(f"Error: {error.filename} cannot be used: {error.strerror}. Choose another place.", 2)
    except Exception as error:  # ours, not the user's: say so, and how to see more
        _fail(
            f"bpf failed: {type(error).__name__}: {error}\nThis is a bug in bpf or a plugin; BPF_DEBUG=1 shows where.",
            1,
        )


def _fail(message: str, exit_code: int) -> None:
    if os.environ.get("BPF_DEBUG"):
        traceback.print_exc()
    typer.echo(message, err=True)
    sys.exit(exit_code)


def _run(experiment: "Experiment", effort: "Effort", quiet: bool, retry_failed: bool = False) -> None:
    from bpf import api

    directory = shlex.quote(str(experiment.directory))
    with _interruptible(f"Go on with: bpf resume {directory}", lambda: experiment.begun):
        api.run(experiment, _observer(quiet), _command(), effort, retry_failed)


def _command() -> list[str]:
    return ["bpf", *sys.argv[1:]]


def _observer(quiet: bool) -> Callable[["Outset"], "LiveProgress"]:
    from bpf import console

    return lambda outset: console.LiveProgress(outset, quiet)


@contextmanager
def _interruptible(go_on: str, begun: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Say how to go on after the work was stopped."""
    from bpf.stopping import Interrupted

    try:
        yield
    except Interrupted as stopped:
        raise Interrupted(f"{stopped}, and everything is stored. {go_on}") from None
    except KeyboardInterrupt:
        last = f"Nothing finished is lost. {go_on}" if begun() else "Nothing was begun."
        raise Interrupted(f"Interrupted at once. {last}") from None


def _effort(workers: str, device: str | None, checkpoint_every: float, max_hours: float | None) -> "Effort":
    from bpf.api import Effort

    if workers != "auto" and not (workers.isdecimal() and 1 <= int(workers) <= MAX_WORKERS):
        raise UsageError(f"--workers {workers}: give auto, or a number from 1 to {MAX_WORKERS}.")
    return Effort(None if workers == "auto" else int(workers), device, checkpoint_every, max_hours)


def _place(storage: str | None, name: str | None, checkpoints: Path | None, keep: bool) -> "Place":
    from bpf.database import Database
    from bpf.experiment import Place

    return Place(Database.at(storage) if storage else None, name, checkpoints, keep)


def _show_ranking(experiment: "Experiment", as_json: bool) -> None:
    from bpf import api, console

    rows = api.rows(experiment)
    if as_json:
        _print_json([entry.as_json(experiment.grid.objective) for entry in api.best(experiment)])
    else:
        console.show_results(rows, experiment.grid.objective)
    failed = sum(row.state == "failed" for row in rows)
    if failed:
        raise RunError(
            f"{failed} cell{'s' if failed > 1 else ''} failed: see `bpf status {experiment.directory} --failed`; "
            f"`bpf resume {experiment.directory} --retry-failed` tries again."
        )


def _show_run(experiment: "Experiment", as_json: bool) -> None:
    from bpf import api, console

    report = api.train_report(experiment)
    _print_json(report) if as_json else console.show_run(report)


def _open(directory: Path | None, storage: str | None) -> "Experiment":
    from bpf import api
    from bpf.experiment import open_experiment

    return open_experiment(directory, _place(storage, None, None, False)) if directory else api.newest(RUNS)


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
    from bpf import listing

    plugins = Registry(group).plugins()
    _print_json(listing.plugins_json(plugins)) if as_json else typer.echo(listing.plugins_text(plugins))


def _read_spec(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    from bpf.specfile import read_spec

    return read_spec(path)


def _slug(dataset: str) -> str:
    kind, _, source = dataset.partition(":")
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", f"{kind}-{Path(source).stem}" if source else kind)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))
