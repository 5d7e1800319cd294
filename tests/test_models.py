"""Saved models: what comes back is what was trained, to the bit; foreign and changed files are refused; their use."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from bpf.data import cache
from bpf.data.base import Arrays
from bpf.data.subsets import subset
from bpf.errors import UsageError
from bpf.experiment.directory import prepare
from bpf.experiment.grid import as_grid
from bpf.experiment.places import model_path
from bpf.experiment.plugins import load_rules
from bpf.nn.network import Network
from bpf.results import evaluation, models
from bpf.results.evaluation import evaluate, predict
from bpf.spec.run import RunSpec
from bpf.training.cohort import Cohort

RULES = load_rules(["bp", "dfa"])
DIGITS = list("0123456789")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return cache.load("digits", tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def spec(**changes):
    small = {"dataset": "digits", "algorithm": "bp", "arch": "24-16", "epochs": 2, "examples_frac": 0.2, "lr": 0.01}
    return RunSpec.model_validate(small | changes)


def trained(data, runs=3, dtype=torch.float32, **changes):
    """A cohort of runs that differ in their seeds, trained to its end."""
    specs = [spec(seed=seed, **changes) for seed in range(runs)]
    cohort = Cohort(specs, RULES[specs[0].algorithm], data, dtype=dtype)
    while not cohort.done:
        cohort.run_epoch()
    assert {record.status for record in cohort.records} == {"complete"}
    return cohort


def saved(path: Path, cohort: Cohort, data, run=0) -> Path:
    models.save(path, models.content(cohort.best_network(run), cohort.specs[run], data.shape, data.classes))
    return path


@pytest.fixture
def model(tmp_path, digits):
    return saved(tmp_path / "model.safetensors", trained(digits, runs=1, batch_norm=True), digits)


def parts(path: Path):
    with safe_open(path, "pt") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def refusal(path: Path) -> str:
    with pytest.raises(UsageError) as caught:
        models.load(path)
    return str(caught.value)


# Round trips


@pytest.fixture
def tested(monkeypatch):
    """Every evaluation of a cohort: what its networks gave, [runs, batch, targets]; the last is of the test set."""
    given, logits = [], Network.logits

    def recorded(network, inputs):
        given.append(logits(network, inputs))
        return given[-1]

    monkeypatch.setattr(Network, "logits", recorded)
    return given


CASES = [
    *({"activation": a, "batch_norm": b} for a in models._ACTIVATIONS for b in (False, True)),
    {"use_bias": False},
    {"use_bias": False, "batch_norm": True},
    {"arch": "2-3"},
    {"arch": "40-30-20-10-7", "activation": "relu", "batch_norm": True, "algorithm": "dfa"},
    {"arch": "500-300"},
    {"output_loss": "bce", "scaler": "zero_one"},
    {"output_loss": "mse", "scaler": "identity", "lr": 1e-4},
    {"val_frac": 0.3, "objective": "val_error", "dropout": 0.2, "rotation": 10},
    {"skew_type": "long_tailed"},
    *({"problem_type": "reconstruction", "scaler": s, "lr": 1e-4} for s in ("standard", "zero_one", "identity")),
    {"scaler": "77.7/93.1"},
    {"problem_type": "reconstruction", "scaler": "77.7/93.1", "lr": 1e-4},
    {"problem_type": "reconstruction", "scaler": "zero_one", "output_loss": "bce", "batch_norm": True},
]


@pytest.mark.parametrize("changes", CASES, ids=lambda changes: " ".join(f"{n}={v}" for n, v in changes.items()))
def test_a_loaded_model_gives_the_logits_and_the_losses_of_training_to_the_bit(changes, tmp_path, digits, tested):
    cohort = trained(digits, **changes)
    for run, record in enumerate(cohort.records):
        path = saved(tmp_path / f"{run}.safetensors", cohort, digits, run)
        module = models.load(path)
        with torch.no_grad():
            for images in (digits.test_images, digits.test_images.float()):
                assert torch.equal(module(images), tested[-1][run])
        scores = evaluate(path, data_dir=tmp_path)
        assert {"loss": scores["loss"], "error": scores["error"]} == record.test
        held_out = evaluate(path, data_dir=tmp_path, part="val")
        assert {"loss": held_out["loss"], "error": held_out["error"]} == record.val


def in_an_experiment(directory: Path, data: Path, cohort: Cohort, digits) -> Path:
    """A model in an experiment whose data sets lie in `data`."""
    grid = as_grid(cohort.specs[0])
    experiment = prepare(directory, "tune", grid, data)
    experiment.directory.mkdir()
    experiment.save(["bpf tune"])
    return saved(model_path(directory / "models", "dfa", "key"), cohort, digits)


def test_the_data_are_where_the_experiment_has_them(tmp_path, digits, monkeypatch):
    (tmp_path / "sets").mkdir()
    path = in_an_experiment(tmp_path / "ex", tmp_path / "sets", trained(digits, runs=1), digits)
    asked = []

    def spy(name, data_dir, *more):
        asked.append(data_dir)
        return cache.load(name, data_dir, *more)

    monkeypatch.setattr(evaluation, "load", spy)
    evaluate(path)
    evaluate(path, data_dir=tmp_path / "mine")
    monkeypatch.chdir(path.parent)
    for relative in (path.name, f"../dfa/{path.name}", f"../../models/dfa/{path.name}"):
        evaluate(relative)
    (tmp_path / "link").symlink_to(path)
    evaluate(tmp_path / "link")
    (tmp_path / "ex" / "experiment.yaml").write_text("nothing")  # which a model does not need
    evaluate(path)
    (tmp_path / "copy" / "other" / "dfa").mkdir(parents=True)
    (tmp_path / "copy" / "experiment.yaml").touch()
    evaluate(shutil.copy(path, tmp_path / "copy" / "other" / "dfa"))
    sets = tmp_path / "sets"
    assert asked == [sets, tmp_path / "mine", sets, sets, sets, sets, Path("data"), Path("data")]


def test_data_that_are_not_where_the_experiment_has_them(tmp_path, digits, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = in_an_experiment(tmp_path / "ex", tmp_path / "sets", trained(digits, runs=1), digits)
    missing = npz(tmp_path / "few.npz").replace("few", "more")
    plain = refused(evaluate, path, missing, tmp_path)
    where = f"The data of the experiment {tmp_path / 'ex'}, which the model lies in, are in {tmp_path / 'sets'}"
    cure = "Name another directory with --data-dir."
    assert refused(evaluate, path, missing) == f"{plain}\n{where}, which is not there. {cure}"
    (tmp_path / "sets").mkdir()
    assert refused(evaluate, path, missing) == f"{plain}\n{where}. {cure}"


def test_predictions_and_onnx_need_no_data(tmp_path, digits, monkeypatch):
    pytest.importorskip("onnxscript")
    path = in_an_experiment(tmp_path / "ex", tmp_path / "gone", trained(digits, runs=1), digits)
    (image,) = folder_of(tmp_path / "pictures", digits, 1)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    relative = Path("..") / path.relative_to(tmp_path)
    (found,) = predict(relative, [Path("..") / image.relative_to(tmp_path)])
    assert found["class"] in DIGITS
    assert models.export_onnx(relative, "m.onnx") == Path("m.onnx")
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir()) == ["m.onnx"]


@pytest.mark.parametrize("runs", [1, 3])
def test_a_layer_of_one_unit_is_that_of_a_run_trained_alone(runs, tmp_path, digits, tested):
    """Stacked runs round differently there: a matrix times a vector has a kernel of its own, but not for many."""
    cohort = trained(digits, runs=runs, arch="1")
    path = saved(tmp_path / "m.safetensors", cohort, digits, 0)
    with torch.no_grad():
        logits = models.load(path)(digits.test_images)
    assert torch.equal(logits, tested[-1][0]) or runs > 1
    torch.testing.assert_close(logits, tested[-1][0], rtol=1e-5, atol=1e-6)
    loss = evaluate(path, data_dir=tmp_path)["loss"]
    assert loss == pytest.approx(cohort.records[0].test["loss"], rel=1e-6 if runs > 1 else 0, abs=0)


def test_a_model_in_double_precision_comes_back_in_it(tmp_path, digits, tested):
    cohort = trained(digits, dtype=torch.float64, batch_norm=True)
    path = saved(tmp_path / "m.safetensors", cohort, digits, 2)
    with torch.no_grad():
        assert torch.equal(models.load(path)(digits.test_images), tested[-1][2])
    assert evaluate(path, data_dir=tmp_path)["loss"] == cohort.records[2].test["loss"]


def test_batches_of_every_size_and_the_images_given_stay_as_they_are(model, digits):
    """The smallest take other kernels, where torch's own layers would round differently."""
    metadata, tensors = parts(model)
    network = Network.build(_structure(metadata, digits), [0, 1], None)
    for name, tensor in network.state().items():
        tensor.copy_(tensors[name])
    module = models.load(model)
    for size in (1, 2, 3, 7, 31, 360):
        images = digits.test_images[:size].float()
        before = images.clone()
        inputs = images.flatten(1).sub(127.5).mul(1 / 127.5)
        with torch.no_grad():
            assert torch.equal(module(images), network.logits(inputs.expand(2, -1, -1))[1])
        assert torch.equal(images, before)


