"""A watch over the first steps of a rule: what changes without having been declared would be lost by a resume."""

from torch import Tensor

from bpf.algorithms import Algorithm, Network, Step
from bpf.errors import UsageError
from bpf.registry import ALGORITHMS, Registry

STEPS = 2
"""That are watched. In the first a rule may make what it keeps, which it must not change in the second."""


class Watch:
    """Gradients of a rule, by name, in a real run. With `layerwise` the optimizer steps parameters in between."""

    def __init__(self, name: str, rule: Algorithm, layerwise: bool) -> None:
        self._name, self._rule, self._layerwise, self._left = name, rule, layerwise, STEPS

    def gradients(self, step: Step) -> None:
        """Those of a step. Raises UsageError if a tensor has changed that is not declared to."""
        if not self._left:
            return self._rule.gradients(step)
        self._left -= 1
        before = {name: (tensor, tensor._version) for name, tensor in self._fixed(step.network).items()}
        self._rule.gradients(step)
        now = self._fixed(step.network)
        for name, (tensor, version) in before.items():
            if now.get(name) is not tensor or tensor._version != version:
                owner = Registry(ALGORITHMS).describe(self._name).distribution
                raise UsageError(
                    f"The rule {self._name} (of {owner}) changes {name} in its steps and has not declared it, so that "
                    "a resume would lose it. Add it in `prepare`, by network.add_state or network.add_parameter."
                )

    def _fixed(self, network: Network) -> dict[str, Tensor]:
        """What a rule must not change, by what a person calls it."""
        changing = network.state().keys() - network.parameters.keys()
        tensors = {n: t for n, t in network.buffers.items() if n not in changing}
        tensors |= {} if self._layerwise else network.parameters
        own = {f"its {name}": value for name, value in vars(self._rule).items() if isinstance(value, Tensor)}
        return {f"the tensor {name}": tensor for name, tensor in tensors.items()} | own
