"""What a person sees: the plan, live progress, and tables. Only this module and `cli.py` print."""

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from bpf.grid import Grid
from bpf.plan import Claim, Row
from bpf.results import Ranked, Spread, cost, rank, varying, winners

if TYPE_CHECKING:
    from bpf.training import Cohort

out = Console(highlight=False, soft_wrap=False)
err = Console(stderr=True, highlight=False)

SECONDS_BETWEEN_LINES = 5.0
SHORT = {"batch_norm": "bn", "bw_init": "feedback", "activation": "act"}


class LiveProgress:
    """Shows how an experiment goes on: a live bar in a terminal, a line every few seconds elsewhere.

    The time left is the measured speed of this session applied to the work that is left.
    """

    def __init__(self, rows: Sequence[Row], executions: int, objective: str, quiet: bool = False) -> None:
        self._objective, self._quiet = objective, quiet
        open_rows = [row for row in rows if row.state in ("pending", "interrupted", "running")]
        self._open = {row.key: cost(row.spec, executions) for row in open_rows}
        self._left, self._spent = sum(self._open.values()), 0.0
        self._varying = varying(rows)
        self._total, self._ended = len(rows), len(rows) - len(open_rows)
        self._start = self._spoke = time.monotonic()
        self._states: Counter[str] = Counter()
        self._best: tuple[float, Row] | None = min(
            ((row.value, row) for row in rows if row.state == "complete" and row.value is not None),
            key=lambda pair: pair[0],
            default=None,
        )
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            console=err,
            disable=quiet or not err.is_terminal,
            transient=True,
        )
        self._cells = self._progress.add_task("cells", total=self._total, completed=self._ended, note="")
        self._epochs = self._progress.add_task("epochs", total=None, note="", visible=False)

    def __enter__(self) -> "LiveProgress":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def began(self, claim: Claim, epoch: int) -> None:
        spec = claim.rows[0].spec
        self._take(claim, epoch / spec["epochs"])
        count = len(claim.rows)
        name = f"{claim.rows[0].rule} {spec['arch']} {spec['activation']}, {count} cell{'s' if count > 1 else ''}"
        self._progress.update(
            self._epochs, total=spec["epochs"], completed=epoch, description="epochs", note=name, visible=True
        )

    def trained(self, claim: Claim, cohort: "Cohort") -> None:
        self._spent += self._take(claim, 1 / (claim.rows[0].spec["epochs"] - cohort.epoch + 1))
        self._progress.update(self._epochs, completed=cohort.epoch)
        self._progress.update(self._cells, note=self._note())
        if not self._quiet and not err.is_terminal and time.monotonic() - self._spoke > 30:  # a long cohort
            self._say(f"{claim.rows[0].rule} {claim.rows[0].spec['arch']}: epoch {cohort.epoch}")

    def ended(self, row: Row, state: str, value: float | None) -> None:
        self._ended += 1
        self._states[state] += 1
        self._left -= self._open.pop(row.key, 0.0)
        if value is not None and (self._best is None or value < self._best[0]):
            self._best = value, row
        self._progress.update(self._cells, completed=self._ended, note=self._note())
        due = time.monotonic() - self._spoke > SECONDS_BETWEEN_LINES or self._ended == self._total
        if due and not self._quiet and not err.is_terminal:
            shown = f"{self._objective} {number(value)}" if value is not None else state
            what = " ".join(filter(None, (row.rule, self._describe(row))))
            self._say(f"{self._ended}/{self._total} {row.name}: {what}: {shown}")

    def _describe(self, row: Row) -> str:
        return describe({name: value for name, value in row.params.items() if name in self._varying})

    def _take(self, claim: Claim, share: float) -> float:
        """Take a share of what is left of a cohort's work off the total."""
        taken = 0.0
        for row in claim.rows:
            part = share * self._open.get(row.key, 0.0)
            self._open[row.key] = self._open.get(row.key, 0.0) - part
            taken += part
        self._left -= taken
        return taken

    def _say(self, text: str) -> None:
        self._spoke = time.monotonic()
        err.print(f"{text} ({self._note()})", soft_wrap=True, markup=False)

    def _note(self) -> str:
        parts = []
        if self._spent and self._left > 0:
            left = self._left / self._spent * (time.monotonic() - self._start)
            parts.append(f"{duration(left)} left")
        if self._best:
            parts.append(f"best {self._objective} {number(self._best[0])} by {self._best[1].rule}")
        parts += [f"{count} {state}" for state, count in self._states.items() if state != "complete"]
        return ", ".join(parts)


def say(text: str) -> None:
    """A line that is never broken: what reads it may not be as wide as a terminal."""
    out.print(text, markup=False, soft_wrap=True)


