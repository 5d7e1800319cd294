"""A watch over the first steps of a rule: what changes without having been declared would be lost by a resume."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bpf.algorithms import Algorithm, Network, Step

STEPS = 2
"""That are watched. In the first a rule may make what it keeps, which it must not change in the second."""
_Marks = dict[str, tuple[Tensor, int]]


class Watch:
    """A rule at work in a real run. With `layerwise` the optimizer steps parameters during its gradients.

    Raises ValueError for what a rule must not do.
    """

    def __init__(self, rule: Algorithm, layerwise: bool) -> None:
        self._rule, self._layerwise, self._left = rule, layerwise, STEPS
        self._kept: _Marks = {}
        self._places: dict[str, Tensor] = {}

    def gradients(self, step: Step) -> None:
        """Those of a step: in the tensors that are there for them, with all else as it was, and what was predicted."""
        if not self._left:
            return self._rule.gradients(step)
        network, self._places = step.network, step.network.state()
        fixed = _fixed(self._rule, network) | ({} if self._layerwise else _marked(network.parameters))
        places = {n: (t, t.shape) for n, t in network.gradients.items()}
        self._rule.gradients(step)
        _compare(fixed, _fixed(self._rule, network) | _marked(network.parameters))
        for name, (gradient, shape) in places.items():
            if network.gradients.get(name) is not gradient or gradient.shape != shape:
                raise ValueError(f"it replaces or resizes the gradient of {name}: write into gradients[{name!r}]")
        for what, least in (("logits", 3), ("loss_per_example", 2)):
            wanted = step.target.shape[:least]
            check_given(f"step.{what}", getattr(step, what, None), wanted)

    def updated(self, step: Step) -> None:
        """What the rule does after the optimizer's step, which may change parameters, in place."""
        if not self._left:
            return self._rule.updated(step)
        self._left -= 1
        fixed = _fixed(self._rule, step.network)
        self._rule.updated(step)
        self._kept, now = _fixed(self._rule, step.network), step.network.state()
        if added := sorted(now.keys() ^ self._places.keys()):
            raise ValueError(f"it adds or removes {', '.join(added)} in a step: tensors are added in `prepare`")
        _compare(fixed, self._kept)
        for name, tensor in self._places.items():
            if now[name] is not tensor:
                raise ValueError(f"it replaces the tensor {name}: change it in place")
        self._places = {}

    def check(self, network: Network) -> None:
        """At the end of an epoch: what did not change in the first steps has not changed since."""
        if not self._left:
            now = _fixed(self._rule, network)
            other = {
                name
                for name in now.keys() & self._kept
                if name.startswith("its ") and now[name][0] is not self._kept[name][0]
            }
            _compare({name: mark for name, mark in self._kept.items() if name not in other}, now)


def prepared(rule: Algorithm, network: Network, runs: Sequence[tuple[int, str]]) -> None:
    """Let a rule add its tensors. Raises ValueError if it replaces others, or adds what is not of these runs."""
    before = network.parameters | network.buffers
    rule.prepare(network, runs)
    now: dict[str, object] = {**network.parameters, **network.buffers}
    if replaced := [name for name, tensor in before.items() if now.get(name) is not tensor]:
        raise ValueError(f"it replaces the tensor {replaced[0]}: change it in place")
    for name, tensor in now.items():
        if not isinstance(tensor, Tensor) or tensor.shape[:1] != (len(runs),):
            given = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(
                f"{name} is {given}, and must be a tensor whose first axis is that of the {len(runs)} runs"
            )


def check_given(what: str, given: object, shape: torch.Size) -> None:
    """Raise ValueError for what is no tensor of numbers of this shape without a graph."""
    if not isinstance(given, Tensor):
        raise ValueError(f"{what} is {type(given).__name__}, and must be a tensor {list(shape)}")
    if given.shape != shape or not given.is_floating_point():
        raise ValueError(f"{what} is {given.dtype} {list(given.shape)}, and must be floating point {list(shape)}")
    if given.requires_grad:
        raise ValueError(f"{what} keeps the graph of its gradients: detach it")


def _fixed(rule: Algorithm, network: Network) -> _Marks:
    """What a rule must not change, by what a person calls it, with the number of changes to it."""
    changing = network.state().keys() - network.parameters.keys()
    own = {f"its {name}": (value, value._version) for name, value in vars(rule).items() if isinstance(value, Tensor)}
    return _marked({name: tensor for name, tensor in network.buffers.items() if name not in changing}) | own


def _marked(tensors: dict[str, Tensor]) -> _Marks:
    return {f"the tensor {name}": (tensor, tensor._version) for name, tensor in tensors.items()}


def _compare(before: _Marks, now: _Marks) -> None:
    for name, (tensor, version) in before.items():
        found, changes = now.get(name, (None, version))
        if found is not tensor or changes != version:
            raise ValueError(
                f"it changes {name} in its steps and has not declared it, so that a resume would lose it: add it in "
                "`prepare`, by network.add_state or network.add_parameter, and change it in place"
            )
