"""The driver: it asks Ray for workers, watches them, and has the desk.

It decides nothing about cells: the study does. When it dies, its workers end with it, and `bpf resume` goes on.
"""

import queue
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace

from bpf.cluster.carrier import carried
from bpf.cluster.desk import Desk, Guest
from bpf.cluster.engine import Engine, Gone, said
from bpf.cluster.logs import NodeLogs
from bpf.cluster.nodes import Node, kinds
from bpf.cluster.orders import order
from bpf.cluster.seats import Seat, Seats
from bpf.data.cache import Data
from bpf.errors import BpfError, RunError, UsageError
from bpf.experiment.directory import Experiment
from bpf.study.study import Study
from bpf.words import counted
from bpf.workers.effort import Effort
from bpf.workers.events import Began, Ended, Event, Left, Observe, Saved, Trouble
from bpf.workers.files import Folder
from bpf.workers.stopping import CutShort, Stop
from bpf.workers.supervisor import MAX_CRASHES, Crashed

LOOK_SECONDS = 1.0
"""Between two looks at the nodes and the counts of cells."""
POLL_SECONDS = 0.5
"""A request to stop is noticed after so long, if nothing else happens."""
JUDGE_SECONDS = 30.0
"""After the death of a worker: so long it takes Ray to notice that its node has died, if nobody else can tell."""
GRACE_SECONDS = 5.0
EARLY_ENDS = 5
"""When a worker has ended so often before it said anything, a person is told."""
Heard = tuple[str, Event] | Seat
"""What a worker tells, by the name of its seat; or a seat whose work has ended."""


