"""What a person sees: the plan, live progress, and tables. Only this module and `cli.py` print."""

import time
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Column, Table
from rich.text import Text

from bpf.experiment.grid import Grid
from bpf.study.plan import Row
from bpf.study.ranking import Ranked, Spread, tracking_share
from bpf.workers.events import Began, Ended, Event, GivenUp, Left, Trained, Trouble

if TYPE_CHECKING:
    from bpf.api import Outset, Ranking
    from bpf.experiment.handover import Taken

out = Console(highlight=False, soft_wrap=False)
err = Console(stderr=True, highlight=False)

SECONDS_BETWEEN_LINES = 5.0
SHOWN_RULES = 5
MARKS = "▁▂▃▄▅▆▇█"
SHORT = {"batch_norm": "bn", "bw_init": "feedback", "activation": "act"}


class LiveProgress:
    """Shows how an experiment goes on: live bars in a terminal, a line every few seconds elsewhere.

    Called with the number of a worker and what happened there. The time left is the measured speed of this session
    applied to the work that is left.
    """

    def __init__(self, outset: "Outset", quiet: bool = False, verbose: bool = False) -> None:
        self._outset, self._quiet, self._verbose = outset, quiet, verbose
        self._left, self._spent = outset.cost, 0.0
        self._ended = outset.total - outset.open
        self._best = dict(outset.best)
        self._curves: dict[int, list[float]] = {}
        self._at_work: dict[int, Began] = {}
        self._shares: dict[int, float] = {}
        self._states: Counter[str] = Counter()
        self._start = self._spoke = time.monotonic()
        self._trouble = ""
        self._plain = not err.is_terminal or err.is_dumb_terminal
        self._progress = Progress(
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=10),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
            console=err,
            expand=True,
        )
        self._cells = self._progress.add_task("cells", total=outset.total, completed=self._ended, note="")
        self._tasks: dict[int, TaskID] = {}
        self._leaders = Text(self._told_best(SHOWN_RULES), no_wrap=True, overflow="ellipsis")
        self._live = Live(Group(self._progress, self._leaders), console=err, transient=True)

    def __enter__(self) -> "LiveProgress":
        if not self._quiet and not self._outset.open:
            err.print("Nothing is left to train.")
        elif not self._quiet and not self._plain:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()

    def __call__(self, worker: int, event: Event) -> None:
        if isinstance(event, Began):
            self._began(worker, event)
        elif isinstance(event, Trained):
            self._trained(worker, event)
        elif isinstance(event, Ended):
            self._cell_ended(worker, event)
        elif isinstance(event, Trouble):
            self._warn(event.text)
        elif isinstance(event, GivenUp | Left):
            self._rest(worker)
        self._progress.update(self._cells, completed=self._ended, note=", ".join(self._how_far()))
        self._leaders.plain = self._told_best(SHOWN_RULES)

    def _began(self, worker: int, event: Began) -> None:
        self._rest(worker)
        self._at_work[worker], self._curves[worker] = event, []
        if worker not in self._tasks:
            self._tasks[worker] = self._progress.add_task(f"worker {worker}", total=None, note="")
        self._progress.update(
            self._tasks[worker], total=event.epochs, completed=event.epoch, note=_cohort(event), visible=True
        )

    def _trained(self, worker: int, event: Trained) -> None:
        began = self._at_work[worker]
        share = (event.epoch - began.epoch) / max(1, began.epochs - began.epoch) * began.cost
        self._spent += share - self._shares.get(worker, 0.0)
        self._shares[worker] = share
        curve = self._curves.setdefault(worker, [])
        curve += [event.objective] if event.objective is not None else []
        note = " ".join(filter(None, (_cohort(began), sparkline(curve), f"{event.speed:,.0f} examples/s")))
        self._progress.update(self._tasks[worker], completed=event.epoch, note=note)
        if not self._quiet and self._plain and time.monotonic() - self._spoke > 30:  # a long cohort
            self._say(f"{_cohort(began)}: epoch {event.epoch} of {began.epochs}")

    def _cell_ended(self, worker: int, event: Ended) -> None:
        self._ended += 1
        self._left -= event.cost
        self._shares[worker] = max(0.0, self._shares.get(worker, 0.0) - event.cost)
        self._states[event.state] += 1
        if event.value is not None:
            self._best[event.rule] = min(event.value, self._best.get(event.rule, event.value))
        due = time.monotonic() - self._spoke > SECONDS_BETWEEN_LINES or self._ended == self._outset.total
        if self._verbose or (due and not self._quiet and self._plain):
            shown = f"{self._outset.objective} {number(event.value)}" if event.value is not None else event.state
            varying = {name: value for name, value in event.params.items() if name in self._outset.varying}
            what = " ".join(filter(None, (event.rule, describe(varying))))
            self._say(f"{self._ended}/{self._outset.total} {event.name}: {what}: {shown}")

    def _rest(self, worker: int) -> None:
        """The worker has no cohort any more: what it did is done, or will be done again."""
        self._shares.pop(worker, None)
        self._at_work.pop(worker, None)
        if worker in self._tasks:
            self._progress.update(self._tasks[worker], visible=False)

    def _warn(self, text: str) -> None:
        """Each trouble once, however often it is told in a row."""
        if text != self._trouble:
            self._trouble = text
            err.print(text, style="yellow", soft_wrap=True, markup=False)

    def _say(self, text: str) -> None:
        self._spoke = time.monotonic()
        note = ", ".join(filter(None, (*self._how_far(), self._told_best(1))))
        err.print(f"{text} ({note})", soft_wrap=True, markup=False)

    def _how_far(self) -> list[str]:
        parts = []
        left = self._left - sum(self._shares.values())
        if self._spent and self._ended < self._outset.total:
            parts.append(f"{duration(max(0.0, left) / self._spent * (time.monotonic() - self._start))} left")
        return parts + [f"{count} {state}" for state, count in self._states.items() if state != "complete"]

    def _told_best(self, rules: int) -> str:
        """The best values so far of so many rules."""
        ranked = sorted(self._best.items(), key=lambda pair: pair[1])
        told = [f"{number(value)} by {rule}" for rule, value in ranked[:rules]]
        return f"best {self._outset.objective} {', '.join(told)}" if told else ""


