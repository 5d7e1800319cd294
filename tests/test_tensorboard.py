"""TensorBoard itself reads what is written: curves, histograms and parameters, of several experiments side by side."""

import json
import math
import os
import secrets
import signal
import subprocess
import sys
import textwrap
import urllib.request
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bpf import api
from bpf.errors import RunError, UsageError
from bpf.experiment.directory import Experiment
from bpf.experiment.places import model_path
from bpf.results import models, summary, tensorboard
from bpf.spec.run import RunSpec
from bpf.study.cells import Row
from bpf.words import describe
from invented import finished, planned, record
from waiting import SECONDS, eventually

pytest.importorskip("tensorboard")

LRS = [0.001 * (number + 1) for number in range(25)]


def invent(row: Row, number: int) -> dict[str, Any]:
    """Losses that tell cells and executions apart, and one tracker's value."""
    start = row.ordinal + number / 2
    tracked = {"step": [0, 20, 40, 60], "epoch": [0, 1.0, 2.0, 3.0], "bp_cosine/layer.0": [0.0, 0.1, 0.2, start]}
    return record(number, [start + 3, start + 2, start + 1], tracked)


def read(directory: Path) -> Any:
    """By TensorBoard's own reader of many runs."""
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(directory))
    multiplexer.Reload()
    return multiplexer


def named(experiment: Experiment, row: Row) -> str:
    """A cell's run, as TensorBoard calls it."""
    return f"{row.rule}/{tensorboard.run_name(row, summary.varying(experiment))}"


