"""Winners at the edge of what was tried, and the commands that go beyond it."""

import shlex
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bpf.cli import app as cli
from bpf.experiment.directory import Experiment, open_experiment
from bpf.experiment.further import Further, further
from bpf.experiment.places import checkpoint_path
from bpf.report.block import block
from bpf.report.text_sections import ranking
from bpf.results import summary
from bpf.spec.fields import Limits, limits
from bpf.spec.grid import GridSpec
from bpf.study.cells import Row
from bpf.study.edges import Edge, find
from bpf.study.ranking import Ranked, Spread, rank, winners
from invented import finished, planned, record

pytestmark = pytest.mark.usefixtures("in_this_process", "empty_place")


@pytest.fixture
def bpf(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Run a command that must succeed; returns what it printed."""

    def run(command: str) -> str:
        words = shlex.split(command.removeprefix("bpf "))
        monkeypatch.setattr("sys.argv", ["bpf", *words])  # as an experiment remembers it
        capsys.readouterr()
        with suppress(SystemExit):
            cli.main(words)
        told = capsys.readouterr()
        assert not told.err, told.err
        return told.out

    return run


def best(value: Callable[[Row], float], **more: Any) -> Callable[[Row, int], dict[str, Any]]:
    """Executions whose objective, in their second of three epochs, is `value` of the cell."""
    return lambda row, number: record(number, [value(row) + 1, value(row), value(row) + 1], **more)


def found(experiment: Experiment) -> Further:
    with closing(experiment.read_study()) as study:
        return further(experiment, study, winners(rank(study.rows())))


def edges(experiment: Experiment) -> list[tuple[str, str, float, float]]:
    return [(edge.rule, edge.parameter, edge.value, edge.beyond) for edge in found(experiment).edges]


# What lies at an edge


def test_each_rules_winner_is_looked_at(empty_place: Path) -> None:
    wanted = {"bp": 0.1, "dfa": 0.001, "drtp": 0.01}
    lies = best(lambda row: abs(row.params["lr"] - wanted[row.rule]))
    experiment = finished(empty_place / "ex", lies, algorithm="bp,dfa,drtp", lr="0.1,0.001,0.01")
    assert sorted(edges(experiment)) == [("bp", "lr", 0.1, 1.0), ("dfa", "lr", 0.001, 0.0001)]
    assert [str(edge) for edge in sorted(found(experiment).edges, key=lambda edge: edge.rule)] == [
        "bp: lr=0.1 is the largest of its values",
        "dfa: lr=0.001 is the smallest of its values",
    ]


@pytest.mark.parametrize(
    ("name", "values", "at", "beyond"),
    [
        ("lr", [0.0001, 0.001], 0.001, 0.01),
        ("lr", [0.001, 0.0001], 0.0001, 1e-5),
        ("lr", [0.003, 0.01], 0.01, 0.0333),
        ("lr", [0.1, 0.2, 0.3], 0.3, 0.4),
        ("lr", [0.1, 0.2, 0.3], 0.1, 0.05),
        ("lr", [1.0, 5.0], 5.0, 10.0),
        ("lr", [1.0, 10.0], 10.0, None),
        ("lr", [0.1], 0.1, None),
        ("lr", [0.1, 1.0, 5.0], 1.0, None),
        ("lr", [0.12345, 0.12346], 0.12346, 0.12347),
        ("dropout", [0.0, 0.1, 0.2], 0.2, 0.3),
        ("dropout", [0.0, 0.1, 0.2], 0.0, None),
        ("dropout", [0.2, 0.3], 0.2, 0.1),
        ("dropout", [0.5, 0.9], 0.9, 0.95),
        ("weight_decay", [0.0, 0.001], 0.001, 0.01),
        ("weight_decay", [0.0, 0.001], 0.0, None),
        ("weight_decay", [0.001, 0.01, 0.1], 0.001, 0.0001),
        ("weight_decay", [0.1, 1.0], 1.0, None),
        ("batch_size", [32, 64], 64, 128),
        ("batch_size", [32, 64], 32, 16),
        ("batch_size", [1, 64], 1, None),
        ("batch_size", [3, 2], 2, 1),
        ("batch_size", [100_000, 1_000_000], 1_000_000, None),
    ],
)
def test_the_next_value_goes_on_as_the_list_does(
    empty_place: Path, name: str, values: list[float], at: float, beyond: float | None
) -> None:
    row = planned_row(empty_place, {name: at})
    found = find([row], {"dfa": {name: values}}, lambda rule, name: limits(GridSpec, name))
    expected = [] if beyond is None else [Edge("dfa", name, at, pytest.approx(beyond, rel=2e-3))]
    assert found == expected
    assert all(type(edge.beyond) is type(at) for edge in found)


def planned_row(empty_place: Path, params: dict[str, Any], **changes: Any) -> Ranked:
    """A winner with these parameters, whose executions have their best epochs and ends as given."""
    (row,) = summary.rows(planned(empty_place / "one"))
    best, ends = changes.get("best", [2, 2]), changes.get("ends", [3, 3])
    result = {"executions": [{"best_epoch": one, "epochs": end} for one, end in zip(best, ends, strict=True)]}
    return Ranked(replace(row, params=params, result=result), Spread([0.1] * len(best)), best, {})


def test_a_rules_own_numbers_have_edges_and_words_have_none(empty_place: Path) -> None:
    row = planned_row(empty_place, {"dfa.scale": 4, "dfa.word": "b", "dfa.flag": True, "arch": "9", "dfa.mixed": 2})
    tried = {"dfa.scale": [1, 2, 4], "dfa.word": ["a", "b"], "dfa.flag": [False, True], "arch": ["8", "9"]}
    known = {"dfa": {**tried, "dfa.mixed": [1, "auto", 2]}}
    assert find([row], known, lambda rule, name: Limits(0, 100)) == [Edge("dfa", "dfa.scale", 4, 8)]
    assert find([row], known, lambda rule, name: Limits(0, 6)) == [Edge("dfa", "dfa.scale", 4, 6)]
    assert find([row], known, lambda rule, name: Limits(0, 5, high_excluded=True)) == []
    assert find([row], known, lambda rule, name: None) == []
    negative = {"dfa": {"dfa.scale": [-1.0, -2.0, 4]}}
    low = planned_row(empty_place, {"dfa.scale": -2.0})
    assert find([low], negative, lambda rule, name: Limits()) == [Edge("dfa", "dfa.scale", -2.0, -3.0)]


@pytest.mark.parametrize(
    ("best", "ends", "late"),
    [
        ([3, 3, 3], [3, 3, 3], 3),
        ([3, 2, 3], [3, 3, 3], 2),
        ([3, 2], [3, 3], None),
        ([2, 2, 2], [3, 3, 3], None),
        ([3, 3, 1], [3, 3, 2], None),
        ([2, 2, 2], [2, 2, 2], None),
    ],
)
def test_most_executions_have_their_best_epoch_at_the_end(
    empty_place: Path, best: list[int], ends: list[int], late: int | None
) -> None:
    row = planned_row(empty_place, {}, best=best, ends=ends)
    found = find([row], {"dfa": {}}, lambda rule, name: None)
    assert found == ([] if late is None else [Edge("dfa", "epochs", 3, 6, late, len(best))])
    if late:
        assert str(found[0]) == f"dfa: the last epoch, 3, is the best in {late} of 3 executions"


def test_a_rule_that_is_not_finished_has_no_edge_yet_and_a_single_execution_none_at_all(empty_place: Path) -> None:
    experiment = planned(empty_place / "ex", lr="0.1,0.2")
    assert found(experiment) == Further()
    done = finished(empty_place / "done", best(lambda row: row.params["lr"]), lr="0.1,0.2")
    assert edges(done) == [("dfa", "lr", 0.1, 0.05)]
    assert found(replace(done, kind="train")) == Further()


def test_a_value_whose_cells_diverged_was_tried(empty_place: Path) -> None:
    def lies(row: Row, number: int) -> dict[str, Any]:
        lost = row.params["lr"] == 1.0
        return record(number, [1.0, None] if lost else [2.0, 1.0 - row.params["lr"], 2.0])

    assert edges(finished(empty_place / "ex", lies, lr="0.01,0.1,1")) == []


# Commands that go beyond


GRID = "tune ex --dataset digits --algorithm bp,dfa --arch 8 --activation tanh --no-batch-norm --bw-init ortho "
GRID += "--examples-frac 0.2 --executions-per-trial 1 --workers 1 --quiet"


def commands(told: str) -> list[str]:
    return [line.strip() for line in told.splitlines() if line.startswith("  bpf ")]


def attempts(directory: str) -> dict[str, tuple[Any, ...]]:
    return {row.key: (row.value, row.attempt) for row in summary.rows(open_experiment(Path(directory)))}


@pytest.mark.parametrize("keep", [False, True])
def test_the_commands_extend_a_grid_and_train_nothing_twice(bpf: Callable[[str], str], keep: bool) -> None:
    told = bpf(f"{GRID} --lr 0.00001,0.0001 --epochs 2{' --keep-checkpoints' * keep} --data-dir 'my data'")
    beyond = told[told.index("Winners at the edge") :].splitlines()
    assert set(beyond[1:5]) == {
        f"  {rule}: {what}"
        for rule in ("bp", "dfa")
        for what in (
            "lr=0.0001 is the largest of its values",
            "the last epoch, 2, is the best in 1 of 1 executions",
        )
    }
    assert bpf("best ex").endswith("\n".join(beyond) + "\n")
    before = attempts("ex")
    first, *others = commands(told)
    assert first.startswith("bpf tune ex ")
    assert "--lr 1e-05,0.0001,0.001 " in first
    assert ("--epochs 4 " in first) == keep
    assert len(others) == (not keep)

    bpf(f"{first} --workers 1 --quiet")
    rows = summary.rows(open_experiment(Path("ex")))
    assert {row.params["lr"] for row in rows} == {1e-5, 1e-4, 1e-3}
    assert {row.state for row in rows} == {"complete"}
    if keep:
        ends = {run["epochs"] for row in rows for run in row.result["executions"]}
        assert ends == {4}
        assert not before.keys() & attempts("ex").keys(), "the epochs are part of what a cell is"
    else:
        assert before.items() <= attempts("ex").items()
        [longer] = others
        assert longer.startswith("bpf tune ex-4-epochs ")
        assert "--keep-checkpoints" in longer
        bpf(f"{longer} --workers 1 --quiet")
        copy = open_experiment(Path("ex-4-epochs"))
        assert (copy.grid.epochs, copy.keep_checkpoints, copy.grid.lr) == (4, True, (1e-5, 1e-4, 1e-3))
        assert copy.data_dir == Path("my data").resolve()


def test_kept_checkpoints_that_are_gone_make_a_new_directory(empty_place: Path) -> None:
    experiment = finished(empty_place / "ex", lambda row, number: record(number, [3.0, 2.0, 1.0]))
    kept = replace(experiment, keep_checkpoints=True)
    [command] = found(kept).commands.values()
    assert shlex.split(command)[2] == str(empty_place / "ex-6-epochs")
    for row in summary.rows(experiment):
        path = checkpoint_path(kept.files, str(row.cohort))
        path.parent.mkdir(exist_ok=True)
        path.touch()
    [command] = found(kept).commands.values()
    assert shlex.split(command)[2] == str(empty_place / "ex")
    assert "--epochs 6" in command


def test_a_second_phase_goes_on_with_the_rates_it_took(bpf: Callable[[str], str]) -> None:
    bpf(f"{GRID} --lr 0.001,0.01 --epochs 1")
    second = GRID.replace("tune ex ", "tune second ")
    bpf(f"{second} --epochs 2 --objective val_loss --dropout 0.6,0.9 --batch-size 64 --lr-from ex")
    experiment = open_experiment(Path("second"))
    told = bpf("best second")
    [*_, dropout] = [line for line in told.splitlines() if "dropout=" in line and "values" in line]
    assert dropout.endswith("dropout=0.6 is the smallest of its values")
    extend, longer = commands(told)
    assert "--dropout 0.6,0.9,0.3" in extend
    assert "--lr " not in extend
    assert extend.endswith(" --lr-from ex")
    before = attempts("second")
    bpf(f"{extend} --workers 1 --quiet")
    assert before.items() <= attempts("second").items()
    assert len(attempts("second")) == 6
    bpf(f"{longer} --plan-only")
    assert open_experiment(Path("second-4-epochs")).grid.lr_from == experiment.grid.lr_from
    Path("ex").rename("moved")
    assert commands(bpf("best second")) == [], "it is not known where the learning rates are now"


def test_the_report_says_it_too(empty_place: Path) -> None:
    experiment = finished(empty_place / "ex", best(lambda row: row.params["lr"]), lr="0.1,0.2")
    section = ranking(block("x", experiment))
    [edge, command] = ["dfa: lr=0.1 is the smallest of its values", *found(experiment).commands.values()]
    assert section.notes[1:] == [f"At the edge of what was tried, so that better ones may lie beyond: {edge}."]
    assert section.codes == {"Go beyond these edges in the same experiment": command}


def test_a_rules_own_option_stays_within_its_range(bpf: Callable[[str], str]) -> None:
    grid = GRID.replace("bp,dfa", "pepita").replace("--bw-init ortho ", "")
    told = bpf(f"{grid} --lr 0.001 --epochs 1 --option pepita.feedback_scale=0.01,0.05")
    assert "pepita.feedback_scale=0.0" in told
    [extend, _] = commands(told)
    values = {"smallest": "0.01,0.05,0.002", "largest": "0.01,0.05,0.25"}
    assert any(f"--option pepita.feedback_scale={values[end]}" in extend for end in values if end in told)
    bpf(f"{extend} --workers 1 --quiet")
    assert len(attempts("ex")) == 3
