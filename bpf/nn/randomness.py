"""Randomness by key: every random number is determined by (seed, purpose, epoch, step).

So what a run is stacked with changes its numbers by rounding only, and a resume needs no saved state. What is drawn
once, or once an epoch, comes from a generator seeded by its key; what every step draws, by counter (`philox.py`).
"""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bpf.nn import philox
from bpf.nn.device import kernels_on


def generator(seed: int, purpose: str, epoch: int = 0) -> torch.Generator:
    """A generator of the CPU whose stream is determined by its arguments."""
    key = hashlib.sha256(f"{seed}/{purpose}/{epoch}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1)


def orders(seeds: Sequence[int], size: int, epoch: int) -> Tensor:
    """A permutation of `size` examples for each seed in one epoch, int64 [seeds, size]."""
    return torch.stack([torch.randperm(size, generator=generator(seed, "order", epoch)) for seed in seeds])


class Clock:
    """The epoch and the step in it, both from 0: on the host, and on the device for what is replayed there.

    `now` is (epoch, step), int64 [2], in memory that stays where it is; `step_index` is the step's, [1]. What is
    replayed moves `now` only: on CUDA the host's numbers are those of the last `begin`.
    """

    def __init__(self, device: torch.device) -> None:
        self.epoch = self.step = 0
        self.now = torch.zeros(2, dtype=torch.int64, device=device)
        self.step_index = self.now[1:]

    def begin(self, epoch: int) -> None:
        self.epoch, self.step = epoch, 0
        self.now.copy_(torch.tensor([epoch, 0]))

    def tick(self) -> None:
        self.step += 1
        self.step_index.add_(1)


class Draws:
    """Random numbers for stacked runs, one stream for each seed and purpose. Runs of one seed get the same."""

    def __init__(self, seeds: Sequence[int], clock: Clock, dtype: torch.dtype) -> None:
        self._seeds, self._clock = list(seeds), clock
        self._device, self._dtype = clock.now.device, dtype
        self._on_host = self._device.type != "cuda"
        self._kernels = kernels_on(self._device)
        self._distinct = list(dict.fromkeys(seeds))
        which = [self._distinct.index(seed) for seed in seeds]
        self._which = None if len(self._distinct) == len(which) else torch.tensor(which, device=self._device)
        self._streams: dict[str, philox.HostStreams] = {}
        self._keys: dict[str, Tensor] = {}

    @property
    def now(self) -> Tensor:
        """(epoch, step), int64 [2]."""
        return self._clock.now

    def uniform(self, purpose: str, *shape: int) -> Tensor:
        """Numbers in [0, 1) of this step, [runs, *shape]; they have 24 bits in every type."""
        whole = len(self._seeds), *shape
        if self._kernels is not None:
            out = torch.empty(whole, dtype=self._dtype, device=self._device)
            self._kernels.uniform(out, self._key(purpose), self._clock.now)
            return out
        words = self._words(purpose, torch.Size(shape).numel()).reshape(whole)
        return (words >> 8).bitwise_and_(2**24 - 1).to(self._dtype).mul_(2**-24)

    def normal(self, purpose: str, *shape: int) -> Tensor:
        """Standard normal numbers of this step, [runs, *shape], by Box and Muller (1958)."""
        count = torch.Size(shape).numel()
        radius, angle = self.uniform(purpose, 2, -(-count // 2)).unbind(1)
        radius = torch.log1p(-radius).mul_(-2).sqrt_()
        both = torch.stack([radius * torch.cos(2 * math.pi * angle), radius * torch.sin(2 * math.pi * angle)], -1)
        return both.flatten(1)[:, :count].reshape(-1, *shape)

    def kept(self, purpose: str, shape: tuple[int, ...], thresholds: Tensor, scales: Tensor) -> Tensor:
        """Each run's scale where its number is not below its threshold, and otherwise 0, [runs, *shape].

        Numbers and `thresholds` [runs] are int32, the numbers evenly spread over all of them; `scales` are [runs].
        """
        whole = len(self._seeds), *shape
        if self._kernels is not None:
            out = torch.empty(whole, dtype=self._dtype, device=self._device)
            self._kernels.kept(out, self._key(purpose), self._clock.now, thresholds, scales)
            return out
        words, ones = self._words(purpose, torch.Size(shape).numel()).reshape(whole), [1] * len(shape)
        return torch.ge(words, thresholds.view(-1, *ones)).mul(scales.view(-1, *ones))

    def _words(self, purpose: str, count: int) -> Tensor:
        """The bits, as int32 [runs, count]."""
        if not self._on_host:
            return philox.words(self._key(purpose), self._clock.now, count)
        if purpose not in self._streams:
            self._streams[purpose] = philox.HostStreams([philox.key(seed, purpose) for seed in self._distinct])
        words = self._streams[purpose].words(self._clock.epoch, self._clock.step, count).to(self._device)
        return words if self._which is None else words.index_select(0, self._which)

    def _key(self, purpose: str) -> Tensor:
        if purpose not in self._keys:
            keys = [philox.key(seed, purpose) for seed in self._seeds]
            self._keys[purpose] = philox.key_tensor(keys, self._device)
        return self._keys[purpose]


class Dropout:
    """Inverted dropout for stacked runs, each with its own rate."""

    def __init__(self, rates: Sequence[float], draws: Draws, device: torch.device, dtype: torch.dtype) -> None:
        self._active, self._draws = any(rates), draws
        thresholds = [min(round(rate * 2**32), 2**32 - 1) - 2**31 for rate in rates]
        self._thresholds = torch.tensor(thresholds, dtype=torch.int32, device=device)
        self._scales = torch.tensor([1 / (1 - rate) for rate in rates], dtype=dtype, device=device)

    def mask(self, layer: int | str, batch: int, units: int) -> Tensor | None:
        """Zeros with each run's rate p, otherwise 1/(1 - p), [runs, batch, units]; None when nothing drops.

        The layer is that by index whose outputs are dropped, or `inputs`.
        """
        if not self._active:
            return None
        return self._draws.kept(f"dropout.{layer}", (batch, units), self._thresholds, self._scales)
