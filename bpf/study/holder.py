"""Who holds cells, and how far they are, as values: what a worker knows of itself. It needs no database."""

import threading
import time
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Said = Annotated[str, Field(pattern=r"^[\w.:+ -]+$", max_length=700)]
"""What an owner says of itself in words that a terminal may be given, whoever wrote it."""
Spent = Annotated[float, Field(strict=True, ge=0, le=1e11, allow_inf_nan=False)]
"""Seconds of one device that an owner has had for itself, as they stand in its `facts`."""


class Progress(BaseModel):
    """How far an owner is with the cohort that it trains, as it stands in its `facts`.

    `executions` are those stacked, `speed` is in examples a second over all of them in the last epoch. In `seconds`
    this owner has trained from epoch `began` to `epoch`. `cost` is the work of the cohort, in the unit of its cells.
    """

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)

    rule: Said
    arch: Said
    activation: Said
    cells: int = Field(ge=1, le=10**9)
    executions: int = Field(ge=1, le=10**9)
    began: int = Field(ge=0, le=10**9)
    epoch: int = Field(ge=0, le=10**9)
    epochs: int = Field(ge=1, le=10**9)
    speed: float = Field(ge=0, le=1e15)
    seconds: float = Field(ge=0)
    cost: float = Field(ge=0)

    def after(self, epoch: int, seconds: float, speed: float) -> "Progress":
        """How far it is when so many seconds have led to `epoch`."""
        return self.model_copy(update={"epoch": epoch, "seconds": self.seconds + seconds, "speed": speed})

    def as_json(self) -> dict[str, Any]:
        return self.model_dump(exclude={"began", "seconds", "cost"})

    @property
    def trained(self) -> float:
        """The work of its `seconds`."""
        return self.cost * max(0, self.epoch - self.began) / self.epochs

    @property
    def left(self) -> float | None:
        """The seconds that its other epochs will take at its own pace; None before the first."""
        done = self.epoch - self.began
        return self.seconds / done * max(0, self.epochs - self.epoch) if done > 0 and self.seconds else None


class Holder:
    """A worker's right to its cells; `facts` say to a person who it is (host, device, versions), how far (`at`), and
    what it has cost (`spent`).

    `lost` is set when another process has declared it dead; what it still trains is not its own any more.
    """

    def __init__(self, token: str, facts: dict[str, Any] | None = None) -> None:
        self.facts = facts or {}
        self.begin_anew(token)

    def begin_anew(self, token: str) -> None:
        """Become another owner, after having been declared dead; what that one has cost stays with it."""
        self.facts = {name: said for name, said in self.facts.items() if name != "spent"}  # first: others read it too
        self.token, self.lost = token, threading.Event()
        self._began = time.monotonic()

    def reckon(self, sharers: int) -> None:
        """Say what it has cost so far, on a device that it shares with others, `sharers` in all."""
        self.facts = self.facts | {"spent": round((time.monotonic() - self._began) / sharers, 3)}
