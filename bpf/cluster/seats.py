"""Seats: the places for workers that Ray was asked for, and the work that is done in them."""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from bpf.cluster.engine import Engine

AGAIN_SECONDS = 0.5


@dataclass(eq=False)
class Seat:
    """A place for a worker: an actor of Ray's, and the `work` that it does now, if any.

    `name` changes when the worker in it does. `again` is when an actor that was lost is asked once more. One that is
    `unfit`, as its `node` lacks something, keeps its place there, so that Ray gives it to no other.
    """

    number: int
    kind: str
    actor: Any
    attempt: int = 0
    work: Future[Any] | None = None
    again: float = 0.0
    unfit: bool = False
    early: int = 0
    node: str = ""
    doing: str = "starting"

    @property
    def name(self) -> str:
        return f"{self.number}-{self.attempt}"


@dataclass
class Seats:
    """All seats of one driver. A worker is told the `order`, and on a GPU with how many it shares that.

    `ended` is called, by a thread of Ray's, when the work in a seat has ended, or its process or its node.
    """

    engine: Engine
    order: Mapping[str, Any]
    post: Any
    per_gpu: int
    ended: Callable[[Seat], None]
    all: list[Seat] = field(default_factory=list)
    _number: int = 0

    def working(self) -> list[Seat]:
        return [seat for seat in self.all if not seat.unfit]

    def add(self, kind: str) -> None:
        """Ask Ray for one more, whose worker works as soon as Ray has placed it."""
        self._number += 1
        seat = Seat(self._number, kind, self.engine.actor(kind))
        self.all.append(seat)
        self._ask(seat)

    def remove(self, seat: Seat) -> None:
        self.all.remove(seat)
        self.engine.let_go(seat.actor)

    def lose(self, seat: Seat) -> None:
        """The worker in a seat was lost; another one is asked for a little later."""
        seat.again = time.monotonic() + AGAIN_SECONDS

    def refill(self) -> None:
        """Let new workers work where the last one was lost."""
        for seat in self.working():
            if seat.work is None and time.monotonic() >= seat.again:
                self._ask(seat)

    def _ask(self, seat: Seat) -> None:
        seat.attempt += 1
        gpu = {"device": "cuda:0", "sharers": self.per_gpu}  # Ray shows each actor the GPU that it has
        own = {"seat": seat.name, **(gpu if seat.kind == "cuda" else {"device": "cpu", "sharers": 1})}
        seat.doing = "starting"
        seat.work = seat.actor.work.remote({**self.order, **own}, self.post).future()
        seat.work.add_done_callback(lambda work: self.ended(seat))
