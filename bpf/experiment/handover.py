"""The second phase: learning rates found with objective `loss` or `error` go to a grid that tunes regularisation.

A rate belongs to a *setup*: a rule and all its parameters but the learning rate, dropout and weight decay. Only a setup
whose cells are all finished hands one over, since the best of those that happened to be trained first may not be the
best, and a grid that was begun with it could not take the better one later.
"""

import math
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bpf.errors import UsageError
from bpf.experiment import commands
from bpf.experiment.directory import Experiment, Place, open_experiment
from bpf.experiment.grid import Holes, expand, resolve_options, run_fields, setup, setups, words
from bpf.experiment.phases import OBJECTIVES, phase_directory
from bpf.experiment.plugins import load_rules
from bpf.spec.fields import build
from bpf.spec.grid import GridSpec, Rate
from bpf.spec.run import Settings
from bpf.study.cells import OPEN, Row, Value
from bpf.study.ranking import Spread, rank
from bpf.words import counted

LISTED = 20
"""How many setups without a rate a message lists."""
_ANOTHER_PROBLEM = ("dataset", "problem_type")
_NO_MATTER = frozenset(
    {"objective", "seed", "device", "trackers", "tracker_every", "allow_unstable", "options", *_ANOTHER_PROBLEM}
)


@dataclass(frozen=True)
class Handed:
    """What a setup hands over: the learning rate of its best complete cell, whose objective is given over executions.

    `states` counts its cells by state; there are none if it is not in the experiment.
    """

    rule: str
    params: dict[str, Value]
    lr: float | None = None
    objective: Spread | None = None
    states: Mapping[str, int] = field(default_factory=dict)

    @property
    def unfinished(self) -> int:
        """How many of its cells will be trained still."""
        return sum(self.states.get(state, 0) for state in OPEN)

    @property
    def reason(self) -> str:
        """Why there is no learning rate; if there is one, what became of other cells that are not complete."""
        count = sum(self.states.values())
        cells = counted(count, "cell")
        lost = ", ".join(f"{self.states[state]} {state}" for state in ("diverged", "failed") if self.states.get(state))
        if not count:
            return "not trained there"
        if self.unfinished:
            return f"{self.unfinished} of {cells} not finished"
        return f"{lost} of {cells}" if lost else ""

    def as_json(self) -> dict[str, Any]:
        found = {"mean": self.objective.mean, "std": self.objective.std} if self.objective else None
        return {
            "algorithm": self.rule,
            "params": self.params,
            "lr": self.lr,
            "objective": found,
            "reason": self.reason or None,
        }


@dataclass(frozen=True)
class Taken:
    """The grid with the learning rates that it took from `source`, setup by setup in plan order.

    `differences` are settings of the two that are not equal, in words.
    """

    grid: GridSpec
    source: Path
    objective: str
    setups: list[Handed]
    differences: list[str]

    @property
    def handed(self) -> list[Handed]:
        return [one for one in self.setups if one.lr is not None]

    @property
    def missing(self) -> list[Handed]:
        return [one for one in self.setups if one.lr is None]

    def lines(self) -> Iterator[str]:
        """What was taken, what was not and why, for a person. Parameters that never vary are not named."""
        names = _varying(self.setups)
        count = len(self.handed)
        spread = " ± std" if any(one.objective and one.objective.std is not None for one in self.handed) else ""
        over = f", each with its {self.objective} (mean{spread} over executions)" if count else ""
        yield f"{counted(count, 'learning rate')} from {self.source}{over}:"
        for one in self.handed:
            assert one.objective is not None
            yield f"  {_named(one, names)} lr={one.lr:g} ({_scored(self.objective, one)})"
        for one in self.missing:
            yield f"  {_named(one, names)}: left out: {one.reason}"
        if self.differences:
            yield f"settings that differ: {'; '.join(self.differences)}"

    def as_json(self) -> dict[str, Any]:
        return {
            "source": str(self.source),
            "objective": self.objective,
            "handed": [one.as_json() for one in self.handed],
            "missing": [one.as_json() for one in self.missing],
            "differences": self.differences,
        }


