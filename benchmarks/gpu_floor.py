"""What `gpu.py` measures: cohorts of bpf, what their steps cannot do without, a plain loop; and how they are timed.

A `Measure` does a number of steps and returns the seconds that they took, by the clock and with the device idle before
and after.
"""

import gc
import itertools
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from bpf.data.cache import Data
from bpf.experiment.plugins import load_rules
from bpf.spec.run import RunSpec
from bpf.spec.values import MAX_EPOCHS
from bpf.training.capture import OFF
from bpf.training.cohort import Cohort
from bpf.training.footprint import run_bytes

BATCH, SEEDS, TARGETS, WARM_EPOCHS = 64, 3, 10, 3
RULES = load_rules(["dfa", "bp", "drtp", "ll-cce", "ll-mse"])
EPOCH_SECONDS = 0.4
Measure = Callable[[], float]


def idle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(device: torch.device, function: Callable[[], object]) -> float:
    idle(device)
    start = time.perf_counter()
    function()
    idle(device)
    return time.perf_counter() - start


def alternate(measures: dict[str, Measure], rounds: int) -> dict[str, float]:
    """The best of `rounds` rounds of each, in seconds."""
    times = [{name: measure() for name, measure in measures.items()} for _ in range(rounds)]
    return {name: min(time[name] for time in times) for name in measures}


def release(device: torch.device) -> None:
    """Give back what nobody refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


@contextmanager
def eager() -> Iterator[None]:
    """Cohorts that are made in here record nothing."""
    before = os.environ.get(OFF)
    os.environ[OFF] = "1"
    try:
        yield
    finally:
        del os.environ[OFF]
        if before is not None:
            os.environ[OFF] = before


@contextmanager
def precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@cache
def _random_images(shape: tuple[int, int, int], examples: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (examples, *shape), dtype=torch.uint8, generator=generator)
    return images.to(device), (torch.arange(examples) % TARGETS).to(device)


def random_data(shape: tuple[int, int, int], examples: int, device: torch.device, test: int = 100) -> Data:
    """Views of the same random images, whatever their number."""
    images, labels = _random_images(shape, -(-max(examples, test) // 25_600) * 25_600, device)
    classes = tuple(map(str, range(TARGETS)))
    return Data("random", images[:examples], labels[:examples], images[:test], labels[:test], classes)


def sizes_of(shape: tuple[int, int, int], arch: str) -> list[int]:
    return [shape[0] * shape[1] * shape[2], *map(int, arch.split("-")), TARGETS]


def spec_of(rule: str, arch: str, **fields: Any) -> RunSpec:
    """A run without validation, whose weights are drawn in the way that takes least time."""
    shared = {"dataset": "random", "examples_frac": 1.0, "val_frac": 0.0, "epochs": MAX_EPOCHS, "init": "torch"}
    return RunSpec.model_validate(shared | {"algorithm": rule, "arch": arch} | fields)


def cohort(
    spec: RunSpec, runs: int, data: Data, device: torch.device, notice: Callable[[str], None], rates: int = 4
) -> Cohort:
    """Runs of three seeds and of so many learning rates, from 1e-4 to 4e-4."""
    specs = [
        spec.model_copy(update={"lr": 1e-4 * (1 + 3 * (r % rates) / (rates - 1)), "seed": r % SEEDS})
        for r in range(runs)
    ]
    return Cohort(specs, RULES[spec.algorithm], data, device=device, notice=notice)


def steps_of(cohort: Cohort) -> int:
    """Steps of one epoch."""
    return -(-cohort.examples // cohort.specs[0].batch_size)


def epochs(cohort: Cohort, device: torch.device) -> Measure:
    """`Cohort.run_epoch`, once its steps are recorded."""
    for _ in range(WARM_EPOCHS):
        cohort.run_epoch()

    def measure() -> float:
        took = seconds(device, cohort.run_epoch)
        if any(record.status != "running" for record in cohort.records):
            raise RuntimeError("A run has left its cohort, so that its steps do less.")
        return took

    return measure


def own_stream(cohort: Cohort) -> AbstractContextManager[Any]:
    """Where a cohort's recordings are replayed, without waiting for anything else."""
    recorder = cohort._recorder
    return torch.cuda.stream(recorder._stream) if recorder.active else nullcontext()


