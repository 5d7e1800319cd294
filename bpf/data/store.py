"""Arrays kept on disk: built once by one process, checked on opening, memory-mapped by all.

One directory per data set and fingerprint holds four `.npy` files and `meta.json`.
"""

import hashlib
import json
import os
import re
import shutil
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from bpf.data.base import Arrays, Extent, disk_error
from bpf.errors import RunError
from bpf.files import sync_directory

FORMAT = 1
_FIELDS = ("train_images", "train_labels", "test_images", "test_labels")
_CURE = "Choose another place with --data-dir or the environment variable BPF_CACHE_DIR."


def entry(root: Path, name: str, identity: str, fingerprint: str) -> Path:
    """The directory of one data set. Entries that differ only in `fingerprint` replace each other."""
    plain = re.sub(r"[^\w.-]", "_", name)
    return root / f"{plain}-{_short(identity)}-{_short(fingerprint)}"


def fetch(directory: Path, fingerprint: str, build: Callable[[], Arrays]) -> Arrays:
    """The arrays in `directory`, memory-mapped copy-on-write; `build` makes them where that is needed.

    Missing, damaged and outdated entries are built anew while other processes wait. Raises UsageError where
    the cache may not be written, RunError for a full disk, and whatever `build` raises.
    """
    try:
        arrays = _open(directory, fingerprint)
        if arrays is None:
            arrays = _build(directory, fingerprint, build)
    except OSError as error:
        raise disk_error(error, "keep the data cache", directory.parent, _CURE) from error
    return arrays


def peek(directory: Path, fingerprint: str) -> Extent | None:
    """How large the data set in `directory` is, without opening its arrays; None for one that is not there or old."""
    try:
        meta: dict[str, Any] = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
        if meta["format"] != FORMAT or meta["fingerprint"] != fingerprint:
            return None
        train, channels, height, width = (int(size) for size in meta["shapes"]["train_images"])
        return Extent((channels, height, width), len(meta["classes"]), train)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def exists(directory: Path) -> bool:
    return (directory / "meta.json").is_file()


@contextmanager
def locked(lock: Path) -> Iterator[None]:
    """Hold a lock file, whose directory is made if need be. Where the work fails, neither stays behind."""
    from filelock import FileLock

    new = [directory for directory in lock.parents if not directory.exists()]
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(lock):
            try:
                yield
            except BaseException:
                with suppress(OSError):  # whoever waits for the lock notices, and makes another
                    lock.unlink()
                raise
    except BaseException:
        for directory in new:
            with suppress(OSError):  # somebody else uses it
                directory.rmdir()
        raise


def _build(directory: Path, fingerprint: str, build: Callable[[], Arrays]) -> Arrays:
    root, family = directory.parent, directory.name.rpartition("-")[0]
    with locked(root / f"{family}.lock"):
        arrays = _open(directory, fingerprint)  # another process may have built it while this one waited
        if arrays is not None:
            return arrays
        stage = root / f".{family}-{uuid.uuid4().hex[:8]}"
        for leftover in root.glob(f".{family}-*"):  # of a killed process: the lock is ours
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            built = build()
            stage.mkdir()
            _write(stage, fingerprint, built)
            for outdated in root.glob(f"{family}-*"):
                shutil.rmtree(outdated)
            stage.rename(directory)
            sync_directory(root)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
        arrays = _open(directory, fingerprint)
    if arrays is None:
        raise RunError(f"The data cache in {directory} reads back other bytes than were written. {_CURE}")
    return arrays


def _write(stage: Path, fingerprint: str, arrays: Arrays) -> None:
    checksums = {}
    for field in _FIELDS:
        path = stage / f"{field}.npy"
        with path.open("wb") as file:
            np.save(file, np.ascontiguousarray(getattr(arrays, field)), allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        checksums[path.name] = _checksum(path)
    meta = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "classes": arrays.classes,
        "shapes": {field: getattr(arrays, field).shape for field in _FIELDS},
        "crc32": checksums,
    }
    with (stage / "meta.json").open("w", encoding="utf-8") as file:
        json.dump(meta, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync_directory(stage)


def _open(directory: Path, fingerprint: str) -> Arrays | None:
    """None for an entry that is missing, damaged, of another format or of another fingerprint."""
    try:
        meta: dict[str, Any] = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
        if meta["format"] != FORMAT or meta["fingerprint"] != fingerprint:
            return None
        if any(_checksum(directory / name) != crc32 for name, crc32 in meta["crc32"].items()):
            return None
        mapped = [np.load(directory / f"{field}.npy", mmap_mode="c", allow_pickle=False) for field in _FIELDS]
        if [list(array.shape) for array in mapped] != [meta["shapes"][field] for field in _FIELDS]:
            return None
        train_images, train_labels, test_images, test_labels = mapped
        return Arrays(train_images, train_labels, test_images, test_labels, tuple(meta["classes"]))
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _checksum(path: Path) -> int:
    crc32 = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            crc32 = zlib.crc32(chunk, crc32)
    return crc32


def _short(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:12]
