"""How fast is bpf on a GPU, beside what a step cannot do without?

    python benchmarks/gpu.py --json gpu.json           # everything, in at most 8 minutes
    python benchmarks/gpu.py --only step options       # some sections
    python benchmarks/gpu.py --device cpu --quick      # does it run? Tiny networks, and nothing is recorded

One process, batch 64, Adam, random uint8 images, three seeds and four learning rates in a cohort. Numbers are
microseconds per run-step unless their name says otherwise; everything in a row is measured in alternating rounds of the
same run, and the best round of each counts. Read the numbers as ratios.

- **bpf**: `Cohort.run_epoch` with all that an epoch does besides its steps, after three epochs that record them as CUDA
  graphs. An epoch has 400 steps, or fewer where they are long, 25 at least: there its own work (measuring, keeping
  the best networks) weighs more than in a real one.
- **floor**: the rule's matrix products plus one fused Adam over the same tensors, in a CUDA graph: no data, no
  activation, no loss.

Sections come in the order of their weight; what does not fit into `--minutes` is left out, and said. The
first rows of a section matter most, too.
"""

import argparse
import importlib.util
import json
import os
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_floor import (
    BATCH,
    RULES,
    TARGETS,
    Bench,
    Measure,
    alternate,
    begin,
    called,
    eager,
    epochs,
    floor,
    idle,
    launched,
    memory,
    one_step,
    own_stream,
    plain_loop,
    precision,
    random_data,
    release,
    seconds,
    sizes_of,
    spec_of,
    steps_of,
)

import bpf
from bpf.data.base import Extent
from bpf.data.cache import Data, describe, load
from bpf.errors import BpfError, UsageError
from bpf.experiment.grid import execution, expand
from bpf.nn.device import kernels_on
from bpf.spec.grid import GridSpec
from bpf.spec.run import RunSpec
from bpf.spec.values import MAX_EPOCHS
from bpf.study.cells import Cell
from bpf.training.capture import OFF
from bpf.training.cohort import Cohort
from bpf.training.estimate import STILL, examples_of, products
from bpf.training.footprint import run_bytes
from bpf.training.hardware import MAX_RUNS_GPU, choose_device, cohort_cells, settle

IMAGE, SMALL_IMAGE, LARGE_IMAGE = (1, 28, 28), (1, 8, 8), (3, 32, 32)
FASHION_MNIST = Extent(IMAGE, TARGETS, 60_000)
SHAPES = ((IMAGE, "500-500"), (SMALL_IMAGE, "100"), (LARGE_IMAGE, "1000-1000-1000"))
RUNS = (1, 12, 24, 96, 256, 1024)


def step(bench: Bench) -> None:
    for shape, full in SHAPES:
        arch = bench.arch(full)
        sizes = sizes_of(shape, arch)
        for rule in RULES:
            for runs in bench.runs(*(RUNS if rule in ("dfa", "bp") else (24, 96))):
                spec = spec_of(rule, arch)
                if bench.over():
                    return
                if bench.fits(spec, sizes, runs):
                    _step(bench, spec, sizes, runs, random_data(shape, bench.steps(sizes, runs) * BATCH, bench.device))
                else:
                    bench.say(f"{rule}, {arch}: {runs} runs do not fit into half of the memory.")
                release(bench.device)


def _step(bench: Bench, spec: RunSpec, sizes: Sequence[int], runs: int, data: Data) -> None:
    steps = len(data.train_labels) // BATCH
    try:
        own = epochs(bench.cohort(spec, runs, data), bench.device)
        bound = floor(spec.algorithm, sizes, runs, steps, bench.device)
        found = bench.per_run_step({"bpf": (own, runs * steps), "floor": (bound, runs * steps)})
    except torch.OutOfMemoryError:
        return bench.say(f"{spec.algorithm}, {sizes}: {runs} runs are too much for the memory.")
    shape = "-".join(map(str, sizes))
    bench.row(shape=shape, rule=spec.algorithm, runs=runs, steps=steps, **found, ratio=found["bpf"] / found["floor"])