def run_of(experiment: Experiment, directory: Path, per: str = "cell") -> Any:
    """The only cell of an experiment, as TensorBoard reads it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert tensorboard.write(experiment, directory, per) == 1
    (path,) = directory.glob("*/*")
    accumulator = EventAccumulator(str(path), size_guidance={"histograms": 0})  # else it keeps one of them
    accumulator.Reload()
    return accumulator


def curve(events: list[Any]) -> list[tuple[int, float]]:
    return [(event.step, pytest.approx(event.value)) for event in events]


def rows(experiment: Experiment) -> list[Row]:
    with closing(experiment.read_study()) as study:
        return study.rows()


def files(directory: Path) -> dict[Path, bytes]:
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_hundred_runs_of_two_experiments_are_read_side_by_side(tmp_path: Path) -> None:
    made = [
        finished(tmp_path / name, invent, algorithm=["bp", "dfa"], lr=LRS, executions_per_trial=2)
        for name in ("one", "two")
    ]
    logs = tmp_path / "logs"
    assert [tensorboard.write(experiment, logs, "execution") for experiment in made] == [50, 50]
    multiplexer = read(logs)
    found = [row for experiment in made for row in rows(experiment)]
    expected = {f"{row.rule}/lr={row.params['lr']:g} {row.name}": row for row in found}
    assert len(expected) == 100
    assert set(multiplexer.Runs()) == {".", *expected}
    for run, row in expected.items():
        start = row.ordinal
        assert curve(multiplexer.Scalars(run, "loss/seed 0")) == [(1, start + 3), (2, start + 2), (3, start + 1)]
        assert curve(multiplexer.Scalars(run, "loss/seed 1")) == [(1, start + 3.5), (2, start + 2.5), (3, start + 1.5)]
        assert curve(multiplexer.Scalars(run, "loss/mean")) == [(1, start + 3.25), (2, start + 2.25), (3, start + 1.25)]
        measured = [(0, 0.0), (1, 0.1), (2, 0.2), (3, start + 0.25)]
        assert curve(multiplexer.Scalars(run, "bp_cosine/layer.0/mean")) == measured
        assert curve(multiplexer.Scalars(run, "objective")) == [(3, row.value)]
        assert curve(multiplexer.Scalars(run, "test/loss")) == [(3, 2 * start + 2.5)]
        assert curve(multiplexer.Scalars(run, "test/error")) == [(3, 0.25)]


def test_runs_say_what_they_are(tmp_path: Path) -> None:
    experiment = finished(tmp_path / "mine", invent, arch=["8", "8-4"], lr=LRS[:2], batch_norm=[False, True])
    tensorboard.write(experiment, tmp_path / "logs")
    runs = set(read(tmp_path / "logs").Runs()) - {"."}
    told = [{name: row.params[name] for name in ("arch", "batch_norm", "lr")} for row in rows(experiment)]
    assert runs == {f"dfa/{describe(one)} {row.name}" for one, row in zip(told, rows(experiment), strict=True)}
    assert f"dfa/arch=8 bn=no lr={LRS[0]:g} {rows(experiment)[0].name}" in runs
    row = rows(experiment)[0]
    long = replace(row, params={"arch": "-".join(["1000"] * 90), "x/../y": "\x1b"}, name="brave-otter-417")
    name = tensorboard.run_name(long, ["arch", "x/../y"])
    assert (len(name), name.endswith(" brave-otter-417")) == (tensorboard.LONGEST, True)
    assert "/" not in tensorboard.run_name(long, ["x/../y"])
    assert "\x1b" not in tensorboard.run_name(long, ["x/../y"])
    assert tensorboard.run_name(replace(long, params={"kind": "a é b"}), ["kind"]) == "kind=a___b brave-otter-417"


def test_executions_have_curves_of_their_own_if_asked_for(tmp_path: Path) -> None:
    experiment = finished(tmp_path / "mine", invent, executions_per_trial=2)
    for per, seeds in (("cell", set()), ("execution", {"loss/seed 0", "loss/seed 1"}), ("cell", set())):
        tensorboard.write(experiment, tmp_path / "logs", per)
        multiplexer = read(tmp_path / "logs")
        (run,) = set(multiplexer.Runs()) - {"."}
        tags = set(multiplexer.Runs()[run]["scalars"])
        assert {tag for tag in tags if tag.startswith("loss/")} == {"loss/mean", *seeds}
    with pytest.raises(UsageError, match="no curve per 'seed': give cell or execution"):
        tensorboard.write(experiment, tmp_path / "logs", "seed")


def test_what_had_another_name_does_not_stay_beside_it(tmp_path: Path) -> None:
    """As before a grid grew, or as an older bpf called it; what somebody else has put there does."""
    experiment = finished(tmp_path / "mine", invent, lr=LRS[:2])
    logs, (row, other) = tmp_path / "logs", rows(experiment)
    older, with_notes = logs / "dfa" / row.name, logs / "dfa" / f"bn=no {other.name}"
    foreign = [logs / "dfa" / f"x{row.name}" / tensorboard.FILE, with_notes / "notes.txt", logs / "dfa/mine/events.out"]
    foreign += [logs / "dfa" / f"{mine} {row.name}" / tensorboard.FILE for mine in ("mine", "of lr=1")]
    foreign += [logs / "dfa" / f"lr=7 {row.name}" / tensorboard.FILE / "a folder of that name"]
    for path in (older / tensorboard.FILE, with_notes / tensorboard.FILE, *foreign):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("older")
    (logs / "dfa" / f"lr=9 {row.name}").symlink_to(foreign[0].parent)
    tensorboard.write(experiment, logs)
    assert not older.exists()
    assert not (with_notes / tensorboard.FILE).exists()
    assert all(path.read_text() == "older" for path in foreign)


def test_nothing_is_removed_through_a_link(tmp_path: Path) -> None:
    experiment = finished(tmp_path / "mine", invent, lr=LRS[:2])
    logs, (row, _) = tmp_path / "logs", rows(experiment)
    kept = tmp_path / "elsewhere" / row.name / tensorboard.FILE
    kept.parent.mkdir(parents=True)
    kept.write_text("older")
    logs.mkdir()
    (logs / "dfa").symlink_to(tmp_path / "elsewhere")
    tensorboard.write(experiment, logs)
    assert kept.read_text() == "older"


def test_writing_again_replaces(tmp_path: Path) -> None:
    experiment = finished(tmp_path / "mine", invent, lr=LRS[:2])
    assert tensorboard.write(experiment, tmp_path / "logs") == 2
    before = files(tmp_path / "logs")
    assert tensorboard.write(experiment, tmp_path / "logs") == 2
    assert files(tmp_path / "logs") == before
    assert {path.name for path in before} == {tensorboard.FILE}


def test_cells_without_a_history_are_left_out(tmp_path: Path) -> None:
    experiment = planned(tmp_path / "mine", lr=LRS)
    assert tensorboard.write(experiment, tmp_path / "logs") == 0
    assert list(files(tmp_path / "logs")) == [Path(tensorboard.FILE)]


def test_the_mean_ends_with_the_first_execution_that_does(tmp_path: Path) -> None:
    """Here one has diverged, so that the cell has no objective either."""

    def diverging(row: Row, number: int) -> dict[str, Any]:
        return record(number, [4.0, 3.0, 2.0] if number == 0 else [2.0, None])

    run = run_of(finished(tmp_path / "mine", diverging, executions_per_trial=2), tmp_path / "logs", "execution")
    assert curve(run.Scalars("loss/seed 0")) == [(1, 4.0), (2, 3.0), (3, 2.0)]
    assert curve(run.Scalars("loss/seed 1")) == [(1, 2.0)]
    assert curve(run.Scalars("loss/mean")) == [(1, 3.0)]
    assert not {"objective", "test/loss"} & set(run.Tags()["scalars"])


def test_measurements_between_epochs_have_the_optimizers_steps(tmp_path: Path) -> None:
    tracked = {"step": [0, 15, 30], "epoch": [0, 1.5, 3.0], "weights/weight.0": [1.0, 2.0, 3.0]}
    run = run_of(finished(tmp_path / "mine", lambda row, n: record(n, [1.0, 0.5, 0.2], tracked)), tmp_path / "logs")
    assert curve(run.Scalars("weights/weight.0/mean")) == [(0, 1.0), (15, 2.0), (30, 3.0)]
    assert curve(run.Scalars("loss/mean")) == [(1, 1.0), (2, 0.5), (3, 0.2)]
    assert "loss/seed 0" not in run.Tags()["scalars"]  # the mean of one


def test_the_time_axis_shows_the_seconds_of_an_execution(tmp_path: Path) -> None:
    run = run_of(finished(tmp_path / "mine", invent), tmp_path / "logs")
    first, _, last = run.Scalars("loss/mean")
    assert last.wall_time - first.wall_time == pytest.approx(1.0)  # 1.5 s for 3 epochs


def test_deciles_become_histograms(tmp_path: Path) -> None:
    names = [f"activations/layer.0.q{percentage:02d}" for percentage in range(0, 101, 10)]

    def measured(row: Row, number: int) -> dict[str, Any]:
        deciles = {name: [0.0, 2.0 * at + number] for at, name in enumerate(names)}
        return record(number, [1.0], {"step": [0, 20], "epoch": [0, 1.0], **deciles, "activations/layer.0.std": [1, 2]})

    run = run_of(finished(tmp_path / "mine", measured, executions_per_trial=2), tmp_path / "logs")
    assert run.Tags()["histograms"] == ["activations/layer.0"]
    flat, last = run.Histograms("activations/layer.0")
    assert (flat.step, flat.histogram_value.min, flat.histogram_value.max) == (0, 0.0, 0.0)
    told = last.histogram_value
    assert (last.step, told.min, told.max, told.num) == (1, 0.5, 20.5, 100)
    assert told.bucket_limit == [2.0 * at + 0.5 for at in range(1, 11)]  # the mean of the two executions
    assert told.bucket == 10 * [10.0]
    assert told.sum == pytest.approx(100 * 10.5)
    assert {tag for tag in run.Tags()["scalars"] if tag.startswith("act")} == {"activations/layer.0.std/mean"}


def test_the_weights_of_the_best_network_become_histograms(tmp_path: Path) -> None:
    experiment = finished(tmp_path / "mine", invent, lr=LRS[:2])
    best, other = rows(experiment)
    network = {"weight.0": torch.linspace(-1, 3, 512).reshape(8, 64), "bias.0": torch.zeros(1, 8)}
    network |= {"weight.1": torch.zeros(10, 8), "bias.1": torch.tensor([[torch.inf, *[1.0] * 9]])}
    for row in (best, other):
        path = model_path(experiment.files / "models", row.rule, row.key)
        models.save(path, models.content(network, RunSpec.model_validate(row.spec), (1, 8, 8), list("0123456789")))
    tensorboard.write(experiment, tmp_path / "logs")
    multiplexer = read(tmp_path / "logs")
    assert multiplexer.Runs()[named(experiment, other)]["histograms"] == []
    (event,) = multiplexer.Histograms(named(experiment, best), "network/weight.0")
    told = event.histogram_value
    assert (event.step, told.min, told.max, told.num, len(told.bucket)) == (3, -1.0, 3.0, 512, 50)
    assert sum(told.bucket) == 512
    (event,) = multiplexer.Histograms(named(experiment, best), "network/bias.0")
    assert event.histogram_value.num == 8
    (event,) = multiplexer.Histograms(named(experiment, best), "network/bias.1")
    assert event.histogram_value.num == 9
    path = model_path(experiment.files / "models", best.rule, best.key)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RunError, match=r"is no usable model: it is damaged .* Move it away"):
        tensorboard.write(experiment, tmp_path / "logs")


def test_a_trained_experiment_is_shown(tmp_path: Path) -> None:
    """With what a worker really stores: scores, every tracker's values and the best network."""
    run = RunSpec(dataset="digits", algorithm="dfa", arch="12-6", epochs=2, trackers="activations,bp_cosine", lr=0.01)
    experiment = api.open_train(tmp_path / "mine", run, tmp_path / "data")
    api.run(experiment, lambda outset: nullcontext(lambda worker, event: None), ["bpf", "train"], api.Effort())
    accumulator = run_of(experiment, tmp_path / "logs")
    (stored,) = summary.history(experiment, rows(experiment)[0].key)
    assert curve(accumulator.Scalars("loss/mean")) == list(enumerate(stored["history"]["loss"], 1))
    for name in ("bp_cosine/layer.1", "activations/layer.0.std"):
        assert curve(accumulator.Scalars(f"{name}/mean")) == list(enumerate(stored["tracked"][name]))
    histograms = accumulator.Tags()["histograms"]
    assert set(histograms) == {
        *("activations/layer.0", "activations/layer.1"),
        *(f"network/{kind}.{layer}" for kind in ("weight", "bias") for layer in range(3)),
    }
    told = accumulator.Histograms("activations/layer.1")[-1].histogram_value
    assert told.max == pytest.approx(stored["tracked"]["activations/layer.1.q100"][-1])
    weights = accumulator.Histograms("network/weight.1")
    assert [(event.step, event.histogram_value.num) for event in weights] == [(2, 12 * 6)]


