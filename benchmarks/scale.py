"""How many workers one study serves: real claims, notes, reports and finishes, without any training.

    python benchmarks/scale.py                                         # everything, 15 to 20 minutes on two cores
    python benchmarks/scale.py --through ray --workers 256 1000        # a part
    python benchmarks/scale.py --loads saturated --seconds 20 --rounds 3 --json scale.json

Each simulated worker is a thread (with a second one for its reports) in one of a few processes. It opens the study and
enrolls, claims a cohort of four cells of one structure, notes every five seconds how far it is, and after a while asks
for the best, finishes its cells together (results and histories of three executions and 100 epochs), looks which models
are of no more use, discards the checkpoint and claims again. At last it releases what it has and retires. The study is
reached

- `desk`: in SQLite, by calls of the desk in this process, which also has the workers: what the desk alone costs;
- `ray`: in SQLite, through the post of a Ray cluster of this command's own, as workers of `bpf tune --on ray` do;
- `postgres`: on a PostgreSQL server of this command's own (with fsync), each worker with its own connections; every
  eight workers are taken for a machine.

`start` is the time from the request to enroll until every worker has its first cohort, all asking at once, or one by
one over the time of `--start-over`, in which they have connected before. After that come the loads: cohorts of so many
seconds, in a steady state (N workers claim N / seconds times a second), the longest first, and `saturated`, where
nobody waits between two cohorts. Claims and finishes are counted, and how long a worker waits for each: the median, the
99th percentile, and the longest; also how many processor cores the driver's process, the post and the whole machine
used. With many workers `saturated` is too short for each to come to its next claim, so its finishes say what the study
can do. In the end it has to say that each cell was finished by one worker, once.

`files` stores checkpoints at the desk with four workers at a time, and tells MiB a second.

Workers share the machine with what they measure, so a machine of its own for each would do better than what is printed.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from bpf import api
from bpf.cluster.carrier import carried, new_post
from bpf.cluster.desk import Desk
from bpf.cluster.remote import Line, Pulse, RemoteFiles, RemoteStudy, Send
from bpf.experiment.grid import expand
from bpf.spec.grid import GridSpec
from bpf.study import owner as owners
from bpf.study.cells import Cell, Claim, Finished, Row
from bpf.study.database import Database
from bpf.study.holder import Progress
from bpf.study.patience import Unreachable
from bpf.study.seam import PATIENCE_SECONDS, Fenced, patiently
from bpf.study.study import Study
from bpf.workers.events import Began, Ended, Event, Trained
from bpf.workers.files import Folder
from bpf.workers.stopping import Stop

NAME, CELLS, EPOCHS, EXECUTIONS = "scale", 4, 100, 3
NOTE_SECONDS = 5.0
PER_MACHINE = 8
MODEL_BYTES, CHECKPOINT_BYTES = 2_600_000, 125_000_000
"""Of a 784-500-500-10 network, and of twelve such runs with Adam's moments."""
FASTEST = 30
"""Cohorts a second that a study may finish on a machine like this one: a round of all workers takes as long."""
GOOD = 0.002
"""The best so far: so good that few are better, as later in a grid."""
FACTS = {"host": "node", "device": "cpu", "bpf": "0", "torch": "0"}
STANDARD = ("saturated", "30", "600")


@dataclass(frozen=True)
class Phase:
    """Until `end` (by `time.monotonic`, the same for all processes) a cohort takes so many `seconds`."""

    load: str
    seconds: float
    begin: float
    end: float


@dataclass
class Diary:
    """What workers have been through: waits as (what for, from, to), and the keys that they have finished."""

    waits: list[tuple[str, float, float]] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)
    fenced: int = 0
    failures: list[str] = field(default_factory=list)


class DeskFiles(RemoteFiles):
    """As workers have them, but for a folder of each: a thousand of those are never on one machine."""

    def __init__(self, line: Line, folder: Path, seat: str) -> None:
        Folder.__init__(self, folder)
        self._line, self._seat = line, seat

    def close(self) -> None:
        pass


@dataclass
class Reached:
    """A study and files, wherever they are, and who is told what happens."""

    study: Any
    files: Any
    pulse: Pulse | None = None

    def tell(self, event: Event) -> None:
        if self.pulse is not None:
            self.pulse.tell(event)

    def close(self) -> None:
        if self.pulse is not None:
            self.pulse.close()
        self.study.close()


