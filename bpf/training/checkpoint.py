"""Checkpoints of cohorts: written atomically, with a checksum, and read without running code or believing anything.

A file is a line with the format, the SHA-256 of all that follows, texts as JSON, and the bytes of the tensors that they
name. (safetensors would copy all of them twice: docs/LOG.md.) Those of bpf 0.2 and older are torch's, whose checksums
are verified and which are read with `weights_only`.
"""

import hashlib
import io
import itertools
import json
import math
import pickle
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import torch
from pydantic import TypeAdapter
from torch import Tensor
from typing_extensions import Buffer, TypedDict

from bpf.errors import RunError
from bpf.files import explaining, write_atomically
from bpf.reading import fitting as checked
from bpf.reading import json_of, open_regular
from bpf.spec.run import RunSpec
from bpf.training.record import Record

MARK = b"bpf checkpoint 3\n"
OLDER_FORMATS = (1, 2)
_DIGEST, _LENGTH = 32, 8
"""Bytes of the checksum, and of the number that says how long the texts are."""
LARGEST_TEXTS = 2**31
_KINDS = {torch.float32: "float32", torch.float64: "float64", torch.int64: "int64"}
_CELLS: TypeAdapter[list[str]] = TypeAdapter(list[str])


class _State(TypedDict):
    """What `Cohort.state` gives, but for its tensors."""

    epoch: int
    stacked: list[int]
    records: list[Record]


class _Texts(TypedDict):
    cohort: str
    cells: list[str]
    specs: list[dict[str, Any]]
    states: list[_State]


_TEXTS: TypeAdapter[_Texts] = TypeAdapter(_Texts)


class Unusable(RunError):
    """A checkpoint from which nothing can go on: damaged, of something else, or not what its cells need."""


def save(path: Path, cohort: str, cells: Sequence[str], specs: Sequence[RunSpec], states: list[dict[str, Any]]) -> None:
    """Store what a cohort has reached: its id, for each run the name of its cell and its spec, and the `states`.

    There is one state for each part that the runs are trained in, up to the part that is trained now.
    """
    dumped = [spec.model_dump(mode="json") for spec in specs]
    tensors: dict[str, Tensor] = {}
    content = {"cohort": cohort, "cells": list(cells), "specs": dumped, "states": _without_tensors(states, "", tensors)}
    index = {name: [_KINDS[tensor.dtype], *tensor.shape] for name, tensor in tensors.items()}
    texts = json.dumps(content | {"tensors": index}, separators=(",", ":")).encode()
    parts: list[Buffer] = [len(texts).to_bytes(_LENGTH, "little"), texts, *map(_bytes, tensors.values())]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    write_atomically(path, lambda file: file.writelines([MARK, digest.digest(), *parts]))


def load(path: Path, cohort: str) -> dict[str, Any]:
    """The content of a checkpoint: `cells`, `specs` and `states`, on the CPU.

    Of a checkpoint of bpf 0.1, `cells` are their keys. Raises Unusable for a file that is damaged, holds anything
    but tensors and plain values, is of another format or belongs to another cohort.
    """
    with fitting(path, "is damaged and cannot be read"), path.open("rb") as file:
        found = _load(path, file) if file.read(len(MARK)) == MARK else _load_older(path)
    with fitting(path, "is damaged: parts of it are missing or no such parts"):
        texts = checked(_TEXTS, found)  # which drops the tensors
        states = [_joined(state, raw) for state, raw in zip(texts["states"], found["states"], strict=True)]
        if len(texts["cells"]) != len(texts["specs"]) or not states:
            raise ValueError("not lists of the right lengths")
    if texts["cohort"] != cohort:
        raise Unusable(f"The checkpoint {path} belongs to other cells")
    return {"cells": texts["cells"], "specs": texts["specs"], "states": states}


def cells(path: Path) -> list[str]:
    """The names of the cells in a checkpoint of this format, unverified; empty for anything else."""
    try:
        with open_regular(path) as file:
            if file.read(len(MARK)) != MARK:
                return []
            file.seek(_DIGEST, 1)
            length = int.from_bytes(file.read(_LENGTH), "little")
            return checked(_CELLS, json_of(file.read(min(length, LARGEST_TEXTS)))["cells"])
    except (OSError, ValueError, LookupError, TypeError):
        return []


