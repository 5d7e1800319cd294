"""From a grid spec to its cells: counts, what is left out and why, keys, structures, and rule options."""

import itertools
import json
import math
from typing import Literal

import pytest
from pydantic import Field

from bpf.algorithms import Algorithm, Options
from bpf.algorithms.bp import Backpropagation
from bpf.algorithms.dfa import DirectFeedbackAlignment
from bpf.errors import UsageError
from bpf.experiment.grid import Holes, LeftOut, as_grid, check_run, execution, expand, resolve_options, setup, setups
from bpf.experiment.plugins import load_rules
from bpf.spec.fields import build
from bpf.spec.grid import GridSpec
from bpf.spec.run import NEWER, RunSpec, digest

RULES = load_rules(["bp", "dfa", "drtp", "ll-cce", "ll-mse"])
PER_RUN = {"lr", "bw_init", "dropout", "weight_decay", "seed"}


class Fake(Algorithm):
    """A rule with options of every kind."""

    class Options(Options):
        """Its options."""

        scale: float = Field(0.05, gt=0)
        steps: int = Field(1, ge=1)
        centred: bool = False
        kind: Literal["plain", "sign"] = "plain"


class Picky(Algorithm):
    """A rule that can neither be aligned nor take an activation that is not bounded."""

    needs_bounded_activation = True
    has_feedback = False


def plan(algorithm, rules=RULES, **values):
    return expand(build(GridSpec, {"dataset": "digits", "algorithm": algorithm, **values}), rules)


def refusal(call, *arguments, **values):
    with pytest.raises(UsageError) as caught:
        call(*arguments, **values)
    return str(caught.value)


def run_of(cell):
    return RunSpec.model_validate(cell.spec)


def sizes(grid, rule):
    return {axis.name: len(axis.values) for axis in grid.axes[rule] if len(axis.values) > 1}


def test_the_default_grid_is_the_cartesian_product_of_what_means_something():
    grid = plan("bp,dfa,drtp,ll-cce,ll-mse")
    without_init = {"arch": 6, "activation": 4, "batch_norm": 2, "lr": 4}
    full = without_init | {"bw_init": 2}
    assert sizes(grid, "bp") == without_init
    assert sizes(grid, "drtp") == {name: size for name, size in full.items() if name != "activation"}
    for rule in ("dfa", "ll-cce", "ll-mse"):
        assert sizes(grid, rule) == full
    counts = {rule: sum(cell.rule == rule for cell in grid.cells) for rule in RULES}
    assert counts == {"bp": 192, "dfa": 384, "drtp": 96, "ll-cce": 384, "ll-mse": 384}
    assert "bw_init" not in {axis.name for axis in grid.axes["bp"]}
    assert grid.left_out == [
        LeftOut(
            "drtp",
            288,
            "activation relu, swish, lrelu: drtp diverges unless the activation is bounded "
            "(--allow-unstable to include them)",
        )
    ]


@pytest.mark.parametrize("rule", RULES)
def test_every_point_is_there_once(rule):
    lists = {"arch": ["8", "8-8"], "activation": ["tanh", "sigmoid"], "lr": [0.1, 0.01], "optimizer": ["adam", "sgd"]}
    lists |= {"batch_norm": [False, True], "bw_init": ["ortho", "lecun"], "batch_size": [16, 64]}
    lists |= {"weight_decay": [0.0, 0.1], "dropout": [0.0, 0.3], "init": ["torch", "zeros"]}
    grid = plan(rule, objective="val_loss", **lists)
    meant = {name: values for name, values in lists.items() if not (rule == "bp" and name == "bw_init")}
    runs = [run_of(cell) for cell in grid.cells]
    points = [tuple(getattr(run, name) for name in meant) for run in runs]
    assert sorted(points) == sorted(itertools.product(*meant.values()))
    assert len({cell.key for cell in grid.cells}) == len(points)
    for cell, point in zip(grid.cells, points, strict=True):
        assert cell.params == dict(zip(meant, point, strict=True)) | {"skew": "none"}
        assert set(cell.params) == {axis.name for axis in grid.axes[rule]}
        assert cell.spec["algorithm"] == cell.rule == rule
        assert cell.spec["objective"] == "val_loss"


