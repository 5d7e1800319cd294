"""Published rows: the files that come with bpf, experiments of rows, and the table beside what was published."""

import json
import math
import shlex
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

import originals
from bpf.api import open_tune
from bpf.cli import app as cli
from bpf.errors import UsageError
from bpf.experiment.directory import open_experiment
from bpf.experiment.grid import expand, row_of
from bpf.experiment.plugins import load_rules
from bpf.experiment.settings import stored_grid
from bpf.results import published as results
from bpf.results import summary
from bpf.results.published import Comparison
from bpf.spec import published, schedules
from bpf.spec.fields import build
from bpf.spec.grid import GridSpec
from bpf.spec.rows import Published
from bpf.spec.run import RunSpec
from bpf.study.cells import Finished
from bpf.study.owner import Owner
from bpf.study.ranking import Spread
from bpf.workers.claims import outcome
from invented import record

pytestmark = pytest.mark.usefixtures("in_this_process", "empty_place")

SOURCE = {"source": "a paper, Table 1", "read_in": "paper"}
ROWS = {
    "bp": {"settings": {"algorithm": "bp", "arch": 8}, "published": {"error": 40, "std": 5, "runs": 10, **SOURCE}},
    "dfa": {"settings": {"algorithm": "dfa", "arch": "8", "lr": [0.01, 0.1]}, "published": {"error": 40, **SOURCE}},
    "dfa wide": {"settings": {"algorithm": "dfa", "arch": 16, "epochs": 2}},
}
FRAME = {"dataset": "digits", "epochs": 3, "executions_per_trial": 2, "examples_frac": 0.2}


def grid(**changes: Any) -> GridSpec:
    return build(GridSpec, FRAME | {"rows": ROWS} | changes)


def write(path: Path, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump(FRAME | {"rows": ROWS} | changes))
    return path


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


Bpf = Callable[[str], Outcome]


