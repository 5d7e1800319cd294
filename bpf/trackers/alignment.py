"""How well a rule aligns with backpropagation."""

import torch
from torch import Tensor

from bpf.algorithms.bp import Backpropagation
from bpf.trackers.base import Probe, Tracker, cosine


class BpCosine(Tracker):
    """Cosine between the rule's weight gradient and the true one, per layer (1 is backpropagation)."""

    def measure(self, probe: Probe) -> dict[str, Tensor]:
        control = Backpropagation(Backpropagation.Options(), probe.rule.problem)
        true = probe.gradients_by(control)
        return {
            f"layer.{layer.index}": cosine(probe.rule_gradients[f"weight.{layer.index}"], true[f"weight.{layer.index}"])
            for layer in probe.network.layers
        }


class WeightAlignment(Tracker):
    """Cosine between a layer's weights and the backward weights, or what the feedback matrices would make of them.

    `cos(vec W_k, vec B_k)` where a rule has backward weights, such as fa and kp (Akrout et al. 2019 show its angle).
    With feedback matrices it is `cos(vec W_k, vec F_k F_{k-1}^T)` for the hidden layers after the first,
    `cos(vec W_out, vec F^T)` for the output layer with the last hidden layer's F (Refinetti et al. 2021, Align, then
    memorise). For a rule that feeds back the target instead of the error, such as drtp, it is
    `cos(vec W_out, vec -F^T)`, since the error p - y has the opposite sign; between hidden layers the two signs cancel.
    Other rules have no such alignment.
    """

    def measure(self, probe: Probe) -> dict[str, Tensor]:
        values = {}
        for below, layer in zip(probe.network.layers, probe.network.layers[1:], strict=False):
            aligned = probe.rule.backward_weights(probe.network, layer)
            if aligned is None and below.feedback is not None:
                aligned = below.feedback.mT
                if layer.feedback is not None:
                    aligned = torch.bmm(layer.feedback, aligned)
                elif probe.rule.feeds_target:
                    aligned = -aligned
            if aligned is None:
                continue
            values[f"layer.{layer.index}"] = cosine(layer.weight, aligned)
        return values
