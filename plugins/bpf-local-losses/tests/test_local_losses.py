"""The rules against autograd of the losses written once more, a run at a time; and every rule's contract."""

from typing import Any, ClassVar

import pytest
import torch
from bpf_local_losses.prediction import LocalPrediction
from bpf_local_losses.similarity import PredictionAndSimilarity
from torch import Tensor
from torch.nn import functional

from bpf.algorithms import (
    Algorithm,
    Layer,
    Network,
    Problem,
    Step,
    Structure,
    binary_cross_entropy,
    cross_entropy,
    squared_error,
)
from bpf.testing import AlgorithmContract

RUNS, BATCH, INPUTS, WIDTHS, CLASSES = [(3, "ortho"), (5, "lecun")], 7, 6, (5, 4), 3
LOSSES = {"ce": cross_entropy, "bce": binary_cross_entropy, "mse": squared_error("sigmoid")}


class TestLocalPredictionContract(AlgorithmContract):
    name = "pred"

    def test_hidden_layers_learn(self) -> None:
        """Not in the first step, where M is 0."""
        test_layers_learn_from_the_second_step_where_classifiers_begin_with_zeros()


class TestLocalPredictionFromTorchContract(AlgorithmContract):
    name = "pred"
    options: ClassVar = {"init": "torch"}


class TestPredictionAndSimilarityContract(AlgorithmContract):
    name = "predsim"


class TestSimilarityContract(AlgorithmContract):
    name = "predsim"
    options: ClassVar = {"weight": 1.0}


class TestEqualPartsContract(AlgorithmContract):
    name = "predsim"
    options: ClassVar = {"weight": 0.5, "scale_output": False, "init": "torch"}


def drop(layer: int, batch: int, units: int) -> Tensor:
    mask = (torch.arange(batch)[:, None] + torch.arange(units) + layer) % 2 * 2.0
    return mask.to(torch.float64).repeat(len(RUNS), 1, 1)


def prepared(kind: type[Algorithm], batch_norm: bool = False, loss: str = "ce", **options: Any) -> tuple[Any, Step]:
    structure = Structure(INPUTS, WIDTHS, CLASSES, activation="tanh", batch_norm=batch_norm, init="torch")
    network = Network.build(structure, [seed for seed, _ in RUNS], None, torch.float64)
    rule = kind(kind.Options.model_validate(options), Problem("classification", "sigmoid"))
    rule.prepare(network, RUNS)
    drawn = torch.Generator().manual_seed(0)
    inputs = torch.randn(len(RUNS), BATCH, INPUTS, generator=drawn, dtype=torch.float64)
    labels = torch.randint(CLASSES, (len(RUNS), BATCH), generator=drawn)
    target = torch.eye(CLASSES, dtype=torch.float64)[labels]
    return rule, Step(network, inputs, target, LOSSES[loss], drop)


def mean_loss(name: str, logits: Tensor, target: Tensor) -> Tensor:
    if name == "ce":
        return functional.cross_entropy(logits, target.argmax(-1))
    if name == "bce":
        return functional.binary_cross_entropy_with_logits(logits, target)
    return functional.mse_loss(torch.sigmoid(logits), target)


def cosines(x: Tensor) -> Tensor:
    """Of all pairs of rows [batch, features], without their means, as the authors have it."""
    centred = x - x.mean(1, keepdim=True)
    unit = centred / (centred.square().sum(1).sqrt() + 1e-8)[:, None]
    return (unit @ unit.T).clamp(-1, 1)


