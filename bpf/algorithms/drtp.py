"""Direct random target projection."""

from pydantic import Field
from torch import Tensor

from bpf.algorithms.base import ProjectionRule


class DirectRandomTargetProjection(ProjectionRule):
    """Direct random target projection: the target itself, sent to every layer through a fixed random matrix.

    Teaching signal `t_k = +s y / B`, the gradient of the local loss `s ⟨p_k, y⟩`, with the one-hot target y
    [runs, batch, targets]. It is known before the forward pass, and nothing holds the activations back, so the
    rule diverges with activations that are not bounded. The factor s is 1; the authors' code, which sums hidden
    gradients over the batch, has s = B, which matters with optimizers that do not normalise.
    """

    equation = "δh_k = (s y / B) F_k^T"
    reference = (
        "Frenkel, Lefebvre & Bol 2021, Learning Without Feedback: Fixed Random Learning Signals Allow for "
        "Feedforward Training of Deep Neural Networks"
    )
    problem_types = frozenset({"classification"})
    needs_bounded_activation = True
    needs_projection = False
    layerwise = True
    feeds_target = True

    class Options(ProjectionRule.Options):
        """Of the hidden errors."""

        hidden_factor: float = Field(
            1.0,
            gt=0,
            le=1e9,
            description="Factor s on them, beside the output layer's true gradient.",
            json_schema_extra={"later": True},
        )

    options: Options

    def teaching_signal(self, projected: Tensor | None, target: Tensor, output_error: Tensor | None) -> Tensor:
        return target * (self.options.hidden_factor / target.shape[1])
