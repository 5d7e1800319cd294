"""Commands that look at what came out."""

import io
import re
import sys
import webbrowser
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bpf.cli.arguments import TOP, AsJson, Directory, Storage, number_for, opened, print_json
from bpf.console.screen import say, tell
from bpf.errors import UsageError, did_you_mean
from bpf.words import counted

if TYPE_CHECKING:
    from bpf.experiment.directory import Experiment
    from bpf.results.exporting import Table

_REPORT = re.compile(rb"<!doctype html>.*bpf report</title>", re.DOTALL)
"""How a report begins."""

Directories = Annotated[
    list[Path] | None,
    typer.Argument(help="Experiments, side by side.", metavar="[DIRECTORY]...", show_default=False),
]


def status(
    directory: Directory = None,
    failed: Annotated[
        bool, typer.Option("--failed", help="Show why cells have failed, and which have diverged.")
    ] = False,
    storage: Storage = None,
    as_json: AsJson = False,
) -> None:
    """How far an experiment is (by default the newest in runs/)."""
    from bpf.console import tables
    from bpf.results import summary

    experiment = opened(directory, storage)
    if failed:
        rows = [row for row in summary.rows(experiment) if row.state in ("failed", "diverged")]
        if as_json:
            print_json(
                [
                    {
                        "cell": row.name,
                        "algorithm": row.rule,
                        "params": row.chosen,
                        "state": row.state,
                        "cause": row.cause,
                        "error": row.error,
                    }
                    for row in rows
                ]
            )
        else:
            tables.show_failures(rows)
    elif as_json:
        print_json(summary.status(experiment))
    else:
        tables.show_status(summary.status(experiment))


def best(
    directory: Directory = None,
    top: Annotated[
        int | None,
        typer.Option(
            parser=number_for("--top", int, 1),
            help=f"How many cells; by default {TOP}, or all with --per.",
            metavar="N",
            show_default=False,
        ),
    ] = None,
    algorithm: Annotated[
        list[str] | None,
        typer.Option(help="Only cells of these learning rules.", metavar="RULE,...", show_default=False),
    ] = None,
    per: Annotated[
        str | None,
        typer.Option(
            help="Only the best cell of each rule for each combination of these parameters, such as arch,activation.",
            metavar="NAME,...",
            show_default=False,
        ),
    ] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV instead of a table.")] = False,
    storage: Storage = None,
    as_json: AsJson = False,
) -> None:
    """The best cells of an experiment (by default the newest in runs/), ranked by its objective."""
    from bpf.console import tables
    from bpf.results import summary
    from bpf.study import ranking

    if as_csv and as_json:
        raise UsageError("Give --csv or --json, not both.")
    experiment = opened(directory, storage)
    objective, rules, names = experiment.grid.objective, _listed(algorithm or []), _listed([per] if per else [])
    if not (names or as_csv or as_json):
        tables.show_results(summary.ranking(experiment, top or TOP, rules), objective, experiment.directory, rules)
        return
    found = summary.best_per(experiment, names, rules)[:top] if names else summary.best(experiment, top or TOP, rules)
    if as_json:
        print_json(ranking.as_json(found, objective))
    elif as_csv:
        parameters = summary.parameters(experiment)
        _print_csv(ranking.best_columns(found, parameters), parameters)
    else:
        tables.show_best_per(found, names, summary.varying(experiment), objective)


def _listed(given: list[str]) -> list[str]:
    return [name.strip() for one in given for name in one.split(",")]


def _print_csv(columns: list[dict[str, Any]], names: list[str]) -> None:
    import csv

    writer = csv.DictWriter(sys.stdout, list(columns[0]) if columns else names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(columns)


def show(directory: Directory = None, storage: Storage = None, as_json: AsJson = False) -> None:
    """How an experiment was made: its spec, and for each start the command, versions, git and hardware."""
    from bpf.console import tables
    from bpf.results import summary

    provenance = summary.provenance(opened(directory, storage))
    print_json(provenance) if as_json else tables.show_provenance(provenance)


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
    from bpf import api
    from bpf.console import tables

    removed = api.clean(opened(directory, storage), checkpoints, dry_run)
    print_json(removed) if as_json else tables.show_cleaned(removed, dry_run)


def export(
    directory: Directory = None,
    what: Annotated[
        str,
        typer.Option(
            help="results: a row per cell; history: per epoch; trackers: per measurement; metrics: all of it, as one "
            "Parquet file per rule.",
            metavar="results|history|trackers|metrics",
        ),
    ] = "results",
    format_: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="How to write it; by default as the name of the file says, or else csv.",
            metavar="csv|json|parquet",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="The file, or for metrics the folder; csv and json are printed otherwise. Only an earlier export is "
            "replaced.",
            metavar="PATH",
            show_default=False,
        ),
    ] = None,
    storage: Storage = None,
) -> None:
    """Write every cell, epoch or measurement as a table for other programs."""
    from bpf.results import exporting

    known = (*exporting.TABLES, "metrics")
    if what not in known:
        raise UsageError(f"--what {what} is not known.{did_you_mean(what, known)}")
    if output is not None and what != "metrics":
        exporting.check_table(output)
    asked, format_ = format_, exporting.format_of(None if what == "metrics" else output, format_)
    if what == "metrics" and asked not in (None, "parquet"):
        raise UsageError(f"--what metrics is written as parquet. Leave out --format {asked}.")
    experiment = opened(directory, storage)
    if what == "metrics":
        for path, rows, columns in exporting.metrics(experiment, output or experiment.directory / "metrics"):
            say(f"{path}: {counted(rows, 'row')} of {columns} columns")
        return
    if output is None and format_ == "parquet":
        raise UsageError("--format parquet is not for a terminal: give --output FILE.")
    with closing(experiment.read_study()) as study:
        table = exporting.table(study, what)
        if what == "trackers" and not any("/" in name for name in table.columns):
            why = " yet" if experiment.grid.trackers else ": it has no trackers (`bpf tune --tracker NAME`)"
            tell(f"Nothing was measured in {experiment.directory}{why}.")
        if output is None:
            _print_table(table, format_)
        else:
            say(f"{output}: {counted(exporting.save(table, format_, output), 'row')} of {len(table.columns)} columns")