def _structure(metadata, data):
    from bpf.nn.layer import Structure

    run = RunSpec.model_validate_json(metadata["spec"])
    return Structure(64, run.widths, len(data.classes), run.activation, run.batch_norm, run.use_bias, run.init)


def test_a_module_is_like_torchs_own_layers(model, digits):
    """An independent reference, up to rounding."""
    _, t = parts(model)

    def norm(k, units):
        layer = torch.nn.BatchNorm1d(units, eps=1e-5)
        own = {"weight": t[f"scale.{k}"], "bias": t[f"shift.{k}"]}
        own |= {"running_mean": t[f"mean.{k}"], "running_var": t[f"variance.{k}"]}
        layer.load_state_dict({name: value[0] for name, value in own.items()}, strict=False)
        return layer

    def linear(k):
        layer = torch.nn.Linear(*reversed(t[f"weight.{k}"].shape))
        layer.load_state_dict({"weight": t[f"weight.{k}"], "bias": t[f"bias.{k}"][0]})
        return layer

    tanh = torch.nn.Tanh()
    reference = torch.nn.Sequential(linear(0), norm(0, 24), tanh, linear(1), norm(1, 16), tanh, linear(2)).eval()
    pixels = digits.test_images.flatten(1).float() / 127.5 - 1
    torch.testing.assert_close(models.load(model)(digits.test_images), reference(pixels), rtol=1e-5, atol=1e-5)


