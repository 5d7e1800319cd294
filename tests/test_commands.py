"""Commands that bpf hands over: a grid, as a command line says it, is the same grid when it is read again."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bpf.cli import app as cli
from bpf.experiment import commands
from bpf.experiment.directory import Place, open_experiment
from bpf.spec.fields import build
from bpf.spec.grid import GridSpec
from bpf.study.database import Database
from invented import planned

pytestmark = pytest.mark.usefixtures("empty_place")

GRID = {"dataset": "digits", "algorithm": "bp,dfa"}


def command(grid: GridSpec, directory: str = "ex", data_dir: str = "data", **place: Any) -> str:
    told = commands.tune(Path(directory), commands.fields(grid), Path(data_dir), Place(**place))
    assert told is not None
    return told


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"lr": "0.1", "epochs": 7},
        {"lr": [0.123456789012345, 1e-5, 1, 3.3333333333333335e-05], "weight_decay": "0,1e-12"},
        {"batch_norm": True, "use_bias": False, "allow_unstable": True, "batch_size": "16,64"},
        {"batch_norm": False, "arch": "8", "activation": "tanh"},
        {"batch_norm": [True, False], "trackers": "bp_cosine,weights", "tracker_every": "100 steps"},
        {"objective": "val_loss", "lr": "0.1"},
        {"objective": "val_loss", "lr": "0.1", "dropout": 0},
        {"objective": "val_error", "lr": "0.1", "dropout": "0.1,0.2,0.3,0.4,0.5"},
        {"skew_type": "all", "imbalance_factor": "10"},
        {"skew_type": "step", "imbalance_factor": "5,50.5", "rotation": 3.5, "seed": 4, "device": "cpu"},
        {"shuffle": False, "input_dropout": 0.25, "flip": 0.5, "crop": 4, "init": "akrout,xavier", "activation": "elu"},
        {"executions_per_trial": 1, "val_frac": 0, "examples_frac": 1, "early_stopping": 3, "output_loss": "mse"},
    ],
    ids=str,
)
def test_a_grid_is_the_same_when_its_command_is_read(given: dict[str, Any], empty_place: Path) -> None:
    grid = build(GridSpec, GRID | given)
    words = shlex.split(command(grid))
    assert words[:3] == ["bpf", "tune", "ex"]
    cli_main(*words[1:])
    read = open_experiment(Path("ex")).grid.model_dump()
    assert {**read, "batch_norm": set(read["batch_norm"]), "options": {}} == {
        **grid.model_dump(),
        "batch_norm": set(grid.batch_norm),
        "options": {},
    }


def test_options_of_rules_are_the_same_when_their_command_is_read() -> None:
    options = {"pepita": {"feedback_scale": [1.0, 0.0123456789]}}
    cli_main(
        *shlex.split(command(build(GridSpec, {"dataset": "digits", "algorithm": "pepita", "options": options})))[1:]
    )
    assert open_experiment(Path("ex")).grid.options == options
    as_words = build(GridSpec, {**GRID, "options": {"dfa": {"a": "b c,d", "e": True}}})
    assert shlex.split(command(as_words))[-4:] == ["--option", "dfa.a=b c,d", "--option", "dfa.e=true"]


@pytest.mark.parametrize("values", [["a,b"], [None, 1], [""], [[1, 2]]])
def test_what_a_command_line_cannot_say_makes_no_command(values: list[Any]) -> None:
    grid = build(GridSpec, {**GRID, "options": {"dfa": {"x": values}}})
    assert commands.tune(Path("ex"), commands.fields(grid), Path("data")) is None
    unset = build(GridSpec, {**GRID, "options": {"dfa": {"x": [None]}}})
    assert "--option" not in command(unset)


def test_where_data_and_the_study_lie_is_said_if_it_goes_not_without_saying(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = build(GridSpec, GRID)
    short = "bpf tune ex --dataset digits --objective loss --algorithm bp,dfa --lr 0.0001,0.001,0.01,0.1"
    assert command(grid) == short
    assert command(grid, "my grid").startswith("bpf tune 'my grid' ")
    assert command(grid, "-x").startswith("bpf tune ./-x ")
    assert command(grid, data_dir="my data") == f"{short} --data-dir {shlex.quote(str(Path('my data').resolve()))}"
    server = Database.at("postgresql://me:secret@host/db")
    assert command(grid, storage=server, name="n", checkpoints=Path("/shared"), keep_checkpoints=True) == (
        f"{short} --storage postgresql://me@host/db --experiment n --checkpoints /shared --keep-checkpoints"
    )
    assert command(grid, storage=server, usual=True) == short
    monkeypatch.setenv("BPF_DATA_DIR", "elsewhere")
    assert command(grid) == f"{short} --data-dir {Path('data').resolve()}"


def test_an_experiment_is_gone_on_with_where_it_is(monkeypatch: pytest.MonkeyPatch, empty_place: Path) -> None:
    here = planned(empty_place / "here")
    assert commands.place_of(here) == Place()
    server = replace(here, database=Database.at("postgresql://me:secret@host/db"))
    told = commands.extend(server, commands.fields(server.grid))
    assert told is not None
    assert told.endswith(" --storage postgresql://me@host/db")
    monkeypatch.setenv("BPF_STORAGE", "postgresql://me:other@host/db")
    told = commands.extend(server, commands.fields(server.grid))
    assert told is not None
    assert "--storage" not in told


def cli_main(*arguments: str) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([*arguments, "--plan-only", "--quiet"])
    assert end.value.code == 0