@pytest.fixture
def bpf_(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Bpf:
    monkeypatch.setenv("COLUMNS", "200")

    def run(command: str) -> Outcome:
        capsys.readouterr()
        try:
            cli.main(shlex.split(command))
        except SystemExit as exit_:
            return Outcome(int(exit_.code or 0), *capsys.readouterr())
        return Outcome(0, *capsys.readouterr())

    return run


# --- the files ---


@pytest.mark.parametrize("name", published.names())
def test_the_files_that_come_with_bpf(name: str) -> None:
    whole = published.read(name)
    for each in (whole, published.quick(whole)):
        plan = expand(each, load_rules(each.algorithm))
        assert {row_of(cell.params)[0] for cell in plan.cells} == set(whole.rows), "each row has a cell"
        assert not plan.left_out
        assert stored_grid(json.loads(json.dumps(each.model_dump(mode="json")))) == each
    for row_name, row in whole.rows.items():
        assert row.published is not None, row_name
        assert 0 < row.published.error < 90
        assert row.choices, f"{row_name}: no source states all"
        full = whole.row(row_name)
        assert (full.examples_frac, full.val_frac) != (0.5, 0.1), "these are bpf's defaults, and of no paper"
        last = max((int(epoch) for s in full.schedule for epoch in s.partition("@")[2].split("-") if epoch), default=0)
        assert last < full.epochs, "a step of the schedule would never come"


def test_every_table_that_is_promised_is_there() -> None:
    wanted = ["akrout-cifar10", "akrout-mnist", "ccl-cifar10", "ccl-fmnist", "ccl-mnist", "ff-mnist"]
    wanted += ["frenkel-cifar10", "frenkel-mnist", "local-loss-cifar10", "local-loss-fmnist", "local-loss-kmnist"]
    wanted += ["local-loss-mnist", "pc-mnist", "pepita-cifar10", "pepita-mnist"]
    assert published.names() == wanted


def test_a_quick_look_has_a_twentieth_of_the_epochs_and_one_execution() -> None:
    quick = published.quick(published.read("local-loss-kmnist"))
    assert quick.executions_per_trial == 1
    assert {quick.row(name).epochs for name in quick.rows} == {5}
    assert {quick.row(name).schedule for name in quick.rows} == {("0.25@2-4-5",)}
    assert {quick.row(name).lr for name in quick.rows} == {(0.0005,)}


@pytest.mark.parametrize(
    ("schedule", "factor", "expected"),
    [
        ("constant", 0.1, "constant"),
        ("cosine", 0.1, "cosine"),
        ("linear@60", 0.05, "linear@3"),
        ("0.1@60-90", 0.05, "0.1@3-4"),
        ("0.25@100-102", 0.01, "0.25@1"),
        (".5@2-4", 0.1, ".5@1"),
        ("1e-2@10", 2, "1e-2@20"),
    ],
)
def test_schedules_for_fewer_epochs(schedule: str, factor: float, expected: str) -> None:
    assert schedules.scaled(schedule, factor) == schedules.check(expected)


def test_rows_are_selected_by_name_and_pattern() -> None:
    assert list(published.selected(grid(), ["dfa*"]).rows) == ["dfa", "dfa wide"]
    assert list(published.selected(grid(), ["dfa wide, bp"]).rows) == ["bp", "dfa wide"]
    assert published.selected(grid(), ["bp"]).algorithm == ("bp",)
    with pytest.raises(UsageError, match=r"^There is no row 'dfa-wide'\. Did you mean 'dfa wide'\?$"):
        published.selected(grid(), ["bp", "dfa-wide"])


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return originals.write(tmp_path_factory.mktemp("data"))


@pytest.mark.slow
@pytest.mark.parametrize("name", published.names())
def test_every_file_runs_on_data_in_its_original_format(
    name: str, bpf_: Bpf, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    originals.believe(monkeypatch)
    told = bpf_(f"reproduce {name} --quick --data-dir {data_dir} -q")
    assert (told.code, told.err) == (0, "")
    for row in results.compare(open_experiment(Path(f"runs/reproduce-{name}-quick"))):
        assert row.ours is not None, f"{row.row} diverged in every cell"
        assert row.open == 0


# --- grids of rows ---


def test_a_row_is_the_grid_of_its_settings_on_top_of_the_common_ones() -> None:
    whole = grid()
    rules = load_rules(whole.algorithm)
    plan = expand(whole, rules)
    assert [cell.params["row"] for cell in plan.cells] == ["bp", "dfa: lr=0.01", "dfa: lr=0.1", "dfa wide"]
    assert {rule: [axis.name for axis in axes] for rule, axes in plan.axes.items()} == {"bp": ["row"], "dfa": ["row"]}
    alone = RunSpec(
        dataset="digits", algorithm="dfa", arch="16", epochs=2, examples_frac=0.2, lr=RunSpec.model_fields["lr"].default
    )
    assert plan.cells[-1].spec | {"executions_per_trial": 0} == alone.model_dump(mode="json") | {
        "executions_per_trial": 0
    }
    plain = build(GridSpec, FRAME | {"algorithm": "dfa", "activation": "tanh", "batch_norm": False, "bw_init": "ortho"})
    same = expand(plain.model_copy(update={"arch": ("8",), "lr": (0.01, 0.1)}), rules)
    assert [cell.key for cell in same.cells] == [cell.key for cell in plan.cells[1:3]], "a row's cells are like others"


def test_options_of_a_rule_in_rows() -> None:
    rows = {
        "far": {"settings": {"algorithm": "dfa", "options": {"dfa": {"hidden_factor": [2, 3]}}}},
        "near": {"settings": {"algorithm": "dfa"}},
    }
    plan = expand(build(GridSpec, FRAME | {"rows": rows}), load_rules(["dfa"]))
    assert [cell.params["row"] for cell in plan.cells] == [
        "far: dfa.hidden_factor=2.0",
        "far: dfa.hidden_factor=3.0",
        "near",
    ]
    assert plan.cells[1].spec["options"]["dfa"]["hidden_factor"] == 3.0


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"a": {"settings": {"algorithm": "dfa", "lr": 7000}}}, "rows: a: lr.0: it must be less than or equal to 10"),
        ({"a": {"settings": {"algorithm": "dfa", "lrr": 1}}}, "rows: a: lrr: there is no such field"),
        ({"a": {"settings": {"algorithm": "dfa", "seed": 1}}}, "rows: a: seed is one for all rows. State it beside"),
        ({"a": {"settings": {"algorithm": ["dfa", "bp"]}}}, "algorithm is missing"),
        ({"a: b": {"settings": {"algorithm": "dfa"}}}, "rows: 'a: b': a row's name has no colon, comma or wildcard"),
        ({"../a": {"settings": {"algorithm": "dfa"}}}, "a name has no slashes"),
        ({"a": {"settings": {"algorithm": "dfa"}, "published": {"error": 101, **SOURCE}}}, "rows: 101 is not accepted"),
        ({"a": {"settings": {"algorithm": "dfa"}, "published": {"error": 1}}}, "rows: "),
        ({"a": {"settings": {"algorithm": "dfa", "dropout": 0.1}}}, "rows: a: dropout with objective loss"),
        ({"a": ROWS["bp"], "b": {"settings": {"arch": 9}}}, "rows: b: a row states its algorithm."),
        ({"a": {"settings": {"algorithm": "dfa", "options": "x"}}}, "rows: a: options: give each rule its options"),
        ([1, 2], "rows: [1, 2] is not accepted"),
        ({"a": 3}, "rows: 3 is not accepted"),
    ],
)
def test_rows_that_are_none(rows: Any, message: str) -> None:
    with pytest.raises(UsageError) as error:
        build(GridSpec, FRAME | {"rows": rows})
    assert message in str(error.value)


