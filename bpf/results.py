"""What came out of an experiment: ranked cells, counts and times, as plain values for tables and JSON."""

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bpf.plan import Row


@dataclass(frozen=True)
class Spread:
    """Values of a cell's executions with their mean and sample standard deviation (0 for a single one)."""

    values: list[float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def std(self) -> float:
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0


@dataclass(frozen=True)
class Ranked:
    """A complete cell: its executions' objectives, best epochs and test scores."""

    row: Row
    objective: Spread
    best_epochs: list[int]
    test: dict[str, Spread]

    def as_json(self, objective: str) -> dict[str, Any]:
        test: dict[str, float] = {}
        for name, spread in self.test.items():
            test |= {name: spread.mean, f"{name}_std": spread.std}
        return {
            "cell": self.row.name,
            "algorithm": self.row.rule,
            "params": self.row.params,
            "objective": {
                "name": objective,
                "mean": self.objective.mean,
                "std": self.objective.std,
                "values": self.objective.values,
            },
            "best_epochs": self.best_epochs,
            "test": test,
        }


def rank(rows: Sequence[Row]) -> list[Ranked]:
    """The complete cells, best objective first."""
    complete = [_ranked(row) for row in rows if row.state == "complete" and row.result is not None]
    return sorted(complete, key=lambda ranked: ranked.objective.mean)


def winners(ranked: Sequence[Ranked]) -> list[Ranked]:
    """The best cell of each rule, best first."""
    first: dict[str, Ranked] = {}
    for entry in ranked:
        first.setdefault(entry.row.rule, entry)
    return list(first.values())


def varying(rows: Sequence[Row]) -> list[str]:
    """The parameters in which cells differ; what never changes says nothing in a table."""
    values: dict[str, set[Any]] = {}
    for row in rows:
        for name, value in row.params.items():
            values.setdefault(name, set()).add(value)
    return [name for name, seen in values.items() if len(seen) > 1]


def _ranked(row: Row) -> Ranked:
    assert row.result is not None
    executions = row.result["executions"]
    test: dict[str, Spread] = {}
    for name in ("loss", "error"):
        scores: list[dict[str, float | None]] = [execution["test"] for execution in executions]
        values = [value for value in (score[name] for score in scores) if value is not None]
        if values:
            test[name] = Spread(values)
    return Ranked(
        row,
        Spread([execution["objective"] for execution in executions]),
        [execution["best_epoch"] for execution in executions],
        test,
    )


def cost(spec: dict[str, Any], executions: int) -> float:
    """The work of a cell, up to a factor: epochs × examples × weights. Good for shares, not for seconds."""
    widths = [int(units) for units in spec["arch"].split("-")]
    weights = sum(a * b for a, b in itertools.pairwise(widths)) + 1000 * (widths[0] + widths[-1])
    return float(spec["epochs"] * executions * (weights + 20_000))
