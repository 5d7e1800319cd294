"""What came out of an experiment: ranked cells, counts and times, as plain values for tables and JSON."""

import statistics
from collections.abc import Iterator, Sequence
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


def result_columns(row: Row) -> dict[str, Any]:
    """What came out of a cell as one flat record, with None for what there is not."""
    columns: dict[str, Any] = {"state": row.state, "cause": row.cause, "objective": row.value, "objective_std": None}
    columns |= {f"test_{name}{end}": None for name in ("loss", "error") for end in ("", "_std")}
    columns |= {"executions": row.done, "seconds": row.result.get("seconds") if row.result else None}
    if row.state == "complete" and row.result is not None:
        ranked = _ranked(row)
        columns["objective_std"] = ranked.objective.std
        for name, spread in ranked.test.items():
            columns |= {f"test_{name}": spread.mean, f"test_{name}_std": spread.std}
    return columns


def history_columns(execution: int, record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One flat record per epoch of an execution, counted from 1."""
    known = {"execution": execution, "seed": record["seed"], "status": record["status"]}
    for epoch in range(record["epochs"]):
        yield {**known, "epoch": epoch + 1, **{name: values[epoch] for name, values in record["history"].items()}}
