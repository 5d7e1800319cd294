"""Predictive coding against its energy, differentiated here by autograd, one run at a time, and its known limits."""

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from bpf_predictive.pc import PredictiveCoding
from torch import Tensor

from bpf.algorithms import (
    Algorithm,
    Network,
    Problem,
    Step,
    Structure,
    binary_cross_entropy,
    cross_entropy,
    squared_error,
)
from bpf.algorithms.bp import Backpropagation
from bpf.testing import AlgorithmContract

SEEDS, BATCH, INPUTS, WIDTHS, CLASSES = [0, 1], 6, 5, (6, 7, 4), 3
Loss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class TestPredictiveCodingContract(AlgorithmContract):
    name = "pc"


class TestPredictiveCodingContractWithFixedPredictions(AlgorithmContract):
    name = "pc"
    options: ClassVar = {"inference": "fixed", "rate": 0.5, "steps": 5}


def drop(layer: int, batch: int, units: int) -> Tensor:
    kept = (torch.arange(batch)[:, None] + torch.arange(units) + layer) % 3 > 0
    return (kept * 1.5).to(torch.float64).repeat(len(SEEDS), 1, 1)


def step_of(
    kind: type[Algorithm],
    options: dict[str, Any] | None = None,
    loss: Loss = cross_entropy,
    mask: Callable[[int, int, int], Tensor | None] = drop,
    **structure: Any,
) -> Step:
    """Gradients of one batch."""
    network = Network.build(Structure(INPUTS, WIDTHS, CLASSES, init="torch", **structure), SEEDS, None, torch.float64)
    rule = kind(kind.Options(**(options or {})), Problem("classification", "sigmoid"))
    rule.prepare(network, [(seed, "ortho") for seed in SEEDS])
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(len(SEEDS), BATCH, INPUTS, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (len(SEEDS), BATCH), generator=generator)
    step = Step(network, inputs, torch.eye(CLASSES, dtype=torch.float64)[labels], loss, mask)
    rule.gradients(step)
    return step


def same(step: Step, expected: dict[str, Tensor], **tolerance: float) -> None:
    assert step.network.gradients.keys() == expected.keys()
    for name, gradient in step.network.gradients.items():
        torch.testing.assert_close(gradient, expected[name], msg=lambda text, n=name: f"{n}: {text}", **tolerance)


LOSSES: dict[str, tuple[Loss, Callable[[Tensor, Tensor], Tensor]]] = {
    "ce": (cross_entropy, lambda a, y: -(torch.log_softmax(a, -1) * y).sum()),
    "bce": (
        binary_cross_entropy,
        lambda a, y: -(y * a.sigmoid().log() + (1 - y) * (-a).sigmoid().log()).sum() / CLASSES,
    ),
    "mse": (squared_error("sigmoid"), lambda a, y: (a.sigmoid() - y).square().sum() / CLASSES),
}
ACTIVATIONS = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "lrelu": lambda a: torch.nn.functional.leaky_relu(a, 0.01),
    "swish": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
}


def relaxed(step: Step, run: int, loss: str, activation: str, steps: int, rate: float, mask: Any) -> dict[str, Tensor]:
    """∂E/∂θ of one run, summed over the batch, at the values that gradient descent on E gives."""
    own = {name: parameter[run].clone().requires_grad_() for name, parameter in step.network.parameters.items()}

    def predict(k: int, below: Tensor) -> Tensor:
        if k > 0 and mask:
            below = below * mask(k - 1, BATCH, WIDTHS[k - 1])[run]
        a = below @ own[f"weight.{k}"].T
        if f"bias.{k}" in own:
            a = a + own[f"bias.{k}"]
        if f"scale.{k}" in own:
            a = (a - a.mean(0)) / (a.var(0, correction=0) + 1e-5).sqrt() * own[f"scale.{k}"] + own[f"shift.{k}"]
        return a if k == len(WIDTHS) else ACTIVATIONS[activation](a)

    def energy(values: list[Tensor]) -> Tensor:
        ladder = [step.inputs[run], *values]
        total = LOSSES[loss][1](predict(len(WIDTHS), ladder[-1]), step.target[run])
        for k, value in enumerate(values):
            total = total + (value - predict(k, ladder[k])).square().sum() / 2
        return total

    values: list[Tensor] = []
    for k in range(len(WIDTHS)):
        values.append(predict(k, values[-1] if k else step.inputs[run]).detach())
    before = energy(values).item()
    for _ in range(steps):
        values = [value.requires_grad_() for value in values]
        slopes = torch.autograd.grad(energy(values), values)
        values = [(value - rate * slope).detach() for value, slope in zip(values, slopes, strict=True)]
    last = energy(values)
    assert last.item() < before
    last.backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in own.items()}


