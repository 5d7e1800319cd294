"""Ray: how a cluster is made or joined, which nodes it has, and how it is asked for workers."""

import logging
import os
import re
import signal
import socket
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from bpf.cluster import post
from bpf.cluster.carrier import new_post
from bpf.cluster.nodes import Node, kinds
from bpf.errors import BpfError, RunError, UsageError
from bpf.extras import need
from bpf.machine import cores
from bpf.spec.values import AUTO, LOCAL

SHARE = 10_000
"""Ray counts shares of a GPU in parts of this."""
ANSWER_SECONDS, END_SECONDS = 5.0, 10.0
READY = 16
"""So many workers are made ready while the request is looked at."""
_HERE = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # as there, nothing listens beyond the loopback device
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_worker_niceness": "0",  # by default workers give way to everything else, also while all of it starts
}
"""What makes a cluster of this command's own one that nobody else can use, and that has the machine."""


class Gone(RunError):
    """The cluster has ended, or cannot be reached any more."""

    def __init__(self) -> None:
        super().__init__(
            "The Ray cluster cannot be reached any more. What its workers have not stored is trained again."
        )


def module() -> Any:
    """Ray itself. Raises UsageError if it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    warnings.filterwarnings("ignore", "Ray Client connection timed out")
    return need("ray", "--on", "Ray", "ray")


class Engine:
    """A connection to a cluster. It begins at once, in a thread, while this process does other things."""

    def __init__(self, on: str, workers: int | None, device: str, per_gpu: int) -> None:
        self.on, self.workers, self.device, self.per_gpu = on, workers, device, per_gpu
        named = os.environ.get("RAY_ADDRESS", "")
        self._address = named if on == AUTO and ":" in named else on
        self._ready_made: list[tuple[str, Any]] = []
        self._post: Any = None
        self._environment: dict[str, str | None] = {}
        self._failure: BaseException | None = None
        self._ready, self._closing = threading.Event(), threading.Event()
        if on == LOCAL:
            self._prepare()
        self.ray = module()
        # Ray's processes end with the thread that has started them, so it lives as long as the connection.
        self._thread = threading.Thread(target=self._live, name="bpf-ray", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the connection. Raises UsageError if there is no such cluster, or it refuses us."""
        while not self._ready.wait(0.2):  # so that Ctrl-C is seen
            pass
        _take_signals_back()
        if self._failure is not None:
            raise self._explained(self._failure) from self._failure

    def close(self) -> None:
        """Let go of the cluster, and wait until that is done: meanwhile Ray ends a process that touches it."""
        self._closing.set()
        self._thread.join(END_SECONDS)
        _take_signals_back()
        for name, value in self._environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value

    @property
    def alive(self) -> bool:
        """Whether the head of the cluster answers: calls of Ray wait a minute for one that does not."""
        try:
            _connect(self._head)
            return True
        except OSError:
            return False

    @property
    def dashboard(self) -> str:
        """Where Ray's dashboard is, such as `127.0.0.1:8265`; empty if it does not run."""
        with suppress(Exception):  # of no more importance than that
            return str(self.ray._private.worker.get_dashboard_url() or "")
        return ""

    def nodes(self) -> list[Node]:
        """The living nodes. Raises Gone when the cluster is."""
        if not self.alive:
            raise Gone
        try:
            listed = self.ray.nodes()
        except Exception as error:
            raise Gone from error
        leaving = self._draining()
        return [
            Node(
                node["NodeID"],
                node["NodeManagerAddress"],
                int(node["Resources"].get("CPU", 0)),
                int(node["Resources"].get("GPU", 0)),
                int(node["NodeManagerPort"]),
                node["NodeID"] in leaving,
            )
            for node in listed
            if node["Alive"]
        ]

    def answers(self, node: Node) -> bool | None:
        """Whether Ray runs on a node, which it is asked itself, as Ray needs long to notice that a machine is gone.

        None if that cannot be told from here, as through `ray://`.
        """
        if self._address.startswith("ray://"):
            return None
        try:
            _connect(f"{node.address}:{node.port}")
            return True
        except OSError:
            return False

    def _draining(self) -> Mapping[str, Any]:
        """The nodes that Ray is about to take away. Not public, so it may be missing: then their loss is noticed."""
        with suppress(Exception):
            found: Mapping[str, Any] = self.ray._private.state.state.get_draining_nodes()
            return found
        return {}

    def actor(self, kind: str) -> Any:
        """A new seat: an actor with a processor core, a GPU or a share of one. Ray places it when there is room."""
        for number, (made, actor) in enumerate(self._ready_made):
            if made == kind:
                del self._ready_made[number]
                return actor
        share = int(SHARE / self.per_gpu) / SHARE
        resources = {"num_cpus": 1} if kind == "cpu" else {"num_cpus": 0, "num_gpus": share}
        return self.ray.remote(post.Seat).options(max_restarts=-1, **resources).remote()

    def post(self) -> Any:
        """A new post, which needs no processor core."""
        made, self._post = self._post, None
        return made or new_post(self.ray)

    def let_go(self, actor: Any) -> None:
        with suppress(Exception):
            self.ray.kill(actor)

    def let_spare_go(self) -> None:
        """Free what was made ready and is not needed."""
        while self._ready_made:
            self.let_go(self._ready_made.pop()[1])

    def _make_ready(self) -> None:
        """Let some workers begin their imports, and the post: they take as long as Ray takes to start."""
        nodes = self.nodes()
        made: list[tuple[str, Any]] = []
        for kind in kinds(self.device, nodes):
            room = sum(node.seats(kind, self.per_gpu) for node in nodes)
            made += [(kind, self.actor(kind)) for _ in range(min(room, self.workers or room, READY) - len(made))]
        for _, actor in made:
            actor.prepare.remote()
        self._ready_made, self._post = made, new_post(self.ray) if made else None

    def _live(self) -> None:
        # Ray prints what it has to say of nodes, whatever is asked of it, and also where JSON is to go.
        with suppress(AttributeError):
            self.ray._private.worker.print_to_stdstream = lambda *said, **more: None
        try:
            quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
            if self.on == LOCAL:
                cpus = max(cores(), self.workers or 0)
                with _fewer_processes(self.ray):
                    found = self.ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
            else:
                if self._address != AUTO:  # Ray would try for minutes, and not say what the matter is
                    _connect(self._address.removeprefix("ray://"))
                found = self.ray.init(address=self._address, **quiet)
            self._head = getattr(found, "address_info", {}).get("gcs_address") or self._address.removeprefix("ray://")
            self.ray.cloudpickle.register_pickle_by_value(post)
            with suppress(BpfError):  # which is found again, and told, when the cluster is needed
                self._make_ready()
        except BaseException as error:
            self._failure = error
        finally:
            self._ready.set()
        self._closing.wait()
        with suppress(Exception):
            self.ray.cloudpickle.unregister_pickle_by_value(post)
        with suppress(Exception):
            self.ray.shutdown()

    def _prepare(self) -> None:
        """Let nobody but this process use the cluster that it makes."""
        wanted = dict(_HERE)
        if os.environ.get("RAY_AUTH_MODE") in (None, "token") and not os.environ.get("RAY_AUTH_TOKEN"):
            wanted["RAY_AUTH_TOKEN"] = os.urandom(32).hex()
        else:
            del wanted["RAY_AUTH_MODE"]  # as the user has it
        self._environment = {name: os.environ.get(name) for name in wanted}
        os.environ.update(wanted)

    def _explained(self, error: BaseException) -> UsageError:
        reason = said(error)
        if isinstance(error, ImportError):
            cure = "pip install 'bpf[ray]' has what ray:// needs."
        elif re.search("token|auth|UNAUTHENTICATED|credential", reason, re.IGNORECASE):
            cure = "Give the cluster's token in RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, with RAY_AUTH_MODE=token."
        elif self.on == AUTO:
            cure = "Start a cluster (`ray start --head`), name one (--on HOST:PORT), or use one of your own: --on ray."
        else:
            cure = (
                "Check that its head runs and can be reached from here, with the same versions of Ray and Python, and "
                "that RAY_AUTH_TOKEN is the token of the cluster."
            )
        return UsageError(f"--on {self.on}: there is no Ray cluster to use: {reason}. {cure}")


