"""Any process may be killed at any moment: the grid goes on to the numbers of an undisturbed run."""

import json
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.samplers import GridSampler

from bpf import api, cli
from bpf.experiment import open_experiment

RULES = ("bp", "drtp", "ll-cce")
GRID = [
    *("--dataset", "digits", "--algorithm", ",".join(RULES), "--arch", "12,9-7", "--activation", "tanh"),
    *("--batch-norm", "--bw-init", "ortho", "--lr", "0.001,0.01", "--epochs", "4", "--examples-frac", "1"),
    *("--executions-per-trial", "2", "--quiet"),
]
# Runs the command line, and kills the process without warning at the n-th call of a function, before it or after.
KILLER = """
import importlib, os, signal, sys
module, name, when, count, *arguments = sys.argv[1:]
owner = importlib.import_module(module)
*path, last = name.split(".")
for part in path:
    owner = getattr(owner, part)
original, left = getattr(owner, last), int(count)
def deadly(*args, **kwargs):
    global left
    left -= 1
    if left == 0 and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    result = original(*args, **kwargs)
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return result
setattr(owner, last, deadly)
from bpf.cli import main
main(arguments)
"""


def run(*arguments: str) -> int:
    try:
        cli.main(list(arguments))
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def killed(place: tuple[str, str, str, int], *arguments: str) -> None:
    command = [sys.executable, "-c", KILLER, *map(str, place), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def outcomes(directory: Path) -> dict[str, Any]:
    """Every cell's state, executions and history by its key, without times."""
    found = {}
    for row in api.rows(open_experiment(directory)):
        executions = [{k: v for k, v in e.items() if k != "seconds"} for e in row.result["executions"]]
        histories = [
            {k: v for k, v in e.items() if k != "seconds"}
            for e in json.loads((directory / "logs" / f"{row.key}.json").read_text())
        ]
        found[row.key] = (row.state, row.value, executions, histories)
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("undisturbed") / "grid"
    assert run("tune", str(directory), *GRID) == 0
    return outcomes(directory)


@pytest.mark.parametrize(
    "place",
    [
        ("bpf.checkpoint", "save", "after", 3),
        ("bpf.files", "os.fsync", "before", 6),
        ("bpf.files", "sync_directory", "before", 4),
        ("bpf.training", "Cohort.run_epoch", "after", 6),
        ("bpf.study", "Study.claim", "after", 2),
        ("bpf.study", "Study.finish", "before", 2),
        ("bpf.study", "Study.finish", "after", 3),
        ("bpf.study", "Study.plan", "after", 1),
        ("bpf.experiment", "Experiment.save", "before", 1),
    ],
    ids=lambda place: " ".join(map(str, place[1:])),
)
def test_killed_at_any_place_it_resumes_to_the_same_numbers(
    place: tuple[str, str, str, int], undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    directory = tmp_path / "grid"
    killed(place, "tune", str(directory), *GRID, "--checkpoint-every", "0")
    assert run("tune", str(directory), *GRID, "--checkpoint-every", "0") == 0
    assert outcomes(directory) == undisturbed
    assert not list((directory / "checkpoints").glob("*"))
    assert_ran_once(directory)


def test_killed_again_and_again_it_resumes_to_the_same_numbers(undisturbed: dict[str, Any], tmp_path: Path) -> None:
    directory = tmp_path / "grid"
    killed(("bpf.checkpoint", "save", "after", 2), "tune", str(directory), *GRID, "--checkpoint-every", "0")
    for place in (("bpf.checkpoint", "save", "before", 4), ("bpf.study", "Study.finish", "after", 1)):
        killed(place, "resume", str(directory), "--quiet", "--checkpoint-every", "0")
    assert run("resume", str(directory), "--quiet") == 0
    assert outcomes(directory) == undisturbed
    assert_ran_once(directory)


def test_a_resume_really_continues_and_does_not_start_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bpf.training import Cohort

    directory = tmp_path / "run"
    arguments = ("--dataset", "digits", "--algorithm", "dfa", "--epochs", "5", "--arch", "8", "--quiet")
    killed(("bpf.checkpoint", "save", "after", 3), "train", str(directory), *arguments, "--checkpoint-every", "0")
    epochs = []
    original = Cohort.run_epoch
    monkeypatch.setattr(Cohort, "run_epoch", lambda self: (epochs.append(self.epoch), original(self)))
    assert run("resume", str(directory), "--quiet") == 0
    assert epochs == [3, 4]


def assert_ran_once(directory: Path) -> None:
    """Each cell has one trial, complete, and stock Optuna sees a finished grid."""
    experiment = open_experiment(directory)
    rows = api.rows(experiment)
    with closing(experiment.open_study()) as study:
        spaces = {rule: (study.study_name(rule), study.search_space(rule)) for rule in RULES}
    for rule, (name, space) in spaces.items():
        loaded = optuna.load_study(study_name=name, storage=f"sqlite:///{experiment.database}")
        trials = loaded.get_trials()
        cells = [row for row in rows if row.rule == rule]
        assert [trial.state for trial in trials] == [optuna.trial.TrialState.COMPLETE] * len(cells)
        assert {trial.number: trial.value for trial in trials} == {row.trial_number: row.value for row in cells}
        assert GridSampler(space).is_exhausted(loaded)
        assert loaded.best_value == min(row.value for row in cells)
        loaded._storage.remove_session()