def test_a_module_tells_what_it_is(model, digits):
    module = models.load(model)
    assert (module.classes, module.shape, module.training) == (DIGITS, (1, 8, 8), False)
    assert RunSpec.model_validate(module.spec) == spec(batch_norm=True)
    names = ["pixels", "linear_0", "norm_0", "tanh_0", "linear_1", "norm_1", "tanh_1", "linear_2"]
    assert [name for name, _ in module.named_children()] == names
    assert sorted(dict(module.named_parameters())) == sorted(
        [f"linear_{k}.{n}" for k in range(3) for n in ("weight", "bias")]
        + [f"norm_{k}.{n}" for k in range(2) for n in ("scale", "shift")]
    )
    told = models.info(model)
    assert len(told.pop("digest")) == 64
    assert told == {
        "path": str(model),
        "format": "bpf-model-1",
        "algorithm": "bp",
        "dataset": "digits",
        "problem_type": "classification",
        "shape": [1, 8, 8],
        "classes": DIGITS,
        "parameters": 64 * 24 + 24 * 16 + 16 * 10 + (24 + 16 + 10) + 2 * (24 + 16),
        "spec": module.spec,
    }
    assert json.loads(json.dumps(told)) == told


def test_paths_may_be_text(model, tmp_path, digits):
    [file] = folder_of(tmp_path / "pictures", digits, 1)
    assert models.load(str(model)).shape == models.read(str(model)).shape == (1, 8, 8)
    assert models.info(str(model)) == models.info(model)
    assert evaluate(str(model), data_dir=tmp_path) == evaluate(model, data_dir=tmp_path)
    assert predict(str(model), [str(file)]) == predict(model, [file])


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (2, 1, 8, 9), (2, 1, 64), (1, 8, 8), (8, 8)])
def test_images_of_another_shape_are_refused_by_name(shape, model, capfd):
    """64 inputs in another arrangement too: they would be other images."""
    with pytest.raises(AssertionError) as caught:
        models.load(model)(torch.zeros(shape, dtype=torch.uint8))
    assert str(caught.value) == "This network takes images of shape [N, C, H, W] = [N, 1, 8, 8]."
    assert capfd.readouterr() == ("", "")


def test_a_module_can_be_trained_further(model, digits):
    module = models.load(model)
    loss = torch.nn.functional.cross_entropy(module(digits.test_images), digits.test_labels)
    loss.backward()
    assert all(parameter.grad.abs().max() > 0 for n, parameter in module.named_parameters() if "norm" not in n)


ELSEWHERE = """
import sys
sys.modules["bpf"] = None
import torch
torch.set_num_threads(1)
images = torch.load("images.pt")
module = torch.load("module.pt", weights_only=False)
program = torch.export.load("module.pt2").module()
with torch.no_grad():
    torch.save([module(images), program(images)], "logits.pt")
print(*module.classes, module.shape, module.spec["algorithm"], module.training)
try:
    module(torch.zeros(2, 3, 32, 32))
except AssertionError as error:
    print(error)
assert not any(name.startswith("bpf.") for name in sys.modules)
"""


@pytest.mark.slow
def test_what_torch_saves_of_a_module_runs_where_bpf_is_not(model, tmp_path, digits):
    module, images = models.load(model), digits.test_images
    torch.save(module, tmp_path / "module.pt")
    program = torch.export.export(module, (images,), dynamic_shapes=({0: torch.export.Dim("N")},))
    torch.export.save(program, tmp_path / "module.pt2")
    torch.save(images[:123], tmp_path / "images.pt")
    command = [sys.executable, "-W", "error", "-c", ELSEWHERE]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    told = ["0 1 2 3 4 5 6 7 8 9 (1, 8, 8) bp False"]
    told += ["This network takes images of shape [N, C, H, W] = [N, 1, 8, 8]."]
    assert (done.stdout.splitlines(), done.stderr) == (told, "")
    with torch.no_grad():
        here = module(images[:123])
    assert all(torch.equal(there, here) for there in torch.load(tmp_path / "logits.pt"))


# Files that are refused


def test_a_directory_of_models_lists_them(tmp_path, model):
    places = [tmp_path / "ex" / "models" / rule / "key.safetensors" for rule in ("bp", "dfa")]
    for place in places:
        place.parent.mkdir(parents=True)
        place.write_bytes(model.read_bytes())
    listed = "".join(f"\n  {place}" for place in places)
    for directory in (tmp_path / "ex", tmp_path / "ex" / "models"):
        assert refusal(directory) == f"{directory} is a directory. Name one of its models:{listed}"
        assert refused(evaluate, directory) == refusal(directory)
    assert refusal(places[0].parent) == (f"{places[0].parent} is a directory. Name one of its models:\n  {places[0]}")
    for number in range(12):
        (places[0].parent / f"{number:02}.safetensors").write_bytes(b"")
    lines = refusal(places[0].parent).splitlines()
    assert (len(lines), lines[10], lines[11]) == (12, f"  {places[0].parent / '09.safetensors'}", "  and 3 more")


