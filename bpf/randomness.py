"""Randomness by key: every random number comes from a generator seeded by (seed, purpose, epoch).

A run's numbers therefore do not depend on what it is stacked with, and a resume needs no saved state.
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
