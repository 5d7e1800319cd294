"""What surrounds the training that a command does: who watches, who is told, how it stops, what it shows."""

import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from bpf import interrupts
from bpf.cli.arguments import TOP, print_json
from bpf.console.screen import tell
from bpf.errors import BpfError, RunError
from bpf.words import counted

if TYPE_CHECKING:
    from bpf.console.progress import LiveProgress
    from bpf.experiment.directory import Experiment
    from bpf.results.summary import Outset
    from bpf.workers.effort import Effort

    Observer = Callable[[Outset], LiveProgress]


def train_all(
    experiment: "Experiment",
    effort: "Effort",
    observe: "Observer",
    retry_failed: bool = False,
    notify: list[str] | None = None,
) -> None:
    from bpf import api
    from bpf.workers.supervisor import Crashed

    directory = shlex.quote(str(experiment.directory))
    resume = f"bpf resume {directory}{f' --on {effort.on}' if effort.on else ''}"

    def told() -> str:
        last = f"Nothing finished is lost. Go on with: {resume}"
        return f"Interrupted at once. {last}" if experiment.begun else interrupts.NOTHING_BEGUN

    with (
        interrupts.interruptible(told, at_once=True),
        _notifying(experiment, notify or []),
        interruptible(f"Go on with: {resume}", lambda: experiment.begun),
    ):
        try:
            api.run(experiment, observe, command_line(), effort, retry_failed)
        except Crashed as error:
            raise Crashed(f"{error} See `bpf status {directory}`; go on with: {resume}") from error


@contextmanager
def _notifying(experiment: "Experiment", targets: list[str]) -> Iterator[None]:
    """Tell the targets how the work ended."""
    from bpf.interrupts import Interrupted
    from bpf.results.notifying import Notifier, summarize

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
                tell(warning)


def check_targets(notify: list[str] | None) -> None:
    from bpf.results.notifying import check

    check(notify or [])


@contextmanager
def interruptible(go_on: str, begun: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Say how to go on after the work was stopped."""
    at_once: list[str] = []

    def told() -> str:
        at_once.append(
            f"Interrupted at once. Nothing finished is lost. {go_on}" if begun() else interrupts.NOTHING_BEGUN
        )
        return at_once[0]

    try:
        with interrupts.interruptible(told):
            yield
    except interrupts.Interrupted as stopped:
        if at_once:
            raise
        raise interrupts.Interrupted(f"{stopped} {go_on}") from None


def observer(quiet: bool, verbose: bool) -> "Observer":
    from bpf.console.progress import LiveProgress

    return lambda outset: LiveProgress(outset, quiet, verbose)


def command_line() -> list[str]:
    """As an experiment remembers it; where notifications go is a secret."""
    from bpf.results.notifying import hidden

    return hidden(["bpf", *sys.argv[1:]])


@contextmanager
def _stored(experiment: "Experiment") -> Iterator[None]:
    """What follows the training can be interrupted as well."""
    directory = shlex.quote(str(experiment.directory))
    told = f"Interrupted. Everything is stored; see it with: bpf status {directory}"
    with interrupts.interruptible(lambda: told, at_once=True):
        yield


def show_ranking(experiment: "Experiment", as_json: bool) -> None:
    if experiment.grid.rows:
        return show_rows(experiment, as_json)
    from bpf.console import tables
    from bpf.experiment.grid import MAX_CELLS
    from bpf.results import summary
    from bpf.study.ranking import as_json as ranked_json

    with _stored(experiment):
        ranking = summary.ranking(experiment, MAX_CELLS if as_json else TOP)
        if as_json:
            print_json(ranked_json(ranking.top, experiment.grid.objective))
        else:
            tables.show_results(ranking, experiment.grid.objective, experiment.directory)
    _raise_for(experiment, ranking.counts["failed"])


def _raise_for(experiment: "Experiment", failed: int) -> None:
    if failed:
        raise RunError(
            f"{counted(failed, 'cell')} failed: see `bpf status {experiment.directory} --failed`; "
            f"`bpf resume {experiment.directory} --retry-failed` tries again."
        )


def show_rows(experiment: "Experiment", as_json: bool) -> None:
    """The rows of an experiment beside what was published, instead of a ranking of what is not alike."""
    from bpf.console import tables
    from bpf.results import published, summary

    with _stored(experiment):
        found = published.compare(experiment)
        if as_json:
            print_json([row.as_json() for row in found])
        else:
            tables.show_rows(found, experiment)
    _raise_for(experiment, summary.status(experiment)["cells"]["failed"])


def show_run(experiment: "Experiment", as_json: bool) -> None:
    from bpf.console import tables
    from bpf.results import summary

    with _stored(experiment):
        report = summary.train_report(experiment)
        print_json(report) if as_json else tables.show_run(report)