def begin(cohort: Cohort) -> None:
    """Make the steps of another epoch ready, as `Steps.epoch` does."""
    steps = cohort._steps
    with own_stream(cohort):
        steps._clock.begin(cohort.epoch)
        steps._shuffle(cohort.epoch)
        steps._totals.zero_()


@torch.no_grad()
def one_step(cohort: Cohort, number: int) -> None:
    with own_stream(cohort):
        cohort._steps._run(number)


def captured(device: torch.device, step: Callable[[], None]) -> Callable[[], None]:
    """`step` recorded in a CUDA graph after three calls; on a CPU as it is, after one."""
    if device.type != "cuda":
        step()
        return step
    aside = torch.cuda.Stream(device)
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside):
        for _ in range(3):
            step()
    torch.cuda.current_stream(device).wait_stream(aside)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    kept = graph, step  # a graph alone does not keep the tensors alive that the step works on
    return lambda: kept[0].replay()


def floor(rule: str, sizes: Sequence[int], runs: int, steps: int, device: torch.device) -> Measure:
    """The rule's matrix products and one fused Adam over weights and biases, and nothing else."""
    inputs = [torch.randn(runs, BATCH, size, device=device) for size in sizes]
    weights = [torch.randn(runs, o, i, device=device).mul_(i**-0.5) for i, o in itertools.pairwise(sizes)]
    feedback = [torch.randn(runs, size, sizes[-1], device=device) for size in sizes[1:-1]]
    biases = [torch.zeros(runs, 1, size, device=device) for size in sizes[1:]]
    gradients = [torch.zeros_like(weight) for weight in weights]
    for parameter, gradient in zip(weights, gradients, strict=True):
        parameter.grad = gradient
    for parameter in biases:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.Adam(weights + biases, lr=1e-4, fused=True, capturable=device.type == "cuda")
    last = len(weights) - 1

    @torch.no_grad()
    def step() -> None:
        for k, weight in enumerate(weights):
            torch.bmm(inputs[k], weight.mT)
            torch.bmm(inputs[k + 1].mT, inputs[k], out=gradients[k])
            if rule == "bp" and k > 0:
                torch.bmm(inputs[k + 1], weight)
            if rule != "bp" and k < last:
                torch.bmm(inputs[-1], feedback[k].mT)
            if rule.startswith("ll") and k < last:
                torch.bmm(inputs[k + 1], feedback[k])
        optimizer.step()

    once = captured(device, step)

    def several() -> None:
        for _ in range(steps):
            once()

    return lambda: seconds(device, several)


def plain_loop(sizes: Sequence[int], data: Data, steps: int, device: torch.device, by_hand: bool) -> Measure:
    """One network by autograd and `torch.optim.Adam` on resident images, its step recorded `by_hand` or not."""
    hidden = [part for i, o in itertools.pairwise(sizes[:-1]) for part in (nn.Linear(i, o), nn.Tanh())]
    model = nn.Sequential(*hidden, nn.Linear(sizes[-2], sizes[-1])).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True, capturable=by_hand and device.type == "cuda")
    images, labels = data.train_images.flatten(1), data.train_labels
    rows = torch.arange(BATCH, device=device)

    def step() -> None:
        inputs = images.index_select(0, rows).float().sub_(127.5).div_(127.5)
        loss = nn.functional.cross_entropy(model(inputs), labels.index_select(0, rows))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    once = captured(device, step) if by_hand else step

    def epoch() -> None:
        for chunk in torch.randperm(len(images), device=device)[: steps * BATCH].split(BATCH):
            rows.copy_(chunk)
            once()

    return lambda: seconds(device, epoch)


