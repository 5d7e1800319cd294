"""Services for the tests that need one."""

import os
import secrets
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from servers import PostgresServer

# A job in the background ignores Ctrl-C, and hands that down to processes that tests start and then interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


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