def _cohort(event: Began) -> str:
    return f"{event.rule} {event.arch} {event.activation}, {counted(event.cells, 'cell')}"


def sparkline(values: Sequence[float], width: int = 8) -> str:
    """A small curve, such as `█▅▃▂▁`, of the whole series: each mark is the last value of its part."""
    if len(values) < 2:
        return ""
    count = min(width, len(values))
    shown = [values[(i + 1) * len(values) // count - 1] for i in range(count)]
    low, high = min(shown), max(shown)
    return "".join(MARKS[round((value - low) / ((high - low) or 1) * (len(MARKS) - 1))] for value in shown)


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
    stacked = f", trained in about {counted(cohorts, 'cohort')}" if cohorts else ""
    say(f"{counted(len(grid.cells), 'cell')} of {counted(executions, 'execution')}{stacked}; experiment in {directory}")
    for left in grid.left_out:
        say(f"left out: {counted(left.cells, 'cell')} of {left.rule} ({left.reason})")


def show_taken(taken: "Taken") -> None:
    """Which learning rates a second phase has, and from where."""
    for line in taken.lines():
        say(line)


def show_results(ranking: "Ranking", objective: str, directory: Path) -> None:
    """The ranked cells of the experiment in `directory`, and each rule's winner on the test set."""
    counts = ranking.counts
    if not ranking.top:
        say(f"No complete cell yet ({', '.join(f'{count} {state}' for state, count in counts.items() if count)}).")
        return
    out.print()
    out.print(_table(f"Ranked by {objective}", ranking.top, ranking.varying, objective, test=False))
    if counts["complete"] > len(ranking.top):
        rest = counts["complete"] - len(ranking.top)
        say(f"... and {rest} more; see `bpf best {quote(str(directory))} --top {counts['complete']}`.")
    out.print()
    title = "The winner of each rule on the test set"
    out.print(_table(title, ranking.winners, ranking.varying, objective, test=True))
    executions = len(ranking.top[0].objective.values)
    spread = f"mean ± std over {executions} executions" if executions > 1 else "one execution"
    others = [f"{counts[state]} {state}" for state in ("diverged", "failed") if counts[state]]
    say(f"{spread}; {counted(counts['complete'], 'cell')} complete{''.join(f', {o}' for o in others)}.")
    share = tracking_share({entry.row.key: entry.row for entry in (*ranking.top, *ranking.winners)}.values())
    if share is not None:
        say(f"trackers took {percent(share)} of the training time of these cells.")
    if ranking.failure:
        last = (ranking.failure.error or "").strip().splitlines()[-1]
        varying = {name: value for name, value in ranking.failure.chosen.items() if name in ranking.varying}
        say(f"first failure: {' '.join(filter(None, (ranking.failure.rule, describe(varying))))}: {last}")


def show_best_per(ranked: Sequence[Ranked], names: Sequence[str], varying: Collection[str], objective: str) -> None:
    """The best cell of each rule for each combination of some parameters, with all that vary."""
    if ranked:
        shown = {*names, *varying}
        out.print(_table(f"The best by {objective} per {', '.join(names)}", ranked, shown, objective, test=False))
    else:
        say("No complete cell yet.")


def _table(title: str, ranked: Sequence[Ranked], names: Collection[str], objective: str, test: bool) -> Table:
    """Cells with the parameters `names`, or all of them if there is none that varies."""
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
            describe({name: value for name, value in entry.row.chosen.items() if not names or name in names}),
        )
    return table


def describe(params: dict[str, Any]) -> str:
    """Parameters in one line, such as `arch=500 bn=yes lr=0.01`."""
    return " ".join(f"{SHORT.get(name, name)}={word(value)}" for name, value in params.items())


def plus_minus(name: str, spread: Spread) -> str:
    """`0.123 ± 0.004`; errors are shown in percent."""
    is_error = name.endswith("error")
    scale, digits = (100, ".2f") if is_error else (1, ".4f" if 0.001 <= abs(spread.mean) < 1e5 else ".1e")
    deviation = f" ± {spread.std * scale:{digits}}" if spread.std is not None else ""
    return f"{spread.mean * scale:{digits}}{deviation}{' %' if is_error else ''}"


def word(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


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
    """Cells by state, what troubled them, who works on them, and how long the rest will take."""
    cells = status["cells"]
    parts = [f"{count} {state}" for state, count in cells.items() if state != "total" and count]
    say(f"{status['experiment']}: {counted(cells['total'], 'cell')}: {', '.join(parts) or 'none planned'}")
    for cause, states in status["causes"].items():
        say(f"{CAUSES[cause]}: {', '.join(f'{count} {_now(state)}' for state, count in states.items())}")
    for worker in status["workers"]:
        say(f"worker on {worker.get('host', '?')}, process {worker['pid']}, {worker.get('device', '?')}")
    left = status["eta_seconds"]
    rest = "finished" if left == 0 else "time left not known yet" if left is None else f"about {duration(left)} left"
    say(f"{duration(status['elapsed_seconds'])} of training in finished cells, {rest}")


CAUSES = {
    "killed": "worker died",
    "memory": "out of memory",
    "exception": "rule raised",
}


def _now(state: str) -> str:
    return f"now {state}" if state != "failed" else "failed"


def show_failures(rows: Sequence[Row]) -> None:
    """The tracebacks of failed cells, and which have diverged."""
    failed = [row for row in rows if row.state == "failed"]
    for row in failed:
        say(f"{row.name}: {row.rule} {describe(row.chosen)}\n{row.error}")
    if not failed:
        say("No cell has failed.")
    for row in rows:
        if row.state == "diverged":
            runs = (row.result or {}).get("executions", [])
            epochs = [run["epochs"] for run in runs if run["status"] == "diverged"]
            where = f" in epoch {min(epochs)} ({len(epochs)} of {counted(len(runs), 'execution')})" if epochs else ""
            say(f"{row.name}: {row.rule} {describe(row.chosen)}: diverged{where}")


def show_provenance(provenance: dict[str, Any]) -> None:
    """The spec of an experiment and each start of it."""
    for name in ("experiment", "name", "created", "storage", "checkpoints", "data_dir"):
        say(f"{name:<12}{provenance[name]}")
    say("spec")
    for rate in provenance["spec"].pop("lr_from", ()):
        setup = " ".join(f"{name}={word(value)}" for name, value in rate["params"].items())
        say(f"  learning rate         {rate['lr']:g} for {rate['algorithm']} {setup}")
    for name, value in provenance["spec"].items():
        shown = ", ".join(map(word, value)) if isinstance(value, list) else word(value)
        say(f"  {name:<22}{shown or 'none'}")
    for session in provenance["sessions"]:
        say(f"\n{session.get('time', 'earlier')}  {session['command']}")
        versions = session.get("versions", {})
        if versions:
            say(f"  versions    {', '.join(f'{name} {version}' for name, version in versions.items())}")
        for name, title in (("git", "git"), ("bpf_git", "bpf's git")):
            if session.get(name):
                say(f"  {title:<12}{_commit(session[name])}")
        hardware = session.get("hardware")
        if hardware:
            gpus = ", ".join(gpu["name"] for gpu in hardware["gpus"])
            memory = f"{hardware['memory_gib']} GiB" if hardware["memory_gib"] else "memory unknown"
            say(f"  hardware    {hardware['host']}: {hardware['cores']} cores of {hardware['cpu']}, {memory}")
            say(f"  system      {hardware['system']}{f'; GPUs: {gpus}' if gpus else ''}")
        for name, value in session.get("environment", {}).items():
            say(f"  {name}={value}")


def _commit(git: dict[str, Any]) -> str:
    changed = f", {git['changed_files']} files changed" if git["dirty"] else ", clean"
    where = f" in {git['root']}" if git.get("root") else ""
    return f"{git['commit'] or 'no commit yet'} on {git['branch'] or 'no branch'}{changed}{where}"


def show_cleaned(removed: dict[str, Any], dry_run: bool) -> None:
    """What `bpf clean` has removed, or would."""
    for path in removed["files"]:
        say(path)
    done = "would be removed" if dry_run else "removed"
    say(f"{counted(len(removed['files']), 'file')} {done}, {removed['bytes'] / 2**20:.1f} MiB.")


def show_scores(scores: dict[str, Any]) -> None:
    """What `bpf evaluate` found: what the model is, loss, error, and how classes are taken for each other."""
    say(f"{scores['model']} on the {scores['part']} part of {scores['dataset']}: {scores['examples']} examples")
    say(f"  {scores['algorithm']} {describe(scores['params'])}")
    say(f"  the execution with seed {scores['seed']} only; tables show the mean of all")
    error = "" if scores["error"] is None else f"   error {100 * scores['error']:.2f} %"
    say(f"  loss {number(scores['loss'])}{error}")
    if scores["confusion"] is None:
        return
    table = Table(title="true class (rows), taken for", title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    for name in scores["classes"]:
        table.add_column(str(name), justify="right")
    for name, counts in zip(scores["classes"], scores["confusion"], strict=True):
        table.add_row(str(name), *(str(count) if count else "." for count in counts))
    out.print(table)


def show_predictions(found: Sequence[dict[str, Any]]) -> None:
    """A line for each image and class, or for each image that was written."""
    for one in found:
        score = one.get("probability", one.get("score"))
        told = f"-> {one['output']}" if "output" in one else f"{one['class']}  {100 * float(score or 0):.1f} %"
        say(f"{one['file']}  {told}")


def show_run(report: dict[str, Any]) -> None:
    """One run's scores on each part, at its best epoch."""
    seconds, speed = report["seconds"]["per_epoch"], report["samples_per_second"]
    run = f"{report['algorithm']} on {report['dataset']}, seed {report['seed']}, {report['device']}"
    pace = f"{report['epochs']} epochs, {seconds:.2f} s an epoch, {speed:,.0f} examples/s"
    if report["seconds"]["tracking"]:
        pace += f", trackers {percent(report['seconds']['tracking'] / report['seconds']['total'])}"
    say(f"{run}: {report['status']} after {pace}")
    for part in ("train", "val", "test"):
        scores = report[part]
        if scores is not None:
            error = "" if scores["error"] is None else f"   error {100 * scores['error']:.2f} %"
            say(f"  {part:<6} loss {scores['loss']:.4f}{error}")
