"""The command line as a user and a script meet it: help, JSON, spec files, going on, interruptions, pipes."""

import csv
import io
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open

import bpf
from bpf.cli import app as cli
from bpf.experiment.directory import open_experiment
from bpf.interrupts import NOTHING_BEGUN
from bpf.spec.fields import bounds, choices
from bpf.spec.grid import GridSpec
from bpf.spec.run import NEWER, RunSpec, digest
from bpf.study.owner import Owner
from bpf.training import checkpoint
from bpf.training.cohort import Cohort
from bpf.workers.supervisor import Supervisor
from remembering import stop_after_an_epoch
from waiting import eventually

pytestmark = pytest.mark.usefixtures("in_this_process")

SMALL = "--arch 8 --activation tanh --bw-init ortho --no-batch-norm --examples-frac 0.1 --executions-per-trial 2"
GRID = f"tune ex --dataset digits --algorithm dfa {SMALL} --epochs 2 -q"
RUN = "train one --dataset digits --algorithm dfa --arch 8 --examples-frac 0.1 --epochs 2"
BPF = [sys.executable, "-c", "import sys; from bpf.cli.app import main; main(sys.argv[1:])"]


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert (self.code, self.err) == (0, "")
        return json.loads(self.out)


Bpf = Callable[[str], Outcome]


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    directory = tmp_path / "work"
    directory.mkdir()
    monkeypatch.chdir(directory)
    monkeypatch.setenv("COLUMNS", "120")
    for name in ("BPF_DEBUG", "BPF_DATA_DIR", "BPF_CACHE_DIR", "BPF_STORAGE"):
        monkeypatch.delenv(name, raising=False)
    return directory


@pytest.fixture
def bpf_(capsys: pytest.CaptureFixture[str]) -> Bpf:
    def run(command: str) -> Outcome:
        capsys.readouterr()
        try:
            cli.main(shlex.split(command))
        except SystemExit as exit_:
            return Outcome(int(exit_.code or 0), *capsys.readouterr())
        raise AssertionError("the command line always exits")

    return run


def values(cells: list[dict[str, Any]]) -> dict[tuple[str, float], tuple[str, list[float]]]:
    """Name and values of each cell by rule and learning rate."""
    return {(cell["algorithm"], cell["params"]["lr"]): (cell["cell"], cell["objective"]["values"]) for cell in cells}


# Help and lists


@pytest.mark.parametrize(
    "command", ["--help", "--version", "algorithms", "datasets", "trackers", "tune --help", "train --help", "schema"]
)
def test_what_only_reads_imports_nothing_heavy(command: str) -> None:
    script = (
        "import sys, atexit\n"
        "from bpf.cli.app import main\n"
        "heavy = {'torch', 'optuna', 'torchvision', 'sqlalchemy'}\n"
        "atexit.register(lambda: print('heavy:', sorted(heavy & set(sys.modules)), file=sys.stderr))\n"
        "main(sys.argv[1:])\n"
    )
    done = subprocess.run([sys.executable, "-c", script, *shlex.split(command)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "heavy: []\n")
    assert done.stdout


@pytest.mark.parametrize(("command", "model"), [("tune", GridSpec), ("train", RunSpec)])
def test_help_names_every_field_with_its_range_and_default(
    bpf_: Bpf, monkeypatch: pytest.MonkeyPatch, command: str, model: type[GridSpec | RunSpec]
) -> None:
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 4000)  # an option a line
    shown = bpf_(f"{command} --help").out
    lines = {words[1]: line for line in shown.splitlines() if len(words := line.replace(",", " ").split()) > 1}
    for name, field in model.model_fields.items():
        if name == "rows":  # which only a file has
            continue
        line = lines["--option" if name == "options" else f"--{name.replace('_', '-')}"]
        expected = [", ".join(choices(name))] if name in RunSpec.model_fields else []
        expected.append(bounds(model, name))
        if field.is_required():
            expected.append("[required]")
        elif isinstance(field.default, int | float | str) and name != "dropout":
            expected.append(f"[default: {str(field.default).lower()}".removesuffix(".0"))
        for part in expected:
            assert part in line
    assert "--num-epochs" in lines["--epochs"]
    assert "--tracker" in lines["--trackers"]


def test_help_of_a_list(bpf_: Bpf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 4000)
    shown = bpf_("tune --help").out
    for expected in (
        "Learning rate. [above 0 to 10] [default: 0.0001, 0.001, 0.01, 0.1]",
        "[default: 500, 500-500-500-500-500, 500-1000-500, 1000, 1000-1000, 1000-500-1000]",
        "[0 to below 1] [default: 0; 0, 0.1, 0.2, 0.3, 0.4, 0.5 with a val_* objective]",
        "[none, long_tailed, step, or all]",
        "with seed, seed + 1, ... [1 to 1000] [default: 3]",
    ):
        assert expected in shown


