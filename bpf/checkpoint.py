"""Checkpoints of cohorts: written atomically, read without running code."""

import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bpf.errors import RunError
from bpf.files import write_atomically
from bpf.spec import RunSpec

FORMAT = 1


def save(path: Path, cohort: str, keys: Sequence[str], specs: Sequence[RunSpec], state: dict[str, Any]) -> None:
    """Store a cohort's `state` with what it is of: its id, the keys of its cells and the specs of its runs."""
    dumped = [spec.model_dump(mode="json") for spec in specs]
    content = {"format": FORMAT, "cohort": cohort, "keys": list(keys), "specs": dumped, "state": state}
    write_atomically(path, lambda file: torch.save(content, file))


def load(path: Path, cohort: str) -> dict[str, Any]:
    """The content of a checkpoint: `keys`, `specs` and `state`, on the CPU.

    Raises RunError for a file that is damaged, holds anything but tensors and plain values, is of another
    format or belongs to another cohort.
    """
    cure = f"Move {path} away and run `bpf resume` to train these cells from their start."
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise RunError(
            f"The checkpoint {path.name} is refused: it holds more than tensors and plain values, and loading it could "
            f"run code. {cure}"
        ) from error
    except (RuntimeError, EOFError, zipfile.BadZipFile, ValueError, KeyError, OSError) as error:
        raise RunError(f"The checkpoint {path.name} is damaged and cannot be read. {cure}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise RunError(f"The checkpoint {path.name} is of a format that this bpf does not read. {cure}")
    if content.get("cohort") != cohort:
        raise RunError(f"The checkpoint {path.name} belongs to other cells. {cure}")
    return content
