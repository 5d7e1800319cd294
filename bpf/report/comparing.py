"""Rule against rule at equal settings: paired differences and the confidence intervals of their means."""

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from bpf.plan import Row, Value
from bpf.report.tables import complete, executions, objective_of, of_rule, rules_of

CONFIDENCE = 0.95

Score = Callable[[Mapping[str, Any]], float | None]
"""A score of an execution, None where it has none."""


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


def compare(rows: Sequence[Row]) -> list[Comparison]:
    """Every pair of rules with a setting where both have a complete cell.

    A setting is a value of each parameter that both rules have, but for the learning rate. Within it a rule is
    represented by the cell with its best objective, over learning rates and what only this rule has. The
    differences of a setting are paired by seed, and averaged over the seeds that both cells have.
    """
    best = [(rule, complete(of_rule(rows, rule))) for rule in rules_of(rows)]
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
        by_setting = [_paired(one, other, partial(_test, name=name)) for one, other in pairs]
        if any(by_setting):
            scores[name] = _difference([values for values in by_setting if values])
    wins = sum(statistics.fmean(values) < 0 for values in objectives)
    unmatched = len(a.keys() | b.keys()) - len(objectives)
    return Comparison(first, second, len(objectives), wins, unmatched, _difference(objectives), scores)


def _best_by(rows: Iterable[Row], names: Sequence[str]) -> dict[tuple[Value, ...], Row]:
    best: dict[tuple[Value, ...], Row] = {}
    for row in rows:
        setting = tuple(row.params[name] for name in names)
        if setting not in best or objective_of(row) < objective_of(best[setting]):
            best[setting] = row
    return best


def _paired(first: Row, second: Row, score: Score) -> list[float]:
    """Differences of the executions with the same seed, where both have the score."""
    mine, theirs = ({run["seed"]: score(run) for run in executions(row)} for row in (first, second))
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


def _objective(run: Mapping[str, Any]) -> float | None:
    value: float | None = run["objective"]
    return value


def _test(run: Mapping[str, Any], name: str) -> float | None:
    value: float | None = (run["test"] or {}).get(name)
    return value
