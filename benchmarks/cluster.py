"""What workers on a Ray cluster cost, beside worker processes of this machine, through the real command.

    python benchmarks/cluster.py                          # everything, about ten minutes
    python benchmarks/cluster.py --rounds 5 --part start

Everything runs `bpf tune` on digits, in pairs whose order alternates. Needs `bpf[ray]`.

- **overhead**: a grid of about a minute with `--workers 2`, and with `--on ray --workers 2`. Two times are compared:
  from the first trial to the last result, where both train; and of the whole command, with Ray's start and end. Where
  there is a /proc, also how much of the processor time meanwhile the workers have, and not what serves them: the
  speed of a machine moves the times, and hardly this.
- **start**: seconds from the start of the command to the first cohort, beside what Ray alone takes until two actors
  answer, in a program that does nothing else: the difference is what bpf adds.
"""

import argparse
import json
import os
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

PROGRAM = str(Path(sys.executable).with_name("bpf"))
GRID = (
    "--dataset digits --algorithm bp,dfa,drtp,ll-cce --arch 200-200,150-150 --activation tanh --batch-norm "
    "--bw-init ortho --lr 0.001,0.003,0.01,0.03 --examples-frac 1 --executions-per-trial 2 --quiet"
)
RAY_ALONE = """
import ray
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
@ray.remote
class Actor:
    def answer(self):
        pass
ray.get([Actor.options(num_cpus=1).remote().answer.remote() for _ in range(2)])
print("answered", flush=True)
"""


class Run:
    """A command from its start to its end: when the first cohort was begun, the last result stored, and it ended."""

    def __init__(self, folder: Path, epochs: int, *options: str) -> None:
        directory = folder / "grid"
        shutil.rmtree(directory, ignore_errors=True)
        began = time.time()
        command = [PROGRAM, "tune", str(directory), *GRID.split(), "--epochs", str(epochs), *options]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            study = directory / "study.db"
            while process.poll() is None and not _is_one(study, "state != 'pending'"):
                time.sleep(0.02)
            self.first = time.time() - began
            self.share = _share_of_workers(process, study)
            _, told = process.communicate()
        self.whole = time.time() - began
        if process.returncode:
            raise SystemExit(told)
        with closing(sqlite3.connect(study)) as opened:
            query = "SELECT (julianday(max(datetime_complete)) - julianday(min(datetime_start))) * 86400 FROM trials"
            [self.training] = opened.execute(query).fetchone()


def _is_one(study: Path, what: str) -> bool:
    """Whether a cell is as the condition says; not while that cannot be told."""
    try:
        with closing(sqlite3.connect(f"{study.as_uri()}?mode=ro", uri=True, timeout=0)) as opened:
            return opened.execute(f"SELECT 1 FROM bpf_cells WHERE {what} LIMIT 1").fetchone() is not None
    except sqlite3.Error:
        return False


def _share_of_workers(process: "subprocess.Popen[str]", study: Path) -> float:
    """How much of the processor time of a command and its processes, from now to the last result, its workers have."""
    before, trains = _processor_seconds(process.pid), set()
    after = {one: seconds for one, (_, seconds) in before.items()}
    while process.poll() is None and (_is_one(study, "state != 'complete'") or not _is_one(study, "1")):
        for one, (name, seconds) in _processor_seconds(process.pid).items():
            after[one] = seconds
            if name.startswith(b"ray::Seat") or b"multiprocessing.forkserver" in name:
                trains.add(one)
        time.sleep(0.2)
    used = {one: seconds - before.get(one, (b"", 0.0))[1] for one, seconds in after.items()}
    return sum(seconds for one, seconds in used.items() if one in trains) / (sum(used.values()) or 1.0)


def _processor_seconds(root: int) -> dict[int, tuple[bytes, float]]:
    """Of a process and all below it, by their numbers: what it is called now, and the seconds."""
    parents, found = {}, {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "stat").read_text().rpartition(")")[2].split()
            told = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        parents[int(entry.name)] = int(words[1])
        found[int(entry.name)] = told, (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")
    below = {root}
    while more := {child for child, parent in parents.items() if parent in below} - below:
        below |= more
    return {one: found[one] for one in below & found.keys()}


def overhead(folder: Path, epochs: int, rounds: int) -> dict[str, object]:
    modes = {"processes": ["--workers", "2"], "ray": ["--workers", "2", "--on", "ray"]}
    found: dict[str, list[Run]] = {mode: [] for mode in modes}
    for number in range(rounds):
        for mode in sorted(modes, reverse=number % 2 == 1):
            found[mode].append(Run(folder, epochs, *modes[mode]))
            print(
                f"  {mode}: training {found[mode][-1].training:.1f} s, whole {found[mode][-1].whole:.1f} s, "
                f"workers {found[mode][-1].share:.4f} of the processor time",
                flush=True,
            )
    pairs = list(zip(found["processes"], found["ray"], strict=True))
    told = {
        "training": [here.training / there.training for here, there in pairs],
        "whole": [here.whole / there.whole for here, there in pairs],
        "processor": [there.share / here.share for here, there in pairs if here.share],
        "seconds": statistics.median(run.training for run in found["processes"]),
    }
    for name, of in (("training", "speed"), ("whole", "speed"), ("processor", "workers' share")):
        ratios = told[name]
        assert isinstance(ratios, list)
        if not ratios:
            continue
        median = statistics.median(ratios)
        print(
            f"{name}: Ray at {median:.3f} of the {of} of processes "
            f"(median of {rounds}; {min(ratios):.3f} to {max(ratios):.3f})"
        )
    return told


def start(folder: Path, rounds: int) -> dict[str, object]:
    ours, rays = [], []
    for _ in range(rounds):
        began = time.time()
        with subprocess.Popen(
            [sys.executable, "-c", RAY_ALONE], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as alone:
            assert alone.stdout is not None
            alone.stdout.readline()
            rays.append(time.time() - began)
        ours.append(Run(folder, 3, "--workers", "2", "--on", "ray").first)
        print(f"  Ray alone {rays[-1]:.1f} s, bpf to its first cohort {ours[-1]:.1f} s", flush=True)
    added = [our - ray for our, ray in zip(ours, rays, strict=True)]
    print(
        f"start: Ray alone {statistics.median(rays):.1f} s, bpf to its first cohort {statistics.median(ours):.1f} s: "
        f"{statistics.median(added):.1f} s more (median of {rounds}; {min(added):.1f} to {max(added):.1f})"
    )
    return {"ray": rays, "bpf": ours, "added": added}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--part", choices=["overhead", "start"], action="append")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=150, help="of the grid whose overhead is measured")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    told: dict[str, object] = {"cores": os.cpu_count()}
    with tempfile.TemporaryDirectory() as folder:
        if "start" in (options.part or ["start"]):
            told["start"] = start(Path(folder), options.rounds)
        if "overhead" in (options.part or ["overhead"]):
            told["overhead"] = overhead(Path(folder), options.epochs, options.rounds)
    if options.json:
        options.json.write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
