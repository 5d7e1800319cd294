"""Two phases: learning rates are found by loss, and dropout is tuned with them on held-out images."""

import csv
import io
import json
import re
import shlex
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from optuna.samplers import GridSampler

import bpf as package
from bpf.cli import app as cli
from bpf.errors import UsageError
from bpf.experiment.directory import Experiment, open_experiment, prepare
from bpf.experiment.grid import setup
from bpf.experiment.handover import Handed, Taken, rates, resolve
from bpf.experiment.phases import phase_directory
from bpf.experiment.places import find
from bpf.results import summary
from bpf.spec.fields import build
from bpf.spec.grid import GridSpec
from bpf.study.cells import Row
from bpf.study.ranking import Spread, best_columns, best_per
from remembering import remembered

SMALL = "--dataset digits --no-batch-norm --bw-init ortho --examples-frac 0.2"
FAST = "--workers 1 --quiet"

pytestmark = pytest.mark.usefixtures("in_this_process")
FIRST = f"tune ex {SMALL} --algorithm bp,drtp --arch 8,8-8 --activation tanh --epochs 2 --executions-per-trial 2 {FAST}"
RATES = "--lr 0.0001,0.01"
SECOND = f"{FIRST} --objective val_loss --dropout 0,0.3"


def but(command: str, **changes: str) -> str:
    """A command with other values of its options, and another directory."""
    for name, value in changes.items():
        pattern = r"^tune ex" if name == "directory" else rf"--{name} \S+"
        assert re.search(pattern, command)
        command = re.sub(pattern, f"tune {value}" if name == "directory" else f"--{name} {value}", command)
    return command


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    directory = tmp_path / "work"
    directory.mkdir()
    monkeypatch.chdir(directory)
    monkeypatch.setenv("BPF_DATA_DIR", "data")
    monkeypatch.delenv("BPF_STORAGE", raising=False)
    return directory


