"""Rules with memory: their own parameters and states in training, resumes, measurements and models."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bpf
from bpf.algorithms import Algorithm, Step
from bpf.algorithms.dfa import DirectFeedbackAlignment
from bpf.cli import app as cli
from bpf.data import cache
from bpf.experiment.directory import open_experiment
from bpf.experiment.plugins import load_rules, load_trackers
from bpf.nn.layer import Structure
from bpf.nn.network import Network
from bpf.results import models, stages, summary
from bpf.spec.run import RunSpec
from bpf.training.cohort import Cohort


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return cache.load("digits", tmp_path_factory.mktemp("data"))


class Scales(DirectFeedbackAlignment):
    """Errors times a factor that learns, a mean of the error's size, and noise: one of each kind of memory."""

    def prepare(self, network, runs):
        weight = network.output.weight
        network.add_parameter("scales.factor", torch.ones(len(runs), 1, 1, dtype=weight.dtype), rate=0.1)
        network.add_state("scales.mean", torch.ones(len(runs), 1, 1, dtype=weight.dtype))

    def gradients(self, step: Step) -> None:
        super().gradients(step)
        factor, mean = step.network.parameters["scales.factor"], step.network.buffers["scales.mean"]
        size = step.network.output.bias_gradient.abs().mean((1, 2), keepdim=True)
        mean.lerp_(size, 0.1)
        for layer in step.network.hidden:
            layer.weight_gradient.mul_(factor / (mean + 0.1))
            layer.weight_gradient.add_(step.normal(f"noise.{layer.index}", *layer.weight.shape[1:]), alpha=1e-3)
        step.network.gradients["scales.factor"].copy_(size)

    def updated(self, step: Step) -> None:
        step.network.buffers["scales.mean"].clamp_(max=10.0)


def specs(runs=3, **changes):
    small = {"dataset": "digits", "arch": "24-16", "epochs": 4, "examples_frac": 0.2, "objective": "val_loss"}
    one = small | {"algorithm": "dfa", "batch_size": 50, "batch_norm": True} | changes
    return [RunSpec.model_validate(one | {"lr": 1e-3 * (1 + run), "seed": run}) for run in range(runs)]


def trained(several, rule, data, trackers=None):
    cohort = Cohort(several, rule, data, trackers)
    while not cohort.done:
        cohort.run_epoch()
    return cohort


def outcome(cohort):
    return [(record.status, record.history, record.test) for record in cohort.records]


def test_memory_goes_through_every_resume_bit_by_bit(digits):
    several = specs(optimizer="nag")
    whole, states = Cohort(several, Scales, digits, keep_final=True), []
    while not whole.done:
        states.append(io.BytesIO())
        torch.save(whole.state(), states[-1])
        whole.run_epoch()
    for file in states:
        file.seek(0)
        resumed = Cohort(several, Scales, digits, keep_final=True)
        resumed.load(torch.load(file, weights_only=True))
        while not resumed.done:
            resumed.run_epoch()
        assert outcome(resumed) == outcome(whole)
        for run, kept in whole._left.items():
            for name, tensor in kept["network"].items():
                assert torch.equal(resumed._left[run]["network"][name], tensor), name
    assert {"scales.factor", "scales.mean"} < set(whole._left[0]["network"])


def test_memory_learns_and_is_each_runs_own(digits):
    together = Cohort(specs(), Scales, digits, dtype=torch.float64)
    for _ in range(3):
        together.run_epoch()
    for run, spec in enumerate(specs()):
        alone = Cohort([spec], Scales, digits, dtype=torch.float64)
        for _ in range(3):
            alone.run_epoch()
        position = together._stacked.index(run)
        for name, tensor in alone._network.state().items():
            torch.testing.assert_close(together._network.state()[name][position], tensor[0], rtol=1e-8, atol=1e-10)
    assert (together._network.parameters["scales.factor"] != 1).all()
    assert (together._network.buffers["scales.mean"] != 1).all()


def test_the_factor_on_the_learning_rate_is_applied(digits):
    """SGD without momentum: after one step a parameter has moved by factor × rate × gradient."""
    [spec] = specs(runs=1, optimizer="sgd", momentum=0.0, batch_size=1000)
    cohort = Cohort([spec], Scales, digits, dtype=torch.float64)
    cohort.run_epoch()
    moved = 1 - cohort._network.parameters["scales.factor"]
    torch.testing.assert_close(moved, 0.1 * spec.lr * cohort._network.gradients["scales.factor"], rtol=1e-9, atol=0)


def test_measurements_change_nothing(digits):
    names = ("bp_cosine", "weight_alignment", "gradients", "weights", "local_loss", "activations")
    plain = trained(specs(), Scales, digits)
    measured = trained(specs(tracker_every="2 steps"), Scales, digits, load_trackers(names))
    assert outcome(measured) == outcome(plain)
    assert measured.records[0].tracked["bp_cosine/layer.0"]


