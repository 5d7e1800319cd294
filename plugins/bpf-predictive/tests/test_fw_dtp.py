"""Fixed-weight difference target propagation against its local losses, differentiated here one run at a time."""

from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
from bpf_predictive.fw_dtp import FixedWeightDifferenceTargetPropagation
from torch import Tensor

from bpf.algorithms import Network, Problem, Step, Structure, cross_entropy, squared_error
from bpf.algorithms.bp import Backpropagation
from bpf.testing import AlgorithmContract

RUNS, BATCH, INPUTS, WIDTHS, CLASSES, STEP = [(0, "ortho"), (1, "lecun")], 9, 5, (6, 7, 4), 3, 0.3


class TestFixedWeightDifferenceTargetPropagationContract(AlgorithmContract):
    name = "fw-dtp"


class TestFixedWeightDifferenceTargetPropagationContractWithAnOption(AlgorithmContract):
    name = "fw-dtp"
    options: ClassVar = {"step": 2.0}


def drop(layer: int, batch: int, units: int) -> Tensor | None:
    if layer != 1:
        return None
    kept = (torch.arange(batch)[:, None] + torch.arange(units)) % 2 * 2.0
    return kept.to(torch.float64).repeat(len(RUNS), 1, 1)


def step_of(
    loss: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = cross_entropy,
    size: float = STEP,
    batch_norm: bool = False,
) -> Step:
    """Gradients of one batch, with the second hidden layer's units half dropped."""
    kind = FixedWeightDifferenceTargetPropagation
    structure = Structure(INPUTS, WIDTHS, CLASSES, batch_norm=batch_norm, init="torch")
    network = Network.build(structure, [seed for seed, _ in RUNS], None, torch.float64)
    rule = kind(kind.Options(step=size), Problem("classification", "sigmoid"))
    rule.prepare(network, RUNS)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(len(RUNS), BATCH, INPUTS, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (len(RUNS), BATCH), generator=generator)
    step = Step(network, inputs, torch.eye(CLASSES, dtype=torch.float64)[labels], loss, drop)
    rule.gradients(step)
    return step


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize(
    ("loss", "per_example"),
    [
        (cross_entropy, lambda a, y: -(torch.log_softmax(a, -1) * y).sum(-1)),
        (squared_error("sigmoid"), lambda a, y: (a.sigmoid() - y).square().mean(-1)),
    ],
    ids=["ce", "mse"],
)
def test_every_layer_follows_its_own_squared_error(loss, per_example, batch_norm):
    step, top = step_of(loss, batch_norm=batch_norm), len(WIDTHS)
    for run in range(len(RUNS)):
        own = {name: parameter[run].clone().requires_grad_() for name, parameter in step.network.parameters.items()}
        outputs, below = [], step.inputs[run]
        for k in range(top + 1):
            h = below @ own[f"weight.{k}"].T + own[f"bias.{k}"]
            if k < top:
                if batch_norm:
                    h = (h - h.mean(0)) / (h.var(0, correction=0) + 1e-5).sqrt() * own[f"scale.{k}"] + own[f"shift.{k}"]
                h = torch.tanh(h)
            outputs.append(h)
            below = h.detach()  # each layer's loss is its own
            if k == 1:
                below = below * drop(k, BATCH, WIDTHS[k])[run]
        logits = outputs[-1].detach().requires_grad_()
        slope = torch.autograd.grad(per_example(logits, step.target[run]).sum(), logits)[0]
        targets = [outputs[-1].detach() - STEP * slope]
        for k in reversed(range(top)):
            backward = step.network.buffers[f"fw-dtp.{k}"][run]
            above, h = outputs[k + 1].detach(), outputs[k].detach()
            difference = torch.tanh(targets[0] @ backward) - torch.tanh(above @ backward)
            if k == 1:
                difference = difference * drop(k, BATCH, WIDTHS[k])[run]
            targets.insert(0, h + difference)
        losses = [(h - t).square().sum(1).mean() / (2 * STEP) for h, t in zip(outputs, targets, strict=True)]
        torch.stack(losses).sum().backward()
        for name, parameter in own.items():
            gradient = step.network.gradients[name][run]
            torch.testing.assert_close(gradient, parameter.grad, msg=lambda text, n=name: f"{n}: {text}")


def test_the_output_layer_gets_its_true_gradient():
    step = step_of()
    gradients = {name: gradient.clone() for name, gradient in step.network.gradients.items()}
    problem = Problem("classification", "sigmoid")
    Backpropagation(Backpropagation.Options(), problem).gradients(
        Step(step.network, step.inputs, step.target, cross_entropy, drop)
    )
    for name in (f"weight.{len(WIDTHS)}", f"bias.{len(WIDTHS)}"):
        torch.testing.assert_close(gradients[name], step.network.gradients[name])


def test_a_short_step_linearises_the_way_back_and_leaves_the_scale():
    """δh of the last hidden layer is then `(e B^T) ⊙ tanh'(a_out B^T)`, whatever the step."""
    last = len(WIDTHS) - 1
    step = step_of(size=1e-6)
    parameters, backward = step.network.parameters, step.network.buffers[f"fw-dtp.{last}"]
    h = step.inputs
    for k in range(last + 1):
        below = h
        h = torch.tanh(h @ parameters[f"weight.{k}"].mT + parameters[f"bias.{k}"])
        h = h if k != 1 else h * drop(k, BATCH, WIDTHS[k])
    error = (torch.softmax(step.logits, -1) - step.target) / BATCH
    delta = error @ backward * (1 - torch.tanh(step.logits @ backward).square()) * (1 - h * h)
    torch.testing.assert_close(step.network.gradients[f"weight.{last}"], delta.mT @ below, rtol=1e-4, atol=1e-7)


def test_the_backward_matrices_are_scaled_by_the_units_that_get_the_target():
    kind = FixedWeightDifferenceTargetPropagation
    shapes = {name: tuple(buffer.shape) for name, buffer in step_of().network.buffers.items()}
    assert shapes == {"fw-dtp.0": (2, 7, 6), "fw-dtp.1": (2, 4, 7), "fw-dtp.2": (2, 3, 4)}
    wide = Network.build(Structure(5, (400, 100), 10), [1], None)
    kind(kind.Options(), Problem("classification", "sigmoid")).prepare(wide, [(1, "lecun")])
    assert wide.buffers["fw-dtp.0"].std().item() == pytest.approx(400**-0.5, rel=0.02)
    assert wide.buffers["fw-dtp.1"].std().item() == pytest.approx(100**-0.5, rel=0.1)
