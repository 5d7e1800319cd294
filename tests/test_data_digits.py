"""The embedded digits."""

from pathlib import Path

import numpy as np

from bpf.data.base import validate
from bpf.data.digits import FILE, Digits


def test_the_embedded_digits_are_complete_and_stratified():
    arrays = Digits(Path()).read()
    validate("digits", arrays, Digits.shape)
    assert (len(arrays.train_labels), len(arrays.test_labels)) == (Digits.train_size, Digits.test_size)
    assert np.bincount(arrays.train_labels).tolist() == [142, 145, 142, 146, 145, 146, 145, 143, 139, 144]
    assert np.bincount(arrays.test_labels).tolist() == [36, 37, 35, 37, 36, 36, 36, 36, 35, 36]
    assert FILE.stat().st_size < 100_000


def test_grey_values_are_the_17_levels_of_the_original():
    levels = np.unique(Digits(Path()).read().train_images)
    assert levels.tolist() == [round(value * 255 / 16) for value in range(17)]


def test_train_and_test_are_separable_by_nearest_neighbour():
    arrays = Digits(Path()).read()
    train, test = (
        images.reshape(len(images), -1).astype(float) for images in (arrays.train_images, arrays.test_images)
    )
    distances = (test**2).sum(1)[:, None] - 2 * test @ train.T + (train**2).sum(1)
    right = arrays.train_labels[distances.argmin(1)] == arrays.test_labels
    assert right.mean() > 0.97
