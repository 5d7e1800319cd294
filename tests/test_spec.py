"""Specs: defaults, lists, ranges, the rules between fields with their whole messages, and identity."""

import json

import pytest
from pydantic import ValidationError

from bpf.errors import UsageError
from bpf.spec.fields import bounds, build, choices
from bpf.spec.grid import TUNABLE, GridSpec
from bpf.spec.run import RunSpec, digest
from bpf.spec.values import channel_numbers

RUN = {"dataset": "digits", "algorithm": "dfa"}
GRID = {"dataset": "digits", "algorithm": "dfa,bp"}


def refusal(model, naming="field", **values):
    required = RUN if model is RunSpec else GRID
    with pytest.raises(UsageError) as caught:
        build(model, {**required, **values}, naming)
    return str(caught.value)


def test_grid_defaults():
    grid = build(GridSpec, GRID)
    assert grid.algorithm == ("dfa", "bp")
    assert grid.arch == ("500", "500-500-500-500-500", "500-1000-500", "1000", "1000-1000", "1000-500-1000")
    assert grid.activation == ("tanh", "relu", "swish", "lrelu")
    assert grid.batch_norm == (False, True)
    assert grid.bw_init == ("ortho", "lecun")
    assert grid.lr == (0.0001, 0.001, 0.01, 0.1)
    assert grid.batch_size == (64,)
    assert grid.dropout == (0.0,)
    assert grid.weight_decay == (0.0,)
    assert grid.optimizer == ("adam",)
    assert grid.init == ("orthogonal",)
    assert grid.skew_type == ("none",)
    assert grid.imbalance_factor == (10.0,)
    assert (grid.executions_per_trial, grid.epochs, grid.examples_frac, grid.val_frac) == (3, 300, 0.5, 0.1)
    assert (grid.objective, grid.problem_type, grid.scaler, grid.momentum) == (
        "loss",
        "classification",
        "standard",
        0.9,
    )
    assert (grid.seed, grid.data_seed, grid.early_stopping, grid.allow_unstable) == (0, 0, 0, False)
    assert (grid.brightness, grid.rotation, grid.zoom, grid.translation, grid.flip, grid.crop) == (0, 0, 0, 0, 0, 0)
    assert (grid.device, grid.trackers, grid.options, grid.use_bias) == ("auto", (), {}, True)
    assert (grid.shuffle, grid.input_dropout) == (True, 0)


def test_run_defaults():
    run = build(RunSpec, RUN)
    assert (run.arch, run.activation, run.batch_norm, run.bw_init) == ("500", "tanh", False, "ortho")
    assert (run.lr, run.batch_size, run.dropout, run.epochs) == (0.001, 64, 0.0, 300)
    assert (run.skew_type, run.imbalance_factor) == ("none", None)


@pytest.mark.parametrize("objective", ["loss", "error", "val_loss", "val_error"])
def test_dropout_is_searched_for_validation_objectives_only(objective):
    grid = build(GridSpec, {**GRID, "objective": objective, "lr": 0.01})
    assert grid.dropout == ((0.0, 0.1, 0.2, 0.3, 0.4, 0.5) if objective.startswith("val_") else (0.0,))
    if objective.startswith("val_"):
        assert build(GridSpec, {**GRID, "objective": objective, "lr": 0.01, "dropout": "0"}).dropout == (0.0,)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("1e-3,1e-2", (0.001, 0.01)),
        ("1e-3, 1e-2", (0.001, 0.01)),
        (["1e-3", "1e-2"], (0.001, 0.01)),
        (["1e-3,0.1", 0.01], (0.001, 0.1, 0.01)),
        (["0.001", "1e-2", 0.1], (0.001, 0.01, 0.1)),
        (0.5, (0.5,)),
        ((0.1, 0.01), (0.1, 0.01)),
    ],
)
def test_lists(given, expected):
    assert build(GridSpec, {**GRID, "lr": given}).lr == expected


def test_lists_of_words_and_switches():
    grid = build(GridSpec, {**GRID, "arch": "010, 20-30", "batch_norm": "true", "activation": ["relu", "tanh"]})
    assert grid.arch == ("10", "20-30")
    assert grid.batch_norm == (True,)
    assert grid.activation == ("relu", "tanh")
    assert build(GridSpec, {**GRID, "arch": 500}).arch == ("500",)
    assert build(GridSpec, {**GRID, "algorithm": "bp, dfa"}).algorithm == ("bp", "dfa")
    assert build(GridSpec, {**GRID, "skew_type": "all"}).skew_type == ("none", "long_tailed", "step")
    assert build(GridSpec, {**GRID, "trackers": "gradients,bp_cosine"}).trackers == ("gradients", "bp_cosine")


