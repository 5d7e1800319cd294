"""The seam for trackers: a measurement of every run on a fixed probe batch, every few steps or epochs."""

from functools import cached_property

from torch import Tensor

from bpf.algorithms import Algorithm, Network, Step
from bpf.nn.losses import Loss
from bpf.nn.randomness import Draws


class Probe:
    """A cohort's networks, their rule, and a fixed batch of training examples.

    Gradients are computed on demand in memory of their own; nothing of the training changes.
    """

    def __init__(
        self,
        network: Network,
        rule: Algorithm,
        loss: Loss,
        inputs: Tensor,
        target: Tensor,
        draws: Draws | None = None,
        rates: Tensor | None = None,
    ) -> None:
        self.network, self.rule = network, rule
        self.loss, self.inputs, self.target = loss, inputs, target
        self._draws, self._rates = draws, rates

    def gradients_by(self, rule: Algorithm) -> dict[str, Tensor]:
        """The gradients that `rule` computes on the probe batch, by parameter name, each [runs, ...]."""
        network = self.network.shadow()
        rule.gradients(Step(network, self.inputs, self.target, self.loss, draws=self._draws, rates=self._rates))
        return network.gradients

    @cached_property
    def rule_gradients(self) -> dict[str, Tensor]:
        """The gradients of the runs' own rule, by parameter name, each [runs, ...]."""
        return self.gradients_by(self.rule)


class Tracker:
    """A measurement. Subclass it, describe it in the docstring's first line, and implement `measure`."""

    def measure(self, probe: Probe) -> dict[str, Tensor]:
        """Values by name, such as `layer.0`, each [runs]."""
        raise NotImplementedError


def norms(tensor: Tensor) -> Tensor:
    """The Euclidean norm of each run's part of `tensor` [runs, ...], as [runs]."""
    return tensor.flatten(1).square().sum(1).sqrt_()


def cosine(first: Tensor, second: Tensor) -> Tensor:
    """The cosine between each run's parts of two tensors [runs, ...], as [runs]; 0 where one of them is zero."""
    product = (first.flatten(1) * second.flatten(1)).sum(1)
    lengths = norms(first) * norms(second)
    return product.div(lengths.clamp_min(1e-30))
