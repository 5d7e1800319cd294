"""The seam for data sets: what a class under the entry-point group `bpf.datasets` must offer.

A data set knows how to find its raw files and how to read them once; `cache.py` keeps the result. Modules of
data sets import torch, torchvision and PIL inside functions only, so that `bpf datasets` stays fast.
"""

import errno
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from bpf.errors import BpfError, RunError, UsageError

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]

_NOT_PERMITTED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR}
DISK_ERRORS = _NOT_PERMITTED | {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


@dataclass(frozen=True, eq=False)
class Arrays:
    """A whole data set in memory (or memory-mapped).

    Images are uint8 [N, C, H, W] in 0..255; labels are int64 [N] in 0..len(classes)-1.
    """

    train_images: Images
    train_labels: Labels
    test_images: Images
    test_labels: Labels
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Extent:
    """How large a data set is: `shape` (C, H, W) of an image, and how many `classes` and `train`ing examples."""

    shape: tuple[int, int, int]
    classes: int
    train: int

    @property
    def inputs(self) -> int:
        """Numbers in an image."""
        return self.shape[0] * self.shape[1] * self.shape[2]


class Dataset:
    """A data set; the first line of a subclass's docstring is its one-line summary.

    `shape` (C, H, W), `class_count`, `train_size` and `test_size` are None where the source decides.
    `takes_source`: the name carries a path, as in `folder:PATH`. `resizable`: obeys `image_size`.
    `cached`: what `read` returns is kept in the cache; False only for sets that are read in no time.
    """

    shape: ClassVar[tuple[int, int, int] | None] = None
    class_count: ClassVar[int | None] = None
    train_size: ClassVar[int | None] = None
    test_size: ClassVar[int | None] = None
    takes_source: ClassVar[bool] = False
    resizable: ClassVar[bool] = False
    cached: ClassVar[bool] = True

    def __init__(self, data_dir: Path, source: str | None = None, image_size: int | None = None) -> None:
        """`data_dir` holds downloaded sets; `image_size` is the wanted height and width in pixels."""
        self.data_dir = data_dir
        self.source = source
        self.image_size = image_size

    def present(self) -> bool:
        """Whether the raw files are on disk, so that reading needs no network."""
        raise NotImplementedError

    def instructions(self) -> str:
        """One or two lines: which files to put where, for a person without a network."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """A text that changes when the source changes; a constant for a set that never does.

        It is asked at every start, so it must be cheap. Raises UsageError where the source is missing.
        """
        raise NotImplementedError

    def read(self) -> Arrays:
        """Read everything from the raw files, downloading them where that is possible. May be slow.

        Raises UsageError for what the user can mend: no network, missing or damaged files.
        """
        raise NotImplementedError


def misdeclared(kind: type[Dataset]) -> str:
    """Why what a data set says of itself cannot be used, or nothing."""
    shape = kind.shape
    if shape is not None and not (isinstance(shape, tuple) and len(shape) == 3 and all(map(_is_count, shape))):
        return f"its shape is {shape!r}, and must be three whole numbers (C, H, W), or None"
    for attribute in ("class_count", "train_size", "test_size"):
        if (given := getattr(kind, attribute)) is not None and not _is_count(given):
            return f"its {attribute} is {given!r}, and must be a whole number from 1 on, or None"
    return ""


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def validate(called: str, arrays: Arrays, shape: tuple[int, int, int] | None = None) -> None:
    """Check what a data set returned against the contract of `Arrays`, and `shape` (C, H, W) if given.

    Raises UsageError that names the data set, as it is called, what is wrong and what would be right.
    """
    problem = problem_of(arrays, shape)
    if problem:
        raise UsageError(f"The dataset {called} cannot be used: {problem}")


def problem_of(arrays: Arrays, shape: tuple[int, int, int] | None = None) -> str:
    """What is wrong with a data set by the contract of `Arrays`, or nothing."""
    if not isinstance(arrays, Arrays):
        return f"reading it gives {type(arrays).__name__}; it must give bpf.data.base.Arrays."
    return (
        _problem_of_classes(arrays.classes)
        or _problem_of_split("train", arrays.train_images, arrays.train_labels, len(arrays.classes))
        or _problem_of_split("test", arrays.test_images, arrays.test_labels, len(arrays.classes))
        or _problem_of_shapes(arrays, shape)
    )


def _problem_of_classes(classes: tuple[str, ...]) -> str:
    if not (isinstance(classes, tuple) and all(isinstance(name, str) for name in classes)):
        return "its classes must be a tuple of their names."
    if len(classes) < 2:
        return f"it has {len(classes)} classes; a classification task needs at least 2."
    if len(set(classes)) < len(classes):
        twice = next(name for name in classes if classes.count(name) > 1)
        return f"the class name {twice!r} occurs more than once; give every class its own name."
    return ""


def _problem_of_split(split: str, images: Images, labels: Labels, class_count: int) -> str:
    for name, array in (("images", images), ("labels", labels)):
        if not isinstance(array, np.ndarray):
            return f"{split}_{name} is {type(array).__name__}; it must be a NumPy array."
    if images.dtype != np.uint8 or images.ndim != 4:
        return (
            f"{split}_images is {images.dtype} with {images.ndim} dimensions; "
            "it must be a NumPy array, uint8 [N, C, H, W] with values 0 to 255."
        )
    if labels.dtype != np.int64 or labels.shape != images.shape[:1]:
        return (
            f"{split}_labels is {labels.dtype} {list(labels.shape)}; "
            f"it must be int64 [{len(images)}], one label for each image."
        )
    if images.size == 0:
        return f"{split}_images is empty {list(images.shape)}; at least one example is needed."
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= class_count:
        return (
            f"{split}_labels holds values from {low} to {high}; "
            f"labels of {class_count} classes run from 0 to {class_count - 1}."
        )
    return ""


def _problem_of_shapes(arrays: Arrays, shape: tuple[int, int, int] | None) -> str:
    train, test = arrays.train_images.shape[1:], arrays.test_images.shape[1:]
    if train != test:
        return f"training images are {list(train)} and test images {list(test)}; both must have one shape."
    if shape is not None and train != shape:
        return f"its images are {list(train)}, but it declares {list(shape)}; one of the two is wrong."
    return ""


def disk_error(error: OSError, doing: str, directory: Path, cure: str) -> BpfError:
    """A UsageError where `directory` may not be written, a RunError for a full or failing disk."""
    reason = error.strerror or str(error)
    kind = UsageError if error.errno in _NOT_PERMITTED else RunError
    return kind(f"Cannot {doing} in {directory}: {reason}. {cure}")
