"""Optimizers over stacked runs, each with its own learning rate and weight decay.

They are torch's, with torch's defaults, and remember the same under the same names. All work elementwise, so the
numbers are those of each run alone. On a CPU torch's fused operators do it, called once for each (learning rate, weight
decay), as they take numbers; elsewhere the rates are tensors [runs], and a parameter of all runs is one kernel where
`kernels.py` can be used, torch's operations where not.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bpf.nn.device import kernels_on
from bpf.nn.network import Network, check_tensors

State = dict[str, dict[str, Tensor]]
"""Parameter name -> state name (such as `exp_avg`) -> tensor with a leading run axis."""

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8
ALPHA = 0.99
"""Of rmsprop."""
_MEMORY = {
    "adam": ("exp_avg", "exp_avg_sq"),
    "adamw": ("exp_avg", "exp_avg_sq"),
    "rmsprop": ("square_avg",),
    "sgd": ("momentum_buffer",),
    "nag": ("momentum_buffer",),
}
"""What is remembered of each parameter, besides how many steps were done."""


class Pace:
    """The factor that a schedule puts on all learning rates, in memory that stays where it is."""

    def __init__(self) -> None:
        self.factor = 1.0
        self._scaled: list[tuple[Tensor, Tensor]] = []

    def scaled(self, rates: Tensor) -> Tensor:
        """These rates, times the factor of the time."""
        own = rates * self.factor
        self._scaled.append((own, rates))
        return own

    def set(self, factor: float) -> None:
        self.factor = factor
        for own, rates in self._scaled:
            torch.mul(rates, factor, out=own)


class Slot(NamedTuple):
    """A parameter [runs, ...], its gradient, and what is remembered of it, in the order of `_MEMORY`."""

    parameter: Tensor
    gradient: Tensor
    memory: tuple[Tensor, ...]

    def block(self, start: int, stop: int) -> "Slot":
        """Views of neighbouring runs."""
        memory = tuple(tensor[start:stop] for tensor in self.memory)
        return Slot(self.parameter[start:stop], self.gradient[start:stop], memory)


class StackedOptimizer:
    """Updates a network's parameters from its gradients.

    `learning_rates` and `weight_decays` have one entry per run. With `layerwise` each layer can be stepped on
    its own; otherwise one call updates everything. It goes on from a `state`, whose tensors it takes over; where that
    is empty, and without one, from the start.
    """

    def __init__(
        self,
        name: str,
        network: Network,
        learning_rates: Sequence[float],
        weight_decays: Sequence[float],
        momentum: float = 0.9,
        layerwise: bool = False,
        state: State | None = None,
    ) -> None:
        self._counts = name not in ("sgd", "nag")
        self._memory_names = _MEMORY[name] if self._counts or momentum else ()
        self._slots: dict[str, Slot] = {}
        for parameter_name, parameter in network.parameters.items():
            known = state[parameter_name] if state else {}
            memory = tuple(known[n] if known else torch.zeros_like(parameter) for n in self._memory_names)
            self._slots[parameter_name] = Slot(parameter, network.gradients[parameter_name], memory)
        last = len(network.layers) - 1
        layers = {n: int(k) if (k := n.rpartition(".")[2]).isdecimal() else last for n in self._slots}
        names = [[n for n in self._slots if layers[n] == k] for k in range(last + 1)]
        self._parts = names if layerwise else [list(self._slots)]
        device = next(iter(network.parameters.values())).device
        counts = [state[part[0]].get("step") if state else None for part in self._parts]
        self.pace = Pace()
        self._steps = [torch.zeros((), device=device) if n is None else n[0].clone() for n in counts]
        make = _fused if device.type == "cpu" and name != "rmsprop" else _stacked
        self._updates: list[list[Callable[[], None]]] = []
        for part, steps in zip(self._parts, self._steps, strict=True):
            factors = {parameter: network.rate(parameter) for parameter in part}
            groups = [[n for n in part if factors[n] == factor] for factor in dict.fromkeys(factors.values())]
            self._updates.append(
                [
                    make(
                        name,
                        momentum,
                        [self._slots[n] for n in group],
                        [(rate * factors[group[0]], d) for rate, d in zip(learning_rates, weight_decays, strict=True)],
                        steps,
                        self.pace,
                    )
                    for group in groups
                ]
            )

    def step(self, layer: int = 0) -> None:
        """Apply the gradients: of one layer when made `layerwise`, else of all."""
        if self._counts:
            self._steps[layer].add_(1)
        for update in self._updates[layer]:
            update()

    def state(self) -> State:
        """What is remembered of each parameter, stacked over runs: the memory itself, and the steps as copies."""
        steps = {name: count for part, count in zip(self._parts, self._steps, strict=True) for name in part}
        return {
            name: ({"step": steps[name].repeat(len(slot.parameter))} if self._counts else {})
            | dict(zip(self._memory_names, slot.memory, strict=True))
            for name, slot in self._slots.items()
        }

    def check_state(self, state: State, runs: int | None, begun: bool = True) -> None:
        """Raise ValueError for what is not the `state` of this optimizer for so many runs, or for one alone.

        One that has not `begun` may remember nothing, as torch's do. All runs must have done as many steps.
        """
        if state.keys() != self._slots.keys():
            raise ValueError("It is the state of other parameters.")
        for name, slot in self._slots.items():
            if not state[name] and not begun:
                continue
            shape, dtype = slot.parameter.shape[1:], slot.parameter.dtype
            scalars = {"step": (torch.Size(), torch.float32)} if self._counts else {}
            check_tensors(state[name], scalars | dict.fromkeys(self._memory_names, (shape, dtype)), runs)
            if self._counts and runs is not None and bool((state[name]["step"] != state[name]["step"][:1]).any()):
                raise ValueError(f"The runs have done different numbers of steps, by {name}.")


def _fused(
    name: str, momentum: float, slots: list[Slot], rates: list[tuple[float, float]], steps: Tensor, pace: Pace
) -> Callable[[], None]:
    """The update by torch's fused operators, for each block of neighbouring runs whose rates are equal."""
    calls: list[Callable[[], None]] = []
    start = 0
    for (rate, decay), members in itertools.groupby(rates):
        stop = start + len(list(members))
        views = [slot.block(start, stop) for slot in slots]
        calls.append(_fused_call(name, momentum, views, rate, decay, steps, pace))
        start = stop

    def update() -> None:
        for call in calls:
            call()

    return update


