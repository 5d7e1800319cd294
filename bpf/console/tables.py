"""The tables and texts that commands print."""

import datetime
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from rich.table import Table

from bpf.console.screen import one_line, out, say
from bpf.results import published
from bpf.spec.grid import GridSpec
from bpf.study.cells import Row
from bpf.study.ranking import Ranked, tracking_share
from bpf.words import SHORT, counted, describe, duration, number, percent, plus_minus, word

if TYPE_CHECKING:
    from bpf.api import Planned
    from bpf.experiment.directory import Experiment
    from bpf.experiment.further import Further
    from bpf.experiment.handover import Taken
    from bpf.results.published import Comparison
    from bpf.results.summary import Ranking

LONG_SECONDS = 60.0
"""In a shorter grid nobody need care what trackers cost."""
SHOWN_WORKERS = 8
"""With more of them `bpf status` has a line for each node."""


def show_plan(planned: "Planned", spec: GridSpec, directory: Path, dry_run: bool) -> None:
    """How many cells, executions and cohorts each rule has, on what, for how long, and what was left out and why."""
    grid, cohorts, executions = planned.grid, planned.cohorts, spec.executions_per_trial
    counts = Counter(cell.rule for cell in grid.cells)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("rule", "cells", "executions", "grid"):
        table.add_column(name, justify="left" if name in ("rule", "grid") else "right", overflow="fold")
    for rule, axes in grid.axes.items():
        sizes = [f"{len(axis.values)} {SHORT.get(axis.name, axis.name)}" for axis in axes if len(axis.values) > 1]
        table.add_row(rule, str(counts[rule]), str(counts[rule] * executions), " × ".join(sizes) or "one cell")
    out.print(table)
    made = "cells of equal structure, stacked and trained together"
    stacked = f", trained in about {counted(cohorts, 'cohort')} ({made})" if cohorts else ""
    say(f"{counted(len(grid.cells), 'cell')} of {counted(executions, 'execution')}{stacked}; experiment in {directory}")
    used = f"{100 * (spec.examples_frac or 1):g} % of the training images of {spec.dataset} (--examples-frac)"
    say(f"on {used}, {f'of which {100 * spec.val_frac:g} % are held out' if spec.val_frac else 'none held out'}")
    for line in _time(planned, dry_run):
        say(line)
    for left in grid.left_out:
        say(f"left out: {counted(left.cells, 'cell')} of {left.rule} ({left.reason})")


def _time(planned: "Planned", dry_run: bool) -> Iterator[str]:
    """How long a plan takes, and what trackers cost of it if that is much."""
    forecast = planned.forecast
    if forecast is None:
        if planned.done:
            yield "nothing is left to train"
        elif dry_run and planned.cohorts is None:
            yield "how long it takes is not known before the data set has been read"
        return
    structures = f"{forecast.measured} of {counted(forecast.structures, 'structure')}"
    known = f"measured on this machine for {structures}" if forecast.measured else ""
    earlier = f"known from {counted(forecast.finished, 'finished cell')}" if forecast.finished else ""
    low, high = duration(forecast.low), duration(forecast.high)
    if low.count(" ") == high.count(" ") == 1 and low.split()[1] == high.split()[1]:
        low = low.split()[0]
    yield (
        f"about {duration(forecast.estimate)} with {counted(forecast.workers, 'worker')} ({low} to {high}), "
        f"{' and '.join(filter(None, (earlier, known)))}"
    )
    if forecast.cure and forecast.high >= LONG_SECONDS:
        brings = "below 5 %" if forecast.cured < 0.05 else f"to {percent(forecast.cured)}"
        yield (
            f"trackers take about {percent(forecast.share)} of the training time; "
            f"--tracker-every {forecast.cure} brings that {brings}"
        )


def show_taken(taken: "Taken") -> None:
    """Which learning rates a second phase has, and from where."""
    for line in taken.lines():
        say(line)


def show_results(ranking: "Ranking", objective: str, directory: Path, rules: Sequence[str] = ()) -> None:
    """The ranked cells of the experiment in `directory`, and each rule's winner on the test set.

    `rules` are those that were asked for, if not all.
    """
    counts = ranking.counts
    if not ranking.top:
        say(f"No complete cell yet ({', '.join(f'{count} {state}' for state, count in counts.items() if count)}).")
        return
    out.print()
    out.print(_table(f"Ranked by {objective}", ranking.top, ranking.varying, objective, test=False))
    if counts["complete"] > len(ranking.top):
        rest = counts["complete"] - len(ranking.top)
        only = f" --algorithm {','.join(rules)}" if rules else ""
        say(f"... and {rest} more; see `bpf best {quote(str(directory))}{only} --top {counts['complete']}`.")
    out.print()
    title = "The winner of each rule on the test set"
    out.print(_table(title, ranking.winners, ranking.varying, objective, test=True))
    spread = _spread(ranking.top)
    others = [f"{counts[state]} {state}" for state in ("diverged", "failed") if counts[state]]
    say(f"{spread}; {counted(counts['complete'], 'cell')} complete{''.join(f', {o}' for o in others)}.")
    share = tracking_share({entry.row.key: entry.row for entry in (*ranking.top, *ranking.winners)}.values())
    if share is not None:
        say(f"trackers took {percent(share)} of the training time of these cells.")
    if ranking.failure:
        last = (ranking.failure.error or "").strip().splitlines()[-1]
        varying = {name: value for name, value in ranking.failure.chosen.items() if name in ranking.varying}
        say(f"first failure: {' '.join(filter(None, (ranking.failure.rule, describe(varying))))}: {last}")
    _show_further(ranking.further)


