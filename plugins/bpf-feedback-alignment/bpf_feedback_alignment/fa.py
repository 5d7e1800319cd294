"""Feedback alignment."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bpf.algorithms import Algorithm, Layer, Network, Step, random_feedback


class FeedbackAlignment(Algorithm):
    """Feedback alignment: backpropagation with fixed random matrices in place of the transposed weights.

    The hidden error of layer k, [runs, batch, units_k], is `δh_k = δa_{k+1} B_{k+1}`, through dropout, with
    `B_{k+1}` shaped as `W_{k+1}`, [runs, units_{k+1}, units_k]. δa is that of the batch mean. The transpose of B is
    drawn with the run's `bw_init` as a feedback matrix F [units_k, units_{k+1}], so that every initialiser scales it by
    the units of the layer that gets the error, as in the other rules: `lecun` is N(0, 1/units_k).
    """

    equation = "δh_k = δa_{k+1} B_{k+1}"
    reference = (
        "Lillicrap, Cownden, Tweed & Akerman 2016, Random synaptic feedback weights support error backpropagation "
        "for deep learning"
    )
    problem_types = frozenset({"classification", "reconstruction"})
    has_feedback = False

    def prepare(self, network: Network, runs: Sequence[tuple[int, str]]) -> None:
        for below, layer in zip(network.layers, network.layers[1:], strict=False):
            name = f"fa.{layer.index}"
            drawn = random_feedback(runs, name, below.units, layer.units, layer.weight.dtype)
            network.buffers[name] = drawn.mT.contiguous()

    def backward_weights(self, network: Network, layer: Layer) -> Tensor:
        return network.buffers[f"fa.{layer.index}"]

    def gradients(self, step: Step) -> None:
        traces = step.forward_hidden()
        delta = step.train_output(traces[-1].passed_on)
        for trace in reversed(traces):
            feedback = self.backward_weights(step.network, step.network.layers[trace.layer.index + 1])
            delta = trace.layer.backward(trace, step.masked(trace.layer, torch.bmm(delta, feedback)))
