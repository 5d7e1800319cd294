"""Kernels for CUDA, written in Triton: one launch for all runs where torch's operations need many.

Each computes what `optim.py` and `randomness.py` say in torch's operations. Only they call them, and only where
`usable` says so; nothing else imports this module, as Triton is not on every system.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bpf.nn import philox

BLOCK = 1024
_ROUNDS = tl.constexpr(philox.ROUNDS)
_MULTIPLY_A, _MULTIPLY_C = tl.constexpr(philox.MULTIPLIERS[0]), tl.constexpr(philox.MULTIPLIERS[1])
_WEYL_A, _WEYL_B = tl.constexpr(philox.WEYL[0]), tl.constexpr(philox.WEYL[1])
_WORDS = tl.constexpr(philox.WORDS)


@triton.jit
def _adam(p, g, m, v, rates, decays, constants, corrections, count, DECOUPLED: tl.constexpr, SIZE: tl.constexpr):
    run = tl.program_id(1)
    element = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    valid = element < count
    at = run.to(tl.int64) * count + element
    rate, decay = tl.load(rates + run), tl.load(decays + run)
    weight, gradient = tl.load(p + at, valid), tl.load(g + at, valid)
    if DECOUPLED:
        weight -= rate * decay * weight
    else:
        gradient += decay * weight
    mean = tl.load(constants) * tl.load(m + at, valid) + tl.load(constants + 1) * gradient
    square = tl.load(constants + 2) * tl.load(v + at, valid) + tl.load(constants + 3) * gradient * gradient
    tl.store(m + at, mean, valid)
    tl.store(v + at, square, valid)
    first = tl.load(corrections).to(weight.dtype)
    second = tl.sqrt(tl.load(corrections + 1)).to(weight.dtype)
    size = tl.sqrt(square) / second + tl.load(constants + 4)
    tl.store(p + at, weight - rate / first * mean / size, valid)


@triton.jit
def _rmsprop(p, g, v, rates, decays, constants, count, SIZE: tl.constexpr):
    run = tl.program_id(1)
    element = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    valid = element < count
    at = run.to(tl.int64) * count + element
    weight = tl.load(p + at, valid)
    gradient = tl.load(g + at, valid) + tl.load(decays + run) * weight
    square = tl.load(constants) * tl.load(v + at, valid) + tl.load(constants + 1) * gradient * gradient
    tl.store(v + at, square, valid)
    tl.store(p + at, weight - tl.load(rates + run) * gradient / (tl.sqrt(square) + tl.load(constants + 2)), valid)


@triton.jit
def _sgd(p, g, b, rates, decays, constants, count, REMEMBERS: tl.constexpr, NESTEROV: tl.constexpr, SIZE: tl.constexpr):
    run = tl.program_id(1)
    element = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    valid = element < count
    at = run.to(tl.int64) * count + element
    weight = tl.load(p + at, valid)
    gradient = tl.load(g + at, valid) + tl.load(decays + run) * weight
    if REMEMBERS:
        momentum = tl.load(constants)
        memory = momentum * tl.load(b + at, valid) + gradient
        tl.store(b + at, memory, valid)
        gradient = gradient + momentum * memory if NESTEROV else memory
    tl.store(p + at, weight - tl.load(rates + run) * gradient, valid)


@triton.jit
def _cipher(keys, clock, run, block):
    """The four 64-bit numbers of blocks of a run's stream, now."""
    first, second = tl.load(keys + 2 * run).to(tl.uint64), tl.load(keys + 2 * run + 1).to(tl.uint64)
    a = (block + 1).to(tl.uint64)
    b = a * 0 + tl.load(clock + 1).to(tl.uint64)
    c = a * 0 + tl.load(clock).to(tl.uint64)
    d = a * 0
    for _ in tl.static_range(_ROUNDS):
        high_a, high_c = tl.umulhi(a, a * 0 + _MULTIPLY_A), tl.umulhi(c, a * 0 + _MULTIPLY_C)
        low_a, low_c = a * _MULTIPLY_A, c * _MULTIPLY_C
        a, b, c, d = high_c ^ b ^ first, low_c, high_a ^ d ^ second, low_a
        first += _WEYL_A
        second += _WEYL_B
    return a, b, c, d


@triton.jit
def _store_kept(out, at, place, count, both, threshold, scale):
    low, high = both.to(tl.int32), (both >> 32).to(tl.int32)
    tl.store(out + at + place, tl.where(low >= threshold, scale, scale * 0), place < count)
    tl.store(out + at + place + 1, tl.where(high >= threshold, scale, scale * 0), place + 1 < count)


