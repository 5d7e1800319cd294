"""Direct feedback alignment that sends the sign of the error only."""

from torch import Tensor

from bpf.algorithms import ProjectionRule


class SignDirectFeedbackAlignment(ProjectionRule):
    """Sign-DFA: only the sign of the output error, sent to every layer through a fixed random matrix.

    Teaching signal `t_k = sign(e) / B`, [runs, batch, targets], with `e = ∂L_out/∂a_out`. The sign forgets the scale
    of e, the 1/B of the batch mean included; dividing by B again makes the hidden gradients those of a batch mean,
    each example counting with -1, 0 or +1 per target. The factors that a loss puts into e (1/T of bce and mse)
    stay forgotten.
    """

    equation = "δh_k = (sign(e) / B) F_k^T,  e = ∂L_out/∂a_out"
    reference = (
        "Frenkel, Lefebvre & Bol 2021, Learning Without Feedback: Fixed Random Learning Signals Allow for "
        "Feedforward Training of Deep Neural Networks (sDFA), after Nøkland 2016"
    )
    problem_types = frozenset({"classification", "reconstruction"})
    needs_output_error = True
    needs_projection = False

    def teaching_signal(self, projected: Tensor | None, target: Tensor, output_error: Tensor | None) -> Tensor:
        assert output_error is not None
        return output_error.sign() / output_error.shape[1]
