"""The best network of each learning rule, on disk: safetensors with the spec of its run."""

import json
import re
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

import safetensors.torch
from torch import Tensor

from bpf.files import write_atomically
from bpf.spec import RunSpec

FORMAT = "bpf-model-1"


def path_of(directory: Path, rule: str, key: str) -> Path:
    """Where the network of a cell lies in an experiment's directory of models."""
    return directory / re.sub(r"[^\w.-]", "_", rule) / f"{key}.safetensors"


def save(
    path: Path, network: dict[str, Tensor], spec: RunSpec, shape: tuple[int, ...], classes: Collection[str]
) -> None:
    """Write a network, as `Cohort.best_network` gives it, with its spec, its images' shape (C, H, W) and classes."""
    told = {"spec": spec.model_dump_json(), "shape": json.dumps(shape), "classes": json.dumps(list(classes))}
    tensors = {name: tensor.contiguous() for name, tensor in network.items()}
    content = safetensors.torch.save(tensors, {"format": FORMAT, **told})
    write_atomically(path, lambda file: file.write(content))


def others(directory: Path, rule: str, key: str) -> dict[str, Path]:
    """The networks of a rule's other cells, by the cells' keys."""
    mine = path_of(directory, rule, key)
    return {path.stem: path for path in mine.parent.glob("*.safetensors") if path != mine}


def discard(path: Path) -> None:
    with suppress(OSError):  # of no more use, and no reason to fail
        path.unlink(missing_ok=True)