@pytest.mark.parametrize("given", [[], "", "0.1,,0.2", "0.1,"])
def test_lists_with_nothing_in_them(given):
    assert refusal(GridSpec, lr=given) == (f"lr: {given!r} is not accepted: the list is empty or has an empty entry.")


def test_a_run_takes_no_lists():
    assert refusal(RunSpec, lr="0.1,0.2") == (
        "lr: '0.1,0.2' is not accepted: it must be a valid number, unable to parse string as a number."
    )


@pytest.mark.parametrize("model", [RunSpec, GridSpec])
def test_specs_are_frozen(model):
    spec = build(model, RUN)
    with pytest.raises(ValidationError, match="frozen"):
        spec.epochs = 3
    assert spec.epochs == 300


@pytest.mark.parametrize("model", [RunSpec, GridSpec])
def test_unknown_fields(model):
    assert refusal(model, batchsize=3) == "Unknown field 'batchsize'. Did you mean 'batch_size'?"
    assert refusal(model, learning_rates=1, epoch=1) == (
        f"{refusal(model, learning_rates=1)}\nUnknown field 'epoch'. Did you mean 'epochs'?"
    )
    everything = refusal(model, xyzxyz=1)
    assert everything.startswith("Unknown field 'xyzxyz'. Known: ")
    assert "activation, algorithm, " in everything


def test_missing_fields():
    with pytest.raises(UsageError) as caught:
        build(RunSpec, {"algorithm": "bp"})
    assert str(caught.value) == (
        "dataset is missing: Data set: digits, mnist, fmnist, kmnist, cifar10, cifar100, caltech256, eurosat, "
        "folder:PATH, npz:PATH, or a plugin's (see `bpf datasets`)."
    )
    with pytest.raises(UsageError) as caught:
        build(GridSpec, {"dataset": "digits"}, naming="option")
    assert str(caught.value).startswith("--algorithm is missing: ")


@pytest.mark.parametrize("model", [RunSpec, GridSpec])
def test_unknown_words(model):
    assert refusal(model, activation="tan") == ("activation: 'tan' is not one of the choices. Did you mean 'tanh'?")
    assert refusal(model, naming="option", bw_init="xx") == (
        "--bw-init: 'xx' is not one of the choices. Known: frenkel, lecun, nokland, ortho, principled."
    )
    assert refusal(model, output_loss="mes") == "output_loss: 'mes' is not one of the choices. Did you mean 'mse'?"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("epochs", 0, "epochs: 0 is not accepted: it must be greater than or equal to 1."),
        ("lr", 0, "lr: 0 is not accepted: it must be greater than 0."),
        ("lr", "nan", "lr: 'nan' is not accepted: it must be a finite number."),
        ("lr", "fast", "lr: 'fast' is not accepted: it must be a valid number, unable to parse string as a number."),
        ("dropout", 1.0, "dropout: 1.0 is not accepted: it must be less than 1."),
        ("batch_size", 0, "batch_size: 0 is not accepted: it must be greater than or equal to 1."),
        ("imbalance_factor", 0.5, "imbalance_factor: 0.5 is not accepted: it must be greater than or equal to 1."),
        (
            "arch",
            "500-",
            "arch: '500-' is not accepted: give the hidden layers' units joined by hyphens, such as 500-500-1000-500.",
        ),
        (
            "arch",
            "500-0",
            "arch: '500-0' is not accepted: a layer has 1 to 65536 units, and there are at most 100 layers.",
        ),
        (
            "device",
            "gpu",
            "device: 'gpu' is not accepted: give auto, cpu, cuda, cuda:N, several as cuda:0,cuda:1, or mps.",
        ),
    ],
)
@pytest.mark.parametrize("model", [RunSpec, GridSpec])
def test_values_out_of_range(model, field, value, message):
    assert refusal(model, **{field: value}) == message


@pytest.mark.parametrize("model", [RunSpec, GridSpec])
@pytest.mark.parametrize("objective", ["loss", "error"])
def test_dropout_needs_a_validation_objective(model, objective):
    assert refusal(model, objective=objective, dropout=0.3) == (
        f"dropout with objective {objective}: dropout regularises, and a training objective cannot see that, so "
        "it would have no effect but to make the objective worse. Use objective val_loss or val_error, leave "
        "dropout out, or fix one rate and keep the last epoch's network (keep last)."
    )
    assert build(model, {**RUN, "objective": objective, "dropout": 0})
    assert build(model, {**RUN, "objective": objective, "dropout": 0.3, "keep": "last"})