def test_unstable_cells_can_be_asked_for():
    grid = plan("drtp", allow_unstable=True)
    assert len(grid.cells) == 384
    assert grid.left_out == []
    assert {cell.params["activation"] for cell in grid.cells} == {"tanh", "relu", "swish", "lrelu"}
    stable = {cell.key for cell in plan("drtp").cells}
    assert stable < {cell.key for cell in grid.cells}


def test_a_rule_with_no_cell_left_is_refused():
    assert refusal(plan, "dfa,drtp", activation="relu,gelu") == (
        "Nothing is left of the grid of drtp: algorithm drtp with activation relu: drtp diverges with an activation "
        "that is not bounded. Use activation sigmoid or tanh, or --allow-unstable to try it all the same."
    )
    assert refusal(plan, "bp", init="aligned") == (
        "Nothing is left of the grid of bp: algorithm bp with init aligned: bp has no feedback matrices to align "
        "with. Use another init, such as orthogonal."
    )


def test_aligned_weights_are_left_out_for_rules_without_feedback():
    grid = plan("bp,dfa", init="torch,aligned", arch="8", lr=0.1)
    assert [sum(cell.rule == rule for cell in grid.cells) for rule in ("bp", "dfa")] == [8, 32]
    assert grid.left_out == [LeftOut("bp", 8, "init aligned: bp has no feedback matrices to align with")]


def test_kept_and_left_out_cells_are_the_whole_product():
    grid = plan("picky", {"picky": Picky}, init="torch,aligned", activation="tanh,sigmoid,relu", arch="8", lr=0.1)
    assert len(grid.cells) == 2 * 2 * 2
    assert len(grid.left_out) == 2
    assert len(grid.cells) + sum(left.cells for left in grid.left_out) == 3 * 2 * 2 * 2


@pytest.mark.parametrize("rule", ["ll-cce", "drtp"])
def test_rules_that_cannot_reconstruct(rule):
    message = (
        f"algorithm {rule} with problem_type reconstruction: {rule} only does classification. "
        "Use problem_type classification, or another rule (see `bpf algorithms`)."
    )
    assert refusal(plan, f"bp,{rule}", problem_type="reconstruction") == message
    run = RunSpec(dataset="digits", algorithm=rule, problem_type="reconstruction")
    assert refusal(check_run, run, RULES[rule]) == message
    assert len(plan("bp,dfa,ll-mse", problem_type="reconstruction").cells) == 192 + 384 + 384


def test_single_runs_are_checked_in_the_same_way():
    unstable = RunSpec(dataset="digits", algorithm="drtp", activation="relu")
    assert refusal(check_run, unstable, RULES["drtp"]) == (
        "algorithm drtp with activation relu: drtp diverges with an activation that is not bounded. "
        "Use activation sigmoid or tanh, or --allow-unstable to try it all the same."
    )
    check_run(unstable.model_copy(update={"allow_unstable": True}), RULES["drtp"])
    check_run(unstable.model_copy(update={"activation": "sigmoid"}), RULES["drtp"])
    aligned = RunSpec(dataset="digits", algorithm="bp", init="aligned")
    assert refusal(check_run, aligned, RULES["bp"]).startswith("algorithm bp with init aligned: ")
    wrong = RunSpec(dataset="digits", algorithm="dfa", options={"dfa": {"scale": 1}})
    assert refusal(check_run, wrong, RULES["dfa"]) == "Unknown option dfa.scale. Known: hidden_factor, through_dropout."


def test_learning_rates_come_first():
    message = (
        "objective val_loss without lr: val_* objectives tune regularisation and take the learning rate of each setup "
        "from an earlier phase. First run the same command with --objective loss and without --dropout, then this one "
        "with --lr-from DIR, where DIR is the directory of that experiment; or give --lr."
    )
    assert refusal(plan, "dfa", objective="val_loss") == message
    awaiting = build(GridSpec, {"dataset": "digits", "algorithm": "dfa", "objective": "val_loss"})
    assert refusal(resolve_options, awaiting, RULES) == message, "its default rates would be taken for given ones"


