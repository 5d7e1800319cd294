"""The well-known image sets, downloaded and read through torchvision in torchvision's own layout."""

import gzip
import shutil
import zlib
from pathlib import Path
from typing import ClassVar

import numpy as np

from bpf.data.base import Arrays, Labels
from bpf.data.fetching import TorchvisionSet
from bpf.data.images import decode
from bpf.data.own import SPLIT_SEED, TEST_SHARE
from bpf.data.subsets import stratified_split


class _IdxSet(TorchvisionSet):
    """Sets in MNIST's format. Gzipped files need not be the original bytes: gzip's own checksum is enough."""

    raw: ClassVar[tuple[str, ...]] = (
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
    )

    def present(self) -> bool:
        return all(plain.is_file() or packed.is_file() for plain, packed in self._files())

    def _files(self) -> list[tuple[Path, Path]]:
        folder = self.data_dir / self.folder
        return [(folder / name, folder / f"{name}.gz") for name in self.raw]

    def _stage_archives(self, stage: Path) -> list[Path]:
        damaged = []
        (stage / self.folder).mkdir(parents=True)
        for plain, packed in self._files():
            staged = stage / self.folder / plain.name
            if plain.is_file():
                shutil.copyfile(plain, staged)
            elif packed.is_file():
                try:
                    with gzip.open(packed) as source, staged.open("wb") as target:
                        shutil.copyfileobj(source, target)
                except (EOFError, gzip.BadGzipFile, zlib.error):
                    staged.unlink()
                    damaged.append(packed)
        return damaged

    def _read(self) -> Arrays:
        train, test = (self._torchvision(self.data_dir, train=train) for train in (True, False))
        return Arrays(
            train.data.numpy()[:, None],
            train.targets.numpy(),
            test.data.numpy()[:, None],
            test.targets.numpy(),
            tuple(name.rpartition(" - ")[2] for name in train.classes),
        )


class Mnist(_IdxSet):
    """Handwritten digits, 28x28 grey (LeCun et al. 1998)."""

    shape: ClassVar[tuple[int, int, int] | None] = (1, 28, 28)
    class_count: ClassVar[int | None] = 10
    train_size: ClassVar[int | None] = 60_000
    test_size: ClassVar[int | None] = 10_000
    torchvision_class: ClassVar[str] = "MNIST"
    folder: ClassVar[str] = "MNIST/raw"
    archives: ClassVar[tuple[str, ...]] = tuple(f"MNIST/raw/{name}.gz" for name in _IdxSet.raw)


class FashionMnist(_IdxSet):
    """Articles of clothing, 28x28 grey (Xiao et al. 2017)."""

    shape: ClassVar[tuple[int, int, int] | None] = (1, 28, 28)
    class_count: ClassVar[int | None] = 10
    train_size: ClassVar[int | None] = 60_000
    test_size: ClassVar[int | None] = 10_000
    torchvision_class: ClassVar[str] = "FashionMNIST"
    folder: ClassVar[str] = "FashionMNIST/raw"
    archives: ClassVar[tuple[str, ...]] = tuple(f"FashionMNIST/raw/{name}.gz" for name in _IdxSet.raw)


class KuzushijiMnist(_IdxSet):
    """Cursive Japanese characters, 28x28 grey (Clanuwat et al. 2018)."""

    shape: ClassVar[tuple[int, int, int] | None] = (1, 28, 28)
    class_count: ClassVar[int | None] = 10
    train_size: ClassVar[int | None] = 60_000
    test_size: ClassVar[int | None] = 10_000
    torchvision_class: ClassVar[str] = "KMNIST"
    folder: ClassVar[str] = "KMNIST/raw"
    archives: ClassVar[tuple[str, ...]] = tuple(f"KMNIST/raw/{name}.gz" for name in _IdxSet.raw)


