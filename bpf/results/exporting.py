"""The tables of an experiment for other programs, and the formats that they are written in.

A table is read cell by cell, as an experiment may have more epochs than fit into memory. What columns there are is
known only when all cells have been seen, since cells differ in their layers and rules in their options: the histories
are read twice.
"""

import csv
import io
import itertools
import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from bpf.errors import UsageError, did_you_mean
from bpf.experiment.directory import Experiment
from bpf.extras import need
from bpf.files import check_output, check_place, write_atomically
from bpf.reading import file_name
from bpf.study.cells import Row
from bpf.study.ranking import result_columns
from bpf.study.view import StudyView

ROW_GROUP = 50_000
"""Rows of a Parquet file that are written, and can be read, on their own."""

Columns = dict[str, type]
Record = dict[str, Any]

_CELL: Columns = {"cell": str, "key": str, "algorithm": str}
_RUN: Columns = {"execution": int, "seed": int}
_SCORES = ("loss", "error", "val_loss", "val_error")
_OUTCOME: Columns = {"state": str, "objective": float}
_MARK = {"bpf": "table exported by bpf"}
_MADE = re.compile(rb'cell,key,algorithm\b|\[\n\{"cell": |\[\]\n\Z|PAR1.*table exported by bpf', re.DOTALL)
"""How a table is known, in any of the formats."""
_RUN_OUTCOME: Columns = {"status": str, "best_epoch": int, "test_loss": float, "test_error": float}
_RESULTS: Columns = {
    **{"state": str, "cause": str, "objective_name": str, "objective": float, "objective_std": float},
    **{"best_epoch": float, "test_loss": float, "test_loss_std": float, "test_error": float, "test_error_std": float},
    **{"executions": int, "seconds": float, "tracking_seconds": float},
}


@dataclass(frozen=True)
class Table:
    """Flat records, all with the same `columns`: the type of each one's values, of which any may be None.

    A number that is not finite is None, since JSON knows none. To be iterated once.
    """

    columns: Columns
    records: Iterable[Record]

    def __iter__(self) -> Iterator[Record]:
        columns = self.columns.items()
        for record in self.records:
            yield {name: typed(record.get(name), kind) for name, kind in columns}


def table(study: StudyView, what: str) -> Table:
    """One of the tables of an experiment, with a column for each parameter of any of its rules.

    - `results`: a record per cell. `objective_name` is the score whose mean over the executions `objective` is, and
      `best_epoch` the median of their best epochs.
    - `history`: a record per epoch of each execution, the epochs counted from 1.
    - `trackers`: a record per measurement of each execution, at an optimizer `step` and an `epoch`, which is a
      fraction between two epochs and 0 before training; a column per value, such as `bp_cosine/layer.0`.

    The study must stay open while the records are read. Raises UsageError for another name.
    """
    if what not in TABLES:
        known = ", ".join(TABLES)
        raise UsageError(f"There is no table {what!r}: give one of {known}.{did_you_mean(what, TABLES)}")
    return TABLES[what](study)


def save(table: Table, format: str, path: Path) -> int:
    """`write` a table into a file, whole or not at all; returns how many records it has."""
    count = 0

    def counted() -> Iterator[Record]:
        nonlocal count
        for record in table.records:
            count += 1
            yield record

    write_atomically(path, partial(write, Table(table.columns, counted()), format))
    return count


def write(table: Table, format: str, file: IO[bytes]) -> None:
    """Write a table as `csv` (with a header; nothing for None), `json` (a list of objects) or `parquet`.

    Raises UsageError for another format, or if pyarrow is missing for Parquet.
    """
    if format not in FORMATS:
        known = ", ".join(FORMATS)
        raise UsageError(f"There is no format {format!r}: give one of {known}.{did_you_mean(format, FORMATS)}")
    FORMATS[format](table, file)


def format_of(output: Path | None, asked: str | None) -> str:
    """The format that `output` is written in: the one that is asked for, or that of its name, or else csv.

    Raises UsageError for an unknown one, and where the two differ.
    """
    if asked is not None and asked not in FORMATS:
        raise UsageError(f"--format {asked} is not known.{did_you_mean(asked, FORMATS)}")
    named = output.suffix[1:].lower() if output is not None else ""
    if named not in FORMATS:
        if asked is None and output is not None:
            endings = ", ".join(f".{name}" for name in FORMATS)
            raise UsageError(
                f"{output} does not say how it is written: give --format, or a name that ends in {endings}."
            )
        return asked or "csv"
    if asked not in (None, named):
        raise UsageError(f"{output} is not written as {asked}. Leave out --format {asked}, or name a .{asked} file.")
    return named