def begin(
    directory: Path, grid: GridSpec, lr_from: Path | None, place: Place, data_dir: Path | None = None
) -> tuple[Path, GridSpec, Taken | None]:
    """Where a grid search in `directory` goes, its grid, and what it took over if it is a second phase.

    Learning rates come from `lr_from` or else, if the grid has none, from the earlier phase that is found (see
    `phases`). `place` is that of the grid search; it may know the password of the earlier one's database.
    Raises UsageError if there are none and `data_dir`, where data sets lie, is known: it says which commands find them.
    """
    directory, earlier = phase_directory(directory, grid.objective)
    if grid.awaits_rates and lr_from is None and earlier is None and data_dir is not None:
        _offer_rates(directory, grid, place, data_dir)
    if lr_from is None and not (grid.awaits_rates and earlier):
        return directory, grid, None
    source = open_experiment(lr_from or earlier or directory, Place(place.storage, usual=True))
    taken = resolve(grid, source)
    return directory, taken.grid, taken


def _offer_rates(directory: Path, grid: GridSpec, place: Place, data_dir: Path) -> None:
    """Raise UsageError with the two ways to a learning rate. Other mistakes in the request are told first."""
    asked = commands.fields(grid)  # has the rates that a grid tries if none are given
    resolve_options(grid.model_copy(update={"lr": grid.lr}), load_rules(grid.algorithm))
    stem = directory.name.removesuffix(f"-{grid.objective}")
    first = commands.beside(directory.with_name(stem) if stem else directory, "loss")
    with_first = {name: value for name, value in asked.items() if name != "lr"}
    ways = [
        commands.tune(directory, asked, data_dir, place),
        commands.tune(first, asked | {"objective": "loss", "dropout": [0.0]}, data_dir, replace(place, name=None)),
        commands.tune(directory, with_first, data_dir, place, lr_from=first),
    ]
    if all(ways):
        raise UsageError(
            f"objective {grid.objective} without lr. Tune the learning rate on the held-out examples too:\n"
            f"  {ways[0]}\n"
            "or find that of each setup by training loss first, without dropout, and take it over:\n"
            f"  {ways[1]}\n  {ways[2]}"
        )


def rates(experiment: Experiment) -> list[Handed]:
    """What each setup of an experiment hands over, in plan order.

    Raises UsageError if its objective is not `loss` or `error`, or if nothing is planned in it yet.
    """
    objective = experiment.grid.objective
    if objective not in OBJECTIVES:
        raise UsageError(
            f"{experiment.directory} has the objective {objective}: learning rates are taken from an experiment with "
            "objective loss or error."
        )
    with closing(experiment.read_study()) as study:
        rows = study.rows()
    grouped: dict[tuple[str, frozenset[Any]], list[Row]] = {}
    for row in rows:
        grouped.setdefault(_key(row.rule, setup(row.params)), []).append(row)
    return [_handed(members) for members in grouped.values()]


def _handed(rows: Sequence[Row]) -> Handed:
    found = Handed(rows[0].rule, setup(rows[0].params), states=Counter(row.state for row in rows))
    ranked = rank(rows)
    if not ranked or found.unfinished:
        return found
    return replace(found, lr=ranked[0].row.spec["lr"], objective=ranked[0].objective)


def resolve(grid: GridSpec, source: Experiment) -> Taken:
    """The grid with the learning rate of each of its setups from `source`.

    Setups without one are left out where the grid stays whole. Raises UsageError if it does not, saying which these
    are and which commands train them; and if `source` has another data set or problem.
    """
    for name in _ANOTHER_PROBLEM:
        there, here = getattr(source.grid, name), getattr(grid, name)
        if there != here:
            raise UsageError(
                f"{name} {here} with learning rates from {source.directory}, which has {there}: a learning rate is "
                "tuned for one problem. Take another experiment, or give --lr."
            )
    rules = load_rules(grid.algorithm)
    found = {_key(one.rule, one.params): one for one in rates(source)}
    wanted = [found.get(_key(*one), Handed(*one)) for one in setups(grid, rules)]
    taken = [Rate(algorithm=one.rule, params=one.params, lr=one.lr) for one in wanted if one.lr is not None]
    missing = [one for one in wanted if one.lr is None]
    given = {name: getattr(grid, name) for name in grid.model_fields_set}
    resolved = build(GridSpec, given | {"lr_from": taken})
    try:
        if missing and not taken:
            raise Holes(missing[0].rule, [missing[0].params])
        expand(resolved, rules)
    except Holes:
        raise UsageError(_refusal(source, wanted)) from None
    return Taken(resolved, source.directory, source.grid.objective, wanted, list(_differences(source.grid, grid)))


