"""Fixed-weight difference target propagation."""

from collections.abc import Sequence

import torch
from pydantic import Field

from bpf.algorithms import Algorithm, Network, Step, random_feedback


class FixedWeightDifferenceTargetPropagation(Algorithm):
    """Fixed-weight difference target propagation: layers follow targets that come down through fixed random layers.

    With `g_k(h) = tanh(h B_k^T)`, B_k fixed and random, the targets are, from the logits a_out of one example down,

        t_out = a_out - step · ∂L/∂a_out,    t_k = h_k + m_k ⊙ (g_k(t_{k+1}) - g_k(h_{k+1}))

    and every layer follows the mean over the batch of its own squared error, `‖h_k - t_k‖² / (2 step)`, t fixed. The
    error of layer k, [runs, batch, units_k], is so `δh_k = (h_k - t_k) / (step B)`, and that of the output layer the
    true one. h_k is taken before dropout, whose mask m_k the difference passes as an error does.

    B_k, [runs, units_k, units_{k+1}], is drawn with the run's `bw_init` as a feedback matrix, so that every initialiser
    scales it by the units of the layer that gets the target, as in `fa`.
    """

    equation = "δh_k = (h_k - t_k) / (s B),  t_k = h_k - g_k(h_{k+1}) + g_k(t_{k+1}),  g_k(h) = tanh(h B_k^T)"
    reference = "Shibuya, Inoue, Kawakami & Sato 2023, Fixed-Weight Difference Target Propagation"
    problem_types = frozenset({"classification", "reconstruction"})
    has_feedback = False

    class Options(Algorithm.Options):
        """Of the targets."""

        step: float = Field(
            0.04,
            gt=0,
            le=1000,
            description="Step of the output's target s, from the logits along one example's negative gradient.",
        )

    options: Options

    def prepare(self, network: Network, runs: Sequence[tuple[int, str]]) -> None:
        for below, layer in zip(network.layers, network.layers[1:], strict=False):
            name = f"fw-dtp.{below.index}"
            drawn = random_feedback(runs, name, below.units, layer.units, layer.weight.dtype)
            network.buffers[name] = drawn.mT.contiguous()

    def gradients(self, step: Step) -> None:
        traces = step.forward_hidden()
        error = step.train_output(traces[-1].passed_on)
        scale = -self.options.step * step.inputs.shape[1]
        upper, difference = step.logits, error * scale  # t - h
        for trace in reversed(traces):
            layer = trace.layer
            backward = step.network.buffers[f"fw-dtp.{layer.index}"]
            target = torch.bmm(upper + difference, backward).tanh_()
            difference = step.masked(layer, target.sub_(torch.bmm(upper, backward).tanh_()))
            upper = trace.output
            layer.backward(trace, difference / scale)
