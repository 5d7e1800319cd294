"""The stacked multilayer perceptron: every tensor has a leading run axis.

Layer k of every run computes `a = h W^T + b`, batch norm (optional), activation; the last layer is linear.
Weights are `[runs, out, in]`, activations `[runs, batch, units]`, feedback matrices `[runs, units, targets]`.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from bpf.nn.activations import ACTIVATIONS
from bpf.nn.initialisers import CPU, random_biases, random_feedback, random_weights

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

    def __init__(self, network: "Network", index: int) -> None:
        own = network.parameters, network.gradients
        self.index = index
        self.weight, self.weight_gradient = (tensors[f"weight.{index}"] for tensors in own)
        self.bias, self.bias_gradient = (tensors.get(f"bias.{index}") for tensors in own)
        self.scale, self.scale_gradient = (tensors.get(f"scale.{index}") for tensors in own)
        self.shift, self.shift_gradient = (tensors.get(f"shift.{index}") for tensors in own)
        self.feedback = network.buffers.get(f"feedback.{index}")
        self.mean = network.buffers.get(f"mean.{index}")
        self.variance = network.buffers.get(f"variance.{index}")
        self.is_output = index == len(network.structure.widths)
        self.activation = None if self.is_output else ACTIVATIONS[network.structure.activation]

    @property
    def units(self) -> int:
        return self.weight.shape[1]

    def forward(self, inputs: Tensor, mask: Tensor | None = None, training: bool = True) -> Trace:
        """Compute h from `inputs` [runs, batch, in]; `mask` is a scaled dropout mask [runs, batch, units].

        With `training`, batch norm uses the batch's statistics and updates the running ones.
        """
        a = torch.bmm(inputs, self.weight.mT) if self.bias is None else torch.baddbmm(self.bias, inputs, self.weight.mT)
        normal = deviation = None
        if self.scale is not None and self.shift is not None:
            normal, deviation = self._normalise(a, training)
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

    def _normalise(self, a: Tensor, training: bool) -> tuple[Tensor, Tensor]:
        assert self.mean is not None
        assert self.variance is not None
        if training:
            variance, mean = torch.var_mean(a, 1, correction=0, keepdim=True)
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


class Network:
    """The tensors of a cohort's networks, by name: `parameters`, their `gradients`, and fixed `buffers`.

    Names end in the layer's index: `weight.0`, `bias.0`, batch norm's `scale.0` and `shift.0`, its running `mean.0`
    and `variance.0`, and `feedback.0`. With `shared_gradients` all layers write into one scratch memory, which
    is right only when each layer's update is applied before the next layer's gradient is written.
    """

    def __init__(
        self,
        structure: Structure,
        parameters: dict[str, Tensor],
        buffers: dict[str, Tensor],
        shared_gradients: bool = False,
    ) -> None:
        self.structure = structure
        self.parameters = parameters
        self.buffers = buffers
        self.shared_gradients = shared_gradients
        self._connect()

    @classmethod
    def build(
        cls,
        structure: Structure,
        seeds: Sequence[int],
        feedback: Sequence[str] | None,
        dtype: torch.dtype = torch.float32,
        shared_gradients: bool = False,
        device: torch.device = CPU,
    ) -> Self:
        """Initial networks on a device, one per seed; `feedback` names each run's initialiser, or is None.

        What is random is drawn on the CPU, once for each seed.
        """
        parameters: dict[str, Tensor] = {}
        buffers: dict[str, Tensor] = {}
        sizes = (structure.inputs, *structure.widths, structure.targets)
        runs = list(zip(seeds, feedback or [""] * len(seeds), strict=True))
        if feedback is not None:
            for k, units in enumerate(structure.widths):
                drawn = random_feedback(runs, f"feedback.{k}", units, structure.targets, dtype)
                buffers[f"feedback.{k}"] = drawn.to(device)
        for k, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
            before, own = buffers.get(f"feedback.{k - 1}"), buffers.get(f"feedback.{k}")
            matrix = fan_out, fan_in
            if structure.init == "aligned" and before is not None:
                weights = before.mT if own is None else torch.bmm(own, before.mT)
                parameters[f"weight.{k}"] = weights.contiguous()
            else:
                parameters[f"weight.{k}"] = random_weights(structure.init, seeds, f"weight.{k}", matrix, dtype, device)
            if structure.use_bias:
                parameters[f"bias.{k}"] = random_biases(structure.init, seeds, f"bias.{k}", matrix, dtype, device)
            if structure.batch_norm and k < len(structure.widths):
                shape = len(runs), 1, fan_out
                parameters[f"scale.{k}"] = torch.ones(shape, dtype=dtype, device=device)
                parameters[f"shift.{k}"] = torch.zeros(shape, dtype=dtype, device=device)
                buffers[f"mean.{k}"] = torch.zeros(shape, dtype=dtype, device=device)
                buffers[f"variance.{k}"] = torch.ones(shape, dtype=dtype, device=device)
        return cls(structure, parameters, buffers, shared_gradients)

    @classmethod
    def empty(cls, structure: Structure, runs: int, has_feedback: bool, device: torch.device) -> Self:
        """Networks of a structure on a device, in single precision, whose numbers are anything: for measuring."""
        sizes = (structure.inputs, *structure.widths, structure.targets)
        parameters: dict[str, Tensor] = {}
        buffers: dict[str, Tensor] = {}
        for k, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
            hidden = k < len(structure.widths)
            parameters[f"weight.{k}"] = torch.empty(runs, fan_out, fan_in, device=device)
            if structure.use_bias:
                parameters[f"bias.{k}"] = torch.empty(runs, 1, fan_out, device=device)
            if structure.batch_norm and hidden:
                for own, kinds in ((parameters, ("scale", "shift")), (buffers, ("mean", "variance"))):
                    own |= {f"{kind}.{k}": torch.empty(runs, 1, fan_out, device=device) for kind in kinds}
            if has_feedback and hidden:
                buffers[f"feedback.{k}"] = torch.empty(runs, fan_out, structure.targets, device=device)
        return cls(structure, parameters, buffers)

    @property
    def hidden(self) -> list[Layer]:
        return self.layers[:-1]

    @property
    def output(self) -> Layer:
        return self.layers[-1]

    @property
    def runs(self) -> int:
        return len(self.parameters["weight.0"])

    def to(self, device: torch.device) -> "Network":
        return self._of(lambda tensor: tensor.to(device))

    def select(self, index: Tensor) -> "Network":
        """The networks of some runs only; `index` is int64 [runs kept]."""
        return self._of(lambda tensor: tensor[index.to(tensor.device)].contiguous())

    def keep(self, index: Tensor) -> None:
        """Go on with the networks of some runs only, as `select`, but in place: one tensor after the other."""
        self.layers.clear()
        self.gradients.clear()
        for tensors in (self.parameters, self.buffers):
            for name in tensors:
                tensors[name] = tensors[name].index_select(0, index)
        self._connect()

    def shadow(self) -> "Network":
        """The same parameters with gradients and running statistics of their own: for measuring."""
        running = {n: t.clone() for n, t in self.buffers.items() if n.startswith(("mean.", "variance."))}
        return Network(self.structure, self.parameters, self.buffers | running)

    def state(self) -> dict[str, Tensor]:
        """Everything that changes in training: the parameters and batch norm's running statistics."""
        running = {n: t for n, t in self.buffers.items() if n.startswith(("mean.", "variance."))}
        return self.parameters | running

    def check_state(self, state: dict[str, Tensor], runs: int | None) -> None:
        """Raise ValueError for what is not the `state` of so many runs, or of one without the run axis."""
        check_tensors(state, {n: (t.shape[1:], t.dtype) for n, t in self.state().items()}, runs)

    def logits(self, inputs: Tensor) -> Tensor:
        """The output layer's pre-activations as in use: running statistics, no dropout."""
        h = inputs
        for layer in self.layers:
            h = layer.forward(h, training=False).output
        return h

    def _connect(self) -> None:
        self.gradients: dict[str, Tensor] = (_scratch if self.shared_gradients else _zeros)(self.parameters)
        self.layers: list[Layer] = [Layer(self, k) for k in range(len(self.structure.widths) + 1)]

    def _of(self, change: Callable[[Tensor], Tensor]) -> "Network":
        parameters = {name: change(tensor) for name, tensor in self.parameters.items()}
        buffers = {name: change(tensor) for name, tensor in self.buffers.items()}
        return Network(self.structure, parameters, buffers, self.shared_gradients)


def _zeros(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}


def _scratch(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradient views in one memory per kind (`weight`, `bias`, ...), as large as the largest layer's."""
    size: dict[str, int] = {}
    for name, tensor in parameters.items():
        kind = name.partition(".")[0]
        size[kind] = max(size.get(kind, 0), tensor.numel())
    memory = {kind: next(iter(parameters.values())).new_zeros(n) for kind, n in size.items()}
    return {n: memory[n.partition(".")[0]][: t.numel()].view(t.shape) for n, t in parameters.items()}


def check_tensors(
    tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[torch.Size, torch.dtype]], runs: int | None
) -> None:
    """Raise ValueError for tensors with other names, types or shapes; `expected` are shapes without the run axis."""
    if tensors.keys() != expected.keys():
        raise ValueError(f"The tensors are {', '.join(sorted(tensors))}, and not {', '.join(sorted(expected))}.")
    for name, (shape, dtype) in expected.items():
        tensor, wanted = tensors[name], shape if runs is None else (runs, *shape)
        if not isinstance(tensor, Tensor) or tensor.shape != wanted or tensor.dtype != dtype:
            raise ValueError(f"{name} is not {dtype} {list(wanted)}.")
