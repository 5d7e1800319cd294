"""The command that checks bpf against the literature: `reproduce`."""

from pathlib import Path
from typing import Annotated

import typer

from bpf.cli.arguments import (
    RUNS,
    AsJson,
    CheckpointEvery,
    DataDir,
    Directory,
    MaxHours,
    Notify,
    On,
    Quiet,
    Verbose,
    Workers,
    WorkersPerGpu,
    number_for,
    place_of,
    print_json,
)
from bpf.cli.session import check_targets, observer, show_rows, train_all
from bpf.cli.training import effort_of, warm_up
from bpf.console.screen import say
from bpf.extras import importing


def reproduce(
    name: Annotated[
        str | None,
        typer.Argument(
            help="Published rows that come with bpf, or a YAML, TOML or JSON file of your own; by default a list of "
            "them.",
            metavar="[NAME|FILE]",
            show_default=False,
        ),
    ] = None,
    directory: Directory = None,
    rows: Annotated[
        list[str] | None,
        typer.Option(
            "--rows", help="Only these rows; * stands for anything, as in dfa-*.", metavar="ROW,...", show_default=False
        ),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="A twentieth of the epochs and one execution: whether it works, no comparison."),
    ] = False,
    executions: Annotated[
        int | None,
        typer.Option(
            parser=number_for("--executions", int, 1, 1000),
            help="Executions of each cell, by default as many as the file says.",
            metavar="N",
            show_default=False,
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Another source of the same images, such as folder:PATH; the table says so.",
            metavar="NAME",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Where to train, as in `bpf tune`.", metavar="DEVICE", show_default=False)
    ] = None,
    data_dir: DataDir = Path("data"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    workers: Workers = "auto",
    on: On = None,
    workers_per_gpu: WorkersPerGpu = 1,
    max_hours: MaxHours = None,
    checkpoint_every: CheckpointEvery = 30.0,
    notify: Notify = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: AsJson = False,
) -> None:
    """Train what was published and compare: a grid of a paper's rows, and a table of theirs and ours.

    It is an experiment like any other: the same command again, or `bpf resume`, goes on where it stopped; more rows and
    more executions extend it; `bpf report` has the table as well.
    """
    from bpf.spec import published

    if name is None:
        return _list(as_json)
    effort = effort_of(workers, device, checkpoint_every, max_hours, on, workers_per_gpu)
    check_targets(notify)
    grid = published.read(name)
    if rows:
        grid = published.selected(grid, rows)
    if quick:
        grid = published.quick(grid)
    if not dry_run:
        warm_up(effort, grid.device)
    with importing():
        from bpf import api
        from bpf.console import tables
        from bpf.experiment.settings import stored_grid

    changed = {"executions_per_trial": executions, "dataset": dataset}
    written = grid.model_dump(mode="json") | {field: value for field, value in changed.items() if value is not None}
    grid = stored_grid(written)
    directory = directory or RUNS / f"reproduce-{Path(name).stem}{'-quick' if quick else ''}"
    experiment = api.open_tune(directory, grid, data_dir, place_of(None, None, None, False))
    if dry_run or not (quiet or as_json):
        planned = api.plan(experiment, effort, 2.5 if dry_run else 1.0, 0.0 if dry_run else 60.0)
        if dry_run and as_json:
            return print_json(planned.as_json())
        tables.show_plan(planned, experiment.grid, directory, dry_run)
    if dry_run:
        return
    train_all(experiment, effort, observer(quiet or as_json, verbose), notify=notify)
    show_rows(experiment, as_json)


def _list(as_json: bool) -> None:
    from bpf.spec import published

    found = {name: published.read(name) for name in published.names()}
    if as_json:
        return print_json(
            [{"name": name, "dataset": one.dataset, "rows": list(one.rows)} for name, one in found.items()]
        )
    for name, one in found.items():
        say(f"{name}  ({one.dataset})\n    {', '.join(one.rows)}")


COMMANDS = (reproduce,)
