"""Each question is answered once: whoever asks it again, as the answer was lost, gets the same one."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from bpf.cluster.wire import BUSY

FORGET_SECONDS = 1200.0
"""An answer is kept for so long, twice as long as anybody asks for it."""
Answer = tuple[bytes, bytes]


@dataclass
class _Question:
    number: int
    answer: Future[Answer] = field(default_factory=Future)
    when: float = field(default_factory=time.monotonic)
    """It was asked, or answered, if it is."""


class Answers:
    """The last answer on each line, where questions are numbered. Several threads may ask."""

    def __init__(self) -> None:
        self._last: dict[str, _Question] = {}  # in the order of their times
        self._lock = threading.Lock()

    def give(self, line: str, number: int, make: Callable[[], Answer]) -> Answer:
        """What `make` answers, or has answered to this question."""
        with self._lock:
            known = self._last.get(line)
            if known is not None and number < known.number:  # whoever asked it has its answer
                return BUSY, b""
            new = known is None or number > known.number
            if new:
                self._forget()
                self._last.pop(line, None)
                known = self._last[line] = _Question(number)
        assert known is not None
        if new:
            try:
                known.answer.set_result(make())
            except BaseException as error:
                known.answer.set_exception(error)
            with self._lock:  # whoever asked may have to ask again for it
                known.when = time.monotonic()
                if self._last.get(line) is known:
                    self._last[line] = self._last.pop(line)
        return known.answer.result()

    def _forget(self) -> None:
        """Let go of what nobody asks for again, as of the lines of workers that have ended."""
        old = time.monotonic() - FORGET_SECONDS
        for line, question in list(self._last.items()):
            if question.when > old:
                return
            if question.answer.done():
                del self._last[line]
