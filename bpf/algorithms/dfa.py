"""Direct feedback alignment."""

from pydantic import Field
from torch import Tensor

from bpf.algorithms.base import ProjectionRule, Step
from bpf.nn.layer import Layer


class DirectFeedbackAlignment(ProjectionRule):
    """Direct feedback alignment: the output error, sent to every layer through a fixed random matrix.

    Teaching signal `t_k = s e`, the gradient of the local loss `s ⟨p_k, e⟩`, with `e = ∂L_out/∂a_out`
    [runs, batch, targets] of the batch mean: `(softmax(a_out) - y) / B` with the ce loss. The factor s is 1; code that
    sums hidden gradients over the batch, with errors that are not divided, has s = B, or B T with the bce loss, which
    matters with optimizers that do not normalise (Frenkel et al. 2021 and Nøkland 2016, their code).
    """

    equation = "δh_k = s e F_k^T,  e = ∂L_out/∂a_out"
    reference = "Nøkland 2016, Direct Feedback Alignment Provides Learning in Deep Neural Networks"
    problem_types = frozenset({"classification", "reconstruction"})
    needs_output_error = True
    needs_projection = False

    class Options(ProjectionRule.Options):
        """Of the hidden errors."""

        hidden_factor: float = Field(
            1.0,
            gt=0,
            le=1e9,
            description="Factor s on them, beside the output layer's true gradient.",
            json_schema_extra={"later": True},
        )
        through_dropout: bool = Field(
            False,
            description="Whether they pass the layer's dropout, as in Nøkland's code.",
            json_schema_extra={"later": True},
        )

    options: Options

    def teaching_signal(self, projected: Tensor | None, target: Tensor, output_error: Tensor | None) -> Tensor:
        assert output_error is not None
        return output_error * self.options.hidden_factor if self.options.hidden_factor != 1 else output_error

    def hidden_error(self, step: Step, layer: Layer, signal: Tensor) -> Tensor:
        error = super().hidden_error(step, layer, signal)
        return step.masked(layer, error) if self.options.through_dropout else error
