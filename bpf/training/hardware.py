"""Where to train and how many runs to stack there."""

import itertools
import os
from pathlib import Path

import torch

from bpf.algorithms import Algorithm
from bpf.errors import UsageError
from bpf.machine import cores
from bpf.spec.run import RunSpec
from bpf.spec.values import MatmulPrecision
from bpf.training.footprint import run_bytes
from bpf.words import counted

BYTES = 4
COPIES = 4
"""Weights, gradients and two optimizer states are touched in every step on a CPU."""
DEFAULT_CACHE_BYTES = 16 * 2**20
MAX_RUNS_CPU, MAX_RUNS_GPU = 64, 1024
GPU_SHARE = 0.75


def choose_device(name: str) -> torch.device:
    """The device a spec asks for; auto is the first GPU, or the CPU without one.

    Raises UsageError if there is no such device.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda:0" if gpus else "cpu")
    device = torch.device("cuda:0" if name == "cuda" else name)
    if device.type == "cuda" and (device.index or 0) >= gpus:
        found = f"{counted(gpus, 'CUDA device')}" if gpus else "no CUDA device"
        raise UsageError(f"device {name}: this machine has {found}. Use --device auto or cpu.")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("device mps: this machine has no Apple GPU. Use --device auto or cpu.")
    return device


def settle(device: torch.device, matmul_precision: MatmulPrecision = "highest") -> None:
    """Make this process train on `device` in bpf's way: one thread, no slow denormal numbers, products as precise."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.set_float32_matmul_precision(matmul_precision)
    if device.type == "cuda":
        torch.cuda.set_device(device)


def devices(name: str, workers: int | None) -> list[str]:
    """The device of each worker: of `workers` of them, or of as many as the machine has use for.

    `name` is as in a spec, or several joined by commas. That is one worker for each GPU, or for each processor core
    that this process may use; more workers share the devices evenly. Raises UsageError if there is no such device.
    """
    given = [str(choose_device(one)) for one in name.split(",")]
    if name == "auto" and given[0].startswith("cuda"):
        given = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    count = workers or (cores() if given == ["cpu"] else len(given))
    return [given[number % len(given)] for number in range(count)]


def crowding(device: torch.device, workers: int) -> tuple[float, float]:
    """How many times as long something takes in each of so many workers as it takes now, in this process alone.

    They share the processor cores, also with what else runs on this machine, or the GPUs of their kind. The second
    number is for the case that the others will do twice as much.
    """
    if device.type != "cpu":
        return (shared := max(1.0, workers / max(1, torch.cuda.device_count()))), shared
    others = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    now = max(1.0, (1 + others) / cores())
    return max(1.0, (workers + others) / cores()) / now, max(1.0, (workers + 2 * others) / cores()) / now


def cohort_cells(
    spec: RunSpec,
    rule: type[Algorithm],
    executions: int,
    inputs: int,
    targets: int,
    examples: int,
    device: torch.device,
    sharers: int = 1,
) -> int:
    """How many cells of `spec`'s structure to stack, each with `executions` runs on at most so many examples.

    On a CPU as many runs as keep what a step touches inside this process's share of the last-level cache; on a
    GPU as many as three quarters of its memory hold, by what a step of the rule takes (`footprint.py`), divided among
    the workers that share it. At least one cell. The same machine always gives the same number.
    """
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        images = examples * inputs
        budget = int((total - images) * GPU_SHARE / sharers)
        per_run = run_bytes(spec, rule, inputs, targets, examples)
        return max(1, min(MAX_RUNS_GPU, budget // per_run) // executions)
    sizes = (inputs, *spec.widths, targets)
    parameters = sum(a * b for a, b in itertools.pairwise(sizes))
    feedback = sum(spec.widths) * targets
    activations = spec.batch_size * (inputs + 3 * sum(spec.widths))
    budget = cache_bytes() // (os.cpu_count() or 1)
    per_run = BYTES * (COPIES * parameters + feedback + activations)
    return max(1, min(MAX_RUNS_CPU, budget // per_run) // executions)


def cache_bytes() -> int:
    """Size of the last-level cache of the first processor, where the system says; otherwise 16 MiB."""
    levels = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    sizes = [_size(path.read_text().strip()) for path in levels]
    return max(sizes, default=DEFAULT_CACHE_BYTES)


def _size(text: str) -> int:
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    return int(text[:-1]) * units[text[-1]] if text[-1:] in units else int(text)