def at_desk(send: Send, folder: Path, seat: str) -> Reached:
    pulse = Pulse(Line(send), {"seat": seat, "node": "0" * 56, "where": "node (127.0.0.1)"}, Stop())
    line = Line(send)
    return Reached(RemoteStudy(line, seat), DeskFiles(line, folder, seat), pulse)


def at_server(url: str, folder: Path, seat: str) -> Reached:
    study = patiently(lambda: Study.open(Database.at(url), NAME), Unreachable, PATIENCE_SECONDS, lambda reason: None)
    study.patience = PATIENCE_SECONDS
    return Reached(study, Folder(folder))


class Crowd:
    """Workers in threads of this process, which come `over` so many seconds.

    The methods are called in turn; each returns when all are so far.
    """

    def __init__(self, reach: Callable[[str], Reached], seats: list[str], outcomes: list[Any], over: float) -> None:
        self._reach, self._outcomes, self._diary = reach, outcomes, Diary()
        self._over = over
        self._reached: Counter[str] = Counter()
        self._may: defaultdict[str, threading.Event] = defaultdict(threading.Event)
        self._lock = threading.Lock()
        self._schedule: list[Phase] = []
        self._threads = [threading.Thread(target=self._life, args=(seat,), daemon=True) for seat in seats]

    def connect(self) -> None:
        for thread in self._threads:
            thread.start()
        self._all("connected")

    def begin(self) -> None:
        self._may["begin"].set()
        self._all("claimed")

    def work(self, schedule: list[Phase]) -> Diary:
        self._schedule = schedule
        self._may["work"].set()
        for thread in self._threads:
            thread.join()
        return self._diary

    def _all(self, stage: str) -> None:
        while self._reached[stage] < len(self._threads):
            if self._diary.failures:
                raise RuntimeError(self._diary.failures[0])
            time.sleep(0.02)

    def _has(self, stage: str) -> None:
        with self._lock:
            self._reached[stage] += 1

    def _life(self, seat: str) -> None:
        try:
            machine = f"machine-{int(seat.partition('-')[0]) // PER_MACHINE}"
            _machines.here.name = machine
            time.sleep(random.uniform(0, self._over))
            with closing(self._reach(seat)) as reached:
                self._has("connected")
                self._may["begin"].wait()
                time.sleep(random.uniform(0, self._over))
                with reached.study.enrolled(dict(FACTS)) as holder:
                    if reached.pulse is not None:
                        reached.pulse.holder = lambda: holder
                    # of different sizes, so that not all of them finish at once for ever
                    claim = self._claim(reached, holder, random.randint(1, CELLS))
                    self._has("claimed")
                    self._may["work"].wait()
                    self._work(reached, holder, claim)
                reached.study.counts()
        except Exception as error:
            self._diary.failures.append(f"{seat}: {type(error).__name__}: {error}")

    def _work(self, reached: Reached, holder: Any, claim: Claim) -> None:
        for phase in self._schedule:
            due = max(time.monotonic(), phase.begin) + random.uniform(0, phase.seconds)
            while self._train(reached, holder, claim, due, phase.end):
                self._finish(reached, claim)
                claim = self._claim(reached, holder)
                due = time.monotonic() + phase.seconds * random.uniform(0.8, 1.2)
        reached.study.release(claim)

    def _train(self, reached: Reached, holder: Any, claim: Claim, due: float, end: float) -> bool:
        """Pretend to, until it is due; False if the phase ends before."""
        noted = time.monotonic() + random.uniform(0, NOTE_SECONDS)
        while (now := time.monotonic()) < min(due, end):
            time.sleep(max(0.0, min(due, end, noted) - now))
            if time.monotonic() >= noted:
                noted += NOTE_SECONDS
                spec = claim.rows[0].spec
                words = {"rule": "dfa", "arch": str(spec["arch"]), "activation": str(spec["activation"])}
                sizes = {"cells": len(claim.rows), "executions": len(claim.rows) * EXECUTIONS, "cost": 1e9}
                far = {"began": 0, "epoch": 50, "epochs": EPOCHS, "speed": 1e5, "seconds": 10.0}
                reached.tell(Trained(50, 1e5, 0.5))
                reached.study.note(holder, Progress.model_validate(words | sizes | far))
        return due <= end

    def _claim(self, reached: Reached, holder: Any, cells: int = CELLS) -> Claim:
        claim: Claim | None = self._timed("claim", lambda: reached.study.claim(holder, lambda row: cells))
        if claim is None:
            raise RuntimeError("the plan has no more cells for this load: it is too small")
        reached.tell(Began("dfa", str(claim.rows[0].spec["arch"]), "tanh", len(claim.rows), 12, 0, EPOCHS, 1e9))
        return claim

    def _finish(self, reached: Reached, claim: Claim) -> None:
        """What a worker asks when a cohort is through: see `Worker._finish`."""
        study, files, rule = reached.study, reached.files, claim.rows[0].rule
        ended = []
        for row in claim.rows:
            value, result, history = valued(random.choice(self._outcomes), random.random())
            ended.append((value, Finished(row.key, value, "complete", result, history)))
        value, first = min(ended, key=lambda one: one[0])
        best = study.best(rule)
        if best is None or value <= best[1]:
            files.save_model(rule, first.key, bytes(MODEL_BYTES))
        try:
            self._timed("finish", lambda: study.finish(claim, *(finished for _, finished in ended)))
        except Fenced:
            self._diary.fenced += 1
            return
        for row, (value, _) in zip(claim.rows, ended, strict=True):
            self._diary.finished.append(row.key)
            reached.tell(Ended(row.key, row.name, rule, row.chosen, "complete", value, 1e9))
        files.clear(study, rule, claim.cohort)

    def _timed(self, what: str, step: Callable[[], Any]) -> Any:
        begun = time.monotonic()
        done = step()
        self._diary.waits.append((what, begun, time.monotonic()))
        return done


