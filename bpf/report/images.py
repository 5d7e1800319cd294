"""What the best networks of a report do with test images, read from an experiment's `models/`."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from bpf.data.cache import load
from bpf.data.scaling import scaling
from bpf.errors import UsageError
from bpf.experiment.directory import Experiment
from bpf.experiment.places import model_path
from bpf.nn.losses import predict, squash_for
from bpf.results import models
from bpf.study.cells import Row

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


@torch.no_grad()
def reconstruct(experiment: Experiment, best: Iterable[Row]) -> Reconstructions:
    """What the best network of each rule makes of the first test images. Raises BpfError without the data set."""
    data = load(experiment.grid.dataset, experiment.data_dir, experiment.grid.image_size)
    images = data.test_images[:SHOWN]
    by_rule: dict[str, list[Pixels]] = {}
    missing = []
    for row in best:
        try:
            model = models.read(_path(experiment, row))
        except UsageError as error:
            missing.append(f"{row.rule}: {error}")
            continue
        spec = model.spec
        squash = "sigmoid" if spec.resolved_loss == "bce" else squash_for(spec.problem_type, spec.scaler)
        output = predict(model.module()(images), squash)
        offset, factor = scaling(spec.scaler, model.shape, output.dtype)
        pixels = output.div(factor).add(offset).view(images.shape)
        by_rule[row.rule] = [_shown(image) for image in pixels]
    return Reconstructions([_shown(image) for image in images], by_rule, missing)


def _path(experiment: Experiment, row: Row) -> Path:
    return model_path(experiment.files / "models", row.rule, row.key)


def _shown(image: torch.Tensor) -> Pixels:
    """[C, H, W] in 0..255 as [H, W] or [H, W, 3] in 0..1."""
    pixels: Pixels = (image.double() / 255).clamp(0, 1).permute(1, 2, 0).numpy()
    return pixels[..., 0] if pixels.shape[2] == 1 else pixels
