"""Augmentation against a per-pixel reference."""

import math

import numpy as np
import pytest
import torch

from bpf.data.augmentation import CROP_DRAWS, DRAWS, augment, crop_and_flip

OFF = {"brightness": 0.0, "rotation": 0.0, "zoom": 0.0, "translation": 0.0}
FULL = {"brightness": 0.3, "rotation": 40.0, "zoom": 0.4, "translation": 0.25}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(runs: int, batch: int = 3) -> torch.Tensor:
    return torch.rand(runs, batch, 2, 6, 9, generator=generator(5)) * 255


def numbers(runs: int, batch: int, draws: int = DRAWS) -> torch.Tensor:
    return torch.rand(runs, batch, draws, generator=generator(1))


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
    with pytest.raises(ValueError, match=r"^random numbers of the shape \[2, 3, 5\] for 2 runs of 3 images$"):
        crop_and_flip(pictures(2), crop=1, flip=0.5, drawn=numbers(2, 3))


@pytest.mark.parametrize(("crop", "flip"), [(2, 0.5), (0, 0.5), (3, 0.0), (64, 1.0)])
def test_crops_and_flips_are_whole_pixels(crop, flip):
    images, drawn = pictures(2, batch=40), numbers(2, 40, CROP_DRAWS)
    got = crop_and_flip(images, crop=crop, flip=flip, drawn=drawn)
    mirrored = 0
    for run in range(2):
        for index in range(40):
            padded = np.pad(images[run, index].numpy(), ((0, 0), (crop, crop), (crop, crop)))
            chance, *places = drawn[run, index].tolist()
            left, top = (math.floor(place * (2 * crop + 1)) for place in places)
            want = padded[:, top : top + 6, left : left + 9]
            mirrored += chance < flip
            assert np.array_equal(got[run, index].numpy(), want[..., ::-1] if chance < flip else want)
    assert mirrored == {0.0: 0, 1.0: 80}.get(flip, mirrored)
    assert 0.3 < mirrored / 80 < 0.7 or flip in (0, 1)


def test_every_place_is_cut_equally_often():
    image = torch.arange(1.0, 10.0).view(1, 1, 1, 3, 3).expand(1, 9000, 1, 3, 3)
    got = crop_and_flip(image, crop=1, flip=0.0, drawn=numbers(1, 9000, CROP_DRAWS))
    kinds, counts = got.flatten(2)[0].unique(dim=0, return_counts=True)
    assert len(kinds) == 9
    assert counts.min() > 850
    assert counts.max() < 1150
    for extreme in (0.0, 1 - 2**-24):  # the least and the largest number that is drawn
        ends = crop_and_flip(image[:, :1], crop=64, flip=0.0, drawn=torch.full((1, 1, CROP_DRAWS), extreme))
        assert not ends.any()
        assert crop_and_flip(image[:, :1], crop=1, flip=0.0, drawn=torch.full((1, 1, CROP_DRAWS), extreme)).any()


def test_a_run_is_cropped_alike_alone_and_stacked():
    images, drawn = pictures(3), numbers(3, 3, CROP_DRAWS)
    stacked = crop_and_flip(images, crop=2, flip=0.5, drawn=drawn)
    for run in range(3):
        alone = crop_and_flip(images[run : run + 1], crop=2, flip=0.5, drawn=drawn[run : run + 1])
        assert torch.equal(alone[0], stacked[run])
