"""What a worker has of a study and of files that it reaches through the desk: the other end of `desk.py`."""

import hashlib
import json
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from bpf.cluster.wire import PART_BYTES, REPORT_SECONDS, Unsized, kind_of
from bpf.errors import BpfError, DiskFull, RunError
from bpf.files import write_atomically
from bpf.study.cells import Claim, Finished, Row
from bpf.study.holder import Holder, Progress
from bpf.study.seam import PATIENCE_SECONDS, Fenced, WorkerStudy, patiently
from bpf.workers.events import Event, Trained
from bpf.workers.files import Scratch, emptied
from bpf.workers.stopping import Stop

Send = Callable[[bytes, bytes], tuple[bytes, bytes]]
"""Carries a question and its bytes, and returns the answer. Raises Away when it may work later."""
BUSY_SECONDS = 10.0
"""So long it is waited before a driver that is busy with a question is asked again."""

_CLAIM: TypeAdapter[Claim] = TypeAdapter(Claim)
_ROWS: TypeAdapter[list[Row]] = TypeAdapter(list[Row])


class Away(RunError):
    """Nobody carries questions just now."""

    def __init__(self, why: str) -> None:
        super().__init__(f"The driver cannot be reached: {why}")


class Line:
    """One question after the other, each asked until it is answered. A thread has its own."""

    def __init__(self, send: Send, patience: float = PATIENCE_SECONDS) -> None:
        self._send, self._name, self._number = send, secrets.token_hex(8), 0
        self.patience = patience
        self.on_wait: Callable[[str], object] = lambda reason: None

    def ask(self, do: str, payload: bytes = b"", **values: Any) -> Any:
        """What the desk tells. Raises Fenced, Unsized or what the desk failed with."""
        return self.ask_bytes(do, payload, **values)[0]

    def ask_bytes(self, do: str, payload: bytes = b"", **values: Any) -> tuple[Any, bytes]:
        self._number += 1
        question = {"line": self._name, "number": self._number, "do": do, "with": values}
        asked = json.dumps(question).encode()
        while True:
            answer, back = patiently(lambda: self._send(asked, payload), Away, self.patience, self.on_wait)
            told = json.loads(answer)
            if "busy" not in told:
                break
            if not self.patience:
                raise Away("it has not answered yet")
            self.on_wait("The driver has not answered yet; it is waited for.")
            time.sleep(BUSY_SECONDS)
        if "fenced" in told:
            raise Fenced(told["fenced"])
        if "unsized" in told:
            raise Unsized(_ROWS.validate_python(told["unsized"]))
        if "full" in told:
            raise DiskFull(Path(told["full"]))
        if "failed" in told:
            error = RunError(told["failed"])
            error.exit_code = told["exit_code"]
            raise error
        return told["told"], back


class RemoteStudy:
    """A `WorkerStudy` at the desk, of the worker in a `seat`."""

    def __init__(self, line: Line, seat: str) -> None:
        self._line, self._seat = line, seat
        told = line.ask("settings")
        self.experiment: str = told["experiment"]
        self.settings: dict[str, Any] = told["settings"]
        self._sizes: dict[str, int] = {}
        self._facts: dict[str, Any] = {}

    @property
    def patience(self) -> float:
        return self._line.patience

    @patience.setter
    def patience(self, seconds: float) -> None:
        self._line.patience = seconds

    @property
    def on_wait(self) -> Callable[[str], object]:
        return self._line.on_wait

    @on_wait.setter
    def on_wait(self, told: Callable[[str], object]) -> None:
        self._line.on_wait = told

    @property
    def spec(self) -> dict[str, Any]:
        spec: dict[str, Any] = self.settings["spec"]
        return spec

    def repair(self) -> int:
        return 0  # each claim does it, and the driver

    @contextmanager
    def enrolled(self, facts: dict[str, Any]) -> Iterator[Holder]:
        self._facts = facts
        holder = Holder(self._enroll(), facts)
        try:
            yield holder
        except BpfError:
            self.patience = 0.0
            with suppress(BpfError):
                self._retire(holder)
            raise
        self._retire(holder)

    def _retire(self, holder: Holder) -> None:
        self._line.ask("retire", token=holder.token, facts=holder.facts)

    def _enroll(self) -> str:
        token: str = self._line.ask("enroll", seat=self._seat, facts=self._facts, pid=os.getpid())
        return token

    def claim(self, owner: Holder, size: Callable[[Row], int]) -> Claim | None:
        while True:
            try:
                told = self._line.ask("claim", token=owner.token, sizes=self._sizes)
                return None if told is None else _CLAIM.validate_python(told)
            except Unsized as question:
                self._sizes |= {kind_of(row): size(row) for row in question.rows}
            except Fenced:
                owner.begin_anew(self._enroll())

    def note(self, owner: Holder, progress: Progress) -> None:
        owner.facts = owner.facts | {"at": progress.model_dump()}  # it goes with the next report

    def progressed(self, claim: Claim, epoch: int) -> None:
        self._line.ask("progressed", token=claim.token, epoch=epoch)

    def release(self, claim: Claim, *, max_runs: int | None = None, cause: str | None = None) -> int:
        released: int = self._line.ask("release", token=claim.token, max_runs=max_runs, cause=cause)
        return released

    def finish(self, claim: Claim, *finished: Finished) -> None:
        self._line.ask("finish", json.dumps([asdict(one) for one in finished]).encode(), token=claim.token)

    def fail(self, claim: Claim, key: str, error: str, cause: str = "exception") -> None:
        self._line.ask("fail", token=claim.token, key=key, error=error, cause=cause)

    def counts(self) -> dict[str, int]:
        counts: dict[str, int] = self._line.ask("counts")
        return counts

    def history(self, key: str) -> Any:
        return json.loads(self._line.ask_bytes("history", key=key)[1])

    def best(self, rule: str) -> tuple[str, float] | None:
        told = self._line.ask("best", rule=rule)
        return None if told is None else (told[0], told[1])

    def finished(self, keys: Iterable[str]) -> set[str]:
        return set(self._line.ask("finished", keys=sorted(keys)))

    def close(self) -> None:
        pass