@pytest.mark.parametrize(("command", "model"), [("schema", GridSpec), ("schema --run", RunSpec)])
def test_the_schema_names_every_field(bpf_: Bpf, command: str, model: type[GridSpec | RunSpec]) -> None:
    schema = bpf_(command).json
    assert schema["type"] == "object"
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) == set(model.model_fields)
    assert schema["required"] == ["dataset", "algorithm"]
    assert all(field["description"] for field in schema["properties"].values())
    if model is GridSpec:
        one, many = schema["properties"]["activation"]["anyOf"]
        assert "swish" in one["enum"]
        assert many == {"type": "array", "items": one, "minItems": 1}


@pytest.mark.parametrize("group", ["algorithms", "datasets", "trackers"])
def test_lists_as_json(bpf_: Bpf, group: str) -> None:
    listed = bpf_(f"{group} --json").json
    known = {"algorithms": "dfa", "datasets": "digits", "trackers": "bp_cosine"}[group]
    entry = next(entry for entry in listed if entry["name"] == known)
    assert (entry["distribution"], entry["problem"]) == ("bpf", "")
    assert known in bpf_(group).out


def test_one_entry_as_json(bpf_: Bpf) -> None:
    rule = bpf_("algorithms dfa --json").json
    assert (rule["name"], rule["problem_types"]) == ("dfa", ["classification", "reconstruction"])
    assert bpf_("datasets digits --json").json["train_size"] == 1437


# What is printed


def test_the_report_of_a_run(bpf_: Bpf) -> None:
    report = bpf_(f"{RUN} --seed 3 --json").json
    scores = {"loss", "error"}
    assert set(report) == {
        "status",
        "dataset",
        "algorithm",
        "seed",
        "device",
        "epochs",
        "train",
        "val",
        "test",
        "seconds",
        "samples_per_second",
    }
    assert (report["status"], report["dataset"], report["algorithm"]) == ("complete", "digits", "dfa")
    assert (report["seed"], report["device"], report["epochs"]) == (3, "cpu", 2)
    assert set(report["train"]) == set(report["val"]) == set(report["test"]) == scores
    assert set(report["seconds"]) == {"total", "per_epoch", "tracking"}
    assert report["seconds"]["tracking"] == 0
    assert report["seconds"]["per_epoch"] == report["seconds"]["total"] / 2
    assert report["samples_per_second"] > 0
    again = bpf_(f"{RUN} --seed 3 --json").json
    assert again == report
    assert bpf_("resume one --json").json == report


def test_what_trackers_cost_is_told(bpf_: Bpf) -> None:
    report = bpf_(f"{RUN} --tracker bp_cosine --json").json
    tracking, total = report["seconds"]["tracking"], report["seconds"]["total"]
    assert 0 < tracking < total
    assert re.search(
        rf"examples/s, trackers {100 * tracking / total:.1f} %$", bpf_(RUN + " --tracker bp_cosine").out, re.M
    )
    grid = bpf_(f"{GRID} --lr 0.1,0.2 --tracker bp_cosine").out
    told = re.search(r"trackers took (\d+\.\d) % of the training time of these cells\.", grid)
    assert told
    assert 0 < float(told[1]) < 100
    rows = bpf_("export ex --format json").json
    assert len(rows) > 1
    assert all(0 < row["tracking_seconds"] < row["seconds"] for row in rows)
    assert "trackers" not in bpf_(f"{GRID.replace('ex', 'bare', 1)} --lr 0.1").out


def test_a_run_without_validation_and_classes(bpf_: Bpf) -> None:
    report = bpf_(f"{RUN} --val-frac 0 --problem-type reconstruction --json").json
    assert report["val"] is None
    assert report["test"]["error"] is None
    assert report["test"]["loss"] > 0


