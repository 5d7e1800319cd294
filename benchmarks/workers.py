"""What more worker processes bring and cost: speed, memory and the time to start them, through the real command.

    python benchmarks/workers.py                                  # everything, about five minutes
    python benchmarks/workers.py --source DIR --rounds 3 --part speed

Everything runs `bpf tune --workers N` on 500-500 networks (dfa, batch 64, one execution a cell, so cohorts of one run
whatever N is) and Fashion-MNIST, whose original files are taken from `--source`; without them, on random images of its
size, and the first line says so. The data set's cache is made before anything is measured.

- **speed**: wall-clock time of the whole command on the same grid with one and two workers, in turn. Nothing is
  subtracted: planning, the start of processes and the end, where one worker has nothing left to do, count.
- **memory**: of the supervisor, of the fork server, and of each worker, when every worker has trained an epoch. RSS
  counts shared pages in every process, PSS divides them by the number of those who share them, so that PSS adds up.
- **start**: seconds from the start of the command to the first claim and to the first trained epoch, with its
  checkpoint. Then one process more: forked from the preloaded server as workers are, against a fresh interpreter, each
  until it can speak and until it has opened the study.
"""

import argparse
import multiprocessing
import os
import platform
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from bpf.data.cache import load
from bpf.study.study import Study
from bpf.workers import processes

PROGRAM = str(Path(sys.executable).with_name("bpf"))
CELLS = ("--lr", "0.0001,0.0003,0.001,0.003", "--bw-init", "ortho,lecun,nokland")
"""Twelve of them: as many for each of two workers."""
FIXED = "--algorithm dfa --arch 500-500 --activation tanh --no-batch-norm --examples-frac 1 --executions-per-trial 1"
LONGEST_SECONDS = 300.0


def prepared(source: Path, data_dir: Path) -> tuple[str, list[str]]:
    """What the data are called, and the options for them."""
    files = sorted(source.glob("*-ubyte.gz"))
    if len(files) == 4:
        raw = data_dir / "FashionMNIST" / "raw"
        raw.mkdir(parents=True)
        for file in files:
            shutil.copy(file, raw)
        name, said = "fmnist", "Fashion-MNIST"
    else:
        archive, random = data_dir / "random.npz", np.random.default_rng(0)
        arrays: dict[str, Any] = {}
        for part, size in (("train", 60_000), ("test", 10_000)):
            arrays[f"{part}_images"] = random.integers(0, 256, (size, 28, 28), dtype=np.uint8)
            arrays[f"{part}_labels"] = np.arange(size) % 10
        np.savez(archive, **arrays)
        name, said = f"npz:{archive}", f"random images (no files of Fashion-MNIST in {source})"
    load(name, data_dir)
    return said, ["--dataset", name, "--data-dir", str(data_dir)]


