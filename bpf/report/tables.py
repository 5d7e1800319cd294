"""The numbers of a report, from an experiment's cells: no figure and no text is made here.

Only the objective ranks and chooses; test scores are reported of what it chose.
"""

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bpf.plan import OPEN, Row, Value
from bpf.results import Spread

CONFIDENCE = 0.95

Point = tuple[float, float]
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
class Difference:
    """The mean of paired differences and its confidence interval, None where there is one pair only.

    `count` pairs of `over`: settings (each a mean over seeds), or the seeds of the only setting.
    """

    mean: float
    interval: tuple[float, float] | None
    count: int
    over: str


@dataclass(frozen=True)
class Comparison:
    """`first` minus `second` at equal settings: of the objective, and of the test scores by name.

    `wins` counts the settings where `first` has the lower objective; `unmatched` those where only one of the two
    rules has a complete cell.
    """

    first: str
    second: str
    settings: int
    wins: int
    unmatched: int
    objective: Difference
    test: dict[str, Difference]


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
    """Values by two parameters: `values[i][j]` at `rows[i]` and `columns[j]`, None where there is nothing."""

    row: str
    column: str
    rows: list[Value]
    columns: list[Value]
    values: list[list[float | None]]
    counts: list[list[int]]


@dataclass(frozen=True)
class Cost:
    """What a rule costs: seconds of one epoch of one execution over its complete cells, without its trackers."""

    rule: str
    median: float
    fastest: float
    slowest: float
    total: float


def rules_of(rows: Iterable[Row]) -> list[str]:
    """The rules in plan order."""
    return list(dict.fromkeys(row.rule for row in rows))


def of_rule(rows: Iterable[Row], rule: str) -> list[Row]:
    return [row for row in rows if row.rule == rule]


def coverage(rows: Sequence[Row]) -> list[Coverage]:
    counted = []
    for rule in rules_of(rows):
        states = [row.state for row in of_rule(rows, rule)]
        ends = (states.count(state) for state in ("complete", "diverged", "failed"))
        counted.append(Coverage(rule, len(states), *ends, open=sum(state in OPEN for state in states)))
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


def compare(rows: Sequence[Row]) -> list[Comparison]:
    """Every pair of rules with a setting where both have a complete cell.

    A setting is a value of each parameter that both rules have, but for the learning rate. Within it a rule is
    represented by the cell with its best objective, over learning rates and what only this rule has. The
    differences of a setting are paired by seed, and averaged over the seeds that both cells have.
    """
    best = [(rule, _complete(of_rule(rows, rule))) for rule in rules_of(rows)]
    pairs = (_compare(*first, *second) for first, second in itertools.combinations(best, 2))
    return [pair for pair in pairs if pair is not None]


def shared(first: Sequence[Row], second: Sequence[Row]) -> list[str]:
    """The parameters that make a setting for `compare`."""
    return [name for name in first[0].params if name in second[0].params and name != "lr"] if first and second else []


def _compare(first: str, mine: list[Row], second: str, theirs: list[Row]) -> Comparison | None:
    names = shared(mine, theirs)
    a, b = _best_by(mine, names), _best_by(theirs, names)
    pairs = [(a[setting], b[setting]) for setting in a if setting in b]
    objectives = [found for one, other in pairs if (found := _paired(one, other, _objective))]
    if not objectives:
        return None
    scores: dict[str, Difference] = {}
    for name in ("error", "loss"):
        by_setting = [_paired(one, other, lambda run, name=name: _test(run, name)) for one, other in pairs]
        if any(by_setting):
            scores[name] = _difference([values for values in by_setting if values])
    wins = sum(statistics.fmean(values) < 0 for values in objectives)
    unmatched = len(a.keys() | b.keys()) - len(objectives)
    return Comparison(first, second, len(objectives), wins, unmatched, _difference(objectives), scores)


def _best_by(rows: Iterable[Row], names: Sequence[str]) -> dict[tuple[Value, ...], Row]:
    best: dict[tuple[Value, ...], Row] = {}
    for row in rows:
        setting = tuple(row.params[name] for name in names)
        if setting not in best or _value(row) < _value(best[setting]):
            best[setting] = row
    return best


def _paired(first: Row, second: Row, score: Any) -> list[float]:
    """Differences of the executions with the same seed, where both have the score."""
    mine, theirs = ({run["seed"]: score(run) for run in _executions(row)} for row in (first, second))
    both = [(mine[seed], theirs[seed]) for seed in mine if seed in theirs]
    return [a - b for a, b in both if a is not None and b is not None]