def test_parameters_are_there_with_what_came_out(tmp_path: Path) -> None:
    from tensorboard.plugins.hparams import metadata

    experiment = finished(tmp_path / "mine", invent, algorithm=["bp", "dfa"], lr=LRS[:2], batch_norm=True)
    tensorboard.write(experiment, tmp_path / "logs")
    multiplexer = read(tmp_path / "logs")

    def content(run: str, tag: str) -> bytes:
        data: bytes = multiplexer.SummaryMetadata(run, tag).plugin_data.content
        return data

    grid = metadata.parse_experiment_plugin_data(content(".", metadata.EXPERIMENT_TAG))
    kinds = {info.name: (info.type, info.differs) for info in grid.hparam_infos}
    text, boolean, number = 1, 2, 3
    assert kinds == {
        **{"algorithm": (text, True), "lr": (number, True), "batch_norm": (boolean, False), "arch": (text, False)},
        **{"activation": (text, False), "bw_init": (text, False), "init": (text, False), "optimizer": (text, False)},
        **{"weight_decay": (number, False), "batch_size": (number, False), "dropout": (number, False)},
        "skew": (text, False),
    }
    assert [metric.name.tag for metric in grid.metric_infos] == ["objective", "test/loss", "test/error"]
    row = rows(experiment)[-1]
    start = metadata.parse_session_start_info_plugin_data(
        content(named(experiment, row), metadata.SESSION_START_INFO_TAG)
    )
    assert start.group_name == row.name
    assert {name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()} == {
        "algorithm": "dfa",
        **row.params,
    }
    bp = rows(experiment)[0]
    start = metadata.parse_session_start_info_plugin_data(
        content(named(experiment, bp), metadata.SESSION_START_INFO_TAG)
    )
    assert "bw_init" not in start.hparams  # which it has not
    ended = content(named(experiment, row), metadata.SESSION_END_INFO_TAG)
    end = metadata.parse_session_end_info_plugin_data(ended)
    assert (end.status, end.end_time_secs - start.start_time_secs) == (1, pytest.approx(1.5))


