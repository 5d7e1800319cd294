"""The activity-perturbed forward gradient."""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from bpf.algorithms import Algorithm, Network, Step, Trace


class ForwardGradient(Algorithm):
    """Activity-perturbed forward gradient: noise on the units, and how the loss changes along it; no backward pass.

    Every pre-activation z_k [runs, batch, units], the activation's argument, gets noise v_k from N(0, 1). Its tangent
    goes forward, `dz_k = dh_{k-1} W_k^T + v_k` and `dh_k = φ'(z_k) dz_k`, through dropout, to the output, where
    `d_b = ⟨e_b, dh W_out^T⟩` is the derivative of example b's loss along all of its noise. Then

        δz_k = d_b v_k where φ'(z_k) is not zero, and 0 elsewhere

    has the mean ∂L/∂z_k, and gives the layer's gradients as in backpropagation. The output layer has its true one.

    With batch norm, what the noise does to the batch's mean and variance in the layers above is left out: the tangent
    takes them as constants, `dz_k = scale/deviation dh_{k-1} W_k^T + v_k`, or the noise of all examples would be in
    each one's derivative. Through the layer's own batch norm δz goes exactly.
    """

    equation = "δz_k = d v_k,  d = Σ_k ⟨∂L/∂z_k, v_k⟩ of each example, v_k from N(0, 1)"
    reference = "Ren, Kornblith, Liao & Hinton 2023, Scaling Forward Gradient With Local Losses"
    problem_types = frozenset({"classification", "reconstruction"})
    has_feedback = False
    unused_parameters = frozenset({"bw_init"})

    class Options(Algorithm.Options):
        """Of the noise."""

        passes: int = Field(
            1, ge=1, le=100, description="Directions in each step, each with a pass of its own; their mean is taken."
        )

    options: Options

    def gradients(self, step: Step) -> None:
        traces, passes = step.forward_hidden(), self.options.passes
        error = step.train_output(traces[-1].passed_on)
        slopes = [_slope(step, trace) for trace in traces]
        drawn = [step.normal(f"noise.{t.layer.index}", passes, *t.output.shape[1:]) for t in traces]
        deltas = [torch.zeros_like(trace.output) for trace in traces]
        for noise in zip(*(v.unbind(1) for v in drawn), strict=True):
            along = _derivative(step.network, traces, slopes, noise, error)[..., None] / passes
            for delta, v in zip(deltas, noise, strict=True):
                delta.addcmul_(along, v)
        for trace, slope, delta in zip(traces, slopes, deltas, strict=True):
            _learn(trace, delta.mul_(slope != 0))


def _slope(step: Step, trace: Trace) -> Tensor:
    """∂h/∂z of what a layer passes on, through its activation and dropout."""
    assert trace.layer.activation is not None
    kept = trace.output if trace.before is None else trace.before
    return step.masked(trace.layer, trace.layer.activation.backward(torch.ones_like(kept), kept))


def _derivative(
    network: Network, traces: Sequence[Trace], slopes: Sequence[Tensor], noise: Sequence[Tensor], error: Tensor
) -> Tensor:
    """The derivative of each example's loss along the noise, [runs, batch]."""
    tangent = noise[0] * slopes[0]
    for trace, slope, v in zip(traces[1:], slopes[1:], noise[1:], strict=True):
        tangent = torch.bmm(tangent, trace.layer.weight.mT)
        if trace.deviation is not None and trace.layer.scale is not None:
            tangent.mul_(trace.layer.scale * trace.deviation)
        tangent.add_(v).mul_(slope)
    return (torch.bmm(tangent, network.output.weight.mT) * error).sum(-1)


def _learn(trace: Trace, delta: Tensor) -> None:
    """Write a layer's gradients from δz, through its own batch norm."""
    layer = trace.layer
    if trace.normal is not None and trace.deviation is not None and layer.scale is not None:
        assert layer.shift_gradient is not None
        assert layer.scale_gradient is not None
        torch.sum(delta, 1, keepdim=True, out=layer.shift_gradient)
        torch.sum(delta * trace.normal, 1, keepdim=True, out=layer.scale_gradient)
        along = layer.shift_gradient + trace.normal * layer.scale_gradient
        delta = (delta - along / delta.shape[1]) * (layer.scale * trace.deviation)
    layer.write_linear_gradient(delta, trace.inputs)
    if trace.normal is not None and layer.bias_gradient is not None:
        layer.bias_gradient.zero_()  # batch norm takes the bias off
