"""Random numbers by counter: Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

A stream has a key, from (seed, purpose). Its block number i in step s of epoch e is the cipher of the counter
(i + 1, s, e, 0): four 64-bit numbers, used as eight of 32 bits, the lower half first. So nothing is remembered, and
NumPy on a CPU, torch's operations and the kernels in `kernels.py` give the same bits.
"""

import hashlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = 0xD2E7470EE14C6C93, 0xCA5A826395121157
WEYL = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B
WORDS = 8
"""32-bit numbers of one block."""
_LOW = 0xFFFFFFFF


def key(seed: int, purpose: str) -> tuple[int, int]:
    """The key of a stream: 128 bits of SHA-256."""
    found = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return int.from_bytes(found[:8], "big"), int.from_bytes(found[8:16], "big")


def key_tensor(keys: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """Keys as the bits of int64, [streams, 2]."""
    return torch.from_numpy(np.array(keys, np.uint64).reshape(-1, 2).view(np.int64)).to(device)


class HostStreams:
    """Streams of a processor, drawn by NumPy, whose Philox is this one."""

    def __init__(self, keys: Sequence[tuple[int, int]]) -> None:
        self._bits = [np.random.Philox(key=np.array(one, np.uint64)) for one in keys]
        self._states: list[Any] = [bits.state for bits in self._bits]

    def words(self, epoch: int, step: int, count: int) -> Tensor:
        """The first `count` numbers of that step, as the bits of int32, [streams, count]."""
        drawn = np.empty((len(self._bits), -(-count // 2)), "<u8")
        for row, bits, state in zip(drawn, self._bits, self._states, strict=True):
            state["state"]["counter"][:] = 0, step, epoch, 0
            bits.state = state
            row[:] = bits.random_raw(len(row))
        return torch.from_numpy(drawn.view("<i4")[:, :count])


def words(keys: Tensor, clock: Tensor, count: int) -> Tensor:
    """As `HostStreams.words` for keys [streams, 2] and a clock (epoch, step) of int64, in operations of torch."""
    blocks = torch.arange(1, -(-count // WORDS) + 1, device=keys.device).expand(len(keys), -1)
    a, b, c, d = blocks, clock[1].expand_as(blocks), clock[0].expand_as(blocks), torch.zeros_like(blocks)
    first, second = keys[:, :1], keys[:, 1:]
    for _ in range(ROUNDS):
        high_a, low_a = _multiply(a, MULTIPLIERS[0])
        high_c, low_c = _multiply(c, MULTIPLIERS[1])
        a, b, c, d = high_c ^ b ^ first, low_c, high_a ^ d ^ second, low_a
        first, second = first + _signed(WEYL[0]), second + _signed(WEYL[1])
    four = torch.stack([a, b, c, d], -1).view(torch.int32)
    if sys.byteorder == "big":
        four = four.view(*four.shape[:-1], 4, 2).flip(-1)
    return four.flatten(1)[:, :count]


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """The upper and the lower 64 bits of a product; additions and products of int64 wrap around."""
    a_low, a_high, b_low, b_high = a & _LOW, (a >> 32) & _LOW, b & _LOW, b >> 32
    low, cross, across = a_low * b_low, a_high * b_low, a_low * b_high
    carry = ((low >> 32) & _LOW) + (cross & _LOW) + (across & _LOW)
    high = a_high * b_high + ((cross >> 32) & _LOW) + ((across >> 32) & _LOW) + ((carry >> 32) & _LOW)
    return high, a * _signed(b)


def _signed(number: int) -> int:
    """The int64 of the same bits."""
    return number - 2**64 if number >= 2**63 else number