def test_status_and_best_as_json(bpf_: Bpf) -> None:
    ranked = bpf_(f"{GRID} --lr 0.1,0.01 --json").json
    assert bpf_("best ex --json").json == ranked
    assert bpf_("best ex --json --top 1").json == ranked[:1]
    for cell in ranked:
        assert {"cell", "algorithm", "params", "objective", "test"} <= set(cell)
        objective = cell["objective"]
        assert set(objective) == {"name", "mean", "std", "values"}
        assert (objective["name"], len(objective["values"])) == ("loss", 2)
        assert objective["mean"] == pytest.approx(sum(objective["values"]) / 2)
        assert {"loss", "error"} <= set(cell["test"])
    assert ranked[0]["objective"]["mean"] <= ranked[1]["objective"]["mean"]
    status = bpf_("status ex --json").json
    assert status.pop("elapsed_seconds") > 0
    assert status.pop("device_hours") > 0
    assert status == {
        "experiment": "ex",
        "cells": {
            "total": 2,
            "pending": 0,
            "interrupted": 0,
            "running": 0,
            "complete": 2,
            "diverged": 0,
            "failed": 0,
        },
        "causes": {},
        "workers": [],
        "nodes": [],
        "throughput": 0,
        "dashboard": None,
        "eta_seconds": 0.0,
        "starting": None,
    }


@pytest.mark.usefixtures("in_workers")
def test_quiet_shows_the_result_and_no_progress(bpf_: Bpf) -> None:
    outcome = bpf_(f"{GRID} --lr 0.1")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith("\nRanked by loss")
    loud = bpf_(GRID.replace("ex", "other", 1).replace(" -q", " --lr 0.1"))
    assert loud.out.startswith("rule  cells  executions  grid")
    assert loud.err.startswith("1/1 ")


def test_a_dry_run_writes_nothing(bpf_: Bpf, work: Path) -> None:
    command = "tune --dataset digits --algorithm dfa,drtp --activation tanh,relu,gelu --arch 8 --dry-run"
    shown = bpf_(command)
    assert (shown.code, shown.err) == (0, "")
    for line in (
        "dfa      48         144  3 act × 2 bn × 2 feedback × 4 lr",
        "drtp     16          48  2 bn × 2 feedback × 4 lr",
        "left out: 32 cells of drtp (activation relu, gelu: drtp diverges unless the activation is bounded "
        "(--allow-unstable",
    ):
        assert line in shown.out
    planned = bpf_(f"{command} --json").json
    assert planned.pop("cohorts") >= 1
    seconds = planned.pop("seconds")
    assert 0 < seconds["low"] < seconds["estimate"] < seconds["high"]
    assert 1 <= seconds["measured"] <= 8
    assert planned.pop("tracking") == {"share": 0.0, "cure": None}
    assert planned == {
        "handed_over": None,
        "cells": 64,
        "by_algorithm": {"dfa": 48, "drtp": 16},
        "left_out": [
            {
                "algorithm": "drtp",
                "cells": 32,
                "reason": "activation relu, gelu: drtp diverges unless the activation is bounded "
                "(--allow-unstable to include them)",
            }
        ],
    }
    assert list(work.iterdir()) == []


# Specs


AS_YAML = "dataset: digits\nalgorithm: [bp, dfa]\nlr: [0.1, 1e-2]\nuse_bias: false\narch: 8\n"
AS_TOML = 'dataset = "digits"\nalgorithm = ["bp", "dfa"]\nlr = [0.1, 1e-2]\nuse_bias = false\narch = "8"\n'
AS_JSON = '{"dataset": "digits", "algorithm": ["bp", "dfa"], "lr": [0.1, 0.01], "use_bias": false, "arch": [8]}'


def seen(monkeypatch: pytest.MonkeyPatch, bpf_: Bpf, command: str) -> GridSpec:
    """The grid that a command means."""
    from bpf import api

    grids = []
    real = api.open_tune
    with monkeypatch.context() as patch:
        patch.setattr(api, "open_tune", lambda place, grid, *rest: grids.append(grid) or real(place, grid, *rest))
        assert bpf_(f"{command} --dry-run").code == 0
    return grids[0]


def test_spec_files_and_options_mean_the_same(monkeypatch: pytest.MonkeyPatch, bpf_: Bpf, work: Path) -> None:
    for suffix, text in (("yaml", AS_YAML), ("yml", AS_YAML), ("toml", AS_TOML), ("json", AS_JSON)):
        (work / f"s.{suffix}").write_text(text)
    commands = [f"tune --spec s.{suffix}" for suffix in ("yaml", "yml", "toml", "json")]
    plain = "tune --dataset digits --no-use-bias --arch 8"
    commands.append(f"{plain} --algorithm bp,dfa --lr 0.1,0.01")
    commands.append(f"{plain} --algorithm bp --algorithm dfa --lr 0.1 --lr 1e-2")
    grids = [seen(monkeypatch, bpf_, command) for command in commands]
    assert all(grid == grids[0] for grid in grids)
    assert (grids[0].algorithm, grids[0].lr, grids[0].use_bias) == (("bp", "dfa"), (0.1, 0.01), False)