def test_a_missing_model_and_a_directory_are_named(tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path):
        assert refusal(path) == (
            f"There is no model {path}. Those of an experiment lie in its directory, in models/RULE/."
        )


@pytest.mark.parametrize("kept", [0, 5, 300, -1])
def test_a_truncated_model_is_refused(kept, model):
    model.write_bytes(model.read_bytes()[:kept])
    assert refusal(model) == f"{model} is no usable model: it is damaged or no safetensors file."


def test_a_pickle_is_refused_and_nothing_in_it_runs(tmp_path):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    path = tmp_path / "model.safetensors"
    torch.save(Trap(), path)
    assert refusal(path) == f"{path} is no usable model: it is damaged or no safetensors file."
    assert not (tmp_path / "ran").exists()


def test_every_changed_byte_of_tensors_and_text_is_noticed(model):
    content = model.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    weight = bytearray(content)
    weight[header + 4] ^= 1
    swapped = content.replace(rb"\"0\", \"1\"", rb"\"1\", \"0\"")
    for changed in (
        bytes(weight),
        swapped,
        content.replace(b"tanh", b"relu"),
        content.replace(b"[1, 8, 8]", b"[1, 4,16]"),
    ):
        assert changed != content
        model.write_bytes(changed)
        assert refusal(model) == (
            f"{model} is no usable model: its content does not agree with its digest, so it was damaged or changed."
        )
    model.write_bytes(content)
    models.load(model)


def without(name):
    return lambda told, tensors: ({n: v for n, v in told.items() if n != name}, tensors)


def text(**changes):
    return lambda told, tensors: (told | changes, tensors)


def spec_with(**changes):
    return lambda told, tensors: (told | {"spec": json.dumps(json.loads(told["spec"]) | changes)}, tensors)


def tensors_with(**changes):
    changes = {name.replace("_", "."): value for name, value in changes.items()}

    def change(told, tensors):
        changed = tensors | {name: value(tensors.get(name)) for name, value in changes.items()}
        return told, {name: value for name, value in changed.items() if value is not None}

    return change


MALFORMED = "its shape or its classes are malformed"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda told, tensors: ({}, tensors), "its format is None, and not 'bpf-model-1'"),
        (text(format="bpf-model-2"), "its format is 'bpf-model-2', and not 'bpf-model-1'"),
        (without("spec"), "it lacks spec"),
        (without("digest"), "it lacks digest"),
        (
            text(spec="{"),
            "this version of bpf cannot use its spec: Invalid JSON: EOF while parsing an object at line 1 column 1",
        ),
        (
            spec_with(activation="sine"),
            "this version of bpf cannot use its spec: activation: Input should be 'tanh', 'relu', 'swish', 'lrelu', "
            "'sigmoid', 'gelu' or 'elu'",
        ),
        (spec_with(novelty=1), "this version of bpf cannot use its spec: novelty: Extra inputs are not permitted"),
        (text(shape="[1, 8]"), MALFORMED),
        (text(shape="[-1, -8, 8]"), MALFORMED),
        (text(shape='"1x8x8"'), MALFORMED),
        (text(classes="[1, 2]"), MALFORMED),
        (text(classes="[]"), MALFORMED),
        (text(shape="[1, 4, 8]"), "weight.0 is [24, 64], and its spec asks for [24, 32]"),
        (text(classes='["a", "b"]'), "weight.2 is [10, 16], and its spec asks for [2, 16]"),
        (spec_with(arch="24-17"), "weight.1 is [16, 24], and its spec asks for [17, 24]"),
        (spec_with(arch="24"), "its spec knows no tensors bias.2, mean.1, scale.1, shift.1, variance.1, weight.2"),
        (spec_with(use_bias=False), "its spec knows no tensors bias.0, bias.1, bias.2"),
        (
            spec_with(arch="24-16-9"),
            "it lacks the tensors bias.3, mean.2, scale.2, shift.2, variance.2, weight.3 that its spec asks for",
        ),
        (spec_with(problem_type="reconstruction"), "weight.2 is [10, 16], and its spec asks for [64, 16]"),
        (tensors_with(mean_1=lambda _: None), "it lacks the tensors mean.1 that its spec asks for"),
        (tensors_with(extra=lambda _: torch.tensor(1.0)), "its spec knows no tensors extra"),
        (tensors_with(bias_0=lambda t: t[0]), "bias.0 is [24], and its spec asks for [1, 24]"),
        (
            tensors_with(bias_0=lambda t: t.half()),
            "its tensors are torch.float16, torch.float32, and not all float32 or all float64",
        ),
    ],
)
def test_files_that_do_not_agree_with_themselves_are_refused(change, problem, model):
    """With the right digest: whoever changes a file can compute that too."""
    told, tensors = change(*parts(model))
    if "digest" in told and "spec" in told:
        told["digest"] = models._digest({name: told[name] for name in models._TOLD}, tensors)
    save_file(tensors, model, told)
    assert refusal(model) == f"{model} is no usable model: {problem}."


