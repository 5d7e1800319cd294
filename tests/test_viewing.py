"""The commands that look at what came out, and the same in Python."""

import io
import json
import os
import re
import subprocess
import sys
import threading
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from PIL import Image

import bpf
from bpf.cli import app as cli
from bpf.errors import UsageError
from bpf.experiment.directory import open_experiment
from bpf.results import summary
from invented import finished, planned, record
from waiting import SECONDS

pytestmark = pytest.mark.usefixtures("in_this_process")

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


def test_a_rule_that_is_not_in_the_grid_is_refused(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refused:
        bpf.open(directory).best_model("dfaa")
    assert str(refused.value) == f"{directory} has no rule 'dfaa'. Did you mean 'dfa'?"
    planned(tmp_path / "planned")
    assert bpf.open(tmp_path / "planned").best_model("dfa") is None


def test_an_experiment_is_shown_in_a_line(directory: Path, tmp_path: Path) -> None:
    assert repr(bpf.open(directory)) == f"bpf.open({str(directory)!r})  # 4 cells: bp, dfa on digits"
    broken = bpf.open(planned(tmp_path / "planned").directory)
    assert repr(broken) == f"bpf.open({str(broken.directory)!r})  # 1 cell: dfa on digits"
    (broken.directory / "study.db").write_bytes(b"no database" * 1000)
    assert repr(broken) == f"bpf.open({str(broken.directory)!r})  # dfa on digits"
    (broken.directory / "study.db").unlink()
    assert repr(broken) == f"bpf.open({str(broken.directory)!r})  # dfa on digits"


def test_the_best_model_is_loaded(directory: Path, told: Callable[..., str]) -> None:
    model = bpf.open(directory).best_model("dfa")
    assert model is not None
    network = bpf.load(model)
    assert isinstance(network, torch.nn.Module)
    assert network(torch.zeros(3, 1, 8, 8, dtype=torch.uint8)).shape == (3, 10)
    scores = json.loads(told("evaluate", model, "--data-dir", directory.parent, "--json"))
    winner = next(entry for entry in summary.best(open_experiment(directory)) if entry.row.rule == "dfa")
    executions = winner.row.result["executions"]
    best = min(executions, key=lambda execution: execution["objective"])
    assert scores["loss"] == pytest.approx(best["test"]["loss"], rel=1e-6)
    assert scores["params"] == winner.row.params
    assert (scores["algorithm"], scores["seed"]) == ("dfa", best["seed"])
    shown = told("evaluate", model, "--data-dir", directory.parent)
    assert "\n  dfa arch=8 act=tanh bn=no feedback=ortho" in shown
    assert f"\n  the execution with seed {best['seed']} only; tables show the mean of all\n" in shown
    assert "true class (rows), taken for" in shown
    assert f"error {100 * scores['error']:.2f} %" in shown


def test_export_prints_or_writes(directory: Path, told: Callable[..., str], tmp_path: Path) -> None:
    printed = pandas.read_csv(io.StringIO(told("export", directory, "--what", "trackers")))
    assert set(printed["bp_cosine/layer.0"].notna()) == {True}
    told("export", directory, "--what", "history", "--format", "parquet", "--output", tmp_path / "h.parquet")
    written = pandas.read_parquet(tmp_path / "h.parquet")
    assert len(written) == len(bpf.open(directory).history())
    files = told("export", directory, "--what", "metrics", "--output", tmp_path / "metrics").splitlines()
    for file, rule in zip(files, ("bp", "dfa"), strict=True):
        path = tmp_path / "metrics" / f"{rule}.parquet"
        rows, columns = pandas.read_parquet(path).shape
        assert file == f"{path}: {rows} rows of {columns} columns"
    refused = told("export", directory, "--format", "parquet", code=2)
    assert refused == "Error: --format parquet is not for a terminal: give --output FILE.\n"


def test_the_name_of_an_export_says_its_format(directory: Path, told: Callable[..., str], tmp_path: Path) -> None:
    for name, read in (("r.parquet", pandas.read_parquet), ("r.json", pandas.read_json), ("r.csv", pandas.read_csv)):
        for _ in range(2):  # an earlier one is replaced
            told("export", directory, "--output", tmp_path / name)
        assert len(read(tmp_path / name)) == 4
    refused = told("export", directory, "--output", tmp_path / "new.parquet", "--format", "csv", code=2)
    assert refused == (
        f"Error: {tmp_path / 'new.parquet'} is not written as csv. Leave out --format csv, or name a .csv file.\n"
    )
    assert told("export", directory, "--what", "metrics", "--format", "csv", code=2) == (
        "Error: --what metrics is written as parquet. Leave out --format csv.\n"
    )
    assert not (tmp_path / "new.parquet").exists()


def test_an_export_without_measurements_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    without = finished(tmp_path / "without", lambda row, number: record(number, [1.0])).directory
    open_ = planned(tmp_path / "open", trackers="bp_cosine").directory
    ways = {without: ": it has no trackers (`bpf tune --tracker NAME`)", open_: " yet"}
    for place, why in ways.items():
        with pytest.raises(SystemExit):
            cli.main(["export", str(place), "--what", "trackers"])
        shown = capsys.readouterr()
        assert shown.out.startswith("cell,key,algorithm,")
        assert shown.err == f"Nothing was measured in {place}{why}.\n"


def content(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def test_no_output_is_written_over_an_experiment(directory: Path, told: Callable[..., str], tmp_path: Path) -> None:
    model = bpf.open(directory).best_model("dfa")
    assert model is not None
    (tmp_path / "link").symlink_to(directory)
    before = content(directory)
    for command, output in [
        (("report", directory, "--output"), directory / "study.db"),
        (("report", directory, "--output"), directory / "models" / "index.html"),
        (("export", directory, "--output"), directory / "study.db"),
        (("export", directory, "--output"), directory / "study.db-wal"),
        (("export", directory, "--output"), directory / "running.lock"),
        (("export", directory, "--output"), directory / "report" / ".." / "experiment.yaml"),
        (("export", directory, "--output"), tmp_path / "link" / "experiment.yaml"),
        (("export", directory, "--output"), model),
        (("export", directory, "--what", "metrics", "--output"), directory / "models"),
        (("onnx", model), directory / "study.db"),
        (("onnx", model), model),
        (("onnx", model), directory / "checkpoints" / "new.onnx"),
    ]:
        assert told(*command, output, code=2) == (
            f"Error: {output} belongs to the experiment {directory} itself. Choose another place.\n"
        )
    assert content(directory) == before


def test_only_earlier_output_is_replaced(directory: Path, told: Callable[..., str], tmp_path: Path) -> None:
    model = bpf.open(directory).best_model("dfa")
    mine = tmp_path / "grid.yaml"
    mine.write_text("dataset: digits\n")
    for what, *command in [
        ("report of bpf", "report", directory, "--output"),
        ("table that bpf has exported", "export", directory, "--output"),
        ("ONNX file of a model of bpf", "onnx", model),
    ]:
        for place in (mine, tmp_path, Path(os.devnull)):
            assert told(*command, place, code=2) == (
                f"Error: {place} exists and is no {what}, so it is not replaced. Choose another name.\n"
            )
    assert mine.read_text() == "dataset: digits\n"
    inside = directory / "results.csv"
    for _ in range(2):
        told("export", directory, "--output", inside)
    inside.unlink()


def test_images_that_are_converted_are_told(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(np.zeros((32, 32, 3), dtype=np.uint8)).save(tmp_path / "image.png")
    with pytest.raises(SystemExit):
        cli.main(["predict", str(bpf.open(directory).best_model("dfa")), str(tmp_path), "--json"])
    shown = capsys.readouterr()
    assert [one["converted"] for one in json.loads(shown.out)] == [True]
    assert shown.err == (
        "1 of 1 images were converted to the model's 1x8x8 (channels x height x width), from 3x32x32\n"
    )


def test_the_help_says_what_becomes_of_images(told: Callable[..., str]) -> None:
    assert "Images of another size are scaled to the model's" in re.sub(r"\s+", " ", told("predict", "--help"))
    shown = re.sub(r"\s+", " ", told("onnx", "--help"))
    assert "A classifier gives one for each class. A network that reconstructs gives one for each pixel" in shown


@pytest.mark.skipif(os.name != "posix", reason="needs pipes as POSIX has them")
@pytest.mark.parametrize(
    "command",
    [
        *("--help", "show --json", "export"),
        *(pytest.param(more, marks=pytest.mark.slow) for more in ("show", "export --format json", "best", "evaluate")),
    ],
)
def test_what_nobody_reads_ends_as_a_pipe_does(directory: Path, command: str) -> None:
    """141, as for a program that SIGPIPE kills: nothing has failed."""
    words = command.split()
    if words[0] == "evaluate":
        words += [str(bpf.open(directory).best_model("dfa")), "--data-dir", str(directory.parent)]
    elif words[0] != "--help":
        words.insert(1, str(directory))
    reading, writing = os.pipe()
    os.close(reading)
    run = [sys.executable, "-c", "import sys; from bpf.cli import app as cli; cli.main(sys.argv[1:])", *words]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    try:
        done = subprocess.run(run, stdout=writing, stderr=subprocess.PIPE, env=buffered, check=False)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


def test_the_best_per_parameter(directory: Path, told: Callable[..., str]) -> None:
    cells = summary.best(open_experiment(directory))
    expected = [[entry.row.rule, entry.row.params["lr"], entry.row.value] for entry in cells]
    table = pandas.read_csv(io.StringIO(told("best", directory, "--per", "lr", "--csv")))
    assert table[["algorithm", "lr", "objective"]].to_numpy().tolist() == expected
    best, per = (json.loads(told("best", directory, *more, "--json")) for more in ((), ("--per", "arch")))
    assert (len(best), len(per)) == (4, 2)
    assert all(list(one) == list(best[0]) for one in (*best, *per))
    assert [(one["rank"], one["key"]) for one in best] == [(n, entry.row.key) for n, entry in enumerate(cells, 1)]
    header = told("best", directory, "--csv").splitlines()[0]
    assert header.split(",")[:3] == ["rank", "algorithm", "arch"]
    for more in (("--per", "lr"), ("--per", "lr,arch"), ("--algorithm", "bp"), ("--algorithm", "bp", "--per", "lr")):
        assert told("best", directory, "--csv", *more).splitlines()[0] == header
    assert len(told("best", directory, "--per", "lr", "--top", "1", "--csv").splitlines()) == 2
    assert "The best by loss per arch" in told("best", directory, "--per", "arch")
    assert told("best", directory, "--per", "archs", code=2) == (
        "Error: 'archs' is no parameter of this grid. Did you mean 'arch'?\n"
    )
    assert told("best", directory, "--csv", "--json", code=2) == "Error: Give --csv or --json, not both.\n"


def test_the_best_of_some_rules(directory: Path, told: Callable[..., str]) -> None:
    for given in (["--algorithm", "dfa"], ["--algorithm", "dfa", "--per", "lr"], ["--algorithm", "dfa,dfa"]):
        found = json.loads(told("best", directory, *given, "--json"))
        assert ({one["algorithm"] for one in found}, len(found)) == ({"dfa"}, 2)
    assert len(json.loads(told("best", directory, "--algorithm", "bp,dfa", "--json"))) == 4
    table = told("best", directory, "--algorithm", "dfa")
    assert (" dfa " in table, " bp " in table) == (True, False)
    assert told("best", directory, "--algorithm", "dfaa", code=2) == (
        "Error: There is no rule 'dfaa' in this experiment. Did you mean 'dfa'?\n"
    )


def test_tables_name_what_varies_and_where_the_rest_is(directory: Path, told: Callable[..., str]) -> None:
    per = told("best", directory, "--per", "arch")
    assert per.count("arch=8 lr=0.1") + per.count("arch=8 lr=0.01") == 2
    assert f"... and 1 more; see `bpf best {directory} --top 4`." in told("best", directory, "--top", "3")


def test_a_single_cell_is_named_in_full(told: Callable[..., str], tmp_path: Path) -> None:
    one = GRID | {"algorithm": ["dfa"], "lr": [0.1], "executions_per_trial": 1}
    bpf.tune(one, tmp_path / "one", data_dir=tmp_path, workers=1, quiet=True)
    assert "arch=8 act=tanh bn=no" in told("best", tmp_path / "one")
    (cell,) = json.loads(told("best", tmp_path / "one", "--json"))
    assert (cell["objective"]["std"], cell["test"]["error_std"]) == (None, None)
    (record,) = json.loads(told("export", tmp_path / "one", "--format", "json"))
    assert (record["objective_std"], record["test_loss_std"]) == (None, None)
    assert record["objective"] == cell["objective"]["mean"]


def test_diverged_cells_are_named(told: Callable[..., str], tmp_path: Path) -> None:
    wild = GRID | {"algorithm": ["bp"], "problem_type": "reconstruction", "scaler": "identity", "activation": "lrelu"}
    wild |= {"optimizer": "sgd", "lr": [1e-6, 10.0], "executions_per_trial": 1, "trackers": []}
    bpf.tune(wild, tmp_path / "wild", data_dir=tmp_path, workers=1, quiet=True)
    text = told("status", tmp_path / "wild", "--failed")
    assert text.startswith("No cell has failed.\n")
    named = r"^[a-z]+-[a-z]+-\d+: bp .*lr=10 .*: diverged in epoch 1 \(1 of 1 execution\)$"
    assert re.search(named, text, re.MULTILINE)
    (lost,) = json.loads(told("status", tmp_path / "wild", "--failed", "--json"))
    assert (lost["state"], lost["params"]["lr"], lost["error"]) == ("diverged", 10.0, None)


@pytest.mark.usefixtures("in_workers")
def test_a_thread_can_train(tmp_path: Path) -> None:
    done: list[object] = []
    one = GRID | {"algorithm": ["dfa"], "lr": [0.1], "executions_per_trial": 1}

    def work() -> None:
        done.append(bpf.tune(one, tmp_path / "grid", data_dir=tmp_path, workers=1, quiet=True).status()["cells"])
        run = {"dataset": "digits", "algorithm": "bp", "arch": "8", "epochs": 1}
        done.append(bpf.train(run, tmp_path / "run", data_dir=tmp_path, quiet=True).status()["cells"])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(SECONDS)
    assert [cells["complete"] for cells in done] == [1, 1]


def test_figures_replace_figures_only(told: Callable[..., str], tmp_path: Path) -> None:
    one = GRID | {"algorithm": ["dfa"], "lr": [0.1], "executions_per_trial": 1, "trackers": [], "val_frac": 0}
    bpf.tune(one, tmp_path / "grid", data_dir=tmp_path, workers=1, quiet=True)
    command = ("report", tmp_path / "grid", "--output", tmp_path / "page.html", "--figures")
    for kind in ("png", "svg", "pdf"):
        first = told(*command, kind)
        assert told(*command, kind) == first
    from matplotlib.figure import Figure

    figure = Path(first.splitlines()[-1])
    for make in (lambda: figure.write_bytes(b"mine"), lambda: Figure().savefig(figure)):
        make()
        mine, page = figure.read_bytes(), tmp_path / "page.html"
        page.unlink(missing_ok=True)
        assert told(*command, "pdf", code=2) == (
            f"Error: {figure} exists and is no figure of a report, so it is not replaced. Choose another name.\n"
        )
        assert figure.read_bytes() == mine
        assert not page.exists(), "nothing is written half"


@pytest.mark.parametrize(
    ("effort", "message"),
    [
        ({"workers": -3}, "workers -3: give a whole number from 1 on."),
        ({"workers": 0}, "workers 0: give a whole number from 1 on."),
        ({"workers": 1.5}, "workers 1.5: give a whole number from 1 on."),
        ({"workers": "2"}, "workers '2': give a whole number from 1 on."),
        ({"max_hours": -1}, "max_hours -1: give a number from 0 on."),
    ],
)
def test_efforts_that_make_no_sense_are_refused(effort: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refused:
        bpf.tune(GRID, tmp_path / "grid", data_dir=tmp_path, quiet=True, **effort)
    assert str(refused.value) == message
    assert not (tmp_path / "grid").exists()


def test_the_report_says_how_to_repeat_a_call_from_python(directory: Path, told: Callable[..., str]) -> None:
    page = Path(told("report", directory).splitlines()[0]).read_text()
    assert f"bpf tune {directory} --spec SPEC.yaml  # from Python, with the settings below as SPEC.yaml" in page


def test_the_report_is_one_page(directory: Path, told: Callable[..., str], tmp_path: Path) -> None:
    written = told("report", directory, "--output", tmp_path / "page.html", "--figures", "png").splitlines()
    assert written[0] == str(tmp_path / "page.html")
    assert all(Path(path).stat().st_size > 1000 for path in written)
    assert any(path.endswith(".png") for path in written)
    assert told("report", directory, "--output", tmp_path / "page.html").splitlines() == written[:1]  # it is replaced


def test_a_report_is_opened_if_there_is_a_browser(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    page, opened = tmp_path / "a page.html", []
    for there in (True, False):
        monkeypatch.setattr(webbrowser, "open", lambda url, there=there: opened.append(url) or there)
        with pytest.raises(SystemExit) as end:
            cli.main(["report", str(directory), "--output", str(page), "--open"])
        expected = "" if there else f"No browser was found; open {page}\n"
        assert (end.value.code or 0, *capfd.readouterr()) == (0, f"{page}\n", expected)
    assert opened == [page.as_uri()] * 2


def test_event_files_are_written(directory: Path, told: Callable[..., str]) -> None:
    told("tensorboard", directory, "--write-only")
    names = {f"lr={row.params['lr']:g} {row.name}" for row in summary.rows(open_experiment(directory))}
    assert names <= {path.name for path in (directory / "tensorboard").rglob("*")}


def test_an_export_says_what_it_wrote(directory: Path, told: Callable[..., str], tmp_path: Path) -> None:
    assert told("export", directory, "--output", tmp_path / "a.csv").startswith(f"{tmp_path}/a.csv: 4 rows of ")
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 5


def test_what_the_shell_did_not_expand(told: Callable[..., str]) -> None:
    for pattern in ("no-runs/*", "runs-?", "[x]"):
        assert told("report", pattern, code=2) == (
            f"Error: {pattern} is not an experiment: there is no such directory, as nothing matches this pattern.\n"
        )
    assert "There is no model *.safetensors, as nothing matches this pattern. " in told(
        "evaluate", "*.safetensors", code=2
    )


def test_notifications_tell_how_it_ended(directory: Path, told: Callable[..., str], tmp_path: Path) -> None:
    log = tmp_path / "log"
    told("resume", directory, "--quiet", "--notify", f"cat >> {log}; echo >> {log}")
    summary = json.loads(log.read_text())
    assert (summary["event"], summary["cells"]["complete"]) == ("finished", 4)
    assert set(summary["best"]) == {"bp", "dfa"}
    assert str(log) not in (directory / "experiment.yaml").read_text()