@triton.jit
def _kept(out, keys, clock, thresholds, scales, count, SIZE: tl.constexpr):
    run = tl.program_id(1)
    block = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    threshold, scale = tl.load(thresholds + run), tl.load(scales + run)
    a, b, c, d = _cipher(keys, clock, run, block)
    at, place = run.to(tl.int64) * count, block * _WORDS
    _store_kept(out, at, place, count, a, threshold, scale)
    _store_kept(out, at, place + 2, count, b, threshold, scale)
    _store_kept(out, at, place + 4, count, c, threshold, scale)
    _store_kept(out, at, place + 6, count, d, threshold, scale)


@triton.jit
def _store_uniform(out, at, place, count, both):
    low, high = ((both & 0xFFFFFFFF) >> 8).to(tl.int32), (both >> 40).to(tl.int32)
    unit = 1.0 / 16777216.0
    tl.store(out + at + place, (low.to(tl.float32) * unit).to(out.dtype.element_ty), place < count)
    tl.store(out + at + place + 1, (high.to(tl.float32) * unit).to(out.dtype.element_ty), place + 1 < count)


@triton.jit
def _uniform(out, keys, clock, count, SIZE: tl.constexpr):
    run = tl.program_id(1)
    block = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    a, b, c, d = _cipher(keys, clock, run, block)
    at, place = run.to(tl.int64) * count, block * _WORDS
    _store_uniform(out, at, place, count, a)
    _store_uniform(out, at, place + 2, count, b)
    _store_uniform(out, at, place + 4, count, c)
    _store_uniform(out, at, place + 6, count, d)


def adam(
    parameter: Tensor,
    gradient: Tensor,
    memory: tuple[Tensor, ...],
    rates: Tensor,
    decays: Tensor,
    constants: Tensor,
    corrections: Tensor,
    decoupled: bool,
) -> None:
    """One step of every run's `parameter` [runs, ...] in place; `corrections` are (1 - β₁ᵗ, 1 - β₂ᵗ) in float64."""
    count = parameter[0].numel()
    _adam[_grid(count, len(parameter))](
        parameter, gradient, *memory, rates, decays, constants, corrections, count, decoupled, BLOCK
    )


def rmsprop(
    parameter: Tensor, gradient: Tensor, memory: tuple[Tensor, ...], rates: Tensor, decays: Tensor, constants: Tensor
) -> None:
    """One step of every run's `parameter` [runs, ...] in place."""
    count = parameter[0].numel()
    _rmsprop[_grid(count, len(parameter))](parameter, gradient, *memory, rates, decays, constants, count, BLOCK)


def sgd(
    parameter: Tensor,
    gradient: Tensor,
    memory: tuple[Tensor, ...],
    rates: Tensor,
    decays: Tensor,
    constants: Tensor,
    nesterov: bool,
) -> None:
    """One step of every run's `parameter` [runs, ...] in place; without momentum there is no memory."""
    count = parameter[0].numel()
    remembered = memory[0] if memory else gradient
    _sgd[_grid(count, len(parameter))](
        parameter, gradient, remembered, rates, decays, constants, count, bool(memory), nesterov, BLOCK
    )


def kept(out: Tensor, keys: Tensor, clock: Tensor, thresholds: Tensor, scales: Tensor) -> None:
    """Fill `out` [runs, ...]: each run's scale where its number, as int32, is not below its threshold; otherwise 0."""
    count = out[0].numel()
    _kept[_grid(-(-count // philox.WORDS), len(out), 128)](out, keys, clock, thresholds, scales, count, 128)


def uniform(out: Tensor, keys: Tensor, clock: Tensor) -> None:
    """Fill `out` [runs, ...] with the upper 24 bits of each number, as a fraction of one."""
    count = out[0].numel()
    _uniform[_grid(-(-count // philox.WORDS), len(out), 128)](out, keys, clock, count, 128)


def usable(device: torch.device) -> bool:
    """Whether a kernel can be compiled and run there. Raises what torch raises for a device that is lost."""
    out = torch.empty(1, 8, device=device)
    zeros = torch.zeros(2, dtype=torch.int64, device=device)
    try:
        uniform(out, zeros[None], zeros)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # of a compiler that is missing, of a card that is too old: Triton's own kinds, by version
        return False
    return bool((out < 1).all())


def _grid(count: int, runs: int, size: int = BLOCK) -> tuple[int, int]:
    return triton.cdiv(count, size), runs