def expected(step: Step, loss: str, pred: float, sim: float, output: float) -> dict[str, Tensor]:
    """Gradients of `pred` and `sim` times the local losses and `output` times the output's, by autograd."""
    found: dict[str, list[Tensor]] = {name: [] for name in step.network.parameters}
    for run in range(len(RUNS)):
        own = {name: p[run].clone().requires_grad_() for name, p in step.network.parameters.items()}
        target, h, total = step.target[run], step.inputs[run], torch.zeros((), dtype=torch.float64)
        for k, units in enumerate(WIDTHS):
            a = functional.linear(h.detach(), own[f"weight.{k}"], own[f"bias.{k}"][0])
            if f"scale.{k}" in own:
                a = functional.batch_norm(a, None, None, own[f"scale.{k}"][0], own[f"shift.{k}"][0], training=True)
            h = torch.tanh(a)
            if pred:
                logits = functional.linear(h, own[f"pred-weight.{k}"], own[f"pred-bias.{k}"][0])
                total = total + pred * mean_loss(loss, logits, target)
            if sim:
                alike = cosines(functional.linear(h, own[f"sim.{k}"]))
                total = total + sim * functional.mse_loss(alike, cosines(target))
            h = h * drop(k, BATCH, units)[run]
        last = len(WIDTHS)
        logits = functional.linear(h.detach(), own[f"weight.{last}"], own[f"bias.{last}"][0])
        (total + output * mean_loss(loss, logits, target)).backward()
        for name, parameter in own.items():
            assert parameter.grad is not None, name
            found[name].append(parameter.grad)
    return {name: torch.stack(gradients) for name, gradients in found.items()}


def assert_equal(step: Step, wanted: dict[str, Tensor]) -> None:
    assert step.network.gradients.keys() == wanted.keys()
    for name, gradient in step.network.gradients.items():
        torch.testing.assert_close(
            gradient, wanted[name], rtol=1e-9, atol=1e-13, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("init", ["zero", "torch"])
def test_prediction_is_the_gradient_of_its_loss(init: str, loss: str, batch_norm: bool) -> None:
    rule, step = prepared(LocalPrediction, batch_norm, loss, init=init)
    rule.gradients(step)
    assert_equal(step, expected(step, loss, 1, 0, 1))
    assert step.network.gradients["weight.0"].any() == (init == "torch")


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("weight", "parts"), [(0.99, (0.01, 0.99)), (0.4, (0.6, 0.4)), (1.0, (0, 1)), (0.0, (1, 0))])
@pytest.mark.parametrize("scale_output", [True, False])
def test_prediction_and_similarity_is_the_gradient_of_its_loss(
    scale_output: bool, weight: float, parts: tuple[float, float], loss: str, batch_norm: bool
) -> None:
    options = {"weight": weight, "scale_output": scale_output, "init": "torch"}
    rule, step = prepared(PredictionAndSimilarity, batch_norm, loss, **options)
    rule.gradients(step)
    output = parts[0] if scale_output and weight < 1 else 1
    assert_equal(step, expected(step, loss, *parts, output))


@pytest.mark.parametrize("size", [1e-6, 1e-8])
def test_what_is_added_to_lengths_counts_where_they_are_small(size: float) -> None:
    rule, step = prepared(PredictionAndSimilarity, weight=1.0)
    for k in range(len(WIDTHS)):
        step.network.parameters[f"sim.{k}"].mul_(size)
    rule.gradients(step)
    assert_equal(step, expected(step, "ce", 0, 1, 1))


def test_nothing_is_left_to_learn_where_examples_are_as_alike_as_their_labels() -> None:
    """h is the one-hot label and zeros, and the map takes its mean off."""
    rule, step = prepared(PredictionAndSimilarity, weight=1.0)
    network = step.network
    rule.gradients(step)
    assert (network.gradients["sim.0"].abs().amax((1, 2)) > 1e-3).all()
    inputs = torch.cat([step.target, torch.zeros(len(RUNS), BATCH, INPUTS - CLASSES, dtype=torch.float64)], 2)
    network.parameters["weight.0"].copy_(torch.eye(WIDTHS[0], INPUTS, dtype=torch.float64))
    network.parameters["bias.0"].zero_()
    network.parameters["sim.0"].zero_()[:, :CLASSES, :CLASSES] = 3 * (torch.eye(CLASSES) - 1 / CLASSES)
    rule.gradients(Step(network, inputs, step.target, cross_entropy))
    for name in ("weight.0", "bias.0", "sim.0"):
        torch.testing.assert_close(
            network.gradients[name], torch.zeros_like(network.gradients[name]), atol=1e-7, rtol=0
        )