def test_overflown_statistics_are_no_reason_to_refuse(model, digits):
    told, tensors = parts(model)
    tensors["variance.0"] = tensors["variance.0"].index_fill(1, torch.tensor([3]), torch.inf)
    told["digest"] = models._digest({name: told[name] for name in models._TOLD}, tensors)
    save_file(tensors, model, told)
    assert models.load(model)(digits.test_images).isfinite().all()


# Scores


def test_scores_count_who_is_taken_for_whom(model, tmp_path, digits):
    scores = evaluate(model, data_dir=tmp_path)
    with torch.no_grad():
        logits = models.load(model)(digits.test_images)
    taken, true = logits.argmax(1).tolist(), digits.test_labels.tolist()
    confusion = [
        [sum(t == row and p == column for t, p in zip(true, taken, strict=True)) for column in range(10)]
        for row in range(10)
    ]
    reference = torch.nn.functional.cross_entropy(logits, digits.test_labels).item()
    assert scores == {
        "model": str(model),
        "algorithm": "bp",
        "params": {
            **{"arch": "24-16", "activation": "tanh", "batch_norm": True, "init": "orthogonal", "optimizer": "adam"},
            **{"lr": 0.01, "weight_decay": 0.0, "batch_size": 64, "dropout": 0.0, "skew": "none"},
        },
        "seed": 0,
        "dataset": "digits",
        "part": "test",
        "examples": 360,
        "loss": pytest.approx(reference, rel=1e-6),
        "error": sum(t != p for t, p in zip(true, taken, strict=True)) / 360,
        "classes": DIGITS,
        "confusion": confusion,
    }
    assert json.loads(json.dumps(scores)) == scores


def test_scores_say_which_execution_they_are_of(tmp_path, digits):
    """With the parameters of a grid's cell; a rule that is not installed here has all that are tunable."""
    cohort = trained(digits, algorithm="dfa", skew_type="step", imbalance_factor=5)
    path = saved(tmp_path / "m.safetensors", cohort, digits, 2)
    scores = evaluate(path, data_dir=tmp_path)
    assert (scores["algorithm"], scores["seed"], scores["params"]["skew"]) == ("dfa", 2, "step:5")
    assert scores["params"]["bw_init"] == cohort.specs[2].bw_init
    absent = cohort.specs[2].model_copy(update={"algorithm": "elsewhere"})
    models.save(path, models.content(cohort.best_network(2), absent, digits.shape, digits.classes))
    scores = evaluate(path, data_dir=tmp_path)
    assert (scores["algorithm"], scores["seed"]) == ("elsewhere", 2)
    assert {name: scores["params"][name] for name in ("arch", "skew_type", "imbalance_factor")} == {
        **{"arch": "24-16", "skew_type": "step", "imbalance_factor": 5.0},
    }
    assert "algorithm" not in scores["params"]


def test_train_and_val_are_the_runs_own(model, tmp_path, digits):
    own = subset(
        digits.train_labels.numpy(),
        examples_frac=0.2,
        val_frac=0.1,
        skew_type="none",
        imbalance_factor=None,
        data_seed=0,
    )
    for part, index in (("train", own.train), ("val", own.val)):
        scores = evaluate(model, data_dir=tmp_path, part=part)
        counts = np.bincount(digits.train_labels.numpy()[index], minlength=10)
        assert [sum(row) for row in scores["confusion"]] == counts.tolist()
        with torch.no_grad():
            wrong = models.load(model)(digits.train_images[index]).argmax(1) != digits.train_labels[index]
        assert (scores["examples"], scores["error"]) == (len(index), pytest.approx(int(wrong.sum()) / len(index)))


def test_a_reconstruction_has_a_loss_and_no_error(tmp_path, digits):
    cohort = trained(digits, runs=1, problem_type="reconstruction")
    scores = evaluate(saved(tmp_path / "m", cohort, digits), data_dir=tmp_path)
    assert (scores["error"], scores["confusion"], scores["examples"]) == (None, None, 360)
    with torch.no_grad():
        output = models.load(tmp_path / "m")(digits.test_images).tanh()
    target = digits.test_images.flatten(1) / 127.5 - 1
    assert scores["loss"] == pytest.approx((output - target).square().mean().item(), rel=1e-5)


