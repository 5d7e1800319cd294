"""More epochs for an experiment: which of its cells go on, and from where."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from bpf.errors import RunError, UsageError
from bpf.experiment.grid import Grid, expand
from bpf.experiment.places import checkpoint_path
from bpf.spec.grid import GridSpec
from bpf.study.cells import Cell, Row
from bpf.study.view import StudyView

if TYPE_CHECKING:
    from bpf.algorithms import Algorithm


def reopened(
    study: StudyView,
    before: GridSpec,
    after: GridSpec,
    grid: Grid,
    rules: "Mapping[str, type[Algorithm]]",
    files: Path,
) -> dict[str, Cell]:
    """What the planned cells become when there are more epochs than before, by their old key.

    Raises UsageError if that would not be the same computation, and RunError if a checkpoint that is needed is damaged:
    a cell that goes on is not complete any more.
    """
    if before.epochs == after.epochs:
        return {}
    grown = f"epochs can grow from {before.epochs} to {after.epochs} only"
    if before.executions_per_trial != after.executions_per_trial:
        raise UsageError(f"{grown} on their own, not together with executions_per_trial. Do one after the other.")
    complete = [row for row in study.rows() if row.state == "complete" and row.ran_to_the_end]
    lost = [row for row in complete if not can_go_on(row, files)]
    if lost:
        raise UsageError(
            f"{grown} where the checkpoints of finished cells were kept (--keep-checkpoints), and those of "
            f"{len(lost)} cells were not. Choose another directory."
        )
    for cohort in sorted({row.cohort for row in complete if row.cohort}):
        _check(checkpoint_path(files, cohort), cohort)
    new = {(cell.rule, tuple(cell.params.items())): cell for cell in grid.cells}
    old = expand(before, dict(rules)).cells
    return {cell.key: new[cell.rule, tuple(cell.params.items())] for cell in old}


def can_go_on(row: Row, files: Path) -> bool:
    """Whether one checkpoint holds the ends of all executions of a finished cell."""
    return row.cohort is not None and checkpoint_path(files, row.cohort).exists() and not row.added


def _check(path: Path, cohort: str) -> None:
    from bpf.training import checkpoint

    try:
        checkpoint.load(path, cohort)
    except checkpoint.Unusable as error:
        raise RunError(f"{error}, so its cells cannot go on. Choose another directory.") from error