class _Machines:
    """Which machine a thread pretends to be on: a lock elsewhere cannot be seen, so leases decide."""

    def __init__(self) -> None:
        self.here = threading.local()

    def __reduce__(self) -> Any:
        return _Machines, ()

    def pretend(self) -> None:
        real = owners.machine()
        owners.machine = lambda: getattr(self.here, "name", real)


_machines = _Machines()


# Where crowds are: each is asked for a method by `start`, and what that returns waits for the result.

Wait = Callable[[], Any]
Start = Callable[..., Wait]


@contextmanager
def crowd_here(reach: Callable[[str], Reached], seats: list[str], outcomes: list[Any], over: float) -> Iterator[Start]:
    crowd = Crowd(reach, seats, outcomes, over)
    with ThreadPoolExecutor(1) as pool:
        yield lambda method, *values: pool.submit(getattr(crowd, method), *values).result


@contextmanager
def crowd_in_process(
    reach: Callable[[str], Reached], seats: list[str], outcomes: list[Any], over: float
) -> Iterator[Start]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, reach, seats, outcomes, over), daemon=True)
    process.start()

    def start(method: str, *values: Any) -> Wait:
        def wait() -> Any:
            done, value = ours.recv()
            if not done:
                raise RuntimeError(value)
            return value

        ours.send((method, values))
        return wait

    try:
        yield start
    finally:
        process.terminate()
        process.join()


def _serve(
    pipe: Connection, reach: Callable[[str], Reached], seats: list[str], outcomes: list[Any], over: float
) -> None:
    _machines.pretend()
    crowd = Crowd(reach, seats, outcomes, over)
    while True:
        method, values = pipe.recv()
        try:
            pipe.send((True, getattr(crowd, method)(*values)))
        except Exception as error:
            pipe.send((False, str(error)))


class RayCrowd:
    """A crowd in an actor, which asks the post as `bpf.cluster.seated` does."""

    def __init__(self, post: Any, folder: Path, seats: list[str], outcomes: list[Any], over: float) -> None:
        from bpf.cluster.seated import _sending

        self._crowd = Crowd(partial(at_desk, _sending(post), folder), seats, outcomes, over)

    def do(self, method: str, *values: Any) -> Any:
        return getattr(self._crowd, method)(*values)

    def store(self, post: Any, name: str, until: float) -> int:
        from bpf.cluster.seated import _sending

        return stored_bytes(_sending(post), name, until)


@contextmanager
def crowd_in_actor(
    ray: Any, post: Any, folder: Path, seats: list[str], outcomes: list[Any], over: float
) -> Iterator[Start]:
    actor = ray.remote(RayCrowd).options(num_cpus=0).remote(post, folder, seats, outcomes, over)
    try:
        yield lambda method, *values: partial(ray.get, actor.do.remote(method, *values))
    finally:
        ray.kill(actor)


