"""The driver's side of the post: questions come to the desk, and answers go back."""

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

from bpf.cluster.post import Post
from bpf.cluster.wire import is_report

TAKE_SECONDS = 1.0
PAUSE_SECONDS = 0.2
LOST_SECONDS = 60.0
ANSWERING, HEARING = 8, 2
"""So many questions are answered at a time, and so many reports beside them: many workers may wait for the study, and
one whose report waited with them would be taken for dead."""


def new_post(ray: Any) -> Any:
    """An actor that carries questions, which Ray starts again when it dies."""
    return ray.remote(Post).options(num_cpus=0, max_restarts=-1, max_concurrency=100_000).remote()


@contextmanager
def carried(ray: Any, post: Any, desk: Callable[[bytes, bytes], tuple[bytes, bytes]]) -> Iterator[None]:
    """Meanwhile `desk` answers the questions that workers ask the `post`."""
    closing = threading.Event()
    answers: queue.SimpleQueue[tuple[str, bytes, bytes] | None] = queue.SimpleQueue()

    def answer(ticket: str, question: bytes, payload: bytes) -> None:
        with suppress(Exception):  # whoever asked asks again
            answers.put((ticket, *desk(question, payload)))

    def take() -> None:
        while not closing.is_set():
            try:
                for asked in ray.get(post.take.remote(TAKE_SECONDS), timeout=LOST_SECONDS):
                    (hearing if is_report(asked[1]) else pool).submit(answer, *asked)
            except Exception:  # Ray starts it again
                closing.wait(PAUSE_SECONDS)

    def give() -> None:
        while (answered := answers.get()) is not None:
            batch = [answered]
            while not answers.empty() and (answered := answers.get()) is not None:
                batch.append(answered)
            with suppress(Exception):
                post.give.remote(batch)

    with ThreadPoolExecutor(ANSWERING, "bpf-desk") as pool, ThreadPoolExecutor(HEARING, "bpf-desk") as hearing:
        threads = [threading.Thread(target=each, name="bpf-post", daemon=True) for each in (take, give)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            closing.set()
            answers.put(None)
            with suppress(Exception):
                ray.kill(post)
            for thread in threads:
                thread.join(LOST_SECONDS)