def test_a_row_names_itself_in_what_is_wrong_with_its_cells() -> None:
    twice = dict.fromkeys(("one", "other"), ROWS["bp"])
    with pytest.raises(UsageError, match=r"^The rows 'one' and 'other' are the same settings\. Leave one out\.$"):
        expand(grid(rows=twice), load_rules(["bp"]))
    unstable = {"mine": {"settings": {"algorithm": "drtp", "activation": "relu"}}}
    with pytest.raises(UsageError, match=r"^Row mine: Nothing is left of the grid of drtp"):
        expand(grid(rows=unstable), load_rules(["drtp"]))
    unknown = {"mine": {"settings": {"algorithm": "dfa", "options": {"dfa": {"scale": 1}}}}}
    with pytest.raises(UsageError, match=r"^Row mine: Unknown option dfa\.scale"):
        expand(grid(rows=unknown), load_rules(["dfa"]))


def test_the_rule_of_a_row_is_stated_in_it() -> None:
    with pytest.raises(UsageError, match="algorithm beside rows: each row states its own"):
        grid(algorithm="drtp")
    assert grid(algorithm="bp,dfa") == grid()


# --- the table ---


def comparison(error: float | None, published_: dict[str, Any] | None) -> Comparison:
    known = Published(**SOURCE, **published_) if published_ else None
    return Comparison("row", "dfa", known, (), Spread([error - 1, error + 1]) if error else None, "", 0, 0)


@pytest.mark.parametrize(
    ("ours", "theirs", "difference", "deviations", "of"),
    [
        (12.0, {"error": 10, "std": 0.5, "runs": 10}, 2.0, 4.0, "published"),
        (9.0, {"error": 10, "std": 0.5}, -1.0, -2.0, "published"),
        (12.0, {"error": 10}, 2.0, 2 / math.sqrt(2), "ours"),
        (12.0, None, None, None, "ours"),
        (None, {"error": 10, "std": 0.5}, None, None, "published"),
        (None, {"error": 10}, None, None, None),
    ],
)
def test_differences_in_standard_deviations(ours: Any, theirs: Any, difference: Any, deviations: Any, of: Any) -> None:
    one = comparison(ours, theirs)
    assert one.difference == difference
    assert one.deviations == (None if deviations is None else pytest.approx(deviations))
    assert (one.unit and one.unit[1]) == of