@pytest.mark.parametrize(
    ("steps", "rate", "loss", "activation", "mask", "structure"),
    [
        (1, 0.1, "ce", "tanh", None, {}),
        (2, 0.3, "bce", "relu", drop, {"use_bias": False}),
        (20, 0.1, "ce", "tanh", drop, {}),
        (20, 0.1, "mse", "sigmoid", None, {}),
        (20, 0.2, "ce", "lrelu", drop, {}),
        (10, 0.05, "mse", "swish", drop, {"batch_norm": True}),
        (20, 0.1, "ce", "gelu", None, {"batch_norm": True}),
        (20, 0.1, "bce", "tanh", drop, {"batch_norm": True, "use_bias": False}),
    ],
)
def test_strict_is_gradient_descent_on_the_energy_then_its_gradient(steps, rate, loss, activation, mask, structure):
    options = {"inference": "strict", "steps": steps, "rate": rate}
    mask = mask or (lambda layer, batch, units: None)
    step = step_of(PredictiveCoding, options, LOSSES[loss][0], mask, activation=activation, **structure)
    runs = [
        relaxed(step, run, loss, activation, steps, rate, mask if mask is drop else None) for run in range(len(SEEDS))
    ]
    expected = {name: torch.stack([one[name] for one in runs]) / BATCH for name in runs[0]}
    if structure.get("batch_norm"):  # which cancels the bias: its gradient is rounding
        expected |= {n: torch.zeros_like(g) for n, g in expected.items() if n[:4] == "bias" and n[-1] != "3"}
    same(step, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("loss", "steps"), [("ce", 3), ("bce", 4), ("mse", 12)])
def test_fixed_predictions_at_rate_1_are_backpropagation(loss, steps, activation, batch_norm):
    how = {"loss": LOSSES[loss][0], "activation": activation, "batch_norm": batch_norm}
    step = step_of(PredictiveCoding, {"inference": "fixed", "rate": 1, "steps": steps}, **how)
    same(step, step_of(Backpropagation, **how).network.gradients, rtol=0, atol=1e-10)


def test_fixed_predictions_tend_to_backpropagation_at_any_rate():
    true = step_of(Backpropagation).network.gradients
    same(step_of(PredictiveCoding, {"inference": "fixed", "rate": 0.3, "steps": 120}), true, rtol=0, atol=1e-10)


@pytest.mark.parametrize("inference", ["strict", "fixed"])
def test_one_step_brings_the_error_to_the_last_hidden_layer_only(inference):
    rate, last = 0.1, len(WIDTHS) - 1
    gradients = step_of(PredictiveCoding, {"inference": inference, "steps": 1, "rate": rate}).network.gradients
    true = step_of(Backpropagation).network.gradients
    for kind in ("weight", "bias"):
        assert not any(gradients[f"{kind}.{k}"].any() for k in range(last))
        torch.testing.assert_close(gradients[f"{kind}.{last}"], rate * true[f"{kind}.{last}"])


def test_strict_tends_to_backpropagation_as_the_error_of_the_output_gets_small():
    true = step_of(Backpropagation).network.gradients
    away = []
    for scale in (1e-2, 1e-3, 1e-4):

        def small(logits: Tensor, target: Tensor, scale: float = scale) -> tuple[Tensor, Tensor]:
            per_example, gradient = cross_entropy(logits, target)
            return per_example * scale, gradient * scale

        gradients = step_of(PredictiveCoding, {"steps": 400, "rate": 0.3}, small).network.gradients
        away.append(max((gradients[n] / scale - true[n]).abs().max().item() for n in true))
    assert away[2] < 1e-4
    assert away[0] / away[1] == pytest.approx(10, rel=0.05)
    assert away[1] / away[2] == pytest.approx(10, rel=0.05)