def test_several_dropouts_need_a_validation_objective_whatever_is_kept():
    assert "dropout with objective loss" in refusal(GridSpec, dropout=[0.1, 0.3], keep="last")


@pytest.mark.parametrize("model", [RunSpec, GridSpec])
def test_who_stops_early_keeps_the_best_epoch(model):
    assert refusal(model, keep="last", early_stopping=3) == (
        "keep last with early_stopping 3: an execution that stops early does so for the sake of its best epoch. Leave "
        "one of them out."
    )


@pytest.mark.parametrize(
    ("scaler", "numbers"),
    [
        ("33.3/78.6", ([33.3], [78.6])),
        ("125.3,123,0/63,62.1,1e-3", ([125.3, 123, 0], [63, 62.1, 1e-3])),
    ],
)
def test_scalers_of_numbers(scaler, numbers):
    assert build(RunSpec, {**RUN, "scaler": scaler}).scaler == scaler
    assert channel_numbers(scaler) == numbers


@pytest.mark.parametrize(
    "scaler", ["minmax", "33.3", "33.3/", "/3", "1,2/3", "1/2/3", "1,/2,3", "nan/1", "1/inf", "a/b"]
)
def test_what_is_no_scaler(scaler):
    assert refusal(RunSpec, scaler=scaler) == (
        f"scaler: {scaler!r} is not accepted: give standard, zero_one, identity, or MEANS/DEVIATIONS of the pixels in "
        "0..255, such as 33.3/78.6 or 125,123,114/63,62,67."
    )


@pytest.mark.parametrize("scaler", ["256/1", "-1/3", "5/0", "5/256"])
def test_scalers_are_of_pixels(scaler):
    assert "pixels are in 0..255" in refusal(RunSpec, scaler=scaler)


@pytest.mark.parametrize("objective", ["val_loss", "val_error"])
def test_validation_objectives_await_learning_rates(objective):
    grid = build(GridSpec, {**GRID, "objective": objective})
    assert grid.awaits_rates
    assert not build(GridSpec, {**GRID, "objective": objective, "lr": 0.1}).awaits_rates
    assert not build(GridSpec, {**GRID, "objective": objective, "lr_from": [RATE]}).awaits_rates
    assert not build(GridSpec, GRID).awaits_rates


RATE = {"algorithm": "dfa", "params": {"arch": "8", "batch_norm": False, "batch_size": 64}, "lr": 0.01}


def test_rates_that_are_handed_over_take_the_place_of_lr():
    grid = build(GridSpec, {**GRID, "objective": "val_loss", "lr_from": [RATE]})
    dumped = grid.model_dump(mode="json")
    assert dumped["lr_from"] == [RATE]
    assert "lr" not in dumped
    values = dict(dumped)
    del values["imbalance_factor"]
    assert build(GridSpec, values) == grid
    assert build(GridSpec, json.loads(json.dumps(values))) == grid
    plain = build(GridSpec, GRID).model_dump(mode="json")
    assert "lr_from" not in plain
    assert "lr" in plain


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"objective": "loss", "lr_from": [RATE]},
            "lr_from with objective loss: this objective tunes the learning rate itself. "
            "Use objective val_loss or val_error, or leave lr_from out.",
        ),
        (
            {"objective": "val_loss", "lr_from": [RATE], "lr": 0.1},
            "lr with lr_from: each setup has the learning rate of the earlier phase. Leave one out.",
        ),
        (
            {"objective": "val_loss", "lr_from": [RATE, {**RATE, "lr": 0.1}]},
            "lr_from: a setup has more than one learning rate.",
        ),
        (
            {"objective": "val_loss", "lr_from": "runs/digits"},
            "lr_from: 'runs/digits' is not accepted: it holds learning rates; the experiment to take them from is "
            "given with --lr-from.",
        ),
        (
            {"objective": "val_loss", "lr_from": [{"algorithm": "dfa", "params": {}}]},
            "lr_from: {'algorithm': 'dfa', 'params': {}} is not accepted: Field required.",
        ),
        (
            {"objective": "val_loss", "lr_from": [{**RATE, "rate": 1}]},
            "lr_from: 1 is not accepted: Extra inputs are not permitted.",
        ),
        (
            {"objective": "val_loss", "lr_from": [{**RATE, "lr": 0}]},
            "lr_from: 0 is not accepted: it must be greater than 0.",
        ),
    ],
)
def test_rates_that_are_refused(values, message):
    assert refusal(GridSpec, **values) == message


