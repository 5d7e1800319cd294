"""Whether the confidence intervals of a report hold, on a grid that is really trained.

    python benchmarks/intervals.py                            # about two minutes on two cores
    python benchmarks/intervals.py --directory runs/intervals # keeps the grids, or goes on with them

It trains bp, dfa and ll-mse on `digits` with twenty seeds, at eight settings that are different (two architectures,
activations and batch sizes, and the better of two learning rates) and at ten that are alike (weight decays that hardly
matter), and compares for every pair of rules and both scores that a report shows:

- **t over seeds**: the interval of the report (`bpf.report.comparing`);
- **bootstrap**: the 2.5 and 97.5 percentiles of the mean when seeds are drawn with replacement, all settings of a seed
  together, from differences that are put together here, without the code of the report. Of n seeds it is too narrow by
  nature: by √((n - 1) / n), and as it is normal where Student's is not;
- **over settings**: Student's t over the settings' means, as if the settings had been independent samples.

Coverage: of random subsets of three to five seeds, how many have an interval that contains the mean over all twenty. In
a subset each rule's cells are chosen anew, by the objective on its seeds, as for a grid that has only these. Its seeds
are among the twenty, so an interval that is right contains their mean a little more often than in 95 % of the subsets.
"""

import argparse
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bpf.experiment.directory import open_experiment
from bpf.report import comparing
from bpf.results import summary
from bpf.study.cells import Row

FIXED = (
    "--dataset digits --algorithm bp,dfa,ll-mse --no-batch-norm --bw-init ortho --epochs 6 --examples-frac 1 --quiet"
)
GRIDS = {
    "different": "--arch 30,100 --activation tanh,sigmoid --batch-size 32,64 --lr 0.001,0.01",
    "alike": "--arch 30 --activation tanh --lr 0.01 --weight-decay 0,1e-7,2e-7,5e-7,1e-6,2e-6,5e-6,1e-5,2e-5,5e-5",
}
SETTING = ("arch", "activation", "batch_size", "weight_decay")
SCORES = ("objective", "test error")
KINDS = ("t over seeds", "bootstrap", "over settings")
DRAWS = 10_000
SUBSETS = 300

Interval = tuple[float, float]
Pair = tuple[str, str, str]
"""Two rules and a score."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20, metavar="N", help="how many, five or more")
    parser.add_argument("--directory", type=Path, metavar="DIR", help="where the grid is, or is to be kept")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        for name, grid in GRIDS.items():
            directory = (arguments.directory or Path(temporary)) / name
            command = [sys.executable, "-m", "bpf", "tune", str(directory), *FIXED.split(), *grid.split()]
            subprocess.run([*command, "--executions", str(arguments.seeds)], stdout=subprocess.DEVNULL, check=True)
            rows = summary.rows(open_experiment(directory))
            print(f"settings that are {name}: {grid}")
            show_intervals(rows)
            show_coverage(rows, range(arguments.seeds))


def show_intervals(rows: Sequence[Row]) -> None:
    print(f"{'':<24}{'settings':>9}{'seeds':>6}{'mean':>9}" + "".join(f"{kind:>20}" for kind in KINDS))
    for pair, one in reported(rows).items():
        found = intervals(rows, pair, DRAWS)
        shown = "".join(f"{'none' if ends is None else f'{ends[0]:+.4f} to {ends[1]:+.4f}':>20}" for ends in found)
        print(f"{f'{pair[0]} - {pair[1]}, {pair[2]}':<24}{one.settings:9}{one.seeds:6}{one.mean:+9.4f}{shown}")


def show_coverage(rows: Sequence[Row], seeds: Sequence[int]) -> None:
    truth = {pair: one.mean for pair, one in reported(rows).items()}
    drawn = random.Random(0)
    print(f"{SUBSETS} random subsets of seeds: how many intervals of all pairs contain the mean over all seeds, in %")
    print(f"{'seeds':>6}" + "".join(f"{kind:>16}" for kind in KINDS))
    for size in (3, 4, 5):
        hits = [0] * len(KINDS)
        for _ in range(SUBSETS):
            chosen = drawn.sample(seeds, size)
            subset = [restricted(row, chosen) for row in rows]
            for pair, mean in truth.items():
                for number, ends in enumerate(intervals(subset, pair, 400)):
                    hits[number] += ends is not None and ends[0] <= mean <= ends[1]
        count = SUBSETS * len(truth)
        print(f"{size:6}" + "".join(f"{100 * covered / count:16.1f}" for covered in hits))


def reported(rows: Sequence[Row]) -> dict[Pair, comparing.Difference]:
    """What a report has of every pair of rules."""
    found: dict[Pair, comparing.Difference] = {}
    for one in comparing.compare(rows):
        for score, difference in zip(SCORES, (one.objective, one.test.get("error")), strict=True):
            if difference is not None:
                found[one.first, one.second, score] = difference
    return found


def intervals(rows: Sequence[Row], pair: Pair, draws: int) -> tuple[Interval | None, Interval, Interval | None]:
    """The three intervals, in the order of `KINDS`."""
    by_setting = differences(rows, pair)
    means = [statistics.fmean(values) for values in zip(*by_setting, strict=True)]
    return (
        reported(rows)[pair].interval,
        bootstrap(means, draws),
        comparing.t_interval([statistics.fmean(values) for values in by_setting]),
    )


def differences(rows: Sequence[Row], pair: Pair) -> list[list[float]]:
    """Of each setting, by seed: between the best cells of two rules."""
    best: dict[tuple[str, tuple[object, ...]], Row] = {}
    for row in rows:
        at = row.rule, tuple(row.params[name] for name in SETTING)
        if row.state == "complete" and (at not in best or row.value < best[at].value):  # type: ignore[operator]
            best[at] = row
    settings = [setting for rule, setting in best if rule == pair[0] and (pair[1], setting) in best]
    return [
        [a - b for a, b in zip(*(scores(best[rule, setting], pair[2]) for rule in pair[:2]), strict=True)]
        for setting in settings
    ]


def scores(row: Row, score: str) -> list[float]:
    executions = sorted((row.result or {})["executions"], key=lambda execution: execution["seed"])
    return [one["objective"] if score == "objective" else one["test"]["error"] for one in executions]


def bootstrap(means: Sequence[float], draws: int) -> Interval:
    drawn = random.Random(0)
    found = sorted(statistics.fmean(drawn.choices(means, k=len(means))) for _ in range(draws))
    return found[round(0.025 * draws)], found[round(0.975 * draws) - 1]


def restricted(row: Row, seeds: Sequence[int]) -> Row:
    """A complete cell as if it had been trained with these seeds only."""
    if row.state != "complete" or row.result is None:
        return row
    kept = [one for one in row.result["executions"] if one["seed"] in seeds]
    value = statistics.fmean(one["objective"] for one in kept)
    return replace(row, value=value, result=row.result | {"executions": kept})


if __name__ == "__main__":
    main()
