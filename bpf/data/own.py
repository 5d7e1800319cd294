"""Your own data: a folder of images (`folder:PATH`) or a NumPy archive (`npz:PATH`)."""

import hashlib
import math
import os
import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from bpf.data.base import Arrays, Dataset, Images, Labels
from bpf.data.images import EXTENSIONS, decode
from bpf.data.subsets import stratified_split
from bpf.errors import BpfError, UsageError
from bpf.files import at_home, exists, is_dir, is_file
from bpf.machine import memory_bytes

TEST_SHARE, SPLIT_SEED = 0.2, 0  # of a source without its own test set

Tree = dict[str, list[str]]  # class name -> image files


class _Own(Dataset):
    takes_source: ClassVar[bool] = True
    kind: ClassVar[str] = ""

    @property
    def path(self) -> Path:
        return at_home(self.source or "")

    @property
    def label(self) -> str:
        return f"{self.kind}:{self.source or 'PATH'}"

    @contextmanager
    def _readable(self, path: str | Path) -> Iterator[None]:
        """Raise UsageError for what the system refuses below the source."""
        try:
            yield
        except OSError as error:
            at = error.filename or path
            raise UsageError(f"{self.label}: {at} cannot be read: {error.strerror}. Replace or remove it.") from error

    def _missing(self) -> UsageError:
        reason = "there is no such path"
        if exists(self.path):
            reason = "it is a file, not a directory" if is_file(self.path) else "it is not a file"
        return UsageError(f"{self.label}: {reason}. {self.instructions()}")


