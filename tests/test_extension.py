"""What is finished is never trained again: more values, executions and epochs, and experiments of an older bpf."""

import json
import tarfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.samplers import GridSampler
from safetensors import safe_open

from bpf.cli import app as cli
from bpf.experiment.directory import open_experiment
from bpf.results import summary
from bpf.study.cells import Row
from bpf.study.view import StudyView

GRID = [
    *("--dataset", "digits", "--algorithm", "bp,drtp", "--arch", "8", "--activation", "tanh", "--no-batch-norm"),
    *("--bw-init", "ortho", "--objective", "val_loss", "--dropout", "0,0.1", "--examples-frac", "1"),
    *("--workers", "1", "--quiet"),
]
DATA = Path(__file__).parent / "data"

pytestmark = pytest.mark.usefixtures("in_this_process")


def run(*arguments: str) -> int:
    try:
        cli.main(list(arguments))
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def command(directory: Path, **changes: Any) -> list[str]:
    settings = {"lr": "0.001,0.01", "epochs": 3, "executions-per-trial": 2} | changes
    return ["tune", str(directory), *GRID, *(word for name, value in settings.items() for word in _option(name, value))]


def tune(directory: Path, **changes: Any) -> None:
    assert run(*command(directory, **changes)) == 0


def _option(name: str, value: Any) -> list[str]:
    return [f"--{name}"] if value is True else [f"--{name}", str(value)]


def outcomes(directory: Path) -> dict[str, Any]:
    """Every cell's state, value, executions and histories by its key, without times."""
    experiment = open_experiment(directory)
    return {
        row.key: (row.state, row.value, _executions(row), _history(directory, row.key))
        for row in summary.rows(experiment)
    }


def _executions(row: Row) -> list[dict[str, Any]]:
    return [_untimed(execution) for execution in (row.result or {}).get("executions", [])]


def _history(directory: Path, key: str) -> list[dict[str, Any]]:
    return [_untimed(execution) for execution in summary.history(open_experiment(directory), key)]


def _untimed(execution: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in execution.items() if k not in ("seconds", "tracking_seconds") and v != {}}


def attempts(directory: Path) -> list[int]:
    return [row.attempt for row in summary.rows(open_experiment(directory))]


def assert_optuna_agrees(directory: Path) -> None:
    experiment = open_experiment(directory)
    rows = summary.rows(experiment)
    with closing(experiment.open_study()) as study:
        spaces = {rule: (study.study_name(rule), study.search_space(rule)) for rule in experiment.grid.algorithm}
    for rule, (name, space) in spaces.items():
        loaded = optuna.load_study(study_name=name, storage=f"sqlite:///{directory / 'study.db'}")
        cells = [row for row in rows if row.rule == rule]
        assert {trial.number: trial.value for trial in loaded.trials} == {row.trial_number: row.value for row in cells}
        assert {trial.state for trial in loaded.trials} == {optuna.trial.TrialState.COMPLETE}
        assert all(trial.duration is not None for trial in loaded.trials)
        assert GridSampler(space).is_exhausted(loaded)
        loaded._storage.remove_session()


