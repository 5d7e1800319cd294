"""The tables are whole, typed and in a stable order, whatever the cells; pandas and duckdb read what is written."""

import csv
import io
import json
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from bpf.errors import UsageError
from bpf.experiment.directory import Experiment
from bpf.results import exporting
from bpf.study.cells import Row
from invented import finished, planned, record

PARAMETERS = {
    "arch": str,
    "activation": str,
    "batch_norm": bool,
    "init": str,
    "optimizer": str,
    "lr": float,
    "weight_decay": float,
    "batch_size": int,
    "dropout": float,
    "skew": str,
    "bw_init": str,
}
HEAD = {"cell": str, "key": str, "algorithm": str, **PARAMETERS}


def invent(row: Row, number: int) -> dict[str, Any]:
    """Losses that tell cells and executions apart; one measurement before training, one between epochs, one after."""
    layers = len(row.params["arch"].split("-"))
    start = row.ordinal + number / 2
    values = {f"bp_cosine/layer.{layer}": [0.1 * layer, 0.2, 0.3 + row.ordinal] for layer in range(layers)}
    tracked = {"step": [0, 15, 20], "epoch": [0, 1.5, 2.0], **values}
    return record(number, [start + 2, start + 1.5, start + 1], tracked)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """Two rules, of which only one has a feedback matrix, and networks of one and two hidden layers."""
    return finished(
        tmp_path_factory.mktemp("made") / "mine",
        invent,
        algorithm=["bp", "dfa"],
        arch=["8", "8-8"],
        executions_per_trial=2,
        trackers="bp_cosine",
    )


def table(experiment: Experiment, what: str) -> tuple[dict[str, type], list[dict[str, Any]]]:
    with closing(experiment.read_study()) as study:
        made = exporting.table(study, what)
        return made.columns, list(made)


def written(experiment: Experiment, what: str, format: str) -> bytes:
    file = io.BytesIO()
    with closing(experiment.read_study()) as study:
        exporting.write(exporting.table(study, what), format, file)
    return file.getvalue()


def test_results_have_a_record_per_cell(experiment: Experiment) -> None:
    columns, records = table(experiment, "results")
    assert list(columns.items())[: len(HEAD)] == list(HEAD.items())
    assert [(r["algorithm"], r["arch"], r["bw_init"]) for r in records] == [
        ("bp", "8", None),
        ("bp", "8-8", None),
        ("dfa", "8", "ortho"),
        ("dfa", "8-8", "ortho"),
    ]
    assert [r["objective"] for r in records] == [1.25, 2.25, 3.25, 4.25]
    assert [r["test_loss"] for r in records] == [2.5, 4.5, 6.5, 8.5]
    assert [r["objective_std"] for r in records] == pytest.approx(4 * [0.5 / 2**0.5])
    assert {(r["state"], r["cause"], r["executions"], r["seconds"]) for r in records} == {("complete", None, 2, 3.0)}
    assert all(list(record) == list(columns) for record in records)


def test_results_say_what_was_minimised_and_when_it_was_best(experiment: Experiment, tmp_path: Path) -> None:
    columns, records = table(experiment, "results")
    names = list(columns)
    assert names.index("objective") == names.index("objective_name") + 1
    assert (columns["objective_name"], columns["best_epoch"]) == (str, float)
    assert {(r["objective_name"], r["best_epoch"]) for r in records} == {("loss", 3.0)}

    def uneven(row: Row, number: int) -> dict[str, Any]:
        return record(number, [3.0, 2.0, 1.0] if number else [1.0, 2.0, 3.0])

    _, [cell] = table(finished(tmp_path / "uneven", uneven, executions_per_trial=2), "results")
    assert cell["best_epoch"] == 2.0  # the median of 1 and 3
    _, [cell] = table(planned(tmp_path / "planned"), "results")
    assert (cell["objective_name"], cell["best_epoch"]) == ("loss", None)


def test_history_has_a_record_per_epoch_of_each_execution(experiment: Experiment) -> None:
    columns, records = table(experiment, "history")
    assert columns == HEAD | {
        **{"execution": int, "seed": int, "status": str, "epoch": int},
        **{"loss": float, "error": float},
    }
    assert len(records) == 4 * 2 * 3
    of_last = [r for r in records if r["algorithm"] == "dfa" and r["arch"] == "8-8" and r["execution"] == 1]
    assert [(r["epoch"], r["loss"], r["error"]) for r in of_last] == [(1, 5.5, 0.55), (2, 5.0, 0.5), (3, 4.5, 0.45)]
    assert all(list(record) == list(columns) for record in records)


