"""Losses on pre-activations, each with its gradient of the batch mean.

All take `logits` and `target` of shape [runs, batch, targets] and return `(per_example, gradient)`: the loss of
each example, [runs, batch], and the derivative of the batch mean with respect to the logits, shaped as they are.
The same functions serve the output layer and the local losses.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Loss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def cross_entropy(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """`-Σ y log softmax(a)` for targets that sum to 1, and `(softmax(a) - y) / B`."""
    # One exponential serves both; torch.log_softmax is several times slower over a handful of classes.
    shifted = logits - logits.amax(-1, keepdim=True)
    exponential = shifted.exp()
    total = exponential.sum(-1, keepdim=True)
    per_example = total.log().squeeze(-1).sub_(torch.linalg.vecdot(shifted, target))
    return per_example, exponential.div_(total).sub_(target).div_(logits.shape[1])


def binary_cross_entropy(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over targets of the binary cross-entropy of σ(a), and `(σ(a) - y) / (B T)`."""
    per_example = torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(-1)
    return per_example, torch.sigmoid(logits).sub_(target).div_(logits.shape[1] * logits.shape[2])


def squared_error(squash: str) -> Loss:
    """Mean over targets of `(s(a) - y)²`, and `2 (s(a) - y) s'(a) / (B T)`.

    `squash` names s: `tanh` for targets in [-1, 1], `sigmoid` for [0, 1], `identity` for anything else.
    """

    def loss(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        output = predict(logits, squash)
        difference = output - target
        per_example = difference.square().mean(-1)
        gradient = difference.mul_(2 / (logits.shape[1] * logits.shape[2]))
        if squash == "tanh":
            gradient = torch.ops.aten.tanh_backward(gradient, output)
        elif squash == "sigmoid":
            gradient = torch.ops.aten.sigmoid_backward(gradient, output)
        return per_example, gradient

    return loss


def predict(logits: Tensor, squash: str) -> Tensor:
    """The squashed output that `squared_error` compares with the target."""
    if squash == "tanh":
        return torch.tanh(logits)
    return torch.sigmoid(logits) if squash == "sigmoid" else logits


def squash_for(problem_type: str, scaler: str) -> str:
    """The squashing function whose range is the targets': one-hot labels or scaled pixels."""
    if problem_type == "classification":
        return "sigmoid"
    return {"standard": "tanh", "zero_one": "sigmoid"}.get(scaler, "identity")


def output_loss(name: str, squash: str) -> Loss:
    """The loss of the output layer by its name in a spec: ce, bce or mse."""
    return {"ce": cross_entropy, "bce": binary_cross_entropy, "mse": squared_error(squash)}[name]
