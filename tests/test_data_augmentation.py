"""Augmentation against a per-pixel reference."""

import math

import numpy as np
import pytest
import torch

from bpf.data.augmentation import DRAWS, augment

OFF = {"brightness": 0.0, "rotation": 0.0, "zoom": 0.0, "translation": 0.0}
FULL = {"brightness": 0.3, "rotation": 40.0, "zoom": 0.4, "translation": 0.25}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(runs: int, batch: int = 3) -> torch.Tensor:
    return torch.rand(runs, batch, 2, 6, 9, generator=generator(5)) * 255


def numbers(runs: int, batch: int) -> torch.Tensor:
    return torch.rand(runs, batch, DRAWS, generator=generator(1))


def reference(image: np.ndarray, draws: np.ndarray, brightness, rotation, zoom, translation) -> np.ndarray:
    """Where each output pixel comes from, in pixels: undo the shift, the turn, the magnification."""
    height, width = image.shape[1:]
    light, angle, scale, right, down = draws
    angle, scale = math.radians(angle * rotation), 1 + scale * zoom
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1)))
    result = np.zeros_like(image)
    for row in range(height):
        for column in range(width):
            x = column - (width - 1) / 2 - right * translation * width
            y = row - (height - 1) / 2 - down * translation * height
            # y points down, so an anticlockwise turn is undone by [[cos, -sin], [sin, cos]]
            source_x = (math.cos(angle) * x - math.sin(angle) * y) / scale + (width - 1) / 2
            source_y = (math.sin(angle) * x + math.cos(angle) * y) / scale + (height - 1) / 2
            left, top = math.floor(source_x), math.floor(source_y)
            if not (-1 <= left < width and -1 <= top < height):
                continue
            dx, dy = source_x - left, source_y - top
            corner = padded[:, top + 1 : top + 3, left + 1 : left + 3]
            weights = np.outer([1 - dy, dy], [1 - dx, dx])
            result[:, row, column] = (corner * weights).sum((1, 2))
    return np.clip(result * (1 + light * brightness), 0, 255)


@pytest.mark.parametrize(
    "magnitudes",
    [
        FULL,
        OFF | {"brightness": 1.0},
        OFF | {"rotation": 180.0},
        OFF | {"zoom": 0.9},
        OFF | {"translation": 0.5},
    ],
)
def test_images_move_as_the_reference_says(magnitudes):
    images = pictures(2)
    drawn = numbers(2, 3)
    got = augment(images, **magnitudes, drawn=drawn)
    for run in range(2):
        draws = (drawn[run] * 2 - 1).double().numpy()
        for index in range(3):
            want = reference(images[run, index].double().numpy(), draws[index], **magnitudes)
            np.testing.assert_allclose(got[run, index].numpy(), want, atol=2e-2)


def test_a_run_gets_the_same_numbers_alone_and_stacked():
    images = pictures(3)
    drawn = numbers(3, 3)
    stacked = augment(images, **FULL, drawn=drawn)
    for run in range(3):
        alone = augment(images[run : run + 1], **FULL, drawn=drawn[run : run + 1])
        assert torch.equal(alone[0], stacked[run])
    assert not torch.equal(stacked[0], augment(images[:1], **FULL, drawn=drawn[1:2])[0])


def test_one_magnitude_does_not_change_the_draws_of_another():
    images = torch.full((1, 4, 1, 5, 5), 100.0)
    bright = augment(images, **OFF | {"brightness": 0.5}, drawn=numbers(1, 4))
    both = augment(images, **OFF | {"brightness": 0.5, "zoom": 0.1}, drawn=numbers(1, 4))
    torch.testing.assert_close(bright[..., 2, 2], both[..., 2, 2])
    assert len(bright[0, :, 0, 0, 0].unique()) == 4


def test_values_stay_in_range():
    white = torch.full((1, 50, 1, 4, 4), 255.0)
    got = augment(white, **OFF | {"brightness": 0.5}, drawn=numbers(1, 50))
    assert got.max() == 255
    assert 127 <= got.min() < 200


def test_without_magnitudes_the_input_comes_back():
    images = pictures(1)
    assert augment(images, **OFF, drawn=numbers(1, 3)) is images


def test_there_are_numbers_for_each_image():
    with pytest.raises(ValueError, match=r"^random numbers of the shape \[1, 3, 5\] for 2 runs of 3 images$"):
        augment(pictures(2), **FULL, drawn=numbers(1, 3))
