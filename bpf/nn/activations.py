"""Hidden activations with their derivatives, as the pairs of kernels that torch itself uses in autograd."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

aten = torch.ops.aten
LEAKY_SLOPE = 0.01


@dataclass(frozen=True)
class Activation:
    """`apply(a)` gives h, and may overwrite a unless `from_input`.

    `backward(δh, kept)` gives δa and overwrites δh; `kept` is a itself when `from_input`, otherwise h.
    """

    apply: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    from_input: bool = False


def _in_place(operator: Callable[..., Tensor], *arguments: object) -> Callable[[Tensor, Tensor], Tensor]:
    def backward(error: Tensor, kept: Tensor) -> Tensor:
        return operator(error, kept, *arguments, grad_input=error)

    return backward


ACTIVATIONS: dict[str, Activation] = {
    "tanh": Activation(torch.tanh_, _in_place(aten.tanh_backward.grad_input)),
    "sigmoid": Activation(torch.sigmoid_, _in_place(aten.sigmoid_backward.grad_input)),
    "relu": Activation(torch.relu_, _in_place(aten.threshold_backward.grad_input, 0)),
    "lrelu": Activation(
        lambda a: torch.nn.functional.leaky_relu_(a, LEAKY_SLOPE),
        _in_place(aten.leaky_relu_backward.grad_input, LEAKY_SLOPE, True),
    ),
    "swish": Activation(torch.nn.functional.silu, _in_place(aten.silu_backward.grad_input), from_input=True),
    "gelu": Activation(torch.nn.functional.gelu, _in_place(aten.gelu_backward.grad_input), from_input=True),
    "elu": Activation(
        torch.nn.functional.elu_,
        lambda error, h: aten.elu_backward.grad_input(error, 1, 1, 1, True, h, grad_input=error),
    ),
}
"""tanh, sigmoid and relu; lrelu (slope 0.01); swish (a σ(a), also called SiLU); gelu (exact, with erf); elu (α 1)."""
