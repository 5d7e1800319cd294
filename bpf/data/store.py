"""Arrays kept on disk: built once by one process, checked on opening, memory-mapped by all.

One directory per data set and fingerprint holds four `.npy` files and `meta.json`.
"""

import hashlib
import json
import os
import re
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter
from typing_extensions import TypedDict

from bpf.data.base import Arrays, Extent, disk_error, problem_of
from bpf.errors import RunError, UsageError
from bpf.files import sync_directory
from bpf.reading import fitting, json_of, open_regular, text_of

FORMAT = 1
META = "meta.json"
_FIELDS = ("train_images", "train_labels", "test_images", "test_labels")
_CURE = "Choose another place with --data-dir or the environment variable BPF_CACHE_DIR."


class _Meta(TypedDict):
    """What an entry says of itself; the arrays' shapes and checksums by their names."""

    format: int
    fingerprint: str
    classes: list[str]
    shapes: dict[str, list[int]]
    crc32: dict[str, int]


_META: TypeAdapter[_Meta] = TypeAdapter(_Meta)


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
        meta = fitting(_META, json_of(text_of(directory / META)))
        if meta["format"] != FORMAT or meta["fingerprint"] != fingerprint:
            return None
        train, channels, height, width = meta["shapes"]["train_images"]
        return Extent((channels, height, width), len(meta["classes"]), train)
    except (OSError, ValueError, KeyError):
        return None


def exists(directory: Path) -> bool:
    return (directory / META).is_file()


@contextmanager
def locked(lock: Path) -> Iterator[None]:
    """Hold a lock file, whose directory is made if need be. Where the work fails, neither stays behind."""
    from filelock import FileLock

    if lock.is_symlink():
        raise UsageError(f"{lock} is a link, and bpf locks only files of its own. Remove it.")
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
        for leftover in _ours(root, rf"\.{re.escape(family)}-[0-9a-f]{{8}}"):  # of a killed process: the lock is ours
            _remove(leftover)
        try:
            built = build()
            stage.mkdir()
            _write(stage, fingerprint, built)
            for outdated in _ours(root, rf"{re.escape(family)}-[0-9a-f]{{12}}"):
                _remove(outdated)
            if directory.exists():  # with something in it that is not ours
                for path in sorted(stage.iterdir(), key=lambda path: path.name == META):
                    path.replace(directory / path.name)
            else:
                stage.rename(directory)
            sync_directory(root)
        finally:
            _remove(stage)
        arrays = _open(directory, fingerprint)
    if arrays is None:
        raise RunError(f"The data cache in {directory} reads back other bytes than were written. {_CURE}")
    return arrays


def _ours(root: Path, pattern: str) -> list[Path]:
    """The directories of exactly such names, but for links."""
    return [
        path for path in root.iterdir() if re.fullmatch(pattern, path.name) and path.is_dir() and not path.is_symlink()
    ]


def _remove(directory: Path) -> None:
    """Remove what `_write` has put there, and the directory if nothing else is in it."""
    for name in (META, *(f"{field}.npy" for field in _FIELDS)):
        (directory / name).unlink(missing_ok=True)
    with suppress(OSError):
        directory.rmdir()


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
    with (stage / META).open("w", encoding="utf-8") as file:
        json.dump(meta, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync_directory(stage)


def _open(directory: Path, fingerprint: str) -> Arrays | None:
    """None for an entry that is missing, damaged, of another format or of another fingerprint."""
    try:
        meta = fitting(_META, json_of(text_of(directory / META)))
        if meta["format"] != FORMAT or meta["fingerprint"] != fingerprint:
            return None
        paths = [directory / f"{field}.npy" for field in _FIELDS]
        if meta["crc32"] != {path.name: _checksum(path) for path in paths}:
            return None
        mapped = [np.load(path, mmap_mode="c", allow_pickle=False) for path in paths]
        if {field: list(array.shape) for field, array in zip(_FIELDS, mapped, strict=True)} != meta["shapes"]:
            return None
        train_images, train_labels, test_images, test_labels = mapped
        arrays = Arrays(train_images, train_labels, test_images, test_labels, tuple(meta["classes"]))
        return None if problem_of(arrays) else arrays
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, AttributeError, SyntaxError, EOFError):
        return None


def _checksum(path: Path) -> int:
    crc32 = 0
    with open_regular(path) as file:
        while chunk := file.read(1 << 20):
            crc32 = zlib.crc32(chunk, crc32)
    return crc32


def _short(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:12]
