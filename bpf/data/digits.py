"""Handwritten digits that come with the package: 1,797 images of 8x8 pixels, for tests and first steps."""

from pathlib import Path
from typing import ClassVar

import numpy as np

from bpf.data.base import Arrays, Dataset

FILE = Path(__file__).with_name("digits.npz")


class Digits(Dataset):
    """Handwritten digits, 8x8 grey, part of the package (Alpaydin and Kaynak 1998).

    The test part of "Optical Recognition of Handwritten Digits" by E. Alpaydin and C. Kaynak, UCI Machine
    Learning Repository, https://doi.org/10.24432/C50P49, licence CC BY 4.0, as in scikit-learn's
    `load_digits`. Changed: the grey values 0..16 are scaled to round(v * 255 / 16), and the images are split,
    stratified and once for all, into 1,437 for training and 360 for testing; the file holds the split.
    """

    shape: ClassVar[tuple[int, int, int] | None] = (1, 8, 8)
    class_count: ClassVar[int | None] = 10
    train_size: ClassVar[int | None] = 1_437
    test_size: ClassVar[int | None] = 360
    cached: ClassVar[bool] = False

    def present(self) -> bool:
        return True

    def instructions(self) -> str:
        return "Nothing to do: it comes with bpf."

    def fingerprint(self) -> str:
        return "1"

    def read(self) -> Arrays:
        """Images uint8 [1437 and 360, 1, 8, 8]; writes nothing."""
        with np.load(FILE, allow_pickle=False) as archive:
            return Arrays(
                archive["train_images"],
                archive["train_labels"].astype(np.int64),
                archive["test_images"],
                archive["test_labels"].astype(np.int64),
                tuple("0123456789"),
            )
