"""What a device brings along."""

import importlib
import importlib.util
from functools import cache
from types import ModuleType

import torch


@cache
def kernels_on(device: torch.device) -> ModuleType | None:
    """`bpf.nn.kernels` on a CUDA device for which Triton can compile; elsewhere torch's operations do."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    kernels = importlib.import_module("bpf.nn.kernels")
    return kernels if kernels.usable(device) else None