@pytest.mark.parametrize("model", [RunSpec, GridSpec])
def test_validation_objectives_need_a_validation_split(model):
    assert refusal(model, objective="val_error", val_frac=0, lr=0.1) == (
        "objective val_error with val_frac 0: there is no validation split to measure. Give val_frac, such as 0.1."
    )
    assert build(model, {**RUN, "val_frac": 0}).val_frac == 0


@pytest.mark.parametrize("model", [RunSpec, GridSpec])
@pytest.mark.parametrize("skew", [{}, {"skew_type": "none"}])
def test_an_imbalance_factor_needs_a_skew(model, skew):
    assert refusal(model, imbalance_factor=10, **skew) == (
        "imbalance_factor without skew: skew_type is none, so the factor would have no effect. "
        "Give skew_type long_tailed, step or all, or leave imbalance_factor out."
    )


@pytest.mark.parametrize("skew", ["step", "long_tailed"])
def test_a_skew_has_a_factor(skew):
    assert build(RunSpec, {**RUN, "skew_type": skew}).imbalance_factor == 10
    assert build(RunSpec, {**RUN, "skew_type": skew, "imbalance_factor": 3}).imbalance_factor == 3
    assert build(RunSpec, {**RUN, "skew_type": skew, "imbalance_factor": None}).imbalance_factor == 10
    assert refusal(RunSpec, skew_type=skew, imbalance_factor=0) == (
        "imbalance_factor: 0 is not accepted: it must be greater than or equal to 1."
    )
    assert build(GridSpec, {**GRID, "skew_type": ["none", skew], "imbalance_factor": "5,10"}).imbalance_factor == (
        5,
        10,
    )


@pytest.mark.parametrize("model", [RunSpec, GridSpec])
@pytest.mark.parametrize(("objective", "cure"), [("error", "loss"), ("val_error", "val_loss")])
def test_reconstruction_has_no_error(model, objective, cure):
    assert refusal(model, problem_type="reconstruction", objective=objective, lr=0.1) == (
        f"objective {objective} with problem_type reconstruction: only classification has an error rate. "
        f"Use objective {cure}."
    )


@pytest.mark.parametrize("model", [RunSpec, GridSpec])
def test_losses_of_reconstruction(model):
    reconstruction = {"problem_type": "reconstruction"}
    assert refusal(model, output_loss="ce", **reconstruction) == (
        "output_loss ce with problem_type reconstruction: pixels are not classes. "
        "Use output_loss mse (or bce with scaler zero_one)."
    )
    for scaler in ("standard", "identity"):
        assert refusal(model, output_loss="bce", scaler=scaler, **reconstruction) == (
            f"output_loss bce with scaler {scaler}: bce needs targets in [0, 1]. "
            "Use scaler zero_one, or output_loss mse."
        )
    assert build(model, {**RUN, "output_loss": "bce", "scaler": "zero_one", **reconstruction}).resolved_loss == "bce"
    assert build(model, {**RUN, **reconstruction}).resolved_loss == "mse"
    assert build(model, RUN).resolved_loss == "ce"
    assert build(model, {**RUN, "output_loss": "mse"}).resolved_loss == "mse"


def test_several_problems_are_told_at_once():
    assert refusal(RunSpec, epochs=0, activation="tan", banana=1).splitlines() == [
        "epochs: 0 is not accepted: it must be greater than or equal to 1.",
        "activation: 'tan' is not one of the choices. Did you mean 'tanh'?",
        refusal(RunSpec, banana=1),
    ]


def test_widths():
    assert build(RunSpec, {**RUN, "arch": "500-1000-20"}).widths == (500, 1000, 20)
    assert build(RunSpec, {**RUN, "arch": 7}).widths == (7,)


