"""The desk: it answers the questions of workers that can reach neither the study nor the experiment's files.

A question and its answer are a JSON text and, where files go, some bytes. The driver has the desk; who carries the
questions to it, and how (`post.py`), is all the same here.
"""

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError, validate_call

from bpf.cluster.answers import Answers
from bpf.cluster.incoming import Incoming
from bpf.cluster.wire import PART_BYTES, REPORT_SECONDS, REPORTS_A_SECOND, Answer, Unsized, kind_of
from bpf.errors import BpfError, DiskFull
from bpf.files import explaining
from bpf.reading import Name, Word
from bpf.study.cells import Cause, Claim, Finished, Row
from bpf.study.holder import Progress
from bpf.study.owner import LEASE_SECONDS, Owner
from bpf.study.seam import Fenced
from bpf.study.study import Study
from bpf.workers import events
from bpf.workers.events import Event
from bpf.workers.files import Folder

_KINDS = (events.Began, events.Trained, events.Saved, events.Ended, events.GivenUp, events.Trouble)
_EVENTS: dict[str, TypeAdapter[Any]] = {kind.__name__: TypeAdapter(kind) for kind in _KINDS}
_FINISHED: TypeAdapter[list[Finished]] = TypeAdapter(list[Finished])
KINDS_AHEAD = 64
"""A worker is asked about so many kinds of cells at once."""
Count = Annotated[int, Field(ge=0)]


@dataclass
class Guest:
    """A worker as the desk knows it: by the `seat` that it was given.

    `token` is its holder's, here or in a database that it reaches by itself; `owner` is there if it owns through the
    desk. `node` is the id of its node, and `where` says that in words; it was `heard` last at that `time.monotonic`.
    """

    seat: str
    token: str = ""
    node: str = ""
    where: str = ""
    owner: Owner | None = None
    claim: Claim | None = None
    heard: float = field(default_factory=time.monotonic)