class Tune:
    """`bpf tune` in a process of its own, in a new directory."""

    def __init__(self, directory: Path, data: list[str], workers: int, *options: str) -> None:
        self.directory = directory
        command = [PROGRAM, "tune", str(directory), *data, *FIXED.split(), *CELLS, "--quiet"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        self.began = time.perf_counter()
        self.process = subprocess.Popen([*command, "--workers", str(workers), *options], **quiet)

    def finish(self) -> float:
        """Seconds until it ended by itself."""
        _, said = self.process.communicate()
        assert self.process.returncode == 0, said.decode()
        return time.perf_counter() - self.began

    def wait_for(self, what: Callable[[], bool]) -> float:
        """Seconds since its start."""
        while not what():
            assert self.process.poll() is None
            assert time.perf_counter() - self.began < LONGEST_SECONDS
            time.sleep(0.005)
        return time.perf_counter() - self.began

    def claims(self) -> int:
        path = self.directory / "study.db"
        with suppress(sqlite3.OperationalError), closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
            count: int = db.execute("SELECT count(*) FROM bpf_cells WHERE state = 'running'").fetchone()[0]
            return count
        return 0

    def checkpoints(self) -> int:
        return len(list((self.directory / "checkpoints").glob("*.pt")))

    def processes(self) -> Iterator[tuple[str, int]]:
        """Who they are, and their ids."""
        yield "supervisor", self.process.pid
        for child in children(self.process.pid):
            words = Path(f"/proc/{child}/cmdline").read_text()
            if "forkserver" in words:
                yield "fork server", child
                yield from (("worker", worker) for worker in children(child))
            else:
                yield "resource tracker", child

    @contextmanager
    def stopping(self) -> Iterator["Tune"]:
        try:
            yield self
        finally:
            self.process.send_signal(signal.SIGINT)
            self.process.communicate()


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def mebibytes(pid: int) -> dict[str, float]:
    """`Rss` and `Pss` now, `VmHWM` at most so far."""
    found = {}
    for file in ("smaps_rollup", "status"):
        for line in Path(f"/proc/{pid}/{file}").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in ("Rss", "Pss", "VmHWM"):
                found[name] = int(rest.split()[0]) / 1024
    return found


def speed(place: Path, data: list[str], rounds: int, epochs: int) -> None:
    taken: dict[int, list[float]] = {1: [], 2: []}
    for number in range(rounds):
        for workers, seconds in taken.items():
            tune = Tune(place / f"speed-{workers}-{number}", data, workers, "--epochs", str(epochs))
            seconds.append(tune.finish())
            print(f"round {number + 1}, {named(workers)}: {seconds[-1]:.1f} s, {load_average()}", flush=True)
    print(f"\nspeed: 12 cells of {epochs} epochs, wall-clock seconds of the whole command")
    print("          " + "".join(f"{f'round {number + 1}':>9}" for number in range(rounds)) + f"{'best':>9}")
    for workers, seconds in taken.items():
        print(f"{named(workers):<10}" + "".join(f"{s:9.1f}" for s in [*seconds, min(seconds)]))
    ratios = [one / two for one, two in zip(taken[1], taken[2], strict=True)]
    print("ratio     " + "".join(f"{r:8.2f}x" for r in [*ratios, min(taken[1]) / min(taken[2])]))


def memory(place: Path, data: list[str]) -> None:
    print("\nmemory, MiB   RSS of each worker    at most   mean PSS   PSS of all  supervisor  fork server")
    totals = {}
    for workers in (1, 2, 4):
        options = ("--epochs", "1000", "--checkpoint-every", "0")
        with Tune(place / f"memory-{workers}", data, workers, *options).stopping() as tune:
            tune.wait_for(lambda tune=tune, workers=workers: tune.checkpoints() >= workers)
            time.sleep(2.0)
            known = [(role, mebibytes(pid)) for role, pid in tune.processes()]
        own = [used for role, used in known if role == "worker"]
        assert len(own) == workers
        totals[workers] = sum(used["Pss"] for _, used in known)
        others = {role: used["Pss"] for role, used in known if role != "worker"}
        rss, peak = " ".join(f"{used['Rss']:.0f}" for used in own), max(used["VmHWM"] for used in own)
        mean = sum(used["Pss"] for used in own) / workers
        print(
            f"{named(workers):<14}{rss:<21}{peak:8.0f}{mean:11.0f}{totals[workers]:13.0f}"
            f"{others['supervisor']:12.0f}{others['fork server']:13.0f}",
            flush=True,
        )
    for few, many in ((1, 2), (2, 4)):
        growth = (totals[many] - totals[few]) / (many - few)
        print(f"growth from {few} to {many}: {growth:.0f} MiB of PSS for each further worker")


def start(place: Path, data: list[str], rounds: int) -> None:
    claims, epochs = [], []
    for number in range(rounds):
        # A hundredth of the images: an epoch of milliseconds.
        options = ("--epochs", "1000", "--checkpoint-every", "0", "--examples-frac", "0.01")
        with Tune(place / f"start-{number}", data, 1, *options).stopping() as tune:
            claims.append(tune.wait_for(lambda tune=tune: tune.claims() > 0))
            epochs.append(tune.wait_for(lambda tune=tune: tune.checkpoints() > 0))
    print("\nstart, seconds                                       median    best")
    line("from `bpf tune` to the first claim", claims)
    line("from `bpf tune` to the first trained epoch", epochs)

    study = place / "start-0" / "study.db"
    processes.warm_up()
    forked(None)  # waits for the server to have imported everything
    times: dict[str, list[float]] = {}
    for _ in range(max(5, rounds)):
        for what, measure in (
            ("one more process, forked from the server", lambda: forked(None)),
            ("one more process, a fresh interpreter", lambda: fresh(None)),
            ("the same with the study opened, forked", lambda: forked(study)),
            ("the same with the study opened, fresh", lambda: fresh(study)),
        ):
            times.setdefault(what, []).append(measure())
    for what, taken in times.items():
        line(what, taken)


def line(what: str, seconds: list[float]) -> None:
    print(f"{what:<50}{statistics.median(seconds):9.3f}{min(seconds):8.3f}", flush=True)


def forked(study: Path | None) -> float:
    begun = time.perf_counter()
    mine, theirs = multiprocessing.Pipe()
    process = processes.start(speak, study, theirs, name="speaker")
    theirs.close()
    mine.recv_bytes()
    taken = time.perf_counter() - begun
    process.join()
    return taken


def speak(study: Path | None, connection: Connection) -> None:
    if study is not None:
        Study.open(study).close()
    connection.send_bytes(b"here")


def fresh(study: Path | None) -> float:
    script = (
        "import sys; from bpf.workers.process import Study; sys.argv[1:] and Study.open(sys.argv[1]).close(); print()"
    )
    begun = time.perf_counter()
    command = [sys.executable, "-c", script, *([] if study is None else [str(study)])]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        return time.perf_counter() - begun


def named(workers: int) -> str:
    return f"{workers} worker{'s' if workers > 1 else ''}"


def load_average() -> str:
    return "load " + "/".join(f"{number:.1f}" for number in os.getloadavg())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), metavar="DIR")
    parser.add_argument("--part", choices=["speed", "memory", "start"], help="only this; otherwise all of them")
    parser.add_argument("--rounds", type=int, default=2, metavar="N")
    parser.add_argument("--epochs", type=int, default=3, metavar="N", help="of each of the twelve cells of `speed`")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        os.environ["BPF_CACHE_DIR"] = str(place / "cache")
        said, data = prepared(options.source, place / "data")
        print(f"{said}; Python {platform.python_version()}, {os.cpu_count()} cores, {load_average()}")
        if options.part in (None, "start"):
            start(place, data, options.rounds)
        if options.part in (None, "memory"):
            memory(place, data)
        if options.part in (None, "speed"):
            speed(place, data, options.rounds, options.epochs)


if __name__ == "__main__":
    import workers  # as the processes that are started here import it

    workers.main()
