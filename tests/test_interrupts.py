"""Ctrl-C and SIGTERM at any moment: one line that says what was stored, exit code 130, and nothing stays behind."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from bpf import interrupts
from bpf.experiment.directory import open_experiment
from bpf.interrupts import NOTHING_BEGUN, Interrupted, interruptible, told_in_one_line
from bpf.results import summary
from bpf.workers import processes
from bpf.workers.stopping import Stop
from test_processes import GRID, ROOT, options, processes_of
from waiting import SECONDS, eventually

BOTH = [signal.SIGINT, signal.SIGTERM]
AT_ONCE = f"{NOTHING_BEGUN}\n"
LONG = GRID | {"epochs": 100_000}


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Everything is as it was afterwards."""
    before = [signal.getsignal(number) for number in interrupts.SIGNALS], sys.unraisablehook, sys.excepthook
    yield
    after = [signal.getsignal(number) for number in interrupts.SIGNALS], sys.unraisablehook, sys.excepthook
    sys.excepthook = before[2]
    assert after == before


# What becomes of a signal


def told_by(body: Callable[[], object], told: str = "told") -> str:
    """What the error says that a part ends with."""
    with pytest.raises(Interrupted) as raised, interruptible(lambda: told):
        body()
    assert raised.value.exit_code == 130
    return str(raised.value)


def send(number: int) -> None:
    signal.raise_signal(number)


def made_another_error() -> None:
    try:
        send(signal.SIGTERM)
    except KeyboardInterrupt:
        raise ImportError("numpy makes this of it") from None


def swallowed() -> None:
    with suppress(BaseException):
        send(signal.SIGTERM)


def swallowed_before_training() -> None:
    swallowed()
    with Stop().on_signals():
        pytest.fail("training began")


class Dropped:
    def __del__(self) -> None:
        send(signal.SIGTERM)


def dropped() -> None:
    Dropped()
    eventually(lambda: False)


@pytest.mark.parametrize("number", BOTH)
def test_a_signal_becomes_the_error_that_says_what_was_stored(number: signal.Signals) -> None:
    assert told_by(lambda: send(number)) == "told"


@pytest.mark.parametrize("body", [made_another_error, swallowed, swallowed_before_training, dropped])
def test_whatever_a_library_makes_of_it(body: Callable[[], None], capfd: pytest.CaptureFixture[str]) -> None:
    """Where Python would print it and go on, as in `__del__`, it comes again."""
    assert told_by(body) == "told"
    assert capfd.readouterr().err == ""


def test_the_innermost_part_says_what_was_stored() -> None:
    def inner() -> None:
        with interruptible(lambda: "inner"):
            send(signal.SIGTERM)

    def after_it() -> None:
        with interruptible(lambda: "inner"):
            pass
        send(signal.SIGTERM)

    assert told_by(inner, "outer") == "inner"
    assert told_by(after_it, "outer") == "outer"


def test_other_errors_stay_as_they_are() -> None:
    with pytest.raises(ZeroDivisionError), interruptible(lambda: "told"):
        _ = 1 // 0
    with pytest.raises(SystemExit), interruptible(lambda: "told"):
        sys.exit(3)


def test_signals_that_somebody_else_deals_with_are_left_to_them() -> None:
    """Such as those that a background job ignores."""
    seen: list[int] = []
    before = {number: signal.signal(number, lambda number, _: seen.append(number)) for number in BOTH}
    try:
        with interruptible(lambda: "told"):
            for number in BOTH:
                signal.raise_signal(number)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert seen == BOTH


def test_in_a_thread_nothing_is_taken_over() -> None:
    handler, seen = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with interruptible(lambda: "told"):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [handler]


def test_a_script_that_does_not_catch_it_ends_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    others: list[Any] = []
    hook, sys.excepthook = sys.excepthook, lambda *error: others.append(error[1])
    try:
        with pytest.raises(Interrupted) as raised, told_in_one_line():
            raise Interrupted("told")
        with pytest.raises(SystemExit) as end:
            sys.excepthook(Interrupted, raised.value, None)
        assert (end.value.code, capsys.readouterr().err) == (130, "told\n")
        error = ValueError()
        sys.excepthook(ValueError, error, None)
        assert others == [error]
    finally:
        sys.excepthook = hook


# Commands and scripts, at named moments

SEND = """
import os, signal, sys

def send(*_, **__):
    os.killpg(os.getpgid(0), signal.{number})
"""
IMPORTING = """
class Finder:
    def find_spec(self, name, *_):
        if name == {module!r}:
            send()

sys.meta_path.insert(0, Finder())
"""
PATCHED = """
from {module} import {owner}
original = {owner}.{name}

def patched(*arguments, **options):
    {before}
    returned = original(*arguments, **options)
    {after}
    return returned

{owner}.{name} = patched
"""
COMMAND = "from bpf.__main__ import main\nmain()\n"


def at(module: str, owner: str, name: str, after: bool = False) -> str:
    return PATCHED.format(
        module=module, owner=owner, name=name, before="pass" if after else "send()", after="send()" if after else "pass"
    )


