"""One layer of the stacked multilayer perceptron: its arithmetic and its closed-form gradients.

It computes `a = h W^T + b`, batch norm (optional), activation; the last layer is linear. Weights are `[runs, out, in]`,
activations `[runs, batch, units]`, feedback matrices `[runs, units, targets]`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bpf.nn.activations import ACTIVATIONS

BATCH_NORM_EPSILON = 1e-5
BATCH_NORM_MOMENTUM = 0.1


@dataclass(frozen=True)
class Structure:
    """What the runs of a cohort share: `widths` of the hidden layers, inputs, targets and options."""

    inputs: int
    widths: tuple[int, ...]
    targets: int
    activation: str = "tanh"
    batch_norm: bool = False
    use_bias: bool = True
    init: str = "orthogonal"


@dataclass(slots=True)
class Trace:
    """What one layer keeps of a forward pass for its own backward pass.

    `inputs` [runs, batch, in]; `output` h [runs, batch, units], before dropout; `passed_on`, after it; `before`, the
    activation's argument where its derivative needs it; `normal` and `deviation`, batch norm's.
    """

    layer: "Layer"
    inputs: Tensor
    output: Tensor
    passed_on: Tensor
    before: Tensor | None = None
    normal: Tensor | None = None
    deviation: Tensor | None = None


class Layer:
    """One layer of every run of the cohort; its tensors belong to the network."""

    def __init__(
        self,
        structure: Structure,
        index: int,
        parameters: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
    ) -> None:
        own = parameters, gradients
        self.index = index
        self.weight, self.weight_gradient = (tensors[f"weight.{index}"] for tensors in own)
        self.bias, self.bias_gradient = (tensors.get(f"bias.{index}") for tensors in own)
        self.scale, self.scale_gradient = (tensors.get(f"scale.{index}") for tensors in own)
        self.shift, self.shift_gradient = (tensors.get(f"shift.{index}") for tensors in own)
        self.feedback = buffers.get(f"feedback.{index}")
        self.mean = buffers.get(f"mean.{index}")
        self.variance = buffers.get(f"variance.{index}")
        self.is_output = index == len(structure.widths)
        self.activation = None if self.is_output else ACTIVATIONS[structure.activation]

    @property
    def units(self) -> int:
        return self.weight.shape[1]

    def forward(self, inputs: Tensor, mask: Tensor | None = None, training: bool = True, counts: bool = True) -> Trace:
        """Compute h from `inputs` [runs, batch, in]; `mask` is a scaled dropout mask [runs, batch, units].

        With `training`, batch norm uses the batch's statistics and, if the pass `counts`, updates the running ones.
        """
        a = torch.bmm(inputs, self.weight.mT) if self.bias is None else torch.baddbmm(self.bias, inputs, self.weight.mT)
        normal = deviation = None
        if self.scale is not None and self.shift is not None:
            normal, deviation = self._normalise(a, training, counts)
            a = torch.addcmul(self.shift, normal, self.scale)
        if self.activation is None:
            return Trace(self, inputs, a, a, None, normal, deviation)
        h = self.activation.apply(a)
        passed_on = h if mask is None else h * mask
        return Trace(self, inputs, h, passed_on, a if self.activation.from_input else None, normal, deviation)

    def backward(self, trace: Trace, error: Tensor) -> Tensor:
        """Write this layer's gradients, given `error` = ∂L/∂h [runs, batch, units], which is overwritten.

        Returns δ = ∂L/∂a, [runs, batch, units], a being the linear map's output.
        """
        if self.activation is not None:
            error = self.activation.backward(error, trace.output if trace.before is None else trace.before)
        if trace.normal is None:
            self.write_linear_gradient(error, trace.inputs)
            return error
        error = self._normalise_backward(trace, error)
        torch.bmm(error.mT, trace.inputs, out=self.weight_gradient)
        if self.bias_gradient is not None:
            # Batch norm takes the bias off: the sum would be rounding noise, which Adam blows up to whole steps.
            self.bias_gradient.zero_()
        return error

    def write_linear_gradient(self, delta: Tensor, inputs: Tensor) -> None:
        """Weight gradient `Σ_batch δ^T h_in` and bias gradient `Σ_batch δ`, from δ [runs, batch, units]."""
        torch.bmm(delta.mT, inputs, out=self.weight_gradient)
        if self.bias_gradient is not None:
            torch.sum(delta, 1, keepdim=True, out=self.bias_gradient)

    def input_error(self, delta: Tensor) -> Tensor:
        """`δ W`: the true error of this layer's inputs, [runs, batch, in]."""
        return torch.bmm(delta, self.weight)

    def project(self, h: Tensor) -> Tensor:
        """`p = h F`: the layer's output in target space, [runs, batch, targets]."""
        return torch.bmm(h, self._feedback())

    def feed_back(self, signal: Tensor) -> Tensor:
        """`t F^T`: a teaching signal [runs, batch, targets] as an error of h, [runs, batch, units]."""
        return torch.bmm(signal, self._feedback().mT)

    def _feedback(self) -> Tensor:
        assert self.feedback is not None, "this network was built without feedback matrices"
        return self.feedback

    def _normalise(self, a: Tensor, training: bool, counts: bool) -> tuple[Tensor, Tensor]:
        assert self.mean is not None
        assert self.variance is not None
        if training:
            variance, mean = torch.var_mean(a, 1, correction=0, keepdim=True)
            if counts:
                size = a.shape[1]
                self.mean.lerp_(mean, BATCH_NORM_MOMENTUM)
                self.variance.lerp_(variance * (size / max(size - 1, 1)), BATCH_NORM_MOMENTUM)
        else:
            mean, variance = self.mean, self.variance
        deviation = (variance + BATCH_NORM_EPSILON).rsqrt_()
        return a.sub_(mean).mul_(deviation), deviation

    def _normalise_backward(self, trace: Trace, error: Tensor) -> Tensor:
        """Ioffe & Szegedy 2015: through the batch's mean and variance, writing scale and shift gradients."""
        assert trace.normal is not None
        assert trace.deviation is not None
        assert self.scale is not None
        assert self.scale_gradient is not None
        assert self.shift_gradient is not None
        size = error.shape[1]
        torch.sum(error, 1, keepdim=True, out=self.shift_gradient)
        torch.sum(error * trace.normal, 1, keepdim=True, out=self.scale_gradient)
        error = error.sub_(self.shift_gradient / size).addcmul_(trace.normal, self.scale_gradient, value=-1 / size)
        return error.mul_(self.scale * trace.deviation)
