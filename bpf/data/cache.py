"""Data sets by name: the whole set as resident uint8 tensors, and what `bpf datasets` tells about each."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from bpf.data import store
from bpf.data.base import Arrays, Dataset, Extent, misdeclared, validate
from bpf.errors import BpfError, RunError, UsageError
from bpf.files import at_home
from bpf.registry import DATASETS, Plugin, Registry

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Data:
    """A data set as tensors: images uint8 [N, C, H, W] in 0..255, labels int64 [N] in 0..len(classes)-1.

    Cached sets are memory-mapped, so that all processes share one copy; writing to a tensor changes this
    process's view of it only.
    """

    name: str
    train_images: "Tensor"
    train_labels: "Tensor"
    test_images: "Tensor"
    test_labels: "Tensor"
    classes: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        channels, height, width = self.train_images.shape[1:]
        return channels, height, width

    def to(self, device: "torch.device") -> "Data":
        """The same set with its tensors on `device`, where all cohorts then find it."""
        names = ("train_images", "train_labels", "test_images", "test_labels")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


@dataclass(frozen=True)
class DatasetInfo:
    """What can be said of a data set without reading it; None where its source decides.

    `on_disk`: no network is needed, because the raw files or a cached copy are there. `problem` says why the
    set cannot work, or is empty. `instructions`: what to put where by hand.
    """

    name: str
    summary: str
    distribution: str
    version: str
    shape: tuple[int, int, int] | None = None
    class_count: int | None = None
    train_size: int | None = None
    test_size: int | None = None
    takes_source: bool = False
    resizable: bool = False
    on_disk: bool = False
    problem: str = ""
    instructions: str = ""


def load(name: str, data_dir: Path, image_size: int | None = None, registry: Registry | None = None) -> Data:
    """The data set `name`, such as `mnist` or `folder:/path`, from the cache if it has been read before.

    The cache is `$BPF_CACHE_DIR`, or `bpf-cache` in `data_dir`. `image_size` (pixels) scales the images of
    sets that allow it. Raises UsageError for unknown names, impossible sizes, missing or damaged files and
    places that may not be written, RunError for a full disk or a data set that fails.
    """
    import torch

    registry = registry or Registry(DATASETS)
    dataset = open_dataset(name, data_dir, image_size, registry)
    if dataset.cached:
        fingerprint = _fingerprint(registry, name, dataset)
        arrays = store.fetch(_entry(name, dataset, fingerprint), fingerprint, lambda: _read(registry, name, dataset))
    else:
        arrays = _read(registry, name, dataset)
    return Data(
        name,
        torch.from_numpy(arrays.train_images),
        torch.from_numpy(arrays.train_labels),
        torch.from_numpy(arrays.test_images),
        torch.from_numpy(arrays.test_labels),
        arrays.classes,
    )


def extent(name: str, data_dir: Path, image_size: int | None = None, registry: Registry | None = None) -> Extent | None:
    """How large a data set is, as its class says or a cached copy; None where only reading it would tell.

    Raises UsageError as `open_dataset` does, and for a source that is missing.
    """
    registry = registry or Registry(DATASETS)
    dataset = open_dataset(name, data_dir, image_size, registry)
    fingerprint = ""
    if dataset.takes_source:  # looks whether the source is there
        fingerprint = _fingerprint(registry, name, dataset)
    if dataset.shape and dataset.class_count and dataset.train_size:
        return Extent(dataset.shape, dataset.class_count, dataset.train_size)
    return store.peek(_entry(name, dataset, fingerprint), fingerprint) if fingerprint and dataset.cached else None


def open_dataset(name: str, data_dir: Path, image_size: int | None = None, registry: Registry | None = None) -> Dataset:
    """The data set `name`, not read yet. Raises UsageError for a name or size that cannot work."""
    registry = registry or Registry(DATASETS)
    plain, _, source = name.partition(":")
    kind = _kind(registry, plain)
    if source and not kind.takes_source:
        raise UsageError(f"The dataset {plain!r} takes no path; write {plain!r} instead of {name!r}.")
    if not source and kind.takes_source:
        raise UsageError(f"The dataset {plain!r} needs a path; write {plain}:PATH.")
    if image_size is not None and not kind.resizable:
        sizes = [other.name for other in available(registry, data_dir) if other.resizable]
        raise UsageError(
            f"The dataset {plain!r} has images of one size; leave out --image-size. "
            f"It works with: {', '.join(sizes) or 'none of the installed datasets'}."
        )
    if image_size is not None and image_size < 1:
        raise UsageError(f"The image size is {image_size}; it must be at least 1 pixel.")
    with _naming(registry, name, "Making"):
        return kind(data_dir, source or None, image_size)


def available(registry: Registry, data_dir: Path) -> list[DatasetInfo]:
    """Every installed data set, sorted by name; broken ones carry their problem. Imports no torch."""
    return [_info(registry, plugin, None, data_dir) for plugin in registry.plugins()]


def describe(name: str, data_dir: Path, registry: Registry | None = None) -> DatasetInfo:
    """One data set, `name` with or without a source. Raises UsageError for an unknown name."""
    registry = registry or Registry(DATASETS)
    plain, _, source = name.partition(":")
    return _info(registry, registry.describe(plain), source or None, data_dir)


def _info(registry: Registry, plugin: Plugin, source: str | None, data_dir: Path) -> DatasetInfo:
    known = (plugin.name, plugin.summary, plugin.distribution, plugin.version)
    if plugin.problem:
        return DatasetInfo(*known, problem=plugin.problem)
    try:
        kind = _kind(registry, plugin.name)
        dataset = kind(data_dir, source, None)
        return DatasetInfo(
            *known,
            shape=kind.shape,
            class_count=kind.class_count,
            train_size=kind.train_size,
            test_size=kind.test_size,
            takes_source=kind.takes_source,
            resizable=kind.resizable,
            on_disk=dataset.present() or _is_cached(plugin.name, dataset),
            instructions=dataset.instructions(),
        )
    except BpfError as error:
        return DatasetInfo(*known, problem=str(error))
    except (Exception, SystemExit) as error:  # one broken plugin must not break the list
        return DatasetInfo(*known, problem=f"{type(error).__name__}: {error}")


def _kind(registry: Registry, name: str) -> type[Dataset]:
    kind: type[Dataset] = registry.load_class(name, Dataset)
    if problem := misdeclared(kind):
        raise registry.refusal(name, problem)
    return kind


def _fingerprint(registry: Registry, name: str, dataset: Dataset) -> str:
    with _naming(registry, name, "Looking at"):
        return str(dataset.fingerprint())


def _read(registry: Registry, name: str, dataset: Dataset) -> Arrays:
    with _naming(registry, name, "Reading"):
        arrays = dataset.read()
        validate(f"{name!r}{_of(registry, name)}", arrays, dataset.shape if dataset.image_size is None else None)
    return arrays


@contextmanager
def _naming(registry: Registry, name: str, doing: str) -> Iterator[None]:
    """Whatever a plugin raises must not look like ours."""
    try:
        yield
    except (BpfError, MemoryError):
        raise
    except (Exception, SystemExit) as error:
        owner, reason = _of(registry, name), f"{type(error).__name__}: {error}"
        cure = ". Mend or update it" if owner else ""
        raise RunError(f"{doing} the dataset {name!r}{owner} failed: {reason}{cure}") from error


def _of(registry: Registry, name: str) -> str:
    """The distribution of a data set, where it is not bpf's."""
    owner = registry.called(name.partition(":")[0]).partition("' of ")[2]
    return f" of {owner}" if owner and not owner.startswith("bpf ") else ""


def _is_cached(name: str, dataset: Dataset) -> bool:
    if not dataset.cached or dataset.takes_source:
        return False
    return store.exists(_entry(name, dataset, dataset.fingerprint()))


def _entry(name: str, dataset: Dataset, fingerprint: str) -> Path:
    root = at_home(os.environ.get("BPF_CACHE_DIR") or dataset.data_dir / "bpf-cache")
    source = os.path.realpath(at_home(dataset.source)) if dataset.source else ""
    return store.entry(root, name.partition(":")[0], f"{source}\0{dataset.image_size}", fingerprint)