def test_options_win_over_the_spec_file(monkeypatch: pytest.MonkeyPatch, bpf_: Bpf, work: Path) -> None:
    (work / "s.yaml").write_text(AS_YAML)
    grid = seen(monkeypatch, bpf_, "tune --spec s.yaml --lr 1 --use-bias --num-epochs 7 --tracker gradients")
    assert (grid.lr, grid.use_bias, grid.epochs, grid.trackers) == ((1.0,), True, 7, ("gradients",))
    assert (grid.algorithm, grid.arch) == (("bp", "dfa"), ("8",))
    assert seen(monkeypatch, bpf_, "tune --spec s.yaml --epochs 7 --trackers gradients --lr 1 --use-bias") == grid


def test_the_data_directory(bpf_: Bpf, monkeypatch: pytest.MonkeyPatch, work: Path) -> None:
    monkeypatch.setenv("BPF_DATA_DIR", "sets")
    assert "into sets/MNIST/raw" in bpf_("datasets mnist").out
    assert "into other/MNIST/raw" in bpf_("datasets mnist --data-dir other").out
    assert bpf_(f"{RUN} --json").code == 0
    assert yaml.safe_load((work / "one/experiment.yaml").read_text())["data_dir"] == str(work / "sets")


# Going on


def test_the_default_directories(bpf_: Bpf, work: Path) -> None:
    grid = GRID.replace("tune ex", "tune").replace("--algorithm dfa", "--algorithm dfa,ll-cce")
    assert bpf_(f"{grid} --lr 0.1 --objective error").code == 0
    assert bpf_(RUN.replace("train one", "train") + " -q").code == 0
    assert bpf_(RUN.replace("train one", "train") + " -q --seed 1").code == 0
    runs = sorted(path.name for path in (work / "runs").iterdir())
    assert runs[0] == "digits-dfa+ll-cce-error"
    assert [name.rpartition("-")[0] for name in runs[1:]] == ["train-digits-dfa"] * 2
    run = RunSpec(dataset="digits", algorithm="dfa", arch="8", examples_frac=0.1, epochs=2)
    of_bpf_0_2 = run.model_dump(mode="json", exclude={"device", *NEWER})
    assert f"train-digits-dfa-{digest(of_bpf_0_2)[:8]}" in runs, "the same command goes on with what bpf 0.2 began"
    assert bpf_("status --json").json["experiment"].startswith("runs/train-digits-dfa-")


def test_the_same_command_again_does_nothing_new(bpf_: Bpf, work: Path) -> None:
    first = bpf_(f"{GRID} --lr 0.1,0.01 --json").json
    epochs, models = bpf_("export ex --what history").out, written(work / "ex/models")
    assert len(epochs.splitlines()) == 1 + 2 * 2 * 2
    assert bpf_(f"{GRID} --lr 0.1,0.01 --json").json == first
    assert bpf_("export ex --what history").out == epochs
    assert written(work / "ex/models") == models


def test_a_list_that_grew_runs_only_what_is_new(bpf_: Bpf, work: Path) -> None:
    first = values(bpf_(f"{GRID} --lr 0.1 --json").json)
    results = bpf_("export ex --format json").json
    second = values(bpf_(f"{GRID} --lr 0.1,0.01 --algorithm bp --json").json)
    assert set(second) == {("dfa", 0.1), ("dfa", 0.01), ("bp", 0.1), ("bp", 0.01)}
    assert {cell: second[cell] for cell in first} == first
    assert [row for row in bpf_("export ex --format json").json if row["key"] == results[0]["key"]] == results
    assert len(list((work / "ex/models").glob("*/*"))) == 2  # one of each rule


def written(directory: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in directory.rglob("*")}


def plan(bpf_: Bpf, command: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Supervisor, "run", lambda self: None)
        assert bpf_(command).code == 0


