"""The driver's side of the post: questions come to the desk, and answers go back."""

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from typing import Any

from bpf.cluster.post import Post
from bpf.cluster.wire import BUSY, heading

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
def carried(ray: Any, post: Any, desk: Callable[[bytes, bytes], tuple[bytes, bytes]]) -> Iterator[None]:
    """Meanwhile `desk` answers the questions that workers ask the `post`."""
    closing = threading.Event()
    asking = threading.Event()
    """Set while the post is asked for questions: an answer does not wait for these, and goes by itself."""
    answers: queue.SimpleQueue[tuple[str, bytes, bytes]] = queue.SimpleQueue()

    def drained() -> list[tuple[str, bytes, bytes]]:
        found = []
        with suppress(queue.Empty):
            while True:
                found.append(answers.get_nowait())
        return found

    being_answered: set[tuple[str, int]] = set()

    def answer(place: tuple[str, int], ticket: str, question: bytes, payload: bytes) -> None:
        try:
            answers.put((ticket, *desk(question, payload)))
        except Exception:  # whoever asked asks again
            return
        finally:
            being_answered.discard(place)
        with suppress(Exception):
            if asking.is_set() and (late := drained()):
                post.give.remote(late)

    def begin(ticket: str, question: bytes, payload: bytes) -> "Future[None] | None":
        line, number, do = heading(question)
        if (line, number) in being_answered:  # it waits, such as for a full disk, and so would one thread more
            answers.put((ticket, BUSY, b""))
            return None
        if line:
            being_answered.add((line, number))
        return (hearing if do == "report" else pool).submit(answer, (line, number), ticket, question, payload)

    def exchange() -> None:
        while not closing.is_set():
            asking.set()  # before it is looked for answers, so that none is left behind
            try:
                questions = ray.get(post.exchange.remote(drained(), EXCHANGE_SECONDS), timeout=LOST_SECONDS)
            except Exception:  # Ray starts it again
                closing.wait(PAUSE_SECONDS)
                continue
            asking.clear()
            wait([begun for asked in questions if (begun := begin(*asked)) is not None], SOON_SECONDS)

    with ThreadPoolExecutor(ANSWERING, "bpf-desk") as pool, ThreadPoolExecutor(HEARING, "bpf-desk") as hearing:
        thread = threading.Thread(target=exchange, name="bpf-post", daemon=True)
        thread.start()
        try:
            yield
        finally:
            closing.set()
            with suppress(Exception):
                ray.kill(post)
            thread.join(LOST_SECONDS)