class ChangesABuffer(DirectFeedbackAlignment):
    """Keeps a mean in a tensor that it has not declared."""

    def prepare(self, network, runs):
        network.buffers["mean"] = torch.zeros(len(runs), 1)

    def gradients(self, step):
        super().gradients(step)
        step.network.buffers["mean"] += 1


class ReplacesABuffer(ChangesABuffer):
    """Puts a new tensor in its place."""

    def gradients(self, step):
        DirectFeedbackAlignment.gradients(self, step)
        step.network.buffers["mean"] = step.network.buffers["mean"] + 1


class ChangesItsOwn(DirectFeedbackAlignment):
    """Keeps a tensor of its own."""

    def gradients(self, step):
        if not hasattr(self, "mean"):
            self.mean = torch.zeros(())
        self.mean += step.inputs.mean()
        super().gradients(step)


class ChangesWeights(DirectFeedbackAlignment):
    """Learns by itself, besides the optimizer."""

    def gradients(self, step):
        super().gradients(step)
        step.network.output.weight.mul_(0.99)


@pytest.mark.parametrize(
    ("rule", "what"),
    [
        (ChangesABuffer, "the tensor mean"),
        (ReplacesABuffer, "the tensor mean"),
        (ChangesItsOwn, "its mean"),
        (ChangesWeights, "the tensor weight.2"),
    ],
)
def test_what_changes_undeclared_is_refused_in_the_first_steps(rule, what, digits):
    with pytest.raises(ValueError, match=f"it changes {what} in its steps and has not declared it") as refused:
        Cohort(specs(), rule, digits).run_epoch()
    assert str(refused.value).endswith(
        "so that a resume would lose it: add it in `prepare`, by network.add_state or network.add_parameter, and "
        "change it in place"
    )


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("weight.7", torch.zeros(2, 1), "'weight.7' cannot be the name of a rule's tensor"),
        ("../x", torch.zeros(2, 1), "'../x' cannot be the name of a rule's tensor"),
        ("mine", torch.zeros(3, 1), "mine is [3, 1]: the first axis is that of the 2 runs."),
        ("mine", torch.zeros(2, 1).double(), "mine is torch.float64, and the weights are torch.float32."),
    ],
)
def test_what_a_rule_may_add(name, tensor, message):
    network = Network.build(Structure(6, (5,), 3), [0, 1], None)
    with pytest.raises(ValueError, match=r".") as refused:
        network.add_parameter(name, tensor)
    assert str(refused.value).startswith(message)
    network.add_state("count", torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="'count' cannot be the name"):
        network.add_state("count", torch.zeros(2))


def cosines(cohort, ours, theirs):
    own = cohort._network.parameters
    return torch.nn.functional.cosine_similarity(own[ours].flatten(1), own[theirs].flatten(1))


@pytest.mark.parametrize("optimizer", ["nag", "sgd"])
def test_kolen_pollacks_matrices_become_the_weights(optimizer, digits):
    several = [
        spec.model_copy(update={"lr": 0.05}) for spec in specs(optimizer=optimizer, epochs=100, weight_decay=0.03)
    ]
    cohort = Cohort(several, load_rules(["kp"])["kp"], digits)
    before = [cosines(cohort, f"kp.{k}", f"weight.{k}") for k in (1, 2)]
    for _ in range(60):
        cohort.run_epoch()
    after = [cosines(cohort, f"kp.{k}", f"weight.{k}") for k in (1, 2)]
    assert all((cosine.abs() < 0.5).all() for cosine in before)
    assert all((cosine > 0.99).all() for cosine in after), after


# Models


class ByNearest(DirectFeedbackAlignment):
    """Predicts by how near the logits are to a mean of each class's, which it keeps; only to be its own prediction."""

    def prepare(self, network, runs):
        targets = network.structure.targets
        network.add_state("near.means", torch.eye(targets).repeat(len(runs), 1, 1), saved=True)
        network.add_state("near.count", torch.zeros(len(runs)))

    def gradients(self, step):
        super().gradients(step)
        means = torch.bmm(step.target.mT, step.logits) / step.target.sum(1)[..., None].clamp(min=1)
        step.network.buffers["near.means"].lerp_(means, 0.05)
        step.network.buffers["near.count"] += 1

    def logits(self, network, inputs):
        means = network.buffers["near.means"]
        return 2 * torch.bmm(network.logits(inputs), means.mT) - means.square().sum(-1)[:, None]