class Watched:
    """A desk's answers, and what each kind of question costs it: how many there were, and processor seconds."""

    def __init__(self, desk: Desk) -> None:
        self._desk, self._lock = desk, threading.Lock()
        self.asked: defaultdict[str, list[float]] = defaultdict(lambda: [0, 0.0])

    def answer(self, question: bytes, payload: bytes = b"") -> tuple[bytes, bytes]:
        begun = time.thread_time()
        try:
            return self._desk.answer(question, payload)
        finally:
            taken, kind = time.thread_time() - begun, json.loads(question)["do"]
            with self._lock:
                self.asked[kind][0] += 1
                self.asked[kind][1] += taken


@contextmanager
def driving(study: Study, folder: Path, desk: Desk | None) -> Iterator[None]:
    """What the driver does once a second besides."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(1.0):
            study.counts()
            if desk is not None and desk.silent():
                print("a worker was silent for too long: the driver would give its cells to others", flush=True)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def planned(where: Path | Database, cohorts: int, directory: Path, structures: int = 50) -> Study:
    """A study of so many cohorts or some more, of real specs of `dfa`, that has a good cell already."""
    lists: dict[str, list[Any]] = {
        "arch": [str(100 + 10 * number) for number in range(-(-cohorts // 400))],
        "activation": ["tanh", "relu", "swish", "lrelu", "sigmoid"],
        "batch_norm": [False, True],
        "bw_init": ["ortho", "lecun", "frenkel", "nokland", "principled"],
        "batch_size": [16, 24, 32, 48, 64, 96, 128, 256],
        "lr": [1e-4 * (1 + rate) for rate in range(CELLS)],
    }
    fixed = {"dataset": "fmnist", "algorithm": "dfa", "epochs": EPOCHS, "executions_per_trial": EXECUTIONS}
    spec = GridSpec.model_validate(fixed | lists)
    experiment = api.open_tune(directory / "grid", spec, directory / "data")
    expanded = expand(experiment.grid, experiment.rules())
    study = Study.create(where, NAME, {"spec": experiment.grid.model_dump(mode="json")})
    study.plan(expanded.axes, [replace(cell, structure=_structure(cell, structures)) for cell in expanded.cells])
    with study.enrolled(dict(FACTS)) as owner:
        claim = study.claim(owner, lambda row: CELLS)
        assert claim is not None
        for row in claim.rows:
            study.finish(claim, Finished(row.key, GOOD, "complete", *valued(outcome(0), GOOD)[1:]))
    return study


def _structure(cell: Cell, structures: int) -> str:
    others = {name: value for name, value in cell.params.items() if name != "lr"}
    number = int.from_bytes(hashlib.sha256(json.dumps(others, sort_keys=True).encode()).digest()[:8], "big")
    return f"{number % structures:016x}"


def outcome(number: int) -> tuple[float, dict[str, Any], list[dict[str, Any]]]:
    """As a worker makes it: see `study.py` beside this file."""
    from study import outcome

    made: tuple[float, dict[str, Any], list[dict[str, Any]]] = outcome(number)
    return made


def valued(made: Any, value: float) -> tuple[float, dict[str, Any], list[dict[str, Any]]]:
    """Another outcome of the same size."""
    _, result, history = made
    result = result | {"executions": [execution | {"objective": value} for execution in result["executions"]]}
    return value, result, history


def measure(
    through: str,
    workers: int,
    loads: list[str],
    seconds: float,
    ray: Any,
    directory: Path,
    structures: int,
    over: float,
) -> dict[str, Any]:
    """A study of its own, and all loads one after the other with the same workers."""
    outcomes = [outcome(number) for number in range(20)]
    processes = 1 if through == "desk" else max(2, min(4, workers // 64))
    seats = [f"{number}-1" for number in range(workers)]
    parts = [seats[part::processes] for part in range(processes)]
    watched: Watched | None = None
    cohorts = 3 * workers + int(100 * max(seconds, workers / FASTEST) * len(loads))
    with ExitStack() as stack:
        connections: Callable[[], int] = lambda: 0  # noqa: E731
        if through == "postgres":
            server = stack.enter_context(postgres(2 * workers + 50))
            study = stack.enter_context(planned(Database.at(server.url()), cohorts, directory, structures))
            connections = partial(_connections, server)
            reach = partial(at_server, server.url(), directory)
            stack.enter_context(driving(study, directory, None))
            crowds = [stack.enter_context(crowd_in_process(reach, part, outcomes, over)) for part in parts]
        else:
            study = stack.enter_context(planned(directory / "study.db", cohorts, directory, structures))
            desk = stack.enter_context(closing(Desk(study, Folder(directory), lambda seat, event: None)))
            watched = Watched(desk)
            stack.enter_context(driving(study, directory, desk))
            if through == "desk":
                reach = partial(at_desk, watched.answer, directory)
                crowds = [stack.enter_context(crowd_here(reach, seats, outcomes, over))]
            else:
                post = new_post(ray)
                stack.enter_context(carried(ray, post, watched.answer))
                own = partial(crowd_in_actor, ray, post, directory, outcomes=outcomes, over=over)
                crowds = [stack.enter_context(own(seats=part)) for part in parts]
        begun = time.monotonic()
        _all(crowds, "connect")
        connected = time.monotonic()
        _all(crowds, "begin")
        started = time.monotonic()
        if watched is not None:
            watched.asked.clear()
        schedule, at = [], started + 0.5
        paces = [0.0 if load == "saturated" else float(load) for load in loads]
        for pace in sorted(paces, reverse=True):  # what one load has left undone would be in the way of a lighter one
            load = f"{pace:g} s" if pace else "saturated"
            if not pace or workers / pace * seconds >= 4:  # otherwise hardly anything happens
                long = seconds if pace else max(seconds, workers / FASTEST)
                schedule.append(Phase(load, pace, at, at + long))
                at += long
        waiting = [start("work", schedule) for start in crowds]
        busy = [_busy_in(phase) for phase in schedule]
        most = connections()
        diaries: list[Diary] = [wait() for wait in waiting]
        ended = time.monotonic()
        check(study, diaries)
    waits = [wait for diary in diaries for wait in diary.waits]
    found = {
        "through": through,
        "workers": workers,
        "connect": connected - begun,
        "start": started - connected,
        "end": ended - at,
        "start_claims": _summary([wait for wait in waits if wait[2] <= started], "claim"),
        "loads": {phase.load: _rates(phase, waits) | used for phase, used in zip(schedule, busy, strict=True)},
    }
    if watched is not None:
        found["questions"] = {kind: [count, 1e3 * cpu / count] for kind, (count, cpu) in watched.asked.items()}
    if most:
        found["connections"] = most
    return found


def _all(crowds: list[Start], method: str, *values: Any) -> list[Any]:
    waiting = [start(method, *values) for start in crowds]
    return [wait() for wait in waiting]


def _rates(phase: Phase, waits: list[tuple[str, float, float]]) -> dict[str, Any]:
    """What ended in a phase, but for its first second: a new load has to settle."""
    begin, end = phase.begin + 1, phase.end
    inside = [wait for wait in waits if begin <= wait[2] <= end]
    length = end - begin
    ended = Counter(wait[0] for wait in inside)
    rates = {"claims": ended["claim"] / length, "cells": CELLS * ended["finish"] / length}
    return rates | {what: _summary(inside, what) for what in ("claim", "finish")}


def _summary(waits: list[tuple[str, float, float]], what: str) -> list[float]:
    """In ms: the median, the 99th percentile, the longest."""
    taken = sorted(1e3 * (end - begin) for kind, begin, end in waits if kind == what)
    return [taken[len(taken) // 2], taken[min(len(taken) - 1, int(0.99 * len(taken)))], taken[-1]] if taken else []


def _busy_in(phase: Phase) -> dict[str, float]:
    """Wait for a phase to pass; returns how many processor cores were used by this process, the post and everyone."""
    time.sleep(max(0.0, phase.begin - time.monotonic()))
    before = _processor_seconds()
    time.sleep(max(0.0, phase.end - time.monotonic()))
    after = _processor_seconds()
    return {name: (after[name] - before[name]) / (phase.end - phase.begin) for name in before}


def _processor_seconds() -> dict[str, float]:
    """Only where there is a /proc."""
    tick = os.sysconf("SC_CLK_TCK")
    post = 0.0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cmdline").read_bytes().startswith(b"ray::Post"):
                times = (process / "stat").read_text().rpartition(")")[2].split()
                post += (int(times[11]) + int(times[12])) / tick
        except OSError:
            continue
    machine = Path("/proc/stat").read_text().split()[1:9]
    return {
        "driver": time.process_time(),
        "post": post,
        "machine": (sum(map(int, machine)) - int(machine[3]) - int(machine[4])) / tick,
    }


def check(study: Study, diaries: list[Diary]) -> None:
    """Raise unless every cell was finished at most once, and the study has exactly those that were."""
    failures = [failure for diary in diaries for failure in diary.failures]
    if failures:
        raise RuntimeError(f"{len(failures)} workers failed, such as {failures[0]}")
    finished = Counter(key for diary in diaries for key in diary.finished)
    rows: list[Row] = study.rows()
    complete = [row for row in rows if row.state == "complete"]
    twice = [key for key, count in finished.items() if count > 1]
    assert not twice, f"finished twice: {twice}"
    assert not sum(diary.fenced for diary in diaries), "fenced"
    assert len(complete) == len(finished) + CELLS, f"{len(complete)} in the study, {len(finished)} by workers"
    assert {row.key for row in complete} >= set(finished)
    assert len({row.trial_id for row in complete}) == len(complete)
    assert not [row for row in rows if row.state not in ("complete", "pending", "interrupted")]
    assert all(row.attempt == 1 for row in complete)


@contextmanager
def postgres(connections: int) -> Iterator[Any]:
    sys.path.append(str(Path(__file__).parent.parent / "tests"))
    from servers import PostgresServer

    if missing := PostgresServer.missing():
        raise SystemExit(f"PostgreSQL: {missing}")
    server = PostgresServer(Path(tempfile.mkdtemp(prefix="bpf-pg-")))
    try:
        server.directory.chmod(0o755)
        server.start()
        with (server.directory / "data" / "postgresql.conf").open("a") as file:
            file.write(f"fsync = on\nmax_connections = {connections}\nshared_buffers = 256MB\n")
            file.write("deadlock_timeout = 1min\n")  # as docs/CLUSTER.md has it for many workers
        server.restart()
        yield server
    finally:
        server.close()


def _connections(server: Any) -> int:
    import psycopg

    with psycopg.connect(server.url("postgres")) as connection:
        found = connection.execute("SELECT count(*) FROM pg_stat_activity WHERE datname = %s", ["bpf"]).fetchone()
    return int(found[0]) if found else 0


def stored_bytes(send: Send, name: str, until: float) -> int:
    """Store the checkpoint of a cohort again and again, in parts as workers do; returns how many bytes that were."""
    line, stored = Line(send), 0
    content = bytes(CHECKPOINT_BYTES)
    study = RemoteStudy(line, name)
    with study.enrolled({}) as owner:
        claim = study.claim(owner, lambda row: 1)
        assert claim is not None
        with closing(RemoteFiles(line, name)) as there:
            path = there.checkpoint(claim.cohort, False)
            path.parent.mkdir()
            path.write_bytes(content)
            while time.monotonic() < until:
                there.store(claim.cohort)
                stored += len(content)
    return stored


def files(through: str, seconds: float, ray: Any, directory: Path) -> dict[str, Any]:
    """MiB a second of checkpoints that reach the desk's disk."""
    with ExitStack() as stack:
        study = stack.enter_context(planned(directory / "study.db", 400, directory))
        desk = stack.enter_context(closing(Desk(study, Folder(directory), lambda seat, event: None)))
        names = [f"{number:016x}" for number in range(4)]
        if through == "desk":
            pool = stack.enter_context(ThreadPoolExecutor(len(names)))
            begun = time.monotonic()
            storing = [pool.submit(stored_bytes, desk.answer, name, begun + seconds) for name in names]
            stored = [one.result() for one in storing]
        else:
            post = new_post(ray)
            stack.enter_context(carried(ray, post, desk.answer))
            actors = [ray.remote(RayCrowd).options(num_cpus=0).remote(post, directory, [], [], 0.0) for _ in names]
            ray.get([actor.do.remote("connect") for actor in actors])
            begun = time.monotonic()
            pairs = zip(actors, names, strict=True)
            stored = ray.get([actor.store.remote(post, name, begun + seconds) for actor, name in pairs])
            for actor in actors:
                ray.kill(actor)
    return {"through": through, "mib_a_second": sum(stored) / 2**20 / (time.monotonic() - begun)}


