"""This machine: its memory, the processor cores that this process may use, and who uses it."""

import math
import os
import re
from pathlib import Path


def cores() -> int:
    """Processor cores that this process may use: by its affinity and, in a container, by its quota."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(usable, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no such file, or `max`: no quota
        return usable


def memory_bytes() -> float:
    """This machine's memory; infinite where the system does not tell."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):  # not on Windows, and not every system knows both
        return math.inf


def user() -> str:
    """The user's name as a part of a path."""
    import getpass

    try:
        return re.sub(r"[^\w.-]", "_", getpass.getuser())
    except (KeyError, OSError):  # a container's user without a name
        return "unknown"