def _fused_call(
    name: str, momentum: float, slots: list[Slot], rate: float, decay: float, steps: Tensor, pace: Pace
) -> Callable[[], None]:
    parameters, gradients = [slot.parameter for slot in slots], [slot.gradient for slot in slots]
    memory = [list(tensors) for tensors in zip(*(slot.memory for slot in slots), strict=True)]
    counts = [steps] * len(slots)
    if name in ("adam", "adamw"):
        adam = torch._fused_adam_ if name == "adam" else torch._fused_adamw_
        means, squares = memory

        def step_adam() -> None:
            adam(
                parameters,
                gradients,
                means,
                squares,
                [],
                counts,
                lr=rate * pace.factor,
                beta1=BETA_1,
                beta2=BETA_2,
                weight_decay=decay,
                eps=EPSILON,
                amsgrad=False,
                maximize=False,
            )

        return step_adam
    buffers, nesterov = memory[0] if memory else [], name == "nag" and momentum > 0

    def step_sgd() -> None:
        torch._fused_sgd_(
            parameters,
            gradients,
            buffers,
            weight_decay=decay,
            momentum=momentum,
            lr=rate * pace.factor,
            dampening=0.0,
            nesterov=nesterov,
            maximize=False,
            is_first_step=False,
        )

    return step_sgd


def _stacked(
    name: str, momentum: float, slots: list[Slot], rates: list[tuple[float, float]], steps: Tensor, pace: Pace
) -> Callable[[], None]:
    """The update with a rate for each run: a kernel for each parameter, or torch's operations."""
    device, dtype = slots[0].parameter.device, slots[0].parameter.dtype
    rate, decay = (torch.tensor(values, dtype=dtype, device=device) for values in zip(*rates, strict=True))
    rate = pace.scaled(rate)
    decays, kernels = any(value for _, value in rates), kernels_on(device)
    adam = (BETA_1, 1 - BETA_1, BETA_2, 1 - BETA_2, EPSILON)
    numbers = {"adam": adam, "adamw": adam, "rmsprop": (ALPHA, 1 - ALPHA, EPSILON)}
    constants = torch.tensor(numbers.get(name, (momentum,)), dtype=dtype, device=device)
    betas = torch.tensor((BETA_1, BETA_2), dtype=torch.float64, device=device)
    nesterov, decoupled = name == "nag", name == "adamw"

    def update() -> None:
        corrections = 1 - betas**steps if decoupled or name == "adam" else betas
        for slot in slots:
            if kernels is None:
                _in_torch(name, momentum, slot, _like(rate, slot), _like(decay, slot) if decays else None, corrections)
            elif name == "rmsprop":
                kernels.rmsprop(*slot, rate, decay, constants)
            elif name in ("sgd", "nag"):
                kernels.sgd(*slot, rate, decay, constants, nesterov)
            else:
                kernels.adam(*slot, rate, decay, constants, corrections, decoupled)

    return update


def _in_torch(name: str, momentum: float, slot: Slot, rate: Tensor, decay: Tensor | None, corrections: Tensor) -> None:
    """One step of one parameter of all runs; `corrections` are (1 - β₁ᵗ, 1 - β₂ᵗ) in float64."""
    parameter, gradient, memory = slot.parameter, slot.gradient, slot.memory
    if decay is not None and name == "adamw":
        parameter.mul_(1 - rate * decay)
    elif decay is not None:
        gradient = gradient + decay * parameter
    if name in ("adam", "adamw"):
        mean, square = memory
        mean.lerp_(gradient, 1 - BETA_1)
        square.mul_(BETA_2).addcmul_(gradient, gradient, value=1 - BETA_2)
        first, second = corrections[0].to(rate.dtype), corrections[1].sqrt().to(rate.dtype)
        parameter.addcdiv_(mean, square.sqrt().div_(second).add_(EPSILON).mul_(first / rate), value=-1)
    elif name == "rmsprop":
        memory[0].mul_(ALPHA).addcmul_(gradient, gradient, value=1 - ALPHA)
        parameter.addcdiv_(gradient, memory[0].sqrt().add_(EPSILON).div_(rate), value=-1)
    elif memory:
        memory[0].mul_(momentum).add_(gradient)
        parameter.sub_((gradient + momentum * memory[0] if name == "nag" else memory[0]) * rate)
    else:
        parameter.sub_(gradient * rate)


def clip_(gradients: Iterable[Tensor], limit: float) -> None:
    """Scale each run's gradients [runs, ...] down to the norm `limit` over all of them, where it is larger."""
    flat = [gradient.flatten(1) for gradient in gradients]
    norm = torch.stack([torch.linalg.vecdot(own, own) for own in flat]).sum(0).sqrt_()
    scale = limit / norm.clamp(min=limit)
    for own in flat:
        own.mul_(scale[:, None])


def _like(rates: Tensor, slot: Slot) -> Tensor:
    """[runs] as [runs, 1, ...], to go with a parameter."""
    return rates.view(-1, *[1] * (slot.parameter.dim() - 1))