def test_neither_tensorflow_nor_torch_is_imported(tmp_path: Path) -> None:
    """Both take seconds, and TensorBoard's own writer imports the first where it is installed."""
    finished(tmp_path / "mine", invent)
    (tmp_path / "tensorflow.py").write_text("raise SystemExit('tensorflow is imported')")
    script = """
        import sys
        from pathlib import Path
        from bpf.results import tensorboard
        from bpf.experiment.directory import open_experiment
        print(tensorboard.write(open_experiment(Path("mine")), Path("logs")), "torch" in sys.modules)
    """
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("1 False\n", "")


def test_without_tensorboard_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = planned(tmp_path / "mine")
    (tmp_path / tensorboard.FILE).touch()
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    for attempt in (lambda: tensorboard.write(experiment, tmp_path / "logs"), lambda: tensorboard.serve([tmp_path])):
        with pytest.raises(UsageError) as refused:
            attempt()
        assert str(refused.value) == "TensorBoard needs tensorboard: pip install 'bpf[tensorboard]'"


def test_nothing_is_served_where_nothing_was_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refused:
        tensorboard.serve([tmp_path])
    assert str(refused.value) == f"There is nothing for TensorBoard in {tmp_path}."


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        (["runs/a/tensorboard", "runs/b/tensorboard"], ["a", "b"]),
        (["runs/a", "runs/b"], ["a", "b"]),
        (["x/runs/a/tb", "y/runs/a/tb"], ["x", "y"]),
        (["x/runs/a/tb", "y/old/b/tb"], ["x-runs-a", "y-old-b"]),
        (["runs/a", "runs/a/b"], ["a", "a-b"]),
        (["runs/a", "runs/a"], ["a", "a-2"]),
    ],
)
def test_directories_are_called_by_what_differs(paths: list[str], labels: list[str]) -> None:
    assert tensorboard._labels([Path("/work") / path for path in paths]) == labels


