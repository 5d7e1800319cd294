"""Rule against rule at equal settings: paired differences and the confidence intervals of their means.

The settings are those of the grid, all of them, and fixed; the seeds are a random sample. Differences of the same seed
at several settings are not independent, as they share what the seed draws, so they are one observation: their mean.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from bpf.report.tables import complete, executions, objective_of, of_rule, rules_of
from bpf.study.cells import Row, Value

CONFIDENCE = 0.95
ENOUGH = 3
"""Of fewer seeds Student's interval says nothing: of two it is 13 times as wide as their distance."""

Score = Callable[[Mapping[str, Any]], float | None]
"""A score of an execution, None where it has none."""


@dataclass(frozen=True)
class Difference:
    """The mean over seeds of the mean difference over settings, and its confidence interval over seeds.

    `settings` counts those where both rules have the score; `seeds` those that all of these settings have in the cells
    of both rules. The interval is None for fewer seeds than `ENOUGH`. Without a common seed the mean is that over
    settings of their means.
    """

    mean: float
    interval: tuple[float, float] | None
    seeds: int
    settings: int


@dataclass(frozen=True)
class Comparison:
    """`first` minus `second` at equal settings: of the objective, and of the test scores by name.

    `settings` are decided, `lost` of them because the first or the second rule diverged, and `wins` of them for
    `first`. `left_out` are not decided. The differences are those of the settings where both rules are complete;
    the objective's is None where there is no such setting.
    """

    first: str
    second: str
    settings: int
    wins: int
    lost: tuple[int, int]
    left_out: int
    objective: Difference | None
    test: dict[str, Difference]


def compare(rows: Sequence[Row]) -> list[Comparison]:
    """Every pair of rules with a setting that is decided between them.

    A setting is a value of each parameter that both rules have, but for the learning rate. Within it a rule is
    represented by its complete cell with the best objective, over learning rates and what only this rule has. The
    differences of a setting are paired by seed; `wins` counts those whose mean over their seeds is for the first rule.

    A rule that has cells at a setting, all of them diverged, has lost it to one with a complete cell there. Settings
    where both diverged, or one has no cell, or none that is complete and some that failed or are not finished, are
    left out.
    """
    by_rule = [(rule, of_rule(rows, rule)) for rule in rules_of(rows)]
    pairs = (_compare(*first, *second) for first, second in itertools.combinations(by_rule, 2))
    return [pair for pair in pairs if pair.settings]


def _compare(first: str, mine: list[Row], second: str, theirs: list[Row]) -> Comparison:
    names = [name for name in mine[0].params if name in theirs[0].params and name != "lr"]
    a, b = _by_setting(mine, names), _by_setting(theirs, names)
    settings = list(dict.fromkeys([*a, *b]))
    cells = {at: (_best(a.get(at, [])), _best(b.get(at, []))) for at in settings}
    both = [(one, other) for one, other in cells.values() if one and other]
    objectives = [found for one, other in both if (found := _paired(one, other, _objective))]
    lost_first = sum(other is not None and _diverged(a.get(at, [])) for at, (_, other) in cells.items())
    lost_second = sum(one is not None and _diverged(b.get(at, [])) for at, (one, _) in cells.items())
    scores: dict[str, Difference] = {}
    for name in ("error", "loss"):
        differences = [found for one, other in both if (found := _paired(one, other, partial(_test, name=name)))]
        if differences:
            scores[name] = _difference(differences)
    decided = len(objectives) + lost_first + lost_second
    return Comparison(
        first,
        second,
        decided,
        wins=sum(statistics.fmean(by_seed.values()) < 0 for by_seed in objectives) + lost_second,
        lost=(lost_first, lost_second),
        left_out=len(settings) - decided,
        objective=_difference(objectives) if objectives else None,
        test=scores,
    )


def _by_setting(rows: Iterable[Row], names: Sequence[str]) -> dict[tuple[Value, ...], list[Row]]:
    found: dict[tuple[Value, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row.params[name] for name in names), []).append(row)
    return found


def _best(rows: Iterable[Row]) -> Row | None:
    return min(complete(rows), key=objective_of, default=None)


def _diverged(rows: Sequence[Row]) -> bool:
    return bool(rows) and all(row.state == "diverged" for row in rows)


def _paired(first: Row, second: Row, score: Score) -> dict[int, float]:
    """Differences of the executions with the same seed, by seed, where both have the score."""
    mine, theirs = ({run["seed"]: score(run) for run in executions(row)} for row in (first, second))
    both = {seed: (mine[seed], theirs[seed]) for seed in mine if seed in theirs}
    return {seed: a - b for seed, (a, b) in both.items() if a is not None and b is not None}


def _difference(by_setting: Sequence[Mapping[int, float]]) -> Difference:
    common = [seed for seed in by_setting[0] if all(seed in by_seed for by_seed in by_setting)]
    if not common:
        mean = statistics.fmean(statistics.fmean(by_seed.values()) for by_seed in by_setting)
        return Difference(mean, None, 0, len(by_setting))
    means = [statistics.fmean(by_seed[seed] for by_seed in by_setting) for seed in common]
    return Difference(statistics.fmean(means), t_interval(means), len(common), len(by_setting))


def t_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """Student's t interval of the mean; None for fewer values than `ENOUGH`."""
    if len(values) < ENOUGH:
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
