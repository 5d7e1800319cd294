"""Processes that start with nothing but an importable function.

They look for modules where this process does, and neither the current directory nor the program that runs here plays a
part: a script needs no `if __name__ == "__main__":` to start them. Where the system can, they are forked from a server
process that has imported everything once.
"""

import atexit
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any

from bpf.interrupts import SIGNALS

PRELOADED = ("bpf.workers.process", "sqlalchemy.dialects.sqlite")
"""What workers need. The second is imported on first use, which would be in each of them anew."""

_ONE_AT_A_TIME = threading.RLock()
"""What is put in place while a process starts belongs to the whole program."""

METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


def warm_up() -> None:
    """Begin to import, in the server process, what workers need. It returns at once, and can be called again."""
    if METHOD == "forkserver":
        from multiprocessing import forkserver, resource_tracker

        forkserver.set_forkserver_preload(list(PRELOADED))
        with _ONE_AT_A_TIME, _import_path_handed_down():
            with _signals_held():
                resource_tracker.ensure_running()  # it lets interrupts through, even where they are held
            with _signals_held():
                forkserver.ensure_running()


def start(target: Callable[..., object], *arguments: Any, name: str) -> BaseProcess:
    """A process that calls a function of an importable module, in the environment of this one. It ends with this one.

    It never sees a Ctrl-C that comes while it is started, and no SIGTERM before it has said `accept_signals`.
    """
    warm_up()
    context: Any = multiprocessing.get_context(METHOD)
    process: BaseProcess = context.Process(
        target=_call, args=(dict(os.environ), target, arguments), name=name, daemon=True
    )
    with _ONE_AT_A_TIME, _signals_held(), _import_path_handed_down(), _main_module_hidden():
        process.start()
    return process


def _call(environment: dict[str, str], target: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    target(*arguments)


def accept_signals() -> None:
    """Let the requests to stop come to this process, which has decided what to do about them."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, set(SIGNALS) - {signal.SIGINT})


@contextmanager
def _signals_held() -> Iterator[None]:
    """Let what is started here not see Ctrl-C and the like, which are meant for this process and delivered afterwards.

    `timeout` and some batch schedulers send their signals to every process of the group.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, set(SIGNALS))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _import_path_handed_down() -> Iterator[None]:
    """Let an interpreter that is started here find the modules that this one finds, from its first import on.

    It would look into the current directory first, as it is given code and no file. multiprocessing hands `sys.path`
    down later: in Python 3.11, and early 3.12 and 3.13, only when the server process has imported everything.
    """
    path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    wanted = {"PYTHONSAFEPATH": "1", "PYTHONPATH": path}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextmanager
def _main_module_hidden() -> Iterator[None]:
    """Let multiprocessing find no program that it would run once more in each process."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@atexit.register
def end_server() -> None:
    """End the server process at once: by itself it notices that this one has ended only after all its imports."""
    forkserver: Any = sys.modules.get("multiprocessing.forkserver")
    pid = forkserver and forkserver._forkserver._forkserver_pid
    if pid:
        with suppress(ChildProcessError):  # of another process, from which this one was forked
            if os.waitpid(pid, os.WNOHANG) == (0, 0):
                os.kill(pid, signal.SIGKILL)