def options(bench: Bench) -> None:
    shape, arch = IMAGE, bench.arch("500-500")
    sizes = sizes_of(shape, arch)
    held_out = {"objective": "val_loss", "val_frac": 0.02}
    augmented = {"rotation": 15.0, "translation": 0.1}
    variants: dict[str, dict[str, Any]] = {
        "plain": {},
        "dropout": {"dropout": 0.2},
        "augmentation": augmented,
        "batch norm": {"batch_norm": True},
        "all": {"dropout": 0.2, "batch_norm": True} | augmented,
    }
    bench.say("2 % is held out, as dropout needs it; validation is in the times, its steps do not count.")
    for runs in bench.runs(24, 96):
        if bench.over():
            return
        data = random_data(shape, bench.steps(sizes, runs) * BATCH, bench.device)
        for names, precise, context in (
            (list(variants), "highest", nullcontext),
            (["plain", "all"], "highest", eager),
            (["plain"], "high", nullcontext),
        ):
            with precision(precise):
                with context():
                    made = {n: bench.cohort(spec_of("dfa", arch, **held_out, **variants[n]), runs, data) for n in names}
                measures = {n: (epochs(made[n], bench.device), runs * steps_of(made[n])) for n in names}
                steps = steps_of(made["plain"])
                measures["floor"] = floor("dfa", sizes, runs, steps, bench.device), runs * steps
                found = bench.per_run_step(measures)
            how = "recorded" if made["plain"]._recorder.active else "called"
            for name in names:
                bound = found["floor"]
                bench.row(
                    option=name,
                    steps_are=how,
                    precision=precise,
                    runs=runs,
                    bpf=found[name],
                    floor=bound,
                    ratio=found[name] / bound,
                    beside_plain=found[name] / found["plain"],
                )
            del made, measures
            release(bench.device)


def rates(bench: Bench) -> None:
    arch, (runs,), several = bench.arch("500-500"), bench.runs(256), (4, 86)
    sizes = sizes_of(IMAGE, arch)
    steps = bench.steps(sizes, runs)
    data, spec, count = random_data(IMAGE, steps * BATCH, bench.device), spec_of("dfa", arch), runs * steps
    measures = {str(n): (epochs(bench.cohort(spec, runs, data, n), bench.device), count) for n in several}
    measures["floor"] = floor("dfa", sizes, runs, steps, bench.device), count
    found = bench.per_run_step(measures)
    for number in several:
        own = found[str(number)]
        ratios = {"ratio": own / found["floor"], "beside_4": own / found["4"]}
        bench.row(rates=number, runs=runs, bpf=own, floor=found["floor"], **ratios)


def loop(bench: Bench) -> None:
    arch, steps = bench.arch("500-500"), 10 if bench.quick else 200
    sizes, data = sizes_of(IMAGE, arch), random_data(IMAGE, steps * BATCH, bench.device)
    measures: dict[str, tuple[Measure, int]] = {
        "plain": (plain_loop(sizes, data, steps, bench.device, by_hand=False), steps),
        "plain, recorded": (plain_loop(sizes, data, steps, bench.device, by_hand=True), steps),
    }
    for rule in ("bp", "dfa"):
        for runs in bench.runs(1, 24, 96):
            own = epochs(bench.cohort(spec_of(rule, arch), runs, data), bench.device)
            measures[f"bpf {rule}, {runs} runs"] = own, runs * steps
    found = bench.per_run_step(measures)
    for name, took in found.items():
        ratios = {"beside_plain": found["plain"] / took, "beside_recorded": found["plain, recorded"] / took}
        bench.row(how=name, microseconds=took, run_steps_a_second=1e6 / took, **ratios)


