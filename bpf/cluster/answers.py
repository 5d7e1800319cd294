"""Each question is answered once: whoever asks it again, as the answer was lost, gets the same one."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from bpf.cluster.wire import BUSY, Answer

FORGET_SECONDS = 1200.0
"""An answer is kept for so long, twice as long as anybody asks for it."""


@dataclass
class _Question:
    number: int
    answer: Answer | None = None
    when: float = field(default_factory=time.monotonic)
    """It was asked, or answered, if it is."""


class Answers:
    """The last answer on each line, where questions are numbered. Several threads may ask."""

    def __init__(self) -> None:
        self._last: dict[str, _Question] = {}  # in the order of their times
        self._lock = threading.Lock()

    def give(self, line: str, number: int, make: Callable[[], Answer]) -> Answer:
        """What `make` answers, or has answered to this question; BUSY while it does, and for one before the last."""
        with self._lock:
            known = self._last.get(line)
            if known is not None and number <= known.number:
                return known.answer if number == known.number and known.answer else (BUSY, b"")
            self._forget()
            question = self._put(line, _Question(number))
        answer = make()
        with self._lock:
            question.answer, question.when = answer, time.monotonic()
            if self._last.get(line) is question:  # whoever asked may have to ask again for it
                self._put(line, question)
        return answer

    def _put(self, line: str, question: _Question) -> _Question:
        self._last.pop(line, None)
        self._last[line] = question
        return question

    def _forget(self) -> None:
        """Let go of what nobody asks for again, as of the lines of workers that have ended."""
        old = time.monotonic() - FORGET_SECONDS
        for line, question in list(self._last.items()):
            if question.when > old:
                return
            if question.answer is not None:
                del self._last[line]