@pytest.fixture
def bpf(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must end with `code`; returns what it printed, or its error.

    The first experiment of a test is trained once for all tests that begin with the same command.
    """

    def run(command: str, code: int = 0) -> str:
        words = shlex.split(command)
        if words[0] == "tune" and code == 0 and not any(Path().iterdir()):
            return str(remembered(Path(words[1]), ("handover", command), lambda: execute(command, code)))
        return execute(command, code)

    def execute(command: str, code: int) -> str:
        capsys.readouterr()
        try:
            cli.main(shlex.split(command))
        except SystemExit as end:
            found = int(end.code or 0)
        else:
            found = 0
        told = capsys.readouterr()
        assert found == code, told.err
        return told.err if code else told.out

    return run


def rows(directory: str) -> list[Row]:
    return summary.rows(open_experiment(Path(directory)))


def winners(directory: str) -> dict[tuple[Any, ...], float]:
    """The learning rate of the best cell of each setup, by rule and arch."""
    best: dict[tuple[Any, ...], Row] = {}
    for row in rows(directory):
        at = row.rule, row.params["arch"]
        if row.value is not None and (at not in best or row.value < best[at].value):
            best[at] = row
    return {at: row.params["lr"] for at, row in best.items()}


def grid(**changes: Any) -> GridSpec:
    values = {"dataset": "digits", "algorithm": "bp,drtp", "arch": "8,8-8", "activation": "tanh", "batch_norm": False}
    values |= {"bw_init": "ortho", "examples_frac": 0.2, "epochs": 2, "executions_per_trial": 2}
    return build(GridSpec, values | {"objective": "val_loss", "dropout": "0,0.3"} | changes)


def pretend(directory: str, monkeypatch: pytest.MonkeyPatch, change: Callable[[Row], Row]) -> Experiment:
    """An experiment as it would be if its cells were what `change` makes of them."""
    from bpf.study.view import StudyView

    changed = [change(row) for row in rows(directory)]
    monkeypatch.setattr(StudyView, "rows", lambda *arguments, **named: changed)
    return open_experiment(Path(directory))


def in_state(state: str) -> Callable[[Row], Row]:
    return lambda row: replace(row, state=state, value=None, result=None)


# What is handed over


def test_each_setup_hands_over_the_learning_rate_of_its_best_cell(bpf: Callable[..., str]) -> None:
    bpf(f"{FIRST} {RATES} --weight-decay 0,0.1")
    handed = rates(open_experiment(Path("ex")))
    assert {(one.rule, one.params["arch"]): one.lr for one in handed} == winners("ex")
    assert [(one.rule, one.params["arch"]) for one in handed] == [
        *(("bp", "8"), ("bp", "8-8"), ("drtp", "8"), ("drtp", "8-8"))
    ]
    for one in handed:
        members = [row for row in rows("ex") if (row.rule, setup(row.params)) == (one.rule, one.params)]
        best = min(members, key=lambda row: row.value or 0)
        assert len(members) == 4, "two learning rates and two weight decays"
        assert one.objective == Spread([execution["objective"] for execution in best.result["executions"]])
        assert (one.states, one.reason) == ({"complete": 4}, "")
        assert set(best.params) - set(one.params) == {"lr", "weight_decay", "dropout"}


@pytest.mark.parametrize(
    ("change", "reason", "handed"),
    [
        (lambda row: in_state("pending")(row) if row.params["lr"] == 0.01 else row, "1 of 2 cells not finished", None),
        (in_state("diverged"), "2 diverged of 2 cells", None),
        (in_state("failed"), "2 failed of 2 cells", None),
        (
            lambda row: in_state("failed" if row.params["lr"] == 0.01 else "diverged")(row),
            "1 diverged, 1 failed of 2 cells",
            None,
        ),
        (lambda row: in_state("diverged")(row) if row.params["lr"] == 0.01 else row, "1 diverged of 2 cells", 0.0001),
    ],
)
def test_why_there_is_none(
    bpf: Callable[..., str], monkeypatch: pytest.MonkeyPatch, change: Any, reason: str, handed: float | None
) -> None:
    bpf(f"{but(FIRST, algorithm='bp', arch='8')} {RATES}")
    (one,) = rates(pretend("ex", monkeypatch, change))
    assert (one.lr, one.reason) == (handed, reason)
    assert (one.objective is None) == (handed is None)


def test_only_training_objectives_hand_over(bpf: Callable[..., str]) -> None:
    bpf(f"{SECOND} --lr 0.01 --plan-only")
    with pytest.raises(UsageError) as refused:
        rates(open_experiment(Path("ex")))
    assert str(refused.value) == (
        "ex has the objective val_loss: learning rates are taken from an experiment with objective loss or error."
    )


def test_another_problem_is_refused_and_other_settings_are_told(bpf: Callable[..., str]) -> None:
    bpf(f"{FIRST} {RATES}")
    source = open_experiment(Path("ex"))
    with pytest.raises(UsageError) as refused:
        resolve(grid(dataset="mnist"), source)
    assert str(refused.value) == (
        "dataset mnist with learning rates from ex, which has digits: a learning rate is tuned for one problem. "
        "Take another experiment, or give --lr."
    )
    taken = resolve(grid(epochs=3, output_loss="ce", seed=3, early_stopping=2), source)
    assert taken.differences == ["epochs 2 there, 3 here", "early_stopping 0 there, 2 here"]
    assert list(taken.lines())[-1] == "settings that differ: epochs 2 there, 3 here; early_stopping 0 there, 2 here"
    taken = resolve(grid(shuffle=False, input_dropout=0.2, flip=0.5, crop=2), source)
    assert taken.differences == [
        *("shuffle True there, False here", "input_dropout 0.0 there, 0.2 here"),
        *("flip 0.0 there, 0.5 here", "crop 0 there, 2 here"),
    ]
    with pytest.raises(UsageError, match=r"^lr with lr_from: each setup has"):
        resolve(grid(lr=0.1), source)


def test_what_was_taken_in_words() -> None:
    setups = [
        Handed("bp", {"arch": "8", "batch_norm": False}, 0.001, Spread([0.5, 0.52]), {"complete": 2}),
        Handed("bp", {"arch": "16", "batch_norm": False}, 0.1, Spread([0.1234]), {"complete": 1, "failed": 1}),
        Handed("bp", {"arch": "9", "batch_norm": False}, states={"diverged": 2}),
    ]
    taken = Taken(grid(), Path("ex"), "loss", setups, [])
    assert list(taken.lines()) == [
        "2 learning rates from ex, each with its loss (mean ± std over executions):",
        "  bp arch=8 lr=0.001 (loss 0.5100 ± 0.0141)",
        "  bp arch=16 lr=0.1 (loss 0.1234; 1 failed of 2 cells)",
        "  bp arch=9: left out: 2 diverged of 2 cells",
    ]
    told = json.loads(json.dumps(taken.as_json()))
    assert told["source"] == "ex"
    assert told["handed"][1] == {
        "algorithm": "bp",
        "params": {"arch": "16", "batch_norm": False},
        "lr": 0.1,
        "objective": {"mean": 0.1234, "std": None},
        "reason": "1 failed of 2 cells",
    }
    assert told["missing"][0]["reason"] == "2 diverged of 2 cells"


# The second phase


def test_the_second_phase_trains_with_the_winners(bpf: Callable[..., str], work: Path) -> None:
    bpf(f"{FIRST} {RATES}")
    bpf(SECOND)
    found = rows("ex/val_loss")
    assert len(found) == 2 * 2 * 2
    best = winners("ex")
    assert len(set(best.values())) > 0
    for row in found:
        assert row.state == "complete"
        assert "lr" not in row.params
        assert row.spec["lr"] == best[row.rule, row.params["arch"]]
        assert row.spec["objective"] == "val_loss"
    written = yaml.safe_load(Path("ex/val_loss/experiment.yaml").read_text())
    assert written["name"] == "ex-val_loss"
    assert "lr" not in written["spec"]
    assert {(rate["algorithm"], rate["params"]["arch"]): rate["lr"] for rate in written["spec"]["lr_from"]} == best
    assert set(find(work)) == {work / "ex", work / "ex/val_loss"}

    with_lr = {row.key: row for row in found if row.rule == "bp" and row.params["arch"] == "8"}
    bpf(but(SECOND, directory="same", algorithm="bp", arch="8") + f" --lr {best['bp', '8']}")
    same = {row.key: row for row in rows("same")}
    assert {key: row.value for key, row in same.items()} == {key: row.value for key, row in with_lr.items()}


def test_optuna_reads_the_second_phase_as_a_whole_grid(bpf: Callable[..., str]) -> None:
    bpf(f"{FIRST} {RATES}")
    bpf(SECOND)
    experiment = open_experiment(Path("ex/val_loss"))
    with closing(experiment.open_study()) as study:
        for rule in ("bp", "drtp"):
            loaded = optuna.load_study(study_name=study.study_name(rule), storage="sqlite:///ex/val_loss/study.db")
            assert "lr" not in study.search_space(rule)
            assert GridSampler(study.search_space(rule)).is_exhausted(loaded)
            loaded._storage.remove_session()


def test_the_second_phase_is_resumed_without_the_first(bpf: Callable[..., str]) -> None:
    bpf(f"{FIRST} {RATES}")
    bpf(f"{SECOND} --plan-only")
    Path("ex/val_loss").rename("moved")
    bpf(f"resume moved {FAST}")
    assert {row.state for row in rows("moved")} == {"complete"}
    assert {row.spec["lr"] for row in rows("moved")} == set(winners("ex").values())


def test_the_second_phase_grows(bpf: Callable[..., str]) -> None:
    bpf(f"{FIRST} {RATES}")
    bpf(SECOND)
    before = {row.key: row for row in rows("ex/val_loss")}
    bpf(f"{SECOND},0.6")
    bpf(f"{SECOND},0.6")
    after = {row.key: row for row in rows("ex/val_loss")}
    assert len(after) == 3 * 2 * 2
    assert {key: (row.value, row.attempt) for key, row in after.items() if key in before} == {
        key: (row.value, row.attempt) for key, row in before.items()
    }
    assert {row.spec["lr"] for row in after.values()} == set(winners("ex").values())
    bpf(f"{but(FIRST, arch='8,8-8,4')} {RATES}")
    bpf(f"{but(SECOND, arch='8,8-8,4')},0.6")
    grown = {row.key: row for row in rows("ex/val_loss")}
    assert len(grown) == 3 * 2 * 3
    assert all(grown[key].attempt == row.attempt for key, row in after.items())
    best = winners("ex")
    assert all(row.spec["lr"] == best[row.rule, row.params["arch"]] for row in grown.values())


def test_learning_rates_that_have_changed_are_refused(bpf: Callable[..., str]) -> None:
    bpf(f"{FIRST} --lr 0.0001")
    bpf(f"{SECOND} --plan-only")
    before = Path("ex/val_loss/experiment.yaml").read_text()
    bpf(f"{FIRST} {RATES}")
    best = winners("ex")
    assert set(best.values()) == {0.01}
    full = "batch_norm=false{} init=orthogonal optimizer=adam batch_size=64 skew=none: 0.0001 there, 0.01 now\n"
    names = [("bp", "8", ""), ("bp", "8-8", ""), ("drtp", "8", " bw_init=ortho"), ("drtp", "8-8", " bw_init=ortho")]
    assert bpf(SECOND, code=2) == (
        "Error: ex/val_loss holds an experiment with other settings:\n"
        + "".join(f"  lr_from: {rule} arch={arch} activation=tanh {full.format(init)}" for rule, arch, init in names)
        + "A grid can be extended (lists, epochs and executions may grow), not changed. Give another directory, or the "
        "same settings. `bpf resume ex/val_loss` goes on with the learning rates there.\n"
    )
    assert "  lr: none there, 0.01 now" not in bpf(f"{SECOND} --lr 0.01", code=2)
    assert Path("ex/val_loss/experiment.yaml").read_text() == before
    bpf(f"resume ex/val_loss {FAST}")
    assert {row.spec["lr"] for row in rows("ex/val_loss")} == {0.0001}


def test_a_grid_with_given_rates_does_not_take_others(bpf: Callable[..., str]) -> None:
    bpf(f"{FIRST} {RATES}")
    bpf(f"{SECOND} --lr 0.01 --plan-only")
    assert {row.params["lr"] for row in rows("ex/val_loss")} == {0.01}
    assert bpf(SECOND, code=2) == (
        "Error: ex/val_loss holds an experiment with other settings:\n  lr: 0.01 there, none now\n"
        "A grid can be extended (lists, epochs and executions may grow), not changed. Give another directory, or the "
        "same settings.\n"
    )


def pasted(refused: str) -> list[str]:
    """The commands in a message or an output, without `bpf`."""
    return [line.strip().removeprefix("bpf ") for line in refused.splitlines() if line.startswith("  bpf ")]


def test_both_ways_to_a_learning_rate_can_be_pasted(bpf: Callable[..., str]) -> None:
    asked = f"{SECOND.replace(' 8,8-8 ', ' 8 ')} --storage sqlite:///shared.db --data-dir 'my data'"
    by_list, first, second = pasted(bpf(f"{asked} --experiment mine", code=2))
    assert not Path("ex").exists()
    assert "--experiment mine" in by_list
    bpf(f"{by_list} --plan-only")
    cells = rows("ex")
    assert {row.params["lr"] for row in cells} == {0.0001, 0.001, 0.01, 0.1}
    assert {row.params["dropout"] for row in cells} == {0.0, 0.3}
    Path("ex").rename("by-list")

    bpf(f"{first.replace('0.0001,0.001,', '')} {FAST}")
    assert {(row.params["dropout"], row.spec["objective"]) for row in rows("ex-loss")} == {(0.0, "loss")}
    bpf(f"{second.replace('--experiment mine', '')} {FAST}")
    best = winners("ex-loss")
    assert {(row.rule, row.params["dropout"]): row.spec["lr"] for row in rows("ex")} == {
        (rule, dropout): best[rule, "8"] for rule in ("bp", "drtp") for dropout in (0.0, 0.3)
    }
    for directory in ("ex-loss", "ex", "by-list"):
        assert open_experiment(Path(directory)).data_dir == Path("my data").resolve()
        assert open_experiment(Path(directory)).database.public == str(Path("shared.db").resolve())


def test_ways_to_a_learning_rate_have_directories(bpf: Callable[..., str]) -> None:
    grid = f"{SMALL} --algorithm bp --objective val_error"
    for given, names in {
        "": ["runs/digits-bp-val_error", "runs/digits-bp-loss"],
        "'a b/c'": ["'a b/c'", "'a b/c-loss'"],
        ".": [".", shlex.quote(str(Path.cwd().with_name("work-loss")))],
        "d/val_error": ["d/val_error", "d/val_error-loss"],
        "-- -x": ["./-x", "./-x-loss"],
    }.items():
        by_list, first, second = pasted(bpf(f"tune {grid} {given}", code=2))
        asked, made = names
        assert by_list.startswith(f"tune {asked} --dataset digits ")
        assert first.startswith(f"tune {made} --dataset digits ")
        assert second.startswith(f"tune {asked} --dataset digits ")
        assert second.endswith(f" --lr-from {made}")


def test_python_is_told_what_to_do_without_commands(bpf: Callable[..., str]) -> None:
    with pytest.raises(UsageError, match=r"^objective val_loss without lr: .* with --lr-from DIR, where DIR is"):
        package.tune(grid(), "ex", workers=1)


def test_another_directory_can_be_named(bpf: Callable[..., str]) -> None:
    bpf(f"{FIRST} {RATES}")
    assert "lr-from" in bpf(but(SECOND, directory="other"), code=2)
    told = bpf(but(SECOND, directory="other").replace(" --quiet", "") + " --lr-from ex --dry-run")
    for line in resolve(grid(), open_experiment(Path("ex"))).lines():
        assert line.split("(")[0].strip() in told
    bpf(but(SECOND, directory="other") + " --lr-from ex --plan-only")
    assert {row.spec["lr"] for row in rows("other")} == set(winners("ex").values())


# Setups without a learning rate


def test_values_that_no_setup_has_a_rate_for_are_left_out(bpf: Callable[..., str]) -> None:
    bpf(f"{FIRST} {RATES}")
    told = bpf(but(SECOND, arch="8,8-8,4").replace(" --quiet", "") + " --dry-run")
    assert "left out: 2 cells of bp (arch 4: no learning rate was handed over)\n" in told
    assert "  drtp arch=4: left out: not trained there\n" in told
    bpf(f"{but(SECOND, arch='8,8-8,4')} --plan-only")
    assert {row.params["arch"] for row in rows("ex/val_loss")} == {"8", "8-8"}


def test_holes_are_refused_with_what_trains_them(bpf: Callable[..., str]) -> None:
    bpf(f"{FIRST} {RATES}")
    refused = bpf(but(SECOND, algorithm="bp,drtp,dfa"), code=2)
    command = (
        "bpf tune ex --dataset digits --epochs 2 --examples-frac 0.2 --algorithm bp,drtp,dfa --arch 8,8-8 "
        "--activation tanh --no-batch-norm --bw-init ortho --lr 0.0001,0.01 --executions-per-trial 2"
    )
    lines = refused.splitlines()
    assert lines[:5] == [
        "Error: ex has no learning rate for 2 of 6 setups, and a grid must be whole:",
        "  dfa arch=8: not trained there",
        "  dfa arch=8-8: not trained there",
        "Shorten lists so that these are left out, or train them first:",
        lines[4],
    ]
    assert len(lines) == 5
    assert sorted(shlex.split(lines[4])) == sorted(shlex.split(f"{command} --objective loss"))
    bpf(f"{lines[4].strip().removeprefix('bpf ')} {FAST}")
    bpf(f"{but(SECOND, algorithm='bp,drtp,dfa')} --plan-only")
    assert len(rows("ex/val_loss")) == 3 * 2 * 2


def test_commands_for_setups_that_have_not_come_to_an_end(
    bpf: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bpf(f"{but(FIRST, algorithm='bp', arch='8,8-8,4', activation='tanh,relu')} {RATES} --data-dir 'my data'")
    states = {("8", "tanh"): "interrupted", ("8-8", "relu"): "diverged", ("4", "tanh"): "failed"}

    def change(row: Row) -> Row:
        state = states.get((str(row.params["arch"]), str(row.params["activation"])))
        return in_state(state)(row) if state else row

    source = pretend("ex", monkeypatch, change)
    with pytest.raises(UsageError) as refused:
        resolve(grid(algorithm="bp", arch="8,8-8,4", activation="tanh,relu"), source)
    assert str(refused.value).splitlines() == [
        "ex has no learning rate for 3 of 6 setups, and a grid must be whole:",
        "  bp arch=8 activation=tanh: 2 of 2 cells not finished",
        "  bp arch=8-8 activation=relu: 2 diverged of 2 cells",
        "  bp arch=4 activation=tanh: 2 failed of 2 cells",
        "Shorten lists so that these are left out, or train them first:",
        "  bpf resume ex",
        "  bpf resume ex --retry-failed",
        "  bpf tune ex --dataset digits --objective loss --epochs 2 --examples-frac 0.2 --algorithm bp --arch 8,8-8,4 "
        "--activation tanh,relu --no-batch-norm --bw-init ortho --lr 0.0001,0.01,1e-05 --executions-per-trial 2 "
        f"--data-dir {shlex.quote(str(Path('my data').resolve()))}",
    ]


def test_long_lists_are_cut(bpf: Callable[..., str], tmp_path: Path) -> None:
    bpf(f"{FIRST} {RATES} --plan-only")
    many = grid(arch=",".join(map(str, range(1, 26))))
    with pytest.raises(UsageError) as refused:
        resolve(many, open_experiment(Path("ex")))
    lines = str(refused.value).splitlines()
    assert lines[0] == "ex has no learning rate for 50 of 50 setups, and a grid must be whole:"
    assert lines[1] == "  bp arch=1: not trained there"
    assert lines[8] == "  bp arch=8: 2 of 2 cells not finished"
    assert lines[21] == "  ... and 30 more"
    assert lines[23] == "  bpf resume ex"
    assert "--arch 8,8-8,1,2,3,4,5,6,7,9,10,11" in lines[24]

    def handed(lr: float) -> GridSpec:
        taken = [{"algorithm": "bp", "params": {"arch": str(units)}, "lr": lr} for units in range(1, 13)]
        return grid(algorithm="bp", lr_from=taken)

    there = prepare(tmp_path / "there", "tune", handed(0.1), tmp_path)
    there.directory.mkdir()
    there.save(["bpf tune"])
    with pytest.raises(UsageError) as changed:
        prepare(there.directory, "tune", handed(0.2), tmp_path)
    lines = str(changed.value).splitlines()
    assert lines[1] == "  lr_from: bp arch=1: 0.1 there, 0.2 now"
    assert lines[11] == "  lr_from: ... and 2 more setups"


# Where phases lie


def test_where_a_phase_goes(bpf: Callable[..., str], work: Path) -> None:
    assert phase_directory(Path("ex"), "val_loss") == (Path("ex"), None)
    bpf(f"{FIRST} {RATES} --plan-only")
    for directory in ("runs/digits-bp-error", "runs/a-loss", "runs/a-error"):
        bpf(but(FIRST, directory=directory) + f" {RATES} --plan-only")
    bpf(f"train one {SMALL} --algorithm bp --arch 8 --epochs 1 -q".replace("--bw-init ortho", ""))
    cases = {
        ("ex", "loss"): ("ex", None),
        ("ex", "error"): ("ex", None),
        ("ex", "val_loss"): ("ex/val_loss", "ex"),
        ("ex", "val_error"): ("ex/val_error", "ex"),
        ("ex/val_loss", "val_loss"): ("ex/val_loss", "ex"),
        ("ex/val_error", "val_loss"): ("ex/val_error", None),
        ("ex/other", "val_loss"): ("ex/other", None),
        ("runs/digits-bp-val_loss", "val_loss"): ("runs/digits-bp-val_loss", "runs/digits-bp-error"),
        ("runs/digits-bp+dfa-val_loss", "val_loss"): ("runs/digits-bp+dfa-val_loss", None),
        ("runs/a-val_loss", "val_loss"): ("runs/a-val_loss", "runs/a-loss"),
        ("runs/a-val_error", "val_error"): ("runs/a-val_error", "runs/a-error"),
        ("one", "val_loss"): ("one", None),
    }
    for (directory, objective), (place, source) in cases.items():
        assert phase_directory(Path(directory), objective) == (Path(place), source and Path(source)), directory
    assert phase_directory(work / "ex", "val_loss") == (work / "ex" / "val_loss", work / "ex")


def test_both_phases_may_share_a_database(bpf: Callable[..., str]) -> None:
    storage = "--storage sqlite:///shared.db"
    bpf(f"{FIRST} {RATES} {storage}")
    bpf(f"{SECOND} {storage}")
    assert open_experiment(Path("ex/val_loss")).name == "ex-val_loss"
    assert {row.spec["lr"] for row in rows("ex/val_loss")} == set(winners("ex").values())
    bpf("worker --storage sqlite:///shared.db --experiment ex-val_loss -q")


def test_the_default_directory_takes_from_the_one_beside_it(bpf: Callable[..., str]) -> None:
    bpf(but(FIRST, directory="") + f" {RATES}")
    bpf(but(SECOND, directory=""))
    found = rows("runs/digits-bp+drtp-val_loss")
    assert {row.state for row in found} == {"complete"}
    assert {row.spec["lr"] for row in found} == set(winners("runs/digits-bp+drtp-loss").values())


# The best of each combination


def test_the_best_of_each_combination(bpf: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    bpf(f"{but(FIRST, activation='tanh,sigmoid')} {RATES}")
    cells = rows("ex")
    ranked = best_per(cells, ["arch", "bw_init"])
    assert [entry.objective.mean for entry in ranked] == sorted(entry.objective.mean for entry in ranked)
    expected = {}
    for row in sorted(cells, key=lambda row: row.value or 0):
        expected.setdefault((row.rule, row.params["arch"]), row.key)
    assert {(entry.row.rule, entry.row.params["arch"]): entry.row.key for entry in ranked} == expected
    assert [entry.row.rule for entry in best_per(cells, [])] == list(dict.fromkeys(e.row.rule for e in ranked))
    assert best_per(cells, ["algorithm"]) == best_per(cells, [])
    assert len(best_per(cells, ["lr", "activation", "arch"])) == len(cells)

    table = best_columns(ranked, ["bw_init", "arch"])
    assert [record["rank"] for record in table] == [1, 2, 3, 4]
    assert len({tuple(record) for record in table}) == 1
    assert list(table[0])[:4] == ["rank", "algorithm", "bw_init", "arch"]
    for record, entry in zip(table, ranked, strict=True):
        assert record["bw_init"] == ("ortho" if record["algorithm"] == "drtp" else None)
        assert record["objective"] == pytest.approx(entry.objective.mean)
        assert (record["key"], record["cell"], record["lr"]) == (entry.row.key, entry.row.name, entry.row.params["lr"])
        assert record["test_loss"] == entry.test["loss"].mean

    for name, cure in (("architecture", "Did you mean 'arch'?"), ("skew_type", "Did you mean 'skew'?")):
        with pytest.raises(UsageError) as refused:
            best_per(cells, ["arch", name])
        assert str(refused.value) == f"{name!r} is no parameter of this grid. {cure}"


def test_a_learning_rate_that_was_handed_over_is_shown(bpf: Callable[..., str]) -> None:
    bpf(f"{FIRST} {RATES}")
    bpf(SECOND)
    ranked = best_per(rows("ex/val_loss"), ["arch"])
    best = winners("ex")
    for entry, record in zip(ranked, best_columns(ranked, ["arch"]), strict=True):
        assert record["lr"] == entry.as_json("val_loss")["params"]["lr"] == best[entry.row.rule, record["arch"]]
    assert len(best_per(rows("ex/val_loss"), ["lr"])) >= 2

    exported = list(csv.DictReader(io.StringIO(bpf("export ex/val_loss"))))
    assert {(one["algorithm"], one["arch"], float(one["lr"])) for one in exported} == {(*at, best[at]) for at in best}
    assert all("lr" in record for record in json.loads(bpf("export ex/val_loss --what history --format json")))
    assert "arch=8 dropout=0 lr=" in " ".join(bpf("best ex/val_loss").split())
    storage = "sqlite:///ex/val_loss/study.db"
    for one in optuna.get_all_study_summaries(storage):
        for trial in optuna.load_study(study_name=one.study_name, storage=storage).trials:
            lr = best[one.study_name.rpartition("/")[2], trial.params["arch"]]
            assert trial.user_attrs["lr"] == lr
            assert "lr" not in trial.params


def test_scripts_are_told_what_was_handed_over(bpf: Callable[..., str]) -> None:
    bpf(f"{FIRST} {RATES}")
    told = json.loads(bpf(f"{SECOND} --dry-run --json"))
    assert told["cells"] == 8
    taken = told["handed_over"]
    assert (taken["source"], taken["objective"], taken["missing"]) == ("ex", "loss", [])
    best = winners("ex")
    assert {(one["algorithm"], one["params"]["arch"]): one["lr"] for one in taken["handed"]} == best
    assert json.loads(bpf(f"{FIRST} {RATES} --dry-run --json"))["handed_over"] is None


def test_a_second_phase_is_repeated_from_its_settings(bpf: Callable[..., str]) -> None:
    bpf(f"{FIRST} {RATES}")
    bpf(SECOND)
    page = Path(bpf("report ex/val_loss").splitlines()[0]).read_text()
    assert "bpf tune ex/val_loss --spec SPEC.yaml" in page
    (settings,) = re.findall(r"as a file for --spec</summary><pre>(.*?)</pre>", page, re.DOTALL)
    Path("SPEC.yaml").write_text(settings.replace("&#39;", "'"))
    bpf("tune again --spec SPEC.yaml --quiet --workers 1")
    assert [(row.params, row.value) for row in rows("again")] == [
        (row.params, row.value) for row in rows("ex/val_loss")
    ]
    assert bpf("report ex/val_loss --map arch,lr", 2) == (
        "Error: 'lr' is no parameter of the grid in ex/val_loss. It was handed over.\n"
    )
    assert bpf("report ex ex/val_loss --output both.html --map arch,lr") == "both.html\n"


def test_python_has_two_phases_too(bpf: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    first = grid(objective="loss", dropout="0", lr="0.0001,0.01")
    package.tune(first, "mine", workers=1, quiet=True)
    second = package.tune(grid(), "mine", workers=1)
    assert second.directory == Path("mine/val_loss")
    assert "4 learning rates from mine, each with its loss (mean ± std over executions):" in capsys.readouterr().out
    assert {(one.rule, one.params["arch"]): one.spec["lr"] for one in rows("mine/val_loss")} == winners("mine")
    named = package.tune(grid(), "other", lr_from="mine", workers=1, quiet=True)
    assert list(named.results().lr) == list(second.results().lr)


def test_combinations_without_a_complete_cell_are_not_there(
    bpf: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bpf(f"{FIRST} {RATES}")
    cells = [in_state("diverged")(row) if row.params["arch"] == "8" else row for row in rows("ex")]
    assert [entry.row.params["arch"] for entry in best_per(cells, ["arch"])] == ["8-8", "8-8"]
    assert best_per([in_state("pending")(row) for row in cells], ["arch"]) == []
    assert best_columns([], ["arch"]) == []
    assert best_per([], ["anything"]) == []