LISTS = {"arch": "8,16", "activation": "tanh,sigmoid", "batch_norm": False, "objective": "val_loss", "dropout": "0,0.5"}


def rates(algorithm="dfa", rules=RULES, skip=(), **values):
    """A learning rate for each setup of a grid, all different, without those whose parameters `skip` names."""
    grid = build(GridSpec, {"dataset": "digits", "algorithm": algorithm, **LISTS, **values})
    found = [
        {"algorithm": rule, "params": params, "lr": 0.001 * (1 + number)}
        for number, (rule, params) in enumerate(setups(grid, rules))
    ]
    return [rate for rate in found if not any(one.items() <= rate["params"].items() for one in skip)]


def test_each_setup_has_the_learning_rate_that_was_handed_over():
    fake = {"bp": Backpropagation, "fake": Fake}
    lists = LISTS | {"weight_decay": "0,0.1", "skew_type": "none,step", "options": {"fake": {"scale": "0.1,0.2"}}}
    handed = rates("bp,fake", fake, **lists)
    grid = plan("bp,fake", fake, **lists, lr_from=handed)
    assert len(handed) == 8 + 32
    assert len(grid.cells) == len(handed) * 2 * 2
    by_setup = {(rate["algorithm"], *sorted(rate["params"].items())): rate["lr"] for rate in handed}
    for cell in grid.cells:
        assert "lr" not in cell.params
        assert cell.spec["lr"] == by_setup[cell.rule, *sorted(setup(cell.params).items())]
    for rule, axes in grid.axes.items():
        cells = [cell for cell in grid.cells if cell.rule == rule]
        assert {axis.name for axis in axes} == set(cells[0].params)
        points = itertools.product(*(axis.values for axis in axes))
        assert sorted(tuple(cell.params.values()) for cell in cells) == sorted(points)


def test_a_cell_is_that_of_the_same_run_with_its_learning_rate_given():
    for cell in plan("dfa", **LISTS, lr_from=rates()).cells:
        run = run_of(cell)
        assert cell.key == digest(run.identity())
        alone = {name: value for name, value in cell.params.items() if name != "skew"}
        (same,) = plan("dfa", objective="val_loss", lr=cell.spec["lr"], **alone).cells
        assert (same.key, same.structure, same.spec, same.cost) == (cell.key, cell.structure, cell.spec, cell.cost)


def test_values_without_any_learning_rate_are_left_out():
    lists = LISTS | {"algorithm": "dfa,drtp", "activation": "tanh,sigmoid,relu"}
    handed = rates(**lists, skip=[{"arch": "16"}, {"activation": "sigmoid"}])
    grid = plan(**lists, lr_from=handed)
    assert sizes(grid, "dfa") == {"activation": 2, "bw_init": 2, "dropout": 2}
    assert sizes(grid, "drtp") == {"bw_init": 2, "dropout": 2}
    none = "no learning rate was handed over"
    unstable = "activation relu: drtp diverges unless the activation is bounded (--allow-unstable to include them)"
    assert grid.left_out == [
        LeftOut("dfa", 8, f"arch 16: {none}"),
        LeftOut("dfa", 8, f"activation sigmoid: {none}"),
        LeftOut("drtp", 4, unstable),
        LeftOut("drtp", 8, f"arch 16: {none}"),
        LeftOut("drtp", 8, f"activation sigmoid: {none}"),
    ]
    asked = 2 * 3 * 2 * 2 * 2
    assert len(grid.cells) + sum(left.cells for left in grid.left_out) == asked