def check_table(output: Path) -> None:
    """Raise UsageError if `output` exists and is no table that was exported, or belongs to an experiment."""
    check_output(output, "table that bpf has exported", _MADE)


def metrics(experiment: Experiment, directory: Path) -> list[tuple[Path, int, int]]:
    """Write one Parquet file per learning rule that has trained anything; returns each one's path, rows and columns.

    Its rows are the epochs of each execution together with what the trackers measured at them, and rows of their own,
    without losses, for measurements before training (epoch 0) and between epochs. Each repeats the cell's parameters,
    state and objective, and the execution's test scores: so one file answers every question about a rule.
    Raises UsageError, having written nothing, if a file would replace something else than an earlier one.
    """
    check_place(directory)
    written = []
    with closing(experiment.read_study()) as study:
        places = {rule: directory / f"{file_name(rule)}.parquet" for rule in _rules(study)}
        for path in places.values():
            check_table(path)
        for rule, path in places.items():
            made = _metrics(study, rule)
            if made is not None:
                written.append((path, save(made, "parquet", path), len(made.columns)))
    return written


def parameters(study: StudyView, rules: Sequence[str]) -> Columns:
    """The parameters of the rules with the type that suits all of their values, in the order of the first rule.

    Last a learning rate that was handed over.
    """
    values: dict[str, list[Any]] = {}
    for rule in rules:
        for axis in study.axes(rule):
            values.setdefault(axis.name, []).extend(axis.values)
    handed_over = {"lr": float} if study.spec.get("lr_from") else {}
    return {name: _kind(known) for name, known in values.items()} | handed_over


def typed(value: Any, kind: type) -> Any:
    """A value as one of the type that its column has; None for a number that is not finite."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None
    if kind is str and not isinstance(value, str):
        return json.dumps(value)
    return kind(value)


def scores(record: Mapping[str, Any]) -> Iterator[Record]:
    """What an execution's record says of each epoch, counted from 1: its losses and errors."""
    known = {name: values for name, values in record["history"].items() if "/" not in name}
    for epoch in range(record["epochs"]):
        yield {"epoch": epoch + 1, **_at(known, epoch)}


def measurements(record: Mapping[str, Any]) -> Iterator[Record]:
    """What the trackers measured of an execution, in order: `step`, `epoch` and the values by name.

    bpf 0.2 and older measured after each epoch, kept that in the history, and did not note the step, which is None.
    """
    older = {name: values for name, values in record["history"].items() if "/" in name}
    for epoch in range(max(map(len, older.values()), default=0)):
        yield {"step": None, "epoch": epoch + 1.0, **_at(older, epoch)}
    tracked = record.get("tracked") or {}
    for moment in range(len(tracked.get("epoch", ()))):
        yield _at(tracked, moment)


def _results(study: StudyView) -> Table:
    rules = _rules(study)
    name = study.spec["objective"]
    records = (
        _cell(row) | result_columns(row) | {"objective_name": name, "best_epoch": _best_epoch(row)}
        for rule in rules
        for row in study.rows(rule=rule)
    )
    return Table(_CELL | parameters(study, rules) | _RESULTS, records)


def _best_epoch(row: Row) -> float | None:
    """The median of the best epochs of a complete cell's executions."""
    if row.state != "complete" or row.result is None:
        return None
    return float(statistics.median(execution["best_epoch"] for execution in row.result["executions"]))


def _history(study: StudyView) -> Table:
    runs = _Runs(study, _rules(study))
    named = {name: float for name in runs.names() if "/" not in name}
    columns = runs.columns | _RUN | {"status": str, "epoch": int} | named
    return Table(columns, (run | epoch for run, record in runs for epoch in scores(record)))


def _trackers(study: StudyView) -> Table:
    runs = _Runs(study, _rules(study))
    named = {name: float for name in runs.names() if "/" in name}
    columns = runs.columns | _RUN | {"step": int, "epoch": float} | named
    return Table(columns, (run | moment for run, record in runs for moment in measurements(record)))


