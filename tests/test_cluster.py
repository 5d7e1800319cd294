"""Workers that reach the study and the files through the desk, and what is asked of a Ray cluster, without one."""

import asyncio
import json
import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any, cast

import pytest

from bpf import api
from bpf.cli.session import train_all
from bpf.cluster import answers
from bpf.cluster import desk as desks
from bpf.cluster import engine as engines
from bpf.cluster.carrier import carried
from bpf.cluster.desk import Desk
from bpf.cluster.driver import Driver
from bpf.cluster.engine import Gone
from bpf.cluster.incoming import Incoming
from bpf.cluster.logs import NodeLogs
from bpf.cluster.nodes import Node, kinds
from bpf.cluster.post import Post, _problem, code_of
from bpf.cluster.remote import Away, Line, Pulse, RemoteFiles, RemoteStudy
from bpf.cluster.seats import Seats
from bpf.cluster.wire import BUSY, PART_BYTES, heading
from bpf.data.cache import load
from bpf.errors import DiskFull, RunError, UsageError
from bpf.experiment.directory import Experiment, open_experiment
from bpf.results import models, summary
from bpf.spec.fields import build
from bpf.spec.grid import GridSpec
from bpf.study.cells import Finished
from bpf.study.holder import Progress
from bpf.study.seam import Fenced
from bpf.workers.effort import Effort
from bpf.workers.events import Event, Trained, Trouble
from bpf.workers.files import Folder
from bpf.workers.job import Terms
from bpf.workers.stopping import Stop
from bpf.workers.supervisor import Crashed
from bpf.workers.worker import Worker
from chaos import assert_ran_once, outcomes
from clusters import needed_ray
from waiting import eventually

GRID = {
    "dataset": "digits",
    "algorithm": ["bp", "dfa"],
    "arch": ["8", "9"],
    "lr": [0.1, 0.01],
    "activation": ["tanh"],
    "batch_norm": [True],
    "bw_init": ["ortho"],
    "epochs": 3,
    "executions_per_trial": 2,
    "examples_frac": 0.2,
}


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    """A planned grid of eight cells."""
    made = api.open_tune(tmp_path / "grid", build(GridSpec, GRID), tmp_path)
    api.store_plan(made, ["bpf", "tune"])
    return made