def test_trackers_have_a_column_for_the_layers_of_any_cell(experiment: Experiment) -> None:
    columns, records = table(experiment, "trackers")
    names = {"bp_cosine/layer.0": float, "bp_cosine/layer.1": float}
    assert columns == HEAD | {"execution": int, "seed": int, "step": int, "epoch": float} | names
    first = [tuple(r[name] for name in ("step", "epoch", *names)) for r in records[:3]]
    assert first == [(0, 0.0, 0.0, None), (15, 1.5, 0.2, None), (20, 2.0, 0.3, None)]
    assert [r["bp_cosine/layer.1"] for r in records[6:9]] == [0.1, 0.2, 1.3]
    assert all(list(record) == list(columns) for record in records)


def test_layers_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    names = [f"local_loss/layer.{layer}" for layer in (10, 9, 0)]
    tracked = {"step": [0], "epoch": [0.0]} | {name: [1.0] for name in names}
    columns, _ = table(finished(tmp_path / "mine", lambda row, n: record(n, [1.0], tracked)), "trackers")
    assert [name for name in columns if "/" in name] == names[::-1]


def test_measurements_of_bpf_0_2_are_read_from_the_history(tmp_path: Path) -> None:
    """It measured once an epoch, after it. What has gone on with this bpf has both."""

    def old(row: Row, number: int) -> dict[str, Any]:
        made = record(number, [2.0, 1.0, 0.5], {"step": [30], "epoch": [3.0], "weights/weight.0": [9.0]})
        made["history"]["weights/weight.0"] = [7.0, 8.0]
        return made

    experiment = finished(tmp_path / "mine", old)
    _, records = table(experiment, "trackers")
    assert [(r["step"], r["epoch"], r["weights/weight.0"]) for r in records] == [
        (None, 1.0, 7.0),
        (None, 2.0, 8.0),
        (30, 3.0, 9.0),
    ]
    columns, records = table(experiment, "history")
    assert "weights/weight.0" not in columns
    assert [r["loss"] for r in records] == [2.0, 1.0, 0.5]


def test_records_without_tracked_values_are_read(tmp_path: Path) -> None:
    def older(row: Row, number: int) -> dict[str, Any]:
        made = record(number, [2.0])
        del made["tracked"]
        return made

    assert table(finished(tmp_path / "mine", older), "trackers")[1] == []


def test_what_is_trained_between_the_two_readings_is_left_out(tmp_path: Path) -> None:
    """Else it might have columns that the header lacks."""
    experiment = planned(tmp_path / "mine", arch=["8", "8-8"])
    with closing(experiment.read_study()) as study:
        made = exporting.table(study, "history")
        finished(tmp_path / "mine", invent, arch=["8", "8-8"])
        assert list(made) == []
    assert len(table(experiment, "history")[1]) == 6


@pytest.mark.parametrize("what", exporting.TABLES)
def test_an_experiment_without_results_has_a_header(tmp_path: Path, what: str) -> None:
    experiment = planned(tmp_path / "mine")
    columns, records = table(experiment, what)
    assert [r["state"] for r in records] == (["pending"] if what == "results" else [])
    header = written(experiment, what, "csv").decode().splitlines()[0]
    assert header == ",".join(columns)
    assert json.loads(written(experiment, what, "json")) == records


def test_numbers_that_are_not_finite_are_nothing(tmp_path: Path) -> None:
    """JSON knows none, and a study of bpf 0.1 may hold some."""
    experiment = finished(tmp_path / "mine", lambda row, n: record(n, [2.0, None]) | {"epochs": 3})
    _, records = table(experiment, "history")
    assert [(r["status"], r["loss"]) for r in records] == [("diverged", 2.0), ("diverged", None), ("diverged", None)]
    made = exporting.Table({"a": float, "b": float, "c": int}, [{"a": float("nan"), "b": float("inf"), "c": 1}])
    assert list(made) == [{"a": None, "b": None, "c": 1}]


def test_types_suit_every_value() -> None:
    columns = {"int": int, "float": float, "bool": bool, "text": str}
    made = exporting.Table(columns, [{"int": 3, "float": 1, "bool": False, "text": [1, 2], "more": 1}, {}])
    first, second = made
    assert first == {"int": 3, "float": 1.0, "bool": False, "text": "[1, 2]"}
    assert isinstance(first["float"], float)
    assert second == dict.fromkeys(columns)