@dataclass
class Driver:
    """Runs workers on the nodes of a cluster until the experiment has nothing left to do.

    The `effort` says how many at most; `device`, on what kinds of nodes.
    """

    engine: Engine
    experiment: Experiment
    study: Study
    data: Data
    device: str
    effort: Effort
    observe: Observe
    stop: Stop
    _nodes: list[Node] = field(default_factory=list)
    _lost: list[tuple[Seat, Guest, float]] = field(default_factory=list)
    _crashes: int = 0
    _cut_short: bool = False
    _worked: bool = False
    _progressed: bool = False
    _told: set[str] = field(default_factory=set)

    def run(self) -> None:
        """Return when every cell is finished, also those that workers elsewhere train.

        Raises as `Supervisor.run` does, and UsageError for a cluster that cannot be used as it is asked for.
        """
        self._nodes = self.engine.nodes()
        self._kinds = kinds(self.device, self._nodes)
        self._heard: queue.SimpleQueue[Heard] = queue.SimpleQueue()
        self._logs = NodeLogs(self.experiment.directory)
        self._desk = Desk(self.study, Folder(self.experiment.files), lambda seat, event: self._heard.put((seat, event)))
        self.study.on_wait = self._wait
        self.study.repair(blame=False)  # an earlier driver's workers ended with it, for no fault of their cells
        if self.engine.dashboard:
            self._tell_once(f"Ray's dashboard: http://{self.engine.dashboard}")
        orders = order(self.experiment, self.data, self.effort.checkpoint_seconds, self.engine)
        post = self.engine.post()
        self._seats = Seats(self.engine, orders, post, self.effort.workers_per_gpu, self._heard.put)
        try:
            with carried(self.engine.ray, post, self._desk.answer):
                try:
                    self._go_on()
                finally:
                    self.study.patience = 0.0  # nobody waits for the answers any more
        finally:
            self._end_all()

    def _go_on(self) -> None:
        looked = -LOOK_SECONDS
        while True:
            now = time.monotonic()
            if now - looked >= LOOK_SECONDS or self._progressed or not self._seats.working():
                self._progressed = False
                looked = now
                if not self.engine.alive:
                    raise CutShort if self.stop.asked else Gone
                counts = self.study.counts()
                claimable, running = counts["pending"] + counts["interrupted"], counts["running"]
                if self._is_over(claimable, running):
                    return
                if not self.stop.asked:
                    self._look_at_nodes()
                    self._place(claimable)
                    self.engine.let_spare_go()
            self._listen()
            self._judge()
            self._ask_to_stop()

    def _is_over(self, claimable: int, running: int) -> bool:
        """Whether nothing is left. Raises Interrupted when a request to stop has been met."""
        if self.stop.asked and not self._seats.working():
            if claimable or running:
                raise CutShort if self._cut_short else self.stop.interruption()
            return True
        if claimable or running or self._lost:
            return False
        end = time.monotonic() + GRACE_SECONDS  # those that find nothing end by themselves
        while self._seats.working() and time.monotonic() < end:
            self._listen()
        return True

    # Workers.

    def _look_at_nodes(self) -> None:
        """Learn which nodes have come and gone; workers on those that will go are asked to leave."""
        self._nodes = self.engine.nodes()
        leaving = {node.id for node in self._nodes if node.leaving}
        for seat in self._seats.working():
            guest = self._desk.guest(seat.name)
            if guest is not None and guest.node in leaving and self._desk.stopping is not None:
                self._desk.stopping.add(seat.name)
        others = [node for node in self._nodes if node.kind not in self._kinds and (node.cpus or node.gpus)]
        if others and self.device == "auto":
            kind, used = ("GPUs", "its cores are") if others[0].gpus else ("no GPUs", "it is not")
            self._tell_once(f"A node with {kind} has joined; {used} used, as the others are of another kind.")
        there = {node.id for node in self._nodes}
        for seat in [seat for seat in self._seats.all if seat.unfit and seat.node not in there]:
            self._seats.remove(seat)
        for guest in self._desk.silent():
            self._bury(guest, blame=False)
            self._tell(
                0, Trouble(f"A worker on {guest.where} has been silent for too long; its cells go on elsewhere.")
            )

    def _place(self, claimable: int) -> None:
        """Ask Ray for as many workers as there is room and work for."""
        for kind in self._kinds:
            working = self._seats.working()
            there = [seat for seat in working if seat.kind == kind]
            nodes = [node for node in self._nodes if not node.leaving]
            room = sum(node.seats(kind, self.effort.workers_per_gpu) for node in nodes)
            room -= sum(seat.unfit and seat.kind == kind for seat in self._seats.all)
            if self.effort.workers is not None:
                wanted = self.effort.workers - (len(working) - len(there))
                # more than there is room for, as an autoscaler may have it, but of the last kind only
                room = wanted if kind == self._kinds[-1] else min(room, wanted)
            idle = sum(self._desk.guest(seat.name) is None for seat in there)
            for _ in range(min(room - len(there), claimable - idle)):
                self._seats.add(kind)
        if claimable and not self._seats.all:
            cure = "" if self.effort.workers else " --workers N asks an autoscaler for N."
            self._tell_once(
                f"Waiting for nodes: the {counted(len(self._nodes), 'node')} of the cluster take none.{cure}"
            )

    def _room(self, node: Node) -> int:
        """How many workers it takes, of all kinds that are wanted."""
        return sum(node.seats(kind, self.effort.workers_per_gpu) for kind in self._kinds)

    def _listen(self) -> None:
        """Hear what workers tell, and notice those that have ended, as soon as there is anything."""
        with suppress(queue.Empty):
            heard = self._heard.get(timeout=POLL_SECONDS)
            while True:
                if isinstance(heard, Seat):
                    self._ended(heard)
                else:
                    self._hear(*heard)
                heard = self._heard.get_nowait()
        if not self.stop.asked:
            self._seats.refill()

    def _hear(self, name: str, event: Event) -> None:
        self._worked, self._progressed = True, self._progressed or isinstance(event, Ended)
        if isinstance(event, Saved) or (isinstance(event, Ended) and event.state != "failed"):
            self._crashes = 0
        seat = next((seat for seat in self._seats.all if seat.name == name), None)
        if seat is not None:
            seat.early = 0
        if seat is not None and isinstance(event, Began):
            seat.doing = f"{event.rule} with arch {event.arch}"
        guest = self._desk.guest(name)
        self._logs.note(guest.where if guest else "", name, event)
        if seat is not None or not name:
            self.observe(seat.number if seat else 0, event)

    def _ended(self, seat: Seat) -> None:
        """The work in a seat has ended, as the worker said, or with its process or its node."""
        work, seat.work = seat.work, None
        if work is None or seat not in self._seats.all:  # it was let go meanwhile
            return
        guest = self._desk.guest(seat.name)
        where = guest.where if guest else ""
        try:
            told = work.result()
            seat.node, left = told.pop("node", ""), Left(**told)
        except self.engine.ray.exceptions.RayActorError:
            self._seats.lose(seat)
            if guest is not None:
                self._lost.append((replace(seat), guest, time.monotonic()))
                self._tell(seat.number, Left("crashed", "its process or its node was lost"), where)
                return
            seat.early += 1
            if seat.early == EARLY_ENDS:
                self._tell_once(
                    f"Worker {seat.number} has ended {EARLY_ENDS} times in a row before it could say anything: Ray's "
                    "logs of its node may say why. It is started again and again."
                )
            return
        except Exception as error:
            raise RunError(f"Worker {seat.number} could not be run: {said(error)}") from error
        self._tell(seat.number, left, where)
        self._cut_short |= left.how == "cut short"
        if guest is not None:
            self._bury(guest, blame=left.how == "crashed")
        if left.how in ("unfit", "failed"):
            self._unfit(seat, left)
        elif left.how == "crashed":
            self._seats.lose(seat)
            self._crashed(seat, left.text.strip().splitlines()[-1])
        else:
            self._seats.remove(seat)

    def _unfit(self, seat: Seat, left: Left) -> None:
        """A node where no worker can work: the others go on, if there are any. The actor keeps its place, idle.

        Before anybody has worked, at least as many nodes must be left that may do: else the cluster is the matter.
        """
        seat.unfit = True
        unfit = {other.node for other in self._seats.all if other.unfit}
        takes = {node.id for node in self._nodes if not node.leaving and self._room(node)}
        at_work = self._worked and any(self._desk.guest(other.name) for other in self._seats.working())
        if at_work or len(takes - unfit) >= max(1, len(takes & unfit)):
            self._tell_once(f"{left.text} It is left out.")
            return
        error = UsageError(left.text) if left.how == "unfit" else BpfError(left.text)
        error.exit_code = left.exit_code
        raise error

    def _judge(self) -> None:
        """Take the cells of workers that died: they count as killed, unless their node has died with them."""
        waiting, nodes = [], {node.id: node for node in self._nodes}
        answers = {
            id: self.engine.answers(nodes[id]) for id in {guest.node for _, guest, _ in self._lost} & nodes.keys()
        }
        for seat, guest, when in self._lost:
            alive = answers.get(guest.node, False)
            if alive is None and time.monotonic() - when < JUDGE_SECONDS:
                waiting.append((seat, guest, when))
                continue
            self._bury(guest, blame=alive is not False)
            if alive is False:
                self._tell(0, Trouble(f"The node {guest.where} was lost; its cells go on elsewhere."), guest.where)
            else:
                self._crashed(seat, f"its process on {guest.where} was killed")
        self._lost = waiting

    def _bury(self, guest: Guest, blame: bool) -> None:
        if guest.token:
            self.study.repair(blame, [guest.token])
        self._desk.leave(guest.seat)

    def _crashed(self, seat: Seat, reason: str) -> None:
        self._crashes += 1
        if self._crashes >= max(MAX_CRASHES, len(self._seats.all)):
            raise Crashed(
                f"{self._crashes} workers in a row have crashed, the last one {reason}, while {seat.doing}. "
                "Nothing finished is lost."
            )
        if not self.stop.asked:
            self._tell(seat.number, Trouble(f"Worker {seat.number} crashed ({reason}) and is started again."))

    def _ask_to_stop(self) -> None:
        if not self.stop.asked:
            return
        self._desk.stopping = None
        for seat in self._seats.working():
            if seat.work is None or self._desk.guest(seat.name) is None:  # lost, or not placed yet
                self._seats.remove(seat)

    def _end_all(self) -> None:
        """Let everything go; after an error or a second Ctrl-C, what is not stored now is trained again."""
        tokens = self._desk.tokens()
        if tokens:
            with suppress(RunError):
                self.study.repair(False, tokens)
        self._desk.close()
        for seat in self._seats.all if self.engine.alive else ():
            self.engine.let_go(seat.actor)

    # What is told.

    def _tell(self, number: int, event: Event, where: str = "") -> None:
        self._logs.note(where, str(number), event)
        self.observe(number, event)

    def _tell_once(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self._tell(0, Trouble(text))

    def _wait(self, reason: str) -> None:
        """The database is away, for this thread or for one that answers questions."""
        if threading.current_thread() is threading.main_thread():
            self._tell(0, Trouble(reason))
        else:
            self._heard.put(("", Trouble(reason)))
