"""On a Ray cluster whose nodes come and go, and whose processes are killed: each cell is finished once, with the
numbers of one undisturbed machine.

`make cluster-chaos` has more events than the tests do, and tells what it did.
"""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from bpf.errors import BpfError
from bpf.experiment.directory import open_experiment
from bpf.results import summary
from bpf.study.plan import KILLS
from chaos import assert_ran_once, assert_tidy, assert_undisturbed, outcomes
from clusters import Nodes, needed_ray
from servers import PostgresServer
from waiting import SECONDS, eventually

EVENTS = int(os.environ.get("BPF_CLUSTER_EVENTS", "50"))
SEED = int(os.environ.get("BPF_CHAOS_SEED", "1"))
PROGRAM = [sys.executable, "-m", "bpf"]
GRID = [
    *("--dataset", "digits", "--algorithm", "bp,drtp,ll-cce", "--arch", "12,9-7,8-8-8,16", "--activation", "tanh"),
    *("--batch-norm", "--bw-init", "ortho", "--lr", "0.001,0.003,0.01", "--executions-per-trial", "2"),
    *("--checkpoint-every", "0"),
]
MOST_NODES = 3
NEVER_SHOWN = ("Traceback", "locked", "bug in bpf")

pytestmark = pytest.mark.slow


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    needed_ray()
    with Nodes() as made:
        yield made


class Driver:
    """`bpf tune` or `bpf resume` on a cluster, in a process of its own."""

    def __init__(self, nodes: Nodes, directory: Path, *arguments: str) -> None:
        self.directory, self._log = directory, directory.with_suffix(f".{time.monotonic_ns()}.log")
        self._earlier = {worker["token"] for worker in self._at_work()}  # on a server, until their leases have run out
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*PROGRAM, *arguments, "--on", nodes.address, "--verbose"],
                env=nodes.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait(self) -> int:
        code = self.process.wait(SECONDS)
        assert not [word for word in NEVER_SHOWN if word in self.output], self.output
        return code

    def ends(self) -> bool:
        return self.process.poll() is not None

    def workers(self) -> list[int]:
        """The processes that hold cells now, by this driver."""
        return [worker["pid"] for worker in self._at_work() if worker["token"] not in self._earlier]

    def _at_work(self) -> list[dict[str, Any]]:
        with suppress(BpfError), closing(open_experiment(self.directory).read_study()) as study:
            return [worker for worker in study.workers() if (worker["facts"] or {}).get("at")]
        return []

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def kill(self, number: int = signal.SIGKILL) -> int:
        with suppress(ProcessLookupError):
            self.process.send_signal(number)
        return self.process.wait(SECONDS)

    def __enter__(self) -> "Driver":
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()


def finished(driver: Driver) -> int:
    with suppress(BpfError):
        return int(summary.status(open_experiment(driver.directory))["cells"]["complete"])
    return 0


def undisturbed(directory: Path, epochs: int) -> dict[str, Any]:
    """The grid on one machine, without Ray."""
    command = [*PROGRAM, "tune", str(directory), *GRID, "--epochs", str(epochs), "--workers", "1", "--quiet"]
    subprocess.run(command, check=True, capture_output=True)
    return outcomes(directory)


def test_nodes_come_and_go_and_the_driver_dies(tmp_path: Path, nodes: Nodes) -> None:
    epochs = 150  # a busy machine takes long to start the next worker, and the others must not be through by then
    expected = undisturbed(tmp_path / "one", epochs)
    directory = tmp_path / "grid"
    first = nodes.add()
    with Driver(nodes, directory, "tune", str(directory), *GRID, "--epochs", str(epochs)) as driver:
        eventually(lambda: finished(driver) > 0 or driver.ends())
        second = nodes.add()
        eventually(lambda: len(driver.workers()) == 2 or driver.ends())
        nodes.lose(first)  # with the worker there
        nodes.add()
        eventually(lambda: "was lost" in driver.output or driver.ends())  # till then its worker seems to live
        eventually(lambda: len(driver.workers()) == 2 or driver.ends())
        os.kill(driver.workers()[0], signal.SIGKILL)
        before = finished(driver)
        eventually(lambda: (finished(driver) > before and "is started again" in driver.output) or driver.ends())
        assert not driver.ends(), driver.output
        driver.kill()
    assert 0 < finished(driver) < 36
    with Driver(nodes, directory, "resume", str(directory)) as driver:
        eventually(driver.workers)
        nodes.lose(second)
        assert driver.wait() == 0, driver.output
    assert outcomes(directory) == expected
    assert_ran_once(directory)
    assert_tidy(directory)
    assert len(list((directory / "logs").glob("node-*"))) >= 2


