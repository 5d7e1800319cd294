"""How large gradients and weights are."""

from collections.abc import Mapping

from torch import Tensor

from bpf.trackers.base import Probe, Tracker, norms


class Gradients(Tracker):
    """Euclidean norm of the rule's gradient of each layer's weights and biases."""

    def measure(self, probe: Probe) -> dict[str, Tensor]:
        return _norms(probe.rule_gradients)


class Weights(Tracker):
    """Euclidean norm of each layer's weights and biases."""

    def measure(self, probe: Probe) -> dict[str, Tensor]:
        return _norms(probe.network.parameters)


def _norms(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: norms(tensor) for name, tensor in tensors.items() if name.partition(".")[0] in ("weight", "bias")}