def test_holes_are_refused():
    lists = LISTS | {"bw_init": "ortho"}
    one = {"arch": "16", "activation": "sigmoid"}
    with pytest.raises(Holes) as caught:
        plan("dfa", **lists, lr_from=rates(**lists, skip=[one]))
    assert str(caught.value) == (
        "A grid must be whole, and lr_from has no learning rate for 1 of the setups of dfa, such as dfa arch=16 "
        "activation=sigmoid batch_norm=false bw_init=ortho init=orthogonal optimizer=adam batch_size=64 skew=none. "
        "Add what is missing, or shorten lists."
    )
    assert "4 of the setups of dfa" in refusal(plan, "bp,dfa", **lists, lr_from=rates("bp", **lists))


def test_too_many_cells():
    rates = [i / 1000 for i in range(1, 1001)]
    decays = [i / 10000 for i in range(1000)]
    assert refusal(plan, "bp", lr=rates, weight_decay=decays) == (
        "The grid has more than 1,000,000 cells; fix some parameters or shorten lists."
    )


def test_keys_do_not_depend_on_where_and_how_a_run_is_watched():
    def keys(**changes):
        return [cell.key for cell in plan("bp,dfa", arch="8", **changes).cells]

    plain = keys()
    assert len(set(plain)) == len(plain) == 32 + 64
    same = [{"device": "cpu"}, {"trackers": "gradients"}, {"executions_per_trial": 7}, {"allow_unstable": True}]
    for change in [*same, {"output_loss": "ce"}, {"momentum": 0.1}]:
        assert keys(**change) == plain, change
    for change in [{"epochs": 2}, {"seed": 1}, {"output_loss": "bce"}, {"dataset": "mnist"}, {"val_frac": 0.2}]:
        assert not set(keys(**change)) & set(plain), change
    bp = [cell.key for cell in plan("bp", arch="8").cells]
    assert plain[:32] == bp
    assert keys(bw_init="lecun")[:32] == bp, "bp has no feedback matrices, so their initialisation is not its key"
    assert set(keys(lr="0.5,0.1,0.01,0.001,0.0001")) > set(plain), "a grid can grow"


def test_a_key_is_stable_across_versions():
    """Keys name checkpoints and plans on disk: when this fails, old experiments can no longer be resumed."""
    (cell,) = plan("dfa", arch="8", activation="tanh", batch_norm=False, bw_init="ortho", lr=0.1).cells
    run = run_of(cell)
    identity = {name: getattr(run, name) for name in RunSpec.model_fields}
    for name in ("device", "trackers", "tracker_every", "allow_unstable", "momentum", *NEWER):
        del identity[name]
    assert run.unchanged == set(NEWER)
    assert cell.key == digest(identity | {"output_loss": "ce", "options": {}})


def test_an_option_that_came_later_is_named_only_where_it_is_another():
    fixed = {"arch": "8", "activation": "tanh", "batch_norm": False, "bw_init": "ortho", "lr": 0.1}
    [plain] = plan("dfa", **fixed).cells
    [same] = plan("dfa", **fixed, options={"dfa": {"hidden_factor": "1"}}).cells
    assert (plain.key, plain.params) == (same.key, same.params)
    assert not any(name.startswith("dfa.") for name in plain.params)
    others = plan("dfa", **fixed, options={"dfa": {"hidden_factor": "1,10", "through_dropout": "true"}}).cells
    assert [cell.params["dfa.hidden_factor"] for cell in others] == [1.0, 10.0]
    assert len({plain.key, *(cell.key for cell in others)}) == 3


def test_structures_are_equal_exactly_where_runs_may_be_stacked():
    lists = {"arch": "8,8-8", "activation": "tanh,sigmoid", "lr": "0.1,0.01", "optimizer": "adam,sgd"}
    lists |= {"bw_init": "ortho,lecun", "batch_size": "16,64", "weight_decay": "0,0.1", "dropout": "0,0.3"}
    lists |= {"batch_norm": "false,true", "init": "torch,zeros", "skew_type": "none,step", "imbalance_factor": "5,10"}
    rules = {"bp": Backpropagation, "fake": Fake}
    grid = plan("bp,fake", rules, objective="val_loss", options={"fake": {"steps": "1,2"}}, **lists)
    shared = {}
    for cell in grid.cells:
        rest = {n: v for n, v in cell.params.items() if n not in PER_RUN}
        shared.setdefault((cell.rule, *sorted(rest.items(), key=repr)), set()).add(cell.structure)
    assert all(len(structures) == 1 for structures in shared.values())
    assert len(set.union(*shared.values())) == len(shared) == 2**6 * 3 * (1 + 2)
    other = plan("bp", arch="8", seed=5).cells[0], plan("bp", arch="8").cells[0]
    assert other[0].structure == other[1].structure
    assert other[0].key != other[1].key


