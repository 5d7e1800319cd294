"""What a study is made of: cells and how they stand, claims of them, and the parameters that they are points of."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from bpf.errors import UsageError
from bpf.reading import Name, Word

State = Literal["pending", "interrupted", "running", "complete", "diverged", "failed"]
Cause = Literal["killed", "memory", "exception"]
STATES = get_args(State)
OPEN = ("pending", "interrupted", "running")

Value = str | int | float | bool
Point = tuple[Value, ...]


@dataclass(frozen=True)
class Cell:
    """One point of the grid. `key` is the hash of the whole resolved cell, never an index.

    `params` are the tunable parameters as Optuna shows them, `spec` is everything the training needs,
    `structure` is what must be equal for two cells to be trained in one cohort, and `cost` is the work of one
    execution, up to a factor.
    """

    key: Word
    rule: Name
    structure: str
    params: dict[str, Value]
    spec: dict[str, Any]
    cost: float = field(default=0.0, kw_only=True)

    @property
    def chosen(self) -> dict[str, Value]:
        """What makes the cell, for a person: `params`, and a learning rate that is none as it was handed over."""
        handed_over = "lr" not in self.params and "lr" in self.spec
        return self.params | {"lr": self.spec["lr"]} if handed_over else self.params


@dataclass(frozen=True)
class Row(Cell):
    """A cell as it stands in the plan: its place, its state (one of `STATES`), its trial and its outcome.

    `attempt` counts how often the trial was claimed; `interrupted` means that nobody trains the cell now and
    that it goes on, in the same cohort and the same trial, from its checkpoint. `cause` is its last trouble:
    killed, memory or exception. `kills` counts the deaths of its workers since it got further than the epoch
    `reached`. `max_runs` limits how many runs are stacked with it after such trouble. `result` is that of the
    executions which are done, which may be fewer than there should be.
    """

    ordinal: int
    name: Word
    state: State
    cohort: Word | None
    owner: Word | None
    attempt: int
    trial_id: int | None
    trial_number: int | None
    value: float | None
    result: dict[str, Any] | None
    error: str | None
    cause: Cause | None
    kills: int
    reached: int
    max_runs: int | None

    @property
    def done(self) -> int:
        """How many executions are finished."""
        return len(self.result["executions"]) if self.result and "executions" in self.result else 0

    @property
    def ran_to_the_end(self) -> bool:
        """Whether any execution of a finished cell ended because its epochs were over, and not earlier."""
        executions = (self.result or {}).get("executions", [])
        return any(execution["epochs"] >= self.spec["epochs"] for execution in executions)

    @property
    def added(self) -> bool:
        """Whether executions were added to it after others had finished."""
        return bool(self.result and self.result.get("added"))


@dataclass(frozen=True)
class Claim:
    """Cells of one cohort that one owner may train until it finishes, fails or releases them.

    A cohort that goes on has fewer cells than it began with if some had finished before.
    """

    token: str
    cohort: str
    rows: list[Row]

    @property
    def resumed(self) -> bool:
        """Whether the cohort was begun before, so that there may be a checkpoint of it."""
        return any(row.attempt > 1 for row in self.rows)


@dataclass(frozen=True)
class Finished:
    """What came out of the cell `key`: `complete` with a value, or `diverged`, a result without one.

    A diverged cell is never the best and never tried again. `history` has one record per execution, or is None.
    """

    key: Word
    value: float | None
    state: Literal["complete", "diverged"]
    result: dict[str, Any]
    history: Any = None

    def __post_init__(self) -> None:
        if self.state not in ("complete", "diverged"):
            raise ValueError(f"A cell finishes as 'complete' or 'diverged', not as {self.state!r}.")
        if self.state == "complete" and (self.value is None or not math.isfinite(self.value)):
            raise ValueError(f"A complete cell has a finite value, not {self.value}; did it diverge?")
        if self.state == "diverged" and self.value is not None:
            raise ValueError(f"A diverged cell has no value, but is told {self.value}.")

    @property
    def seconds(self) -> float | None:
        """How long its executions took, if its result says so."""
        return self.result.get("seconds")


@dataclass(frozen=True)
class Tally:
    """The cells of one rule in one state that had the same trouble: how many, their cost and their seconds."""

    rule: Name
    state: State
    cause: Cause | None
    count: int
    cost: float
    seconds: float


@dataclass(frozen=True)
class Axis:
    """How a tunable parameter appears in Optuna: categorical, or a range from `low` to `high`.

    Without `low` and `high` it is categorical; `choices` then lists what may ever be chosen (the values, if
    left out). Optuna freezes the choices of a study, so declare them all where they are known. A range with
    an `int` as `low` holds integers, otherwise floats; make it wide, so that the grid can be extended.
    """

    name: str
    values: Sequence[Value]
    choices: Sequence[Value] | None = None
    low: int | float | None = None
    high: int | float | None = None
    log: bool = False

    @property
    def kind(self) -> str:
        if self.low is None or self.high is None:
            return "categorical"
        return "int" if isinstance(self.low, int) else "float"

    def extended(self, new: "Axis") -> "Axis":
        """This axis and what `new` adds to it, appended: stored choice indices must stay valid."""
        if (self.kind, self.log) != (new.kind, new.log):
            raise UsageError(
                f"The parameter {self.name!r} is {self._described()} in this experiment, not "
                f"{new._described()}; start a new experiment."
            )
        values = _union(self.values, new.values)
        if self.low is None or self.high is None or new.low is None or new.high is None:
            choices = _union(self.choices or self.values, new.choices or new.values)
            return Axis(self.name, values, choices=_union(choices, values))
        low, high = min(self.low, new.low), max(self.high, new.high)
        outside = [value for value in values if isinstance(value, str) or not low <= value <= high]
        if outside:
            raise UsageError(f"The parameter {self.name!r} takes {low} to {high}, not {outside[0]!r}.")
        return Axis(self.name, values, low=low, high=high, log=self.log)

    def _described(self) -> str:
        return f"{self.kind}, on a log scale" if self.log else self.kind


def _union(old: Sequence[Value], new: Sequence[Value]) -> list[Value]:
    return list(dict.fromkeys([*old, *new]))
