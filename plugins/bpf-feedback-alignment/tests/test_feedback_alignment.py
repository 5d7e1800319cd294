"""The rules against their equations, written here once more in autograd and by hand."""

import pytest
import torch
from bpf_feedback_alignment.fa import FeedbackAlignment
from bpf_feedback_alignment.sdfa import SignDirectFeedbackAlignment
from bpf_feedback_alignment.shallow import Shallow
from torch import Tensor

from bpf.algorithms import Algorithm, Network, Problem, Step, Structure, cross_entropy
from bpf.testing import AlgorithmContract

RUNS, BATCH, INPUTS, WIDTHS, CLASSES = [(0, "ortho"), (1, "lecun")], 9, 5, (6, 7, 4), 3


class TestFeedbackAlignmentContract(AlgorithmContract):
    name = "fa"


class TestSignDfaContract(AlgorithmContract):
    name = "sdfa"


class TestShallowContract(AlgorithmContract):
    name = "shallow"
    frozen = True


def step_of(kind: type[Algorithm], batch_norm: bool = False) -> Step:
    """Gradients of one batch, with the second of the hidden layers' units half dropped."""
    structure = Structure(INPUTS, WIDTHS, CLASSES, batch_norm=batch_norm, init="torch")
    seeds, inits = zip(*RUNS, strict=True)
    network = Network.build(structure, seeds, inits if kind.has_feedback else None, torch.float64)
    rule = kind(kind.Options(), Problem("classification", "sigmoid"))
    rule.prepare(network, RUNS)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(len(RUNS), BATCH, INPUTS, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (len(RUNS), BATCH), generator=generator)
    step = Step(network, inputs, torch.eye(CLASSES, dtype=torch.float64)[labels], cross_entropy, drop)
    rule.gradients(step)
    return step


def drop(layer: int, batch: int, units: int) -> Tensor | None:
    if units != WIDTHS[1]:
        return None
    mask = (torch.arange(batch)[:, None] + torch.arange(units)) % 2 * 2.0
    return mask.to(torch.float64).repeat(len(RUNS), 1, 1)


class BackwardThrough(torch.autograd.Function):
    """`h W^T` forward, `δ B` backward."""

    @staticmethod
    def forward(ctx, h: Tensor, weight: Tensor, feedback: Tensor) -> Tensor:
        ctx.save_for_backward(h, feedback)
        return h @ weight.mT

    @staticmethod
    def backward(ctx, delta: Tensor) -> tuple[Tensor, Tensor, None]:
        h, feedback = ctx.saved_tensors
        return delta @ feedback, delta.mT @ h, None


@pytest.mark.parametrize("batch_norm", [False, True])
def test_fa_is_autograd_with_b_in_the_backward_pass(batch_norm):
    step = step_of(FeedbackAlignment, batch_norm)
    leaves = {name: p.clone().requires_grad_() for name, p in step.network.parameters.items()}
    h = step.inputs
    for k in range(len(WIDTHS) + 1):
        weight = leaves[f"weight.{k}"]
        a = BackwardThrough.apply(h, weight, step.network.buffers.get(f"fa.{k}", weight)) + leaves[f"bias.{k}"]
        if k == len(WIDTHS):
            break
        if batch_norm:
            a = (a - a.mean(1, keepdim=True)) / (a.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
            a = a * leaves[f"scale.{k}"] + leaves[f"shift.{k}"]
        h = torch.tanh(a)
        mask = drop(k, BATCH, WIDTHS[k])
        h = h if mask is None else h * mask
    loss = -(torch.log_softmax(a, -1) * step.target).sum(-1).mean(1).sum()
    loss.backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(step.network.gradients[name], leaf.grad, msg=lambda text, n=name: f"{n}: {text}")


def test_fa_draws_b_shaped_as_w_and_scaled_by_the_units_it_feeds():
    buffers = step_of(FeedbackAlignment).network.buffers
    assert {name: tuple(buffer.shape) for name, buffer in buffers.items()} == {
        "fa.1": (2, 7, 6),
        "fa.2": (2, 4, 7),
        "fa.3": (2, 3, 4),
    }
    wide = Network.build(Structure(5, (400, 100), 10), [1], None)
    FeedbackAlignment(FeedbackAlignment.Options(), Problem("classification", "sigmoid")).prepare(wide, [(1, "lecun")])
    assert wide.buffers["fa.1"].std().item() == pytest.approx(400**-0.5, rel=0.02)
    assert wide.buffers["fa.2"].std().item() == pytest.approx(100**-0.5, rel=0.1)


def test_fa_with_the_weights_as_feedback_is_backpropagation():
    from bpf.algorithms.bp import Backpropagation

    step = step_of(FeedbackAlignment)
    for k in range(1, len(WIDTHS) + 1):
        step.network.buffers[f"fa.{k}"] = step.network.parameters[f"weight.{k}"]
    problem = Problem("classification", "sigmoid")
    FeedbackAlignment(FeedbackAlignment.Options(), problem).gradients(step)
    for name, true in step_of(Backpropagation).network.gradients.items():
        torch.testing.assert_close(step.network.gradients[name], true)


def test_sdfa_sends_the_sign_of_the_error_over_the_batch_size():
    step = step_of(SignDirectFeedbackAlignment)
    parameters = step.network.parameters
    probability = step.logits.exp() / step.logits.exp().sum(-1, keepdim=True)
    sign = torch.where(probability > step.target, 1.0, -1.0).to(torch.float64)
    h = step.inputs
    for k, width in enumerate(WIDTHS):
        below = h
        h = torch.tanh(below @ parameters[f"weight.{k}"].mT + parameters[f"bias.{k}"])
        delta = sign @ step.network.buffers[f"feedback.{k}"].mT * (1 - h * h)
        mask = drop(0, BATCH, width)
        torch.testing.assert_close(step.network.gradients[f"weight.{k}"], delta.mT @ below / BATCH)
        torch.testing.assert_close(step.network.gradients[f"bias.{k}"], delta.mean(1, keepdim=True))
        h = h if mask is None else h * mask
    error = (probability - step.target) / BATCH
    torch.testing.assert_close(step.network.gradients[f"weight.{len(WIDTHS)}"], error.mT @ h)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_shallow_gives_the_output_layer_alone_a_gradient_and_it_is_the_true_one(batch_norm):
    from bpf.algorithms.bp import Backpropagation

    gradients = step_of(Shallow, batch_norm).network.gradients
    true = step_of(Backpropagation, batch_norm).network.gradients
    output = [f"weight.{len(WIDTHS)}", f"bias.{len(WIDTHS)}"]
    for name in output:
        assert torch.equal(gradients[name], true[name])
        assert gradients[name].abs().sum() > 0
    assert not any(gradient.any() for name, gradient in gradients.items() if name not in output)