def kernels(bench: Bench) -> None:
    on_device = bench.device.type == "cuda"
    bench.say("Kernels and copies on the device, by the profiler." if on_device else "ATen operations, views too.")
    held_out, norm = {"objective": "val_loss", "val_frac": 0.02}, {"batch_norm": True}
    data, (runs,) = random_data(IMAGE, 20 * BATCH, bench.device), bench.runs(24)
    for rule, name, fields in (
        ("dfa", "plain", {}),
        ("dfa", "batch norm", norm),
        ("dfa", "dropout", held_out | {"dropout": 0.2}),
        ("dfa", "dropout, batch norm", held_out | norm | {"dropout": 0.2}),
        ("bp", "plain", {}),
        ("ll-cce", "plain", {}),
        ("drtp", "plain", {}),
    ):
        with eager():
            subject = bench.cohort(spec_of(rule, bench.arch("500-500"), **fields), runs, data)
        begin(subject)
        one_step(subject, 0)
        names = launched(subject) if on_device else called(subject)
        often = ", ".join(f"{count} {name.split('(')[0][:40]}" for name, count in names.most_common(3))
        bench.row(option=name, rule=rule, launches=names.total(), kinds=len(names), most_often=often)


def footprints(bench: Bench) -> None:
    if bench.device.type != "cuda":
        return bench.say("Only CUDA's allocator tells: left out.")
    bench.say("`held out`: with an evaluation of 512 examples, as in most grids. cuBLAS keeps up to 32 MiB per stream.")
    held_out = {"objective": "val_loss", "val_frac": 0.8}
    everything = held_out | {"dropout": 0.2, "batch_norm": True}
    for shape, full, rule, name, fields in (
        (IMAGE, "500-500", "dfa", "plain", {}),
        (IMAGE, "500-500", "dfa", "held out", held_out),
        (IMAGE, "500-500", "dfa", "and dropout, norm", everything),
        (IMAGE, "500-500", "bp", "held out", held_out),
        (IMAGE, "500-500", "ll-cce", "held out", held_out),
        (SMALL_IMAGE, "100", "dfa", "plain", {}),
        (SMALL_IMAGE, "100", "dfa", "held out", held_out),
        (LARGE_IMAGE, "1000-1000-1000", "dfa", "held out", held_out),
        (LARGE_IMAGE, "1000-1000-1000", "drtp", "held out", held_out),
    ):
        if bench.over():
            return
        arch = bench.arch(full)
        spec, sizes, examples = spec_of(rule, arch, **fields), sizes_of(shape, arch), 15 * BATCH
        predicted = run_bytes(spec, RULES[rule], sizes[0], sizes[-1], examples)
        runs = max(1, min(MAX_RUNS_GPU, 4 * 2**30 // predicted))
        data = random_data(shape, examples, bench.device)
        release(bench.device)
        before = torch.cuda.memory_allocated(bench.device), torch.cuda.memory_reserved(bench.device)
        torch.cuda.reset_peak_memory_stats(bench.device)
        subject = bench.cohort(spec, runs, data)
        for _ in range(4):
            subject.run_epoch()
        idle(bench.device)
        peaks = torch.cuda.max_memory_allocated(bench.device), torch.cuda.max_memory_reserved(bench.device)
        allocated, reserved = ((peak - old) / runs / 2**20 for peak, old in zip(peaks, before, strict=True))
        mebibytes = {"allocated_MiB": allocated, "reserved_MiB": reserved, "run_bytes_MiB": predicted / 2**20}
        ratios = {"ratio": allocated * 2**20 / predicted, "reserved_ratio": reserved * 2**20 / predicted}
        bench.row(option=name, shape="-".join(map(str, sizes)), rule=rule, runs=runs, **mebibytes, **ratios)
        del subject


def beside(bench: Bench) -> None:
    (runs,), steps = bench.runs(24), 10 if bench.quick else 200
    data = random_data(IMAGE, steps * BATCH, bench.device)
    archs = [bench.arch(arch) for arch in ("500", "1000-1000", "500-1000-500", "1000")]
    made = [bench.cohort(spec_of("dfa", arch), runs, data) for arch in archs]
    for one in made:
        if one._recorder.active:  # working memory of libraries belongs to a stream
            one._recorder._stream = torch.cuda.Stream(bench.device)
        epochs(one, bench.device)
    bench.say("Steps only, of graphs that are recorded: `beside` replays one step of each in turn, each in its stream.")
    for names, subjects in ((archs[:2], made[:2]), (archs[2:], made[2:]), (archs, made)):
        ways = {"one_by_one": partial(_one_by_one, subjects, steps), "beside": partial(_beside, subjects, steps)}
        count = steps * runs * len(subjects)
        took = bench.per_run_step({n: (partial(_begun, bench.device, subjects, way), count) for n, way in ways.items()})
        bench.row(cohorts=", ".join(names), runs=runs, **took, gain=took["one_by_one"] / took["beside"])


def _begun(device: torch.device, subjects: Sequence[Cohort], way: Callable[[], None]) -> float:
    for subject in subjects:
        begin(subject)
    return seconds(device, way)


def _one_by_one(subjects: Sequence[Cohort], steps: int) -> None:
    for subject in subjects:
        with torch.no_grad(), own_stream(subject):
            for number in range(steps):
                subject._steps._run(number)
        idle(subject._device)


def _beside(subjects: Sequence[Cohort], steps: int) -> None:
    for number in range(steps):
        for subject in subjects:
            one_step(subject, number)


def planned(bench: Bench, **fields: Any) -> tuple[GridSpec, dict[str, list[Cell]]]:
    """A grid for Fashion-MNIST of all five rules, and its cells by what may be stacked."""
    grid = GridSpec.model_validate({"dataset": "fmnist", "algorithm": tuple(RULES)} | fields)
    alike: dict[str, list[Cell]] = {}
    for cell in expand(grid, RULES).cells:
        alike.setdefault(cell.structure, []).append(cell)
    return grid, alike


def stacked(bench: Bench, cells: Sequence[Cell], executions: int) -> list[list[RunSpec]]:
    """The executions of cells of one structure in cohorts, as a worker makes them."""
    first = RunSpec.model_validate(cells[0].spec)
    extent = FASHION_MNIST
    rule = RULES[first.algorithm]
    size = cohort_cells(first, rule, executions, extent.inputs, extent.classes, extent.train, bench.device)
    specs = [execution(RunSpec.model_validate(cell.spec), n) for cell in cells for n in range(executions)]
    return [specs[at : at + size * executions] for at in range(0, len(specs), size * executions)]


def fashion_mnist(bench: Bench) -> tuple[Data, str]:
    """The real images where they are on this disk; what they are in words."""
    if bench.quick:
        return random_data(IMAGE, 1000, bench.device), "1,000 random images"
    try:
        if describe("fmnist", bench.data_dir).on_disk:
            return load("fmnist", bench.data_dir).to(bench.device), "Fashion-MNIST"
        why = f"it is not in {bench.data_dir}"
    except BpfError as error:
        why = str(error)
    data = random_data(IMAGE, FASHION_MNIST.train, bench.device, test=10_000)
    return data, f"random images in the place of Fashion-MNIST's ({why})"


def grid(bench: Bench) -> None:
    fields: dict[str, Any] = {"arch": (bench.arch("500-500"),), "activation": ("tanh", "relu"), "batch_norm": (False,)}
    fields |= {"lr": (1e-4, 1e-3, 1e-2), "bw_init": ("ortho", "lecun"), "examples_frac": 1.0}
    asked, alike = planned(bench, **fields, epochs=2 if bench.quick else 10)
    data, what = fashion_mnist(bench)
    cohorts = [specs for cells in alike.values() for specs in stacked(bench, cells, asked.executions_per_trial)]
    bench.say(
        f"{asked.epochs} epochs of {what}, val_frac {asked.val_frac}: lr {asked.lr} x activation {asked.activation} "
        f"(drtp tanh only) x bw_init {asked.bw_init} (bp none) x {asked.executions_per_trial} executions = "
        f"{sum(map(len, cohorts))} runs of {asked.arch[0]} in {len(cohorts)} cohorts. Training is with validation and "
        "the test; building is apart; no study, no checkpoint. The floor is that of all steps as if no run diverged."
    )
    bounds: dict[tuple[str, int], float] = {}
    building = training = bound = 0.0
    diverged = trained = 0
    for specs in cohorts:
        if bench.over():
            break
        rule, start = specs[0].algorithm, time.perf_counter()
        subject = Cohort(specs, RULES[rule], data, device=bench.device, notice=bench.say)
        idle(bench.device)
        building += time.perf_counter() - start
        while not subject.done:
            training += seconds(bench.device, subject.run_epoch)
        key, steps = (rule, len(specs)), steps_of(subject)
        if key not in bounds:
            some = min(steps, 200)
            sizes = sizes_of(IMAGE, specs[0].arch)
            one = {"floor": floor(rule, sizes, len(specs), some, bench.device)}
            bounds[key] = alternate(one, bench.rounds)["floor"] / some
        bound += bounds[key] * steps * subject.epoch
        diverged += sum(record.status == "diverged" for record in subject.records)
        trained += len(specs)
        del subject
        release(bench.device)
    if trained:
        found = {"building_s": building, "training_s": training, "floor_s": bound, "ratio": training / bound}
        bench.row(images=what.split(" (")[0], runs=trained, diverged=diverged, **found)


def default_grid(bench: Bench) -> None:
    small: dict[str, Any] = {"arch": ("20", "20-20"), "activation": ("tanh", "relu")} if bench.quick else {}
    asked, alike = planned(bench, **small)
    each = asked.executions_per_trial
    first = {name: RunSpec.model_validate(cells[0].spec) for name, cells in alike.items()}
    size = {name: products(spec, FASHION_MNIST, 1000) for name, spec in first.items()}
    paces: dict[str, float] = {}
    for name in _spread(first):
        if time.perf_counter() > bench.deadline:
            break
        paces[name] = _seconds_of_epoch(bench, stacked(bench, alike[name], each)[0])
        release(bench.device)
    if not paces:
        return bench.say("No time was left to measure any structure.")
    hours, scaled = dict.fromkeys(RULES, 0.0), 0
    for name, spec in first.items():
        like = (
            name
            if name in paces
            else min(paces, key=lambda other: _distance(spec, first[other], size[other] - size[name]))
        )
        scaled += size[like] != size[name]
        pace = paces[like] * size[name] / size[like]
        hours[spec.algorithm] += pace * len(alike[name]) * each * asked.epochs / 3600
    examples, cells = examples_of(next(iter(first.values())), FASHION_MNIST), sum(map(len, alike.values()))
    bench.say(
        f"{cells} cells x {each} executions x {asked.epochs} epochs of {examples:,} examples. "
        f"{len(paces)} of {len(first)} structures were measured, by half an epoch with its validation, doubled; "
        f"{len(first) - len(paces) - scaled} have the pace of one of the same size with another activation or, if need "
        f"be, batch norm, and {scaled} that of the nearest size, in proportion to the arithmetic. Without building "
        "cohorts, checkpoints and the study."
    )
    for rule in RULES:
        bench.row(rule=rule, hours=hours[rule], structures=sum(spec.algorithm == rule for spec in first.values()))
    bench.row(rule="all", hours=sum(hours.values()), structures=len(first))


def _spread(first: dict[str, RunSpec]) -> list[str]:
    """The structures in an order of which any beginning spans rules, sizes and activations: those alike come apart."""
    turns: Counter[tuple[Any, ...]] = Counter()
    turn = {}
    for name in random.Random(0).sample(list(first), len(first)):
        spec = first[name]
        turn[name] = turns[alike := (spec.algorithm, spec.arch, spec.batch_norm)]
        turns[alike] += 1
    return sorted(turn, key=turn.__getitem__)


def _distance(spec: RunSpec, other: RunSpec, size: float) -> tuple[Any, ...]:
    return other.algorithm != spec.algorithm, abs(size), other.batch_norm != spec.batch_norm


def _seconds_of_epoch(bench: Bench, specs: list[RunSpec]) -> float:
    """Of one run of this cohort."""
    examples = 300 if bench.quick else round(FASHION_MNIST.train * (specs[0].examples_frac or 1.0) / 2)
    changed = {"examples_frac": 1.0, "epochs": MAX_EPOCHS, "init": "torch", "bw_init": "lecun"}
    still = [spec.model_copy(update=changed | {"lr": spec.lr * STILL}) for spec in specs]
    data = random_data(IMAGE, examples, bench.device)
    subject = Cohort(still, RULES[specs[0].algorithm], data, device=bench.device, notice=bench.say)
    took = alternate({"epoch": epochs(subject, bench.device)}, 2)["epoch"] / len(specs)
    return took * examples_of(specs[0], FASHION_MNIST) / subject.examples


@dataclass(frozen=True)
class Section:
    """What it is about, the share of the time that it may take, and the seconds that those before it leave to it."""

    run: Callable[[Bench], None]
    about: str
    share: float
    least: float


SECTIONS = {
    "step": Section(step, "a step of each rule", 0.42, 30),
    "options": Section(options, "what options of a step cost, dfa", 0.15, 20),
    "rates": Section(rates, "few and many learning rates in a cohort, dfa", 0.05, 10),
    "loop": Section(loop, "one network after the other by a plain loop, and bpf", 0.08, 15),
    "memory": Section(footprints, "what a run takes at most, and what was predicted", 0.07, 10),
    "beside": Section(beside, "small cohorts one by one and side by side, dfa", 0.06, 10),
    "grid": Section(grid, "a real grid, in seconds", 0.3, 40),
    "default grid": Section(default_grid, "the default grid on Fashion-MNIST, estimated", 1.0, 20),
    # last, as the profiler may slow down what comes after it
    "kernels": Section(kernels, "what one step launches, not recorded", 1.0, 15),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number there, too")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--quick", action="store_true", help="tiny networks and few steps: only to see that it runs")
    parser.add_argument("--only", nargs="+", choices=[*SECTIONS], metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="where Fashion-MNIST may be")
    asked = parser.parse_args()
    try:
        device = choose_device(asked.device)
        if device.type not in ("cuda", "cpu"):
            raise UsageError(f"device {asked.device}: this measures cuda and cpu only.")
    except UsageError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    total = asked.minutes * 60 - (30 if asked.minutes > 1 else 0)  # a row that has begun is measured to its end
    bench = Bench(device, asked.data_dir, asked.quick, 2 if asked.quick else 3, time.perf_counter() + total)
    settle(device)
    about = described(device)
    print("\n".join(f"{name:<12} {value}" for name, value in about.items()), flush=True)
    failed = {}
    todo = [name for name in SECTIONS if not asked.only or name in asked.only]
    for number, name in enumerate(todo):
        section, later = SECTIONS[name], sum(SECTIONS[other].least for other in todo[number + 1 :])
        if (left := bench.end - time.perf_counter()) < (0 if asked.quick else section.least):
            bench.say(f"{name}: left out, as {left:.0f} s are left and it needs {section.least:.0f}.")
            continue
        start = time.perf_counter()
        until = bench.end if asked.quick else max(start + section.least, bench.end - later)
        bench.open(name, section.about, until if asked.only else min(until, start + section.share * total))
        try:
            section.run(bench)
            release(device)
        except Exception:  # one section that fails must not cost the others
            failed[name] = traceback.format_exc()
            bench.say(f"{name} failed:\n{failed[name]}")
        print(f"  ({time.perf_counter() - start:.0f} s)", flush=True)
        if asked.json:
            content = about | {"results": bench.results, "said": bench.said, "failed": failed}
            asked.json.write_text(json.dumps(content, indent=1) + "\n")
    sys.exit(1 if failed else 0)


def described(device: torch.device) -> dict[str, Any]:
    about: dict[str, Any] = {"bpf": bpf.__version__, "torch": torch.__version__, "cuda": torch.version.cuda}
    about["triton"] = importlib.import_module("triton").__version__ if importlib.util.find_spec("triton") else None
    about["device"] = str(device)
    if device.type == "cuda":
        about["card"] = torch.cuda.get_device_name(device)
        about["memory"] = memory(device)
        about["kernels"] = "bpf's" if kernels_on(device) else "torch's operations: Triton cannot be used"
        about["graphs"] = f"off, by {OFF}" if os.environ.get(OFF) else "on"
    return about


if __name__ == "__main__":
    main()
