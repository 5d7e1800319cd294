"""Direct random target projection."""

from torch import Tensor

from bpf.algorithms.base import ProjectionRule


class DirectRandomTargetProjection(ProjectionRule):
    """Direct random target projection: the target itself, sent to every layer through a fixed random matrix.

    Teaching signal `t_k = +y / B`, the gradient of the local loss `⟨p_k, y⟩`, with the one-hot target y
    [runs, batch, targets]. It is known before the forward pass, and nothing holds the activations back, so the
    rule diverges with activations that are not bounded.
    """

    equation = "δh_k = (y / B) F_k^T"
    reference = (
        "Frenkel, Lefebvre & Bol 2021, Learning Without Feedback: Fixed Random Learning Signals Allow for "
        "Feedforward Training of Deep Neural Networks"
    )
    problem_types = frozenset({"classification"})
    needs_bounded_activation = True
    needs_projection = False
    layerwise = True
    feeds_target = True

    def teaching_signal(self, projected: Tensor | None, target: Tensor, output_error: Tensor | None) -> Tensor:
        return target / target.shape[1]
