"""Checkpoints of cohorts: written atomically, read without running code."""

import pickle
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
    try:
        if not zipfile.is_zipfile(path):  # whatever it is, torch.save did not write it whole
            raise _unusable(path, "is damaged and cannot be read")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = "is refused: it holds more than tensors and plain values, and loading it could run code"
        raise _unusable(path, reason) from error
    except (RuntimeError, EOFError, zipfile.BadZipFile, ValueError, KeyError, OSError) as error:
        raise _unusable(path, "is damaged and cannot be read") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise _unusable(path, "is of a format that this bpf does not read")
    if content.get("cohort") != cohort:
        raise _unusable(path, "belongs to other cells")
    if not all(
        isinstance(content.get(name), kind) for name, kind in (("keys", list), ("specs", list), ("state", dict))
    ):
        raise _unusable(path, "is damaged: parts of it are missing")
    return content


@contextmanager
def fitting(path: Path) -> Iterator[None]:
    """Raise RunError if the content of a checkpoint turns out not to be what its cells need."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise _unusable(path, "does not fit its cells") from error


def _unusable(path: Path, reason: str) -> RunError:
    return RunError(
        f"The checkpoint {path} {reason}. Move it away, and `bpf resume` trains its cells from their start."
    )
