"""The rules against their equations written once more, by autograd and a run at a time; and every rule's contract."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from bpf_forward.forward_forward import ForwardForward
from bpf_forward.forward_gradient import ForwardGradient
from torch import Tensor
from torch.nn.functional import one_hot

from bpf.algorithms import Algorithm, Network, Problem, Step, Structure, cross_entropy
from bpf.data.cache import load
from bpf.nn.randomness import Clock, Draws
from bpf.spec.run import RunSpec
from bpf.testing import AlgorithmContract
from bpf.testing.bench import Bench, Case, Tensors
from bpf.training.cohort import Cohort

RUNS, ROWS, INPUTS, WIDTHS, CLASSES = [(3, "ortho"), (5, "lecun")], 7, 6, (5, 4), 3
EPSILON = 1e-5


def rms1(h: Tensor) -> Tensor:
    return h / (h.square().mean(-1, keepdim=True).sqrt() + 1e-8)


def softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))  # torch's own is linear from 20 on


def wrong_labels(drawn: Tensor, target: Tensor) -> Tensor:
    """The wrong classes in order, from the one after the right one; each has an equal part of [0, 1)."""
    wrong = torch.empty_like(target)
    for at in torch.cartesian_prod(*(torch.arange(n) for n in drawn.shape)):
        right = int(target[tuple(at)].argmax())
        others = [(right + 1 + i) % CLASSES for i in range(CLASSES - 1)]
        wrong[tuple(at)] = torch.eye(CLASSES)[others[int(drawn[tuple(at)] * len(others))]]
    return wrong


def three_ways(inputs: Tensor, target: Tensor, drawn: Tensor, scale: float = 1.0) -> Tensor:
    """Positive, negative and neutral inputs, one after the other."""
    stacked = inputs.repeat(1, 3, 1)
    labels = [target, wrong_labels(drawn, target), torch.full_like(target, 1 / CLASSES)]
    stacked[..., :CLASSES] = scale * torch.cat(labels, 1)
    return stacked


# The contract


@dataclass(frozen=True)
class ThreeWays(Bench):
    """The forward pass that ff reports is its own: labels in the pixels, layers normalised in between."""

    def clean_pass(self) -> tuple[Tensor, Tensors]:
        copy, batch = self.network.shadow(), self.inputs.shape[1]
        h = three_ways(self.inputs, self.target, self.step().uniform("negative", batch))
        for layer in copy.hidden:
            mask = self.mask(layer.index, 3 * batch, layer.units) if self.case.dropout else None
            h = layer.forward(rms1(h), mask).passed_on
        return copy.output.forward(rms1(h)[:, 2 * batch :]).output, copy.buffers


class ForwardForwardContract(AlgorithmContract):
    name = "ff"

    def bench(self, case: Case) -> Bench:
        return ThreeWays.make(self.rule(), self.options, case)


class TestForwardForwardContract(ForwardForwardContract):
    pass


class TestSymbaContract(ForwardForwardContract):
    options: ClassVar = {"loss": "symba", "goodness": "mean", "alpha": 2.0}


class TestForwardForwardReadoutContract(ForwardForwardContract):
    options: ClassVar = {"goodness": "mean", "predict": "readout"}


class TestForwardGradientContract(AlgorithmContract):
    name = "fg-a"


class TestForwardGradientOfTwoPassesContract(TestForwardGradientContract):
    options: ClassVar = {"passes": 2}


# The equations


def drop(layer: int, batch: int, units: int) -> Tensor | None:
    """A third of the second hidden layer's units dropped."""
    if layer != 1:
        return None
    mask = ((torch.arange(batch)[:, None] + torch.arange(units)) % 3 > 0) * 1.5
    return mask.to(torch.float64).repeat(len(RUNS), 1, 1)