def test_an_example_whose_units_are_all_off_does_not_learn() -> None:
    """Its row has no direction: the authors' derivative is not a number."""
    rule, step = prepared(PredictionAndSimilarity, weight=1.0)
    step.network.parameters["bias.0"].zero_()
    step.inputs[:, 2] = 0
    rule.gradients(step)
    for name, gradient in step.network.gradients.items():
        assert gradient.isfinite().all(), name
    assert step.network.gradients["weight.0"].any()
    step.network.parameters["sim.0"].zero_()
    rule.gradients(step)
    assert not step.network.gradients["weight.0"].any()


def test_layers_learn_from_the_second_step_where_classifiers_begin_with_zeros() -> None:
    rule, step = prepared(LocalPrediction)
    network = step.network
    rule.gradients(step)
    assert not any(network.gradients[f"weight.{k}"].any() for k in range(len(WIDTHS)))
    for k in range(len(WIDTHS)):
        network.parameters[f"pred-weight.{k}"].sub_(0.1 * network.gradients[f"pred-weight.{k}"])
    rule.gradients(step)
    for k in range(len(WIDTHS)):
        assert (network.gradients[f"weight.{k}"].abs().sum((1, 2)) > 0).all()
    assert_equal(step, expected(step, "ce", 1, 0, 1))


def test_prediction_alone_is_the_rule_of_that_name() -> None:
    _, one = prepared(LocalPrediction, init="torch")
    rule, other = prepared(PredictionAndSimilarity, init="torch", weight=0.0)
    assert one.network.parameters.keys() == other.network.parameters.keys()
    for name, parameter in one.network.parameters.items():
        assert torch.equal(parameter, other.network.parameters[name])
    rule.gradients(other)
    assert_equal(other, expected(one, "ce", 1, 0, 1))


def test_initial_values_are_torchs_and_differ_by_seed_and_layer() -> None:
    structure = Structure(20, (100, 100), 10)
    network = Network.build(structure, [1, 2], None)
    rule = PredictionAndSimilarity(PredictionAndSimilarity.Options(init="torch"), Problem("classification", "sigmoid"))
    rule.prepare(network, [(1, "ortho"), (2, "lecun")])
    shapes = {"pred-weight": (2, 10, 100), "pred-bias": (2, 1, 10), "sim": (2, 100, 100)}
    for kind, shape in shapes.items():
        first, second = (network.parameters[f"{kind}.{k}"] for k in (0, 1))
        assert first.shape == second.shape == shape
        assert 0.07 < first.abs().max() <= 0.1
        assert not torch.equal(first, second)
        assert not torch.equal(first[0], first[1])
        assert network.rate(f"{kind}.0") == 1.0
        assert f"{kind}.0" not in network.saved()
    again = Network.build(structure, [1, 2], None)
    LocalPrediction(LocalPrediction.Options(), Problem("classification", "sigmoid")).prepare(again, RUNS)
    assert not again.parameters["pred-weight.1"].any()
    assert again.parameters["pred-bias.1"].all()


def test_a_layer_is_handed_over_with_all_its_gradients() -> None:
    for kind in (LocalPrediction, PredictionAndSimilarity):
        rule, step = prepared(kind, init="torch")
        seen: dict[str, Tensor] = {}

        def note(layer: Layer, network: Network = step.network, seen: dict[str, Tensor] = seen) -> None:
            seen |= {n: g.clone() for n, g in network.gradients.items() if n.endswith(f".{layer.index}")}

        step.learned = note
        rule.gradients(step)
        hidden = {n for n in step.network.parameters if not n.endswith(f".{len(WIDTHS)}")}
        assert seen.keys() == hidden
        assert all(torch.equal(seen[name], step.network.gradients[name]) for name in hidden)
