"""Local prediction losses."""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field
from torch import Tensor

from bpf.algorithms import Algorithm, Layer, Network, Step
from bpf_local_losses.heads import add_classifier, prediction_error


class LocalPrediction(Algorithm):
    """Local prediction: each hidden layer learns with a linear classifier of its own, which learns by the same loss.

    `p_k = h_k M_k^T + c_k` [runs, batch, targets] from h_k before dropout, `t_k = ∂L/∂p_k` with the run's output loss
    L, its batch mean; `δh_k = t_k M_k` and nothing else, `∂M_k = t_k^T h_k`, `∂c_k = Σ_batch t_k`.

    c begins as U(±1/√units), M with zeros (`zero`), as in the authors' code (local-loss, train.py), so that a layer
    stays as it is in the first step; or M as c (`torch`), as the projection matrices of Mono-Forward in
    BeyondBackpropagation (mf_mlp.py), which have no c, and of which the last predicts. Here the output layer does.
    """

    equation = "δh_k = t_k M_k,  ∂M_k = t_k^T h_k,  t_k = ∂L(h_k M_k^T + c_k)"
    reference = "Nøkland & Eidnes 2019, Training Neural Networks with Local Error Signals"
    problem_types = frozenset({"classification", "reconstruction"})
    has_feedback = False
    layerwise = True
    unused_parameters = frozenset({"bw_init"})

    class Options(Algorithm.Options):
        """Of the local classifiers."""

        init: Literal["zero", "torch"] = Field(
            "zero", description="Their initial weights: 0, as the authors', or U(±1/√units), as torch's linear layers."
        )

    options: Options

    def prepare(self, network: Network, runs: Sequence[tuple[int, str]]) -> None:
        for layer in network.hidden:
            add_classifier(network, layer, runs, self.options.init)

    def gradients(self, step: Step) -> None:
        h = step.inputs
        for layer in step.network.hidden:
            h = self._learn(step, layer, h)
        step.train_output(h)

    def _learn(self, step: Step, layer: Layer, inputs: Tensor) -> Tensor:
        trace = step.forward(layer, inputs)
        layer.backward(trace, prediction_error(step, trace))
        step.learned(layer)
        return trace.passed_on
