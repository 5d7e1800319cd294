"""The driver's side of the post: questions come to the desk, and answers go back."""

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from typing import Any

from bpf.cluster.post import Post
from bpf.cluster.wire import BUSY, Answer, heading

EXCHANGE_SECONDS = 10.0
SOON_SECONDS = 0.02
"""So long the answers to what was asked are waited for: most are there by then, and go as the next questions come."""
PAUSE_SECONDS = 0.2
LOST_SECONDS = 60.0
ANSWERING, HEARING = 8, 2
"""So many questions are answered at a time, and so many reports beside them: many workers may wait for the study, and
one whose report waited with them would be taken for dead."""


def new_post(ray: Any) -> Any:
    """An actor that carries questions, which Ray starts again when it dies; on the driver's node, if that lives."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    options = {"num_cpus": 0, "max_restarts": -1, "max_concurrency": 100_000, "scheduling_strategy": here}
    return ray.remote(Post).options(**options).remote()


@contextmanager
def carried(ray: Any, post: Any, desk: Callable[[bytes, bytes], Answer]) -> Iterator[None]:
    """Meanwhile `desk` answers the questions that workers ask the `post`."""
    with ThreadPoolExecutor(ANSWERING, "bpf-desk") as pool, ThreadPoolExecutor(HEARING, "bpf-desk") as hearing:
        carrier = _Carrier(ray, post, desk, pool, hearing)
        thread = threading.Thread(target=carrier.run, name="bpf-post", daemon=True)
        thread.start()
        try:
            yield
        finally:
            carrier.closing.set()
            with suppress(Exception):
                ray.kill(post)
            thread.join(LOST_SECONDS)


class _Carrier:
    """Takes questions from the post, has them answered by threads, those of reports apart, and brings the answers."""

    def __init__(
        self, ray: Any, post: Any, desk: Callable[[bytes, bytes], Answer], pool: Executor, hearing: Executor
    ) -> None:
        self._ray, self._post, self._desk, self._pool, self._hearing = ray, post, desk, pool, hearing
        self._answers: queue.SimpleQueue[tuple[str, bytes, bytes]] = queue.SimpleQueue()
        self._open: set[tuple[str, int]] = set()
        """Questions, by line and number, that are being answered, or wait for a thread."""
        self.closing, self._asking = threading.Event(), threading.Event()
        """The latter while the post is asked for questions: an answer does not wait for these, and goes by itself."""

    def run(self) -> None:
        while not self.closing.is_set():
            self._asking.set()  # before it is looked for answers, so that none is left behind
            try:
                given = self._post.exchange.remote(self._drained(), EXCHANGE_SECONDS)
                questions = self._ray.get(given, timeout=LOST_SECONDS)
            except Exception:  # Ray starts it again
                self.closing.wait(PAUSE_SECONDS)
                continue
            self._asking.clear()
            wait([begun for asked in questions if (begun := self._begin(*asked)) is not None], SOON_SECONDS)

    def _begin(self, ticket: str, question: bytes, payload: bytes) -> "Future[None] | None":
        line, number, do = heading(question)
        if (line, number) in self._open:  # it waits, such as for a full disk, and so would one thread more
            self._answers.put((ticket, BUSY, b""))
            return None
        if line:
            self._open.add((line, number))
        threads = self._hearing if do == "report" else self._pool
        return threads.submit(self._answer, (line, number), ticket, question, payload)

    def _answer(self, place: tuple[str, int], ticket: str, question: bytes, payload: bytes) -> None:
        try:
            self._answers.put((ticket, *self._desk(question, payload)))
        except Exception:  # whoever asked asks again
            return
        finally:
            self._open.discard(place)
        with suppress(Exception):
            if self._asking.is_set() and (late := self._drained()):
                self._post.give.remote(late)

    def _drained(self) -> list[tuple[str, bytes, bytes]]:
        found = []
        with suppress(queue.Empty):
            while True:
                found.append(self._answers.get_nowait())
        return found
