"""Files of published rows: those that come with bpf, by name, and how a selection or a short look is made of them."""

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from bpf.errors import UsageError, did_you_mean
from bpf.spec import schedules
from bpf.spec.fields import build
from bpf.spec.file import read_spec
from bpf.spec.grid import GridSpec
from bpf.spec.rows import Row

FOLDER = Path(__file__).parent.parent / "published"
QUICK = 20
"""A quick look takes this part of the epochs, at least two."""


def names() -> list[str]:
    """The files that come with bpf."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read(name: str) -> GridSpec:
    """A file's rows, by the name of one that comes with bpf or by its path.

    Raises UsageError if there is none, or if it holds no rows.
    """
    path = Path(name)
    if name in names():
        path = FOLDER / f"{name}.yaml"
    elif not path.suffix:
        raise UsageError(
            f"There are no published rows named {name!r}.{did_you_mean(name, names())} A file of your own ends in "
            ".yaml."
        )
    grid = build(GridSpec, read_spec(path))
    if not grid.rows:
        raise UsageError(f"{path} has no rows. A grid is run by: bpf tune --spec {path}")
    return grid


def selected(grid: GridSpec, wanted: Sequence[str]) -> GridSpec:
    """The same with the rows of these names or patterns (`dfa-*`) only. Raises UsageError for what names none."""
    patterns = [part.strip() for one in wanted for part in one.split(",")]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in grid.rows):
            raise UsageError(f"There is no row {pattern!r}.{did_you_mean(pattern, grid.rows)}")
    chosen = [name for name in grid.rows if any(fnmatchcase(name, pattern) for pattern in patterns)]
    return grid.with_rows({name: grid.rows[name] for name in chosen})


def quick(grid: GridSpec) -> GridSpec:
    """The same with a twentieth of the epochs, at least two, and one execution of each cell.

    Schedules are scaled along. It shows that everything works, and nothing of what is published.
    """
    rows: dict[str, Row] = {}
    for name, row in grid.rows.items():
        full = grid.row(name)
        epochs = max(2, math.ceil(full.epochs / QUICK))
        schedule = [schedules.scaled(each, epochs / full.epochs) for each in full.schedule]
        settings = {**row.settings, "epochs": epochs, "schedule": list(dict.fromkeys(schedule))}
        rows[name] = row.model_copy(update={"settings": settings})
    return grid.model_copy(update={"executions_per_trial": 1}).with_rows(rows)