def launched(subject: Cohort) -> Counter[str]:
    """What a step launches on CUDA, by the profiler."""
    for number in (1, 2):  # what starts the profiler may miss the first
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
            one_step(subject, number)
            torch.cuda.synchronize()
    return Counter(event.name for event in found.events() or () if "CUDA" in str(event.device_type))


def called(subject: Cohort) -> Counter[str]:
    """The operations of torch that a step calls, views among them."""
    with _Counting() as counting:
        one_step(subject, 1)
    return counting.names


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[str(function)] += 1
        return function(*args, **(kwargs or {}))


@dataclass
class Bench:
    """What is measured on, how long there is time, and what was found so far."""

    device: torch.device
    data_dir: Path
    quick: bool
    rounds: int
    end: float
    deadline: float = 0.0
    results: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)
    _columns: tuple[str, ...] = ()

    def over(self) -> bool:
        """Whether the time of this section is over, which is then said."""
        if late := time.perf_counter() > self.deadline:
            self.say("The time for this section is over: the rest of it is left out.")
        return late

    def say(self, text: str) -> None:
        self.said.append(text)
        print(f"  ! {text}", flush=True)

    def open(self, section: str, about: str, deadline: float) -> None:
        self.deadline = deadline
        self.results[section], self._columns = [], ()
        print(f"\n{section}: {about}", flush=True)

    def row(self, **values: Any) -> None:
        """A row of the section's table, below the same names as the one before."""
        list(self.results.values())[-1].append(values)
        if self._columns != (columns := tuple(values)):
            self._columns = columns
            print("  " + "  ".join(_cell(value, name, name.replace("_", " ")) for name, value in values.items()))
        print("  " + "  ".join(_cell(value, name) for name, value in values.items()), flush=True)

    def arch(self, arch: str) -> str:
        return "-".join(str(int(units) // 10) for units in arch.split("-")) if self.quick else arch

    def runs(self, *runs: int) -> list[int]:
        return [number for number in runs if number <= 12] or [12] if self.quick else list(runs)

    def steps(self, sizes: Sequence[int], runs: int) -> int:
        """As many as take about `EPOCH_SECONDS`, by a rough model of the device."""
        weights = runs * sum(a * b for a, b in itertools.pairwise(sizes))
        seconds = 60e-6 + weights * (2.4e-11 if self.device.type == "cuda" else 2e-8)
        fitting = min(400, max(25, int(EPOCH_SECONDS / seconds)))
        return min(10, fitting) if self.quick else fitting

    def fits(self, spec: RunSpec, sizes: Sequence[int], runs: int) -> bool:
        """Whether a cohort takes less than half of the memory, so that there is room for its floor."""
        return runs * run_bytes(spec, RULES[spec.algorithm], sizes[0], sizes[-1], 400 * BATCH) < memory(self.device) / 2

    def cohort(self, spec: RunSpec, runs: int, data: Data, rates: int = 4) -> Cohort:
        return cohort(spec, runs, data, self.device, self.say, rates)

    def per_run_step(self, measures: dict[str, tuple[Measure, int]]) -> dict[str, float]:
        """The best round of each in microseconds, divided by the run-steps given with it."""
        best = alternate({name: measure for name, (measure, _) in measures.items()}, self.rounds)
        return {name: best[name] * 1e6 / count for name, (_, count) in measures.items()}


def _cell(value: Any, name: str, shown: str = "") -> str:
    width = max(len(name), 9)
    if isinstance(value, str):
        return (shown or value).ljust(max(width, 22))
    if isinstance(value, float):
        digits = 3 if abs(value) < 1 else 2 if abs(value) < 100 else 0
        return (shown or f"{value:,.{digits}f}").rjust(width)
    return (shown or str(value)).rjust(width)


def memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
