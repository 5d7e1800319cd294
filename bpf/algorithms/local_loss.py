"""Layers that learn from a loss of their own, on their output seen through a fixed random classifier."""

from torch import Tensor

from bpf.algorithms.base import ProjectionRule
from bpf.nn.losses import cross_entropy, squared_error


class LocalCrossEntropy(ProjectionRule):
    """Local cross-entropy: each layer learns to classify through a fixed random projection of its output.

    Teaching signal `t_k = (softmax(p_k) - y) / B` [runs, batch, targets], the gradient of the cross-entropy of
    `softmax(p_k)`; known as soon as the layer's output is.
    """

    equation = "δh_k = ((softmax(p_k) - y) / B) F_k^T,  p_k = h_k F_k"
    reference = "Mostafa, Ramesh & Cauwenberghs 2018, Deep Supervised Learning Using Local Errors"
    problem_types = frozenset({"classification"})
    layerwise = True

    def teaching_signal(self, projected: Tensor | None, target: Tensor, output_error: Tensor | None) -> Tensor:
        assert projected is not None
        return cross_entropy(projected, target)[1]

    def local_loss(self, projected: Tensor, target: Tensor, output_error: Tensor) -> Tensor:
        return cross_entropy(projected, target)[0].mean(1)


class LocalSquaredError(ProjectionRule):
    """Local squared error: each layer learns to predict the target through a fixed random projection.

    Teaching signal `t_k = 2 (s(p_k) - y) s'(p_k) / (B T)` [runs, batch, targets], the gradient of the mean of
    `(s(p_k) - y)²`; s is tanh for targets in [-1, 1] and sigmoid for [0, 1].
    """

    equation = "δh_k = (2 (s(p_k) - y) s'(p_k) / (B T)) F_k^T,  p_k = h_k F_k"
    reference = "after Mostafa, Ramesh & Cauwenberghs 2018, Deep Supervised Learning Using Local Errors"
    problem_types = frozenset({"classification", "reconstruction"})
    layerwise = True

    def teaching_signal(self, projected: Tensor | None, target: Tensor, output_error: Tensor | None) -> Tensor:
        assert projected is not None
        return squared_error(self.problem.squash)(projected, target)[1]

    def local_loss(self, projected: Tensor, target: Tensor, output_error: Tensor) -> Tensor:
        return squared_error(self.problem.squash)(projected, target)[0].mean(1)
