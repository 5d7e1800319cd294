"""What came out of an experiment: ranked cells, counts and times, as plain values for tables and JSON."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bpf.errors import UsageError, did_you_mean
from bpf.study.cells import Row


@dataclass(frozen=True)
class Spread:
    """Values of a cell's executions with their mean and sample standard deviation; a single one has none."""

    values: list[float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def std(self) -> float | None:
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Ranked:
    """A complete cell: its executions' objectives, best epochs and test scores."""

    row: Row
    objective: Spread
    best_epochs: list[int]
    test: dict[str, Spread]

    def as_json(self, objective: str) -> dict[str, Any]:
        test: dict[str, float | None] = {}
        for name, spread in self.test.items():
            test |= {name: spread.mean, f"{name}_std": spread.std}
        return {
            "cell": self.row.name,
            "key": self.row.key,
            "algorithm": self.row.rule,
            "params": self.row.chosen,
            "objective": {
                "name": objective,
                "mean": self.objective.mean,
                "std": self.objective.std,
                "values": self.objective.values,
            },
            "best_epochs": self.best_epochs,
            "test": test,
        }


def as_json(ranked: Sequence[Ranked], objective: str) -> list[dict[str, Any]]:
    """Cells in their order, as `bpf best --json` tells them."""
    return [{"rank": place, **entry.as_json(objective)} for place, entry in enumerate(ranked, 1)]


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


def best_per(rows: Sequence[Row], names: Sequence[str]) -> list[Ranked]:
    """The best complete cell of each rule and each combination of the parameters `names`, best first.

    A rule that has no such parameter counts as one without a value of it; combinations without a complete cell are
    not there. Raises UsageError for a name that is no parameter of any rule.
    """
    known = {"algorithm": None} | {name: None for row in rows for name in row.chosen}
    for name in names:
        if rows and name not in known:
            raise UsageError(f"{name!r} is no parameter of this grid.{did_you_mean(name, known)}")
    first: dict[tuple[Any, ...], Ranked] = {}
    for entry in rank(rows):
        first.setdefault((entry.row.rule, *map(entry.row.chosen.get, names)), entry)
    return list(first.values())


def best_columns(ranked: Sequence[Ranked], names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Cells in their order as flat records of the same columns, the parameters `names` first."""
    params = [entry.row.chosen for entry in ranked]
    columns = dict.fromkeys([name for name in names if name != "algorithm"])
    columns |= dict.fromkeys(name for one in params for name in one)
    return [
        {"rank": place, "algorithm": entry.row.rule, **columns, **one}
        | {"cell": entry.row.name, "key": entry.row.key}
        | result_columns(entry.row)
        for place, (entry, one) in enumerate(zip(ranked, params, strict=True), 1)
    ]


def tracking_share(rows: Iterable[Row]) -> float | None:
    """Which part of the time that these cells' finished executions took went to trackers; None without trackers."""
    rows = [row for row in rows if row.done]
    tracking = sum(sum(_tracking(row)) for row in rows)
    return tracking / sum(run["seconds"] for row in rows for run in _executions(row)) if tracking else None


def _tracking(row: Row) -> list[float]:
    return [run.get("tracking_seconds", 0.0) for run in _executions(row)]


def _executions(row: Row) -> list[dict[str, Any]]:
    assert row.result is not None
    executions: list[dict[str, Any]] = row.result["executions"]
    return executions


def _ranked(row: Row) -> Ranked:
    executions = _executions(row)
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
    columns["tracking_seconds"] = sum(_tracking(row)) if row.done else None
    if row.state == "complete" and row.result is not None:
        ranked = _ranked(row)
        columns["objective_std"] = ranked.objective.std
        for name, spread in ranked.test.items():
            columns |= {f"test_{name}": spread.mean, f"test_{name}_std": spread.std}
    return columns
