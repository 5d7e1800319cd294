"""What workers tell about their work: plain values that pass between processes, for progress and for logs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

Finite = Annotated[float, Field(allow_inf_nan=False)]
"""As it is checked where it comes from another machine."""


@dataclass(frozen=True)
class Began:
    """A cohort starts, or goes on after `epoch`; `cost` is the work that is left of it."""

    rule: str
    arch: str
    activation: str
    cells: int
    runs: int
    epoch: int
    epochs: int
    cost: Finite


@dataclass(frozen=True)
class Trained:
    """The cohort has been trained up to `epoch`, lately with `speed` examples a second over all its runs.

    `objective` is the best of its runs in that epoch, if any is finite.
    """

    epoch: int
    speed: Finite
    objective: Finite | None = None


@dataclass(frozen=True)
class Saved:
    """The cohort has a checkpoint."""


@dataclass(frozen=True)
class Ended:
    """A cell is complete, diverged or failed; `cost` is the whole work of it."""

    key: str
    name: str
    rule: str
    params: dict[str, Any]
    state: str
    value: Finite | None
    cost: Finite


@dataclass(frozen=True)
class GivenUp:
    """The cohort goes back to the plan: to be stacked smaller, or because another worker has it."""


@dataclass(frozen=True)
class Trouble:
    """Something that a person should see, and that the worker deals with by itself."""

    text: str


@dataclass(frozen=True)
class Left:
    """The worker's last word: `done`, `stopped`, `cut short`, `failed` with a message, `crashed` with a traceback."""

    how: str
    text: str = ""
    exit_code: int = 0


Event = Began | Trained | Saved | Ended | GivenUp | Trouble | Left
Observe = Callable[[int, Event], None]
"""Who wants to know: called with the number of the worker, counted from 1, and what happened there."""
