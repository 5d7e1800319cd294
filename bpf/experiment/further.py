"""What to try next where a rule's winner lies at the edge of its grid, as commands."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from bpf.errors import BpfError
from bpf.experiment import commands
from bpf.experiment.directory import Experiment, Place
from bpf.experiment.grid import NO_SETUP
from bpf.experiment.phases import source
from bpf.experiment.plugins import load_rules
from bpf.spec.fields import Limits, limits
from bpf.spec.grid import GridSpec
from bpf.study.cells import OPEN, Value
from bpf.study.edges import EPOCHS, Edge, find
from bpf.study.ranking import Ranked
from bpf.study.view import StudyView


@dataclass(frozen=True)
class Further:
    """The edges at which winners lie, and the commands that go beyond them, by what they do."""

    edges: list[Edge] = field(default_factory=list)
    commands: dict[str, str] = field(default_factory=dict)


def further(experiment: Experiment, study: StudyView, winners: Sequence[Ranked]) -> Further:
    """Where the best cell of each rule lies at an edge. A rule with cells that are not finished has no winner yet.

    Rows have no edges: their settings are somebody else's. In a grid that took its learning rates from an earlier phase
    only what regularises counts: the rest needs rates.
    """
    if experiment.kind != "tune" or experiment.grid.rows:
        return Further()
    unfinished = {tally.rule for tally in study.tally() if tally.state in OPEN}
    ended = [winner for winner in winners if winner.row.rule not in unfinished]
    tried = {winner.row.rule: _tried(experiment, study, winner.row.rule) for winner in ended}
    edges = find(ended, tried, _limits)
    return Further(edges, dict(_commands(experiment, study, edges)) if edges else {})


def _tried(experiment: Experiment, study: StudyView, rule: str) -> Mapping[str, Sequence[Value]]:
    found = {axis.name: axis.values for axis in study.axes(rule)}
    return {name: values for name, values in found.items() if not experiment.grid.lr_from or name in NO_SETUP}


def _limits(rule: str, name: str) -> Limits | None:
    if not name.startswith(f"{rule}."):
        return limits(GridSpec, name)
    with suppress(BpfError):  # a rule that is not installed here
        return limits(load_rules([rule])[rule].Options, name.removeprefix(f"{rule}."))
    return None


def _commands(experiment: Experiment, study: StudyView, edges: Sequence[Edge]) -> Iterator[tuple[str, str]]:
    settings = commands.fields(experiment.grid)
    earlier = source(experiment) if experiment.grid.lr_from else None
    if experiment.grid.lr_from and earlier is None:
        return
    values = [edge for edge in edges if edge.parameter != EPOCHS]
    epochs = max((edge.beyond for edge in edges if edge.parameter == EPOCHS), default=None)
    for edge in values:
        listed = _list(settings, edge)
        if edge.beyond not in listed:
            listed.append(edge.beyond)
    longer = settings | {"epochs": epochs}
    here = epochs is not None and _can_grow(experiment, study)
    if (values or here) and (command := commands.extend(experiment, longer if here else settings, earlier)):
        yield "Go beyond these edges in the same experiment", command
    if epochs is not None and not here:
        place = commands.place_of(experiment)
        shared = experiment.files.parent if experiment.files != experiment.directory else None
        place = Place(place.storage, None, shared, keep_checkpoints=True, usual=place.usual)
        directory = commands.beside(experiment.directory, f"{epochs}-epochs")
        if command := commands.tune(directory, longer, experiment.data_dir, place, earlier):
            yield "Train for longer in a new experiment (this one kept no checkpoints that could go on)", command


def _list(settings: Mapping[str, Any], edge: Edge) -> list[Any]:
    rule, dot, option = edge.parameter.partition(".")
    found: list[Any] = settings["options"][rule][option] if dot else settings[edge.parameter]
    return found


def _can_grow(experiment: Experiment, study: StudyView) -> bool:
    """Whether there are checkpoints from which all finished cells can go on for more epochs."""
    if not experiment.keep_checkpoints:
        return False
    return all(experiment.can_go_on(row) for row in study.rows(state="complete") if row.ran_to_the_end)
