"""Data sets in the formats that torchvision downloads, with few random images."""

import gzip
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest


def write(directory: Path) -> Path:
    """MNIST, Fashion-MNIST, Kuzushiji-MNIST and CIFAR-10, below a data directory."""
    rng = np.random.default_rng(0)
    for name in ("MNIST", "FashionMNIST", "KMNIST"):
        raw = directory / name / "raw"
        raw.mkdir(parents=True)
        for part, count in (("train", 60), ("t10k", 20)):
            images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
            labels = np.arange(count, dtype=np.uint8) % 10
            pixels = struct.pack(">IIII", 2051, count, 28, 28) + images.tobytes()
            (raw / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(pixels))
            (raw / f"{part}-labels-idx1-ubyte.gz").write_bytes(
                gzip.compress(struct.pack(">II", 2049, count) + labels.tobytes())
            )
    batches = directory / "cifar-10-batches-py"
    batches.mkdir()
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        images = rng.integers(0, 256, (20, 3072), dtype=np.uint8)
        (batches / name).write_bytes(pickle.dumps({"data": images, "labels": [i % 10 for i in range(20)]}))
    (batches / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    return directory


def believe(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small files cannot have the checksums of the real ones."""
    import torchvision

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *arguments: True)
