"""Checkpoints of cohorts: written atomically, read without running code."""

import pickle
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from bpf.errors import RunError
from bpf.files import write_atomically
from bpf.spec.run import RunSpec

FORMAT = 2
OLDER_FORMAT = 1


def save(path: Path, cohort: str, cells: Sequence[str], specs: Sequence[RunSpec], states: list[dict[str, Any]]) -> None:
    """Store what a cohort has reached: its id, for each run the name of its cell and its spec, and the `states`.

    There is one state for each part that the runs are trained in, up to the part that is trained now.
    """
    dumped = [spec.model_dump(mode="json") for spec in specs]
    content = {"format": FORMAT, "cohort": cohort, "cells": list(cells), "specs": dumped, "states": states}

    def write(file: IO[bytes]) -> None:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch's own, for what the system said
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise

    write_atomically(path, write)


def load(path: Path, cohort: str) -> dict[str, Any]:
    """The content of a checkpoint: `cells`, `specs` and `states`, on the CPU.

    Of a checkpoint of bpf 0.1, `cells` are their keys. Raises RunError for a file that is damaged, holds anything
    but tensors and plain values, is of another format or belongs to another cohort.
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
    if not isinstance(content, dict) or content.get("format") not in (FORMAT, OLDER_FORMAT):
        raise _unusable(path, "is of a format that this bpf does not read")
    if content.get("cohort") != cohort:
        raise _unusable(path, "belongs to other cells")
    with fitting(path, "is damaged: parts of it are missing"):
        if content["format"] == OLDER_FORMAT:
            executions = len(content["specs"]) // len(content["keys"])
            content["cells"] = [key for key in content["keys"] for _ in range(executions)]
            content["states"] = [content["state"]]
        found = [content[name] for name in ("cells", "specs", "states")]
        if not all(isinstance(value, list) for value in found) or len(found[0]) != len(found[1]) or not found[2]:
            raise ValueError("not lists of the right lengths")
    return content


@contextmanager
def fitting(path: Path, reason: str = "does not fit its cells") -> Iterator[None]:
    """Raise RunError if the content of a checkpoint turns out not to be what its cells need."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (LookupError, TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise _unusable(path, reason) from error


def _unusable(path: Path, reason: str) -> RunError:
    return RunError(
        f"The checkpoint {path} {reason}. Move it away, and `bpf resume` trains its cells from their start."
    )