PLUGIN = """
from test_memory import ByNearest, Scales


class Nearest(ByNearest):
    '''Predicts by the nearest class.'''

    problem_types = frozenset({"classification"})


class Scaled(Scales):
    '''Has parameters of its own.'''

    problem_types = frozenset({"classification", "reconstruction"})
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    (tmp_path / "nearby.py").write_text(PLUGIN)
    info = tmp_path / "nearby-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: nearby\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[bpf.algorithms]\nnearest = nearby:Nearest\nscaled = nearby:Scaled\n")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def run(*arguments):
    with pytest.raises(SystemExit) as end:
        cli.main(list(arguments))
    return end.value.code or 0


@pytest.mark.parametrize("rule", ["nearest", "scaled", "kp"])
def test_models_of_rules_with_memory(rule, plugin, tmp_path, capsys):
    directory = tmp_path / "one"
    asked = f"--dataset digits --algorithm {rule} --arch 16 --epochs 3 --quiet --data-dir {tmp_path}/data"
    assert run("train", str(directory), *asked.split()) == 0
    [path] = directory.rglob("*.safetensors")
    model = models.read(path)
    assert set(model.own.tensors) == ({"near.means"} if rule == "nearest" else set())
    assert model.own.predicts == (rule == "nearest")
    capsys.readouterr()
    assert run("evaluate", str(path), "--json", "--data-dir", f"{tmp_path}/data") == 0
    scores = json.loads(capsys.readouterr().out)
    [row] = summary.rows(open_experiment(directory))
    assert scores["error"] == pytest.approx(row.result["executions"][0]["test"]["error"])
    module, images = bpf.load(path), torch.randint(0, 256, (7, 1, 8, 8), dtype=torch.uint8)
    assert module(images).shape == (7, 10)
    if rule == "nearest":
        means = model.tensors["near.means"]
        expected = 2 * _logits(model, images) @ means.T - means.square().sum(-1)
        torch.testing.assert_close(module(images), expected, rtol=1e-4, atol=1e-4)
        onnx = pytest.importorskip("onnxruntime")
        session = onnx.InferenceSession(str(models.export_onnx(path, tmp_path / "model.onnx")))
        torch.testing.assert_close(
            torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), expected, rtol=1e-3, atol=1e-3
        )


def _logits(model, images):
    h = (images.flatten(1).float() - 127.5) / 127.5
    h = torch.tanh(h @ model.tensors["weight.0"].T + model.tensors["bias.0"])
    return h @ model.tensors["weight.1"].T + model.tensors["bias.1"]


def test_a_model_that_needs_its_rule_says_which(plugin, tmp_path):
    directory = tmp_path / "one"
    asked = f"--dataset digits --algorithm nearest --arch 16 --epochs 1 --quiet --data-dir {tmp_path}/data"
    assert run("train", str(directory), *asked.split()) == 0
    [path] = directory.rglob("*.safetensors")
    script = (
        f"import bpf\ntry:\n    bpf.load({str(path)!r})\nexcept bpf.errors.UsageError as error:\n    print(error)\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(path).parent)
    assert "nearest" in ran.stdout
    assert ran.stderr == ""


def test_a_rules_prediction_decides(digits):
    """Validation, early stopping and the test are of what the rule predicts."""

    class Wrong(DirectFeedbackAlignment):
        """Predicts the class after the right one."""

        def logits(self, network, inputs):
            return super().logits(network, inputs).roll(1, -1)

    right, wrong = trained(specs(epochs=8), DirectFeedbackAlignment, digits), trained(specs(epochs=8), Wrong, digits)
    for one, other in zip(right.records, wrong.records, strict=True):
        assert one.history["error"] == other.history["error"][: len(one.history["error"])]
        assert other.test["error"] > 0.75
        assert other.test != one.test
    assert Algorithm.logits is DirectFeedbackAlignment.logits


def test_what_a_file_calls_its_tensors_is_no_part_of_the_network(digits, tmp_path):
    """Names like the network's, and names that look alike, stay apart from it and from each other."""
    whole = trained(specs(runs=1), DirectFeedbackAlignment, digits)
    best, images = whole.best_network(0), digits.test_images[:5]
    paths = [tmp_path / "plain.safetensors", tmp_path / "forged.safetensors"]
    added = {"weight.x.0": torch.zeros(3), "a.b": torch.zeros(1), "a_b": torch.ones(1)}
    for path, network in zip(paths, (best, best | added), strict=True):
        models.save(path, models.content(network, whole.specs[0], digits.shape, digits.classes))
    assert torch.equal(bpf.load(paths[0])(images), bpf.load(paths[1])(images))
    tensors = models.read(paths[1]).tensors
    prediction = stages.Prediction(whole.specs[0], digits.shape, len(digits.classes), tensors)
    assert set(prediction._names.values()) == set(tensors)
    assert len(dict(prediction.named_buffers())) == len(tensors)