@pytest.fixture(scope="module")
def longest(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Five epochs from the start."""
    directory = tmp_path_factory.mktemp("longest") / "grid"
    tune(directory, epochs=5)
    return outcomes(directory)


def test_more_epochs_go_on_from_the_kept_checkpoints(longest: dict[str, Any], tmp_path: Path) -> None:
    directory = tmp_path / "grid"
    tune(directory, epochs=2, **{"keep-checkpoints": True})
    kept = set((directory / "checkpoints").iterdir())
    first = outcomes(directory)
    assert set(first) != set(longest)
    tune(directory, epochs=3)  # that checkpoints are kept need not be said again
    tune(directory, epochs=5)
    assert outcomes(directory) == longest
    assert set((directory / "checkpoints").iterdir()) == kept
    assert set(attempts(directory)) == {3}
    assert_optuna_agrees(directory)


def test_more_epochs_really_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The time of the first epochs counts, and a checkpoint that is spoilt is noticed."""
    directory = tmp_path / "grid"
    tune(directory, epochs=2, **{"keep-checkpoints": True})
    for path in (directory / "checkpoints").iterdir():
        path.write_bytes(b"spoilt")
    assert run(*command(directory, epochs=3, **{"executions-per-trial": 2})) == 1
    assert "is damaged and cannot be read" in capsys.readouterr().err


def test_more_epochs_without_checkpoints_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "grid"
    tune(directory)
    before = outcomes(directory), (directory / "experiment.yaml").read_text()
    assert run(*command(directory, epochs=4, **{"executions-per-trial": 2})) == 2
    assert capsys.readouterr().err == (
        "Error: epochs can grow from 3 to 4 only where the checkpoints of finished cells were kept "
        "(--keep-checkpoints), and those of 8 cells were not. Choose another directory.\n"
    )
    assert (outcomes(directory), (directory / "experiment.yaml").read_text()) == before


def test_more_executions_train_only_the_missing_ones(tmp_path: Path) -> None:
    directory, whole = tmp_path / "grid", tmp_path / "whole"
    tune(directory)
    first = {row.key: row for row in summary.rows(open_experiment(directory))}
    tune(directory, **{"executions-per-trial": 4})
    tune(whole, **{"executions-per-trial": 4})
    assert outcomes(directory) == outcomes(whole)
    for row in summary.rows(open_experiment(directory)):
        earlier = first[row.key]
        assert row.result["executions"][:2] == earlier.result["executions"], "with their seconds: not trained again"
        assert (row.trial_id, row.name) == (earlier.trial_id, earlier.name)
    assert_optuna_agrees(directory)


def test_executions_and_values_grow_together(tmp_path: Path) -> None:
    directory, whole = tmp_path / "grid", tmp_path / "whole"
    tune(directory)
    tune(directory, lr="0.0001,0.001,0.01", **{"executions-per-trial": 3})
    tune(whole, lr="0.001,0.01,0.0001", **{"executions-per-trial": 3})
    assert outcomes(directory) == outcomes(whole)
    assert_optuna_agrees(directory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"epochs": 4, "executions-per-trial": 3},
            "epochs can grow from 3 to 4 only on their own, not together with executions_per_trial. "
            "Do one after the other.",
        ),
        ({"epochs": 2}, "  epochs: 3 there, 2 now\n"),
        ({"executions-per-trial": 1}, "  executions_per_trial: 2 there, 1 now\n"),
    ],
)
def test_what_cannot_grow_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "grid"
    tune(directory, **{"keep-checkpoints": True})
    before = outcomes(directory)
    assert run(*command(directory, **changes)) == 2
    assert message in capsys.readouterr().err
    assert outcomes(directory) == before