def step_of(kind: type[Algorithm], activation: str = "tanh", batch_norm: bool = False, **options: Any) -> Step:
    structure = Structure(INPUTS, WIDTHS, CLASSES, activation, batch_norm, init="torch")
    network = Network.build(structure, [seed for seed, _ in RUNS], None, torch.float64)
    drawn = torch.Generator().manual_seed(0)
    for name, tensor in network.parameters.items():
        if name.startswith(("scale", "shift")):
            tensor.add_(torch.rand(tensor.shape, generator=drawn, dtype=torch.float64))
    rule = kind(kind.Options.model_validate(options), Problem("classification", "sigmoid"))
    rule.prepare(network, RUNS)
    inputs = torch.randn(len(RUNS), ROWS, INPUTS, generator=drawn, dtype=torch.float64)
    target = one_hot(torch.randint(CLASSES, (len(RUNS), ROWS), generator=drawn), CLASSES).to(torch.float64)
    draws = Draws([seed for seed, _ in RUNS], Clock(torch.device("cpu")), torch.float64)
    step = Step(network, inputs, target, cross_entropy, drop, draws=draws)
    rule.gradients(step)
    return step


def leaves(network: Network, run: int) -> dict[str, Tensor]:
    return {name: tensor[run].clone().requires_grad_() for name, tensor in network.parameters.items()}


def preactivation(own: dict[str, Tensor], k: int, h: Tensor, constant: bool = False) -> Tensor:
    """The activation's argument in layer k; its batch norm's statistics may be `constant`."""
    a = h @ own[f"weight.{k}"].T + own[f"bias.{k}"]
    if f"scale.{k}" not in own:
        return a
    variance, mean = torch.var_mean(a, 0, correction=0)
    if constant:
        variance, mean = variance.detach(), mean.detach()
    return (a - mean) / (variance + EPSILON).sqrt() * own[f"scale.{k}"] + own[f"shift.{k}"]


def activated(step: Step, z: Tensor, k: int, run: int) -> Tensor:
    """h of layer k, before dropout."""
    return {"tanh": torch.tanh, "relu": torch.relu}[step.network.structure.activation](z)


def dropped(h: Tensor, k: int, run: int) -> Tensor:
    mask = drop(k, *h.shape)
    return h if mask is None else h * mask[run]


def assert_equal(step: Step, expected: Iterator[tuple[int, dict[str, Tensor]]]) -> None:
    for run, gradients in expected:
        assert gradients.keys() == step.network.gradients.keys()
        for name, gradient in gradients.items():
            found = step.network.gradients[name][run]
            torch.testing.assert_close(
                found, gradient, rtol=1e-9, atol=1e-12, msg=lambda text, run=run, n=name: f"run {run}, {n}: {text}"
            )


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("goodness", ["mean", "sum"])
@pytest.mark.parametrize("loss", ["hinton", "symba"])
def test_forward_forward_is_the_gradient_of_each_layers_own_loss(loss, goodness, activation, batch_norm):
    threshold, alpha, scale = 0.7, 3.0, 1.3
    options = {"loss": loss, "goodness": goodness, "threshold": threshold, "alpha": alpha, "label_scale": scale}
    step = step_of(ForwardForward, activation, batch_norm, **options)

    def expected() -> Iterator[tuple[int, dict[str, Tensor]]]:
        inputs = three_ways(step.inputs, step.target, step.uniform("negative", ROWS), scale)
        for run in range(len(RUNS)):
            own, total, passed = leaves(step.network, run), torch.zeros(()), inputs[run]
            for k, units in enumerate(WIDTHS):
                h = activated(step, preactivation(own, k, rms1(passed).detach()), k, run)
                positive, negative, _ = h.square().sum(-1).split(ROWS)
                theta = threshold * units
                if goodness == "mean":
                    positive, negative, theta = positive / units, negative / units, threshold
                if loss == "hinton":
                    total = total + (softplus(theta - positive) + softplus(negative - theta)).mean()
                else:
                    total = total + softplus(-alpha * (positive - negative)).mean()
                passed = dropped(h, k, run)
            logits = preactivation(own, len(WIDTHS), rms1(passed[2 * ROWS :]).detach())
            torch.testing.assert_close(step.logits[run], logits.detach())
            (total + torch.nn.functional.cross_entropy(logits, step.target[run])).backward()
            yield run, {name: leaf.grad for name, leaf in own.items()}

    assert_equal(step, expected())