def show_plan(grid: Grid, executions: int, cohorts: int | None, directory: Path) -> None:
    """How many cells, runs and cohorts each rule has, and what was left out and why."""
    counts = Counter(cell.rule for cell in grid.cells)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("rule", "cells", "runs", "grid"):
        table.add_column(name, justify="left" if name in ("rule", "grid") else "right", overflow="fold")
    for rule, axes in grid.axes.items():
        sizes = [f"{len(axis.values)} {axis.name}" for axis in axes if len(axis.values) > 1]
        table.add_row(rule, str(counts[rule]), str(counts[rule] * executions), " × ".join(sizes) or "one cell")
    out.print(table)
    stacked = f", trained in about {cohorts} cohorts" if cohorts else ""
    say(
        f"{len(grid.cells)} cells of {executions} execution{'s' if executions > 1 else ''}{stacked}; "
        f"experiment in {directory}"
    )
    for left in grid.left_out:
        say(f"left out: {left.cells} cells of {left.rule} ({left.reason})")


def show_results(rows: Sequence[Row], objective: str, top: int = 10) -> None:
    """The ranked cells, and each rule's winner on the test set."""
    ranked = rank(rows)
    states = Counter(row.state for row in rows)
    if not ranked:
        say(f"No complete cell yet ({', '.join(f'{n} {state}' for state, n in states.items())}).")
        return
    names = varying(rows)
    out.print()
    out.print(_table(f"Ranked by {objective}", ranked[:top], names, objective, test=False))
    if len(ranked) > top:
        say(f"... and {len(ranked) - top} more; see `bpf best --top {len(ranked)}`.")
    out.print()
    out.print(_table("The winner of each rule on the test set", winners(ranked), names, objective, test=True))
    executions = len(ranked[0].objective.values)
    spread = f"mean ± std over {executions} executions" if executions > 1 else "one execution"
    others = [f"{states[state]} {state}" for state in ("diverged", "failed") if states[state]]
    say(f"{spread}; {states['complete']} cells complete{''.join(f', {o}' for o in others)}.")
    failed = [row for row in rows if row.state == "failed"]
    if failed:
        last = (failed[0].error or "").strip().splitlines()[-1]
        say(f"first failure: {failed[0].rule} {describe(failed[0].params)}: {last}")


def _table(title: str, ranked: Sequence[Ranked], names: Sequence[str], objective: str, test: bool) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="bold")
    table.add_column("#", justify="right")
    table.add_column("rule", no_wrap=True)
    measured = list(ranked[0].test) if test else []
    for heading in [f"test {name}" for name in measured] if test else [objective]:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("best epoch", justify="right", no_wrap=True)
    table.add_column("parameters", min_width=20)
    for place, entry in enumerate(ranked, 1):
        epochs = sorted({min(entry.best_epochs), max(entry.best_epochs)})
        table.add_row(
            str(place),
            entry.row.rule,
            *(plus_minus(name, entry.test[name]) for name in measured),
            *([] if test else [plus_minus(objective, entry.objective)]),
            "-".join(map(str, epochs)),
            describe({name: value for name, value in entry.row.params.items() if name in names}),
        )
    return table


def describe(params: dict[str, Any]) -> str:
    """Parameters in one line, such as `arch=500 bn=yes lr=0.01`."""
    return " ".join(f"{SHORT.get(name, name)}={word(value)}" for name, value in params.items())


def plus_minus(name: str, spread: Spread) -> str:
    """`0.123 ± 0.004`; errors are shown in percent."""
    is_error = name.endswith("error")
    scale, digits = (100, ".2f") if is_error else (1, ".4f" if spread.mean >= 0.001 else ".1e")
    deviation = f" ± {spread.std * scale:{digits}}" if len(spread.values) > 1 else ""
    return f"{spread.mean * scale:{digits}}{deviation}{' %' if is_error else ''}"


def word(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def duration(seconds: float) -> str:
    """`40 s`, `3 min`, `2 h 05 min`, `3 d 4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def show_status(status: dict[str, Any]) -> None:
    """Cells by state, and how long the rest will take."""
    cells = status["cells"]
    parts = [f"{count} {state}" for state, count in cells.items() if state != "total" and count]
    say(f"{status['experiment']}: {cells['total']} cells: {', '.join(parts) or 'none planned'}")
    left = status["eta_seconds"]
    rest = "finished" if left == 0 else "time left not known yet" if left is None else f"about {duration(left)} left"
    say(f"{duration(status['elapsed_seconds'])} of training in finished cells, {rest}")


def show_failures(rows: Sequence[Row]) -> None:
    """The tracebacks of failed cells."""
    for row in rows:
        say(f"{row.name}: {row.rule} {describe(row.params)}\n{row.error}")
    if not rows:
        say("No cell has failed.")


def show_run(report: dict[str, Any]) -> None:
    """One run's scores on each part, at its best epoch."""
    seconds, speed = report["seconds"]["per_epoch"], report["samples_per_second"]
    run = f"{report['algorithm']} on {report['dataset']}, seed {report['seed']}, {report['device']}"
    pace = f"{report['epochs']} epochs, {seconds:.2f} s an epoch, {speed:,.0f} examples/s"
    say(f"{run}: {report['status']} after {pace}")
    for part in ("train", "val", "test"):
        scores = report[part]
        if scores is not None:
            error = "" if scores["error"] is None else f"   error {100 * scores['error']:.2f} %"
            say(f"  {part:<6} loss {scores['loss']:.4f}{error}")