class RemoteFiles(Scratch):
    """Checkpoints and models at the desk, worked on in a folder of this process, of the worker in a `seat`."""

    def __init__(self, line: Line, seat: str) -> None:
        super().__init__()
        self._line, self._seat = line, seat

    def checkpoint(self, cohort: str, begun: bool = False) -> Path:
        path = emptied(super().checkpoint(cohort))
        if begun:
            first = self._part(cohort, 0)
            if first:
                write_atomically(path, lambda file: file.writelines(self._parts(cohort, first)))
        return path

    def store(self, cohort: str) -> None:
        at, digest, upload = 0, hashlib.sha256(), secrets.token_hex(8)
        with super().checkpoint(cohort).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            while part := file.read(PART_BYTES):
                digest.update(part)
                last = at + len(part) == size
                summed = digest.hexdigest() if last else None
                whose = {"seat": self._seat, "cohort": cohort, "upload": upload}
                self._line.ask("store", part, **whose, at=at, digest=summed)
                at += len(part)

    def set_aside(self, cohort: str) -> str:
        super().discard(cohort)
        aside: str = self._line.ask("set_aside", seat=self._seat, cohort=cohort)
        return aside

    def discard(self, cohort: str) -> None:
        super().discard(cohort)
        with suppress(BpfError):
            self._line.ask("discard", seat=self._seat, cohort=cohort)

    def save_model(self, rule: str, key: str, content: bytes) -> None:
        self._line.ask("save_model", content, seat=self._seat, rule=rule, key=key)

    def clear(self, study: WorkerStudy[Any], rule: str, cohort: str | None = None) -> None:
        if cohort is not None:
            super().discard(cohort)
        with suppress(BpfError):
            self._line.ask("clear", seat=self._seat, rule=rule, cohort=cohort)

    def _part(self, cohort: str, at: int) -> bytes:
        return self._line.ask_bytes("fetch", cohort=cohort, at=at)[1]

    def _parts(self, cohort: str, part: bytes) -> Iterator[bytes]:
        at = 0
        while part:
            yield part
            at += len(part)
            part = self._part(cohort, at)


class Pulse:
    """A thread that reports what happens here and what the worker says of itself, as its holder has it.

    It learns whether to stop and whether the cells are lost.
    Once it is silent for longer than a lease lasts, the worker is taken for dead. `me` are the worker's seat, the id of
    its node, and where that is in words.
    """

    def __init__(self, line: Line, me: dict[str, str], stop: Stop) -> None:
        self._line, self._me, self._stop = line, me, stop
        self.holder: Callable[[], Holder | None] = lambda: None
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._said: dict[str, Any] = {}
        self._soon, self._ended = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="bpf-pulse", daemon=True)
        self._thread.start()

    def tell(self, event: Event) -> None:
        self._events.put(event)
        if not isinstance(event, Trained):
            self._soon.set()

    def close(self) -> None:
        """Report what is left to report."""
        self._ended = True
        self._soon.set()
        self._thread.join(10.0)

    def _run(self) -> None:
        while not self._ended:
            pause = REPORT_SECONDS
            try:
                pause = self._report()
            except BpfError:
                self._stop.request()
            if self._soon.wait(pause):
                time.sleep(min(0.05, pause))  # what happens together is told together
            self._soon.clear()
        with suppress(BpfError):
            self._report()

    def _report(self) -> float:
        holder = self.holder()
        token, lost, facts = (holder.token, holder.lost, holder.facts) if holder else ("", threading.Event(), {})
        events = [(type(event).__name__, asdict(event)) for event in self._drained()]
        new = None if facts == self._said else facts
        told = self._line.ask("report", b"", **self._me, token=token, facts=new, events=events)
        self._said = facts
        if told["stop"]:
            self._stop.request()
        if told["lost"]:
            lost.set()
        return float(told["again"])

    def _drained(self) -> list[Event]:
        """What has happened; of epochs in a row the last one only."""
        found: list[Event] = []
        while True:
            try:
                event = self._events.get_nowait()
            except queue.Empty:
                return found
            if isinstance(event, Trained) and found and isinstance(found[-1], Trained):
                found.pop()
            found.append(event)