def _metrics(study: StudyView, rule: str) -> Table | None:
    """The table of one rule, or None if it has trained nothing."""
    runs = _Runs(study, [rule])
    named = dict.fromkeys(runs.names(), float)
    if not runs.known:
        return None
    columns = runs.columns | _OUTCOME | _RUN | _RUN_OUTCOME | {"epoch": float, "step": int} | named
    return Table(columns, (run | point for run, record in runs for point in _points(record)))


def _points(record: Mapping[str, Any]) -> Iterator[Record]:
    """Scores and measurements of an execution, joined by the epoch, in order."""
    points: dict[float, Record] = {}
    for point in itertools.chain(scores(record), measurements(record)):
        points.setdefault(point["epoch"], {}).update(point)
    return (points[epoch] for epoch in sorted(points))


class _Runs:
    """The executions of the cells that have a history: what is known of each, and its record.

    The first iteration decides which cells those are; the next ones leave out what has been trained meanwhile.
    """

    def __init__(self, study: StudyView, rules: Sequence[str]) -> None:
        self.columns = _CELL | parameters(study, rules)
        self.known: set[str] | None = None
        self._study, self._rules = study, rules

    def __iter__(self) -> Iterator[tuple[Record, Record]]:
        found = set()
        for rule in self._rules:
            for row in self._study.rows(rule=rule):
                if self.known is not None and row.key not in self.known:
                    continue
                cell = _cell(row) | {"state": row.state, "objective": row.value}
                for number, record in enumerate(self._study.history(row.key) or []):
                    found.add(row.key)
                    test = record.get("test") or {}
                    outcome = {"test_loss": test.get("loss"), "test_error": test.get("error")}
                    known = {name: record.get(name) for name in ("seed", "status", "best_epoch")}
                    yield cell | known | outcome | {"execution": number}, record
        self.known = found

    def names(self) -> list[str]:
        """The scores and trackers' values that any execution has, in an order that does not depend on the cells'."""
        named = {name for _, record in self for name in (*record["history"], *(record.get("tracked") or ()))}
        scores = [name for name in _SCORES if name in named]
        return [*scores, *sorted(named - {"step", "epoch", *scores}, key=_natural)]


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """So that `layer.10` comes after `layer.9`."""
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in re.split(r"(\d+)", name)]


def _rules(study: StudyView) -> list[str]:
    rules: list[str] = study.spec["algorithm"]
    return rules


def _cell(row: Row) -> Record:
    return {"cell": row.name, "key": row.key, "algorithm": row.rule, **row.chosen}


def _kind(values: Sequence[Any]) -> type:
    kinds = {type(value) for value in values if value is not None}
    return kinds.pop() if len(kinds) == 1 and kinds <= {bool, int} else float if kinds <= {int, float} else str


def _at(series: Mapping[str, Sequence[Any]], index: int) -> Record:
    return {name: values[index] for name, values in series.items() if index < len(values)}


def _write_csv(table: Table, file: IO[bytes]) -> None:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    try:
        writer = csv.DictWriter(text, list(table.columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    finally:
        text.detach()  # else it closes the file with itself


def _write_json(table: Table, file: IO[bytes]) -> None:
    separator = "[\n"
    for record in table:
        file.write(f"{separator}{json.dumps(record, allow_nan=False)}".encode())
        separator = ",\n"
    file.write(b"[]\n" if separator == "[\n" else b"\n]\n")


def _write_parquet(table: Table, file: IO[bytes]) -> None:
    pyarrow = need("pyarrow", "Parquet", "pyarrow", "parquet")
    parquet = need("pyarrow.parquet", "Parquet", "pyarrow", "parquet")
    types = {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64(), bool: pyarrow.bool_()}
    schema = pyarrow.schema([(name, types[kind]) for name, kind in table.columns.items()], _MARK)
    with parquet.ParquetWriter(file, schema) as writer:
        records = iter(table)
        while group := list(itertools.islice(records, ROW_GROUP)):
            writer.write_table(pyarrow.Table.from_pylist(group, schema))


TABLES: dict[str, Callable[[StudyView], Table]] = {"results": _results, "history": _history, "trackers": _trackers}
FORMATS: dict[str, Callable[[Table, IO[bytes]], None]] = {
    "csv": _write_csv,
    "json": _write_json,
    "parquet": _write_parquet,
}