def interrupted(
    work: Path, where: str, program: str = COMMAND, number: str = "SIGTERM", epochs: int = LONG["epochs"]
) -> str:
    """What a process says that sends a signal to its whole group at some moment, and then has to end."""
    (work / "program.py").write_text(SEND.format(number=number) + where + textwrap.dedent(program))
    command = [sys.executable, "program.py", "tune", "grid", *options(LONG | {"epochs": epochs}), "-q"]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("BPF_")}
    process = subprocess.Popen(
        [*command, "--workers=1"],
        cwd=work,
        env={**kept, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=SECONDS)
        eventually(lambda: processes_of(process.pid) == [])
    finally:
        for pid in processes_of(process.pid):
            os.kill(pid, signal.SIGKILL)
    assert process.returncode == 130, said
    return said


SCRIPT = f"""
    import bpf

    bpf.tune({LONG!r}, "grid", quiet=True, workers=1)
"""
GO_ON = "Nothing finished is lost. Go on with: bpf resume grid\n"


@pytest.mark.skipif(not Path("/proc").exists(), reason="processes are found in /proc")
class TestOfAGroup:
    @pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
    def test_while_the_command_is_imported(self, number: str, tmp_path: Path) -> None:
        assert interrupted(tmp_path, IMPORTING.format(module="bpf.cli.app"), number=number) == AT_ONCE

    @pytest.mark.parametrize("module", ["torch", pytest.param("torch.nn", marks=pytest.mark.slow)])
    def test_while_libraries_are_imported(self, module: str, tmp_path: Path) -> None:
        """And workers' imports have begun."""
        assert interrupted(tmp_path, IMPORTING.format(module=module)) == AT_ONCE
        assert not (tmp_path / "grid").exists()

    @pytest.mark.parametrize(
        "where",
        [
            pytest.param(at("bpf", "api", "plan"), marks=pytest.mark.slow),
            pytest.param(at("bpf", "api", "load", after=True), marks=pytest.mark.slow),
        ],
        ids=["planning", "data"],
    )
    def test_before_anything_is_begun(self, where: str, tmp_path: Path) -> None:
        assert interrupted(tmp_path, where) == AT_ONCE
        assert not (tmp_path / "grid").exists()

    @pytest.mark.slow
    def test_while_the_plan_is_stored(self, tmp_path: Path) -> None:
        assert interrupted(tmp_path, at("bpf.study.study", "Study", "plan")) == f"Interrupted at once. {GO_ON}"

    @pytest.mark.parametrize("number", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.slow)])
    def test_while_workers_start(self, number: str, tmp_path: Path) -> None:
        said = interrupted(tmp_path, at("bpf.workers", "processes", "start", after=True), number=number)
        assert said == "Stopped, and everything is stored. Go on with: bpf resume grid\n"
        assert summary.status(open_experiment(tmp_path / "grid"))["cells"]["running"] == 0

    @pytest.mark.slow
    def test_while_results_are_shown(self, tmp_path: Path) -> None:
        said = interrupted(tmp_path, at("bpf.results", "summary", "ranking"), epochs=1)
        assert said == "Interrupted. Everything is stored; see it with: bpf status grid\n"

    @pytest.mark.slow
    @pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
    @pytest.mark.parametrize("module", ["torch", "bpf.notebook", "sqlalchemy"])
    def test_a_script_while_it_imports(self, module: str, number: str, tmp_path: Path) -> None:
        assert interrupted(tmp_path, IMPORTING.format(module=module), SCRIPT, number) == AT_ONCE

    @pytest.mark.slow
    def test_a_script_while_it_reads_data_plans_and_starts_workers(self, tmp_path: Path) -> None:
        assert interrupted(tmp_path, at("bpf", "api", "load"), SCRIPT) == AT_ONCE
        said = interrupted(tmp_path, at("bpf.study.study", "Study", "plan"), SCRIPT)
        assert said == "Interrupted at once. Nothing finished is lost; the same call goes on in grid.\n"
        said = interrupted(tmp_path, at("bpf.workers", "processes", "start", after=True), SCRIPT)
        assert said == "Stopped, and everything is stored.\n"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="processes are found in /proc")
@pytest.mark.parametrize("seconds", ["0.3", "1", "2", "3.5", "6"])
def test_a_command_with_a_time_limit(seconds: str, tmp_path: Path) -> None:
    """`timeout` sends SIGTERM to the command, and then to its whole group."""
    process = subprocess.Popen(
        ["timeout", seconds, sys.executable, "-m", "bpf", "tune", "grid", *options(LONG), "-q"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    said, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 124
    [line] = said.splitlines()
    assert line.startswith(("Interrupted at once. ", NOTHING_BEGUN, "Stopped, and everything is stored. "))
    eventually(lambda: processes_of(process.pid) == [])


WORKER = """
import os, signal, time
from bpf.workers import processes

def held():
    return signal.pthread_sigmask(signal.SIG_BLOCK, ())

def work():
    os.kill(os.getpid(), signal.SIGTERM)  # such as one that came to the whole group
    signal.signal(signal.SIGTERM, lambda *_: os._exit(7))
    processes.accept_signals()
    time.sleep(600)
"""


@pytest.mark.skipif(processes.METHOD != "forkserver", reason="the system has no fork server")
def test_a_worker_gets_a_signal_when_it_knows_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "ours.py").write_text(WORKER)
    program = (
        "import ours\nfrom bpf.workers import processes\nprocesses.PRELOADED = ()\nbefore = ours.held()\n"
        "one = processes.start(ours.work, name='one')\none.join(600)\nprint(one.exitcode, ours.held() == before)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert (ended.stdout, ended.stderr) == ("7 True\n", "")
