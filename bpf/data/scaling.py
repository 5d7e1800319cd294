"""What becomes of pixel values before the network sees them."""

import torch
from torch import Tensor

from bpf.errors import UsageError
from bpf.spec.values import channel_numbers

SCALES = {"standard": (127.5, 1 / 127.5), "zero_one": (0.0, 1 / 255), "identity": (0.0, 1.0)}


def scaling(scaler: str, shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor | float, Tensor | float]:
    """Offset and factor, so that (pixels - offset) × factor is what a network gets; numbers, or tensors [pixels].

    `shape` is that of an image, [C, H, W]. Raises UsageError for means of another number of channels.
    """
    if scaler in SCALES:
        return SCALES[scaler]
    check_channels(scaler, shape[0])
    means, deviations = (torch.tensor(numbers, dtype=torch.float64) for numbers in channel_numbers(scaler))
    ends = means, 1 / deviations
    offset, factor = (end.expand(shape[0]).repeat_interleave(shape[1] * shape[2]).to(dtype) for end in ends)
    return offset, factor


def check_channels(scaler: str, channels: int) -> None:
    """Raise UsageError for a scaler that is for images of another number of channels."""
    if scaler not in SCALES and (given := len(channel_numbers(scaler)[0])) not in (1, channels):
        raise UsageError(f"scaler {scaler}: it is for {given} channels, and these images have {channels}.")
