"""Similarity matching, alone or with a prediction loss."""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field
from torch import Tensor

from bpf.algorithms import Algorithm, Layer, Network, Step
from bpf_local_losses.heads import add_classifier, add_map, prediction_error, similarities, similarity_error


class PredictionAndSimilarity(Algorithm):
    """Local prediction and similarity matching: examples are to be as alike in each hidden layer as their labels are.

    The loss of layer k, on h_k before dropout, is `(1 - w) pred + w sim`: pred is that of the rule `pred`, and sim the
    mean over all pairs of the batch's examples of `(S(h_k R_k^T) - S(y))²`, with S(x) [runs, batch, batch] the cosines
    between rows that had their mean over features taken off, y one-hot, and R_k [runs, units, units] a map that learns
    by the same loss and begins as U(±1/√units). With w = 1, the authors' `sim`, there is no M; with w = 0 no R.

    The output layer learns from (1 - w) times its loss (`scale_output`), which is reported as it is; as in the authors'
    code, where `sim` scales nothing.
    """

    equation = "δh_k = ∂((1 - w) L(h_k M_k^T + c_k) + w ‖S(h_k R_k^T) - S(y)‖² / B²) / ∂h_k"
    reference = "Nøkland & Eidnes 2019, Training Neural Networks with Local Error Signals"
    problem_types = frozenset({"classification"})
    has_feedback = False
    layerwise = True
    unused_parameters = frozenset({"bw_init"})

    class Options(Algorithm.Options):
        """Of the local losses."""

        weight: float = Field(
            0.99, ge=0, le=1, description="Weight w of similarity matching; 1 is `sim` alone, 0 is `pred`."
        )
        scale_output: bool = Field(
            True, description="Whether the output layer learns from 1 - w times its loss, unless w is 1."
        )
        init: Literal["zero", "torch"] = Field(
            "zero", description="Initial weights of the local classifiers, see pred."
        )

    options: Options

    def prepare(self, network: Network, runs: Sequence[tuple[int, str]]) -> None:
        for layer in network.hidden:
            if self.options.weight < 1:
                add_classifier(network, layer, runs, self.options.init)
            if self.options.weight > 0:
                add_map(network, layer, runs)

    def gradients(self, step: Step) -> None:
        h, wanted = step.inputs, similarities(step.target)
        for layer in step.network.hidden:
            h = self._learn(step, layer, h, wanted)
        weight, output = self.options.weight, step.network.output
        trace = step.forward(output, h)
        error = step.output_error(trace)
        if self.options.scale_output and weight < 1:
            error.mul_(1 - weight)
        output.backward(trace, error)

    def _learn(self, step: Step, layer: Layer, inputs: Tensor, wanted: Tensor) -> Tensor:
        weight = self.options.weight
        trace = step.forward(layer, inputs)
        if weight == 0:
            error = prediction_error(step, trace)
        else:
            error = similarity_error(step, trace, wanted, weight)
            if weight < 1:
                error.add_(prediction_error(step, trace, 1 - weight))
        layer.backward(trace, error)
        step.learned(layer)
        return trace.passed_on
