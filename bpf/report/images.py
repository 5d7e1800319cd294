"""What the best networks of a report do with test images, read from an experiment's `models/`."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from bpf import models
from bpf.data.cache import load
from bpf.errors import BpfError
from bpf.experiment import Experiment
from bpf.feed import SCALES
from bpf.losses import predict, squash_for
from bpf.network import Network, Structure
from bpf.plan import Row
from bpf.spec import RunSpec

if TYPE_CHECKING:
    from torch import Tensor

SHOWN = 8

Pixels = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Reconstructions:
    """The first test images, each [H, W] or [H, W, 3] in 0..1, and what each rule makes of them.

    `missing` says of the other rules why there is nothing to see.
    """

    originals: list[Pixels]
    by_rule: dict[str, list[Pixels]]
    missing: list[str]


def parameter_count(experiment: Experiment, row: Row) -> int | None:
    """How many numbers the network of a cell has learned; None where its model is not there or cannot be read."""
    from safetensors import SafetensorError, safe_open

    path = models.path_of(experiment.files / "models", row.rule, row.key)
    try:
        with safe_open(path, "pt") as file:
            learned = [n for n in file.keys() if n.partition(".")[0] in ("weight", "bias", "scale", "shift")]  # noqa: SIM118
            shapes = (tuple[int, ...](file.get_slice(name).get_shape()) for name in learned)
            return sum(math.prod(shape) for shape in shapes)
    except (OSError, SafetensorError):
        return None


def reconstruct(experiment: Experiment, best: Iterable[Row]) -> Reconstructions:
    """What the best network of each rule makes of the first test images. Raises BpfError without the data set."""
    import torch

    data = load(experiment.grid.dataset, experiment.data_dir, experiment.grid.image_size)
    images = data.test_images[:SHOWN]
    by_rule: dict[str, list[Pixels]] = {}
    missing = []
    for row in best:
        try:
            tensors, told = _read(experiment, row)
        except (OSError, BpfError) as error:
            missing.append(f"{row.rule}: {error}")
            continue
        spec = RunSpec.model_validate_json(told["spec"])
        offset, factor = SCALES[spec.scaler]
        inputs = images.flatten(1).to(torch.float32).sub_(offset).mul_(factor)
        logits = _network(spec, tensors).logits(inputs[None])[0]
        squash = "sigmoid" if spec.resolved_loss == "bce" else squash_for(spec.problem_type, spec.scaler)
        pixels = predict(logits, squash).div_(factor).add_(offset).view(images.shape)
        by_rule[row.rule] = [_shown(image) for image in pixels]
    return Reconstructions([_shown(image) for image in images], by_rule, missing)


def _read(experiment: Experiment, row: Row) -> tuple[dict[str, "Tensor"], Mapping[str, str]]:
    """The tensors of a cell's network and what is told with them. Raises OSError or BpfError."""
    from safetensors import SafetensorError, safe_open

    from bpf.errors import RunError

    path = models.path_of(experiment.files / "models", row.rule, row.key)
    if not path.is_file():
        raise RunError(f"its network {path} is not there")
    try:
        with safe_open(path, "pt") as file:
            told: dict[str, str] = file.metadata() or {}
            if told.get("format") != models.FORMAT:
                raise RunError(f"its network {path} is not of the format {models.FORMAT}")
            return {name: file.get_tensor(name) for name in file.keys()}, told  # noqa: SIM118
    except SafetensorError as error:
        raise RunError(f"its network {path} cannot be read: {error}") from error


def _network(spec: RunSpec, tensors: Mapping[str, "Tensor"]) -> Network:
    """A network of one run, for use: without feedback matrices."""
    first, last = tensors["weight.0"], tensors[f"weight.{len(spec.widths)}"]
    structure = Structure(
        first.shape[1], spec.widths, last.shape[0], spec.activation, spec.batch_norm, spec.use_bias, spec.init
    )
    stacked = {name: tensor[None] for name, tensor in tensors.items()}
    running = {name: tensor for name, tensor in stacked.items() if name.startswith(("mean.", "variance."))}
    return Network(structure, {name: t for name, t in stacked.items() if name not in running}, running)


def _shown(image: Any) -> Pixels:
    """[C, H, W] in 0..255 as [H, W] or [H, W, 3] in 0..1."""
    pixels: Pixels = (image.double() / 255).clamp(0, 1).permute(1, 2, 0).numpy()
    return pixels[..., 0] if pixels.shape[2] == 1 else pixels