def test_more_than_one_batch_is_summed_as_in_training(tmp_path):
    """1300 test images: two full batches of 512 and one of 276."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (1400, 3, 5, 4), dtype=np.uint8), np.arange(1400) % 7
    path = tmp_path / "own.npz"
    np.savez(
        path, train_images=images[:100], train_labels=labels[:100], test_images=images[100:], test_labels=labels[100:]
    )
    data = cache.load(f"npz:{path}", tmp_path)
    cohort = trained(data, dataset=f"npz:{path}", examples_frac=1, epochs=1)
    for run, record in enumerate(cohort.records):
        scores = evaluate(saved(tmp_path / "m", cohort, data, run), data_dir=tmp_path)
        assert {"loss": scores["loss"], "error": scores["error"]} == record.test
        assert scores["examples"] == 1300


def test_evaluation_leaves_the_process_as_it_was(model, tmp_path):
    torch.set_num_threads(2)
    torch.set_flush_denormal(False)  # a worker in this process may have set it
    evaluate(model, data_dir=tmp_path)
    assert torch.get_num_threads() == 2
    assert torch.is_grad_enabled()
    assert torch.tensor(1e-40).mul(1) != 0


def refused(call, *arguments, **options) -> str:
    with pytest.raises(UsageError) as caught:
        call(*arguments, **options)
    return str(caught.value)


def npz(path: Path, size=(8, 8), classes=tuple(DIGITS)) -> str:
    count = len(classes)
    images, labels = np.zeros((count, *size), dtype=np.uint8), np.arange(count)
    arrays = {"train_images": images, "train_labels": labels, "test_images": images, "test_labels": labels}
    np.savez(path, **arrays, classes=np.array(classes))
    return f"npz:{path}"


def test_other_data_are_used_if_they_fit(model, tmp_path):
    same = npz(tmp_path / "same.npz", classes=tuple("abcdefghij"))
    scores = evaluate(model, same, tmp_path)
    assert (scores["dataset"], scores["examples"], scores["classes"]) == (same, 10, DIGITS)
    assert [sum(row) for row in scores["confusion"]] == [1] * 10


def test_data_that_do_not_fit_are_refused(model, tmp_path):
    wide, few = npz(tmp_path / "wide.npz", size=(8, 9)), npz(tmp_path / "few.npz", classes=("a", "b"))
    turned = npz(tmp_path / "turned.npz", classes=tuple(reversed(DIGITS)))
    assert refused(evaluate, model, wide, tmp_path) == (
        f"The images of {wide} are 1x8x9 (channels x height x width), and {model} takes 1x8x8. "
        "Evaluate it on such images."
    )
    assert refused(evaluate, model, few, tmp_path) == (
        f"{few} has 2 classes, and {model} tells 10 apart. Evaluate it on a data set with the same classes."
    )
    assert refused(evaluate, model, turned, tmp_path) == (
        f"{turned} has the classes of {model} in another order: 9, 8, 7, 6, 5, ..., and not 0, 1, 2, 3, 4, .... "
        "Number them alike."
    )
    assert refused(evaluate, model, part="tets") == "There is no part 'tets'. Did you mean 'test'?"
    assert refused(evaluate, model, "digits", tmp_path, image_size=8) == (
        "The dataset 'digits' has images of one size; leave out --image-size. "
        "It works with: caltech256, eurosat, folder."
    )


def test_a_run_without_validation_has_no_val_part(tmp_path, digits):
    path = saved(tmp_path / "m", trained(digits, runs=1, val_frac=0), digits)
    assert refused(evaluate, path, part="val") == (
        f"{path} was trained without a validation split (val_frac 0). Evaluate test or train."
    )
    assert evaluate(path, data_dir=tmp_path, part="train")["examples"] == 287


def folder_of(root: Path, data, count: int) -> list[Path]:
    """The first test images as PNG files in the directories of their classes, named by their place."""
    files = []
    for place in range(count):
        path = root / data.classes[data.test_labels[place]] / f"{place:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(data.test_images[place, 0].numpy()).save(path)
        files.append(path)
    return files


def test_a_folder_of_other_images_is_scaled_to_the_models_size(model, tmp_path, digits):
    files = folder_of(tmp_path / "pictures" / "test", digits, 60)
    folder_of(tmp_path / "pictures" / "train", digits, 60)
    with torch.no_grad():
        wrong = models.load(model)(digits.test_images[:60]).argmax(1) != digits.test_labels[:60]
    folder = f"folder:{tmp_path / 'pictures'}"
    assert evaluate(model, folder, tmp_path)["error"] == pytest.approx(int(wrong.sum()) / 60)
    for file in files:
        with Image.open(file) as image:
            image.resize((24, 24), Image.Resampling.NEAREST).save(file)
    assert evaluate(model, folder, tmp_path)["examples"] == 60
    assert refused(evaluate, model, folder, tmp_path, image_size=9) == (
        f"The images of {folder} are 1x9x9 (channels x height x width), and {model} takes 1x8x8. "
        "Evaluate it on such images."
    )


# Predictions


def test_predictions_are_the_models_best_classes(model, tmp_path, digits):
    files = folder_of(tmp_path / "pictures", digits, 12)
    (tmp_path / "pictures" / ".hidden.png").write_text("no image")
    (tmp_path / "pictures" / "notes.txt").write_text("no image")
    with torch.no_grad():
        probabilities = models.load(model)(digits.test_images[:12]).softmax(1)
    expected = {
        str(file): sorted(zip(p, DIGITS, strict=True), reverse=True)[:3]
        for file, p in zip(files, probabilities.tolist(), strict=True)
    }
    found = predict(model, [tmp_path / "pictures"], top=3)
    assert [one["file"] for one in found[::3]] == sorted(expected)
    assert found == [
        {"file": file, "rank": rank, "class": name, "probability": value, "converted": False}
        for file in sorted(expected)
        for rank, (value, name) in enumerate(expected[file], 1)
    ]
    assert predict(model, [files[5]]) == [
        {
            "file": str(files[5]),
            "rank": 1,
            "class": expected[str(files[5])][0][1],
            "probability": pytest.approx(expected[str(files[5])][0][0], rel=1e-5),
            "converted": False,
        }
    ]
    whole = predict(model, [files[0]], top=99)
    assert [one["rank"] for one in whole] == list(range(1, 11))
    assert sum(one["probability"] for one in whole) == pytest.approx(1)


@pytest.mark.parametrize("loss", ["bce", "mse"])
def test_outputs_that_are_no_probabilities_are_called_scores(loss, tmp_path, digits):
    path = saved(tmp_path / "m", trained(digits, runs=1, output_loss=loss), digits)
    [file] = folder_of(tmp_path / "pictures", digits, 1)
    with torch.no_grad():
        scores = models.load(path)(digits.test_images[:1]).sigmoid()[0]
    [found] = predict(path, [file])
    best = {"class": str(int(scores.argmax())), "score": scores.max().item()}
    assert found == {"file": str(file), "rank": 1, **best, "converted": False}


def colourful(path: Path, rng, size) -> np.ndarray:
    pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def test_colour_becomes_grey_as_pil_makes_it(model, tmp_path, digits):
    """A grey picture stored in colour is the same as one stored in grey, and a coloured one is what PIL makes grey."""
    [grey] = folder_of(tmp_path / "pictures", digits, 1)
    with Image.open(grey) as image:
        image.convert("RGBA").save(tmp_path / "stored-in-colour.png")
    colourful(tmp_path / "coloured.png", np.random.default_rng(0), (8, 8))
    with Image.open(tmp_path / "coloured.png") as image:
        image.convert("L").save(tmp_path / "grey.png")
    names = [grey, *(tmp_path / name for name in ("stored-in-colour.png", "coloured.png", "grey.png"))]
    found = predict(model, names)
    assert [p["converted"] for p in found] == [False, True, True, False]
    one, same, other, other_same = ((p["class"], p["probability"]) for p in found)
    assert one == same
    assert other == other_same


def test_it_is_told_how_images_were_converted(model, tmp_path, digits):
    """In size or in colour, for each image and in one line for all."""
    [exact] = folder_of(tmp_path / "pictures", digits, 1)
    for number, size in enumerate([(32, 32), (32, 32), (16, 24)]):
        colourful(tmp_path / f"{number}.png", np.random.default_rng(number), size)
    told: list[str] = []
    assert predict(model, [exact], tell=told.append)[0]["converted"] is False
    assert told == []
    found = predict(model, [exact, *(tmp_path / f"{number}.png" for number in range(3))], top=2, tell=told.append)
    assert [one["converted"] for one in found] == [False] * 2 + [True] * 6
    assert told == [
        "3 of 4 images were converted to the model's 1x8x8 (channels x height x width), from 3x32x32, 3x16x24"
    ]


def test_grey_becomes_colour_and_sizes_become_the_models(tmp_path):
    """For a model of coloured images that are not square."""
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (40, 3, 6, 9), dtype=np.uint8)
    labels = np.arange(40) % 2
    arrays = Arrays(images, labels, images, labels, ("even", "odd"))
    data = cache.Data("own", *map(torch.from_numpy, (arrays.train_images, arrays.train_labels) * 2), arrays.classes)
    path = saved(tmp_path / "m", trained(data, runs=1, dataset="npz:own.npz", examples_frac=1), data)
    pixels = colourful(tmp_path / "exact.png", rng, (6, 9))
    Image.fromarray(pixels[..., 0]).save(tmp_path / "grey.png")
    Image.fromarray(pixels.repeat(4, 0).repeat(4, 1)).save(tmp_path / "larger.png")
    with torch.no_grad():
        inputs = np.stack([pixels.transpose(2, 0, 1), pixels[..., :1].repeat(3, 2).transpose(2, 0, 1)])
        expected = models.load(path)(torch.from_numpy(inputs)).softmax(1).max(1).values
    found = predict(path, [tmp_path / "exact.png", tmp_path / "grey.png"])
    assert [one["probability"] for one in found] == expected.tolist()
    [larger] = predict(path, [tmp_path / "larger.png"])
    assert larger["class"] in ("even", "odd")


def test_reconstructions_are_written_as_images(tmp_path, digits):
    for scaler, squash in {"standard": torch.tanh, "zero_one": torch.sigmoid, "identity": lambda a: a}.items():
        cohort = trained(digits, runs=1, problem_type="reconstruction", scaler=scaler, lr=0.001, epochs=10)
        path = saved(tmp_path / f"{scaler}.safetensors", cohort, digits)
        files = folder_of(tmp_path / "pictures", digits, 3)
        again = tmp_path / files[0].name
        again.write_bytes(files[0].read_bytes())
        output = tmp_path / scaler / "new"
        found = predict(path, [*files, again], output=output)
        names = ["000.png", "001.png", "002.png", "000-2.png"]
        assert found == [
            {"file": str(file), "output": str(output / name), "converted": False}
            for file, name in zip([*files, again], names, strict=True)
        ]
        with torch.no_grad():
            outputs = squash(models.load(path)(digits.test_images[:3]))
        expected = {"standard": (outputs + 1) * 127.5, "zero_one": outputs * 255, "identity": outputs}[scaler]
        for one, name in zip(expected.clamp(0, 255).view(-1, 8, 8), names, strict=False):
            with Image.open(output / name) as image:
                assert image.mode == "L"
                assert np.abs(np.asarray(image) - one.numpy()).max() <= 0.5001
        assert (output / "000-2.png").read_bytes() == (output / "000.png").read_bytes()
        assert sorted(p.name for p in output.iterdir()) == sorted(names)
        assert refused(predict, path, files, output=output) == (
            f"{output / '000.png'} exists already. Choose another directory."
        )
        assert refused(predict, path, files) == (
            f"{path} reconstructs images; name a directory for them with --output."
        )
        (tmp_path / "experiment.yaml").touch()
        assert refused(predict, path, files, output=tmp_path / "models" / "new") == (
            f"{tmp_path / 'models' / 'new'} belongs to the experiment {tmp_path} itself. Choose another place."
        )


def test_images_that_cannot_be_used_are_named(model, tmp_path):
    missing, empty, text = tmp_path / "none.png", tmp_path / "empty", tmp_path / "text.png"
    empty.mkdir()
    text.write_text("no image")
    assert refused(predict, model, []) == "Name at least one image, or a directory of images."
    assert refused(predict, model, [missing]) == f"There is no image {missing}."
    assert refused(predict, model, [empty]) == (
        f"{empty} has no images. Recognised are .bmp .gif .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff .webp."
    )
    assert refused(predict, model, [text]) == (
        f"1 of the 1 images of your selection cannot be read. Replace or remove them:\n  {text}: is not an image"
    )
    assert refused(predict, model, [text], top=0) == "top is 0; it must be at least 1."
    assert refused(predict, model, [text], output=tmp_path) == (
        f"{model} classifies images and writes none; leave out --output."
    )


# ONNX


@pytest.mark.parametrize(
    "changes",
    [
        {"activation": "tanh", "batch_norm": True},
        *(
            pytest.param({"activation": activation, "batch_norm": True}, marks=pytest.mark.slow)
            for activation in models._ACTIVATIONS
            if activation != "tanh"
        ),
        pytest.param({"use_bias": False, "scaler": "identity", "lr": 1e-4}, marks=pytest.mark.slow),
        {"problem_type": "reconstruction", "scaler": "zero_one"},
    ],
    ids=lambda changes: " ".join(f"{n}={v}" for n, v in changes.items()),
)
def test_onnx_gives_the_same_logits_for_any_number_of_images(changes, tmp_path, digits, capfd):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = saved(tmp_path / "m.safetensors", trained(digits, runs=1, **changes), digits)
    assert models.export_onnx(path, tmp_path / "new" / "m.onnx") == tmp_path / "new" / "m.onnx"
    assert capfd.readouterr() == ("", "")
    session = onnxruntime.InferenceSession(tmp_path / "new" / "m.onnx")
    [images], [logits] = session.get_inputs(), session.get_outputs()
    targets = 64 if "problem_type" in changes else 10
    assert (images.name, images.type, images.shape) == ("images", "tensor(uint8)", ["N", 1, 8, 8])
    assert (logits.name, logits.type, logits.shape) == ("logits", "tensor(float)", ["N", targets])
    module = models.load(path)
    for count in (1, 2, 360):
        [found] = session.run(None, {"images": digits.test_images[:count].numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(found, module(digits.test_images[:count]).numpy(), rtol=1e-5, atol=1e-5)
    told = session.get_modelmeta().custom_metadata_map
    assert (json.loads(told["classes"]), json.loads(told["shape"])) == (DIGITS, [1, 8, 8])
    assert json.loads(told["spec"]) == module.spec


def test_onnx_replaces_nothing_but_its_own(model, tmp_path):
    pytest.importorskip("onnxscript")
    before = model.read_bytes()
    assert refused(models.export_onnx, model, model) == (
        f"{model} exists and is no ONNX file of a model of bpf, so it is not replaced. Choose another name."
    )
    assert model.read_bytes() == before
    output = tmp_path / "m.onnx"
    output.touch()
    for _ in range(2):
        assert models.export_onnx(str(model), str(output)) == output
    assert output.stat().st_size > 1000
    onnx = pytest.importorskip("onnx")
    foreign = onnx.load(output)
    del foreign.metadata_props[:]
    onnx.save(foreign, output)
    before = output.read_bytes()
    assert "is no ONNX file of a model of bpf" in refused(models.export_onnx, model, output)
    assert output.read_bytes() == before


def test_onnx_without_its_packages_says_what_to_install(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert refused(models.export_onnx, model, tmp_path / "m.onnx") == (
        "Export to ONNX needs onnx and onnxscript: pip install 'bpf[onnx]'"
    )
