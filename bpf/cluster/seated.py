"""A worker in its seat, on a node of the cluster."""

import socket
import traceback
import warnings
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import ray
import torch

from bpf.cluster.remote import Away, Line, Pulse, RemoteFiles, RemoteStudy
from bpf.data.cache import Data
from bpf.errors import BpfError, UsageError
from bpf.experiment.bucket import Bucket
from bpf.experiment.places import belongs
from bpf.interrupts import Interrupted
from bpf.study.seam import patiently
from bpf.workers.events import Trouble
from bpf.workers.files import Folder, Stored
from bpf.workers.job import Terms
from bpf.workers.stopping import CutShort, Stop
from bpf.workers.worker import Worker

ANSWER_SECONDS, REPORT_ANSWER_SECONDS = 60.0, 15.0
"""After so long a question is asked again: it, or its answer, may have been lost. Reports sooner, as a worker that is
not heard of for a minute is taken for dead."""
REACH_SECONDS = 30.0
"""So long a worker tries to reach the server of the study, before its node counts as one that cannot."""


def work(order: dict[str, Any], post: Any) -> dict[str, Any]:
    """Train until nothing is left to claim; returns how that ended, as in `Left`."""
    address = ray.util.get_node_ip_address()
    where = f"{socket.gethostname()} ({address})"
    stop, send = Stop(), _sending(post, ANSWER_SECONDS)
    me = {"seat": order["seat"], "node": ray.get_runtime_context().get_node_id(), "where": where}
    pulse = Pulse(Line(_sending(post, REPORT_ANSWER_SECONDS)), me, stop)

    def wait(reason: str) -> None:
        pulse.tell(Trouble(reason))
        if stop.asked:
            raise stop.interruption()

    try:
        line = Line(send)
        with closing(_study(order, line, wait)) as study:
            facts = {"node": address, **order["facts"], **_gpu()}
            terms = Terms(order["device"], order["sharers"], order["checkpoint_seconds"], facts)
            worker = Worker(study, _files(order, line), _data(order), terms, pulse.tell, stop)
            pulse.holder = lambda: worker.holder
            worker.run()
        return _left("done")
    except Interrupted as stopped:
        return _left("cut short" if isinstance(stopped, CutShort) else "stopped")
    except BpfError as error:
        return _left("failed", f"On {where}: {error}", error.exit_code)
    except Exception:
        return _left("crashed", f"{traceback.format_exc().rstrip()} (on {where})")
    finally:
        pulse.close()


def _gpu() -> dict[str, str]:
    """Which GPU of the node this is; here it is the first, as Ray shows no other."""
    found = ray.get_gpu_ids()
    return {"device": f"cuda:{found[0]}"} if found else {}


def _left(how: str, text: str = "", exit_code: int = 0) -> dict[str, Any]:
    node = ray.get_runtime_context().get_node_id()
    return {"how": how, "text": text, "exit_code": exit_code, "node": node}


def _sending(post: Any, seconds: float) -> Callable[[bytes, bytes], tuple[bytes, bytes]]:
    def send(question: bytes, payload: bytes) -> tuple[bytes, bytes]:
        try:
            answer: tuple[bytes, bytes] = ray.get(post.ask.remote(question, payload), timeout=seconds)
            return answer
        except (ray.exceptions.RayError, TimeoutError) as error:
            raise Away(f"{type(error).__name__}") from error

    return send


def _study(order: dict[str, Any], line: Line, wait: Callable[[str], object]) -> Any:
    """The study at the desk, or on its server, which may be busy when many workers come at once."""
    if order["storage"] is None:
        line.on_wait = wait
        return RemoteStudy(line, order["seat"])
    from bpf.study.database import Database
    from bpf.study.patience import Unreachable
    from bpf.study.study import Study

    def opened() -> Study:
        return Study.open(Database.at(order["storage"]), order["experiment"])

    try:
        return patiently(opened, Unreachable, REACH_SECONDS, wait)
    except UsageError as error:
        raise UsageError(
            f"{error} Each node reaches the server by itself: it must be reachable from there, with the password in "
            "PGPASSWORD or ~/.pgpass of that node."
        ) from error


def _files(order: dict[str, Any], line: Line) -> Any:
    """The experiment's files: in their own folder if this node has it as well, else at the desk."""
    folder = Path(order["files"])
    shared = order["mark"] and belongs(folder, None, order["mark"])
    files: Any = Folder(folder) if shared else RemoteFiles(line, order["seat"])
    if order["checkpoints"]:
        return Stored(files, Bucket(order["checkpoints"], order["experiment"]))
    return files


def _data(order: dict[str, Any]) -> Data:
    """The data set, which all workers of a node read in the same memory."""
    name, classes, references = order["data"]
    arrays = ray.get(references)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        train_images, train_labels, test_images, test_labels = map(torch.from_numpy, arrays)
    return Data(name, train_images, train_labels, test_images, test_labels, tuple(classes))
