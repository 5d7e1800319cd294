"""Direct feedback alignment."""

from torch import Tensor

from bpf.algorithms.base import ProjectionRule


class DirectFeedbackAlignment(ProjectionRule):
    """Direct feedback alignment: the output error, sent to every layer through a fixed random matrix.

    Teaching signal `t_k = e`, the gradient of the local loss `⟨p_k, e⟩`, with `e = ∂L_out/∂a_out`
    [runs, batch, targets] of the batch mean: `(softmax(a_out) - y) / B` with the ce loss.
    """

    equation = "δh_k = e F_k^T,  e = ∂L_out/∂a_out"
    reference = "Nøkland 2016, Direct Feedback Alignment Provides Learning in Deep Neural Networks"
    problem_types = frozenset({"classification", "reconstruction"})
    needs_output_error = True
    needs_projection = False

    def teaching_signal(self, projected: Tensor | None, target: Tensor, output_error: Tensor | None) -> Tensor:
        assert output_error is not None
        return output_error