class Office:
    """A desk of an experiment, and lines to it that can be cut."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.study = experiment.open_study()
        self.heard: list[tuple[str, Event]] = []
        self.desk = Desk(self.study, Folder(experiment.files), lambda seat, event: self.heard.append((seat, event)))
        self.asked: list[str] = []
        self.lose_answer_to: str | None = None

    def send(self, question: bytes, payload: bytes) -> tuple[bytes, bytes]:
        answer = self.desk.answer(question, payload)
        self.asked.append(json.loads(question)["do"])
        if self.asked[-1] == self.lose_answer_to:
            self.lose_answer_to = None
            raise Away("the answer was lost")
        return answer

    def line(self) -> Line:
        return Line(self.send)

    def worker(self, seat: str, data: Any, tell: Callable[[Event], None] = lambda event: None) -> Worker:
        line = self.line()
        return Worker(
            RemoteStudy(line, seat), RemoteFiles(line, seat), data, Terms("cpu", checkpoint_seconds=0.0), tell
        )

    def close(self) -> None:
        self.desk.close()
        self.study.close()


@pytest.fixture
def office(experiment: Experiment) -> Iterator[Office]:
    with closing(Office(experiment)) as opened:
        yield opened


@contextmanager
def claimed(office: Office, seat: str) -> Iterator[str]:
    """The cohort that a worker in this seat has claimed."""
    study = RemoteStudy(office.line(), seat)
    with study.enrolled({}) as owner:
        claim = study.claim(owner, lambda row: 1)
        assert claim is not None
        yield claim.cohort


@pytest.fixture
def data(tmp_path: Path) -> Any:
    return load("digits", tmp_path)


def digest(model: Path) -> str:
    return models.read(model).digest


def reference(tmp_path: Path) -> dict[str, Any]:
    made = api.open_tune(tmp_path / "here", build(GridSpec, GRID), tmp_path)
    api.store_plan(made, ["bpf", "tune"])
    api.join(made.database, made.name, tmp_path, None, _unwatched, Effort(1, "cpu"), made.files)
    return outcomes(made.directory)


def _unwatched(outset: Any) -> Any:
    from contextlib import nullcontext

    return nullcontext(lambda worker, event: None)


def test_a_worker_at_the_desk_is_like_one_at_the_study(tmp_path: Path, office: Office, data: Any) -> None:
    office.worker("1-1", data).run()
    assert outcomes(office.experiment.directory) == reference(tmp_path)
    assert_ran_once(office.experiment.directory)
    here, there = (tmp_path / "here" / "models", office.experiment.files / "models")
    assert {path.name: digest(path) for path in here.glob("*/*")} == {
        path.name: digest(path) for path in there.glob("*/*")
    }
    assert not list((office.experiment.files / "checkpoints").iterdir()), "nothing is left of it"
    assert not list((office.experiment.directory / "locks").glob("????????????????.lock"))


@pytest.mark.parametrize("lost", ["enroll", "claim", "store", "finish", "save_model", "clear", "retire"])
def test_a_question_whose_answer_was_lost_is_answered_once(
    lost: str, tmp_path: Path, office: Office, data: Any
) -> None:
    office.lose_answer_to = lost
    office.worker("1-1", data).run()
    assert office.lose_answer_to is None, f"{lost} was asked"
    assert_ran_once(office.experiment.directory)
    assert all(row.attempt == 1 for row in summary.rows(office.experiment))


def test_a_lost_answer_to_a_discarding_or_a_report_changes_nothing(office: Office) -> None:
    with claimed(office, "1-1") as cohort, closing(RemoteFiles(office.line(), "1-1")) as there:
        path = there.checkpoint(cohort, False)
        path.parent.mkdir()
        path.write_bytes(b"content")
        there.store(cohort)
        office.lose_answer_to = "discard"
        there.discard(cohort)
        assert office.asked.count("discard") == 2
        assert not list((office.experiment.files / "checkpoints").iterdir())
        office.lose_answer_to = "report"
        pulse = Pulse(office.line(), {"seat": "1-1", "node": "n", "where": "here"}, Stop())
        pulse.tell(Trouble("once"))
        pulse.close()
        assert office.lose_answer_to is None
        assert office.heard == [("1-1", Trouble("once"))]


def test_several_workers_share_a_grid(tmp_path: Path, office: Office, data: Any) -> None:
    workers = [office.worker(f"{number}-1", data) for number in range(1, 4)]
    threads = [threading.Thread(target=worker.run) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes(office.experiment.directory) == reference(tmp_path)
    assert_ran_once(office.experiment.directory)


def test_a_stopped_worker_leaves_a_checkpoint_from_which_another_goes_on(
    tmp_path: Path, office: Office, data: Any
) -> None:
    first = office.worker("1-1", data)
    first.tell = lambda event: first.stop.request() if isinstance(event, Trained) and event.epoch == 2 else None
    with pytest.raises(Exception, match="everything is stored"):
        first.run()
    counts = office.study.counts()
    assert counts["interrupted"]
    assert not counts["running"]
    assert list((office.experiment.files / "checkpoints").glob("*.pt"))
    began: list[Any] = []
    office.worker("2-1", data, began.append).run()
    assert began[0].epoch == 2, "it went on from the checkpoint"
    assert outcomes(office.experiment.directory) == reference(tmp_path)


@pytest.mark.parametrize(("least", "saved"), [(0.0, [1, 2, 3]), (1e-6, [1])])
def test_checkpoints_that_take_long_are_made_less_often_unless_each_epoch_has_one(
    least: float, saved: list[int], office: Office, data: Any
) -> None:
    worker, at, found = office.worker("1-1", data), [0], defaultdict[str, list[int]](list)
    worker.terms = Terms("cpu", checkpoint_seconds=least)
    store = worker.files.store

    def slow(cohort: str) -> None:
        time.sleep(0.3)  # ten times as long as that is more than its other epochs take
        store(cohort)
        found[cohort].append(at[0])

    def tell(event: Event) -> None:
        at[0] = event.epoch if isinstance(event, Trained) else at[0]

    worker.files.store, worker.tell = slow, tell  # type: ignore[method-assign]
    worker.run()
    assert list(found.values()) == [saved] * 4


def test_who_was_taken_for_dead_stores_nothing_and_claims_anew(tmp_path: Path, office: Office, data: Any) -> None:
    worker = office.worker("1-1", data)
    seats: list[str] = []

    def tell(event: Event) -> None:
        if isinstance(event, Trained) and not seats:
            guest = office.desk.guest("1-1")
            assert guest is not None
            seats.append(guest.token)
            office.study.repair(False, [guest.token])
            office.desk.leave("1-1")

    worker.tell = tell
    worker.run()
    assert seats
    assert outcomes(office.experiment.directory) == reference(tmp_path)
    assert_ran_once(office.experiment.directory)
    assert all(row.kills == 0 for row in summary.rows(office.experiment)), "it was nobody's fault"


@pytest.mark.parametrize("fault", [MemoryError, ValueError])
def test_who_was_taken_for_dead_and_then_fails_touches_nothing_of_the_next_owner(
    fault: type[Exception], tmp_path: Path, office: Office, data: Any
) -> None:
    worker, at = office.worker("1-1", data), list[int]()

    def tell(event: Event) -> None:
        if isinstance(event, Trained) and not at:
            at.append(event.epoch)
            guest = office.desk.guest("1-1")
            assert guest is not None
            office.study.repair(False, [guest.token])
            office.desk.leave("1-1")
            raise fault

    worker.tell = tell
    worker.run()
    assert at == [1]
    assert "discard" not in office.asked
    assert outcomes(office.experiment.directory) == reference(tmp_path)
    assert {(row.state, row.cause) for row in summary.rows(office.experiment)} == {("complete", None)}


def test_cells_whose_driver_died_are_not_blamed_for_it(office: Office, data: Any) -> None:
    with claimed(office, "1-1"):
        guest = office.desk.guest("1-1")
        assert guest is not None
        assert guest.owner is not None
        guest.owner.close()  # its lock goes, as when the driver is killed
        nobody = SimpleNamespace(put=lambda value: value, kill=lambda actor: None)
        engine: Any = SimpleNamespace(
            nodes=lambda: [Node("1", "127.0.0.1", 1, 0)], dashboard=None, ray=nobody, post=lambda: None, alive=False
        )
        with closing(office.experiment.open_study()) as study:
            effort, stop = Effort(workers=1, checkpoint_seconds=0.0), Stop()
            driver = Driver(engine, office.experiment, study, data, "cpu", effort, lambda number, event: None, stop)
            with pytest.raises(Gone):
                driver.run()
            with study.enrolled({}) as owner:
                claim = study.claim(owner, lambda row: 1)
                assert claim is not None
                assert [(row.attempt, row.kills, row.cause) for row in claim.rows] == [(2, 0, None)]


class Asked:
    """An engine whose actors do nothing; `works` are the outcomes of their work, which a test decides."""

    def __init__(self, *nodes: Node) -> None:
        self.there, self.kinds, self.works = list(nodes), list[str](), list[Future[Any]]()
        self.ray = SimpleNamespace(exceptions=SimpleNamespace(RayActorError=KeyError))

    def actor(self, kind: str) -> Any:
        def work(order: Any, post: Any) -> Any:
            self.works.append(Future())
            return SimpleNamespace(future=lambda made=self.works[-1]: made)

        self.kinds.append(kind)
        return SimpleNamespace(work=SimpleNamespace(remote=work))

    def let_go(self, actor: Any) -> None:
        pass

    def driver(self, office: Office, device: str, workers: int | None, told: list[Event]) -> Driver:
        """One whose seats are asked for by `_place`, and that hears of them by `_listen`."""
        effort = Effort(workers=workers, on="auto")
        made = Driver(
            cast("Any", self),
            office.experiment,
            office.study,
            cast("Any", None),
            device,
            effort,
            lambda number, event: told.append(event),
            Stop(),
        )
        made._nodes, made._kinds, made._desk = self.there, kinds(device, self.there), office.desk
        made._heard, made._logs = SimpleQueue(), NodeLogs(office.experiment.directory)
        made._seats = Seats(cast("Any", self), {}, None, 1, made._heard.put)
        return made


def test_a_node_that_lacks_something_is_left_out_until_no_other_one_is_left(office: Office) -> None:
    told: list[Event] = []
    engine = Asked(Node("a", "10.0.0.1", 1, 0), Node("b", "10.0.0.2", 1, 0))
    driver = engine.driver(office, "cpu", None, told)
    driver._place(8)
    assert len(engine.works) == 2
    engine.works[0].set_result({"how": "unfit", "text": "Node a: torch is missing.", "exit_code": 2, "node": "a"})
    driver._listen()
    driver._place(8)
    assert len(engine.works) == 2, "nobody is asked to work there again"
    assert [event.text for event in told if isinstance(event, Trouble)] == ["Node a: torch is missing. It is left out."]
    engine.works[1].set_result({"how": "unfit", "text": "Node b: torch is missing.", "exit_code": 2, "node": "b"})
    with pytest.raises(UsageError, match=r"^Node b: torch is missing\.$"):
        driver._listen()


@pytest.mark.parametrize(
    ("device", "workers", "asked"),
    [
        ("cuda,cpu", 8, ["cuda"] * 2 + ["cpu"] * 6),
        ("cpu,cuda", 5, ["cpu"] * 5),
        ("cuda,cpu", None, ["cuda"] * 2 + ["cpu"] * 9),
        ("cuda", 8, ["cuda"] * 8),
        ("cuda,cpu", 20, ["cuda"] * 2 + ["cpu"] * 18),
    ],
)
def test_workers_are_asked_for_where_there_is_room(
    device: str, workers: int | None, asked: list[str], office: Office
) -> None:
    """For more than there is if one kind is wanted, as an autoscaler may have them."""
    engine = Asked(Node("a", "10.0.0.1", 1, 2), Node("b", "10.0.0.2", 8, 0))
    engine.driver(office, device, workers, [])._place(100)
    assert engine.kinds == asked


def test_the_desk_gone_gives_all_cells_back(office: Office, data: Any) -> None:
    study = RemoteStudy(office.line(), "1-1")
    with study.enrolled({}) as holder:
        assert study.claim(holder, lambda row: 2) is not None
        assert office.study.counts()["running"] == 2
        office.desk.close()
        assert office.study.counts()["running"] == 0
        assert office.study.counts()["interrupted"] == 2
        claim = study.claim(holder, lambda row: 2)
        assert claim is not None, "it enrolled anew"


def test_a_worker_is_asked_once_how_many_cells_of_each_kind_it_stacks(office: Office) -> None:
    study = RemoteStudy(office.line(), "1-1")
    with study.enrolled({}) as holder:
        sized: list[str] = []
        while claim := study.claim(holder, lambda row: (sized.append(row.structure), 2)[1]):
            assert len(claim.rows) == 2
    assert len(set(sized)) == 4
    assert office.asked.count("claim") == 6, "four cohorts, the question about all of them, and that nothing is left"


@pytest.mark.parametrize("question", [b"", b"[]", b"{}", b"[" * 100_000, b"\xff"])
def test_what_makes_no_sense_has_no_heading(question: bytes) -> None:
    assert heading(question) == ("", 0, "")
    assert heading(b'{"line": "a", "number": 3, "do": "report"}') == ("a", 3, "report")


def test_only_the_owner_finishes_a_cell(office: Office) -> None:
    mine, yours = RemoteStudy(office.line(), "1-1"), RemoteStudy(office.line(), "2-1")
    with mine.enrolled({}) as holder, yours.enrolled({}) as other:
        claim, theirs = mine.claim(holder, lambda row: 1), yours.claim(other, lambda row: 1)
        assert claim is not None
        assert theirs is not None
        stolen = replace(claim, token=theirs.token)
        with pytest.raises(RunError, match="no longer owned"):
            yours.finish(stolen, Finished(claim.rows[0].key, 0.5, "complete", {"executions": [], "seconds": 0.0}, []))
        with pytest.raises(Fenced):
            mine.finish(replace(claim, token="0" * 16), Finished(claim.rows[0].key, 0.5, "complete", {}, []))
    assert office.study.counts()["complete"] == 0


@pytest.mark.parametrize(
    ("do", "values"),
    [
        ("claim", {"token": "../x", "sizes": {}}),
        ("claim", {"token": "0" * 16, "sizes": {"a": "many"}}),
        ("fetch", {"cohort": "../../etc/passwd", "at": 0}),
        ("fetch", {"cohort": "a", "at": -1}),
        ("save_model", {"seat": "1", "rule": "../dfa", "key": "k"}),
        ("clear", {"seat": "1", "rule": "../dfa", "cohort": None}),
        ("clear", {"seat": "1", "rule": "dfa", "cohort": "../../experiment"}),
        ("set_aside", {"cohort": "a/b"}),
        ("report", {"seat": "1", "node": "n", "where": "", "token": "", "facts": None, "events": [["Popen", {}]]}),
        (
            "report",
            {"seat": "1", "node": "n", "where": "", "token": "", "facts": None}
            | {"events": [["Trained", {"epoch": 1, "speed": float("nan")}]]},
        ),
        ("nothing", {}),
    ],
)
def test_the_desk_believes_nothing(do: str, values: dict[str, Any], office: Office) -> None:
    with pytest.raises(RunError):
        office.line().ask(do, **values)
    found = {path.name for path in office.experiment.directory.iterdir() if not path.name.startswith("study.db-")}
    assert found == {"experiment.yaml", "locks", "running.lock", "study.db"}


def test_large_checkpoints_come_in_parts(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bpf.cluster.remote.PART_BYTES", 1000)
    monkeypatch.setattr(desks, "PART_BYTES", 700)
    content = bytes(range(256)) * 20
    with claimed(office, "1-1") as cohort, closing(RemoteFiles(office.line(), "1-1")) as there:
        path = there.checkpoint(cohort, False)
        path.parent.mkdir()
        path.write_bytes(content)
        there.store(cohort)
        stored = office.experiment.files / "checkpoints" / f"{cohort}.pt"
        assert stored.read_bytes() == content
        assert office.asked.count("store") == 6
        with closing(RemoteFiles(office.line(), "1-1")) as other:
            assert other.checkpoint(cohort, True).read_bytes() == content
            assert other.set_aside(cohort) == f"{cohort}.pt.damaged"
            assert not other.checkpoint(cohort, True).exists()
    assert not there.path.exists()


def test_a_worker_that_was_taken_for_dead_stores_no_checkpoint(office: Office) -> None:
    with claimed(office, "1-1") as cohort, closing(RemoteFiles(office.line(), "1-1")) as there:
        path = there.checkpoint(cohort, False)
        path.parent.mkdir()
        path.write_bytes(b"early")
        there.store(cohort)
        office.desk.leave("1-1")
        path.write_bytes(b"late")
        with pytest.raises(Fenced, match="taken for dead"):
            there.store(cohort)
        there.discard(cohort)
        with pytest.raises(Fenced):
            there.set_aside(cohort)
        with pytest.raises(Fenced, match="network"):
            there.save_model("bp", "0123456789abcdef", b"late")
        stored = office.experiment.files / "checkpoints" / f"{cohort}.pt"
        assert stored.read_bytes() == b"early"


def test_parts_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    incoming, path = Incoming(), tmp_path / "a.pt"
    path.write_bytes(b"old")
    with pytest.raises(RunError, match="some are missing"):
        incoming.receive("1-1", path, "one", 5, None, b"x")
    incoming.receive("1-1", path, "one", 0, None, b"one")
    with pytest.raises(RunError, match="do not belong together"):
        incoming.receive("1-1", path, "one", 7, None, b"two")
    incoming.receive("1-1", path, "one", 0, None, b"one")
    with pytest.raises(RunError, match="other bytes"):
        incoming.receive("1-1", path, "one", 3, "0" * 64, b"two")
    incoming.receive("1-1", path, "one", 0, None, b"half")
    incoming.receive("1-1", path, "two", 0, None, b"half")  # in its place
    assert len([*tmp_path.iterdir()]) == 2
    incoming.receive("2-1", path, "three", 0, None, b"half")
    incoming.drop("1-1")
    assert len([*tmp_path.iterdir()]) == 2
    incoming.close()
    assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == [("a.pt", b"old")]


def test_a_full_disk_at_the_desk_is_one_at_the_worker(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> None:
        raise DiskFull(path)

    monkeypatch.setattr("bpf.results.models.save", full)
    with claimed(office, "1-1"):
        guest = office.desk.guest("1-1")
        assert guest is not None
        assert guest.claim is not None
        key = guest.claim.rows[0].key
        with pytest.raises(DiskFull, match=f"models/dfa/{key}"):
            RemoteFiles(office.line(), "1-1").save_model("dfa", key, b"content")


def test_a_line_waits_for_the_post_and_then_gives_up() -> None:
    times: list[str] = []

    def send(question: bytes, payload: bytes) -> tuple[bytes, bytes]:
        times.append(json.loads(question)["number"])
        if len(times) < 3:
            raise Away("it is started again")
        return b'{"told": 7}', b""

    line, told = Line(send), []
    line.on_wait = told.append
    assert line.ask("counts") == 7
    assert times == [1, 1, 1], "the same question"
    assert told == ["The driver cannot be reached: it is started again"] * 2
    times.clear()
    line.patience = 0.0
    with pytest.raises(RunError, match="cannot be reached"):
        line.ask("counts")


class Actors:
    """As much of Ray as the post needs, with the post in a thread; `calls` are the methods that it was asked for."""

    def __init__(self) -> None:
        self.loop, self.post, self.calls = asyncio.new_event_loop(), Post(), list[str]()
        self.dead = threading.Event()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def __getattr__(self, name: str) -> Any:
        def remote(*values: Any) -> Any:
            self.calls.append(name)
            return asyncio.run_coroutine_threadsafe(getattr(self.post, name)(*values), self.loop)

        return SimpleNamespace(remote=remote)

    def get(self, future: Any, timeout: float) -> Any:
        end = time.monotonic() + timeout
        while not future.done():
            assert time.monotonic() < end
            if self.dead.wait(0.001):
                raise RuntimeError
        return future.result()

    def kill(self, post: Any) -> None:
        self.dead.set()


def test_answers_go_with_the_next_questions_or_by_themselves_when_they_take_long() -> None:
    actors, slow = Actors(), threading.Event()

    def desk(question: bytes, payload: bytes) -> tuple[bytes, bytes]:
        if question == b"slow":
            assert slow.wait(10.0)
        return question.upper(), payload

    ray = SimpleNamespace(get=actors.get, kill=actors.kill)
    with carried(ray, actors, desk):
        for number in range(20):
            assert actors.get(actors.ask.remote(b"quick", b"%d" % number), 10.0) == (b"QUICK", b"%d" % number)
        by_themselves = actors.calls.count("give")
        assert by_themselves < 20  # all, were none in time
        waits = actors.ask.remote(b"slow", b"")
        assert actors.get(actors.ask.remote(b"quick", b""), 10.0) == (b"QUICK", b"")  # does not wait for the slow one
        assert not waits.done()
        slow.set()
        assert actors.get(waits, 5.0) == (b"SLOW", b"")  # before the next exchange would end
        assert actors.calls.count("give") > 0
    assert actors.dead.is_set()


def test_the_pulse_tells_the_last_epoch_only_and_learns_to_stop(office: Office) -> None:
    stop, holder = Stop(), []
    me = {"seat": "1-1", "node": "n", "where": "here"}
    with RemoteStudy(office.line(), "1-1").enrolled({}) as owner:
        pulse = Pulse(office.line(), me, stop)
        pulse.holder = lambda: owner
        for epoch in range(1, 5):
            pulse.tell(Trained(epoch, 1.0))
        eventually(lambda: office.heard)
        assert office.heard[-1] == ("1-1", Trained(4, 1.0, None))
        assert len(office.heard) < 4
        office.desk.stopping = {"1-1"}
        eventually(lambda: stop.asked)
        office.desk.leave("1-1")
        eventually(lambda: owner.lost.is_set())
        pulse.close()
        holder.append(owner)


def test_the_pulse_says_how_far_a_worker_is_when_that_is_new(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bpf.cluster.remote.REPORT_SECONDS", 0.0)
    monkeypatch.setattr(desks, "REPORT_SECONDS", 0.0)
    noted: list[dict[str, Any]] = []
    monkeypatch.setattr(office.study, "note", lambda owner, at: noted.append(owner.facts | {"epoch": at.epoch}))
    study = RemoteStudy(office.line(), "1-1")
    with study.enrolled({"host": "there"}) as owner:
        pulse = Pulse(office.line(), {"seat": "1-1", "node": "n", "where": "here"}, Stop())
        pulse.holder = lambda: owner
        eventually(lambda: len(office.asked) > 5)
        assert noted == [], "nothing that the desk does not know"
        for epoch in (1, 2):
            owner.facts = owner.facts | {"spent": float(epoch)}
            study.note(owner, far(epoch))
            eventually(lambda so_far=epoch: len(noted) == so_far)
            assert noted[-1].items() >= {"host": "there", "spent": float(epoch), "epoch": epoch}.items()
        study.note(owner, far(3).model_copy(update={"speed": float("nan")}))
        asked = len(office.asked)
        eventually(lambda: len(office.asked) > asked + 5)
        assert len(noted) == 2, "what makes no sense is not noted"
        office.desk.leave("1-1")
        study.note(owner, far(4))
        eventually(lambda: owner.lost.is_set())
        pulse.close()
    assert len(noted) == 2, "nor what one says who was taken for dead"


def far(epoch: int) -> Progress:
    sizes = {"cells": 1, "executions": 1, "began": 0, "epoch": epoch, "epochs": 9, "speed": 1.0}
    return Progress.model_validate(
        {"rule": "dfa", "arch": "8", "activation": "tanh", "seconds": 1.0, "cost": 1.0} | sizes
    )


def test_a_silent_worker_is_noticed(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [time.monotonic()]
    monkeypatch.setattr(desks.time, "monotonic", lambda: now[0])
    with RemoteStudy(office.line(), "1-1").enrolled({}):
        assert office.desk.silent() == []
        silent = []
        for _ in range(61):
            now[0] += 1.0
            silent = [guest.seat for guest in office.desk.silent()]
        assert silent == ["1-1"]


def test_nobody_is_silent_because_the_driver_stood_still(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [time.monotonic()]
    monkeypatch.setattr(desks.time, "monotonic", lambda: now[0])
    with RemoteStudy(office.line(), "1-1").enrolled({}):
        assert office.desk.silent() == []
        now[0] += 1000.0
        assert office.desk.silent() == [], "it may have spoken meanwhile"
        now[0] += 1.0
        assert office.desk.silent() == []


def test_a_last_word_that_comes_late_is_not_kept_for_ever(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [time.monotonic()]
    monkeypatch.setattr(desks.time, "monotonic", lambda: now[0])
    me = {"seat": "1-1", "node": "n", "where": "here"}
    office.line().ask("report", **me, token="", facts=None, events=[])
    assert office.desk.guest("1-1") is not None
    for _ in range(61):
        now[0] += 1.0
        assert office.desk.silent() == []
    assert office.desk.guest("1-1") is None


def test_who_was_taken_for_dead_gives_nothing_back(office: Office) -> None:
    study = RemoteStudy(office.line(), "1-1")
    with study.enrolled({}) as owner:
        claim = study.claim(owner, lambda row: 1)
        assert claim is not None
        office.desk.leave("1-1")
        assert study.release(claim, max_runs=1, cause="memory") == 0


def test_an_answer_is_kept_as_long_as_it_may_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    now, made = [time.monotonic()], list[str]()
    monkeypatch.setattr(answers.time, "monotonic", lambda: now[0])
    kept = answers.Answers()

    def ask(line: str, number: int) -> bytes:
        made.append(f"{line}{number}")
        return made[-1].encode()

    def give(line: str, number: int) -> bytes:
        return kept.give(line, number, lambda: (ask(line, number), b""))[0]

    assert [give("a", 1), give("a", 1), give("b", 1), give("a", 2)] == [b"a1", b"a1", b"b1", b"a2"]
    assert give("a", 1) == BUSY, "a question from before, late on its way, is not done again"
    assert made == ["a1", "b1", "a2"]
    now[0] += answers.FORGET_SECONDS + 1

    def waiting() -> tuple[bytes, bytes]:
        now[0] += answers.FORGET_SECONDS + 1  # as for a full disk
        assert give("c", 1) == BUSY
        return b"late", b""

    assert kept.give("c", 1, waiting)[0] == b"late"
    assert list(kept._last) == ["c"]
    assert give("d", 1) == b"d1"
    assert give("c", 1) == b"late", "who asked has not had it yet"


def test_while_the_desk_waits_a_question_that_is_asked_again_takes_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bpf.cluster.remote.BUSY_SECONDS", 0.01)
    monkeypatch.setattr("bpf.cluster.carrier.ANSWERING", 1)
    actors, full, begun, once = Actors(), threading.Event(), list[str](), answers.Answers()

    def desk(question: bytes, payload: bytes) -> tuple[bytes, bytes]:
        line, number, do = heading(question)

        def waiting() -> tuple[bytes, bytes]:
            begun.append(do)
            assert full.wait(10.0)
            return b'{"told": 7}', payload

        return once.give(line, number, waiting)

    def send(question: bytes, payload: bytes) -> tuple[bytes, bytes]:
        try:
            return cast("tuple[bytes, bytes]", actors.ask.remote(question, payload).result(0.2))
        except TimeoutError:
            raise Away("no answer") from None

    ray = SimpleNamespace(get=actors.get, kill=actors.kill)
    with carried(ray, actors, desk):
        line, told = Line(send, patience=2.0), list[str]()

        def wait(reason: str) -> None:
            told.append(reason)
            if sum("waited for" in one for one in told) == 3:
                full.set()

        line.on_wait = wait
        assert line.ask("finish") == 7
        assert begun == ["finish"], "once"
        assert "The driver has not answered yet; it is waited for." in told
    with pytest.raises(Away, match="has not answered yet"):
        Line(lambda question, payload: (BUSY, b""), patience=0.0).ask("retire")


def test_what_was_a_worker_of_another_cohort_leaves_nothing_in_its_folder(office: Office) -> None:
    with closing(RemoteFiles(office.line(), "1-1")) as there:
        first = there.checkpoint("a" * 16, False)
        first.parent.mkdir()
        first.write_bytes(b"kept at the desk")
        there.checkpoint("b" * 16, False)
        assert list(first.parent.iterdir()) == []


def test_a_process_that_ends_before_it_says_anything_is_told(office: Office) -> None:
    class Died(Exception):
        pass

    told: list[Event] = []
    engine = Asked(Node("a", "10.0.0.1", 1, 0))
    driver = engine.driver(office, "cpu", None, told)
    engine.ray = SimpleNamespace(exceptions=SimpleNamespace(RayActorError=Died))
    driver._place(1)
    for _ in range(5):
        assert told == []
        engine.works[-1].set_exception(Died())
        driver._listen()
        driver._seats.all[0].again = 0.0
        driver._seats.refill()
    assert len(engine.works) == 6
    [trouble] = told
    assert isinstance(trouble, Trouble)
    assert "Worker 1 has ended 5 times in a row before it could say anything" in trouble.text


def test_kinds_of_nodes() -> None:
    gpu, cpu, head = (
        Node("a", "10.0.0.1", 8, 4),
        Node("b", "10.0.0.2", 8, 0),
        Node("c", "10.0.0.3", 0, 0),
    )
    assert kinds("auto", [gpu, head]) == ["cuda"]
    assert kinds("auto", [cpu, cpu, head]) == ["cpu"]
    with pytest.raises(UsageError, match="no node for workers yet"):
        kinds("auto", [head])
    assert kinds("cuda", [head]) == ["cuda"]
    assert kinds("cuda", [gpu, cpu]) == ["cuda"]
    assert kinds("cuda,cpu", [gpu, cpu]) == ["cuda", "cpu"]
    with pytest.raises(UsageError, match=r"1 node with GPUs and 2 nodes without.*--device cuda,cpu for both"):
        kinds("auto", [gpu, cpu, cpu])
    with pytest.raises(UsageError, match="Use --device cpu"):
        kinds("cuda", [cpu])
    with pytest.raises(UsageError, match="Ray places the workers"):
        kinds("cuda:1", [gpu])
    assert (gpu.seats("cuda", 3), gpu.seats("cpu", 3), cpu.seats("cuda", 1), head.seats("cpu", 1)) == (12, 8, 0, 0)


def test_what_a_node_lacks_is_named() -> None:
    from importlib import metadata

    here = metadata.version("torch")
    code = {"bpf": code_of("bpf"), "waiting": code_of("waiting")}
    assert _problem({"torch": here}, {"bpf.algorithms": ["dfa"]}, code) == ""
    assert _problem({"torch": "1.0", "bpf-nowhere": "2"}, {"bpf.algorithms": ["dfa", "mine"]}, {"bpf": "0"}) == (
        f"torch is {here}, and 1.0 where bpf was started; bpf-nowhere is not installed; "
        "no plugin 'mine' in bpf.algorithms"
    )
    assert _problem({}, {}, code | {"nowhere": "0"}) == "the code of nowhere is another one"


@pytest.mark.parametrize("package", ["mine", "mine.py"])
def test_code_of_the_same_version_may_be_another_one(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / package if package.endswith(".py") else tmp_path / package / "rules" / "one.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    monkeypatch.syspath_prepend(tmp_path)
    found = []
    for text in ("rate = 1\n", "rate = 2\n", "rate = 1\n"):
        path.write_text(text)
        found.append(code_of("mine"))
    assert found[0] == found[2] != found[1]
    assert "mine" not in sys.modules
    assert code_of("nowhere_to_be_found") == ""


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_auto_is_the_cluster_that_ray_address_names(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    pickling = SimpleNamespace(register_pickle_by_value=lambda module: None)
    ray = SimpleNamespace(
        init=lambda address, **options: asked.append(address), nodes=list, shutdown=lambda: None, cloudpickle=pickling
    )
    monkeypatch.setattr(engines, "module", lambda: ray)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"{scheme}127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        engine = engines.Engine("auto", None, "cpu", 1)
        engine.wait()
        assert asked == [address]
        assert engine.alive
        engine.close()
    engine = engines.Engine("auto", None, "cpu", 1)
    with pytest.raises(UsageError, match=r"--on auto: there is no Ray cluster to use: .*refused"):
        engine.wait()
    engine.close()


def test_a_worker_on_a_node_needs_no_database_library() -> None:
    code = "import bpf.cluster.remote, bpf.workers.worker, sys; print({'sqlalchemy', 'optuna'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_parts_are_small_beside_a_machine() -> None:
    assert PART_BYTES <= 2**26


class TestWithoutRay:
    @pytest.fixture(autouse=True)
    def without(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "blocked").mkdir()
        (tmp_path / "blocked" / "sitecustomize.py").write_text("import sys\nsys.modules['ray'] = None\n")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "blocked"))
        monkeypatch.chdir(tmp_path)

    def bpf(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run([sys.executable, "-m", "bpf", *arguments], capture_output=True, text=True)

    def test_everything_else_works(self, tmp_path: Path) -> None:
        (tmp_path / "spec.json").write_text(json.dumps(GRID))
        done = self.bpf("tune", "grid", "--spec", "spec.json", "--workers", "1", "-q")
        assert done.returncode == 0, done.stderr
        assert self.bpf("status", "grid").returncode == 0
        assert self.bpf("resume", "grid", "-q").returncode == 0

    @pytest.mark.parametrize("command", ["tune grid --dataset digits --algorithm dfa", "reproduce frenkel-mnist"])
    def test_on_says_what_to_install(self, command: str, tmp_path: Path) -> None:
        done = self.bpf(*command.split(), "--on", "ray")
        assert (done.returncode, done.stdout) == (2, "")
        assert "--on needs Ray: pip install 'bpf[ray]'" in done.stderr
        assert not (tmp_path / "grid").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--on cloud", "--on cloud: give ray for a cluster of the command's own"),
        ("--on ray://host", "--on ray://host: give ray"),
        ("--workers-per-gpu 2", "--workers-per-gpu is for a cluster (--on)"),
        ("--on ray --workers-per-gpu 0", "--workers-per-gpu 0: give a whole number from 1 to 64"),
        ("--on ray --storage postgresql://me:secret@nowhere/x", "leave it out of the URL"),
    ],
)
def test_a_mistake(options: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["tune", "grid", "--dataset", "digits", "--algorithm", "dfa", *options.split()]
    done = subprocess.run([sys.executable, "-m", "bpf", *command], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert said in " ".join(done.stderr.split())
    assert "secret" not in done.stderr + done.stdout
    assert not (tmp_path / "grid").exists()


def test_what_to_paste_names_the_cluster(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    def crashing(*arguments: Any) -> None:
        raise Crashed("5 workers in a row have crashed.")

    monkeypatch.setattr(api, "run", crashing)
    for on, ending in (("10.0.0.1:6379", " --on 10.0.0.1:6379"), (None, "")):
        with pytest.raises(Crashed, match=f"go on with: bpf resume {experiment.directory}{ending}$"):
            train_all(experiment, Effort(on=on), lambda outset: _unwatched(outset))


def test_a_grid_on_ray_is_that_of_one_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way, in a cluster of the command's own."""
    needed_ray()
    (tmp_path / "spec.json").write_text(json.dumps(GRID))
    command = [sys.executable, "-m", "bpf", "tune", str(tmp_path / "grid"), "--spec", str(tmp_path / "spec.json")]
    done = subprocess.run([*command, "--on", "ray", "--workers", "2", "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout), "nothing else is printed there"
    assert outcomes(tmp_path / "grid") == reference(tmp_path)
    assert_ran_once(tmp_path / "grid")
    assert open_experiment(tmp_path / "grid").grid.algorithm == ("bp", "dfa")
