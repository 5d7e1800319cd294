"""What a report knows of one experiment, and what its page is made of."""

import re
from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from bpf.experiment.directory import Experiment
from bpf.experiment.further import Further, further
from bpf.report import drawing, tables
from bpf.report.drawing import Palette
from bpf.study.cells import Row
from bpf.study.ranking import Ranked, rank, winners

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCORES = {
    "loss": "training loss",
    "val_loss": "validation loss",
    "error": "training error",
    "val_error": "validation error",
}
UNITS = {"ce": "nats", "bce": "nats per output", "mse": "squared error"}


@dataclass(frozen=True)
class Table:
    """Cells are text; the columns at `words` are set to the left, all others are numbers, set to the right."""

    head: list[str]
    lines: list[list[str]]
    note: str = ""
    words: Collection[int] = (0,)


@dataclass(frozen=True)
class Drawn:
    """A figure; `name` is unique in the page and names its file."""

    name: str
    caption: str
    figure: "Figure"

    @property
    def wide(self) -> bool:
        """Whether it is wider than a column."""
        return self.figure.get_figwidth() > drawing.COLUMN


@dataclass(frozen=True)
class Section:
    """`notes` are sentences above tables and figures; `codes` are blocks of text to copy, by what they are."""

    name: str
    title: str
    notes: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figures: list[Drawn] = field(default_factory=list)
    codes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Block:
    """What a report knows of one experiment; `histories` are those of each rule's best cell.

    `shown` are the parameters that a table names, `maps` the pairs of them that were asked for as heat maps; `further`
    says which best cells lie at an edge of the grid.
    """

    name: str
    experiment: Experiment
    rows: list[Row]
    ranked: list[Ranked]
    best: list[Ranked]
    histories: dict[str, list[dict[str, Any]]]
    palette: Palette
    shown: frozenset[str]
    further: Further
    maps: Sequence[tuple[str, str]] = ()

    @property
    def objective(self) -> str:
        return self.experiment.grid.objective

    @cached_property
    def rules(self) -> list[str]:
        return tables.rules_of(self.rows)

    @cached_property
    def varying(self) -> list[str]:
        return tables.varying(self.rows)

    @property
    def test_score(self) -> str:
        return "error" if self.experiment.grid.problem_type == "classification" else "loss"

    def label(self, score: str) -> str:
        """What a score is called on an axis, with its unit."""
        unit = "%" if score.endswith("error") else UNITS[self.experiment.grid.resolved_loss]
        return f"{SCORES[score]} ({unit})"

    def draw(self, name: str, caption: str, draw: "Callable[[], Figure]") -> Drawn:
        return Drawn(plain(f"{self.name}-{name}"), caption, drawing.styled(draw))


def plain(name: str) -> str:
    """A name for a file and an id, whatever rules, trackers and experiments are called."""
    return re.sub(r"[^\w.-]", "_", name)


def block(
    name: str, experiment: Experiment, palette: Palette | None = None, maps: Sequence[tuple[str, str]] = ()
) -> Block:
    """Read an experiment: all of its cells, and the histories of each rule's best one."""
    with closing(experiment.read_study()) as study:
        shown = study.varying()
        rows = study.rows()
        ranked = rank(rows)
        best = winners(ranked)
        keys = {one.row.rule: one.row.key for one in best}
        beyond = further(experiment, study, best)
        order = [rule for rule in tables.rules_of(rows) if rule in keys]
        histories = {rule: study.history(keys[rule]) or [] for rule in order}
    palette = palette or Palette(tables.rules_of(rows))
    return Block(name, experiment, rows, ranked, best, histories, palette, shown, beyond, maps)