def _refusal(source: Experiment, wanted: Sequence[Handed]) -> str:
    missing = [one for one in wanted if one.lr is None]
    names = _varying(wanted)
    lines = [f"  {_named(one, names)}: {one.reason}" for one in missing[:LISTED]]
    if len(missing) > LISTED:
        lines.append(f"  ... and {len(missing) - LISTED} more")
    return "\n".join(
        [
            f"{source.directory} has no learning rate for {len(missing)} of {len(wanted)} setups, and a grid must be "
            "whole:",
            *lines,
            "Shorten lists so that these are left out, or train them first:",
            *(f"  {command}" for command in _commands(source, missing)),
        ]
    )


def _commands(source: Experiment, missing: Sequence[Handed]) -> Iterator[str]:
    """What to run so that the missing setups get a learning rate."""
    directory = shlex.quote(str(source.directory))
    if any(one.unfinished for one in missing):
        yield f"bpf resume {directory}"
    if any(one.states.get("failed") for one in missing):
        yield f"bpf resume {directory} --retry-failed"
    absent = [one for one in missing if not one.states]
    diverged = any(set(one.states) == {"diverged"} for one in missing)
    if absent or diverged:
        fields = _grown(source.grid, absent)
        if diverged:
            fields["lr"].append(min(fields["lr"]) / 10)
        if command := commands.extend(source, fields):
            yield command


def _grown(grid: GridSpec, absent: Sequence[Handed]) -> dict[str, Any]:
    """The settings of a grid with lists that grow by setups that it lacks."""
    fields = commands.fields(grid)
    options = fields["options"]
    for one in absent:
        wanted = run_fields(one.rule, one.params) | {"algorithm": one.rule}
        of_rule = options.setdefault(one.rule, {})
        lists = [(of_rule.setdefault(name, []), v) for name, v in wanted.pop("options", {}).get(one.rule, {}).items()]
        for values, value in [*lists, *((fields[name], value) for name, value in wanted.items())]:
            if value not in values:
                values.append(value)
    return fields


def _differences(there: GridSpec, here: GridSpec) -> Iterator[str]:
    """Settings that may make another learning rate the best one, and are not the same in both."""
    for name in Settings.model_fields:
        attribute = "resolved_loss" if name == "output_loss" else name
        before, now = getattr(there, attribute), getattr(here, attribute)
        if name == "examples_frac":
            before, now = before or 1.0, now or 1.0
        if name not in _NO_MATTER and before != now:
            yield f"{name} {before} there, {now} here"


def _key(rule: str, params: Mapping[str, Value]) -> tuple[str, frozenset[Any]]:
    return rule, frozenset(params.items())


def _varying(found: Sequence[Handed]) -> list[str]:
    """The parameters in which setups of a rule differ."""
    values: dict[str, dict[str, set[Value]]] = {}
    for one in found:
        for name, value in one.params.items():
            values.setdefault(name, {}).setdefault(one.rule, set()).add(value)
    return [name for name, by_rule in values.items() if any(len(seen) > 1 for seen in by_rule.values())]


def _named(one: Handed, names: Sequence[str]) -> str:
    return words(one.rule, {name: value for name, value in one.params.items() if name in names})


def _scored(objective: str, one: Handed) -> str:
    """`loss 0.1234 ± 0.0010`, to so many digits that the deviation has two."""
    assert one.objective is not None
    mean, std = one.objective.mean, one.objective.std
    digits = min(12, max(4, 1 - math.floor(math.log10(std)))) if std else 4
    deviation = f" ± {std:.{digits}f}" if std is not None else ""
    return f"{objective} {mean:.{digits}f}{deviation}" + (f"; {one.reason}" if one.reason else "")
