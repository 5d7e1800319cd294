"""What an experiment's rows came to beside what was published for them, as plain values."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from bpf.experiment.directory import Experiment
from bpf.experiment.grid import row_of
from bpf.spec.grid import GridSpec
from bpf.spec.rows import Published
from bpf.study.cells import Row
from bpf.study.ranking import Ranked, Spread, rank
from bpf.words import counted


@dataclass(frozen=True)
class Comparison:
    """A row: what was published, and the test error of its best cell by the objective; `ours` is None without one.

    `tuned` are that cell's values where the row has several cells. `open` counts the cells that are not finished, and
    `failed` those that diverged or failed. Errors are in %.
    """

    row: str
    rule: str
    published: Published | None
    choices: tuple[str, ...]
    ours: Spread | None
    tuned: str
    open: int
    failed: int

    @property
    def difference(self) -> float | None:
        """Ours minus what was published, in percentage points."""
        return None if self.ours is None or self.published is None else self.ours.mean - self.published.error

    @property
    def unit(self) -> tuple[float, str] | None:
        """The standard deviation that a difference is told in, and whose it is: the source's, or else ours.

        None if there is neither, as for a single execution beside a single run.
        """
        if self.published is not None and self.published.std:
            return self.published.std, "published"
        if self.ours is not None and self.ours.std:
            return self.ours.std, "ours"
        return None

    @property
    def deviations(self) -> float | None:
        """The difference in standard deviations, those of `unit`."""
        return None if self.difference is None or self.unit is None else self.difference / self.unit[0]

    def as_json(self) -> dict[str, Any]:
        ours = self.ours and {"error": self.ours.mean, "std": self.ours.std, "values": self.ours.values}
        return {
            "row": self.row,
            "algorithm": self.rule,
            "published": self.published and self.published.model_dump(),
            "choices": list(self.choices),
            "ours": ours,
            "tuned": self.tuned or None,
            "difference": self.difference,
            "deviations": self.deviations,
            "std_of": self.unit and self.unit[1],
            "open": self.open,
            "failed": self.failed,
        }


HEAD = ("row", "published", "ours", "difference", "in std", "std of")


def lines(found: Sequence[Comparison]) -> list[list[str]]:
    """A table of rows in words, with the columns of `HEAD`."""
    return [
        [
            f"{one.row}: {one.tuned}" if one.tuned else one.row,
            "–" if one.published is None else _published(one.published),
            _ours(one),
            "–" if one.difference is None else _signed(one.difference, " pp"),
            "–" if one.deviations is None else _signed(one.deviations, ""),
            "–" if one.deviations is None or one.unit is None else one.unit[1],
        ]
        for one in found
    ]


def notes(grid: GridSpec, found: Sequence[Comparison]) -> list[str]:
    """What a reader must know of the table: whose numbers, by what selection, and what is missing."""
    said = [
        "Test error in %: mean ± standard deviation (number of runs, or of our seeds). The difference is ours minus "
        "published, also in standard deviations of single runs: the published one, or ours where there is none."
    ]
    if grid.dataset.partition(":")[0] in ("folder", "npz"):
        said.append(f"Ours is trained on {grid.dataset}, which may not be the very images of the source.")
    if any(one.tuned for one in found):
        said.append(f"What a row tunes was chosen by {grid.objective}, never by the test set.")
    for one in found:
        troubles = {one.open: "not finished", one.failed: "diverged or failed"}
        said += [f"{one.row}: {counted(count, 'cell')} {what}." for count, what in troubles.items() if count]
    return said


def _published(published: Published) -> str:
    runs = "" if published.runs is None else f" ({published.runs})"
    return f"{published.error:.2f}{'' if published.std is None else f' ± {published.std:.2f}'}{runs}"


def _ours(one: Comparison) -> str:
    if one.ours is None:
        return "–"
    spread = "" if one.ours.std is None else f" ± {one.ours.std:.2f}"
    return f"{one.ours.mean:.2f}{spread} ({len(one.ours.values)})"


def _signed(value: float, unit: str) -> str:
    return f"{value:+.2f}{unit}".replace("-", "−")


def compare(experiment: Experiment) -> list[Comparison]:
    """Every row of an experiment, in its order; none for an experiment that has no rows."""
    if not experiment.grid.rows:
        return []
    with closing(experiment.read_study()) as study:
        return compared(experiment.grid, study.rows())


def compared(grid: GridSpec, cells: list[Row]) -> list[Comparison]:
    """As `compare`, for cells that have been read."""
    by_row: dict[str, list[Row]] = {name: [] for name in grid.rows}
    for cell in cells:
        by_row.setdefault(row_of(cell.params)[0], []).append(cell)
    return [_compared(grid, name, by_row[name]) for name in grid.rows if by_row[name]]


def _compared(grid: GridSpec, name: str, cells: list[Row]) -> Comparison:
    best: Ranked | None = next(iter(rank(cells)), None)
    found = best.test.get("error") if best else None
    ours = replace(found, values=[100 * value for value in found.values]) if found else None
    failed = sum(cell.state in ("diverged", "failed") for cell in cells)
    unfinished = len(cells) - failed - sum(cell.state == "complete" for cell in cells)
    row = grid.rows[name]
    tuned = row_of(best.row.params)[1] if best else ""
    return Comparison(name, cells[0].rule, row.published, row.choices, ours, tuned, unfinished, failed)