def _difference(by_setting: list[list[float]]) -> Difference:
    if len(by_setting) == 1:
        values, over = by_setting[0], "seeds"
    else:
        values, over = [statistics.fmean(setting) for setting in by_setting], "settings"
    return Difference(statistics.fmean(values), t_interval(values), len(values), over)


def t_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """Student's t interval of the mean; None for fewer than two values."""
    if len(values) < 2:
        return None
    mean = statistics.fmean(values)
    half = student(len(values) - 1, confidence) * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def student(freedom: int, confidence: float) -> float:
    """The t with P(|T| < t) = `confidence` for Student's distribution with `freedom` ≥ 1 degrees of freedom."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < confidence else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _within(angle: float, freedom: int) -> float:
    """P(|T| < √freedom tan angle): Abramowitz and Stegun 1964, 26.7.3 and 26.7.4."""
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(3 if odd else 2, freedom - 1, 2):
        term *= math.cos(angle) ** 2 * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total


def band(series: Sequence[Series]) -> Band | None:
    """Mean ± std over executions at each measurement that all of them have; None where there is none.

    A value that was not finite is left out of its mean; where no finite one is left, the mean is nan.
    """
    length = min((len(values) for _, values in series), default=0)
    if not length:
        return None
    at = [[values[i] for _, values in series if values[i] is not None] for i in range(length)]
    spreads = [Spread([value for value in values if value is not None]) for values in at]
    mean = [spread.mean if spread.values else math.nan for spread in spreads]
    std = [spread.std if spread.values else math.nan for spread in spreads] if len(series) > 1 else None
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


def levels(rows: Sequence[Row], parameter: str) -> list[Level]:
    """The best and the median objective over all other parameters, by the values of one."""
    found = []
    for value in values_of(rows, parameter):
        there = [row for row in rows if row.params.get(parameter) == value]
        scores = [_value(row) for row in _complete(there)]
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
    scores = [_value(row) if row.state == "complete" else math.inf for row in ended]
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


def best_map(rows: Sequence[Row], row: str, column: str) -> Map:
    """The best objective over all other parameters, by two parameters of one rule."""
    return _map(rows, row, column, lambda there: min((_value(one) for one in _complete(there)), default=None))


def divergence_map(rows: Sequence[Row], row: str, column: str) -> Map:
    """Which fraction of the cells that ended as complete or diverged has diverged."""

    def fraction(there: list[Row]) -> float | None:
        diverged, complete = _count(there, "diverged"), _count(there, "complete")
        return diverged / (diverged + complete) if diverged + complete else None

    return _map(rows, row, column, fraction)


def _map(rows: Sequence[Row], row: str, column: str, measure: Any) -> Map:
    lines, columns = values_of(rows, row), values_of(rows, column)
    there: dict[tuple[Value, Value], list[Row]] = {(a, b): [] for a in lines for b in columns}
    for one in rows:
        there[one.params[row], one.params[column]].append(one)
    values = [[measure(there[a, b]) for b in columns] for a in lines]
    counts = [[sum(one.state in ("complete", "diverged") for one in there[a, b]) for b in columns] for a in lines]
    return Map(row, column, lines, columns, values, counts)


def costs(rows: Sequence[Row]) -> list[Cost]:
    found = []
    for rule in rules_of(rows):
        mine = of_rule(rows, rule)
        paces = [
            (run["seconds"] - run.get("tracking_seconds", 0.0)) / run["epochs"]
            for row in _complete(mine)
            for run in _executions(row)
        ]
        if paces:
            total = sum(row.result.get("seconds") or 0.0 for row in mine if row.result)
            found.append(Cost(rule, statistics.median(paces), min(paces), max(paces), total))
    return found


def _complete(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row.state == "complete" and row.value is not None and row.result is not None]


def _count(rows: Iterable[Row], state: str) -> int:
    return sum(row.state == state for row in rows)


def _value(row: Row) -> float:
    assert row.value is not None
    return row.value


def _executions(row: Row) -> list[dict[str, Any]]:
    assert row.result is not None
    executions: list[dict[str, Any]] = row.result["executions"]
    return executions


def _objective(run: Mapping[str, Any]) -> float | None:
    value: float | None = run["objective"]
    return value


def _test(run: Mapping[str, Any], name: str) -> float | None:
    value: float | None = (run["test"] or {}).get(name)
    return value
