"""Ctrl-C and SIGTERM at any moment: what goes on ends, and whoever asked for it is told in one line."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any

from bpf.errors import BpfError

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
"""SIGUSR1 is what Slurm is asked to send some time before it kills (`--signal=USR1@120`)."""
NOTHING_BEGUN = "Interrupted before anything was begun. Nothing is lost; the same command begins again."
AGAIN_SECONDS = 0.05


class Interrupted(BpfError):
    """The user or the system asked to stop; everything is stored and released."""

    exit_code = 130


class _State:
    """Of this process: what is told in each part that can be interrupted, the innermost last, and whether it was."""

    parts: list[tuple[Callable[[], str], bool]] = []  # noqa: RUF012
    asked = False


def check() -> None:
    """Raise KeyboardInterrupt if there was one that a library has swallowed."""
    if _State.asked:
        raise KeyboardInterrupt


@contextmanager
def interruptible(told: Callable[[], str], at_once: bool = False) -> Iterator[None]:
    """Let SIGTERM do what Ctrl-C does, and make Interrupted of either, with what is `told` then.

    With `at_once` it ends the process there and then: for a part that imports libraries, some of which cannot bear an
    exception then, and that leaves nothing half done. In a thread, which gets no signals, they are left to the program.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = _listen()
    _State.parts.append((told, at_once))
    try:
        yield
        if before:
            check()
    except Interrupted:
        raise
    except KeyboardInterrupt:
        raise Interrupted(told()) from None
    except Exception:
        if _State.asked:  # which is what it has become on its way
            raise Interrupted(told()) from None
        raise
    finally:
        _State.parts.pop()
        if before:
            _State.asked = False
            sys.unraisablehook = before.pop("hook")
            for number, handler in before.items():
                signal.signal(int(number), handler)


def _listen() -> dict[str, Any]:
    """Take over the signals that mean nothing yet; returns what was there, or nothing if that is done already."""
    if _State.parts:
        return {}
    usual = {signal.SIG_DFL, signal.default_int_handler}
    before: dict[str, Any] = {str(int(n)): signal.getsignal(n) for n in SIGNALS if signal.getsignal(n) in usual}
    for number in before:
        signal.signal(int(number), _interrupt)
    before["hook"] = sys.unraisablehook
    sys.unraisablehook = _not_swallowed(sys.unraisablehook)
    return before


def _interrupt(number: int, frame: FrameType | None) -> None:
    told, at_once = _State.parts[-1] if _State.parts else (lambda: NOTHING_BEGUN, True)
    if at_once and _State.asked and len(_State.parts) == 1:  # it is ending, and about to say so
        return
    _State.asked = True
    if at_once:
        _end(told())
    raise KeyboardInterrupt


def _not_swallowed(hook: Callable[[Any], object]) -> Callable[[Any], None]:
    """Where Python can but print an exception and go on, interrupt once more, in a moment."""

    def hooked(unraisable: Any) -> None:
        if _State.asked and issubclass(unraisable.exc_type, KeyboardInterrupt):
            timer = threading.Timer(AGAIN_SECONDS, os.kill, (os.getpid(), signal.SIGINT))
            timer.daemon = True
            timer.start()
        else:
            hook(unraisable)

    return hooked


def _end(told: str) -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    with suppress(Exception):
        sys.stdout.flush()
    with suppress(OSError):
        os.write(2, f"{told}\n".encode())
    if processes := sys.modules.get("bpf.workers.processes"):
        with suppress(Exception):
            processes.end_server()
    os._exit(Interrupted.exit_code)


@contextmanager
def told_in_one_line() -> Iterator[None]:
    """Let a script that does not catch Interrupted end with its message and exit code, and without a traceback."""
    try:
        yield
    except Interrupted:
        if not (hasattr(sys, "ps1") or sys.flags.interactive):
            sys.excepthook = _one_line(sys.excepthook)
        raise


def _one_line(hook: Callable[..., object]) -> Callable[..., None]:
    def hooked(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not isinstance(error, Interrupted):
            hook(kind, error, trace)
            return
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)

    return hooked
