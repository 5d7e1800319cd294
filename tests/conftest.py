"""Services for the tests that need one, and a line of progress for whoever waits for them."""

import os
import secrets
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch

from bpf.study.study import Study
from bpf.workers.supervisor import Supervisor
from bpf.workers.worker import Worker
from servers import PostgresServer

# As in workers: small tensors gain nothing from more threads, which wait for each other with all their might.
torch.set_num_threads(1)

# A job in the background ignores Ctrl-C, and hands that down to processes that tests start and then interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Progress:
    """A line for each tenth of the tests and one for each failure, in place of a character for each test."""

    def __init__(self, config: pytest.Config) -> None:
        self._plugins, self._total = config.pluginmanager, 0
        self._began, self._ended, self._told = time.monotonic(), set[str](), 0

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._total = len(session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: object, ids: list[str]) -> None:
        self._total = len(ids)

    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str]:
        if report.failed:
            return ("failed", "", "FAILED") if report.when == "call" else ("error", "", "ERROR")
        return report.outcome if report.skipped or report.when == "call" else "", "", ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._say(f"{report.outcome.upper()} {report.nodeid}")
        if report.when == "teardown":
            self._ended.add(report.nodeid)
            tenths = 10 * len(self._ended) // self._total
            if tenths > self._told:
                self._told = tenths
                seconds = time.monotonic() - self._began
                self._say(f"{10 * tenths:3} %  {len(self._ended)} of {self._total} tests, {seconds:.0f} s")

    def _say(self, line: str) -> None:
        terminal = self._plugins.get_plugin("terminalreporter")
        terminal.ensure_newline()
        terminal.write_line(line)


def pytest_configure(config: pytest.Config) -> None:
    if config.option.verbose < 1 and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Progress(config), "bpf-progress")


RUN = Supervisor.run


def train_here(supervisor: Supervisor) -> None:
    """What worker processes do, in this one."""
    [job, *_] = supervisor.jobs
    with closing(Study.open(job.storage, job.experiment)) as study:
        Worker.of(job, study, partial(supervisor.observe, 1), supervisor.stop).run()


@pytest.fixture(scope="module")
def in_this_process() -> Iterator[None]:
    """Grids are trained without worker processes, of which each takes a second: for files that are not about those."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Supervisor, "run", train_here)
        yield


@pytest.fixture
def in_workers(in_this_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As users have it: for the tests of such a file that have a worker process all the same."""
    monkeypatch.setattr(Supervisor, "run", RUN)


@pytest.fixture
def empty_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and nothing in the environment that says where data and studies lie."""
    monkeypatch.chdir(tmp_path)
    for name in ("BPF_DATA_DIR", "BPF_STORAGE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@contextmanager
def running() -> Iterator[PostgresServer]:
    reason = PostgresServer.missing()
    if reason is not None:
        # what is checked before a merge is checked in full; elsewhere the other tests are worth running
        if os.environ.get("CI") == "true":
            pytest.fail(f"PostgreSQL cannot run here: {reason}", pytrace=False)
        pytest.skip(f"PostgreSQL cannot run here: {reason}")
    server = PostgresServer(Path(tempfile.mkdtemp(prefix="bpf-postgres-", dir="/tmp")))
    try:
        server.start()
        yield server
    finally:
        server.close()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """One server for all tests: not to be stopped."""
    with running() as server:
        yield server


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    """A fresh, empty database; gone after the test, together with the connections that are left."""
    name = f"test_{secrets.token_hex(8)}"
    postgres_server.create_database(name)
    yield postgres_server.url(name)
    postgres_server.drop_database(name)


@pytest.fixture
def postgres_own_server() -> Iterator[PostgresServer]:
    """A server that the test may stop, restart and crash."""
    with running() as server:
        yield server
