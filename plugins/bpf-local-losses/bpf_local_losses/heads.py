"""What hidden layers are compared with the targets through, and the gradients of both losses.

A classifier M_k, the parameters `pred-weight.k` [runs, targets, units] and `pred-bias.k` [runs, 1, targets], and a map
R_k, `sim.k` [runs, units, units]. Both see h_k before dropout.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bpf.algorithms import Layer, Network, Step, Trace, random_feedback

EPSILON = 1e-8
"""Added to a row's length before it divides, as in the authors' code."""


def add_classifier(network: Network, layer: Layer, runs: Sequence[tuple[int, str]], init: str) -> None:
    """A linear layer with torch's initialisation, whose weights are 0 where `init` is `zero`."""
    weight, bias = f"pred-weight.{layer.index}", f"pred-bias.{layer.index}"
    drawn = _torch_uniform(layer, runs, weight, network.structure.targets)
    network.add_parameter(weight, (torch.zeros_like(drawn) if init == "zero" else drawn).mT)
    network.add_parameter(bias, _torch_uniform(layer, runs, bias, network.structure.targets)[:, :1])


def add_map(network: Network, layer: Layer, runs: Sequence[tuple[int, str]]) -> None:
    """A linear layer without bias, as wide as `layer`, with torch's initialisation."""
    name = f"sim.{layer.index}"
    network.add_parameter(name, _torch_uniform(layer, runs, name, layer.units).mT)


def prediction_error(step: Step, trace: Trace, share: float = 1.0) -> Tensor:
    """Write the gradients of M for `share` times the output loss of `h M^T + c`, and return that of h."""
    parameters, gradients = step.network.parameters, step.network.gradients
    weight, bias = f"pred-weight.{trace.layer.index}", f"pred-bias.{trace.layer.index}"
    predicted = torch.baddbmm(parameters[bias], trace.output, parameters[weight].mT)
    signal = step.loss(predicted, step.target)[1].mul_(share)
    torch.bmm(signal.mT, trace.output, out=gradients[weight])
    torch.sum(signal, 1, keepdim=True, out=gradients[bias])
    return torch.bmm(signal, parameters[weight])


def similarity_error(step: Step, trace: Trace, wanted: Tensor, share: float = 1.0) -> Tensor:
    """Write the gradient of R for `share` times the mean of `(S(h R^T) - wanted)²`, and return that of h.

    `wanted` is [runs, batch, batch], and the mean is over these pairs.
    """
    name = f"sim.{trace.layer.index}"
    weight = step.network.parameters[name]
    rows, lengths = _directions(torch.bmm(trace.output, weight.mT))
    difference = torch.baddbmm(wanted, rows, rows.mT, beta=-1)
    error = torch.bmm(difference, rows).mul_(4 * share / rows.shape[1] ** 2)
    # Through the division by the length. Centring leaves it as it is: rows are centred, and so are sums of them.
    along = torch.linalg.vecdot(rows, error).unsqueeze(-1).mul_(1 + EPSILON / lengths)
    error.addcmul_(rows, along, value=-1).div_(lengths + EPSILON)
    torch.bmm(error.mT, trace.output, out=step.network.gradients[name])
    return torch.bmm(error, weight)


def similarities(x: Tensor) -> Tensor:
    """S(x) [runs, batch, batch]: the cosines between the rows of x [runs, batch, features], each less its mean.

    The authors clamp them to [-1, 1], which they exceed by rounding only.
    """
    rows, _ = _directions(x)
    return torch.bmm(rows, rows.mT)


def _directions(x: Tensor) -> tuple[Tensor, Tensor]:
    """Centred rows by their lengths [runs, batch, 1]. One of length 0 has none: its length is infinite, and it learns
    nothing, where the authors' derivative is not a number."""
    centred = x - x.mean(-1, keepdim=True)
    lengths = torch.linalg.vector_norm(centred, dim=-1, keepdim=True)
    lengths.masked_fill_(lengths == 0, torch.inf)
    return centred.div_(lengths + EPSILON), lengths


def _torch_uniform(layer: Layer, runs: Sequence[tuple[int, str]], name: str, columns: int) -> Tensor:
    """U(±1/√units), [runs, units, columns], from each run's seed: torch's initialisation of a linear layer."""
    seeds = [(seed, "nokland") for seed, _ in runs]
    return random_feedback(seeds, name, layer.units, columns, layer.weight.dtype)
