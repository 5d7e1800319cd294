"""How work goes on, for a person who watches: live bars in a terminal, lines elsewhere."""

import time
from collections import Counter
from itertools import islice
from typing import TYPE_CHECKING

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from bpf.console.screen import err
from bpf.words import counted, describe, duration, number, sparkline
from bpf.workers.events import Began, Ended, Event, GivenUp, Left, Trained, Trouble

if TYPE_CHECKING:
    from bpf.results.summary import Outset

SECONDS_BETWEEN_LINES = 5.0
SHOWN_RULES = 5
SHOWN_WORKERS = 8


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
        self._speeds: dict[int, float] = {}
        self._states: Counter[str] = Counter()
        self._start = self._spoke = time.monotonic()
        self._trouble = ""
        self._plain = not err.is_terminal or err.is_dumb_terminal
        self._progress = Progress(
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
            BarColumn(bar_width=10),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TextColumn(
                "{task.fields[note]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)
            ),
            console=err,
            expand=True,
        )
        self._cells = self._progress.add_task("cells", total=outset.total, completed=self._ended, note="")
        self._tasks: dict[int, TaskID] = {}
        self._shown: list[int] = []
        self._leaders = Text(self._told_below(), no_wrap=True, overflow="ellipsis")
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
            self._choose()
            if isinstance(event, Left) and worker in self._tasks:
                self._progress.remove_task(self._tasks.pop(worker))
        note = ", ".join((*self._how_far(), *self._together()))
        self._progress.update(self._cells, completed=self._ended, note=note)
        self._leaders.plain = self._told_below()

    def _began(self, worker: int, event: Began) -> None:
        self._rest(worker)
        self._at_work[worker], self._curves[worker] = event, []
        if worker not in self._tasks:
            self._tasks[worker] = self._progress.add_task(f"worker {worker}", total=None, note="", visible=False)
        self._progress.update(self._tasks[worker], total=event.epochs, completed=event.epoch, note=_cohort(event))
        self._choose()

    def _trained(self, worker: int, event: Trained) -> None:
        began = self._at_work.get(worker)
        if began is None:  # a last word from a node that was given up
            return
        share = (event.epoch - began.epoch) / max(1, began.epochs - began.epoch) * began.cost
        self._spent += share - self._shares.get(worker, 0.0)
        self._shares[worker], self._speeds[worker] = share, event.speed
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
        self._speeds.pop(worker, None)
        self._at_work.pop(worker, None)

    def _choose(self) -> None:
        """Show bars of so many workers at work, and of the same ones as long as they are."""
        before = set(self._shown)
        self._shown = [worker for worker in self._shown if worker in self._at_work]
        others = (worker for worker in self._at_work if worker not in before)
        self._shown += islice(others, SHOWN_WORKERS - len(self._shown))
        for worker in before.symmetric_difference(self._shown):
            self._progress.update(self._tasks[worker], visible=worker in self._shown)

    def _warn(self, text: str) -> None:
        """Each trouble once, however often it is told in a row."""
        if text != self._trouble:
            self._trouble = text
            err.print(text, style="yellow", soft_wrap=True)

    def _say(self, text: str) -> None:
        self._spoke = time.monotonic()
        note = ", ".join(filter(None, (*self._how_far(), self._told_best(1))))
        err.print(f"{text} ({note})", soft_wrap=True)

    def _how_far(self) -> list[str]:
        parts = []
        left = self._left - sum(self._shares.values())
        if self._spent and self._ended < self._outset.total:
            parts.append(f"{duration(max(0.0, left) / self._spent * (time.monotonic() - self._start))} left")
        return parts + [f"{count} {state}" for state, count in self._states.items() if state != "complete"]

    def _together(self) -> list[str]:
        """The speed of several workers."""
        return [f"{sum(self._speeds.values()):,.0f} examples/s"] if len(self._speeds) > 1 else []

    def _told_below(self) -> str:
        """What stands below the bars."""
        others = len(self._at_work) - len(self._shown)
        more = f"and {counted(others, 'more worker')}" if others else ""
        return "\n".join(filter(None, (more, self._told_best(SHOWN_RULES))))

    def _told_best(self, rules: int) -> str:
        """The best values so far of so many rules."""
        ranked = sorted(self._best.items(), key=lambda pair: pair[1])
        told = [f"{number(value)} by {rule}" for rule, value in ranked[:rules]]
        return f"best {self._outset.objective} {', '.join(told)}" if told else ""


def _cohort(event: Began) -> str:
    return f"{event.rule} {event.arch} {event.activation}, {counted(event.cells, 'cell')}"
