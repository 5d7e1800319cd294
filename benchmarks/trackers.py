"""What trackers cost at their default, one measurement an epoch and one before training.

    python benchmarks/trackers.py             # random images, as many and as large as Fashion-MNIST's
    python benchmarks/trackers.py --data data # Fashion-MNIST itself, from a --data-dir

One process, one thread, batch 64, Adam, all 60,000 training images of which a tenth is held out and evaluated. Each
figure is the part of a run's training time that went to the tracker, in percent: both times are taken in the same
epochs, so it hardly depends on the machine. Of three epochs; the measurement before training counts to the first.
"""

import argparse
from pathlib import Path

import torch

from bpf.data.cache import Data, load
from bpf.experiment.plugins import load_rules, load_trackers
from bpf.registry import TRACKERS, Registry
from bpf.spec.run import RunSpec
from bpf.training.cohort import Cohort
from bpf.training.hardware import settle

RULES = ("bp", "dfa", "drtp", "ll-cce", "ll-mse")
SIZES = (("500-500", 1), ("100-100", 6))
EPOCHS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="DIR", help="where Fashion-MNIST lies, as for --data-dir")
    where = parser.parse_args().data
    settle(torch.device("cpu"))
    data = load("fmnist", where) if where else random_data()
    names = [plugin.name for plugin in Registry(TRACKERS).plugins() if plugin.distribution == "bpf"]
    print(f"torch {torch.__version__}, {data.name}, part of the training time in %")
    for arch, runs in SIZES:
        print(f"\n784-{arch}-10, {runs} run{'s' if runs > 1 else ''} in a cohort")
        print(f"{'':<18}" + "".join(f"{rule:>8}" for rule in RULES))
        for given in ([name] for name in names):
            print(f"{given[0]:<18}" + "".join(f"{100 * share(data, rule, arch, runs, given):8.2f}" for rule in RULES))
        print(f"{'all of them':<18}" + "".join(f"{100 * share(data, rule, arch, runs, names):8.2f}" for rule in RULES))


def share(data: Data, rule: str, arch: str, runs: int, trackers: list[str]) -> float:
    """Which part of the time of three epochs the trackers took."""
    specs = [
        RunSpec(
            dataset="fmnist", algorithm=rule, arch=arch, activation="tanh", batch_norm=False, examples_frac=1.0,
            epochs=EPOCHS + 1, early_stopping=0, lr=0.0003, seed=seed, trackers=tuple(trackers),
        )
        for seed in range(runs)
    ]  # fmt: skip
    cohort = Cohort(specs, load_rules([rule])[rule], data, load_trackers(trackers))
    for _ in range(EPOCHS):
        cohort.run_epoch()
    return sum(one.tracking_seconds for one in cohort.records) / sum(one.seconds for one in cohort.records)


def random_data() -> Data:
    drawn = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (70_000, 1, 28, 28), generator=drawn, dtype=torch.uint8)
    labels = torch.randint(0, 10, (70_000,), generator=drawn)
    classes = tuple(map(str, range(10)))
    return Data("random images", images[:60_000], labels[:60_000], images[60_000:], labels[60_000:], classes)


if __name__ == "__main__":
    main()