def test_tensorboard_serves_several_experiments_until_it_is_interrupted(tmp_path: Path) -> None:
    names = {"one": {"lr": LRS[:2]}, "two": {"algorithm": "ll-mse", "bw_init": "lecun"}}
    made = {name: finished(tmp_path / name, invent, **fields) for name, fields in names.items()}
    for name, experiment in made.items():
        tensorboard.write(experiment, tmp_path / name / "tensorboard")
    port = 15_000 + secrets.randbelow(15_000)
    script = f"""
        import sys
        from pathlib import Path
        from bpf.results import tensorboard
        sys.exit(tensorboard.serve([Path("one/tensorboard"), Path("two/tensorboard")], {port}))
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        served = next((line for line in process.stderr if " at http://" in line), "")
        assert f" at http://127.0.0.1:{port}/ " in served
        url = f"http://127.0.0.1:{port}/data"
        expected = {f"{name}/{named(one, row)}" for name, one in made.items() for row in rows(one)} | {"."}
        # TensorBoard loads while it serves
        eventually(lambda: set(json.load(urllib.request.urlopen(f"{url}/runs"))) == expected)
        asked = urllib.request.Request(
            f"{url}/plugin/hparams/experiment", b"{}", {"Content-Type": "application/json"}, method="POST"
        )
        parameters = {info["name"]: info["differs"] for info in json.load(urllib.request.urlopen(asked))["hparamInfos"]}
        assert parameters["lr"] is True
        assert {"algorithm", "bw_init", "arch"} <= set(parameters)
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
        assert process.wait(SECONDS) == 0
        assert "Traceback" not in said
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_nothing_that_is_not_finite_is_shown() -> None:
    curves = tensorboard._curves([record(0, [1.0, math.inf, math.nan, 2.0])])
    assert curves["loss"] == [{(1.0, 1): 1.0, (4.0, 4): 2.0}]
