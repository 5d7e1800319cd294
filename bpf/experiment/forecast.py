"""How long a grid will take: the pace of a few of its cohorts, measured here or known from earlier cells, for all."""

import heapq
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bpf.data.base import Extent
from bpf.experiment.grid import execution
from bpf.experiment.plugins import load_rules
from bpf.spec.run import RunSpec
from bpf.study.cells import Cell, Row
from bpf.training.estimate import PRODUCTS_PER_SECOND, Pace, examples_of, products
from bpf.training.hardware import cohort_cells

LOWEST, HIGHEST = 0.65, 1.7
"""Between these multiples of a measured pace lies that of a worker: cores share caches, and others use them."""
LEAST_SLICE, LONGEST_SLICE = 0.1, 0.5
START_SECONDS, CELL_SECONDS = 3.0, 0.02
"""From the command to the first epoch; and storing a cell with its model."""
SHARE, AIM = 0.05, 0.045
"""Trackers that take a larger share of the time are told, with an interval at which they take less."""
SLOW = 3.0
"""Few machines are so many times slower than the one that `PRODUCTS_PER_SECOND` is from."""


@dataclass(frozen=True)
class Stack:
    """The cells of one structure that are to be trained, `spec` being one of them, and how many make a cohort.

    `executions` are those of all of them that are not done yet, `each` those of a cell; an epoch has so many `examples`
    and, for one execution, so much arithmetic (`products`).
    """

    spec: RunSpec
    cells: Sequence[Cell]
    cohort: int
    executions: int
    each: int
    examples: int
    products: float

    @property
    def cohorts(self) -> int:
        return -(-len(self.cells) // self.cohort)

    def specs(self) -> list[RunSpec]:
        """The executions of its first cohort."""
        runs = [RunSpec.model_construct(**cell.spec) for cell in self.cells[: self.cohort]]
        return [execution(run, number) for run in runs for number in range(self.each)]

    @property
    def work(self) -> float:
        """The arithmetic of all of it."""
        return self.products * self.executions * self.spec.epochs

    @property
    def place(self) -> tuple[float, bool, str]:
        """From small to large."""
        return self.products, self.spec.batch_norm, self.spec.activation


@dataclass(frozen=True)
class Known:
    """The pace of one execution of a structure, which in a worker may be up to `highest` times as long."""

    rule: str
    products: float
    pace: Pace
    highest: float = HIGHEST


@dataclass(frozen=True)
class Forecast:
    """Seconds by the clock that a grid takes with so many `workers`, most likely from `low` to `high`.

    `measured` of its `structures` were measured, or `finished` cells were looked at. Trackers take the `share` of the
    training time; if that is too much, they take `cured` of it with `cure` as their interval.
    """

    estimate: float
    low: float
    high: float
    workers: int
    measured: int
    structures: int
    finished: int
    share: float = 0.0
    cure: str = ""
    cured: float = 0.0

    def as_json(self) -> dict[str, Any]:
        numbers = {name: round(getattr(self, name), 1) for name in ("estimate", "low", "high")}
        return numbers | {"measured": self.measured}

    def tracking_as_json(self) -> dict[str, Any]:
        return {"share": round(self.share, 4), "cure": self.cure or None}


@dataclass(frozen=True)
class Means:
    """What there is to measure with: about `budget` seconds, fewer once all is known to end within `enough`."""

    measure: Callable[[Stack, float], Pace | None]
    budget: float
    enough: float = 0.0


def stacks(
    cells: Iterable[Cell], rows: Iterable[Row], extent: Extent, executions: int, device: torch.device
) -> tuple[dict[str, Stack], int]:
    """What is to be trained of each structure, where `rows` are there already; and the cohorts of all cells."""
    done = {row.key: executions if row.state in ("diverged", "failed") else row.done for row in rows}
    members: dict[str, list[Cell]] = {}
    for cell in cells:
        members.setdefault(cell.structure, []).append(cell)
    specs = {name: RunSpec.model_construct(**alike[0].spec) for name, alike in members.items()}
    rules = load_rules(list(dict.fromkeys(spec.algorithm for spec in specs.values())))
    found, cohorts = {}, 0
    examples: dict[tuple[str, float | None], int] = {}
    for name, alike in members.items():
        spec = specs[name]
        targets = extent.inputs if spec.problem_type == "reconstruction" else extent.classes
        size = cohort_cells(spec, rules[spec.algorithm], executions, extent.inputs, targets, extent.train, device)
        cohorts += -(-len(alike) // size)
        left = {cell.key: max(0, executions - done.get(cell.key, 0)) for cell in alike}
        open_cells = [cell for cell in alike if left[cell.key]]
        skew = spec.skew_type, spec.imbalance_factor
        if skew not in examples:
            examples[skew] = examples_of(spec, extent)
        if open_cells:
            work = products(spec, extent, examples[skew])
            found[name] = Stack(spec, open_cells, size, sum(left.values()), executions, examples[skew], work)
    return found, cohorts


def paces(rows: Iterable[Row], extent: Extent) -> tuple[dict[str, Known], int]:
    """The paces of the structures that have finished cells, and how many cells those are."""
    executions: dict[str, list[dict[str, Any]]] = {}
    specs: dict[str, RunSpec] = {}
    finished = 0
    for row in rows:
        if row.state == "complete" and row.result:
            executions.setdefault(row.structure, []).extend(row.result["executions"])
            specs[row.structure] = RunSpec.model_construct(**row.spec)
            finished += 1
    known = {}
    for name, records in executions.items():
        spec, epochs = specs[name], sum(record["epochs"] for record in records)
        tracking = sum(record.get("tracking_seconds", 0.0) for record in records)
        examples = examples_of(spec, extent)
        measurements = sum(_measurements(spec, examples, record["epochs"]) for record in records)
        pace = Pace((sum(record["seconds"] for record in records) - tracking) / epochs, tracking / max(1, measurements))
        known[name] = Known(spec.algorithm, products(spec, extent, examples), pace)
    return known, finished


def forecast(
    stacks: Mapping[str, Stack],
    earlier: Mapping[str, Known],
    finished: int,
    means: Means,
    workers: int,
    crowding: tuple[float, float] = (1.0, 1.0),
) -> Forecast | None:
    """How long the stacks take, by structure.

    None if nothing of them can be measured in so short a time, or if they will be done within `enough` anyway.
    `earlier` are the paces of `finished` cells; only rules without any are measured. Each of the `workers` takes
    `crowding` times as long as was measured, most likely and at most.
    """
    known, measured, found = dict(earlier), 0, None
    have = {pace.rule for pace in earlier.values()}
    waiting = [name for name in _spanning(stacks) if stacks[name].spec.algorithm not in have]
    if not stacks or sum(stack.work for stack in stacks.values()) * SLOW / workers < means.enough * PRODUCTS_PER_SECOND:
        return None
    if not waiting:
        return _spread(stacks, known, workers, 0, finished)
    end = time.perf_counter() + means.budget
    for number, name in enumerate(waiting):
        left = end - time.perf_counter()
        if (left <= 0 and measured) or (found and found.high < means.enough):
            break
        stack = stacks[name]
        pace = means.measure(stack, max(LEAST_SLICE, min(LONGEST_SLICE, left / (len(waiting) - number))))
        if pace is not None:
            crowded = Pace(pace.epoch * crowding[0], pace.measurement * crowding[0])
            known[name] = Known(stack.spec.algorithm, stack.products, crowded, HIGHEST * crowding[1] / crowding[0])
            measured += 1
            found = _spread(stacks, known, workers, measured, finished)
    return found


def _spanning(stacks: Mapping[str, Stack]) -> list[str]:
    """The structures in the order in which they are worth measuring: each rule's largest, its smallest, the others."""
    by_rule: dict[str, list[str]] = {}
    for name in sorted(stacks, key=lambda name: stacks[name].place):
        by_rule.setdefault(stacks[name].spec.algorithm, []).append(name)
    largest, smallest = [names[-1] for names in by_rule.values()], [names[0] for names in by_rule.values()]
    others = sorted(stacks, key=lambda name: stacks[name].work, reverse=True)
    return list(dict.fromkeys([*largest, *smallest, *others]))


def _spread(
    stacks: Mapping[str, Stack], known: Mapping[str, Known], workers: int, measured: int, finished: int
) -> Forecast:
    durations, lows, highs, training, tracking, once = [], 0.0, 0.0, 0.0, 0.0, 0.0
    for name, stack in stacks.items():
        same = [pace for pace in known.values() if pace.rule == stack.spec.algorithm] or list(known.values())
        pace = known[name].pace if name in known else _between(stack.products, same)
        spreading = [known[name]] if name in known else same if len(same) > 1 else list(known.values())
        rates = [one.pace.epoch / one.products for one in spreading]
        epochs, alone = stack.executions * stack.spec.epochs, stack.executions * pace.measurement
        trained, tracked = epochs * pace.epoch, alone * _measurements(stack.spec, stack.examples, stack.spec.epochs)
        stored = CELL_SECONDS * len(stack.cells)
        durations += [(trained + tracked + stored) / stack.cohorts] * stack.cohorts
        lows += min(trained, epochs * min(rates) * stack.products) * LOWEST
        highs += max(trained, epochs * max(rates) * stack.products) * max(one.highest for one in spreading)
        training, tracking, once = training + trained, tracking + tracked, once + alone
    whole, together = _makespan(durations, workers), max(sum(durations), 1e-9)
    low, high = (whole * (bound + tracking * of) / together for bound, of in ((lows, LOWEST), (highs, HIGHEST)))
    share = tracking / max(training + tracking, 1e-9)
    cure, cured = _cure(stacks, training, once) if share > SHARE else ("", 0.0)
    return Forecast(
        START_SECONDS + whole,
        START_SECONDS * LOWEST + low,
        START_SECONDS * HIGHEST + high,
        min(workers, max(1, len(durations))),
        measured,
        len(stacks),
        finished,
        share,
        cure,
        cured,
    )


def _between(size: float, known: Iterable[Known]) -> Pace:
    """The pace of a structure with so much arithmetic from those of others.

    Between two of them on a line in logarithms, beyond them in proportion.
    """
    alike: dict[float, list[Pace]] = {}
    for one in known:
        alike.setdefault(one.products, []).append(one.pace)
    points = [
        (at, sum(p.epoch for p in paces) / len(paces), sum(p.measurement for p in paces) / len(paces))
        for at, paces in sorted(alike.items())
    ]
    number = next((number for number, (at, *_) in enumerate(points) if at >= size), len(points) - 1)
    above, epoch, measurement = points[number]
    if number == 0 or above <= size:
        return Pace(epoch * size / above, measurement * size / above)
    below = points[number - 1]
    share = math.log(size / below[0]) / math.log(above / below[0])
    return Pace(_power(below[1], epoch, share), _power(below[2], measurement, share))


def _power(low: float, high: float, share: float) -> float:
    return low ** (1 - share) * high**share if low > 0 and high > 0 else low + share * (high - low)


def _makespan(durations: Iterable[float], workers: int) -> float:
    """When the last of the workers is done, of which each takes the next cohort as soon as it is free."""
    free = [0.0] * workers
    for duration in durations:
        heapq.heapreplace(free, free[0] + duration)
    return max(free)


def _intervals(spec: RunSpec, examples: int, epochs: int) -> int:
    """What `tracker_every` counts: epochs, or steps."""
    return epochs * (1 if spec.tracking[0] == "epochs" else math.ceil(examples / spec.batch_size))


def _measurements(spec: RunSpec, examples: int, epochs: int) -> int:
    """How often an execution is measured: before training, and after each interval."""
    return 1 + _intervals(spec, examples, epochs) // spec.tracking[1] if spec.trackers else 0


def _cure(stacks: Mapping[str, Stack], training: float, once: float) -> tuple[str, float]:
    """The interval of trackers with which they take less than `SHARE`, or as little as they can; and the share then.

    `once` are the seconds of one measurement of every execution.
    """
    unit = next(iter(stacks.values())).spec.tracking[0]
    intervals = max(_intervals(stack.spec, stack.examples, stack.spec.epochs) for stack in stacks.values())
    allowed = max(2, int(AIM / (1 - AIM) * training / once))
    interval = intervals // allowed + 1 if allowed > 2 else intervals
    if unit == "steps" and interval > 100:
        interval = math.ceil(interval / 100) * 100
    tracking = once * (1 + intervals // interval)
    return (f"{interval}" if unit == "epochs" else f'"{interval} steps"'), tracking / (training + tracking)
