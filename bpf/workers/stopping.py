"""The request to stop: by Ctrl-C, by a signal of the system or of a batch scheduler, or because time is up."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

from bpf import interrupts
from bpf.interrupts import SIGNALS, Interrupted


class CutShort(Interrupted):
    """Asked to stop while something could not be stored; what is not will be trained again."""

    def __init__(self) -> None:
        super().__init__("Stopped. What could not be stored is trained again from the last checkpoint.")


@dataclass
class Stop:
    """Whether to stop after the current epoch: `request` was called, time is up, or `also` says so."""

    max_hours: float | None = None
    also: Callable[[], bool] = lambda: False
    reason: str = ""
    _asked: bool = False
    _began: float = field(default_factory=time.monotonic)

    @property
    def asked(self) -> bool:
        if not self._asked and self.max_hours is not None and time.monotonic() - self._began >= self.max_hours * 3600:
            self.request(f"{self.max_hours:g} hours are over")
        if not self._asked and self.also():
            self.request()
        return self._asked

    def interruption(self) -> Interrupted:
        """What to raise when the request has been met."""
        return Interrupted(f"Stopped{f' ({self.reason})' if self.reason else ''}, and everything is stored.")

    def request(self, reason: str = "") -> None:
        self._asked, self.reason = True, self.reason or reason

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Ask on the first SIGINT, SIGTERM or SIGUSR1; the second SIGINT interrupts at once.

        In a thread, which gets no signals, they are left to the program.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: FrameType | None) -> None:
            if self._asked and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.request()

        interrupts.check()
        before = {number: signal.signal(number, ask) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
