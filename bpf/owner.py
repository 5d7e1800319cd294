"""Who owns cells: a file lock that lives exactly as long as the process that holds it."""

import os
import secrets
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from filelock import FileLock, Timeout


class Owner:
    """A process's right to its cells: a file lock that the operating system drops when the process ends.

    So a dead owner is known at once, however it died, without heartbeats and without a grace period.
    """

    def __init__(self, locks: Path) -> None:
        locks.mkdir(parents=True, exist_ok=True)
        self.token = secrets.token_hex(8)
        self._path = locks / f"{self.token}.lock"
        self._process = os.getpid()
        self._lock = FileLock(self._path, thread_local=False)
        self._lock.acquire()

    def close(self) -> None:
        """Let go. Cells that were not released before count as interrupted from here on."""
        if os.getpid() == self._process:  # a forked child holds a copy of this object, not the lock
            with suppress(OSError):  # Windows removes no open file; `sweep` does it later
                self._path.unlink(missing_ok=True)
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def is_alive(locks: Path, token: str) -> bool:
    """Whether the owner still holds its lock; the lock file of a dead one is removed."""
    path = locks / f"{token}.lock"
    if not path.exists():
        return False
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return True
    with suppress(OSError):
        path.unlink(missing_ok=True)
    lock.release()
    return False


def sweep(locks: Path) -> None:
    """Remove the lock files of owners that died without leaving a cell behind."""
    for path in locks.glob("*.lock"):
        is_alive(locks, path.stem)
