"""How long cohorts take on this machine: a few steps of some, on made-up images, applied to the others."""

import itertools
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from bpf.algorithms import Algorithm
from bpf.data.base import Extent
from bpf.data.cache import Data
from bpf.data.subsets import subset
from bpf.errors import UsageError
from bpf.spec.run import RunSpec
from bpf.spec.values import MatmulPrecision
from bpf.trackers import Tracker
from bpf.training.cohort import Cohort
from bpf.training.hardware import settle
from bpf.training.tracking import PROBE_SIZE

STEPS = {"cpu": 64, "cuda": 256}
"""More in one measurement would tell nothing new; on a GPU an epoch costs more beside its steps."""
WARM_UP = {"cpu": 1, "cuda": 3}
"""Epochs that are not measured: on a GPU everything that an epoch does is recorded in the third."""
STILL = 1e-6
"""Learning rates are multiplied by it, as nothing is to be learnt: a network that diverged would leave its cohort."""
ENDLESS = 1_000_000
MAX_BYTES = 2**29
"""Of made-up images."""
STEP_WEIGHTS, STEP_COSTS = 15, 180_000
"""What a step costs beside its examples, in products: 15 for each weight (the optimizer), and a constant."""
PRODUCTS_PER_SECOND, ON_CUDA, LAUNCH_SECONDS = 6e9, 2e12, 3e-4
"""Of one core and of a GPU, and a step at least, roughly: to choose how many steps to measure, and whether to."""


@dataclass(frozen=True)
class Pace:
    """Seconds of one execution of a cohort: for an `epoch` without trackers, and for one `measurement` by them all."""

    epoch: float
    measurement: float = 0.0


def examples_of(spec: RunSpec, extent: Extent) -> int:
    """Training examples of one epoch, if the classes are of one size."""
    try:
        chosen = subset(
            np.arange(extent.train) % extent.classes,
            examples_frac=spec.examples_frac,
            val_frac=spec.val_frac,
            skew_type=spec.skew_type,
            imbalance_factor=spec.imbalance_factor or 1.0,
            data_seed=spec.data_seed,
        )
    except UsageError:  # the classes of the data may be larger, or it will be said when they are known
        return max(1, round(extent.train * (spec.examples_frac or 1.0) * (1 - spec.val_frac)))
    return len(chosen.train)


def products(spec: RunSpec, extent: Extent, examples: int) -> float:
    """The arithmetic of an epoch of one execution in about the cost of a forward and backward pass of one weight."""
    targets = extent.inputs if spec.problem_type == "reconstruction" else extent.classes
    sizes = (extent.inputs, *spec.widths, targets)
    weights = sum(a * b for a, b in itertools.pairwise(sizes))
    steps = math.ceil(examples / spec.batch_size)
    return examples * weights + steps * (STEP_WEIGHTS * weights + STEP_COSTS)


def measure(
    specs: Sequence[RunSpec],
    rule: type[Algorithm],
    trackers: dict[str, Tracker],
    extent: Extent,
    examples: int,
    device: torch.device,
    seconds: float,
) -> Pace | None:
    """The pace of a cohort of these executions, with `examples` in an epoch, from about `seconds` of it.

    None if even a few steps of it would take many times as long. It reads no data and leaves torch's settings as
    they were.
    """
    first = specs[0]
    steps = math.ceil(examples / first.batch_size)
    kind = "cuda" if device.type == "cuda" else "cpu"
    step = products(first, extent, examples) / steps * len(specs) / PRODUCTS_PER_SECOND
    if kind == "cuda":
        step = max(LAUNCH_SECONDS, step * PRODUCTS_PER_SECOND / ON_CUDA)
    taken = min(steps, max(2, min(STEPS[kind], int(seconds / step / 2))))
    shown = min(examples, max(taken * first.batch_size, PROBE_SIZE if trackers else 0))
    if taken * step > 4 * seconds or shown * extent.inputs > MAX_BYTES:
        return None
    val_frac = first.val_frac if shown * first.val_frac > 2 else 0.0
    data = _made_up(round(shown / (1 - val_frac)), extent)
    changed = {"examples_frac": 1.0, "val_frac": val_frac, "skew_type": "none", "epochs": ENDLESS, "early_stopping": 0}
    changed |= {
        "init": "torch",
        "bw_init": "lecun",
        "tracker_every": "1",
    }  # cheap ones, with which a step takes as long
    still = [spec.model_copy(update=changed | {"lr": spec.lr * STILL}) for spec in specs]
    with _as_in_workers(device, first.matmul_precision):
        cohort = Cohort(still, rule, data, trackers, device)
        for _ in range(WARM_UP[kind]):
            cohort.run_epoch()
        epochs: list[float] = []
        measurements: list[float] = []
        end = time.perf_counter() + seconds / 2
        while not epochs or (time.perf_counter() < end and len(epochs) < STEPS[kind]):
            tracked, began = _tracked(cohort), time.perf_counter()
            cohort.run_epoch()
            took, tracked = time.perf_counter() - began, _tracked(cohort) - tracked
            epochs.append(took - tracked)
            measurements.append(tracked)
    share = examples / cohort.examples / len(specs)
    return Pace(statistics.median(epochs) * share, statistics.median(measurements) / len(specs))


def _tracked(cohort: Cohort) -> float:
    return sum(record.tracking_seconds for record in cohort.records)


def _made_up(examples: int, extent: Extent) -> Data:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (examples, *extent.shape), dtype=torch.uint8, generator=generator)
    labels = torch.arange(examples) % 2
    return Data("made up", images, labels, images[:1], labels[:1], tuple(map(str, range(extent.classes))))


@contextmanager
def _as_in_workers(device: torch.device, precision: MatmulPrecision) -> Iterator[None]:
    """Settle this process for a while. Whether denormal numbers are slow can be seen from whether there are any."""
    threads, flushes = torch.get_num_threads(), not bool(torch.full((1,), 1e-39) * 1)
    before = torch.get_float32_matmul_precision()
    current = torch.cuda.current_device() if device.type == "cuda" else None
    try:
        settle(device, precision)
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(flushes)
        torch.set_float32_matmul_precision(before)
        if current is not None:
            torch.cuda.empty_cache()
            torch.cuda.set_device(current)