_begun: Engine | None = None
"""The one that is on its way, or in use."""


def begin(on: str, workers: int | None, device: str, per_gpu: int = 1) -> Engine:
    """Begin to connect to a cluster, as soon as it is known that it will be needed. It can be called again.

    Raises UsageError without Ray.
    """
    global _begun
    wanted = (on, workers, device, per_gpu)
    if _begun is not None and (_begun.on, _begun.workers, _begun.device, _begun.per_gpu) != wanted:
        end()
    if _begun is None:
        _begun = Engine(*wanted)
    return _begun


def end() -> None:
    """Leave the cluster; one of this command's own ends."""
    global _begun
    if _begun is not None:
        leaving, _begun = _begun, None
        leaving.close()


@contextmanager
def connected(on: str, workers: int | None, device: str, per_gpu: int) -> Iterator[Engine]:
    """A connection to a cluster whose nodes can be used as `device` asks for. Raises UsageError otherwise."""
    try:
        engine = begin(on, workers, device, per_gpu)
        engine.wait()
        kinds(device, engine.nodes())
        yield engine
    finally:
        end()


@contextmanager
def _fewer_processes(ray: Any) -> Iterator[None]:
    """Let Ray start neither what shows logs here, nor what adds machines, nor the server of a dashboard that is not
    there: they take two seconds of its start.

    Not public, so it may be missing: then they run, and do nothing.
    """
    try:
        parameter, services = ray._private.parameter, ray._private.services
        parameters, server = parameter.RayParams, services.start_api_server
        parameters(include_log_monitor=False, no_monitor=True)
    except (AttributeError, TypeError):
        yield
        return
    parameter.RayParams = partial(parameters, include_log_monitor=False, no_monitor=True)
    services.start_api_server = lambda *given, **named: ("", None)
    try:
        yield
    finally:
        parameter.RayParams, services.start_api_server = parameters, server


def _take_signals_back() -> None:
    """Put Python's handler back: Ray takes SIGTERM when it connects, and leaves it to the system when it goes."""
    handler = signal.getsignal(signal.SIGTERM)
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _connect(address: str) -> None:
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS).close()


def said(error: BaseException) -> str:
    """What an error of Ray's says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")[:400]
