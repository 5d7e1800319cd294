"""The life of a worker process on this machine."""

import os
import signal
import traceback
from contextlib import closing
from multiprocessing.connection import Connection

from bpf.errors import BpfError
from bpf.interrupts import SIGNALS, Interrupted
from bpf.study.study import Study
from bpf.workers.events import Event, Left
from bpf.workers.job import Job
from bpf.workers.processes import accept_signals
from bpf.workers.stopping import CutShort, Stop
from bpf.workers.worker import Worker


def work(job: Job, connection: Connection) -> None:
    """The life of a worker process: what happens goes through `connection`, and any answer is a request to stop."""

    def told_to_stop() -> bool:
        try:
            return connection.poll()
        except OSError:  # whoever started this process is gone
            return True

    stop = Stop(also=told_to_stop)

    def tell(event: Event) -> None:
        try:
            connection.send(event)
        except OSError:
            stop.request()

    for number in SIGNALS:  # Ctrl-C reaches the whole group; whoever started this process decides what it means
        signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else lambda *_: stop.request())
    accept_signals()
    try:
        os.chdir(job.home)
        with closing(Study.open(job.storage, job.experiment)) as study:
            Worker.of(job, study, tell, stop).run()
        tell(Left("done"))
    except Interrupted as stopped:
        tell(Left("cut short" if isinstance(stopped, CutShort) else "stopped"))
    except BpfError as error:
        tell(Left("failed", str(error), error.exit_code))
    except Exception:
        tell(Left("crashed", traceback.format_exc()))
