"""The numbers of a report, from an experiment's cells: no figure and no text is made here.

Only the objective ranks and chooses; test scores are reported of what it chose.
"""

import itertools
import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bpf.study.cells import OPEN, Row, Value
from bpf.study.ranking import tracking_share

Series = tuple[Sequence[float], Sequence[float | None]]
"""The epochs of measurements, and their values; None where one was not finite."""


@dataclass(frozen=True)
class Coverage:
    """How many cells of a rule are planned, and what became of them; `open` counts those that run as well."""

    rule: str
    planned: int
    complete: int
    diverged: int
    failed: int
    open: int


@dataclass(frozen=True)
class Band:
    """Mean and sample standard deviation over executions along `x`; `std` is None for a single execution.

    `cut` says whether executions that went on for longer were cut to the length of the shortest.
    """

    x: list[float]
    mean: list[float]
    std: list[float] | None
    cut: bool = False


@dataclass(frozen=True)
class Level:
    """A parameter at one value: best and median objective of its complete cells (None without any)."""

    value: Value
    best: float | None
    median: float | None
    complete: int
    diverged: int


@dataclass(frozen=True)
class Effect:
    """What a parameter does: the mean place of its values' cells, from 0 (all the best) to 1 (all the worst).

    `size` is the difference between the largest and the smallest of them.
    """

    parameter: str
    places: dict[Value, float]

    @property
    def size(self) -> float:
        return max(self.places.values()) - min(self.places.values())


@dataclass(frozen=True)
class Map:
    """Values by two parameters: `values[i][j]` at `rows[i]` and `columns[j]`, None where there is nothing.

    `counts` are those of the cells there that ended as complete or diverged.
    """

    row: str
    column: str
    rows: list[Value]
    columns: list[Value]
    values: list[list[float | None]]
    counts: list[list[int]]


@dataclass(frozen=True)
class Cost:
    """What a rule costs: seconds of one epoch of one execution over its complete cells, without its trackers.

    `total` is the time of all its cells, with trackers, which took the part `tracking` of it; None without trackers.
    """

    rule: str
    median: float
    fastest: float
    slowest: float
    total: float
    tracking: float | None


def rules_of(rows: Iterable[Row]) -> list[str]:
    """The rules in plan order."""
    return list(dict.fromkeys(row.rule for row in rows))


def of_rule(rows: Iterable[Row], rule: str) -> list[Row]:
    return [row for row in rows if row.rule == rule]


def coverage(rows: Sequence[Row]) -> list[Coverage]:
    counted = []
    for rule in rules_of(rows):
        states = [row.state for row in of_rule(rows, rule)]
        complete, diverged, failed = (states.count(state) for state in ("complete", "diverged", "failed"))
        unfinished = sum(state in OPEN for state in states)
        counted.append(Coverage(rule, len(states), complete, diverged, failed, unfinished))
    return counted


def values_of(rows: Iterable[Row], parameter: str) -> list[Value]:
    """The values of a parameter that some cell has: numbers in order, words in plan order."""
    found = list(dict.fromkeys(row.params[parameter] for row in rows if parameter in row.params))
    numbers = [value for value in found if isinstance(value, int | float)]
    return sorted(found, key=float) if len(numbers) == len(found) else found


def varying(rows: Iterable[Row]) -> list[str]:
    """The parameters in which cells differ."""
    seen: dict[str, set[Value]] = {}
    for row in rows:
        for name, value in row.params.items():
            seen.setdefault(name, set()).add(value)
    return [name for name, values in seen.items() if len(values) > 1]


def band(series: Sequence[Series]) -> Band | None:
    """Mean ± std over executions at each measurement that all of them have; None where there is none.

    A value that was not finite is left out; of no value the mean is nan, and of a single one the deviation.
    """
    length = min((len(values) for _, values in series), default=0)
    if not length:
        return None
    at = [[value for _, values in series if (value := values[i]) is not None] for i in range(length)]
    mean = [statistics.fmean(values) if values else math.nan for values in at]
    std = [statistics.stdev(values) if len(values) > 1 else math.nan for values in at] if len(series) > 1 else None
    return Band(list(series[0][0][:length]), mean, std, any(len(values) > length for _, values in series))


def curves(records: Sequence[Mapping[str, Any]], name: str) -> list[Series]:
    """A score of each complete execution that has it, one value per epoch."""
    found = (run["history"].get(name) for run in records if run["status"] == "complete")
    return [(range(1, len(values) + 1), values) for values in found if values]


def tracked(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[Series]]]:
    """What trackers measured of the complete executions, by tracker (`bp_cosine`) and name (`layer.0`).

    Older experiments have one value per epoch among the scores.
    """
    found: dict[str, dict[str, list[Series]]] = {}
    for run in records:
        if run["status"] != "complete":
            continue
        measured = {name: values for name, values in run["history"].items() if "/" in name}
        series = {name: (range(1, len(values) + 1), values) for name, values in measured.items()}
        new = run.get("tracked") or {}
        series |= {name: (new["epoch"], values) for name, values in new.items() if "/" in name}
        for full, one in series.items():
            tracker, _, name = full.partition("/")
            found.setdefault(tracker, {}).setdefault(name, []).append(one)
    return found


