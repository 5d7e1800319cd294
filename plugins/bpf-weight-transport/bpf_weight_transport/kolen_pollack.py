"""Kolen-Pollack learning."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bpf.algorithms import Algorithm, Layer, Network, Step, random_feedback


class KolenPollack(Algorithm):
    """Kolen-Pollack: feedback alignment whose backward weights learn by the forward weights' own updates.

    `δh_k = δa_{k+1} B_{k+1}`, through dropout, and `∂B_k = ∂W_k`: with the same optimizer and weight decay on both,
    what W and B began with fades and they become equal. B is drawn as in `fa`: its transpose with the run's `bw_init`
    as a feedback matrix [units_k, units_{k+1}].
    """

    equation = "δh_k = δa_{k+1} B_{k+1},  ∂B_k = ∂W_k"
    reference = (
        "Kolen & Pollack 1994, Backpropagation without Weight Transport; Akrout, Wilson, Humphreys, Lillicrap & Tweed "
        "2019, Deep Learning without Weight Transport"
    )
    problem_types = frozenset({"classification", "reconstruction"})
    has_feedback = False

    def prepare(self, network: Network, runs: Sequence[tuple[int, str]]) -> None:
        for below, layer in zip(network.layers, network.layers[1:], strict=False):
            name = f"kp.{layer.index}"
            drawn = random_feedback(runs, name, below.units, layer.units, layer.weight.dtype)
            network.add_parameter(name, drawn.mT)

    def backward_weights(self, network: Network, layer: Layer) -> Tensor:
        return network.parameters[f"kp.{layer.index}"]

    def gradients(self, step: Step) -> None:
        network = step.network
        traces = step.forward_hidden()
        delta = step.train_output(traces[-1].passed_on)
        for trace in reversed(traces):
            feedback = self.backward_weights(network, network.layers[trace.layer.index + 1])
            delta = trace.layer.backward(trace, step.masked(trace.layer, torch.bmm(delta, feedback)))
        for layer in network.layers[1:]:
            network.gradients[f"kp.{layer.index}"].copy_(layer.weight_gradient)