class Cifar10(TorchvisionSet):
    """Small photographs of 10 kinds of objects, 32x32 colour (Krizhevsky 2009)."""

    shape: ClassVar[tuple[int, int, int] | None] = (3, 32, 32)
    class_count: ClassVar[int | None] = 10
    train_size: ClassVar[int | None] = 50_000
    test_size: ClassVar[int | None] = 10_000
    torchvision_class: ClassVar[str] = "CIFAR10"
    folder: ClassVar[str] = "cifar-10-batches-py"
    raw: ClassVar[tuple[str, ...]] = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta")
    archives: ClassVar[tuple[str, ...]] = ("cifar-10-python.tar.gz",)

    def _read(self) -> Arrays:
        """torchvision compares checksums before it unpickles, so that no stranger's code runs."""
        train, test = (self._torchvision(self.data_dir, train=train) for train in (True, False))
        return Arrays(
            train.data.transpose(0, 3, 1, 2),
            np.asarray(train.targets, dtype=np.int64),
            test.data.transpose(0, 3, 1, 2),
            np.asarray(test.targets, dtype=np.int64),
            tuple(train.classes),
        )


class Cifar100(Cifar10):
    """Small photographs of 100 kinds of objects, 32x32 colour (Krizhevsky 2009)."""

    shape: ClassVar[tuple[int, int, int] | None] = (3, 32, 32)
    class_count: ClassVar[int | None] = 100
    train_size: ClassVar[int | None] = 50_000
    test_size: ClassVar[int | None] = 10_000
    torchvision_class: ClassVar[str] = "CIFAR100"
    folder: ClassVar[str] = "cifar-100-python"
    raw: ClassVar[tuple[str, ...]] = ("train", "test", "meta")
    archives: ClassVar[tuple[str, ...]] = ("cifar-100-python.tar.gz",)


class _PhotoSet(TorchvisionSet):
    """Sets of image files without an official split: 80/20 per class with a fixed seed."""

    resizable: ClassVar[bool] = True
    default_size: ClassVar[int] = 64

    def _read(self) -> Arrays:
        paths, labels, classes = self._files()
        label = f"{self.torchvision_class} in {self.data_dir / self.folder}"
        images = decode(label, paths, self.image_size or self.default_size, keep_grey=False)
        train, test = stratified_split(labels, round(TEST_SHARE * len(labels)), SPLIT_SEED)
        return Arrays(images[train], labels[train], images[test], labels[test], classes)

    def _files(self) -> tuple[list[str], Labels, tuple[str, ...]]:
        raise NotImplementedError


class Caltech256(_PhotoSet):
    """Photographs of 256 kinds of objects and clutter, scaled to 64x64 colour (Griffin et al. 2007).

    Scaled keeping the aspect ratio and centred on black; grey photographs become RGB.
    """

    shape: ClassVar[tuple[int, int, int] | None] = (3, 64, 64)
    class_count: ClassVar[int | None] = 257
    train_size: ClassVar[int | None] = 24_486
    test_size: ClassVar[int | None] = 6_121
    resizable: ClassVar[bool] = True
    torchvision_class: ClassVar[str] = "Caltech256"
    folder: ClassVar[str] = "caltech256"
    raw: ClassVar[tuple[str, ...]] = ("256_ObjectCategories",)
    archives: ClassVar[tuple[str, ...]] = ("caltech256/256_ObjectCategories.tar",)

    def _files(self) -> tuple[list[str], Labels, tuple[str, ...]]:
        photos = self._torchvision(self.data_dir)
        root = self.data_dir / self.folder / "256_ObjectCategories"
        paths = [
            str(root / photos.categories[label] / f"{label + 1:03d}_{index:04d}.jpg")
            for label, index in zip(photos.y, photos.index, strict=True)
        ]
        classes = tuple(category.partition(".")[2] for category in photos.categories)
        return paths, np.asarray(photos.y, dtype=np.int64), classes


class EuroSat(_PhotoSet):
    """Satellite images of 10 kinds of land use, 64x64 colour (Helber et al. 2019)."""

    shape: ClassVar[tuple[int, int, int] | None] = (3, 64, 64)
    class_count: ClassVar[int | None] = 10
    train_size: ClassVar[int | None] = 21_600
    test_size: ClassVar[int | None] = 5_400
    resizable: ClassVar[bool] = True
    torchvision_class: ClassVar[str] = "EuroSAT"
    folder: ClassVar[str] = "eurosat"
    raw: ClassVar[tuple[str, ...]] = ("2750",)
    archives: ClassVar[tuple[str, ...]] = ("eurosat/EuroSAT.zip",)

    def _files(self) -> tuple[list[str], Labels, tuple[str, ...]]:
        tiles = self._torchvision(self.data_dir)
        return (
            [path for path, _ in tiles.samples],
            np.asarray(tiles.targets, dtype=np.int64),
            tuple(tiles.classes),
        )