@pytest.mark.parametrize(
    "values",
    [
        {"lr": [1, "1e-3"], "weight_decay": "0,1e-4", "bw_init": "ortho,nokland", "dropout": "0,0.5"},
        {"optimizer": "adam,sgd,nag", "momentum": 0.3, "dropout": 0, "init": "orthogonal,aligned", "lr": "0.1,0.2"},
        {"skew_type": "all", "imbalance_factor": "2.5,10", "output_loss": "mse", "trackers": "gradients"},
        {"options": {"fake": {"scale": "0.1,1", "centred": "true,false", "kind": "plain,sign"}}, "examples_frac": 0},
    ],
    ids=str,
)
def test_every_cell_is_what_validating_it_alone_makes_of_it(values):
    rules = {"bp": Backpropagation, "dfa": DirectFeedbackAlignment, "fake": Fake}
    lists = {"objective": "val_loss", "arch": "8,8-8", "lr": "0.1,0.01", "activation": "tanh", "batch_norm": False}
    grid = plan("bp,dfa,fake", rules, **lists | values)
    for cell in grid.cells:
        run = run_of(cell)
        identity = run.identity(rules[cell.rule].unused_parameters)
        structure = {name: value for name, value in identity.items() if name not in PER_RUN}
        assert (cell.key, cell.structure) == (digest(identity), digest(structure))
        assert json.dumps(cell.spec) == json.dumps(run.model_dump(mode="json"))
        meant = {name: value for name, value in cell.params.items() if name in RunSpec.model_fields}
        assert meant.items() <= cell.spec.items()


def test_skew_and_factor_are_one_axis():
    grid = plan("bp", arch="8", lr=0.1, activation="tanh", batch_norm=False, skew_type="all", imbalance_factor="10,50")
    assert [cell.params["skew"] for cell in grid.cells] == [
        *("none", "long_tailed:10", "long_tailed:50", "step:10", "step:50")
    ]
    found = [(cell.spec["skew_type"], cell.spec["imbalance_factor"]) for cell in grid.cells]
    assert found == [("none", None), *itertools.product(["long_tailed", "step"], [10, 50])]
    assert len({cell.key for cell in grid.cells}) == 5


@pytest.mark.parametrize("factor", [2.5, 12.3456789, 1234.5678, 10000, 1.0])
def test_no_digit_of_a_factor_is_lost(factor):
    (cell,) = plan(
        "bp", arch="8", lr=0.1, activation="tanh", batch_norm=False, skew_type="step", imbalance_factor=factor
    ).cells
    assert cell.spec["imbalance_factor"] == factor


def test_options_are_axes_with_validated_values():
    rules = {"fake": Fake, "bp": Backpropagation}
    options = {"fake": {"scale": "0.1,2e-1", "centred": ["true", False], "kind": "sign"}}
    grid = plan(
        "fake,bp", rules, arch="8", lr=0.1, activation="tanh", batch_norm=False, bw_init="ortho", options=options
    )
    axes = {axis.name: list(axis.values) for axis in grid.axes["fake"] if axis.name.startswith("fake.")}
    expected = {"fake.scale": [0.1, 0.2], "fake.steps": [1], "fake.centred": [True, False], "fake.kind": ["sign"]}
    assert axes == expected
    assert not any("fake" in axis.name for axis in grid.axes["bp"])
    cells = [cell for cell in grid.cells if cell.rule == "fake"]
    assert [(c.spec["options"]["fake"]["scale"], c.spec["options"]["fake"]["centred"]) for c in cells] == list(
        itertools.product([0.1, 0.2], [True, False])
    )
    assert [cell.spec["options"] for cell in grid.cells if cell.rule == "bp"] == [{}]
    assert Fake.Options.model_validate(run_of(cells[0]).rule_options()) == Fake.Options(
        scale=0.1, centred=True, kind="sign"
    )


