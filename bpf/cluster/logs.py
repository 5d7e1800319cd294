"""What happened on each node, as lines in a file of its name in the experiment's `logs/`."""

import datetime
import os
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

from bpf.reading import file_name
from bpf.workers.events import Began, Ended, Event, Left, Trouble


class NodeLogs:
    """Lines are appended; that one cannot be written is no reason to fail."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory / "logs"

    def note(self, where: str, worker: str, event: Event) -> None:
        """Note what happened to a worker at a node; `where` names it, and is empty for the driver."""
        if not isinstance(event, Began | Ended | Trouble | Left):
            return
        told = " ".join(f"{each.name}={getattr(event, each.name)!r}" for each in fields(event))
        time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        path = self._directory / f"node-{file_name(where.replace(' ', '-')) or 'driver'}.log"
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
        with suppress(OSError):
            self._directory.mkdir(exist_ok=True)
            with os.fdopen(os.open(path, flags, 0o644), "a", encoding="utf-8") as file:
                file.write(f"{time} worker {worker} {type(event).__name__} {told}\n")
