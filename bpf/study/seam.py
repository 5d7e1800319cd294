"""What a worker needs of a study, wherever the study lies. `Study` has it where the database can be reached."""

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

from bpf.errors import RunError
from bpf.study.cells import Claim, Finished, Row
from bpf.study.holder import Holder, Progress

PATIENCE_SECONDS = 600.0
"""How long a worker waits for what is away, such as a database. It waits for a full disk as long as it takes."""
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0

H = TypeVar("H", bound=Holder)
T = TypeVar("T")


class Fenced(RunError):
    """The cell belongs to another process by now; the outcome was not stored."""


def patiently(step: Callable[[], T], passing: type[Exception], patience: float, on_wait: Callable[[str], object]) -> T:
    """Do a step again while it fails so, for as many seconds as there is patience; each time it is told what failed."""
    began, pause = time.monotonic(), FIRST_PAUSE
    while True:
        try:
            return step()
        except passing as failure:
            if time.monotonic() - began > patience:
                raise
            on_wait(str(failure))
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


class WorkerStudy(Protocol[H]):
    """An experiment's cells as a worker claims, trains and settles them. The methods are those of `Study`.

    `patience` is how many seconds to wait for what fails in a way that passes, and `on_wait` is told each time what the
    matter is. A holder `H` is what `enrolled` gives, known as alive until the context ends.
    """

    experiment: str
    settings: dict[str, Any]
    patience: float
    on_wait: Callable[[str], object]

    @property
    def spec(self) -> dict[str, Any]: ...

    def repair(self) -> int: ...

    def enrolled(self, facts: dict[str, Any]) -> AbstractContextManager[H]: ...

    def claim(self, owner: H, size: Callable[[Row], int]) -> Claim | None: ...

    def note(self, owner: H, progress: Progress) -> None: ...

    def progressed(self, claim: Claim, epoch: int) -> None: ...

    def release(self, claim: Claim, *, max_runs: int | None = None, cause: str | None = None) -> int: ...

    def finish(self, claim: Claim, *finished: Finished) -> None: ...

    def fail(self, claim: Claim, key: str, error: str, cause: str = "exception") -> None: ...

    def counts(self) -> dict[str, int]: ...

    def history(self, key: str) -> Any: ...

    def best(self, rule: str) -> tuple[str, float] | None: ...

    def finished(self, keys: Iterable[str]) -> set[str]: ...