def test_a_node_that_will_be_taken_away_loses_nothing(tmp_path: Path, nodes: Nodes) -> None:
    directory = tmp_path / "grid"
    told = "--dataset digits --algorithm bp --arch 16 --activation tanh --batch-norm --lr 0.01 --executions-per-trial 2"
    grid = [*told.split(), "--epochs", "3000", "--checkpoint-every", "1000"]
    first = nodes.add()
    with Driver(nodes, directory, "tune", str(directory), *grid) as driver:
        eventually(lambda: driver.workers() or driver.ends())
        assert nodes.drain(first, 30)
        # It leaves in order, with a checkpoint, though checkpoints are 1000 s apart, and is not counted as crashed.
        eventually(lambda: list((directory / "checkpoints").glob("*.pt")) or driver.ends())
        nodes.lose(first)
        nodes.add()
        assert driver.wait() == 0, driver.output
        assert "crashed" not in driver.output
    [row, *_] = summary.rows(open_experiment(directory))
    assert (row.attempt, row.kills, row.cause) == (2, 0, None)


def test_what_a_cluster_cannot_do_is_told_before_anything_is_written(tmp_path: Path, nodes: Nodes) -> None:
    nodes.add()
    nodes.add(num_gpus=1)  # as Ray believes
    directory = tmp_path / "grid"
    tune = ["tune", str(directory), *GRID, "--epochs", "3"]
    with Driver(nodes, directory, *tune) as driver:
        assert driver.wait() == 2
        assert "1 node with GPUs and 1 node without" in " ".join(driver.output.split())
        assert not directory.exists()
    with Driver(nodes, directory, *tune, "--device", "cuda:1") as driver:
        assert driver.wait() == 2
        assert not directory.exists()
    with Driver(nodes, directory, *tune, "--device", "cuda") as driver:
        assert driver.wait() == 2
        assert "(127.0.0.1): device cuda:0: this machine has no CUDA device" in driver.output
    with Driver(nodes, directory, "resume", str(directory), "--device", "cpu") as driver:
        assert driver.wait() == 0, driver.output
    assert_ran_once(directory)