@pytest.mark.parametrize("go_on", ["resume elsewhere/ex", "worker elsewhere/ex", f"{GRID} --lr 0.1"])
def test_a_moved_experiment_goes_on(bpf_: Bpf, work: Path, go_on: str) -> None:
    undisturbed = values(bpf_(f"{GRID} --lr 0.1 --json".replace("tune ex", "tune undisturbed")).json)
    plan(bpf_, f"{GRID} --lr 0.1")
    stop_after_an_epoch(work / "ex")
    [kept] = (work / "ex/checkpoints").iterdir()
    (work / "elsewhere").mkdir()
    shutil.move(work / "ex", work / "elsewhere/ex")
    assert bpf_("status elsewhere/ex --json").json["cells"]["interrupted"] == 1
    # Only the checkpoint knows this: so it was found.
    lines = change_history(work / "elsewhere/ex/checkpoints" / kept.name)
    go_on = go_on.replace("tune ex", "tune elsewhere/ex")
    assert bpf_(f"{go_on} -q").code == 0
    assert bpf_("export elsewhere/ex --what history --format json").json[0]["loss"] == lines
    found = values(bpf_("best elsewhere/ex --json").json)
    assert [cell[1] for cell in found.values()] == [cell[1] for cell in undisturbed.values()]
    assert sorted(path.name for path in work.iterdir()) == ["elsewhere", "undisturbed"]
    assert list((work / "elsewhere/ex/checkpoints").iterdir()) == []
    assert len(list((work / "elsewhere/ex/models/dfa").iterdir())) == 1
    again = bpf_("resume elsewhere/ex --json").json
    assert values(again) == found


def change_history(path: Path) -> float:
    """Leave a mark in the first epoch of the first run."""
    content = checkpoint.load(path, path.stem)
    content["states"][0]["records"][0]["history"]["loss"][0] = 123.0
    specs = [RunSpec.model_validate(spec) for spec in content["specs"]]
    checkpoint.save(path, path.stem, content["cells"], specs, content["states"])
    return 123.0


# Interruptions


LONG_GRID = f"{GRID} --epochs 400 --lr 0.1,0.01"