@pytest.mark.parametrize("widths", [(5, 4), (5,)])
@pytest.mark.parametrize("goodness", ["mean", "sum"])
def test_forward_forward_predicts_by_trying_every_label(goodness, widths):
    network = Network.build(Structure(INPUTS, widths, CLASSES, batch_norm=True, init="torch"), [1, 2], None)
    for name, tensor in network.buffers.items():
        tensor.add_(0.3 if name.startswith("mean") else 0.5)
    inputs = torch.rand(2, ROWS, INPUTS, generator=torch.Generator().manual_seed(0)) * 2 - 1
    options = {"goodness": goodness, "label_scale": 0.8}
    tried = ForwardForward(ForwardForward.Options(**options), Problem("classification", "sigmoid"))
    found = tried.logits(network, inputs)
    read = ForwardForward(ForwardForward.Options(**options, predict="readout"), Problem("classification", "sigmoid"))
    labels = [*(0.8 * torch.eye(CLASSES)), torch.full((CLASSES,), 0.8 / CLASSES)]
    for number, label in enumerate(labels):
        x = inputs.clone()
        x[..., :CLASSES] = label
        total = torch.zeros(2, ROWS)
        for layer in network.hidden:
            x = layer.forward(rms1(x), training=False).output
            if layer.index or len(widths) == 1:
                total += x.square().mean(-1) if goodness == "mean" else x.square().sum(-1)
        if number < CLASSES:
            torch.testing.assert_close(found[..., number], total)
        else:
            expected = network.output.forward(rms1(x), training=False).output
            torch.testing.assert_close(read.logits(network, inputs), expected)


def test_negative_labels_are_wrong_and_all_wrong_ones_come_as_often():
    classes, batch = 5, 20000
    network = Network.build(Structure(classes, (2,), classes), [7], None)
    target = torch.eye(classes)[torch.arange(batch) % classes][None]
    draws = Draws([7], Clock(torch.device("cpu")), torch.float32)
    step = Step(network, torch.zeros(1, batch, classes), target, cross_entropy, draws=draws)
    seen = []
    step.forward = lambda layer, inputs: seen.append(inputs) or layer.forward(inputs)
    ForwardForward(ForwardForward.Options(), Problem("classification", "sigmoid")).gradients(step)
    negative = (seen[0][0, batch : 2 * batch] > 0).float()
    counts = target[0].T @ negative
    share = batch / classes / (classes - 1)
    assert (counts.diagonal() == 0).all()
    assert ((counts - share * (1 - torch.eye(classes))).abs() < 5 * share**0.5).all(), counts


def test_labels_need_as_many_pixels():
    network = Network.build(Structure(3, (2,), 4), [0], None)
    rule = ForwardForward(ForwardForward.Options(), Problem("classification", "sigmoid"))
    with pytest.raises(ValueError, match="3 are too few for 4 classes"):
        rule.prepare(network, RUNS[:1])


@pytest.mark.parametrize("predict", ["goodness", "readout"])
def test_forward_forward_learns_digits(predict, tmp_path):
    options = {"ff": {"threshold": 1.0, "predict": predict}}
    fields = {"dataset": "digits", "algorithm": "ff", "arch": "100-100", "epochs": 10, "lr": 0.003, "batch_size": 32}
    spec = RunSpec.model_validate({**fields, "examples_frac": 1, "activation": "relu", "options": options})
    cohort = Cohort([spec], ForwardForward, load("digits", tmp_path))
    while not cohort.done:
        cohort.run_epoch()
    assert cohort.records[0].test["error"] < 0.15