def _show_further(further: "Further") -> None:
    if further.edges:
        say("Winners at the edge of what was tried, so that better ones may lie beyond:")
    for edge in further.edges:
        say(f"  {edge}")
    for what, command in further.commands.items():
        say(f"{what}:\n  {command}")


def show_best_per(ranked: Sequence[Ranked], names: Sequence[str], varying: Collection[str], objective: str) -> None:
    """The best cell of each rule for each combination of some parameters, with all that vary."""
    if ranked:
        shown = {*names, *varying}
        out.print(_table(f"The best by {objective} per {', '.join(names)}", ranked, shown, objective, test=False))
        say(f"{_spread(ranked)}.")
    else:
        say("No complete cell yet.")


def show_rows(found: "Sequence[Comparison]", experiment: "Experiment") -> None:
    """Rows beside what was published for them, and what their sources leave open."""
    table = Table(title="Published and ours", title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name in published.HEAD:
        table.add_column(name, justify="left" if name in ("row", "std of") else "right", overflow="fold")
    for line in published.lines(found):
        table.add_row(*line)
    out.print(table)
    for note in published.notes(experiment.grid, found):
        say(note)
    say(f"Sources, and what they leave open: bpf report {quote(str(experiment.directory))}")


def _spread(ranked: Sequence[Ranked]) -> str:
    executions = len(ranked[0].objective.values)
    return f"mean ± std over {executions} executions" if executions > 1 else "one execution"


def _table(title: str, ranked: Sequence[Ranked], names: Collection[str], objective: str, test: bool) -> Table:
    """Cells with the parameters `names`, or all of them if there is none that varies."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="bold")
    if not test:  # which ranks nothing
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
            *([] if test else [str(place)]),
            entry.row.rule,
            *(plus_minus(name, entry.test[name]) for name in measured),
            *([] if test else [plus_minus(objective, entry.objective)]),
            "-".join(map(str, epochs)),
            describe({name: value for name, value in entry.row.chosen.items() if not names or name in names}),
        )
    return table


def show_status(status: dict[str, Any]) -> None:
    """Cells by state, what troubled them, who works on them, how long the rest will take, and what it has cost."""
    cells, starting = status["cells"], status["starting"]
    if starting and not cells["total"]:
        say(f"{status['experiment']}: starting for {_age(starting)}, nothing is planned yet")
        return
    parts = [f"{count} {state}" for state, count in cells.items() if state != "total" and count]
    say(f"{status['experiment']}: {counted(cells['total'], 'cell')}: {', '.join(parts) or 'none planned'}")
    for cause, states in status["causes"].items():
        say(f"{CAUSES[cause]}: {', '.join(f'{count} {_now(state)}' for state, count in states.items())}")
    for line in _workers(status):
        say(line)
    if starting:
        say(f"starting for {_age(starting)}, no worker is there yet")
    left = status["eta_seconds"]
    rest = "finished" if left == 0 else "time left not known yet" if left is None else f"about {duration(left)} left"
    if left and not status["workers"]:
        rest += " for one worker"
    say(f"{duration(status['elapsed_seconds'])} of training in finished cells, {rest}")
    workers, hours = len(status["workers"]), status["device_hours"] or 0.0
    at_work = f"{counted(workers, 'worker') if workers else 'no worker'} at work"
    spent = f"{hours:,.{2 if hours < 10 else 1}f}" if hours >= 0.01 else "less than 0.01"
    cost = "" if status["device_hours"] is None else f"{spent} device-hours so far"
    say(", ".join(filter(None, (at_work, _speed(status), cost))))


def _workers(status: dict[str, Any]) -> Iterator[str]:
    """A line for each worker, or for each node if there are many."""
    workers, nodes = status["workers"], status["nodes"]
    if len(workers) > SHOWN_WORKERS or len(nodes) > 1:
        for node in nodes:
            there = (counted(node["workers"], "worker"), *node["devices"], _speed(node))
            yield f"node {node['name'] or '?'}: {', '.join(filter(None, there))}"
        yield f"each worker: bpf status {quote(status['experiment'])} --json"
    else:
        for worker in workers:
            who = f"worker on {worker.get('host', '?')}, process {worker['pid']}, {worker.get('device', '?')}"
            yield f"{who}: {_told(worker['progress'])}" if worker["progress"] else who
    if status["dashboard"]:
        yield f"Ray's dashboard: http://{status['dashboard']}"


def _speed(of: dict[str, Any]) -> str:
    return f"{of['throughput']:,.0f} examples/s" if of["throughput"] else ""


def _age(moment: str) -> str:
    then = datetime.datetime.fromisoformat(moment)
    return duration(max(0.0, (datetime.datetime.now(datetime.UTC) - then).total_seconds()))


def _told(progress: dict[str, Any]) -> str:
    """How far a worker is with its cohort, in one line."""
    what = " ".join(progress[name] for name in ("rule", "arch", "activation"))
    stacked = f"{counted(progress['executions'], 'execution')} stacked"
    speed = f", {progress['speed']:,.0f} examples/s" if progress["speed"] else ""
    how_far = f"epoch {progress['epoch']} of {progress['epochs']}{speed}"
    return f"{what}, {counted(progress['cells'], 'cell')}, {stacked}: {how_far}"


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
        table.add_column(one_line(name), justify="right")
    for name, counts in zip(scores["classes"], scores["confusion"], strict=True):
        table.add_row(one_line(name), *(str(count) if count else "." for count in counts))
    out.print(table)


def show_predictions(found: Sequence[dict[str, Any]]) -> None:
    """A line for each image and class, or for each image that was written."""
    for one in found:
        score = one.get("probability", one.get("score"))
        told = f"-> {one['output']}" if "output" in one else f"{one['class']}  {100 * float(score or 0):.1f} %"
        say(one_line(f"{one['file']}  {told}"))


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
