"""PEPITA: present the error to perturb the input to modulate activity."""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from bpf.algorithms import Algorithm, Layer, Network, Step, Trace, random_feedback

FEEDBACK = "pepita.feedback"


class Pepita(Algorithm):
    """PEPITA: each layer learns from what an error added to the input changes in its output; no backward pass.

    A first pass gives h_k and ŷ; a second one, of `x̃ = x + F (ŷ - y)` and with the same dropout masks, gives h̃_k and ỹ.
    h_k is what a layer passes on, after its dropout, as in the authors' notebook. Gradients of the batch mean, summed
    over the batch, with `h̃_0 = x̃`:

        hidden  ∂W_k = (h_k - h̃_k) h̃_{k-1}^T / B,  ∂b_k = (h_k - h̃_k) / B
        output  ∂W = (ỹ - y) h̃^T / B,  ∂b = (ỹ - y) / B

    `ŷ - y` is one example's `∂L_out/∂a_out`, softmax(a_out) - y with the ce loss. F [runs, inputs, targets] is
    `feedback_scale · U(±√(6/inputs))`. Scale and shift of batch norm, and the bias that it cancels, do not learn.
    """

    equation = "∂W_k = (h_k - h̃_k) h̃_{k-1}^T / B,  h̃ from x̃ = x + F (ŷ - y)"
    reference = (
        "Dellaferrera & Kreiman 2022, Error-driven Input Modulation: Solving the Credit Assignment Problem without a "
        "Backward Pass"
    )
    problem_types = frozenset({"classification"})
    has_feedback = False
    unused_parameters = frozenset({"bw_init"})

    class Options(Algorithm.Options):
        """Of the modulation."""

        feedback_scale: float = Field(
            0.05,
            gt=0,
            le=10,
            description="Scale of the matrix that adds the error to the input, times U(±√(6/inputs)).",
        )

    options: Options

    def prepare(self, network: Network, runs: Sequence[tuple[int, str]]) -> None:
        drawn = random_feedback(
            [(seed, "frenkel") for seed, _ in runs],
            FEEDBACK,
            network.structure.inputs,
            network.structure.targets,
            network.output.weight.dtype,
        )
        network.buffers[FEEDBACK] = drawn * self.options.feedback_scale

    def gradients(self, step: Step) -> None:
        network, batch = step.network, step.inputs.shape[1]
        clean = []
        h = step.inputs
        for layer in network.hidden:
            trace = step.forward(layer, h)
            clean.append(trace.passed_on)
            h = trace.passed_on
        error = step.output_error(step.forward(network.output, h))
        h = torch.baddbmm(step.inputs, error, network.buffers[FEEDBACK].mT, alpha=batch)
        for layer, before in zip(network.hidden, clean, strict=True):
            trace = step.forward(layer, h)
            h = trace.passed_on
            _learn(layer, trace, (before - h) / batch)
        modulated = step.forward(network.output, h)
        network.output.write_linear_gradient(step.loss(modulated.output, step.target)[1], h)


def _learn(layer: Layer, trace: Trace, delta: Tensor) -> None:
    layer.write_linear_gradient(delta, trace.inputs)
    if layer.scale_gradient is not None and layer.shift_gradient is not None:
        for gradient in (layer.scale_gradient, layer.shift_gradient, layer.bias_gradient):
            if gradient is not None:
                gradient.zero_()
