"""The command line as a user and a script meet it: help, JSON, spec files, going on, interruptions, pipes."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from bpf import cli
from bpf.fields import bounds, choices
from bpf.spec import GridSpec, RunSpec

SMALL = "--arch 8 --activation tanh --bw-init ortho --no-batch-norm --examples-frac 0.1 --executions-per-trial 2"
GRID = f"tune ex --dataset digits --algorithm dfa {SMALL} --epochs 2 -q"
RUN = "train one --dataset digits --algorithm dfa --arch 8 --examples-frac 0.1 --epochs 2"
BPF = [sys.executable, "-c", "import sys; from bpf.cli import main; main(sys.argv[1:])"]


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
    for name in ("BPF_DEBUG", "BPF_DATA_DIR", "BPF_CACHE_DIR"):
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
        "from bpf.cli import main\n"
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
        "[0 to below 1] [default: 0; 0.1, 0.2, 0.3, 0.4, 0.5 with a val_* objective]",
        "[none, long_tailed, step, or all]",
        "(seed, seed + 1, ...). [1 to 1000] [default: 3]",
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
    assert set(report["seconds"]) == {"total", "per_epoch"}
    assert report["seconds"]["per_epoch"] == report["seconds"]["total"] / 2
    assert report["samples_per_second"] > 0
    again = bpf_(f"{RUN} --seed 3 --json").json
    assert again == report
    assert bpf_("resume one --json").json == report


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
        "eta_seconds": 0.0,
    }


def test_quiet_shows_the_result_and_no_progress(bpf_: Bpf) -> None:
    outcome = bpf_(f"{GRID} --lr 0.1")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith("\nRanked by loss")
    loud = bpf_(GRID.replace("ex", "other", 1).replace(" -q", " --lr 0.1"))
    assert loud.out.startswith("rule  cells  runs  grid")
    assert loud.err.startswith("1/1 ")


def test_a_dry_run_writes_nothing(bpf_: Bpf, work: Path) -> None:
    command = "tune --dataset digits --algorithm dfa,drtp --activation tanh,relu,gelu --arch 8 --dry-run"
    shown = bpf_(command)
    assert (shown.code, shown.err) == (0, "")
    for line in (
        "dfa      48   144  3 activation × 2 batch_norm × 2 bw_init × 4 lr",
        "drtp     16    48  2 batch_norm × 2 bw_init × 4 lr",
        "left out: 32 cells of drtp (activation relu, gelu: drtp diverges unless the activation is bounded "
        "(--allow-unstable",
    ):
        assert line in shown.out
    planned = bpf_(f"{command} --json").json
    assert planned.pop("cohorts") >= 1
    assert planned == {
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
        patch.setattr(api, "open_tune", lambda directory, grid, data: grids.append(grid) or real(directory, grid, data))
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
    assert bpf_("status --json").json["experiment"].startswith("runs/train-digits-dfa-")


def test_the_same_command_again_does_nothing_new(bpf_: Bpf, work: Path) -> None:
    first = bpf_(f"{GRID} --lr 0.1,0.01 --json").json
    logs = {path: path.stat().st_mtime_ns for path in (work / "ex/logs").iterdir()}
    assert bpf_(f"{GRID} --lr 0.1,0.01 --json").json == first
    assert {path: path.stat().st_mtime_ns for path in (work / "ex/logs").iterdir()} == logs


def test_a_list_that_grew_runs_only_what_is_new(bpf_: Bpf, work: Path) -> None:
    first = values(bpf_(f"{GRID} --lr 0.1 --json").json)
    log = next((work / "ex/logs").iterdir())
    written = log.stat().st_mtime_ns
    second = values(bpf_(f"{GRID} --lr 0.1,0.01 --algorithm bp --json").json)
    assert set(second) == {("dfa", 0.1), ("dfa", 0.01), ("bp", 0.1), ("bp", 0.01)}
    assert {cell: second[cell] for cell in first} == first
    assert log.stat().st_mtime_ns == written
    assert len(list((work / "ex/logs").iterdir())) == 4


def test_a_moved_experiment_goes_on(bpf_: Bpf, work: Path) -> None:
    first = bpf_(f"{GRID} --lr 0.1 --json").json
    shutil.move(work / "ex", work / "elsewhere")
    assert bpf_("resume elsewhere --json").json == first


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
        while process.poll() is None and not list(work.glob("ex/checkpoints/*.pt")):
            os.sched_yield()
        for number in signals:
            process.send_signal(number)
        out, err = process.communicate()
    return Outcome(process.returncode, out, err)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
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


def test_two_interruptions_leave_at_once(bpf_: Bpf, monkeypatch: pytest.MonkeyPatch) -> None:
    from bpf.training import Cohort

    def run_epoch(self: Cohort) -> None:
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
        raise AssertionError("the second one should have left")

    with monkeypatch.context() as patch:
        patch.setattr(Cohort, "run_epoch", run_epoch)
        outcome = bpf_(f"{GRID} --lr 0.1")
    expected = "Interrupted at once. Nothing finished is lost; go on with: bpf resume ex\n"
    assert outcome == Outcome(130, "", expected)
    assert bpf_("resume ex --json").json[0]["params"]["lr"] == 0.1


def test_resume_without_a_directory_takes_the_newest_unfinished(bpf_: Bpf, work: Path) -> None:
    from bpf import worker

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker.Worker, "run", lambda self: None)
        for name in ("old", "new", "done"):
            assert bpf_(GRID.replace("tune ex", f"tune runs/{name}") + " --lr 0.1").code == 0
    assert bpf_("resume runs/done -q").code == 0
    for time, name in enumerate(("old", "new", "done")):
        for path in (work / "runs" / name).iterdir():
            os.utime(path, (time, time))
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
    from bpf import api

    def broken(experiment: Any) -> None:
        raise ValueError("oh no")

    assert bpf_(f"{RUN} -q").code == 0
    monkeypatch.setattr(api, "status", broken)
    expected = "bpf failed: ValueError: oh no\nThis is a bug in bpf or a plugin; BPF_DEBUG=1 shows where.\n"
    assert bpf_("status one") == Outcome(1, "", expected)


def test_a_reader_that_leaves_early() -> None:
    with subprocess.Popen([*BPF, "algorithms"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1
