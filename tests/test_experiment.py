"""Going on with an experiment: the same settings, grown lists, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from bpf.algorithms import Algorithm
from bpf.errors import UsageError
from bpf.experiment.directory import open_experiment, prepare
from bpf.experiment.grid import expand, resolve_options
from bpf.spec.fields import build
from bpf.spec.grid import GridSpec


class Fake(Algorithm):
    """A rule with options."""

    class Options(Algorithm.Options):
        scale: float = Field(0.5, description="A number.")
        kind: str = Field("sum", description="A word.")


RULES = {"fake": Fake}


def grid(**changes: Any) -> GridSpec:
    values = {"dataset": "digits", "algorithm": "fake", "arch": "8", "lr": 0.1, "activation": "tanh"}
    return resolve_options(build(GridSpec, values | changes), RULES)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    experiment = prepare(tmp_path / "grid", "tune", grid(), tmp_path)
    experiment.directory.mkdir()
    experiment.save(["bpf tune"])
    return experiment.directory


def test_defaults_of_options_are_written_out(directory: Path) -> None:
    assert open_experiment(directory).grid.options == {"fake": {"scale": [0.5], "kind": ["sum"]}}


def test_a_grown_list_of_options_extends_the_grid(directory: Path) -> None:
    grown = prepare(directory, "tune", grid(options={"fake": {"scale": "0.25,0.5", "kind": ["sum"]}}), directory)
    assert grown.grid.options == {"fake": {"scale": [0.5, 0.25], "kind": ["sum"]}}
    old, new = expand(grid(), RULES).cells, expand(grown.grid, RULES).cells
    assert {cell.key for cell in old} < {cell.key for cell in new}
    assert len(new) == 2 * len(old)


def test_grown_lists_keep_their_order(directory: Path) -> None:
    grown = prepare(directory, "tune", grid(arch="4,8,2"), directory)
    assert grown.grid.arch == ("8", "4", "2")


def test_changed_options_are_refused_with_the_difference(directory: Path) -> None:
    with pytest.raises(UsageError) as refused:
        prepare(directory, "tune", grid(options={"fake": {"scale": 0.25}}, epochs=7), directory)
    assert str(refused.value) == (
        f"{directory} holds an experiment with other settings:\n"
        "  epochs: 300 there, 7 now\n"
        '  options: {"fake": {"scale": [0.5], "kind": ["sum"]}} there, '
        '{"fake": {"scale": [0.25], "kind": ["sum"]}} now\n'
        "A grid can be extended (lists, epochs and executions may grow), not changed. "
        "Give another directory, or the same settings."
    )


def test_the_device_may_change(directory: Path) -> None:
    assert prepare(directory, "tune", grid(device="cpu"), directory).grid.device == "cpu"