def passed_through(step: Step, own: dict[str, Tensor], run: int, norms: list[Any], *noise: Tensor) -> Tensor:
    """Each example's loss with noise on every pre-activation, batch norm's mean and deviation given as `norms`."""
    h = step.inputs[run]
    for k in range(len(WIDTHS)):
        z = h @ own[f"weight.{k}"].T + own[f"bias.{k}"]
        if norms:
            z = (z - norms[k][0]) / norms[k][1] * own[f"scale.{k}"] + own[f"shift.{k}"]
        h = dropped(activated(step, z + noise[k], k, run), k, run)
    logits = h @ own[f"weight.{len(WIDTHS)}"].T + own[f"bias.{len(WIDTHS)}"]
    return torch.nn.functional.cross_entropy(logits, step.target[run], reduction="none")


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.filterwarnings("ignore:`torch.jit.script`:FutureWarning")  # by torch.func.jvp itself
def test_forward_gradient_is_the_derivative_along_its_noise(passes, activation, batch_norm):
    step = step_of(ForwardGradient, activation, batch_norm, passes=passes)

    def expected() -> Iterator[tuple[int, dict[str, Tensor]]]:
        drawn = [step.normal(f"noise.{k}", passes, ROWS, units) for k, units in enumerate(WIDTHS)]
        for run in range(len(RUNS)):
            own = leaves(step.network, run)
            fixed = {name: leaf.detach() for name, leaf in own.items()}
            z, passed, norms = [], [step.inputs[run]], []
            for k in range(len(WIDTHS)):
                z.append(preactivation(own, k, passed[-1]))
                a = passed[-1] @ fixed[f"weight.{k}"].T + fixed[f"bias.{k}"]
                if batch_norm:
                    variance, mean = torch.var_mean(a, 0, correction=0)
                    norms.append((mean, (variance + EPSILON).sqrt()))
                passed.append(dropped(activated(step, z[-1].detach(), k, run), k, run))
            surrogate = torch.nn.functional.cross_entropy(preactivation(own, len(WIDTHS), passed[-1]), step.target[run])
            for number in range(passes):
                v = [noise[run, number] for noise in drawn]
                still = [torch.zeros_like(one) for one in v]
                loss = partial(passed_through, step, fixed, run, norms)
                _, along = torch.func.jvp(loss, tuple(still), tuple(v))
                for k in range(len(WIDTHS)):
                    reaches = (dropped(torch.ones_like(v[k]), k, run) > 0) & ((z[k] > 0) | (activation == "tanh"))
                    surrogate = surrogate + (z[k] * along[:, None] * v[k] * reaches).sum() / (ROWS * passes)
            surrogate.backward()
            yield run, {name: leaf.grad for name, leaf in own.items()}

    assert_equal(step, expected())


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_the_mean_forward_gradient_is_the_gradient(activation, batch_norm):
    """Of many runs with one set of weights, each with noise of its own, within five standard errors.

    With batch norm the gradient is that with the statistics of the layers above as constants.
    """
    one, many = step_of(ForwardGradient, activation, batch_norm), 4000
    network = Network(
        one.network.structure,
        {name: tensor[:1].repeat(many, 1, 1) for name, tensor in one.network.parameters.items()},
        {name: tensor[:1].repeat(many, 1, 1) for name, tensor in one.network.buffers.items()},
    )
    step = Step(
        network,
        one.inputs[:1].repeat(many, 1, 1),
        one.target[:1].repeat(many, 1, 1),
        cross_entropy,
        lambda *shape: None if (mask := drop(*shape)) is None else mask[:1],
        draws=Draws(range(many), Clock(torch.device("cpu")), torch.float64),
    )
    ForwardGradient(ForwardGradient.Options(), Problem("classification", "sigmoid")).gradients(step)
    for k in range(len(WIDTHS) + 1):
        own, h = leaves(one.network, 0), one.inputs[0]
        for j in range(len(WIDTHS)):
            h = dropped(activated(one, preactivation(own, j, h, constant=j > k), j, 0), j, 0)
        logits = preactivation(own, len(WIDTHS), h)
        torch.nn.functional.cross_entropy(logits, one.target[0]).backward()
        for name in own:
            if not name.endswith(f".{k}"):
                continue
            found = network.gradients[name]
            error = found.std(0) / many**0.5
            assert ((found.mean(0) - own[name].grad).abs() <= 5 * error + 1e-12).all(), name
            if k < len(WIDTHS) and not (batch_norm and name.startswith("bias")):
                assert (error > 0).any(), name
