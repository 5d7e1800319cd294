"""Worker processes: started, watched, started again when they die, and asked to stop.

The supervisor trains nothing and decides nothing about cells: the study does. So it may die as well at any moment;
its workers notice, store what they have and end.
"""

import signal
import time
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import connection as connections
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from bpf.errors import BpfError, RunError
from bpf.study.study import Study
from bpf.workers import processes
from bpf.workers.events import Began, Ended, Event, Left, Observe, Saved, Trouble
from bpf.workers.job import Job
from bpf.workers.process import work
from bpf.workers.stopping import CutShort, Stop

MAX_CRASHES = 5
"""As many crashes in a row, with nothing stored in between, end the run."""
POLL_SECONDS = 0.2
OTHERS_SECONDS = 2.0
GRACE_SECONDS = 5.0


class Crashed(RunError):
    """Workers crash again and again."""


@dataclass
class Seat:
    """A place for a worker, which a process takes; `number` counts from 1."""

    number: int
    job: Job
    process: BaseProcess | None = None
    connection: Connection | None = None
    left: Left | None = None
    doing: str = ""
    told_to_stop: bool = False


@dataclass
class Supervisor:
    """Runs one worker for each of `jobs` until the experiment has nothing left to do."""

    jobs: list[Job]
    study: Study
    observe: Observe
    stop: Stop
    _seats: list[Seat] = field(default_factory=list)
    _crashes: int = 0
    _cut_short: bool = False

    def run(self) -> None:
        """Return when every cell is finished, also those that workers elsewhere train.

        Raises Interrupted after a request to stop, Crashed after `MAX_CRASHES` crashes in a row, and whatever error
        a worker ended with. The workers have ended in any case.
        """
        self._seats = [Seat(number, job) for number, job in enumerate(self.jobs, 1)]
        try:
            self._fill_seats()
            while True:
                while self._alive():
                    self._listen()
                    self._ask_to_stop()
                counts = self.study.counts()
                claimable = counts["pending"] + counts["interrupted"]
                if self.stop.asked and (claimable or counts["running"]):
                    raise CutShort if self._cut_short else self.stop.interruption()
                if not claimable and not counts["running"]:
                    return
                if claimable:  # given back by a worker elsewhere, or left by one that died
                    self._fill_seats()
                else:
                    self._wait_for_others(counts["running"])
        finally:
            self._end_all()

    def _fill_seats(self) -> None:
        for seat in self._seats:
            if not self.stop.asked:
                self._start(seat)

    def _start(self, seat: Seat) -> None:
        mine, theirs = connections.Pipe()
        process = processes.start(work, seat.job, theirs, name=f"bpf-worker-{seat.number}")
        theirs.close()
        seat.process, seat.connection, seat.left = process, mine, None
        seat.doing, seat.told_to_stop = "starting", False

    def _alive(self) -> list[Seat]:
        return [seat for seat in self._seats if seat.process is not None]

    def _listen(self) -> None:
        """Hear what workers tell, and notice those that are gone."""
        alive = self._alive()
        ready = connections.wait([seat.connection for seat in alive if seat.connection], POLL_SECONDS)
        for seat in alive:
            if seat.connection in ready:
                self._hear(seat)

    def _hear(self, seat: Seat) -> None:
        assert seat.connection is not None
        try:
            event: Event = seat.connection.recv()
        except (EOFError, OSError):
            self._gone(seat)
            return
        except Exception as error:  # killed while it told something
            self.observe(seat.number, Trouble(f"Worker {seat.number} was cut short: {type(error).__name__}"))
            self._gone(seat)
            return
        if isinstance(event, Left):
            seat.left = event
            return
        if isinstance(event, Began):
            seat.doing = f"{event.rule} with arch {event.arch}"
        elif isinstance(event, Saved) or (isinstance(event, Ended) and event.state != "failed"):
            self._crashes = 0
        self.observe(seat.number, event)

    def _gone(self, seat: Seat) -> None:
        """A worker has ended, as it said or by a crash."""
        assert seat.process is not None
        assert seat.connection is not None
        seat.connection.close()
        seat.process.join(GRACE_SECONDS)
        if seat.process.is_alive():  # it closed its end and goes on: not ours any more
            seat.process.kill()
            seat.process.join()
        left = seat.left or Left("crashed", _how(seat.process.exitcode))
        seat.process = seat.connection = None
        self.observe(seat.number, left)
        self._cut_short |= left.how == "cut short"
        if left.how == "failed":
            error = BpfError(left.text)
            error.exit_code = left.exit_code
            raise error
        if left.how == "crashed":
            self._crashed(seat, left)

    def _crashed(self, seat: Seat, left: Left) -> None:
        self._crashes += 1
        reason = left.text.strip().splitlines()[-1] if left.text.strip() else "for no known reason"
        if self._crashes >= MAX_CRASHES:
            raise Crashed(
                f"{self._crashes} workers in a row have crashed, the last one {reason}, while {seat.doing}. "
                "Nothing finished is lost."
            )
        if self.stop.asked:
            return
        self.observe(seat.number, Trouble(f"Worker {seat.number} crashed ({reason}) and is started again."))
        self._start(seat)

    def _ask_to_stop(self) -> None:
        if not self.stop.asked:
            return
        for seat in self._alive():
            if seat.connection is not None and not seat.told_to_stop:
                seat.told_to_stop = True
                with suppress(OSError):  # gone by itself
                    seat.connection.send("stop")

    def _wait_for_others(self, running: int) -> None:
        """Workers elsewhere train the rest; if they die, their cells come back."""
        cells = "1 cell" if running == 1 else f"{running} cells"
        self.observe(0, Trouble(f"Waiting for {cells} that workers elsewhere train."))
        end = time.monotonic() + OTHERS_SECONDS
        while time.monotonic() < end and not self.stop.asked:
            time.sleep(POLL_SECONDS)

    def _end_all(self) -> None:
        """After an error or a second Ctrl-C: what is not stored now is trained again."""
        alive = self._alive()
        for seat in alive:
            assert seat.process is not None
            seat.process.kill()
            seat.process.join()
        if alive:
            with suppress(RunError):
                self.study.repair(blame=False)


def _how(exit_code: int | None) -> str:
    if exit_code is None or exit_code >= 0:
        return f"by exiting with code {exit_code}"
    try:
        return f"by signal {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"by signal {-exit_code}"