def show(found: dict[str, Any]) -> None:
    for load, numbers in found["loads"].items():
        waits = "".join(
            "".join(f"{value:>8.0f}" for value in numbers[what]) or f"{'-':>8}" * 3 for what in ("claim", "finish")
        )
        print(
            f"{found['through']:<9}{found['workers']:>6}{found['start']:>7.1f} {load:>10}{numbers['claims']:>8.1f}"
            f"{numbers['cells']:>8.1f}{waits}{numbers['driver']:>8.2f}{numbers['post']:>6.2f}"
            f"{numbers['machine']:>6.2f}",
            flush=True,
        )

    if "questions" in found:
        costs = sorted(found["questions"].items(), key=lambda item: -item[1][0] * item[1][1])
        told = ", ".join(f"{kind} {cost:.2f}" for kind, (_, cost) in costs[:9])
        print(f"  connected in {found['connect']:.0f} s; processor ms of a question at the desk: {told}", flush=True)
    if "connections" in found:
        print(f"  connected in {found['connect']:.0f} s; {found['connections']:.0f} connections", flush=True)


def medians(rounds: list[Any]) -> Any:
    """Of results of the same form: numbers become their medians."""
    first = rounds[0]
    if isinstance(first, dict):
        return {key: medians([one[key] for one in rounds if key in one]) for key in first}
    if isinstance(first, list):
        return [medians(list(values)) for values in zip(*rounds, strict=False)]
    return statistics.median(rounds) if isinstance(first, int | float) else first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[16, 64, 256, 1000], metavar="N")
    parser.add_argument(
        "--through", nargs="+", default=["desk", "ray", "postgres"], choices=["desk", "ray", "postgres"]
    )
    parser.add_argument("--loads", nargs="+", default=list(STANDARD), metavar="SECONDS", help="of a cohort; saturated")
    parser.add_argument("--seconds", type=float, default=12.0, help="of each load")
    parser.add_argument("--structures", type=int, default=50, metavar="N", help="of networks, over the whole grid")
    parser.add_argument("--start-over", type=float, default=0.0, metavar="SECONDS", help="let workers come one by one")
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help="medians of so many are shown")
    parser.add_argument("--no-files", action="store_true", help="store no checkpoints")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything there")
    options = parser.parse_args()
    load = "/".join(f"{number:.1f}" for number in os.getloadavg())
    print(
        f"Python {platform.python_version()}, {os.cpu_count()} cores, load {load}; waits in ms: median, 99 %, longest"
    )
    print(
        f"{'through':<9}{'N':>6}{'start':>7} {'load':>10}{'claims':>8}{'cells/s':>8}{'claim':>24}{'finish':>24}"
        f"{'driver':>8}{'post':>6}{'cores':>6}"
    )
    everything: list[dict[str, Any]] = []
    stored: list[dict[str, Any]] = []
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bpf-scale-")))
        scratch.chmod(0o711)  # for a server, which root runs as another user
        tempfile.tempdir = os.environ["TMPDIR"] = str(scratch)  # where locks of workers of a server lie
        ray: Any = None
        if "ray" in options.through:
            from bpf.cluster import engine

            # Ray's processes step back for all others by default, and what else runs here would slow them alone
            os.environ.setdefault("RAY_worker_niceness", "0")
            connected = stack.enter_context(engine.connected("ray", 1, "cpu", 1))
            connected.let_spare_go()
            ray = connected.ray
        for through in options.through:
            for workers in options.workers:
                rounds = []
                for _ in range(options.rounds):
                    with tempfile.TemporaryDirectory(dir=scratch) as directory:
                        where = Path(directory)
                        rounds.append(
                            measure(
                                through,
                                workers,
                                options.loads,
                                options.seconds,
                                ray,
                                where,
                                options.structures,
                                options.start_over,
                            )
                        )
                everything.append(medians(rounds) | {"rounds": rounds})
                show(everything[-1])
                if options.json:
                    options.json.write_text(json.dumps({"studies": everything, "files": stored}, indent=1))
            if through != "postgres" and not options.no_files:
                with tempfile.TemporaryDirectory(dir=scratch) as directory:
                    stored.append(files(through, options.seconds, ray, Path(directory)))
                if options.json:
                    options.json.write_text(json.dumps({"studies": everything, "files": stored}, indent=1))
    for files_found in stored:
        print(f"{files_found['through']}: {files_found['mib_a_second']:.0f} MiB/s of checkpoints")


if __name__ == "__main__":
    main()