def _print_table(table: "Table", format_: str) -> None:
    from bpf.results.exporting import write

    if hasattr(sys.stdout, "buffer"):
        write(table, format_, sys.stdout.buffer)
        sys.stdout.buffer.flush()
    else:  # a notebook's
        file = io.BytesIO()
        write(table, format_, file)
        typer.echo(file.getvalue().decode(), nl=False)


def report(
    directories: Annotated[
        list[Path] | None,
        typer.Argument(help="Experiments, side by side.", metavar="[DIRECTORY]...", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="The page; by default DIRECTORY/report/index.html. Only an earlier report is replaced.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    figures: Annotated[
        str | None,
        typer.Option(help="Write the figures as files, too.", metavar="png|svg|pdf", show_default=False),
    ] = None,
    maps: Annotated[
        list[str] | None,
        typer.Option(
            "--map",
            help="A heat map of these two parameters for each rule, such as arch,lr; may be repeated. By default of "
            "the two that matter most.",
            metavar="ROW,COLUMN",
            show_default=False,
        ),
    ] = None,
    open_: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    storage: Storage = None,
) -> None:
    """Write one page on experiments: tables, figures, and how the results were made. It opens offline."""
    from bpf.files import check_output
    from bpf.report import report as write

    experiments = _several(directories, storage)
    page = output or experiments[0].directory / "report" / "index.html"
    check_output(page, "report of bpf", _REPORT)
    for path in write(experiments, page, figures, [_pair(one) for one in maps or ()]):
        say(str(path))
    if open_ and not webbrowser.open(page.resolve().as_uri()):
        tell(f"No browser was found; open {page}")


def _pair(text: str) -> tuple[str, str]:
    row, _, column = (name.strip() for name in text.partition(","))
    if not row or not column or "," in column or row == column:
        raise UsageError(f"--map {text}: give two different parameters, such as arch,lr.")
    return row, column


def tensorboard(
    directories: Annotated[
        list[Path] | None,
        typer.Argument(help="Experiments, side by side.", metavar="[DIRECTORY]...", show_default=False),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            parser=number_for("--port", int, 1, 65535),
            help="By default the first free one from 6006 on.",
            metavar="N",
            show_default=False,
        ),
    ] = None,
    per: Annotated[
        str,
        typer.Option(
            help="Curves of the mean over the executions of each cell, or those of each execution too.",
            metavar="cell|execution",
        ),
    ] = "cell",
    write_only: Annotated[
        bool, typer.Option("--write-only", help="Write the event files, and do not show them.")
    ] = False,
    storage: Storage = None,
) -> None:
    """Show experiments in TensorBoard, on this machine only; the event files lie in DIRECTORY/tensorboard."""
    from bpf.results import tensorboard

    experiments = _several(directories, storage)
    folders = [experiment.directory / "tensorboard" for experiment in experiments]
    for experiment, folder in zip(experiments, folders, strict=True):
        count = tensorboard.write(experiment, folder, per)
        tell(f"{counted(count, 'cell')} written to {folder}")
    if not write_only:
        raise typer.Exit(tensorboard.serve(folders, port))


def dashboard(
    directory: Directory = None,
    port: Annotated[
        int, typer.Option(parser=number_for("--port", int, 0, 65535), help="0 takes any free one.", metavar="N")
    ] = 8080,
    storage: Storage = None,
) -> None:
    """Show an experiment in optuna-dashboard, on this machine only."""
    from bpf.results import dashboard

    dashboard.serve(opened(directory, storage), port, lambda url: say(f"{url}  (Ctrl-C ends it)"))


def _several(directories: list[Path] | None, storage: str | None) -> "list[Experiment]":
    return [opened(directory, storage) for directory in directories or ()] or [opened(None, storage)]


COMMANDS = (status, best, report, show, export, tensorboard, dashboard, clean)
