"""The commands that look at what came out, and the same in Python."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pandas
import pytest
import torch

import bpf
from bpf import api, cli
from bpf.errors import UsageError
from bpf.experiment import open_experiment

GRID = {
    "dataset": "digits",
    "algorithm": ["bp", "dfa"],
    "arch": "8",
    "activation": "tanh",
    "batch_norm": False,
    "bw_init": "ortho",
    "lr": [0.01, 0.1],
    "epochs": 2,
    "trackers": ["bp_cosine"],
    "executions_per_trial": 2,
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("viewing")
    opened = bpf.tune(GRID, root / "grid", data_dir=root, workers=1, quiet=True)
    assert opened.directory == root / "grid"
    return opened.directory


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*arguments: str | Path, code: int = 0) -> str:
        with pytest.raises(SystemExit) as end:
            cli.main(list(map(str, arguments)))
        shown = capsys.readouterr()
        assert (end.value.code or 0) == code, shown.err
        return shown.err if code else shown.out

    return run


def test_tables_are_data_frames(directory: Path) -> None:
    opened = bpf.open(directory)
    results, history, trackers = opened.results(), opened.history(), opened.trackers()
    assert list(results.state) == ["complete"] * 4
    assert set(results.algorithm) == {"bp", "dfa"}
    best = {entry["algorithm"]: entry for entry in reversed(opened.best())}
    for rule, group in results.groupby("algorithm"):
        assert group.objective.min() == best[rule]["objective"]["mean"]
    assert len(history) == 4 * 2 * 2
    assert len(trackers) == 4 * 2 * 3
    of_bp = trackers[trackers.algorithm == "bp"]
    assert of_bp["bp_cosine/layer.0"].to_list() == pytest.approx([1.0] * len(of_bp), abs=1e-5)
    assert opened.status()["cells"]["complete"] == 4


def test_python_and_the_command_line_go_on_with_each_other(directory: Path) -> None:
    again = bpf.tune(GRID, directory, data_dir=directory.parent, workers=1, quiet=True)
    assert [session["command"].split()[0] for session in again.experiment.sessions()] == ["bpf.tune", "bpf.tune"]
    with pytest.raises(UsageError, match="holds an experiment with other settings"):
        bpf.tune(GRID | {"scaler": "zero_one"}, directory, data_dir=directory.parent)


def test_a_run_is_trained_in_python(tmp_path: Path) -> None:
    run = {"dataset": "digits", "algorithm": "drtp", "arch": "8", "epochs": 2}
    opened = bpf.train(run, tmp_path / "run", data_dir=tmp_path, quiet=True)
    assert list(opened.history().epoch) == [1, 2]
    assert opened.best_model("drtp") is not None


def test_the_best_model_is_loaded(directory: Path, told: Callable[..., str]) -> None:
    model = bpf.open(directory).best_model("dfa")
    assert model is not None
    network = bpf.load(model)
    assert isinstance(network, torch.nn.Module)
    assert network(torch.zeros(3, 1, 8, 8, dtype=torch.uint8)).shape == (3, 10)
    scores = json.loads(told("evaluate", model, "--data-dir", directory.parent, "--json"))
    winner = next(entry for entry in api.best(open_experiment(directory)) if entry.row.rule == "dfa")
    executions = winner.row.result["executions"]
    best = min(executions, key=lambda execution: execution["objective"])
    assert scores["loss"] == pytest.approx(best["test"]["loss"], rel=1e-6)
    shown = told("evaluate", model, "--data-dir", directory.parent)
    assert "true class (rows), taken for" in shown
    assert f"error {100 * scores['error']:.2f} %" in shown


def test_export_prints_or_writes(directory: Path, told: Callable[..., str], tmp_path: Path) -> None:
    printed = pandas.read_csv(io.StringIO(told("export", directory, "--what", "trackers")))
    assert set(printed["bp_cosine/layer.0"].notna()) == {True}
    told("export", directory, "--what", "history", "--format", "parquet", "--output", tmp_path / "h.parquet")
    written = pandas.read_parquet(tmp_path / "h.parquet")
    assert len(written) == len(bpf.open(directory).history())
    files = told("export", directory, "--what", "metrics", "--output", tmp_path / "metrics").splitlines()
    assert [Path(file).name for file in files] == ["bp.parquet", "dfa.parquet"]
    refused = told("export", directory, "--format", "parquet", code=2)
    assert refused == "Error: --format parquet is not for a terminal: give --output FILE.\n"


def test_the_best_per_parameter(directory: Path, told: Callable[..., str]) -> None:
    cells = api.best(open_experiment(directory))
    expected = [[entry.row.rule, entry.row.params["lr"], entry.row.value] for entry in cells]
    table = pandas.read_csv(io.StringIO(told("best", directory, "--per", "lr", "--csv")))
    assert table[["algorithm", "lr", "objective"]].to_numpy().tolist() == expected
    assert len(json.loads(told("best", directory, "--per", "arch", "--json"))) == 2
    assert "The best by loss per arch" in told("best", directory, "--per", "arch")
    assert told("best", directory, "--per", "archs", code=2) == (
        "Error: 'archs' is no parameter of this grid. Did you mean 'arch'?\n"
    )
    assert told("best", directory, "--csv", code=2) == (
        "Error: --csv is for --per; all cells are exported by `bpf export`.\n"
    )


def test_the_report_is_one_page(directory: Path, told: Callable[..., str], tmp_path: Path) -> None:
    written = told("report", directory, "--output", tmp_path / "page.html", "--figures", "png").splitlines()
    assert written[0] == str(tmp_path / "page.html")
    assert all(Path(path).stat().st_size > 1000 for path in written)
    assert any(path.endswith(".png") for path in written)


def test_event_files_are_written(directory: Path, told: Callable[..., str]) -> None:
    told("tensorboard", directory, "--write-only")
    names = {row.name for row in api.rows(open_experiment(directory))}
    assert names <= {path.name for path in (directory / "tensorboard").rglob("*")}


def test_notifications_tell_how_it_ended(directory: Path, told: Callable[..., str], tmp_path: Path) -> None:
    log = tmp_path / "log"
    told("resume", directory, "--quiet", "--notify", f"cat >> {log}; echo >> {log}")
    summary = json.loads(log.read_text())
    assert (summary["event"], summary["cells"]["complete"]) == ("finished", 4)
    assert set(summary["best"]) == {"bp", "dfa"}
    assert str(log) not in (directory / "experiment.yaml").read_text()
