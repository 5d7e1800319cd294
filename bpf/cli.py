"""The command line. The only place that turns errors into text and exit codes."""

import json
import os
import re
import shlex
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bpf import __version__
from bpf.errors import BpfError, RunError, UsageError
from bpf.fields import build, json_schema
from bpf.options import is_value, merge, with_spec_options
from bpf.registry import ALGORITHMS, TRACKERS, Registry
from bpf.spec import GridSpec, RunSpec, digest

if TYPE_CHECKING:
    from bpf.experiment import Experiment

app = typer.Typer(
    help="Train fully connected networks without backpropagation, and compare learning rules by grid search.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    rich_markup_mode="rich",
)
RUNS = Path("runs")
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
    checkpoint_every: CheckpointEvery = 30.0,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Run a grid search; the same command again goes on where it stopped.

    What you fix is not tuned. A list is given as `--lr 1e-3,1e-2` or by repeating the option.
    """
    from bpf import api, console

    grid = build(GridSpec, merge(_read_spec(spec), given), "field" if spec else "option")
    directory = directory or RUNS / f"{_slug(grid.dataset)}-{'+'.join(grid.algorithm)}-{grid.objective}"
    experiment = api.open_tune(_new(directory), grid, data_dir)
    planned = api.plan(experiment)
    if as_json and dry_run:
        _print_json(planned.as_json())
    elif not as_json and (dry_run or not quiet):
        console.show_plan(planned.grid, grid.executions_per_trial, planned.cohorts, directory)
    if not dry_run:
        _run(experiment, checkpoint_every, quiet or as_json)
        _show_ranking(experiment, as_json)


@app.command()
@with_spec_options(RunSpec)
def train(
    given: dict[str, Any],
    directory: Directory = None,
    spec: SpecFile = None,
    data_dir: DataDir = Path("data"),
    checkpoint_every: CheckpointEvery = 30.0,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train one network; the same command again goes on where it stopped."""
    from bpf import api

    run = build(RunSpec, merge(_read_spec(spec), given), "field" if spec else "option")
    name = f"train-{_slug(run.dataset)}-{run.algorithm}-{digest(run.model_dump(mode='json', exclude={'device'}))[:8]}"
    experiment = api.open_train(_new(directory or RUNS / name), run, data_dir)
    _run(experiment, checkpoint_every, quiet or as_json)
    _show_run(experiment, as_json)


@app.command()
def resume(
    directory: Directory = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(envvar="BPF_DATA_DIR", help="Where data sets live, if they have moved.", metavar="DIR"),
    ] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try cells again whose rule raised.")] = False,
    checkpoint_every: CheckpointEvery = 30.0,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Go on with an experiment where it stopped (by default the newest unfinished one in runs/)."""
    from bpf import api
    from bpf.experiment import open_experiment

    experiment = open_experiment(directory) if directory else api.newest_unfinished(RUNS)
    if data_dir is not None:
        experiment = replace(experiment, data_dir=data_dir.resolve())
    if not (quiet or as_json):
        typer.echo(f"Going on with {experiment.directory}", err=True)
    _run(experiment, checkpoint_every, quiet or as_json, retry_failed)
    (_show_run if experiment.kind == "train" else _show_ranking)(experiment, as_json)


@app.command()
def status(
    directory: Directory = None,
    failed: Annotated[bool, typer.Option("--failed", help="Show the tracebacks of failed cells.")] = False,
    as_json: AsJson = False,
) -> None:
    """How far an experiment is (by default the newest in runs/)."""
    from bpf import api, console

    experiment = _open(directory)
    if failed:
        rows = [row for row in api.rows(experiment) if row.state == "failed"]
        if as_json:
            _print_json(
                [{"cell": row.name, "algorithm": row.rule, "params": row.params, "error": row.error} for row in rows]
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
    as_json: AsJson = False,
) -> None:
    """The best cells of an experiment (by default the newest in runs/), ranked by its objective."""
    from bpf import api, console

    experiment = _open(directory)
    if as_json:
        _print_json([entry.as_json(experiment.grid.objective) for entry in api.best(experiment, top)])
    else:
        console.show_results(api.rows(experiment), experiment.grid.objective, top)


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


def _run(experiment: "Experiment", checkpoint_seconds: float, quiet: bool, retry_failed: bool = False) -> None:
    from bpf import api, console
    from bpf.worker import Interrupted, Stop

    spec = experiment.grid

    def observe(rows: list[Any]) -> console.LiveProgress:
        return console.LiveProgress(rows, spec.executions_per_trial, spec.objective, quiet)

    command = ["bpf", *sys.argv[1:]]
    try:
        api.run(experiment, observe, [shlex.join(command)], Stop(), checkpoint_seconds, retry_failed)
    except Interrupted:
        raise Interrupted(f"Stopped, and everything is stored. Go on with: bpf resume {experiment.directory}") from None
    except KeyboardInterrupt:
        go_on = f"go on with: bpf resume {experiment.directory}" if experiment.begun else "nothing was begun."
        raise Interrupted(f"Interrupted at once. Nothing finished is lost; {go_on}") from None


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


def _open(directory: Path | None) -> "Experiment":
    from bpf import api
    from bpf.experiment import open_experiment

    return open_experiment(directory) if directory else api.newest(RUNS)


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