def set_aside(path: Path) -> Path:
    """Give a checkpoint another name, under which it is kept and never used."""
    for number in itertools.count(1):
        aside = path.with_name(f"{path.name}.damaged{'' if number == 1 else f'-{number}'}")
        if not aside.exists():
            break
    with explaining(aside):
        path.rename(aside)
    return aside


@contextmanager
def fitting(path: Path, reason: str = "does not fit its cells") -> Iterator[None]:
    """Raise Unusable if the content of a checkpoint turns out not to be what its cells need."""
    try:
        yield
    except (torch.OutOfMemoryError, Unusable):
        raise
    except pickle.UnpicklingError as error:
        reason = "is refused: it holds more than tensors and plain values, and loading it could run code"
        raise Unusable(f"The checkpoint {path} {reason}") from error
    except (
        *(LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError, OSError, EOFError),
        *(zipfile.BadZipFile, NotImplementedError, RecursionError),
    ) as error:
        raise Unusable(f"The checkpoint {path} {reason}") from error


def _load(path: Path, file: IO[bytes]) -> dict[str, Any]:
    digest, body = file.read(_DIGEST), memoryview(bytearray(file.read()))
    if hashlib.sha256(body).digest() != digest:
        raise Unusable(f"The checkpoint {path} is damaged: it does not agree with its checksum")
    at = _LENGTH + int.from_bytes(body[:_LENGTH], "little")
    found: dict[str, Any] = json_of(bytes(body[_LENGTH:at]))
    kinds = {name: kind for kind, name in _KINDS.items()}
    for name, (kind, *shape) in found.pop("tensors").items():
        size = math.prod(shape) * kinds[kind].itemsize
        raw = torch.frombuffer(body[at : at + size], dtype=torch.uint8) if size else torch.empty(0, dtype=torch.uint8)
        at += size
        number, *parts, last = name.split("/")
        place = found["states"][int(number)]
        for part in parts:
            place = place.setdefault(part, {})
        place[last] = raw.clone().view(kinds[kind]).reshape(shape)
    for state in found["states"]:
        state["left"] = {int(run): kept for run, kept in state.get("left", {}).items()}
    return found


def _bytes(tensor: Tensor) -> Buffer:
    array: Any = tensor.cpu().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _load_older(path: Path) -> dict[str, Any]:
    if not zipfile.is_zipfile(path):  # whatever it is, torch.save did not write it whole
        raise ValueError("no checkpoint")
    # torch reads more of an archive than its checksums cover, so it gets the verified contents in a new one.
    verified = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(verified, "w") as copy:
        if archive.testzip() is not None or any(part.compress_type for part in archive.infolist()):
            raise Unusable(f"The checkpoint {path} is damaged: it does not agree with its checksums")
        for part in archive.infolist():
            copy.writestr(part.filename, archive.read(part))
    verified.seek(0)
    content = torch.load(verified, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or content.get("format") not in OLDER_FORMATS:
        raise Unusable(f"The checkpoint {path} is of a format that this bpf does not read")
    if content["format"] == 1:
        executions = len(content["specs"]) // len(content["keys"])
        content["cells"] = [key for key in content["keys"] for _ in range(executions)]
        content["states"] = [content["state"]]
    return content


def _without_tensors(value: Any, at: str, tensors: dict[str, Tensor]) -> Any:
    """A value as JSON has it; what of it is a tensor goes into `tensors`, by the names of its place."""
    if isinstance(value, Mapping):
        pairs = ((str(name), part, f"{at}{name}/") for name, part in value.items())
        kept = {name: _without_tensors(part, below, tensors) for name, part, below in pairs}
        return {name: part for name, part in kept.items() if part is not _TENSOR}
    if isinstance(value, list):
        return [_without_tensors(part, f"{at}{number}/", tensors) for number, part in enumerate(value)]
    if isinstance(value, Tensor):
        tensors[at.rstrip("/")] = value.detach().contiguous()
        return _TENSOR
    return value


_TENSOR = object()


def _joined(state: _State, raw: Mapping[str, Any]) -> dict[str, Any]:
    """The texts of a state, checked, with its tensors, which `Cohort.load` checks."""
    tensors = {name: raw[name] for name in ("network", "optimizer", "best", "left") if name in raw}
    return {**state, "records": [asdict(record) for record in state["records"]], **tensors}
