"""What a checkpoint with a checksum costs, against `torch.save` and `torch.load` of the same content.

    python benchmarks/checkpoint.py

Each pair is measured five times in turns, in one thread and onto the same disk, with the data synced; the ratios are
medians. The state is that of dfa with Adam after an epoch on digits.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from bpf.data.cache import load
from bpf.experiment.plugins import load_rules
from bpf.files import write_atomically
from bpf.spec.run import RunSpec
from bpf.training import checkpoint
from bpf.training.cohort import Cohort

SIZES = (("100", 3), ("500-500", 8), ("1000-1000-1000", 24))
TIMES = 5


def main() -> None:
    torch.set_num_threads(1)
    data = load("digits", Path("data"))
    print("arch             runs   MiB   save: s  ratio   load: s  ratio")
    for arch, runs in SIZES:
        given = {"dataset": "digits", "algorithm": "dfa", "arch": arch, "epochs": 2, "examples_frac": 0.1}
        specs = [RunSpec.model_validate(given | {"seed": seed}) for seed in range(runs)]
        cohort = Cohort(specs, load_rules(["dfa"])["dfa"], data)
        cohort.run_epoch()
        with tempfile.TemporaryDirectory() as folder:
            measure(Path(folder), arch, specs, cohort)


def measure(folder: Path, arch: str, specs: list[RunSpec], cohort: Cohort) -> None:
    ours, torchs, names, states = folder / "ours", folder / "torchs", ["cell"] * len(specs), [cohort.state()]
    content = {"cells": names, "specs": [spec.model_dump(mode="json") for spec in specs], "states": states}

    def save_torchs() -> None:
        write_atomically(torchs, partial(torch.save, content))

    pairs: list[tuple[float, float]] = []
    loads: list[tuple[float, float]] = []
    for _ in range(TIMES):
        pairs.append((seconds(lambda: checkpoint.save(ours, "a", names, specs, states)), seconds(save_torchs)))
        loads.append((seconds(lambda: checkpoint.load(ours, "a")), seconds(lambda: torch.load(torchs))))
    told = [f"{min(mine for mine, _ in found):8.3f} {ratio(found):6.2f}" for found in (pairs, loads)]
    print(f"{arch:<16} {len(specs):4} {ours.stat().st_size / 2**20:6.1f} {'  '.join(told)}")


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def ratio(pairs: list[tuple[float, float]]) -> float:
    return statistics.median(mine / other for mine, other in pairs)


if __name__ == "__main__":
    main()
