"""What the commands share: their options, and how they find an experiment and print JSON."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bpf.errors import UsageError
from bpf.spec.values import is_number

if TYPE_CHECKING:
    from bpf.experiment.directory import Experiment, Place

RUNS = Path("runs")
TOP = 10


def number_for(option: str, kind: type, least: int, most: int | None = None) -> Callable[[str | float], Any]:
    """A parser of an option's number, an int or a float (`kind`) between two bounds, written in ASCII."""

    def parse(given: str | float) -> Any:
        text = str(given).strip()
        if is_number(text) and not (kind is int and set(text) & set(".eE")):
            number = kind(text)
            if least <= number <= (float("inf") if most is None else most) and number != float("inf"):
                return number
        limits = f"from {least} on" if most is None else f"from {least} to {most}"
        raise UsageError(f"{option} {given}: give a {'whole ' if kind is int else ''}number {limits}.")

    return parse


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


def _one_of_them(context: typer.Context, given: bool) -> bool:
    if given and (context.params.get("quiet") or context.params.get("verbose")):
        raise UsageError("Give --quiet or --verbose, not both.")
    return given


Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.", callback=_one_of_them)]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="A line for each finished cell.", callback=_one_of_them)]
CheckpointEvery = Annotated[
    float,
    typer.Option(
        "--checkpoint-every",
        parser=number_for("--checkpoint-every", float, 0),
        help="Least seconds between two checkpoints, and ten times as long as one takes; 0 is after each epoch.",
        metavar="SECONDS",
    ),
]
MaxHours = Annotated[
    float | None,
    typer.Option(
        "--max-hours",
        parser=number_for("--max-hours", float, 0),
        help="Stop by itself after this time, as with Ctrl-C.",
        metavar="H",
        show_default=False,
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
    str | None,
    typer.Option(
        "--checkpoints",
        help="A folder, shared with other machines, for the checkpoints and models of experiments; or a URL for their "
        "checkpoints alone, such as s3://BUCKET/FOLDER. Its keys are kept in the environment.",
        metavar="DIR|URL",
        show_default=False,
    ),
]
On = Annotated[
    str | None,
    typer.Option(
        "--on",
        help="Train on a Ray cluster: ray (one for this command, on this machine), auto (the one that runs here, or is "
        "named by RAY_ADDRESS), HOST:PORT of its head, or ray://HOST:PORT.",
        metavar="ray|auto|ADDRESS",
        show_default=False,
    ),
]
WorkersPerGpu = Annotated[
    int,
    typer.Option(
        "--workers-per-gpu",
        parser=number_for("--workers-per-gpu", int, 1, 64),
        help="With --on: so many workers share a GPU, and its memory.",
        metavar="N",
    ),
]
Notify = Annotated[
    list[str] | None,
    typer.Option(
        "--notify",
        help="Tell a http(s) URL (POST of JSON) or a shell command (JSON on its input) when it has finished, failed or "
        "was stopped; may be repeated.",
        metavar="URL|COMMAND",
        show_default=False,
    ),
]
KeepCheckpoints = Annotated[
    bool,
    typer.Option(
        "--keep-checkpoints", help="Keep those of finished cells, so that their executions can go on for more epochs."
    ),
]


def place_of(storage: str | None, name: str | None, checkpoints: str | None, keep: bool) -> "Place":
    from bpf.experiment.bucket import place_at
    from bpf.experiment.directory import Place
    from bpf.study.database import Database

    usual = storage == os.environ.get("BPF_STORAGE")
    where = place_at(checkpoints) if checkpoints else None
    return Place(Database.at(storage) if storage else None, name, where, keep, usual)


def opened(directory: Path | None, storage: str | None) -> "Experiment":
    from bpf import api
    from bpf.experiment.directory import open_experiment

    place = place_of(storage, None, None, False)
    return open_experiment(directory, place) if directory else api.newest(RUNS, place)


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))