def test_a_row_is_its_best_cell_by_the_objective_and_never_by_the_test_set(tmp_path: Path) -> None:
    def invent(row: Any, number: int) -> dict[str, Any]:
        good = row.params["row"].endswith("0.1")
        scores = {"loss": 1.0, "error": 0.5 if good else 0.1}
        return record(number, [0.5 if good else 0.9]) | {"test": scores, "seed": number}

    experiment = _finished(tmp_path / "ex", invent)
    found = {one.row: one for one in results.compare(experiment)}
    assert found["dfa"].tuned == "lr=0.1", "the better objective has the worse test error"
    assert found["dfa"].ours == Spread([50.0, 50.0])
    assert found["dfa wide"].published is None
    lines = {line[0]: line[1:] for line in results.lines(list(found.values()))}
    assert lines["bp"] == ["40.00 ± 5.00 (10)", "10.00 ± 0.00 (2)", "−30.00 pp", "−6.00", "published"]
    assert lines["dfa: lr=0.1"] == ["40.00", "50.00 ± 0.00 (2)", "+10.00 pp", "–", "–"]
    assert lines["dfa wide"] == ["–", "10.00 ± 0.00 (2)", "–", "–", "–"]


def _finished(directory: Path, invent: Any) -> Any:
    experiment = open_tune(directory, grid(), directory.parent / "data")
    experiment.save(["bpf", "reproduce"])
    experiment.plan()[0].close()
    with closing(experiment.open_study()) as study, Owner(study.locks, {}) as owner:
        while claim := study.claim(owner, lambda row: 100):
            for row in claim.rows:
                records = [invent(row, number) for number in range(2)]
                kept = [{k: v for k, v in one.items() if k not in ("history", "tracked")} for one in records]
                state, value, result = outcome(kept)
                study.finish(claim, Finished(row.key, value, state, result, records))
    return experiment


# --- the command ---


def test_the_command_lists_what_comes_with_bpf(bpf_: Bpf) -> None:
    told = bpf_("reproduce")
    assert told.code == 0
    for name in published.names():
        assert f"{name}  (" in told.out
    listed = json.loads(bpf_("reproduce --json").out)
    assert listed[0] == {
        "name": "akrout-cifar10",
        "dataset": "cifar10",
        "rows": ["bp epoch 400", "fa epoch 400", "kp epoch 400"],
    }


def test_rows_are_trained_compared_extended_and_reported(bpf_: Bpf, tmp_path: Path) -> None:
    write(Path("mine.yaml"))
    some = bpf_("reproduce mine.yaml --rows dfa* --executions 1 -q")
    assert some.code == 0
    assert "dfa wide" in some.out
    assert "bp " not in some.out
    directory = Path("runs/reproduce-mine")
    first = {row.name: row.result for row in summary.rows(open_experiment(directory))}
    told = bpf_("reproduce mine.yaml --json")
    assert (told.code, told.err) == (0, "")
    found = json.loads(told.out)
    assert [one["row"] for one in found] == ["dfa", "dfa wide", "bp"], "the rows that were there come first"
    assert [len(one["ours"]["values"]) for one in found] == [2, 2, 2]
    assert found[2]["std_of"] == "published"
    assert found[2]["difference"] == pytest.approx(found[2]["ours"]["error"] - 40)
    after = {row.name: row.result for row in summary.rows(open_experiment(directory))}
    for name, result in first.items():
        assert after[name]["executions"][0] == result["executions"][0], "nothing is trained again"
    again = bpf_("resume runs/reproduce-mine -q")
    assert again.code == 0
    assert "Published and ours" in again.out
    pytest.importorskip("jinja2")
    assert bpf_("report runs/reproduce-mine").code == 0
    page = (directory / "report" / "index.html").read_text()
    assert "Published and ours" in page
    assert "a paper, Table 1 (paper)" in page