class Folder(_Own):
    """Your own images, one directory per class: folder:PATH.

    Either `PATH/train/CLASS/*` and `PATH/test/CLASS/*`, or `PATH/CLASS/*`, which is split 80/20 per class
    with a fixed seed. Classes are numbered in the order of their sorted names; hidden files and files without
    an image's extension are ignored, an image that cannot be read never is. All images become RGB, unless
    every one is grey-scale; alpha channels are dropped.
    """

    takes_source: ClassVar[bool] = True
    resizable: ClassVar[bool] = True
    kind: ClassVar[str] = "folder"

    def present(self) -> bool:
        return self.source is not None and is_dir(self.path)

    def instructions(self) -> str:
        return "Put images into PATH/train/CLASS and PATH/test/CLASS, or into PATH/CLASS to have them split 80/20."

    def fingerprint(self) -> str:
        """A digest of every image's relative path, size in bytes and time of change."""
        digest, root = hashlib.sha256(), str(self.path)
        with self._readable(self.path):
            for path in (path for tree in self._trees() for paths in tree.values() for path in paths):
                status = os.stat(path)  # noqa: PTH116 - pathlib takes twice as long for 60,000 files
                entry = f"{path.removeprefix(root)}\0{status.st_size}\0{status.st_mtime_ns}\n"
                digest.update(entry.encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def read(self) -> Arrays:
        """Decode every image. Raises UsageError for a wrong layout, unreadable images and differing sizes."""
        trees = self._trees()
        classes = tuple(trees[0])
        paths = [path for tree in trees for name in classes for path in tree[name]]
        labels = np.concatenate([_tree_labels(tree) for tree in trees])
        images = decode(self.label, paths, self.image_size, keep_grey=True)
        if len(trees) == 2:
            train_size = sum(map(len, trees[0].values()))
            train, test = np.arange(train_size), np.arange(train_size, len(paths))
        else:
            train, test = stratified_split(labels, round(TEST_SHARE * len(labels)), SPLIT_SEED)
        return Arrays(images[train], labels[train], images[test], labels[test], classes)

    def _trees(self) -> list[Tree]:
        """[train, test], or one tree to be split; class names and files are sorted."""
        if not is_dir(self.path):
            raise self._missing()
        parts = [self.path / "train", self.path / "test"]
        found = [part.is_dir() for part in parts]
        if not any(found):
            return [self._tree(self.path)]
        if not all(found):
            there, absent = ("train", "test") if found[0] else ("test", "train")
            raise UsageError(f"{self.label} has {there}/ but no {absent}/. {self.instructions()}")
        train, test = map(self._tree, parts)
        if train.keys() != test.keys():
            unlike = sorted(train.keys() ^ test.keys())
            raise UsageError(
                f"{self.label}: train/ and test/ must have the same classes; only one of them has "
                f"{', '.join(unlike[:5])}{f' and {len(unlike) - 5} more' if len(unlike) > 5 else ''}."
            )
        return [train, test]

    def _tree(self, root: Path) -> Tree:
        tree = {}
        with self._readable(root):
            for entry in _visible(root):
                if _is_dir(entry):
                    tree[entry.name] = sorted(_image_files(entry.path))
        if not tree:
            raise UsageError(f"{self.label}: {root} has no class directories. {self.instructions()}")
        empty = sorted(name for name, paths in tree.items() if not paths)
        if empty:
            raise UsageError(
                f"{self.label}: {root / empty[0]} has no images. Add some or remove the directory; "
                f"recognised are {' '.join(sorted(EXTENSIONS))}."
            )
        return dict(sorted(tree.items()))


class Npz(_Own):
    """Your own arrays in a NumPy archive: npz:PATH.

    Keys: `train_images`, `train_labels`, `test_images`, `test_labels`, or Keras's `x_train`, `y_train`,
    `x_test`, `y_test`; optionally `classes`, the names. Images are uint8 [N, H, W], [N, H, W, C] or
    [N, C, H, W] with C 1 or 3 (channels last where both fit); labels are whole numbers from 0, [N] or [N, 1].
    Archives that hold pickled objects are refused, because reading those would run their code.
    """

    takes_source: ClassVar[bool] = True
    kind: ClassVar[str] = "npz"
    keys: ClassVar[dict[str, str]] = {
        "train_images": "x_train",
        "train_labels": "y_train",
        "test_images": "x_test",
        "test_labels": "y_test",
    }

    def present(self) -> bool:
        return self.source is not None and is_file(self.path)

    def instructions(self) -> str:
        return (
            "Save uint8 images and whole-number labels with "
            "numpy.savez(PATH, train_images=, train_labels=, test_images=, test_labels=)."
        )

    def fingerprint(self) -> str:
        """The file's size in bytes and time of change."""
        if not is_file(self.path):
            raise self._missing()
        status = self.path.stat()
        return f"{status.st_size} {status.st_mtime_ns}"

    def read(self) -> Arrays:
        """Read the archive. Raises UsageError for a damaged file, missing keys and wrong types or shapes."""
        if not is_file(self.path):
            raise self._missing()
        found = self._arrays()
        keys = [ours if ours in found else keras for ours, keras in self.keys.items()]
        missing = [ours for ours, key in zip(self.keys, keys, strict=True) if key not in found]
        if missing:
            raise UsageError(f"{self.label} lacks {', '.join(missing)}. {self.instructions()}")
        train_images, test_images = (self._images(key, found[key]) for key in keys[::2])
        train_labels, test_labels = (self._labels(key, found[key]) for key in keys[1::2])
        highest = int(max(train_labels.max(initial=0), test_labels.max(initial=0)))
        if highest >= len(train_labels) > 0:
            raise UsageError(
                f"{self.label}: a label is {highest}, with {len(train_labels)} training examples; "
                "number the classes from 0 without gaps."
            )
        classes = tuple(map(str, found["classes"].ravel() if "classes" in found else range(highest + 1)))
        return Arrays(train_images, train_labels, test_images, test_labels, classes)

    def _arrays(self) -> dict[str, npt.NDArray[Any]]:
        wanted = {*self.keys, *self.keys.values(), "classes"}
        try:
            self._check_size(wanted)
            with self.path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                return {key: archive[key] for key in archive.files if key in wanted}
        except (BpfError, MemoryError):
            raise
        except Exception as error:  # headers and archives that are made to fail can do so in any way
            objects = str(error).startswith("Object arrays")
            reason = "holds pickled objects" if objects else "is damaged or no .npz archive"
            raise UsageError(f"{self.label} {reason}. {self.instructions()}") from error

    def _check_size(self, wanted: Collection[str]) -> None:
        """Raise UsageError if an array says that it is larger than its bytes, or than this machine's memory."""
        total = 0
        with zipfile.ZipFile(self.path) as archive:
            for entry in archive.infolist():
                if entry.filename.removesuffix(".npy") not in wanted:
                    continue
                with archive.open(entry) as file:
                    version = np.lib.format.read_magic(file)
                    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                    shape, _, dtype = read[version](file)
                    size = math.prod(shape) * dtype.itemsize
                    if not dtype.hasobject and (min(shape, default=0) < 0 or size > entry.file_size):
                        raise ValueError("larger than its bytes")
                    total += entry.file_size
        if total > memory_bytes():
            raise UsageError(
                f"{self.label} holds {total / 2**30:.1f} GiB of arrays, more than this machine has memory. "
                "Leave some images out."
            )

    def _images(self, key: str, images: npt.NDArray[Any]) -> Images:
        if images.dtype != np.uint8:
            raise UsageError(f"{self.label}: {key} is {images.dtype}; images must be uint8, 0 to 255.")
        if images.ndim == 3:
            return images[:, None]
        if images.ndim == 4 and images.shape[3] in (1, 3):
            return np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        if images.ndim == 4 and images.shape[1] in (1, 3):
            return images
        raise UsageError(
            f"{self.label}: {key} has the shape {list(images.shape)}; images must be [N, H, W], [N, H, W, C] "
            "or [N, C, H, W] with 1 or 3 channels."
        )

    def _labels(self, key: str, labels: npt.NDArray[Any]) -> Labels:
        if labels.dtype.kind not in "iu" or labels.size != len(np.atleast_1d(labels)):
            raise UsageError(
                f"{self.label}: {key} is {labels.dtype} {list(labels.shape)}; labels must be whole numbers [N]."
            )
        return labels.reshape(-1).astype(np.int64)


def _visible(root: Path | str) -> Iterator["os.DirEntry[str]"]:
    with os.scandir(root) as entries:
        yield from (entry for entry in entries if not entry.name.startswith("."))


def _image_files(directory: str) -> Iterator[str]:
    for entry in _visible(directory):
        extension = "." + entry.name.rpartition(".")[2].lower()
        if extension in EXTENSIONS and not _is_dir(entry):
            yield entry.path


def _is_dir(entry: "os.DirEntry[str]") -> bool:
    """False also for a link to itself, where the entry's own method raises."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _tree_labels(tree: Tree) -> Labels:
    return np.repeat(np.arange(len(tree), dtype=np.int64), [len(paths) for paths in tree.values()])