class Desk:
    """Answers for the study and the files of one experiment; its methods may be called by several threads.

    `hear` is told what happens to a worker. What a holder owns is known here; whoever owned before the driver was
    started again has to come anew.
    """

    def __init__(self, study: Study, files: Folder, hear: Callable[[str, Event], None]) -> None:
        self._study, self._files, self._hear = study, files, hear
        self._hosts = study.database.path is not None
        self._guests: dict[str, Guest] = {}
        self._answers = Answers()
        self._incoming = Incoming()
        self._lock = threading.Lock()
        self._asked = time.monotonic()
        self.stopping: set[str] | None = set()
        """The seats that are to stop; None for all."""

    def answer(self, question: bytes, payload: bytes = b"") -> Answer:
        """The answer to a question; to one that was asked before and whose answer was lost, the same one."""
        asked = json.loads(question)
        return self._answers.give(str(asked["line"]), int(asked["number"]), lambda: self._answer(asked, payload))

    def _answer(self, asked: dict[str, Any], payload: bytes) -> Answer:
        back = b""
        try:
            told: Any = getattr(self, f"do_{asked['do']}")(**asked["with"], **({"payload": payload} if payload else {}))
            if isinstance(told, bytes):
                back, told = told, None
            answer = {"told": told}
        except Unsized as question:
            answer = {"unsized": [asdict(row) for row in question.rows]}
        except Fenced as error:
            answer = {"fenced": str(error)}
        except DiskFull as error:
            answer = {"full": str(error.path)}
        except BpfError as error:
            answer = {"failed": str(error), "exit_code": error.exit_code}
        except ValidationError as error:
            answer = {"failed": f"A worker asked what makes no sense: {error}", "exit_code": 1}
        except Exception as error:  # it must not leave the worker without an answer
            answer = {"failed": f"{type(error).__name__}: {error}", "exit_code": 1}
        return json.dumps(answer).encode(), back

    # What workers ask about the study; see `WorkerStudy`.

    def do_settings(self) -> dict[str, Any]:
        return {"experiment": self._study.experiment, "settings": self._study.settings}

    @validate_call
    def do_enroll(self, seat: Word, facts: dict[str, Any], pid: int) -> str:
        """Make a worker the owner of what it will claim; returns its token."""
        with explaining(self._study.locks):
            owner = Owner(self._study.locks, facts, pid)
        with self._lock:
            guest = self._guests.setdefault(seat, Guest(seat))
            before, guest.owner, guest.token, guest.claim = guest.owner, owner, owner.token, None
        if before is not None:
            before.close()
        return owner.token

    @validate_call
    def do_claim(self, token: Word, sizes: dict[str, Annotated[int, Field(ge=1)]]) -> dict[str, Any] | None:
        """Cells to train; `sizes` says for each kind of cells that the worker knows how many are stacked."""

        def size(row: Row) -> int:
            if (known := sizes.get(kind_of(row))) is None:
                raise Unsized([row])
            return known

        guest = self._guest(token)
        assert guest.owner is not None
        try:
            guest.claim = self._study.claim(guest.owner, size)
        except Unsized as question:  # while this worker says it, others take those cells: it would be asked endlessly
            raise Unsized([*question.rows, *self._study.upcoming(KINDS_AHEAD)]) from None
        guest.token = guest.owner.token
        return None if guest.claim is None else asdict(guest.claim)

    @validate_call
    def do_progressed(self, token: Word, epoch: Count) -> None:
        self._study.progressed(self._claim(token), epoch)

    @validate_call
    def do_release(self, token: Word, max_runs: Count | None, cause: Cause | None) -> int:
        with suppress(Fenced):
            return self._study.release(self._claim(token), max_runs=max_runs, cause=cause)
        return 0

    @validate_call
    def do_finish(self, token: Word, payload: bytes) -> None:
        finished = _FINISHED.validate_python(json.loads(payload))
        self._study.finish(self._claim(token, *(one.key for one in finished)), *finished)

    @validate_call
    def do_fail(self, token: Word, key: Word, error: str, cause: Cause) -> None:
        self._study.fail(self._claim(token, key), key, error, cause)

    @validate_call
    def do_retire(self, token: Word, facts: dict[str, Any]) -> None:
        with suppress(Fenced):
            guest = self._guest(token)
            assert guest.owner is not None
            guest.owner.facts |= facts
            self._study.retire(guest.owner)
            self.leave(guest.seat)

    def do_counts(self) -> dict[str, int]:
        return self._study.counts()

    @validate_call
    def do_history(self, key: Word) -> Any:
        return json.dumps(self._study.history(key)).encode()

    @validate_call
    def do_best(self, rule: Name) -> tuple[str, float] | None:
        return self._study.best(rule)

    @validate_call
    def do_finished(self, keys: list[Word]) -> list[str]:
        return sorted(self._study.finished(keys))

    # What workers tell of themselves.

    @validate_call
    def do_report(
        self,
        seat: Word,
        node: Word,
        where: str,
        token: str,
        facts: dict[str, Any] | None,
        events: list[tuple[str, dict[str, Any]]],
    ) -> dict[str, Any]:
        """What happened to a worker, and what it says of itself if that is new.

        Tells whether to stop, whether the cells are lost, and when to report next.
        """
        with self._lock:
            guest = self._guests.setdefault(seat, Guest(seat))
            guest.heard, guest.node, guest.where = time.monotonic(), node, where
            lost = bool(self._hosts and token and token != guest.token)
            if not self._hosts:
                guest.token = token
            pause = min(max(REPORT_SECONDS, len(self._guests) / REPORTS_A_SECOND), LEASE_SECONDS / 3)
            stopping = self.stopping
            stop = stopping is None or seat in stopping
        if facts and guest.owner is not None and not lost:
            with suppress(ValidationError):  # nothing that is noted ends a training
                progress = Progress.model_validate(facts.get("at"))
                guest.owner.facts |= facts
                self._study.note(guest.owner, progress)
        for kind, values in events:
            self._hear(seat, _EVENTS[kind].validate_python(values))
        return {"stop": stop, "lost": lost, "again": pause}

    # Files.

    @validate_call
    def do_fetch(self, cohort: Word, at: Count) -> bytes:
        """The bytes of a checkpoint from a place on; none after its end, or if there is no checkpoint."""
        try:
            with self._files.checkpoint(cohort).open("rb") as file:
                file.seek(at)
                return file.read(PART_BYTES)
        except FileNotFoundError:
            return b""

    @validate_call
    def do_store(
        self, seat: Word, cohort: Word, upload: Word, at: Count, digest: str | None, payload: bytes = b""
    ) -> None:
        """The next bytes of a checkpoint, in an upload of its own; with the SHA-256 of all of it they are the last."""
        self._check_owner(seat, cohort)
        self._incoming.receive(seat, self._files.checkpoint(cohort), upload, at, digest, payload)

    @validate_call
    def do_set_aside(self, seat: Word, cohort: Word) -> str:
        self._check_owner(seat, cohort)
        return self._files.set_aside(cohort)

    @validate_call
    def do_discard(self, seat: Word, cohort: Word) -> None:
        self._check_owner(seat, cohort)
        self._files.discard(cohort)

    @validate_call
    def do_save_model(self, seat: Word, rule: Name, key: Word, payload: bytes = b"") -> None:
        guest = self.guest(seat)
        if self._hosts and (guest is None or guest.claim is None or key not in {row.key for row in guest.claim.rows}):
            raise Fenced("This worker was taken for dead; its network was not stored.")
        self._files.save_model(rule, key, payload)

    @validate_call
    def do_clear(self, seat: Word, rule: Name, cohort: Word | None) -> None:
        if cohort is not None:
            with suppress(Fenced):
                self._check_owner(seat, cohort)
                self._files.discard(cohort)
        self._files.clear(self._study, rule)

    # What the driver does.

    def guest(self, seat: str) -> Guest | None:
        with self._lock:
            return self._guests.get(seat)

    def silent(self) -> list[Guest]:
        """The workers that own through the desk and have not been heard of for as long as a lease lasts.

        To be asked often: who was not heard while this process stood still, as after Ctrl-Z, may have spoken.
        """
        now = time.monotonic()
        with self._lock:
            if now - self._asked > LEASE_SECONDS / 3:
                for guest in self._guests.values():
                    guest.heard = now
            self._asked = now
            quiet = [guest for guest in self._guests.values() if now - guest.heard > LEASE_SECONDS]
            for guest in quiet:
                if guest.owner is None and self._hosts:  # a last word that came late
                    del self._guests[guest.seat]
        return [guest for guest in quiet if guest.owner is not None]

    def tokens(self) -> list[str]:
        """Of everyone who may own cells."""
        with self._lock:
            return [guest.token for guest in self._guests.values() if guest.token]

    def leave(self, seat: str) -> None:
        """Let a worker go: what it has not given back is for others now."""
        with self._lock:
            guest = self._guests.pop(seat, None)
        self._incoming.drop(seat)
        if guest is not None and guest.owner is not None:
            guest.owner.close()

    def close(self) -> None:
        with self._lock:
            guests = list(self._guests)
        for seat in guests:
            self.leave(seat)
        self._incoming.close()

    def _guest(self, token: str) -> Guest:
        with self._lock:
            for guest in self._guests.values():
                if guest.owner is not None and guest.token == token:
                    guest.heard = time.monotonic()
                    return guest
        raise Fenced("This worker was taken for dead; its cells are for others now.")

    def _check_owner(self, seat: str, cohort: str) -> None:
        """Raise Fenced if a checkpoint is another's by now, as that of a worker which was taken for dead is.

        Who owns in a database on a server is not known here; there a worker looks at its lease before it stores.
        """
        guest = self.guest(seat)
        if self._hosts and (guest is None or guest.claim is None or guest.claim.cohort != cohort):
            raise Fenced("This worker was taken for dead; its checkpoint is for others now.")

    def _claim(self, token: str, *keys: str) -> Claim:
        """What the worker has claimed, with the cells of these keys in it."""
        claim = self._guest(token).claim
        if claim is None or not {row.key for row in claim.rows}.issuperset(keys):
            raise Fenced("A cell is no longer owned by this worker; its outcome was not stored.")
        return claim
