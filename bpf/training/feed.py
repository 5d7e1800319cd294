"""Batches from the resident data: one index-select and one scale per batch, on the device."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bpf.data.augmentation import CROP_DRAWS, DRAWS, augment, crop_and_flip
from bpf.data.cache import Data
from bpf.data.scaling import scaling
from bpf.data.subsets import subset
from bpf.nn.randomness import Draws
from bpf.spec.run import RunSpec


@dataclass(frozen=True)
class Part:
    """Examples of one kind: where their images and labels lie, and which of them belong."""

    images: Tensor
    labels: Tensor
    index: Tensor

    def __len__(self) -> int:
        return len(self.index)


class Feed:
    """Scaled inputs and targets for the runs of a cohort, which share the subset of the data.

    `inputs` and `targets` are the network's widths; `train`, `val` and `test` are the parts. Images stay uint8 on
    the device, [examples, pixels]; nothing but the batch in use is ever floating point.
    """

    def __init__(self, data: Data, spec: RunSpec, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.device = device
        self._spec, self._dtype, self._shape = spec, dtype, data.shape
        self._reconstructs = spec.problem_type == "reconstruction"
        self.inputs = data.shape[0] * data.shape[1] * data.shape[2]
        self.targets = self.inputs if self._reconstructs else len(data.classes)
        self._one_hot = torch.eye(len(data.classes), dtype=dtype, device=device)
        chosen = subset(
            data.train_labels.cpu().numpy(),
            examples_frac=spec.examples_frac,
            val_frac=spec.val_frac,
            skew_type=spec.skew_type,
            imbalance_factor=spec.imbalance_factor or 1.0,
            data_seed=spec.data_seed,
        )
        images, labels = data.train_images.flatten(1).to(device), data.train_labels.to(device)
        self.train = Part(images, labels, torch.from_numpy(chosen.train).to(device))
        self.val = Part(images, labels, torch.from_numpy(chosen.val).to(device))
        everything = torch.arange(len(data.test_labels), device=device)
        self.test = Part(data.test_images.flatten(1).to(device), data.test_labels.to(device), everything)
        scale = scaling(spec.scaler, data.shape, dtype)
        self._offset, self._factor = (end.to(device) if isinstance(end, Tensor) else end for end in scale)
        self._crops = bool(spec.crop or spec.flip)
        self._augments = any((spec.brightness, spec.rotation, spec.zoom, spec.translation))

    @property
    def classifies(self) -> bool:
        return not self._reconstructs

    def batch(
        self, part: Part, rows: Tensor, draws: Draws | None = None, which: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs [runs, batch, inputs], targets [runs, batch, targets] and labels [runs, batch].

        `rows` [seeds, batch] count among the part's images, such as those of its index. With `draws`, whose streams
        are those of the seeds, the images are augmented where the spec asks for it. `which` [runs] says whose rows
        each run gets, where they are not its own.
        """
        flat = rows.reshape(-1)
        pixels = part.images.index_select(0, flat).view(*rows.shape, -1).to(self._dtype)
        if draws is not None and (self._crops or self._augments):
            pixels = self._augmented(pixels.view(*rows.shape, *self._shape), draws).flatten(2)
        inputs = pixels.sub_(self._offset).mul_(self._factor)
        labels = part.labels.index_select(0, flat).view(rows.shape)
        if which is not None:
            inputs, labels = inputs.index_select(0, which), labels.index_select(0, which)
        target = inputs if self._reconstructs else self._one_hot[labels]
        return inputs, target, labels

    def _augmented(self, images: Tensor, draws: Draws) -> Tensor:
        spec, batch = self._spec, images.shape[1]
        if self._crops:
            drawn = draws.uniform("augmentation.crop", batch, CROP_DRAWS)
            images = crop_and_flip(images, crop=spec.crop, flip=spec.flip, drawn=drawn)
        if self._augments:
            images = augment(
                images,
                brightness=spec.brightness,
                rotation=spec.rotation,
                zoom=spec.zoom,
                translation=spec.translation,
                drawn=draws.uniform("augmentation", batch, DRAWS),
            )
        return images
