"""What handing out cells costs, without any training: claim and finish, in cohorts of one.

    PYTHONPATH=. python benchmarks/study.py
    PYTHONPATH=. python benchmarks/study.py --cells 10000 --stock 1000

The cost of a cell must not depend on how many there are or on how many are done, so it is printed for the
first and for the last tenth of each grid. The baseline is Optuna's own GridSampler in a plain SQLite study
with the same eight parameters, in the same run; its cost grows with the trials that are done. Read the
numbers as ratios: disks and processors differ.
"""

import argparse
import itertools
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import optuna

from bpf.study import Axis, Cell, Owner, Study

CHOICES = {
    "activation": ["relu", "tanh", "sigmoid"],
    "arch": ["100", "500", "500-500", "1000-1000"],
    "batch_norm": [False, True],
    "dropout": [0.0, 0.2],
    "feedback_init": ["normal", "uniform"],
    "optimizer": ["sgd", "adam"],
    "weight_decay": [0.0, 1e-4],
}


def grid(size: int) -> list[Axis]:
    """Seven fixed axes, or one value of each when `size` is small, and as many rates as it takes."""
    choices, rest = {}, size
    for name, values in CHOICES.items():
        choices[name] = values if rest % len(values) == 0 else values[:1]
        rest //= len(choices[name])
    rates = [1e-4 * (1 + rate) for rate in range(rest)]
    axes = [Axis(name, values, choices=CHOICES[name]) for name, values in choices.items()]
    return [*axes, Axis("lr", rates, low=1e-10, high=1e3, log=True)]


def cells(axes: list[Axis]) -> list[Cell]:
    names = [axis.name for axis in axes]
    points = itertools.product(*(axis.values for axis in axes))
    return [
        Cell(f"key-{number}", "dfa", "one", dict(zip(names, point, strict=True)), {"epochs": 100})
        for number, point in enumerate(points)
    ]


def timed(step: Callable[[], object], repeats: int) -> list[float]:
    """Milliseconds of each call."""
    taken = []
    for _ in range(repeats):
        begun = time.perf_counter()
        step()
        taken.append(1e3 * (time.perf_counter() - begun))
    return taken


def report(what: str, size: int, taken: list[float], note: str) -> None:
    tenth = max(1, len(taken) // 10)
    first, last = (sum(part) / len(part) for part in (taken[:tenth], taken[-tenth:]))
    mean = sum(taken) / len(taken)
    print(f"{what:<18}{size:>8}{mean:>10.2f}{first:>14.2f}{last:>13.2f}   {note}", flush=True)


def ours(size: int, directory: Path) -> None:
    axes = grid(size)
    planned = cells(axes)
    with Study.create(directory / "study.db", "bench", {}) as study, Owner(study.locks) as owner:
        (plan_time,) = timed(lambda: study.plan({"dfa": axes}, planned), 1)
        curve = {"val_loss": [1.0 / (1 + epoch) for epoch in range(100)]}

        def step() -> None:
            claim = study.claim(owner, lambda row: 1)
            assert claim is not None
            study.finish(claim, claim.rows[0].key, 0.5, "complete", curve)

        taken = timed(step, size)
        (count_time,) = timed(study.counts, 1)
    report("bpf", size, taken, f"plan {plan_time / 1e3:.2f} s, counts {count_time:.1f} ms")


def stock(size: int, directory: Path) -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    axes = grid(size)
    sampler = optuna.samplers.GridSampler({axis.name: list(axis.values) for axis in axes})
    study = optuna.create_study(storage=f"sqlite:///{directory / 'stock.db'}", sampler=sampler)

    def step() -> None:
        trial = study.ask()
        for axis in axes[:-1]:
            trial.suggest_categorical(axis.name, CHOICES[axis.name])
        trial.suggest_float("lr", 1e-10, 1e3, log=True)
        with suppress(RuntimeError):  # GridSampler stops the study at its last trial, which ask/tell forbids
            study.tell(trial, 0.5)

    report("stock GridSampler", size, timed(step, size), "ask, 8 x suggest, tell")


def main() -> None:
    parser = argparse.ArgumentParser(description="The cost of a cell in the study, without training.")
    parser.add_argument("--cells", type=int, nargs="+", default=[200, 2_000, 10_000], metavar="N")
    parser.add_argument("--stock", type=int, default=300, metavar="N", help="baseline cells; 0: none")
    options = parser.parse_args()
    print(f"optuna {optuna.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores")
    print(f"{'ms per cell':<18}{'cells':>8}{'mean':>10}{'first tenth':>14}{'last tenth':>13}")
    for size, run in [*((size, ours) for size in options.cells), (options.stock, stock)]:
        assert math.prod(len(axis.values) for axis in grid(size)) == size
        with tempfile.TemporaryDirectory() as directory:
            if size:
                run(size, Path(directory))


if __name__ == "__main__":
    main()