def test_epochs_cannot_grow_after_executions_were_added(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "grid"
    tune(directory, **{"keep-checkpoints": True})
    tune(directory, **{"executions-per-trial": 3})
    assert run(*command(directory, epochs=4, **{"executions-per-trial": 3})) == 2
    assert "those of 8 cells were not" in capsys.readouterr().err


def test_a_single_run_goes_on_for_more_epochs(tmp_path: Path) -> None:
    def train(directory: Path, epochs: int) -> dict[str, Any]:
        options = ("--dataset", "digits", "--algorithm", "dfa", "--arch", "8", "--keep-checkpoints", "--quiet")
        assert run("train", str(directory), *options, "--epochs", str(epochs)) == 0
        return outcomes(directory)

    train(tmp_path / "run", 2)
    assert train(tmp_path / "run", 4) == train(tmp_path / "whole", 4)


# What is kept, and what is not


def test_the_best_model_of_each_rule_is_kept(tmp_path: Path) -> None:
    directory = tmp_path / "grid"
    tune(directory)
    best = {entry.row.rule: entry.row for entry in reversed(summary.best(open_experiment(directory)))}
    found = {path.parent.name: path for path in (directory / "models").glob("*/*")}
    assert {rule: path.stem for rule, path in found.items()} == {rule: row.key for rule, row in best.items()}
    for rule, path in found.items():
        with safe_open(path, "pt") as file:
            told = file.metadata()
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        assert told["format"] == "bpf-model-1"
        spec, executions = json.loads(told["spec"]), best[rule].result["executions"]
        assert (spec["algorithm"], spec["lr"]) == (rule, best[rule].params["lr"])
        assert spec["seed"] == min(executions, key=lambda execution: execution["objective"])["seed"]
        assert (json.loads(told["shape"]), json.loads(told["classes"])) == ([1, 8, 8], [str(n) for n in range(10)])
        assert (8, 64) in shapes.values()
        assert (10, 8) in shapes.values()
    assert not list(directory.glob("checkpoints/*"))


def clean(directory: Path, *options: str, read: Callable[[], str]) -> dict[str, Any]:
    assert run("clean", str(directory), "--json", *options) == 0
    return json.loads(read())


def test_cleaning_removes_what_nothing_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "grid"
    tune(directory, **{"keep-checkpoints": True})
    capsys.readouterr()
    with StudyView.open(directory / "study.db") as study:
        best, rows = study.best("bp"), study.rows(rule="bp")
    assert best is not None
    worse = next(row for row in rows if row.key != best[0])
    foreign = {
        directory / "checkpoints" / "mine.pt",
        directory / "checkpoints" / "0123456789abcdef.pt",
        directory / "checkpoints" / ".0123456789abcdef.pt.0a1b2c3d",
        directory / "checkpoints" / f"{worse.cohort}.pt.damaged",
        directory / "models" / "bp" / "paper.safetensors",
        directory / "models" / "bp" / "0123456789abcdef.safetensors",
        directory / "models" / "bp" / f"{worse.key}-copy.safetensors",
        directory / "locks" / "poetry.lock",
        directory / "study.new.db-notes",
        directory / ".notes.markdown",
        directory / ".env.template",
    }
    for path in foreign:
        path.write_bytes(b"of somebody else")
    needed = {path for path in directory.rglob("*") if path.is_file()}
    litter = {
        directory / "checkpoints" / f".{worse.cohort}.pt.0a1b2c3d",
        directory / "models" / "bp" / f"{worse.key}.safetensors",
        directory / "models" / "bp" / f".{best[0]}.safetensors.0a1b2c3d",
        directory / ".experiment.yaml.0a1b2c3d",
        directory / "study.new.db-wal",
    }
    for path in litter:
        path.write_bytes(b"litter")
    before = outcomes(directory)

    def read() -> str:
        return capsys.readouterr().out

    told = clean(directory, "--dry-run", read=read)
    expected = sorted(map(str, litter))
    assert told == {"files": expected, "bytes": 6 * len(expected)}
    assert clean(directory, read=read) == told
    assert {path for path in directory.rglob("*") if path.is_file()} == needed
    kept = sorted(str(path) for path in (directory / "checkpoints").iterdir() if path not in foreign)
    assert clean(directory, "--checkpoints", read=read)["files"] == kept
    assert outcomes(directory) == before


# Older formats


@pytest.fixture(params=["0.1", "0.2"])
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A grid of an older bpf whose second cohort was killed in its third epoch."""
    with tarfile.open(DATA / f"experiment-{request.param}.tar.xz") as archive:
        archive.extractall(tmp_path / request.param, filter="data")
    return tmp_path / request.param / "old"


def blurred(value: Any, name: str = "") -> Any:
    """With errors in single precision, as bpf 0.1 had them."""
    if isinstance(value, dict):
        return {key: blurred(one, str(key)) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [blurred(one, name) for one in value]
    return float(np.float32(value)) if name.endswith("error") and isinstance(value, float) else value


def test_an_experiment_of_an_older_bpf_goes_on(old: Path, tmp_path: Path) -> None:
    options = [
        *("--dataset", "digits", "--algorithm", "bp,drtp", "--arch", "8", "--activation", "tanh", "--no-batch-norm"),
        *("--bw-init", "ortho", "--lr", "0.001,0.01", "--epochs", "4", "--examples-frac", "0.5"),
        *("--executions-per-trial", "2", "--workers", "1", "--quiet"),
        *(word for name in open_experiment(old).grid.trackers for word in ("--tracker", name)),
    ]
    assert run("resume", str(old), "--workers", "1", "--quiet") == 0
    assert run("tune", str(tmp_path / "new"), *options) == 0
    rows = summary.rows(open_experiment(old))
    assert [(row.state, row.attempt) for row in rows] == [("complete", 1)] * 2 + [("complete", 2)] * 2
    assert blurred(outcomes(old)) == blurred(outcomes(tmp_path / "new"))
    assert_optuna_agrees(old)
    assert run("tune", str(old), *options) == 0, "the same command opens it, too"
    options[options.index("--activation") + 1] = "tanh,elu"
    assert run("tune", str(old), *options, "--init", "orthogonal,akrout") == 0, "with words that it did not know"
    assert [row.state for row in summary.rows(open_experiment(old))] == ["complete"] * 12
    assert_optuna_agrees(old)


def test_an_experiment_of_an_older_bpf_is_read(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment = open_experiment(old)
    assert summary.status(experiment)["cells"] | {"total": 4} == {
        "total": 4, "pending": 0, "interrupted": 2, "running": 0, "complete": 2, "diverged": 0, "failed": 0,
    }  # fmt: skip
    complete = [row for row in summary.rows(experiment) if row.state == "complete"]
    assert all(row.cost > 0 for row in complete)
    assert [len(summary.history(experiment, row.key)) for row in complete] == [2, 2]
    provenance = summary.provenance(experiment)
    assert provenance["sessions"][0]["command"].startswith("bpf tune old")
    assert provenance["sessions"][-1]["versions"]["bpf"] == f"{old.parent.name}.0"
    assert run("report", str(old), "--output", str(old.parent / "page.html")) == 0
    assert '<th class="number">complete</th>' in (old.parent / "page.html").read_text()
    for model in (old / "models").glob("*/*"):  # bpf 0.1 kept none
        assert run("evaluate", str(model), "--json") == 0
        scores = json.loads(capsys.readouterr().out.rpartition("page.html\n")[2])
        executions = [execution for row in complete for execution in (row.result or {})["executions"]]
        assert scores["error"] in [execution["test"]["error"] for execution in executions]