def test_csv_is_read_by_csv(experiment: Experiment) -> None:
    columns, records = table(experiment, "trackers")
    read = list(csv.DictReader(io.StringIO(written(experiment, "trackers", "csv").decode())))
    assert read == [{name: "" if value is None else str(value) for name, value in r.items()} for r in records]
    assert list(read[0]) == list(columns)


def test_json_is_a_list_of_the_records(experiment: Experiment) -> None:
    assert json.loads(written(experiment, "history", "json")) == table(experiment, "history")[1]


def test_unknown_names_are_refused(experiment: Experiment) -> None:
    with closing(experiment.read_study()) as study:
        with pytest.raises(UsageError) as refused:
            exporting.table(study, "histories")
        assert str(refused.value) == (
            "There is no table 'histories': give one of results, history, trackers. Did you mean 'history'?"
        )
        with pytest.raises(UsageError) as refused:
            exporting.write(exporting.table(study, "results"), "parket", io.BytesIO())
    assert str(refused.value) == "There is no format 'parket': give one of csv, json, parquet. Did you mean 'parquet'?"


def test_parquet_without_pyarrow_says_how_to_get_it(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError) as refused:
        written(experiment, "results", "parquet")
    assert str(refused.value) == "Parquet needs pyarrow: pip install 'bpf[parquet]'"


def test_a_library_that_is_broken_is_not_called_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bpf.extras import need

    (tmp_path / "bpf_broken_library.py").write_text("import bpf_nowhere_to_be_found")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="bpf_nowhere_to_be_found"):
        need("bpf_broken_library", "It", "library", "extra")


@pytest.mark.parametrize("what", exporting.TABLES)
def test_pandas_reads_the_same_from_every_format(experiment: Experiment, what: str) -> None:
    pandas = pytest.importorskip("pandas")
    columns, records = table(experiment, what)
    frame = pandas.read_parquet(io.BytesIO(written(experiment, what, "parquet")))
    assert list(frame.columns) == list(columns)
    kinds = {str: ("O", "U", "T"), int: ("i",), float: ("f",), bool: ("b",)}
    assert all(frame[name].dtype.kind in kinds[kind] or frame[name].isna().all() for name, kind in columns.items())
    assert frame.astype(object).where(frame.notna(), None).to_dict("records") == records
    from_csv = pandas.read_csv(io.BytesIO(written(experiment, what, "csv")), dtype={"arch": str})
    assert [list(row) for row in from_csv[["arch", "batch_norm", "seed" if what != "results" else "cell"]].values] == [
        [r["arch"], r["batch_norm"], r["seed" if what != "results" else "cell"]] for r in records
    ]


