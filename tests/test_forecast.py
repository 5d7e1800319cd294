"""How long a grid will take: what is measured of it, how that is applied to the rest, and what it leaves as it was."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bpf import api
from bpf.cli import app as cli
from bpf.data.base import Extent
from bpf.experiment import forecast as forecasting
from bpf.experiment.forecast import Known, Means, Stack, forecast
from bpf.experiment.plugins import load_rules, load_trackers
from bpf.spec.run import RunSpec
from bpf.study.cells import Cell
from bpf.training import estimate, hardware
from bpf.training.estimate import Pace

CPU = torch.device("cpu")
DIGITS = Extent((1, 8, 8), 10, 1_437)
GRID = ["--dataset", "digits", "--algorithm", "dfa", "--arch", "8,16", "--activation", "tanh", "--no-batch-norm"]
GRID += ["--lr", "0.01", "--epochs", "3"]

pytestmark = pytest.mark.usefixtures("in_this_process")


@pytest.fixture
def bpf(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main([*arguments])
        told = capsys.readouterr()
        assert end.value.code in (0, None), told.err
        return told.out

    return run


def spec(**fields: Any) -> RunSpec:
    return RunSpec.model_validate({"dataset": "digits", "algorithm": "dfa", "arch": "8"} | fields)


def stack(products: float = 1e6, cells: int = 2, cohort: int = 1, examples: int = 640, **fields: Any) -> Stack:
    one = spec(**fields)
    members = [Cell(str(number), one.algorithm, "", {}, one.model_dump()) for number in range(cells)]
    return Stack(one, members, cohort, 3 * cells, 3, examples, products)


def means(paces: dict[float, Pace | None], asked: list[float] | None = None, **given: Any) -> Means:
    """Instead of measuring: the paces of stacks by their products."""

    def measure(one: Stack, seconds: float) -> Pace | None:
        if asked is not None:
            asked.append(one.products)
        return paces[one.products]

    return Means(measure, **{"budget": 1000.0, **given})


# What is measured


@pytest.mark.parametrize("rule", ["bp", "dfa", "ll-cce"])
def test_a_measurement_leaves_everything_as_it_was(rule: str) -> None:
    """Threads, denormal numbers and random numbers of this process."""
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_flush_denormal(False)  # else there is no such number
    tiny = torch.full((1,), 1e-39)
    try:
        torch.set_num_threads(2)
        for flush in (True, False):
            torch.set_flush_denormal(flush)
            one = spec(algorithm=rule)
            pace = estimate.measure([one] * 2, load_rules([rule])[rule], {}, DIGITS, 646, CPU, 0.02)
            assert pace is not None
            assert pace.epoch > 0 == pace.measurement
            assert torch.get_num_threads() == 2
            assert bool(tiny * 1) is not flush
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_trackers_take_is_told_apart() -> None:
    trackers = load_trackers(["bp_cosine"])
    pace = estimate.measure([spec()] * 2, load_rules(["dfa"])["dfa"], trackers, DIGITS, 646, CPU, 0.02)
    assert pace is not None
    assert pace.measurement > 0


def test_settings_that_end_or_break_a_training_end_no_measurement() -> None:
    """One epoch, early stopping, an imbalance, few examples, a learning rate that diverges."""
    changed = {"epochs": 1, "early_stopping": 1, "skew_type": "step", "lr": 1.0, "scaler": "identity"}
    one = spec(**changed, examples_frac=0.05, activation="relu", allow_unstable=True, init="aligned")
    examples = estimate.examples_of(one, DIGITS)
    assert 20 < examples < 0.05 * 1437
    assert estimate.measure([one], load_rules(["dfa"])["dfa"], {}, DIGITS, examples, CPU, 0.02)


def test_what_takes_far_too_long_is_not_measured() -> None:
    huge = spec(arch="60000-60000")
    assert estimate.measure([huge], load_rules(["dfa"])["dfa"], {}, DIGITS, 646, CPU, 0.5) is None


@pytest.mark.parametrize("fields", [{}, {"val_frac": 0.0}, {"examples_frac": 1.0}, {"skew_type": "long_tailed"}])
def test_examples_are_those_of_the_data(fields: dict[str, Any], tmp_path: Path) -> None:
    from bpf.data.cache import load
    from bpf.training.feed import Feed

    one = spec(**fields)
    exact = len(Feed(load("digits", tmp_path), one, CPU).train)
    assert estimate.examples_of(one, DIGITS) == pytest.approx(exact, rel=0.02)


def test_processes_that_share_cores_are_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "cores", lambda: 2)
    for load, workers, *expected in (
        (0.0, 1, 1, 1),
        (0.0, 2, 1, 1),
        (0.0, 4, 2, 2),
        (1.0, 2, 1.5, 2),
        (3.0, 2, 1.25, 2),
    ):
        monkeypatch.setattr(hardware.os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        assert list(hardware.crowding(CPU, workers)) == expected


# How it is applied


def test_what_was_measured_is_shared_by_the_workers() -> None:
    """Two cohorts of 3 executions and 100 epochs of 0.1 s are 30 s each; a third one takes a worker 30 s more."""
    paces: dict[float, Pace | None] = {1e6: Pace(0.1)}
    for cells, workers, seconds in ((2, 1, 60), (2, 2, 30), (3, 2, 60), (1, 4, 30)):
        found = forecast({"one": stack(cells=cells, epochs=100)}, {}, 0, means(paces), workers)
        assert found is not None
        overhead = forecasting.START_SECONDS + forecasting.CELL_SECONDS * cells
        assert found.estimate == pytest.approx(seconds, abs=overhead)
        assert found.low < seconds < found.high
        assert (found.workers, found.measured, found.structures) == (min(cells, workers), 1, 1)
    crowded = forecast({"one": stack(cells=2, epochs=100)}, {}, 0, means(paces), 2, crowding=(3.0, 6.0))
    assert crowded is not None
    assert crowded.estimate == pytest.approx(90, abs=4)
    assert crowded.high > 90 * 2


def test_structures_between_two_that_were_measured_lie_between_them() -> None:
    """On a line in logarithms: a tenth of the arithmetic at a quarter of the pace, so 1/sqrt(10) at the half."""
    stacks = {str(size): stack(size, epochs=1) for size in (1e6, 1e7, math.sqrt(1e13), 1e5, 1e8)}
    known = {1e6: Pace(1.0, 0.1), 1e7: Pace(4.0, 0.4)}
    paces = [Known("dfa", size, pace) for size, pace in known.items()]
    between = forecasting._between(math.sqrt(1e13), paces)
    assert (between.epoch, between.measurement) == (pytest.approx(2.0), pytest.approx(0.2))
    assert forecasting._between(1e5, paces).epoch == pytest.approx(0.1)
    assert forecasting._between(1e8, paces).epoch == pytest.approx(40.0)
    assert forecasting._between(1e6, paces).epoch == 1.0
    found = forecast(stacks, {}, 0, means({one.products: known.get(one.products) for one in stacks.values()}), 1)
    assert found is not None
    assert (found.measured, found.structures) == (2, 5)
    assert found.estimate == pytest.approx(6 * (0.1 + 1 + 2 + 4 + 40) + forecasting.START_SECONDS, abs=0.3)
    widest = 6 * 1e8 * 1.0 / 1e6  # the largest at the pace of the smallest
    assert found.high > widest


def test_each_rule_is_measured_the_largest_of_each_first() -> None:
    stacks = {f"{rule} {size}": stack(size, algorithm=rule) for rule in ("bp", "dfa") for size in (1e6, 2e6, 3e6)}
    asked: list[float] = []
    forecast(stacks, {}, 0, means(dict.fromkeys((1e6, 2e6, 3e6), Pace(1.0)), asked), 1)
    assert asked == [3e6, 3e6, 1e6, 1e6, 2e6, 2e6]
    asked.clear()
    forecast(stacks, {}, 0, means(dict.fromkeys((1e6, 2e6, 3e6), Pace(1.0)), asked, budget=0.0), 1)
    assert asked == [3e6], "one in any case"


def test_a_grid_that_is_certain_to_be_short_is_not_measured() -> None:
    asked: list[float] = []
    short = means({1e6: Pace(1e-3), 1e12: Pace(1e-3), 2e12: Pace(1e-3)}, asked, enough=60.0)
    assert forecast({"one": stack(1e6, epochs=10)}, {}, 0, short, 2) is None
    assert asked == []
    turned_out = {"one": stack(1e12, epochs=10), "two": stack(2e12, epochs=10)}
    found = forecast(turned_out, {}, 0, short, 2)
    assert found is not None
    assert (found.measured, asked) == (1, [2e12]), "the first one says that it is short"


def test_nothing_that_can_be_measured_means_no_forecast() -> None:
    assert forecast({"one": stack()}, {}, 0, means({1e6: None}), 2) is None
    assert forecast({}, {}, 0, means({}), 2) is None


def test_rules_with_finished_cells_are_not_measured() -> None:
    stacks = {"one": stack(1e6, epochs=10), "two": stack(2e6, algorithm="bp", epochs=10)}
    asked: list[float] = []
    earlier = {"gone": Known("dfa", 5e5, Pace(0.5))}
    found = forecast(stacks, earlier, 4, means({2e6: Pace(3.0)}, asked), 1, crowding=(2.0, 2.0))
    assert found is not None
    assert (asked, found.finished, found.measured) == ([2e6], 4, 1)
    assert found.estimate == pytest.approx(6 * 10 * 1.0 + 6 * 10 * 3.0 * 2.0, abs=4)


# Trackers


@pytest.mark.parametrize("every", ["1", "2", "5 steps", "40 steps"])
@pytest.mark.parametrize("measurement", [0.001, 0.02, 0.3])
def test_the_interval_that_is_given_brings_trackers_below_five_percent(every: str, measurement: float) -> None:
    pace: dict[float, Pace | None] = {1e6: Pace(0.1, measurement)}
    fields: dict[str, Any] = {"trackers": ["bp_cosine"], "epochs": 400}
    found = forecast({"one": stack(tracker_every=every, **fields)}, {}, 0, means(pace), 1)
    assert found is not None
    if not found.cure:
        assert found.share <= 0.05
        return
    assert found.share > 0.05
    cured = forecast({"one": stack(tracker_every=found.cure.strip('"'), **fields)}, {}, 0, means(pace), 1)
    assert cured is not None
    assert cured.share == pytest.approx(found.cured)
    assert cured.share < 0.05
    assert cured.cure == ""


def test_trackers_that_no_interval_makes_cheap_are_told_as_they_are() -> None:
    one = stack(trackers=["bp_cosine"], epochs=4)
    found = forecast({"one": one}, {}, 0, means({1e6: Pace(0.1, 1.0)}), 1)
    assert found is not None
    assert (found.cure, found.cured) == ("4", pytest.approx(2 / 2.4))


# What is said


def test_a_plan_tells_its_time_and_writes_nothing(bpf: Callable[..., str], tmp_path: Path) -> None:
    told = bpf("tune", "ex", *GRID, "--dry-run", "--workers", "1")
    assert "cohorts (cells of equal structure, stacked and trained together); experiment in ex\n" in told
    assert "with 1 worker (" in told
    assert told.endswith(" s), measured on this machine for 2 of 2 structures\n")
    assert list(tmp_path.iterdir()) == []


def test_the_data_need_not_be_there(bpf: Callable[..., str], tmp_path: Path) -> None:
    planned = json.loads(bpf("tune", "ex", *GRID, "--dataset", "mnist", "--dry-run", "--json"))
    assert planned["seconds"]["measured"] == 2
    assert list(tmp_path.iterdir()) == []


def test_a_short_grid_is_not_measured_before_it_is_trained(
    bpf: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "measure", lambda *_: pytest.fail("it took time for nothing"))
    assert "measured on this machine" not in bpf("tune", "ex", *GRID)


def test_what_is_finished_is_not_counted_and_serves_as_a_measure(bpf: Callable[..., str]) -> None:
    bpf("tune", "ex", *GRID, "--quiet")
    assert bpf("tune", "ex", *GRID, "--dry-run").endswith("nothing is left to train\n")
    more = ["8,16,12" if word == "8,16" else word for word in GRID] + ["--dry-run"]
    assert bpf("tune", "ex", *more).endswith(" s), known from 4 finished cells\n")
    extended = json.loads(bpf("tune", "ex", *more, "--json"))["seconds"]
    assert extended["measured"] == 0
    again = bpf("tune", "ex", *GRID, "--executions", "4", "--dry-run")
    assert "known from 4 finished cells" in again, "an execution of each is left"


def test_the_time_of_a_data_set_is_known_once_it_has_been_read(bpf: Callable[..., str], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 6, 5, 1), dtype=np.uint8)
    labels = np.arange(60) % 3
    np.savez(tmp_path / "mine.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    command = ["tune", "ex", *GRID, "--dataset", "npz:mine.npz", "--dry-run"]
    assert json.loads(bpf(*command, "--json"))["seconds"] is None
    assert bpf(*command).endswith("how long it takes is not known before the data set has been read\n")
    bpf("train", "one", "--dataset", "npz:mine.npz", "--algorithm", "dfa", "--arch", "8", "--epochs", "1", "-q")
    assert "measured on this machine for 2 of 2 structures" in bpf(*command)
    np.savez(tmp_path / "mine.npz", x_train=images[:50], y_train=labels[:50], x_test=images, y_test=labels)
    assert json.loads(bpf(*command, "--json"))["seconds"] is None, "it has changed since"


def test_a_rule_that_raises_is_for_the_training_to_deal_with(
    bpf: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("bpf.algorithms.dfa.DirectFeedbackAlignment.teaching_signal", broken)
    assert json.loads(bpf("tune", "ex", *GRID, "--dry-run", "--json"))["seconds"] is None


def test_expensive_trackers_are_told_with_the_cure(bpf: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "measure", lambda *_: Pace(0.1, 0.0125))
    tracked = [*GRID, "--tracker", "bp_cosine", "--epochs", "300", "--dry-run"]
    assert bpf("tune", "ex", *tracked).splitlines()[-1] == (
        "trackers take about 11.1 % of the training time; --tracker-every 3 brings that below 5 %"
    )
    assert json.loads(bpf("tune", "ex", *tracked, "--json"))["tracking"] == {"share": 0.1114, "cure": "3"}
    monkeypatch.setattr(estimate, "measure", lambda *_: Pace(0.1, 0.004))
    assert "trackers" not in bpf("tune", "ex", *tracked)


def test_a_forecast_needs_no_experiment(tmp_path: Path) -> None:
    """What it measures with is as a worker has it: cells of one structure, each with its executions."""
    from bpf.experiment.directory import prepare
    from bpf.spec.grid import GridSpec

    fields = {"dataset": "digits", "algorithm": "dfa", "arch": "8", "activation": "tanh", "batch_norm": False}
    grid = GridSpec.model_validate(fields | {"bw_init": "ortho", "lr": [0.1, 0.01], "epochs": 2})
    experiment = replace(prepare(tmp_path / "ex", "tune", grid, tmp_path))
    planned = api.plan(experiment, api.Effort(workers=2), budget=0.1)
    assert planned.forecast is not None
    assert planned.forecast.measured == planned.forecast.structures == 1
    found, cohorts = forecasting.stacks(planned.grid.cells, [], DIGITS, 3, CPU)
    [one] = found.values()
    assert [(run.lr, run.seed) for run in one.specs()] == [(lr, seed) for lr in (0.1, 0.01) for seed in (0, 1, 2)]
    assert (cohorts, one.executions, one.examples) == (1, 6, 646)
