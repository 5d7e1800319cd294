"""How large a rule's gradients are."""

from torch import Tensor

from bpf.trackers.base import Probe, Tracker, norms


class Gradients(Tracker):
    """Euclidean norm of the gradient of each layer's weights and biases."""

    def measure(self, probe: Probe) -> dict[str, Tensor]:
        return {
            f"{kind}.{layer}": norms(gradient)
            for name, gradient in probe.rule_gradients.items()
            for kind, _, layer in [name.partition(".")]
            if kind in ("weight", "bias")
        }