@pytest.fixture(scope="module")
def parquet_files(experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    pytest.importorskip("pyarrow")
    paths = [path for path, _, _ in exporting.metrics(experiment, tmp_path_factory.mktemp("metrics"))]
    assert [path.name for path in paths] == ["bp.parquet", "dfa.parquet"]
    return paths


def test_metrics_join_trackers_to_the_epochs(parquet_files: list[Path]) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_parquet(parquet_files[1])
    run = frame[(frame["arch"] == "8-8") & (frame["execution"] == 1)]
    shown = run[["epoch", "step", "loss", "bp_cosine/layer.1"]].astype(object)
    assert shown.where(shown.notna(), None).values.tolist() == [
        [0.0, 0, None, 0.1],
        [1.0, None, 5.5, None],
        [1.5, 15, None, 0.2],
        [2.0, 20, 5.0, 3.3],
        [3.0, None, 4.5, None],
    ]
    known = ["algorithm", "lr", "batch_size", "state", "objective", "seed", "status", "best_epoch", "test_loss"]
    assert run[known].drop_duplicates().values.tolist() == [
        ["dfa", 0.1, 64, "complete", 4.25, 1, "complete", 3, 9.0],
    ]


def test_duckdb_answers_from_one_file(parquet_files: list[Path]) -> None:
    duckdb = pytest.importorskip("duckdb")
    file = str(parquet_files[1])
    types = duckdb.sql(f"DESCRIBE SELECT * FROM '{file}'").fetchall()
    assert {name: kind for name, kind, *_ in types if name in ("arch", "batch_norm", "batch_size", "step", "loss")} == {
        **{"arch": "VARCHAR", "batch_norm": "BOOLEAN", "batch_size": "BIGINT"},
        **{"step": "BIGINT", "loss": "DOUBLE"},
    }
    asked = f"""
        SELECT arch, avg(loss), max("bp_cosine/layer.0") FROM '{file}'
        WHERE epoch = best_epoch OR epoch = 2 GROUP BY arch ORDER BY arch
    """
    assert duckdb.sql(asked).fetchall() == [("8", 3.5, 2.3), ("8-8", 4.5, 3.3)]
    both = f"read_parquet('{Path(file).parent}/*.parquet', union_by_name = true)"
    asked = f"SELECT algorithm, bw_init, count(DISTINCT cell) FROM {both} GROUP BY ALL ORDER BY ALL"
    assert duckdb.sql(asked).fetchall() == [("bp", None, 2), ("dfa", "ortho", 2)]


def test_metrics_are_in_row_groups_and_replace_what_was_there(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(exporting, "ROW_GROUP", 8)
    for _ in range(2):
        made = exporting.metrics(experiment, tmp_path)
        assert sorted(tmp_path.iterdir()) == [path for path, _, _ in made]
        sizes = parquet.ParquetFile(made[0][0]).metadata
        assert made[0][1:] == (sizes.num_rows, sizes.num_columns)
        assert [sizes.row_group(i).num_rows for i in range(sizes.num_row_groups)] == [8, 8, 4]


def test_metrics_replace_nothing_else(experiment: Experiment, tmp_path: Path) -> None:
    other = tmp_path / "dfa.parquet"
    other.write_text("mine")
    with pytest.raises(UsageError) as refused:
        exporting.metrics(experiment, tmp_path)
    assert str(refused.value) == (
        f"{other} exists and is no table that bpf has exported, so it is not replaced. Choose another name."
    )
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("dfa.parquet", "mine")]
    models = experiment.directory / "models"
    with pytest.raises(UsageError) as refused:
        exporting.metrics(experiment, models)
    assert str(refused.value) == (
        f"{models} belongs to the experiment {experiment.directory} itself. Choose another place."
    )


@pytest.mark.parametrize(
    ("output", "asked", "format"),
    [
        (None, None, "csv"),
        (None, "json", "json"),
        ("x.parquet", None, "parquet"),
        ("x.JSON", None, "json"),
        ("x.csv", "csv", "csv"),
        ("x.txt", "csv", "csv"),
        ("x", "parquet", "parquet"),
        ("x.v2", "json", "json"),
    ],
)
def test_the_format_is_that_of_the_name(output: str | None, asked: str | None, format: str) -> None:
    assert exporting.format_of(None if output is None else Path(output), asked) == format


@pytest.mark.parametrize("name", ["x", "x.xlsx", "x.csv.gz"])
def test_a_name_that_says_nothing_of_the_format_is_refused(name: str) -> None:
    with pytest.raises(UsageError) as refused:
        exporting.format_of(Path(name), None)
    assert str(refused.value) == (
        f"{name} does not say how it is written: give --format, or a name that ends in .csv, .json, .parquet."
    )


def test_a_parquet_file_of_somebody_else_is_not_replaced(experiment: Experiment, tmp_path: Path) -> None:
    own, foreign = tmp_path / "own.parquet", tmp_path / "foreign.parquet"
    own.write_bytes(written(experiment, "results", "parquet"))
    exporting.check_table(own)
    pytest.importorskip("pandas").DataFrame({"cell": ["mine"]}).to_parquet(foreign)
    with pytest.raises(UsageError, match="is no table that bpf has exported, so it is not replaced"):
        exporting.check_table(foreign)


def test_a_name_and_a_format_that_differ_are_refused() -> None:
    with pytest.raises(UsageError) as refused:
        exporting.format_of(Path("x.parquet"), "csv")
    assert str(refused.value) == "x.parquet is not written as csv. Leave out --format csv, or name a .csv file."


@pytest.mark.parametrize("what", exporting.TABLES)
@pytest.mark.parametrize("format", exporting.FORMATS)
def test_only_an_earlier_table_is_replaced(experiment: Experiment, tmp_path: Path, what: str, format: str) -> None:
    pytest.importorskip("pyarrow")
    output = tmp_path / "out"
    exporting.check_table(output)
    output.touch()
    exporting.check_table(output)
    output.write_bytes(written(experiment, what, format))
    exporting.check_table(output)
    for content in (b"SQLite format 3\0", b"format: 2\n", b"a,b\n1,2\n", b'{"cell": 1}'):
        output.write_bytes(content)
        with pytest.raises(UsageError, match="exists and is no table that bpf has exported"):
            exporting.check_table(output)


def test_rules_that_have_trained_nothing_have_no_file(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    assert exporting.metrics(planned(tmp_path / "mine"), tmp_path / "metrics") == []
