"""The stacked multilayer perceptron: every tensor has a leading run axis.

Layer k of every run computes `a = h W^T + b`, batch norm (optional), activation; the last layer is linear.
Weights are `[runs, out, in]`, activations `[runs, batch, units]`, feedback matrices `[runs, units, targets]`.
"""

import copy
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from bpf.nn.initialisers import CPU, random_biases, random_feedback, random_weights
from bpf.nn.layer import Layer, Structure

RUNNING = ("mean.", "variance.")
_KINDS = frozenset({"weight", "bias", "scale", "shift", "mean", "variance", "feedback", "gradient"})
OWN_NAME = r"^[A-Za-z][A-Za-z0-9_-]{0,60}(\.[A-Za-z0-9_-]{1,60}){0,4}$"
"""What a rule may call its tensors."""


@dataclass(frozen=True)
class Owned:
    """A tensor that a rule has added: a parameter with a factor on its learning rate, or a state (no factor).

    One that is `saved` belongs to the model file: the rule's prediction needs it.
    """

    rate: float | None
    saved: bool


class Network:
    """The tensors of a cohort's networks, by name: `parameters`, their `gradients`, and `buffers`.

    Names end in the layer's index: `weight.0`, `bias.0`, batch norm's `scale.0` and `shift.0`, its running `mean.0`
    and `variance.0`, and `feedback.0`. A rule adds its own with `add_parameter`, which the optimizer steps, and
    `add_state`, which the rule changes itself; they are `owned`. All other buffers are fixed. With `shared_gradients`
    all layers write into one scratch memory, which is right only when each layer's update is applied before the next
    layer's gradient is written.
    """

    def __init__(
        self,
        structure: Structure,
        parameters: dict[str, Tensor],
        buffers: dict[str, Tensor],
        shared_gradients: bool = False,
        owned: Mapping[str, Owned] | None = None,
    ) -> None:
        self.owned = dict(owned or {})
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

    def add_parameter(self, name: str, tensor: Tensor, rate: float = 1.0, saved: bool = False) -> None:
        """Add a rule's own parameter [runs, ...], of which it writes `gradients[name]` as of any other.

        The optimizer steps it, with `rate` times each run's learning rate. It is checkpointed, and belongs to the model
        file if it is `saved`. Call it in the rule's `prepare`. Raises ValueError for a name that is taken or is not
        words joined by dots, and for a tensor without the run axis or of another type than the weights.
        """
        self.parameters[name] = self._checked(name, tensor, floating=True)
        if not isinstance(rate, int | float):
            raise ValueError(f"The rate of {name} is {rate!r}, and must be a number.")
        self.owned[name] = Owned(rate, saved)
        self.gradients[name] = torch.zeros_like(self.parameters[name])

    def add_state(self, name: str, tensor: Tensor, saved: bool = False) -> None:
        """Add a rule's own memory [runs, ...] to `buffers`, which it changes itself, in place.

        It is checkpointed, and belongs to the model file if it is `saved`. Trackers measure on a copy. Errors as of
        `add_parameter`.
        """
        self.buffers[name] = self._checked(name, tensor, floating=saved)
        self.owned[name] = Owned(None, saved)

    def rate(self, name: str) -> float:
        """The factor on the learning rate of a parameter."""
        owned = self.owned.get(name)
        return 1.0 if owned is None or owned.rate is None else owned.rate

    def shadow(self) -> "Network":
        """The same parameters with gradients, running statistics and states of their own: for measuring."""
        changing = {n: t.clone() for n, t in self.buffers.items() if self._changes(n)}
        return Network(self.structure, self.parameters, self.buffers | changing, owned=self.owned)

    def state(self) -> dict[str, Tensor]:
        """Everything that changes in training: the parameters, batch norm's running statistics and a rule's states."""
        return self.parameters | {n: t for n, t in self.buffers.items() if self._changes(n)}

    def saved(self) -> set[str]:
        """The names of what belongs to a model file: of `state` all that a rule has not left out."""
        return {name for name in self.state() if name not in self.owned or self.owned[name].saved}

    def in_use(self) -> "Network":
        """The same network with nothing but what belongs to a model file: for predicting."""
        saved, bare = self.saved(), copy.copy(self)
        bare.parameters = {name: tensor for name, tensor in self.parameters.items() if name in saved}
        bare.buffers = {name: tensor for name, tensor in self.buffers.items() if name in saved}
        return bare

    def _changes(self, buffer: str) -> bool:
        return buffer.startswith(RUNNING) or buffer in self.owned

    def _checked(self, name: str, tensor: Tensor, floating: bool) -> Tensor:
        weight = self.parameters["weight.0"]
        kind = name.partition(".")[0]
        if not re.match(OWN_NAME, name) or kind in _KINDS or name in self.parameters or name in self.buffers:
            raise ValueError(
                f"{name!r} cannot be the name of a rule's tensor: give a new one, such as `rule.weight.0`."
            )
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"{name} is {type(tensor).__name__}, and must be a tensor with the {self.runs} runs first."
            )
        if tensor.dim() == 0 or len(tensor) != self.runs:
            raise ValueError(f"{name} is {list(tensor.shape)}: the first axis is that of the {self.runs} runs.")
        if floating and tensor.dtype != weight.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, and the weights are {weight.dtype}.")
        return tensor.detach().to(weight.device, copy=True).contiguous()

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
        own = {name: tensor for name, tensor in self.parameters.items() if name in self.owned}
        layers = {name: tensor for name, tensor in self.parameters.items() if name not in self.owned}
        self.gradients: dict[str, Tensor] = (_scratch if self.shared_gradients else _zeros)(layers) | _zeros(own)
        self.layers: list[Layer] = [
            Layer(self.structure, k, self.parameters, self.gradients, self.buffers)
            for k in range(len(self.structure.widths) + 1)
        ]

    def _of(self, change: Callable[[Tensor], Tensor]) -> "Network":
        parameters = {name: change(tensor) for name, tensor in self.parameters.items()}
        buffers = {name: change(tensor) for name, tensor in self.buffers.items()}
        return Network(self.structure, parameters, buffers, self.shared_gradients, self.owned)


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
