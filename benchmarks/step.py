"""How fast is a training step, beside what it cannot do without and beside the usual ways.

    python benchmarks/step.py            # 784-500-500-10, and 64-100-10 in cohorts
    python benchmarks/step.py --rounds 9 # more rounds on a noisy machine

One process, one thread, batch 64, Adam, random uint8 images. Everything is measured in alternating rounds of the
same run, and the best round of each counts. Read the numbers as ratios.

- **bpf**: `Cohort.run_epoch`, the product's own loop, with everything it does in an epoch but validation.
- **floor**: the rule's matrix products in the best layout plus one fused Adam step, and nothing else: no data, no
  activation, no loss.
- **plain**: `nn.Sequential`, autograd and `torch.optim.Adam` on resident tensors (backpropagation, one network).
- **DataLoader**: the same with torchvision's transforms on PIL images through a `DataLoader`, as tutorials do it.
"""

import argparse
import itertools
import time
from collections.abc import Callable

import gpu_floor
import numpy as np
import torch
from PIL import Image
from torch import nn
from torchvision import transforms

from bpf.data.cache import Data
from bpf.experiment.plugins import load_rules
from bpf.spec.run import RunSpec
from bpf.training.cohort import Cohort
from bpf.training.hardware import settle

BATCH, STEPS = 64, 100
RULES = ("drtp", "dfa", "ll-cce", "bp")
Measure = Callable[[], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    settle(torch.device("cpu"))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread, milliseconds per run-step, best of {rounds}")
    large((28, 28), "500-500", rounds)
    small((8, 8), "100", rounds)


def large(image: tuple[int, int], arch: str, rounds: int) -> None:
    data = random_data(image)
    measures: dict[str, Measure] = {"plain": plain(data, arch), "DataLoader": data_loader(data, arch)}
    for rule in RULES:
        measures[rule] = bpf_epoch(data, rule, arch, 1)
        measures[f"floor of {rule}"] = floor(data, rule, arch, 1)
    best = alternate(measures, rounds)
    print(f"\n{image[0] * image[1]}-{arch}-10: plain {best['plain']:.3f}, DataLoader {best['DataLoader']:.3f}")
    print("rule      bpf   floor  bpf/floor  plain/bpf  DataLoader/bpf")
    for rule in RULES:
        own, bound = best[rule], best[f"floor of {rule}"]
        print(
            f"{rule:<7} {own:6.3f} {bound:7.3f} {own / bound:9.2f}x {best['plain'] / own:9.2f}x "
            f"{best['DataLoader'] / own:13.2f}x"
        )


def small(image: tuple[int, int], arch: str, rounds: int) -> None:
    data = random_data(image)
    sizes = (1, 8, 24, 48)
    measures: dict[str, Measure] = {"plain": plain(data, arch), "DataLoader": data_loader(data, arch)}
    for rule in RULES:
        measures |= {f"{rule} {runs}": bpf_epoch(data, rule, arch, runs) for runs in sizes}
    best = alternate(measures, rounds)
    print(f"\n{image[0] * image[1]}-{arch}-10: plain {best['plain']:.3f}, DataLoader {best['DataLoader']:.3f}")
    print("rule    " + "".join(f"{f'cohort of {n}':>14}" for n in sizes) + "    plain/8   alone/8  DataLoader/8")
    for rule in RULES:
        alone, eight = best[f"{rule} 1"], best[f"{rule} 8"]
        row = "".join(f"{best[f'{rule} {n}']:>14.3f}" for n in sizes)
        print(f"{rule:<8}{row} {best['plain'] / eight:9.2f}x {alone / eight:8.2f}x {best['DataLoader'] / eight:12.1f}x")


def alternate(measures: dict[str, Measure], rounds: int) -> dict[str, float]:
    """The best of `rounds` of each, in milliseconds per run-step; the first round only warms up."""
    for measure in measures.values():
        measure()
    times = [{name: measure() for name, measure in measures.items()} for _ in range(rounds)]
    return {name: min(time[name] for time in times) for name in measures}


def random_data(image: tuple[int, int]) -> Data:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (BATCH * STEPS, 1, *image), dtype=torch.uint8, generator=generator)
    labels = torch.arange(BATCH * STEPS) % 10
    return Data("random", images, labels, images[:100], labels[:100], tuple("0123456789"))


def bpf_epoch(data: Data, rule: str, arch: str, runs: int) -> Measure:
    """Cohorts of `runs` runs: three seeds of each learning rate, as a grid has them."""
    shared = {"dataset": "random", "algorithm": rule, "arch": arch, "examples_frac": 1.0, "val_frac": 0.0}
    specs = [
        RunSpec.model_validate(shared | {"epochs": 10**6, "lr": 1e-4 * (1 + r // 3), "seed": r}) for r in range(runs)
    ]
    cohort = Cohort(specs, load_rules([rule])[rule], data)
    return lambda: seconds(cohort.run_epoch) * 1e3 / STEPS / runs


def floor(data: Data, rule: str, arch: str, runs: int) -> Measure:
    sizes = [data.shape[1] * data.shape[2], *map(int, arch.split("-")), 10]
    measure = gpu_floor.floor(rule, sizes, runs, STEPS, torch.device("cpu"))
    return lambda: measure() * 1e3 / STEPS / runs


def network(data: Data, arch: str) -> nn.Sequential:
    sizes = [data.shape[1] * data.shape[2], *map(int, arch.split("-"))]
    hidden = [part for i, o in itertools.pairwise(sizes) for part in (nn.Linear(i, o), nn.Tanh())]
    return nn.Sequential(*hidden, nn.Linear(sizes[-1], 10))


def plain(data: Data, arch: str) -> Measure:
    model = network(data, arch)
    optimizer = torch.optim.Adam(model.parameters())
    images, labels = data.train_images.flatten(1), data.train_labels

    def epoch() -> None:
        for rows in torch.randperm(len(images)).split(BATCH):
            inputs = images[rows].float().sub_(127.5).div_(127.5)
            loss = nn.functional.cross_entropy(model(inputs), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return lambda: seconds(epoch) * 1e3 / STEPS


class Pictures(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """What torchvision's MNIST does for each sample."""

    def __init__(self, images: np.ndarray, labels: list[int]) -> None:
        self.images, self.labels = images, labels
        self.transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def data_loader(data: Data, arch: str) -> Measure:
    model = nn.Sequential(nn.Flatten(), network(data, arch))
    optimizer = torch.optim.Adam(model.parameters())
    pictures = Pictures(data.train_images[:, 0].numpy(), data.train_labels.tolist())
    loader = torch.utils.data.DataLoader(pictures, batch_size=BATCH, shuffle=True)

    def epoch() -> None:
        for inputs, labels in loader:
            loss = nn.functional.cross_entropy(model(inputs), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return lambda: seconds(epoch) * 1e3 / STEPS


def repeat(step: Callable[[], None]) -> None:
    for _ in range(STEPS):
        step()


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