def test_rows_that_have_changed_are_refused_and_nothing_is_touched(bpf_: Bpf) -> None:
    write(Path("mine.yaml"))
    assert bpf_("reproduce mine.yaml --rows bp -q").code == 0
    changed = {"bp": {"settings": {"algorithm": "bp", "arch": 9}}}
    write(Path("mine.yaml"), rows=changed)
    before = Path("runs/reproduce-mine/experiment.yaml").read_bytes()
    told = bpf_("reproduce mine.yaml")
    assert told.code == 2
    assert "  rows: bp: algorithm=bp arch=8 there, algorithm=bp arch=9 now" in told.err
    assert Path("runs/reproduce-mine/experiment.yaml").read_bytes() == before
    longer = write(Path("mine.yaml"), epochs=5)
    assert "epochs: 3 there, 5 now" in bpf_(f"reproduce {longer}").err


def test_published_numbers_may_be_corrected(bpf_: Bpf) -> None:
    write(Path("mine.yaml"))
    assert bpf_("reproduce mine.yaml --rows bp -q").code == 0
    rows = {"bp": ROWS["bp"] | {"published": {"error": 17, **SOURCE}}}
    write(Path("mine.yaml"), rows=rows)
    found = json.loads(bpf_("reproduce mine.yaml --json").out)
    assert found[0]["published"]["error"] == 17


def test_a_quick_look_is_an_experiment_of_its_own(bpf_: Bpf) -> None:
    write(Path("mine.yaml"), epochs=60)
    assert bpf_("reproduce mine.yaml --quick --rows bp -q").code == 0
    [row] = summary.rows(open_experiment(Path("runs/reproduce-mine-quick")))
    assert (row.spec["epochs"], row.done) == (3, 1)
    assert not Path("runs/reproduce-mine").exists()


def test_a_plan_of_rows_is_told_and_writes_nothing(bpf_: Bpf) -> None:
    write(Path("mine.yaml"))
    told = bpf_("reproduce mine.yaml --dry-run")
    assert told.code == 0
    assert "4 cells of 2 executions" in told.out
    assert json.loads(bpf_("reproduce mine.yaml --dry-run --json").out)["by_algorithm"] == {"bp": 1, "dfa": 3}
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("reproduce frenkel-minst", "Did you mean 'frenkel-mnist'?"),
        ("reproduce nothing", "Known: akrout-cifar10, "),
        ("reproduce nothing.yaml", "nothing.yaml cannot be read"),
        ("reproduce plain.yaml", "plain.yaml has no rows. A grid is run by: bpf tune --spec plain.yaml"),
        ("reproduce mine.yaml --rows bq", "There is no row 'bq'."),
        ("reproduce mine.yaml --executions 0", "--executions 0: give a whole number from 1 to 1000"),
        ("reproduce mine.yaml --dataset nothing", "nothing"),
        ("reproduce mine.yaml --workers many", "--workers many"),
    ],
)
def test_mistakes(bpf_: Bpf, command: str, message: str) -> None:
    write(Path("mine.yaml"))
    Path("plain.yaml").write_text("dataset: digits\nalgorithm: dfa\n")
    told = bpf_(command)
    assert told.code == 2
    assert message in told.err
    assert not Path("runs").exists()


def test_the_data_set_of_rows_can_be_another_source_of_the_same_images(bpf_: Bpf) -> None:
    write(Path("mine.yaml"), dataset="mnist")
    told = bpf_("reproduce mine.yaml --rows bp --dataset digits -q")
    assert told.code == 0
    assert open_experiment(Path("runs/reproduce-mine")).grid.dataset == "digits"