def place(name: str, hidden: int) -> tuple[str, int | None, str]:
    """What a tracker's value is of: a statistic, the layer's index (None for the output) and the layer in words.

    Of a network with `hidden` hidden layers, so that `layer.1.mean` is the mean of `hidden 2` or of `output`, and
    `weight.0` the weight of `hidden 1`. A name of another form is a statistic of the whole network.
    """
    found = re.fullmatch(r"([^.]+)\.(\d+)(?:\.(.+))?", name)
    if found is None or int(found[2]) > hidden:
        return name, None, "network"
    statistic = found[3] or ("" if found[1] == "layer" else found[1])
    index = int(found[2])
    return (statistic, None, "output") if index == hidden else (statistic, index, f"hidden {index + 1}")


def levels(rows: Sequence[Row], parameter: str) -> list[Level]:
    """The best and the median objective over all other parameters, by the values of one."""
    found = []
    for value in values_of(rows, parameter):
        there = [row for row in rows if row.params.get(parameter) == value]
        scores = [objective_of(row) for row in complete(there)]
        best, median = (min(scores), statistics.median(scores)) if scores else (None, None)
        found.append(Level(value, best, median, len(scores), _count(there, "diverged")))
    return found


def effects(rows: Sequence[Row]) -> list[Effect]:
    """The effect of each parameter of one rule that varies, largest first.

    Cells are placed by objective, from 0 to 1; equal ones share the mean of their places, and diverged ones come
    last, together. Cells that failed or are not finished have no place.
    """
    ended = [row for row in rows if row.state in ("complete", "diverged")]
    if len(ended) < 2:
        return []
    scores = [objective_of(row) if row.state == "complete" else math.inf for row in ended]
    places = _places(scores)
    found = []
    for parameter in varying(ended):
        by_value: dict[Value, list[float]] = {value: [] for value in values_of(ended, parameter)}
        for row, place in zip(ended, places, strict=True):
            by_value[row.params[parameter]].append(place)
        found.append(Effect(parameter, {value: statistics.fmean(mine) for value, mine in by_value.items()}))
    return sorted(found, key=lambda effect: -effect.size)


def _places(scores: Sequence[float]) -> list[float]:
    order = sorted(range(len(scores)), key=scores.__getitem__)
    places = [0.0] * len(scores)
    begin = 0
    for _, group in itertools.groupby(order, key=scores.__getitem__):
        alike = list(group)
        middle = begin + (len(alike) - 1) / 2
        for index in alike:
            places[index] = middle / (len(scores) - 1)
        begin += len(alike)
    return places


def best_map(rows: Sequence[Row], row: str, column: str, among: Sequence[Row] | None = None) -> Map:
    """The best objective over all other parameters, by two parameters of one rule.

    It has the values of these that some cell of `among` has, which is `rows` unless given.
    """
    lines, columns = (values_of(rows if among is None else among, name) for name in (row, column))
    return _map(
        rows, (row, lines), (column, columns), lambda there: min(map(objective_of, complete(there)), default=None)
    )


def divergence_map(rows: Sequence[Row], row: str, column: str) -> Map:
    """Which fraction of the cells that ended as complete or diverged has diverged."""

    def fraction(there: list[Row]) -> float | None:
        diverged, complete = _count(there, "diverged"), _count(there, "complete")
        return diverged / (diverged + complete) if diverged + complete else None

    return _map(rows, (row, values_of(rows, row)), (column, values_of(rows, column)), fraction)


def _map(
    rows: Sequence[Row],
    row: tuple[str, list[Value]],
    column: tuple[str, list[Value]],
    measure: Callable[[list[Row]], float | None],
) -> Map:
    there: dict[tuple[Value, Value], list[Row]] = {at: [] for at in itertools.product(row[1], column[1])}
    for one in rows:
        there[one.params[row[0]], one.params[column[0]]].append(one)
    values = [[measure(there[a, b]) for b in column[1]] for a in row[1]]
    counts = [[sum(one.state in ("complete", "diverged") for one in there[a, b]) for b in column[1]] for a in row[1]]
    return Map(row[0], column[0], row[1], column[1], values, counts)


def costs(rows: Sequence[Row]) -> list[Cost]:
    found = []
    for rule in rules_of(rows):
        mine = of_rule(rows, rule)
        paces = [
            (run["seconds"] - run.get("tracking_seconds", 0.0)) / run["epochs"]
            for row in complete(mine)
            for run in executions(row)
        ]
        if paces:
            total = sum(row.result.get("seconds") or 0.0 for row in mine if row.result)
            share = tracking_share(complete(mine))
            found.append(Cost(rule, statistics.median(paces), min(paces), max(paces), total, share))
    return found


def complete(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row.state == "complete" and row.value is not None and row.result is not None]


def _count(rows: Iterable[Row], state: str) -> int:
    return sum(row.state == state for row in rows)


def objective_of(row: Row) -> float:
    assert row.value is not None
    return row.value


def executions(row: Row) -> list[dict[str, Any]]:
    assert row.result is not None
    executions: list[dict[str, Any]] = row.result["executions"]
    return executions
