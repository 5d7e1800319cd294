"""PEPITA against its equations, written here once more by hand, one run and one example at a time."""

from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
from bpf_pepita import Pepita
from torch import Tensor

from bpf.algorithms import Network, Problem, Step, Structure, binary_cross_entropy, cross_entropy
from bpf.testing import AlgorithmContract

SEEDS, BATCH, INPUTS, WIDTHS, CLASSES, SCALE = [0, 1], 4, 5, (6, 7), 3, 0.3


class TestPepitaContract(AlgorithmContract):
    name = "pepita"


class TestPepitaContractWithAnOption(AlgorithmContract):
    name = "pepita"
    options: ClassVar = {"feedback_scale": 0.2}


def mask(layer: int, batch: int, units: int) -> Tensor:
    kept = (torch.arange(batch)[:, None] + torch.arange(units)) % 2 * 2.0
    return kept.to(torch.float64).repeat(len(SEEDS), 1, 1)


def step_of(loss: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = cross_entropy, batch_norm: bool = False) -> Step:
    network = Network.build(
        Structure(INPUTS, WIDTHS, CLASSES, activation="relu", batch_norm=batch_norm, init="torch"),
        SEEDS,
        None,
        torch.float64,
    )
    rule = Pepita(Pepita.Options(feedback_scale=SCALE), Problem("classification", "sigmoid"))
    rule.prepare(network, [(seed, "ortho") for seed in SEEDS])
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(len(SEEDS), BATCH, INPUTS, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (len(SEEDS), BATCH), generator=generator)
    step = Step(network, inputs, torch.eye(CLASSES, dtype=torch.float64)[labels], loss, mask)
    rule.gradients(step)
    return step


def forward(step: Step, run: int, x: Tensor, dropped: list[Tensor]) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Of one example: the inputs of every layer, the hidden outputs after dropout, and the logits."""
    inputs, outputs = [], []
    for k in range(len(WIDTHS) + 1):
        inputs.append(x)
        weight, bias = (step.network.parameters[f"{kind}.{k}"][run] for kind in ("weight", "bias"))
        a = weight @ x + bias[0]
        if k < len(WIDTHS):
            x = a.clamp(min=0) * dropped[k]
            outputs.append(x)
    return inputs, outputs, a


@pytest.mark.parametrize(
    ("loss", "predict", "scale"),
    [(cross_entropy, lambda a: torch.softmax(a, -1), 1), (binary_cross_entropy, torch.sigmoid, 1 / CLASSES)],
    ids=["ce", "bce"],
)
def test_pepita_is_its_equations_summed_over_examples(loss, predict, scale):
    step = step_of(loss)
    expected = {name: torch.zeros_like(p) for name, p in step.network.parameters.items()}
    for run in range(len(SEEDS)):
        feedback = step.network.buffers["pepita.feedback"][run]
        for b in range(BATCH):
            x, y = step.inputs[run, b], step.target[run, b]
            dropped = [mask(k, BATCH, units)[run, b] for k, units in enumerate(WIDTHS)]
            _, clean, logits = forward(step, run, x, dropped)
            error = (predict(logits) - y) * scale
            inputs, modulated, logits = forward(step, run, x + feedback @ error, dropped)
            deltas = [before - after for before, after in zip(clean, modulated, strict=True)]
            deltas.append((predict(logits) - y) * scale)
            for k, (delta, below) in enumerate(zip(deltas, inputs, strict=True)):
                expected[f"weight.{k}"][run] += torch.outer(delta, below) / BATCH
                expected[f"bias.{k}"][run] += delta / BATCH
    for name, gradient in step.network.gradients.items():
        torch.testing.assert_close(gradient, expected[name], msg=lambda text, n=name: f"{n}: {text}")


def test_what_batch_norm_adds_does_not_learn_and_nor_does_the_bias_that_it_cancels():
    gradients = step_of(batch_norm=True).network.gradients
    still = {name for name, gradient in gradients.items() if not gradient.any()}
    assert still == {f"{kind}.{k}" for kind in ("bias", "scale", "shift") for k in range(len(WIDTHS))}


def test_the_feedback_is_uniform_and_scaled_as_in_the_paper_whatever_bw_init_is():
    rule = Pepita(Pepita.Options(), Problem("classification", "sigmoid"))
    drawn = []
    for init in ("ortho", "lecun"):
        network = Network.build(Structure(600, (4,), 10), [7], None)
        rule.prepare(network, [(7, init)])
        drawn.append(network.buffers["pepita.feedback"])
    assert drawn[0].shape == (1, 600, 10)
    assert torch.equal(*drawn)
    bound = 0.05 * (6 / 600) ** 0.5
    assert drawn[0].abs().max().item() == pytest.approx(bound, rel=0.01)
    assert drawn[0].std().item() == pytest.approx(bound / 3**0.5, rel=0.03)
