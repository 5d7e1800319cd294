"""torch.optim over stacked runs: one parameter group per distinct (learning rate, weight decay).

The runs of a cohort are ordered so that equal pairs are neighbours; a group then holds one view per parameter
over all its runs, and every optimizer here works elementwise, so the numbers are those of each run alone.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bpf.nn.network import Network, check_tensors

State = dict[str, dict[str, Tensor]]
"""Parameter name -> state name (such as `exp_avg`) -> tensor with a leading run axis."""


_MEMORY = {
    "adam": ("exp_avg", "exp_avg_sq"),
    "adamw": ("exp_avg", "exp_avg_sq"),
    "rmsprop": ("square_avg",),
    "sgd": ("momentum_buffer",),
    "nag": ("momentum_buffer",),
}
"""What torch's optimizers remember of each parameter, besides how many steps they have done."""


def _make(name: str, groups: list[dict[str, Any]], momentum: float, fused: bool) -> torch.optim.Optimizer:
    if name == "adam":
        return torch.optim.Adam(groups, fused=fused)
    if name == "adamw":
        return torch.optim.AdamW(groups, fused=fused)
    if name == "rmsprop":
        return torch.optim.RMSprop(groups, foreach=True)
    return torch.optim.SGD(groups, momentum=momentum, nesterov=name == "nag" and momentum > 0, fused=fused)


class StackedOptimizer:
    """Updates a network's parameters from its gradients.

    `learning_rates` and `weight_decays` have one entry per run. With `layerwise` each layer can be stepped on
    its own; otherwise one call updates everything.
    """

    def __init__(
        self,
        name: str,
        network: Network,
        learning_rates: Sequence[float],
        weight_decays: Sequence[float],
        momentum: float = 0.9,
        layerwise: bool = False,
    ) -> None:
        self._memory, self._counts = _MEMORY[name], name not in ("sgd", "nag")
        if not momentum and not self._counts:
            self._memory = ()
        self._blocks = _blocks(list(zip(learning_rates, weight_decays, strict=True)))
        self._views: dict[str, list[Tensor]] = {}
        for parameter_name, parameter in network.parameters.items():
            gradient = network.gradients[parameter_name]
            views = [parameter[start:stop] for start, stop, _ in self._blocks]
            for view, (start, stop, _) in zip(views, self._blocks, strict=True):
                view.grad = gradient[start:stop]
            self._views[parameter_name] = views
        device = next(iter(network.parameters.values())).device
        fused = device.type in ("cpu", "cuda")
        self._scalars_on = device if fused else torch.device("cpu")
        names = [[n for n in self._views if n.endswith(f".{k}")] for k in range(len(network.layers))]
        self._optimizers = [
            _make(name, self._groups(part), momentum, fused) for part in (names if layerwise else [list(self._views)])
        ]

    def step(self, layer: int = 0) -> None:
        """Apply the gradients: of one layer when made `layerwise`, else of all."""
        self._optimizers[layer].step()

    def state(self) -> State:
        """The optimizer's memory per parameter, stacked over runs; scalars are repeated."""
        return {name: dict(self._stacked(name)) for name in self._views}

    def load(self, state: State) -> None:
        """Take over a `state` whose run axis is this optimizer's."""
        for name, views in self._views.items():
            for view, (start, stop, _) in zip(views, self._blocks, strict=True):
                own = self._owner(view).state[view]
                for key, stacked in state[name].items():
                    part = stacked[start:stop]
                    scalar = part.dim() == 1
                    own[key] = part[0].to(self._scalars_on).clone() if scalar else part.to(view.device).clone()

    def check_state(self, state: State, runs: int | None, begun: bool = True) -> None:
        """Raise ValueError for what is not the `state` of this optimizer for so many runs, or for one alone.

        One that has not `begun` remembers nothing. The memory of torch's optimizers must be whole: one with a tensor of
        another shape ends the process.
        """
        if state.keys() != self._views.keys():
            raise ValueError("It is the state of other parameters.")
        for name, views in self._views.items():
            shape, dtype = views[0].shape[1:], views[0].dtype
            memory = dict.fromkeys(self._memory, (shape, dtype))
            scalars = {"step": (torch.Size(), torch.float32)} if self._counts else {}
            check_tensors(state[name], scalars | memory if begun else {}, runs)

    def _groups(self, names: list[str]) -> list[dict[str, Any]]:
        return [
            {"params": [self._views[name][i] for name in names], "lr": rate, "weight_decay": decay}
            for i, (_, _, (rate, decay)) in enumerate(self._blocks)
        ]

    def _owner(self, view: Tensor) -> torch.optim.Optimizer:
        for optimizer in self._optimizers:
            if any(view is p for group in optimizer.param_groups for p in group["params"]):
                return optimizer
        raise KeyError("not a view of this optimizer")

    def _stacked(self, name: str) -> list[tuple[str, Tensor]]:
        views = self._views[name]
        states = [self._owner(view).state[view] for view in views]
        keys = [key for key, value in states[0].items() if isinstance(value, Tensor)]
        return [
            (key, torch.cat([_per_run(state[key], view) for state, view in zip(states, views, strict=True)]))
            for key in keys
        ]


def _per_run(value: Tensor, view: Tensor) -> Tensor:
    return value.clone() if value.shape == view.shape else value.reshape(1).repeat(len(view))


def _blocks(pairs: list[tuple[float, float]]) -> list[tuple[int, int, tuple[float, float]]]:
    blocks, start = [], 0
    for pair, members in itertools.groupby(pairs):
        stop = start + len(list(members))
        blocks.append((start, stop, pair))
        start = stop
    return blocks
