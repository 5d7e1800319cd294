"""Checkpoints in an object store: a server that speaks S3, on this machine."""

import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bpf.errors import UsageError
from bpf.experiment.bucket import Bucket
from bpf.experiment.directory import open_experiment
from bpf.experiment.places import MARKER, Mark
from servers import free_port
from test_workers import Process, Troubled, outcomes, start, troubled  # noqa: F401 - fixtures
from waiting import eventually

GRID = ["--dataset=digits", "--algorithm=troubled", "--arch=8", "--activation=tanh", "--no-batch-norm", "--lr=0.1,0.01"]
GRID += ["--bw-init=ortho", "--epochs=4", "--executions=1", "--examples-frac=0.1", "--checkpoint-every=0"]
GRID += ["--workers=1", "--quiet"]
MARK = Mark(experiment="ex", created="2026-01-01T00:00:00+00:00")


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """The server's address. It holds everything in memory, and has a bucket `shared`."""
    pytest.importorskip("s3fs")
    pytest.importorskip("moto.server")
    address = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-c", "import sys; from moto.server import main; main(sys.argv[1:])"]
    log = subprocess.DEVNULL
    server = subprocess.Popen([*command, "-H", "127.0.0.1", "-p", str(port)], stdout=log, stderr=log)
    try:
        eventually(lambda: _answers(address))
        urllib.request.urlopen(urllib.request.Request(f"{address}/shared", method="PUT")).close()
        yield address
    finally:
        server.kill()
        server.wait()


def _answers(address: str) -> bool:
    try:
        urllib.request.urlopen(address).close()
    except OSError:
        return False
    return True


@pytest.fixture
def store(endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A URL of nobody else's."""
    from fsspec.config import conf

    names = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in (names | {"FSSPEC_S3_ENDPOINT_URL": endpoint}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(conf, "s3", {"endpoint_url": endpoint})  # the environment is read when it is imported
    return f"s3://shared/{tmp_path.name}"


def test_what_a_bucket_is_for(store: str, tmp_path: Path) -> None:
    there, path = Bucket(store, "ex"), tmp_path / "0123456789abcdef.pt"
    assert not there.check(MARK)
    assert there.names() == {}
    there.take(MARK)
    assert there.check(MARK)
    for content in (b"first", b"x" * 2**24):
        path.write_bytes(content)
        there.put(path)
    path.unlink()
    Bucket(store, "ex").fetch(path)
    assert path.read_bytes() == b"x" * 2**24
    assert there.names().keys() == {MARKER, path.name}
    assert there.set_aside(path.name) == f"{path.name}.damaged"
    there.fetch(path)
    assert not path.exists()
    there.remove(f"{path.name}.damaged")
    there.remove(f"{path.name}.damaged")
    assert there.names().keys() == {MARKER}
    with pytest.raises(UsageError, match="holds something else"):
        there.check(Mark(experiment="ex", created="2026-02-02T00:00:00+00:00"))


def test_a_bucket_that_nobody_made(store: str) -> None:
    with pytest.raises(UsageError, match="there is no 'nobody' in that store"):
        Bucket("s3://nobody/folder", "ex").check(MARK)


def test_a_grid_killed_and_resumed_is_one_without(
    store: str,
    troubled: Troubled,  # noqa: F811
    start: Callable[..., Process],  # noqa: F811
    tmp_path: Path,
) -> None:
    assert start("tune", "plain", *GRID).end() == 0
    troubled.does(ortho="dawdles")
    killed = start("tune", "ex", *GRID, "--checkpoints", store)
    there = Bucket(store, "ex")
    eventually(lambda: any(name.endswith(".pt") for name in there.names()) or killed.process.poll() is not None)
    assert killed.process.poll() is None, killed.text
    os.killpg(killed.process.pid, signal.SIGKILL)
    killed.end()
    assert any(name.endswith(".pt") for name in there.names())
    troubled.does()
    assert start("resume", "ex", "--quiet").end() == 0
    assert outcomes(open_experiment(tmp_path / "ex")) == outcomes(open_experiment(tmp_path / "plain"))
    assert there.names().keys() == {MARKER}
