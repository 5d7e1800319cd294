"""Winners at the edge of what was tried: better values may lie beyond, which a grid cannot know."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from bpf.spec.fields import Limits
from bpf.spec.values import MAX_EPOCHS
from bpf.study.cells import Value
from bpf.study.ranking import Ranked
from bpf.words import word

EPOCHS = "epochs"


@dataclass(frozen=True)
class Edge:
    """The winner of `rule` has the largest or smallest `value` of a numeric `parameter`; `beyond` is to be tried next.

    Where `parameter` is `epochs`, `value` is the last epoch, and that is the best one of `late` of `executions`.
    """

    rule: str
    parameter: str
    value: int | float
    beyond: int | float
    late: int = 0
    executions: int = 0

    def __str__(self) -> str:
        if self.parameter == EPOCHS:
            late = f"{self.late} of {self.executions} executions"
            return f"{self.rule}: the last epoch, {self.value}, is the best in {late}"
        end = "largest" if self.beyond > self.value else "smallest"
        return f"{self.rule}: {self.parameter}={word(self.value)} is the {end} of its values"


def find(
    winners: Sequence[Ranked],
    tried: Mapping[str, Mapping[str, Sequence[Value]]],
    limits: Callable[[str, str], Limits | None],
) -> list[Edge]:
    """The edges at which each rule's best cell lies, in the order of `winners`.

    `tried` are the values of each parameter of a rule; `limits` knows those of a rule's parameter, or None. A value
    at its limit, such as dropout 0, is no edge, nor is the only one.
    """
    found: list[Edge] = []
    for winner in winners:
        rule = winner.row.rule
        for name, values in tried[rule].items():
            if (numbers := _numbers(values)) and (edge := _edge(winner, name, numbers, limits)):
                found.append(edge)
        found += _last_epoch(winner)
    return found


def _numbers(values: Sequence[Value]) -> list[int | float]:
    """At least two numbers in order, or nothing."""
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    return sorted(numbers) if len(numbers) == len(values) > 1 else []


def _edge(
    winner: Ranked, name: str, numbers: Sequence[int | float], limits: Callable[[str, str], Limits | None]
) -> Edge | None:
    value = winner.row.params.get(name)
    for series in (numbers, numbers[::-1]):
        if series[-1] == value and (known := limits(winner.row.rule, name)):
            beyond = _next(name, series, known)
            return None if beyond is None else Edge(winner.row.rule, name, series[-1], beyond)
    return None


def _next(name: str, series: Sequence[int | float], limits: Limits) -> int | float | None:
    """What goes on with a series of numbers, by its step or its ratio, but not beyond the limits; or nothing."""
    before, last = series[-2:]
    rising = last > before
    steps = [b - a for a, b in itertools.pairwise(series)]
    even = len(steps) > 1 and all(math.isclose(step, steps[0], rel_tol=1e-6) for step in steps)
    if name == "weight_decay" and not before:
        found = 10 * last
    elif name == "dropout" or even or min(before, last) <= 0:
        found = last + (last - before)
    else:
        found = last * last / before
    limit, excluded = (limits.high, limits.high_excluded) if rising else (limits.low, limits.low_excluded)
    if limit is not None and (found >= limit if rising else found <= limit):
        found = (last + limit) / 2 if excluded else limit
    found = round(found) if all(isinstance(number, int) for number in series) else _short(found, last)
    return found if (found > last if rising else found < last) else None


def _short(found: float, last: float) -> float:
    """The same to three digits, if these are not all that it differs in."""
    short = float(f"{found:.3g}")
    return short if (short > last) == (found > last) and short != last else found


def _last_epoch(winner: Ranked) -> Iterator[Edge]:
    """Of executions that were not stopped early."""
    epochs = winner.row.spec["epochs"]
    late, executions = winner.best_epochs.count(epochs), len(winner.best_epochs)
    assert winner.row.result is not None
    whole = all(execution["epochs"] >= epochs for execution in winner.row.result["executions"])
    if winner.row.spec.get("keep") == "last":
        return
    if whole and 2 * late > executions and epochs < MAX_EPOCHS:
        yield Edge(winner.row.rule, EPOCHS, epochs, min(2 * epochs, MAX_EPOCHS), late, executions)