@pytest.mark.parametrize(
    ("what", "wanted", "problem"),
    [
        (
            "needs",
            {"torch": "1.0", "bpf-nowhere": "2"},
            r"torch is \S+, and 1\.0 where bpf was started; bpf-nowhere is not",
        ),
        ("code", {"bpf_local_losses": "0"}, r"the code of bpf_local_losses is another one"),
    ],
)
def test_a_node_that_lacks_something_is_named(
    what: str, wanted: dict[str, str], problem: str, tmp_path: Path, nodes: Nodes
) -> None:
    nodes.add()
    (tmp_path / "driver.py").write_text(
        "from bpf.cluster import orders\n"
        f"usual = orders.{what}\n"
        f"orders.{what} = lambda experiment: usual(experiment) | {wanted}\n"
        "from bpf.cli.app import main\n"
        "main()\n"
    )
    command = [sys.executable, str(tmp_path / "driver.py"), "tune", str(tmp_path / "grid"), *GRID, "--epochs", "3"]
    done = subprocess.run(
        [*command, "--on", nodes.address], env=nodes.environment, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 2, done.stderr
    said = " ".join(done.stderr.split())
    assert re.search(rf"Node 127\.0\.0\.1 \(\S+\): {problem}", said)


@pytest.mark.parametrize("place", ["bpf.api:_planned", "bpf.results.summary:ranking"])
def test_a_request_to_stop_is_answered_in_one_line_also_when_ray_has_come_or_gone(place: str, tmp_path: Path) -> None:
    """Ray takes SIGTERM when it connects, and leaves it to the system when it goes."""
    needed_ray()
    module, _, name = place.partition(":")
    (tmp_path / "driver.py").write_text(
        "import os, signal, time\n"
        f"import {module} as module\n"
        "from bpf.cli.app import main\n"
        "def asked(*arguments, **options):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(60)\n"
        f"module.{name} = asked\n"
        "main()\n"
    )
    command = [sys.executable, str(tmp_path / "driver.py"), "tune", str(tmp_path / "grid"), *GRID, "--epochs", "2"]
    done = subprocess.run([*command, "-q", "--on", "ray"], capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 130, done.stderr
    [line] = done.stderr.splitlines()
    assert line.startswith("Interrupted")


def test_any_number_of_events(tmp_path: Path, nodes: Nodes) -> None:
    survives(Chaos(nodes, tmp_path, EVENTS))


def test_any_number_of_events_with_a_server(
    tmp_path: Path, postgres_own_server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed_ray()
    monkeypatch.setenv("PGPASSWORD", postgres_own_server.password)  # which the nodes have too
    url = postgres_own_server.url().replace(f":{postgres_own_server.password}@", "@")
    with Nodes() as nodes:
        survives(Chaos(nodes, tmp_path, EVENTS // 2, ["--storage", url]))


def survives(chaos: "Chaos") -> None:
    expected = undisturbed(chaos.folder / "one", 60)
    began = time.monotonic()
    try:
        chaos.run(expected)
    finally:
        print(f"\n{chaos.events.total()} events with BPF_CHAOS_SEED={SEED} in {time.monotonic() - began:.0f} s")
        for what, count in [*sorted(chaos.found.items()), *sorted(chaos.events.items())]:
            print(f"{count:6} {what}")


@dataclass
class Chaos:
    """Runs grids on the cluster, with one event after the other, until there were `wanted` of them."""

    nodes: Nodes
    folder: Path
    wanted: int
    more: list[str] = field(default_factory=list)
    events: Counter[str] = field(default_factory=Counter)
    found: Counter[str] = field(default_factory=Counter)
    draw: random.Random = field(default_factory=lambda: random.Random(SEED))

    def run(self, expected: dict[str, Any]) -> None:
        while self.events.total() < self.wanted:
            self.found["grids"] += 1
            directory = self.folder / f"grid {self.found['grids']}"
            while not self._goes_on(directory):
                pass
            self.found["cells trained apart"] += assert_undisturbed(directory, expected)
            if not self.more:
                assert_ran_once(directory)
                assert_tidy(directory)

    def _goes_on(self, directory: Path) -> bool:
        """One driver's life; whether the grid is finished."""
        if not self.nodes.nodes:
            self.nodes.add()
        begun = (directory / "experiment.yaml").exists()
        arguments = ["resume", str(directory)]
        if not begun:
            arguments = ["tune", str(directory), *GRID, "--epochs", "60", *self.more]
        with Driver(self.nodes, directory, *arguments) as driver:
            while not driver.ends():
                if self.events.total() >= self.wanted:
                    if not self.nodes.nodes:
                        self.nodes.add()
                    assert driver.wait() == 0, driver.output
                    return True
                if self.nodes.nodes:
                    eventually(lambda: driver.workers() or driver.ends())
                    time.sleep(self.draw.uniform(0.0, 2.0))
                if self._happens(driver):
                    return False
            assert driver.wait() == 0, driver.output
        return True

    def _happens(self, driver: Driver) -> bool:
        """Something happens; whether the driver has ended by it."""
        possible = {
            "a node joins": 3 * (len(self.nodes.nodes) < MOST_NODES),
            "a node is lost": 2 * bool(self.nodes.nodes),
            "a node leaves": bool(self.nodes.nodes),
            "a node is drained and lost": bool(self.nodes.nodes),
            "a worker is killed": 2,
            "a worker stands still for a while": 1,
            "the post is killed": 1,
            "the driver is killed": 1,
            "the driver is asked to stop": 1,
        }
        [what] = self.draw.choices(list(possible), [int(weight) for weight in possible.values()])
        if not self.nodes.nodes:
            what = "a node joins"
        happened = self._do(what, driver)
        self.events[what] += happened
        return happened and what.startswith("the driver")

    def _do(self, what: str, driver: Driver) -> bool:
        node = self.draw.choice(self.nodes.nodes) if self.nodes.nodes else ""
        if what == "a node joins":
            self.nodes.add()
        elif what == "a node is lost":
            self.nodes.lose(node)
        elif what == "a node leaves":
            self.nodes.lose(node, gracefully=True)
        elif what == "a node is drained and lost":
            self.nodes.drain(node, 5.0)
            time.sleep(self.draw.uniform(0.0, 3.0))
            self.nodes.lose(node)
        elif what == "the driver is killed":
            return driver.kill() == -signal.SIGKILL
        elif what == "the driver is asked to stop":
            return driver.kill(signal.SIGTERM) in (130, 143)
        else:
            pids = self._posts() if what == "the post is killed" else driver.workers()
            if not pids or (what == "a worker is killed" and self._blamed(driver)):
                return False
            pid = self.draw.choice(pids)
            with suppress(ProcessLookupError):
                if what == "a worker stands still for a while":
                    os.kill(pid, signal.SIGSTOP)
                    time.sleep(self.draw.uniform(0.0, 2.0))
                    os.kill(pid, signal.SIGCONT)
                else:
                    os.kill(pid, signal.SIGKILL)
        return True

    def _blamed(self, driver: Driver) -> bool:
        """Whether cells would be set aside for one more death, as they should: the grid would be another one."""
        return any(row.kills >= KILLS - 1 for row in summary.rows(open_experiment(driver.directory)))

    def _posts(self) -> list[int]:
        """The processes that carry questions in this cluster."""
        token, found = self.nodes.environment["RAY_AUTH_TOKEN"].encode(), []
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if b"ray::Post" in (entry / "cmdline").read_bytes() and token in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
        return found