def test_identity_is_what_determines_the_numbers():
    run = build(RunSpec, RUN)
    same = [
        {"device": "cpu"},
        {"trackers": "gradients"},
        {"allow_unstable": True},
        {"output_loss": "ce"},
        {"momentum": 0.5},
        {"options": {"other": {"scale": 3}}},
    ]
    for change in same:
        assert build(RunSpec, {**RUN, **change}).identity() == run.identity(), change
    different = [
        {"algorithm": "bp"},
        {"dataset": "mnist"},
        {"arch": "500-500"},
        {"lr": 0.01},
        {"seed": 1},
        {"data_seed": 1},
        {"bw_init": "lecun"},
        {"optimizer": "sgd"},
        {"output_loss": "bce"},
        {"use_bias": False},
        {"objective": "error"},
        {"val_frac": 0.2},
        {"early_stopping": 3},
        {"rotation": 3},
        {"matmul_precision": "high"},
        {"flip": 0.5},
        {"crop": 4},
        {"shuffle": False},
        {"input_dropout": 0.2},
        {"schedule": "cosine"},
        {"clip": 1.0},
        {"scaler": "zero_one"},
        {"skew_type": "step"},
        {"options": {"dfa": {"scale": 3}}},
    ]
    digests = {digest(build(RunSpec, {**RUN, **change}).identity()) for change in [{}, *different]}
    assert len(digests) == 1 + len(different)
    assert run.identity(frozenset({"bw_init"})) == build(RunSpec, {**RUN, "bw_init": "lecun"}).identity({"bw_init"})
    whole = [build(RunSpec, {**RUN, "examples_frac": fraction}).identity() for fraction in (0, 1)]
    assert whole[0] == whole[1] != run.identity()
    sgd = [build(RunSpec, {**RUN, "optimizer": "sgd", "momentum": m}).identity() for m in (0.9, 0.5)]
    assert sgd[0] != sgd[1]


def test_digests_are_stable():
    assert digest({"b": [1, 2.5], "a": None}) == digest({"a": None, "b": [1, 2.5]}) == "e57f5d37865437a8"


def test_tunable_fields_are_the_ones_that_a_grid_lists():
    assert set(TUNABLE) == {
        *("algorithm", "arch", "activation", "batch_norm", "bw_init", "init", "optimizer", "lr", "weight_decay"),
        *("batch_size", "dropout", "skew_type", "imbalance_factor", "schedule"),
    }


def test_choices_and_bounds_in_words():
    assert choices("activation") == ("tanh", "relu", "swish", "lrelu", "sigmoid", "gelu", "elu")
    assert choices("output_loss") == ("auto", "ce", "bce", "mse")
    assert choices("lr") == ()
    for model in (RunSpec, GridSpec):
        assert bounds(model, "lr") == "above 0 to 10"
        assert bounds(model, "dropout") == bounds(model, "input_dropout") == "0 to below 1"
        assert bounds(model, "early_stopping") == "0 to 1000000"
        assert bounds(model, "epochs") == "1 to 1000000"
        assert bounds(model, "activation") == ""
        assert (bounds(model, "flip"), bounds(model, "crop")) == ("0 to 1", "0 to 64")


def test_words_among_options_are_no_numbers():
    options = {"dfa": {"name": "a_1", "other": "\u00e4,nan", "list": ["1e-3", 7, True, None]}}
    assert build(GridSpec, {**GRID, "options": options}).options == options


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        *((name, "1_000", "write numbers with the digits 0 to 9") for name in ("epochs", "seed", "batch_size")),
        *((name, "1_0.5", "write numbers with the digits 0 to 9") for name in ("lr", "val_frac")),
        *(
            (name, "\u0663", "write numbers with the digits 0 to 9")
            for name in ("epochs", "lr", "executions_per_trial")
        ),
        ("lr", ["0.1", "\uff11"], "write numbers with the digits 0 to 9"),
        *(("arch", arch, "units joined by hyphens") for arch in ("\u0665\u0660\u0660", "8-\u0665")),
        ("tracker_every", "\u0663", "a number of epochs"),
        ("device", "cuda:\u0661", "give auto, cpu"),
        *(("trackers", value, "") for value in (False, 0, {}, "", "a,a", ["a", "a"])),
        ("early_stopping", 1e30, "exceeded maximum size"),
        ("early_stopping", 1_000_001, "less than or equal to 1000000"),
        *(("arch", value, "8 is there more than once") for value in ("8,8", ["8", 8], "8,08")),
        ("lr", "0.1,1e-1", "0.1 is there more than once"),
        ("algorithm", "bp,dfa,bp", "bp is there more than once"),
        ("batch_norm", "true,yes", "True is there more than once"),
        ("options", {"dfa": {"scale": "1_0"}}, "'1_0' is no number: write it with the digits 0 to 9"),
        ("options", {"dfa": {"scale": ["0.1", "\u0660.5"]}}, "'\u0660.5' is no number"),
        ("device", "cuda:128", "give auto, cpu"),
        ("dataset", "folder:\x1b[2J", "control characters"),
        ("dataset", "folder:a\0b", "control characters"),
    ],
)
def test_what_was_accepted_once(field, value, reason):
    with pytest.raises(UsageError) as raised:
        build(GridSpec, {**GRID, field: value})
    assert str(raised.value).startswith(f"{field}: ")
    assert reason in str(raised.value)


def test_no_trackers():
    for value in (None, [], ()):
        assert build(GridSpec, {**GRID, "trackers": value}).trackers == ()
