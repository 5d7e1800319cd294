"""Randomness by key: every random number comes from a generator seeded by (seed, purpose, epoch).

So what a run is stacked with changes its numbers by rounding only, and a resume needs no saved state.
"""

import hashlib

import torch
from torch import Tensor


def generator(seed: int, purpose: str, epoch: int = 0, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose stream is determined by its arguments (and by the kind of device)."""
    key = hashlib.sha256(f"{seed}/{purpose}/{epoch}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(key[:8], "big") >> 1)


def orders(seeds: list[int], size: int, epoch: int) -> Tensor:
    """A permutation of `size` examples per run for one epoch, int64 [runs, size]."""
    drawn = {seed: torch.randperm(size, generator=generator(seed, "order", epoch)) for seed in set(seeds)}
    return torch.stack([drawn[seed] for seed in seeds])


class Dropout:
    """Inverted dropout for stacked runs, each with its own rate and its own stream of numbers for one epoch."""

    def __init__(
        self, rates: list[float], seeds: list[int], epoch: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._active = any(rates)
        self._rates = torch.tensor(rates, dtype=dtype, device=device)[:, None, None]
        self._generators = [generator(seed, "dropout", epoch, device) for seed in seeds]

    def mask(self, batch: int, units: int) -> Tensor | None:
        """Zeros with each run's rate p, otherwise 1/(1 - p), [runs, batch, units]; None when nothing drops."""
        if not self._active:
            return None
        drawn = torch.empty(len(self._generators), batch, units, dtype=self._rates.dtype, device=self._rates.device)
        for run, own in zip(drawn, self._generators, strict=True):
            run.uniform_(generator=own)
        return drawn.ge_(self._rates).div_(1 - self._rates)
