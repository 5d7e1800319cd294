"""Lock files, which live exactly as long as the processes that hold them, and folders that nobody else can write to."""

import os
import stat
from pathlib import Path

from filelock import FileLock, Timeout

from bpf.errors import UsageError

PROBE_SECONDS = 1.0
"""How long to wait for a lock that may only be probed: who looks whether it is held holds it for a moment."""


def is_held(lock: Path, unknown: bool | None = True) -> bool | None:
    """Whether a living process holds the lock; None if there is no such file, `unknown` if it may not be opened."""
    if lock.is_symlink() or not lock.is_file():  # to ask opens it for writing
        return None
    probe = FileLock(lock, thread_local=False)
    try:
        probe.acquire(blocking=False)
    except Timeout:
        return True
    except OSError:  # in a directory that may only be read, or of another user
        return unknown
    probe.release()
    return False


def private(directory: Path) -> Path:
    """A directory that only this user can write to, made if need be. Raises UsageError if it cannot be that."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.lstat()
        mine = stat.S_ISDIR(status.st_mode) and (not hasattr(os, "geteuid") or status.st_uid == os.geteuid())
        if mine and status.st_mode & 0o077 and os.name == "posix":
            directory.chmod(0o700)
    except OSError:
        mine = False
    if not mine:
        raise UsageError(
            f"{directory}, where workers are to keep their locks, is not a directory of yours. Set TMPDIR to one that "
            "nobody else can write to."
        )
    return directory