def interrupt(work: Path, *signals: signal.Signals) -> Outcome:
    """Start a long grid, wait for its first checkpoint, and send the signals."""
    with subprocess.Popen(
        [*BPF, *shlex.split(LONG_GRID), "--checkpoint-every", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=work,
    ) as process:
        eventually(lambda: process.poll() is not None or list(work.glob("ex/checkpoints/*.pt")))
        for number in signals:
            process.send_signal(number)
        out, err = process.communicate()
    return Outcome(process.returncode, out, err)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_an_interruption_loses_nothing(bpf_: Bpf, work: Path, number: signal.Signals) -> None:
    outcome = interrupt(work, number)
    expected = "Stopped, and everything is stored. Go on with: bpf resume ex\n"
    assert outcome == Outcome(130, "", expected)
    assert bpf_("status ex --json").json["cells"]["interrupted"] == 2
    (work / "runs").mkdir()
    shutil.move(work / "ex", work / "runs/ex")
    assert bpf_("best --json").json == []
    resumed = bpf_("resume --json").json  # the newest that is not finished
    undisturbed = bpf_(LONG_GRID.replace("tune ex", "tune undisturbed") + " --json").json
    assert [(cell["params"], cell["objective"], cell["test"]) for cell in resumed] == [
        (cell["params"], cell["objective"], cell["test"]) for cell in undisturbed
    ]


AT_ONCE = "Interrupted at once. Nothing finished is lost. Go on with: bpf resume {0}\n"


def interrupt_twice(*_: Any) -> None:
    for _ in range(2):
        signal.raise_signal(signal.SIGINT)
    raise AssertionError("the second one should have left")


@pytest.mark.usefixtures("in_workers")
def test_two_interruptions_leave_at_once(bpf_: Bpf, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Supervisor, "_listen", interrupt_twice)  # while its workers train
        outcome = bpf_(f"{GRID} --lr 0.1")
    assert outcome == Outcome(130, "", AT_ONCE.format("ex"))
    assert multiprocessing.active_children() == []
    status = bpf_("status ex --json").json
    assert (status["cells"]["running"], status["workers"]) == (0, [])
    assert bpf_("resume ex --json").json[0]["params"]["lr"] == 0.1


def test_two_interruptions_end_a_single_run_at_once(bpf_: Bpf, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Cohort, "run_epoch", interrupt_twice)
        outcome = bpf_(f"{RUN} -q")
    assert outcome == Outcome(130, "", AT_ONCE.format("one"))
    assert bpf_("resume one --json").json["status"] == "complete"


def test_an_interruption_before_anything_is_planned(bpf_: Bpf, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bpf import api

    def load(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(api, "load", load)
        for command in (GRID, f"{RUN} -q"):
            assert bpf_(command) == Outcome(130, "", f"{NOTHING_BEGUN}\n")
    assert list(work.iterdir()) == []


@pytest.mark.usefixtures("in_workers")
def test_time_is_up(bpf_: Bpf) -> None:
    outcome = bpf_(f"{RUN} -q --max-hours 0")
    expected = "Stopped (0 hours are over), and everything is stored. Go on with: bpf resume one\n"
    assert outcome == Outcome(130, "", expected)
    outcome = bpf_(f"{GRID} --lr 0.1 --max-hours 1e-9")
    assert outcome == Outcome(130, "", expected.replace("0 hours", "1e-09 hours").replace("one", "ex"))
    assert bpf_("resume one -q").code == bpf_("resume ex -q").code == 0


# Helping, and what is shown of it


def test_workers_help(bpf_: Bpf, work: Path) -> None:
    grid = f"{GRID} --lr 0.1,0.01"
    plan(bpf_, f"{grid} --storage {work}/all.db")
    helped = bpf_("worker ex")
    assert (helped.code, helped.out) == (0, "")
    first, *_, last = helped.err.splitlines()
    assert first.startswith("2/2 ")
    assert last == "Nothing is left to claim in ex."
    assert bpf_("status ex --json").json["cells"]["complete"] == 2
    assert bpf_("worker --storage all.db -q") == Outcome(0, "", "")
    plan(bpf_, f"{grid} --storage all.db".replace("tune ex", "tune two"))
    assert bpf_("worker --storage all.db -q") == Outcome(
        2, "", f"Error: {work}/all.db has several experiments. Known: ex, two.\n"
    )
    assert bpf_("worker --storage all.db --experiment two -q") == Outcome(0, "", "")
    assert sorted(path.name for path in work.iterdir()) == ["all.db", "ex", "locks", "two"]
    both = [bpf_(f"best {name} --json").json for name in ("ex", "two")]
    assert [cell["objective"] for cell in both[0]] == [cell["objective"] for cell in both[1]]


def test_status_names_the_workers(bpf_: Bpf, work: Path) -> None:
    plan(bpf_, f"{GRID} --lr 0.1,0.01")
    experiment = open_experiment(work / "ex")
    facts = {"host": "here", "device": "cpu"}
    with closing(experiment.open_study()) as study, Owner(study.locks, facts) as owner:
        assert study.claim(owner, lambda row: 1)
        status = bpf_("status ex --json").json
        [worker] = status["workers"]
        assert worker.pop("since").endswith("+00:00")
        assert worker == {"pid": os.getpid(), **facts, "progress": None}
        assert (status["cells"]["running"], status["cells"]["pending"], status["eta_seconds"]) == (1, 1, None)
        assert bpf_("status ex").out == (
            f"ex: 2 cells: 1 pending, 1 running\nworker on here, process {os.getpid()}, cpu\n"
            "0 s of training in finished cells, time left not known yet\n1 worker at work\n"
        )
    status = bpf_("status ex --json").json  # it has died
    assert (status["cells"]["interrupted"], status["workers"]) == (1, [])
    assert bpf_("resume ex -q").code == 0
    assert "worker died: 1 now complete\n" in bpf_("status ex").out


# How an experiment was made


def test_show(bpf_: Bpf, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = [f"{GRID} --lr 0.1", f"{GRID} --lr 0.1,0.01"]
    for command in commands:
        monkeypatch.setattr(sys, "argv", ["/usr/bin/bpf", *shlex.split(command)])
        plan(bpf_, command)
    shown = bpf_("show ex --json").json
    spec, sessions = shown.pop("spec"), shown.pop("sessions")
    created = shown.pop("created")
    assert created <= sessions[0]["time"]
    assert shown == {
        "experiment": "ex",
        "name": "ex",
        "storage": f"{work}/ex/study.db",
        "checkpoints": "ex",
        "data_dir": f"{work}/data",
    }
    assert set(spec) == set(GridSpec.model_fields) - {"lr_from", "rows"}
    assert (spec["algorithm"], spec["lr"], spec["epochs"]) == (["dfa"], [0.1, 0.01], 2)
    assert [session["command"] for session in sessions] == [f"bpf {command}" for command in commands]
    for session in sessions:
        assert set(session) == {"time", "command", "versions", "git", "bpf_git", "hardware", "environment"}
        assert session["versions"]["bpf"] == bpf.__version__
    lines = bpf_("show ex").out.splitlines()
    assert lines[:7] == [
        "experiment  ex",
        "name        ex",
        f"created     {created}",
        f"storage     {work}/ex/study.db",
        "checkpoints ex",
        f"data_dir    {work}/data",
        "spec",
    ]
    for line in ("  lr                    0.1, 0.01", "  trackers              none", "  batch_norm            no"):
        assert line in lines
    assert [line for line in lines if "  bpf tune " in line] == [f"{s['time']}  {s['command']}" for s in sessions]
    assert sum(line.startswith("  versions    bpf ") for line in lines) == 2
    assert sum(line.startswith("  hardware    ") for line in lines) == 2


def test_what_an_older_bpf_wrote_is_shown(bpf_: Bpf, work: Path) -> None:
    plan(bpf_, f"{GRID} --lr 0.1")
    path = work / "ex/experiment.yaml"
    content = yaml.safe_load(path.read_text())
    content |= {"format": 1, "commands": ["bpf tune ex"], "versions": {"bpf": "0.1.0"}}
    for name in ("sessions", "storage", "files", "keep_checkpoints"):
        del content[name]
    path.write_text(yaml.safe_dump(content))
    earlier = {"command": "bpf tune ex", "versions": {"bpf": "0.1.0"}}
    assert bpf_("show ex --json").json["sessions"] == [earlier]
    assert bpf_("show ex").out.endswith("\nearlier  bpf tune ex\n  versions    bpf 0.1.0\n")
    assert bpf_("resume ex -q").code == 0
    sessions = yaml.safe_load(path.read_text())["sessions"]
    assert (sessions[0], len(sessions)) == (earlier, 2)


def test_export(bpf_: Bpf) -> None:
    ranked = {cell["cell"]: cell for cell in bpf_(f"{GRID} --lr 0.1,0.01 --json").json}
    exported = {what: bpf_(f"export ex --what {what} --format json").json for what in ("results", "history")}
    for row in exported["results"]:
        cell = ranked[row["cell"]]
        assert (row["algorithm"], row["state"], row["executions"]) == ("dfa", "complete", 2)
        assert {name: row[name] for name in cell["params"]} == cell["params"]
        assert (row["objective"], row["objective_std"]) == (cell["objective"]["mean"], cell["objective"]["std"])
        assert {name: row[f"test_{name}"] for name in cell["test"]} == cell["test"]
    epochs = [(row["cell"], row["execution"], row["seed"], row["epoch"]) for row in exported["history"]]
    assert epochs == [(row["cell"], n, n, epoch) for row in exported["results"] for n in (0, 1) for epoch in (1, 2)]
    for name, cell in ranked.items():
        losses = [
            [row["loss"] for row in exported["history"] if (row["cell"], row["execution"]) == (name, n)] for n in (0, 1)
        ]
        assert [min(loss) for loss in losses] == cell["objective"]["values"]
    for what, rows in exported.items():
        text = bpf_(f"export ex --what {what}").out
        assert "\r" not in text
        table = list(csv.DictReader(io.StringIO(text)))
        assert table == [{name: "" if value is None else str(value) for name, value in row.items()} for row in rows]


def test_the_best_model_of_a_rule(bpf_: Bpf, work: Path) -> None:
    ranked = bpf_(f"{GRID} --lr 0.1,0.01 --json").json
    keys = {row["cell"]: row["key"] for row in bpf_("export ex --format json").json}
    [path] = (work / "ex/models").rglob("*.*")
    assert path == work / "ex/models/dfa" / f"{keys[ranked[0]['cell']]}.safetensors"
    with safe_open(path, "pt") as model:
        told = model.metadata()
        assert model.get_tensor("weight.0").shape == (8, 64)
    assert RunSpec.model_validate_json(told["spec"]).lr == ranked[0]["params"]["lr"]
    assert (json.loads(told["shape"]), len(json.loads(told["classes"]))) == ([1, 8, 8], 10)


# Tidying up


def test_clean(bpf_: Bpf, work: Path) -> None:
    assert bpf_(f"{GRID} --lr 0.1,0.01 --keep-checkpoints").code == 0
    ex = work / "ex"
    [kept], [model] = (ex / "checkpoints").iterdir(), (ex / "models/dfa").iterdir()
    needed = {path for path in ex.rglob("*") if path.is_file() and path != kept}
    [worse] = {cell["key"] for cell in bpf_("export ex --format json").json} - {model.stem}
    lock = ex / "locks/0123456789abcdef.lock"
    left = [
        *(ex / name for name in (".experiment.yaml.0a1b2c3d", "study.new.db", "study.new.db-wal")),
        ex / "checkpoints" / f".{kept.name}.0a1b2c3d",
        *(model.parent / name for name in (f"{worse}.safetensors", f".{model.name}.0a1b2c3d")),
        ex / f"logs/{worse}.json",
    ]
    mine = [ex / name for name in ("notes.txt", "logs/mine.json", ".hidden", "checkpoints/mine.txt", "models/mine.txt")]
    (ex / "logs").mkdir()
    for path in (*left, *mine):
        path.write_text("12345")
    lock.touch()
    names = sorted([*(str(path.relative_to(work)) for path in left), str(lock)])
    expected = {"files": names, "bytes": 5 * len(left)}
    left.append(lock)
    assert bpf_("clean ex --dry-run --json").json == expected
    assert bpf_("clean ex --dry-run").out == "".join(f"{name}\n" for name in names) + (
        f"{len(left)} files would be removed, 0.0 MiB.\n"
    )
    assert all(path.exists() for path in left)
    assert bpf_("clean ex --json").json == expected
    assert {path for path in ex.rglob("*") if path.is_file()} == {*needed, *mine, kept}
    assert bpf_("clean ex").out == "0 files removed, 0.0 MiB.\n"
    removed = bpf_("clean ex --checkpoints")
    assert (removed.code, removed.out.splitlines()[0]) == (0, str(kept.relative_to(work)))
    assert {path for path in ex.rglob("*") if path.is_file()} == {*needed, *mine}
    assert bpf_("best ex --json").code == 0


def test_clean_leaves_what_goes_on(bpf_: Bpf, work: Path) -> None:
    plan(bpf_, f"{GRID} --lr 0.1")
    stop_after_an_epoch(work / "ex")
    assert bpf_("clean ex --checkpoints --json").json["files"] == []
    assert list((work / "ex/checkpoints").iterdir())


# Going on for longer


def test_more_epochs_of_what_was_kept(bpf_: Bpf) -> None:
    short = values(bpf_(f"{GRID} --lr 0.1,0.01 --keep-checkpoints --json").json)
    longer = f"{GRID} --lr 0.1,0.01 --json".replace("--epochs 2", "--epochs 4")
    grown = values(bpf_(longer).json)
    afresh = values(bpf_(longer.replace("tune ex", "tune afresh")).json)
    assert {cell: found[1] for cell, found in grown.items()} == {cell: found[1] for cell, found in afresh.items()}
    assert {cell: found[0] for cell, found in grown.items()} == {cell: found[0] for cell, found in short.items()}
    epochs = [
        [row["loss"] for row in bpf_(f"export {name} --what history --format json").json] for name in ("ex", "afresh")
    ]
    assert epochs[0] == epochs[1]


def test_more_executions(bpf_: Bpf) -> None:
    first = values(bpf_(f"{GRID} --lr 0.1,0.01 --json").json)
    more = f"{GRID} --lr 0.1,0.01 --json".replace("--executions-per-trial 2", "--executions-per-trial 3")
    second = values(bpf_(more).json)
    assert {cell: (name, found[:2]) for cell, (name, found) in second.items()} == first
    assert all(len(found) == 3 for _, found in second.values())
    afresh = values(bpf_(more.replace("tune ex", "tune afresh")).json)
    for cell, (_, found) in second.items():  # stacked otherwise, so equal but for how a mean is rounded
        assert found == pytest.approx(afresh[cell][1], rel=1e-6)


def test_resume_without_a_directory_takes_the_newest_unfinished(bpf_: Bpf, work: Path) -> None:
    for name in ("old", "new", "done"):
        plan(bpf_, GRID.replace("tune ex", f"tune runs/{name}") + " --lr 0.1")
    assert bpf_("resume runs/done -q").code == 0
    for second, name in enumerate(("old", "new", "done")):
        for path in (work / "runs" / name).iterdir():
            os.utime(path, (second, second))
    assert bpf_("resume").err.startswith("Going on with runs/new\n")
    assert bpf_("resume").err.startswith("Going on with runs/old\n")
    assert bpf_("resume -q").code == 2


# Scripts


def test_debug_shows_the_traceback(bpf_: Bpf, monkeypatch: pytest.MonkeyPatch) -> None:
    message = "Error: nowhere is not an experiment: there is no such directory.\n"
    assert bpf_("status nowhere").err == message
    monkeypatch.setenv("BPF_DEBUG", "1")
    outcome = bpf_("status nowhere")
    assert outcome.code == 2
    assert outcome.err.startswith("Traceback (most recent call last):\n")
    assert outcome.err.endswith(f"\n{message}")


def test_a_bug_is_called_one(bpf_: Bpf, monkeypatch: pytest.MonkeyPatch) -> None:
    from bpf.results import summary

    def broken(experiment: Any) -> None:
        raise ValueError("oh no")

    assert bpf_(f"{RUN} -q").code == 0
    monkeypatch.setattr(summary, "status", broken)
    expected = "bpf failed: ValueError: oh no\nThis is a bug in bpf or a plugin; BPF_DEBUG=1 shows where.\n"
    assert bpf_("status one") == Outcome(1, "", expected)


def test_a_reader_that_leaves_early() -> None:
    with subprocess.Popen([*BPF, "algorithms"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
