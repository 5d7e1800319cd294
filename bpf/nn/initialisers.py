"""Initial forward weights and feedback matrices by their published names, of one run and stacked.

An initialiser draws one run's matrix: `(rows, columns, generator, dtype) -> [rows, columns]`.
"""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from bpf.nn.randomness import generator

K = TypeVar("K")

Draw = Callable[[int, int, torch.Generator, torch.dtype], Tensor]
CPU = torch.device("cpu")
LARGE = 2**21
"""Numbers of a matrix from which it is factored on the device where it goes: on a GPU minutes become seconds."""


def uniform(bound: float, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """U(-bound, bound)."""
    return torch.rand(shape, generator=generator, dtype=dtype).mul_(2 * bound).sub_(bound)


def orthogonal(
    rows: int, columns: int, generator: torch.Generator, dtype: torch.dtype, device: torch.device = CPU
) -> Tensor:
    """A (semi-)orthogonal matrix with gain 1 (Saxe et al. 2014): Q of a normal one, with the signs that make it unique.

    As torch's `orthogonal_`. A large one is factored on `device`, and differs there from a CPU's by rounding.
    """
    drawn = torch.empty(rows, columns, dtype=dtype).normal_(generator=generator)
    q, r = torch.linalg.qr((drawn if rows >= columns else drawn.mT).to(device if drawn.numel() >= LARGE else CPU))
    q.mul_(r.diagonal().sign())
    found: Tensor = q if rows >= columns else q.mT
    return found.contiguous()


def _lecun(units: int, targets: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    return torch.randn(units, targets, generator=generator, dtype=dtype) / math.sqrt(units)


def _frenkel(units: int, targets: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    return uniform(math.sqrt(6 / units), (units, targets), generator, dtype)


def _nokland(units: int, targets: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    return uniform(1 / math.sqrt(units), (units, targets), generator, dtype)


def _principled(units: int, targets: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    return torch.randn(units, targets, generator=generator, dtype=dtype) / math.sqrt(units * targets)


FEEDBACK: dict[str, Draw] = {
    "ortho": orthogonal,
    "lecun": _lecun,
    "frenkel": _frenkel,
    "nokland": _nokland,
    "principled": _principled,
}
"""Feedback matrices F [units, targets]: ortho (gain 1); lecun N(0, 1/units); frenkel U(±√(6/units)) (Frenkel
et al. 2021, their code); nokland U(±1/√units) (Nøkland 2016, his code); principled N(0, 1)/√(units · targets)."""


def forward_weight(
    name: str,
    fan_out: int,
    fan_in: int,
    generator: torch.Generator,
    dtype: torch.dtype,
    device: torch.device = CPU,
) -> Tensor:
    """One run's weight [fan_out, fan_in]: orthogonal (gain 1); torch U(±1/√fan_in); zeros; he_uniform U(±√(6/fan_in))
    (He et al. 2015); xavier U(±√(6/(fan_in + fan_out))) (Glorot & Bengio 2010); akrout N(0, 1/(fan_in + fan_out))
    (Akrout et al. 2019, their code)."""
    shape = fan_out, fan_in
    if name == "orthogonal":
        return orthogonal(fan_out, fan_in, generator, dtype, device)
    if name == "torch":
        return uniform(1 / math.sqrt(fan_in), shape, generator, dtype)
    if name == "he_uniform":
        return uniform(math.sqrt(6 / fan_in), shape, generator, dtype)
    if name == "xavier":
        return uniform(math.sqrt(6 / (fan_in + fan_out)), shape, generator, dtype)
    if name == "akrout":
        return torch.randn(shape, generator=generator, dtype=dtype) / math.sqrt(fan_in + fan_out)
    return torch.zeros(shape, dtype=dtype)


def forward_bias(name: str, units: int, fan_in: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """One run's bias [1, units]: as the weights with torch and akrout, zero with the others."""
    if name == "torch":
        return uniform(1 / math.sqrt(fan_in), (1, units), generator, dtype)
    if name == "akrout":
        return torch.randn(1, units, generator=generator, dtype=dtype) / math.sqrt(fan_in + units)
    return torch.zeros(1, units, dtype=dtype)


def random_feedback(
    runs: Sequence[tuple[int, str]], purpose: str, units: int, targets: int, dtype: torch.dtype
) -> Tensor:
    """A fixed random matrix [runs, units, targets], one (seed, initialiser name) per run."""
    return _stacked(runs, lambda run: FEEDBACK[run[1]](units, targets, generator(run[0], purpose), dtype))


def random_weights(
    init: str, seeds: Sequence[int], purpose: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Forward weights [runs, *shape], drawn once for each seed; what `aligned` does not determine is orthogonal."""
    name = "orthogonal" if init == "aligned" else init
    return _stacked(
        seeds, lambda seed: forward_weight(name, *shape, generator(seed, purpose), dtype, device).to(device)
    )


def random_biases(
    init: str, seeds: Sequence[int], purpose: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Biases [runs, 1, units] of weights of that shape."""
    return _stacked(seeds, lambda seed: forward_bias(init, *shape, generator(seed, purpose), dtype).to(device))


def _stacked(runs: Sequence[K], draw: Callable[[K], Tensor]) -> Tensor:
    """What is drawn once for each distinct key, stacked along the run axis."""
    drawn = {run: draw(run) for run in dict.fromkeys(runs)}
    return torch.stack([drawn[run] for run in runs])