def test_a_default_that_is_given_is_the_same_cell():
    one = plan("fake", {"fake": Fake}, arch="8", lr=0.1)
    other = plan("fake", {"fake": Fake}, arch="8", lr=0.1, options={"fake": {"scale": "0.05", "steps": 1}})
    assert [cell.key for cell in one.cells] == [cell.key for cell in other.cells]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fake": {"scael": 1}}, "Unknown option fake.scael. Did you mean 'scale'?"),
        ({"fake": {"scale": "0.1,-1"}}, "fake.scale: '-1' is not accepted: it must be greater than 0."),
        ({"fake": {"kind": "sine"}}, "fake.kind: 'sine' is not accepted: it must be 'plain' or 'sign'."),
        ({"bp": {"scale": 1}}, "Unknown option bp.scale. bp has no options."),
        (
            {"fak": {"scale": 1}},
            "Options are given for the rule 'fak', which is not in algorithm. Did you mean 'fake'?",
        ),
    ],
)
def test_options_that_are_refused(options, message):
    assert refusal(plan, "fake,bp", {"fake": Fake, "bp": Backpropagation}, options=options) == message


def test_executions_differ_in_their_seed_only():
    run = RunSpec(dataset="digits", algorithm="bp", seed=7)
    assert [execution(run, number).seed for number in range(3)] == [7, 8, 9]
    assert execution(run, 2).model_copy(update={"seed": 7}) == run


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"objective": "val_error", "dropout": 0.25, "lr": 0.0123456789},
        {"objective": "val_loss"},
        {"skew_type": "step", "imbalance_factor": 12.3456789, "weight_decay": 1e-7},
        {"problem_type": "reconstruction", "scaler": "zero_one", "output_loss": "bce", "arch": "8-9"},
        {
            "batch_norm": True,
            "init": "aligned",
            "optimizer": "nag",
            "momentum": 0.3,
            "seed": 4,
            "trackers": "gradients",
        },
        {"algorithm": "fake", "options": {"fake": {"scale": 0.3, "kind": "sign"}}, "bw_init": "nokland"},
    ],
    ids=str,
)
def test_a_run_is_a_grid_of_one_cell(changes):
    run = build(RunSpec, {"dataset": "digits", "algorithm": "dfa", **changes})
    rules = {"dfa": DirectFeedbackAlignment, "fake": Fake}
    grid = as_grid(run)
    assert grid.executions_per_trial == 1
    (cell,) = expand(grid, {run.algorithm: rules[run.algorithm]}).cells
    back = run_of(cell)
    given = {"options"} if run.options else set()
    assert back.model_dump(exclude=given) == run.model_dump(exclude=given)
    if not given:
        assert back == run
        assert back.identity() == run.identity()
    options = rules[run.algorithm].Options
    assert options.model_validate(back.rule_options()) == options.model_validate(run.rule_options())


def test_axes_hold_their_values():
    grid = plan("dfa", objective="val_loss", lr="0.1,0.01")
    for axis in grid.axes["dfa"]:
        assert len(set(axis.values)) == len(axis.values)
        if axis.kind == "categorical":
            assert axis.choices is None or set(axis.values) <= set(axis.choices)
        else:
            assert all(axis.low <= value <= axis.high for value in axis.values)
    kinds = {axis.name: axis.kind for axis in grid.axes["dfa"]}
    assert {name for name, kind in kinds.items() if kind == "float"} == {"lr", "weight_decay", "dropout"}
    assert kinds["batch_size"] == "int"
    assert math.prod(len(axis.values) for axis in grid.axes["dfa"]) == len(grid.cells)
