"""The resident cache: built once, verified, shared, rebuilt when it must be; and the list of data sets."""

import json
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch

from bpf.data import cache, store
from bpf.data.base import Arrays, Dataset
from bpf.errors import RunError, UsageError
from bpf.registry import DATASETS, Registry

ROOT = Path(__file__).parents[1]
BUILT_IN = {
    "digits": "bpf.data.digits:Digits",
    "mnist": "bpf.data.torchvision_sets:Mnist",
    "folder": "bpf.data.own:Folder",
    "npz": "bpf.data.own:Npz",
}


def arrays(value: int = 0, size: int = 4) -> Arrays:
    labels = np.arange(size, dtype=np.int64) % 2
    images = np.full((size, 1, 2, 3), value, dtype=np.uint8)
    return Arrays(images, labels, images[:2], labels[:2], ("a", "b"))


class Toy(Dataset):
    """A toy."""

    version = "1"
    reads = 0
    result = arrays()

    def present(self) -> bool:
        return False

    def instructions(self) -> str:
        return "None."

    def fingerprint(self) -> str:
        return self.version

    def read(self) -> Arrays:
        type(self).reads += 1
        return self.result


class Plugins:
    """Entry points that name classes of this file, or built-in ones, without an installation."""

    def __init__(self, **targets: object) -> None:
        self.targets = targets

    def __call__(self, group: str) -> list[metadata.EntryPoint]:
        return [_EntryPoint(name, target, group) for name, target in self.targets.items()]


class _EntryPoint(metadata.EntryPoint):
    def __init__(self, name: str, target: object, group: str) -> None:
        super().__init__(name, target if isinstance(target, str) else "bpf.data.base:Dataset", group)
        vars(self).update(target=target)

    def load(self):
        target = vars(self)["target"]
        return super().load() if isinstance(target, str) else target


def registry(**targets: object) -> Registry:
    return Registry(DATASETS, Plugins(**targets))


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(Toy, "reads", 0)
    monkeypatch.setattr(Toy, "version", "1")
    monkeypatch.setattr(Toy, "result", arrays())
    monkeypatch.delenv("BPF_CACHE_DIR", raising=False)
    return registry(toy=Toy)


def entries(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir())


def test_the_second_load_maps_the_files_of_the_first(toy, tmp_path):
    first = cache.load("toy", tmp_path, registry=toy)
    second = cache.load("toy", tmp_path, registry=toy)
    assert Toy.reads == 1
    assert second.train_images.dtype == torch.uint8
    assert second.train_labels.dtype == torch.int64
    assert torch.equal(first.train_images, second.train_images)
    assert torch.equal(second.train_labels, torch.tensor([0, 1, 0, 1]))
    assert torch.equal(second.test_labels, torch.tensor([0, 1]))
    assert (second.name, second.classes, second.shape) == ("toy", ("a", "b"), (1, 2, 3))
    assert len(entries(tmp_path / "bpf-cache")) == 1


def test_the_files_are_mapped_not_copied(tmp_path):
    mapped = store.fetch(store.entry(tmp_path, "toy", "", "1"), "1", arrays)
    assert all(isinstance(getattr(mapped, f"{part}_images"), np.memmap) for part in ("train", "test"))


def test_writing_to_a_tensor_does_not_reach_the_cache(toy, tmp_path):
    cache.load("toy", tmp_path, registry=toy).train_images.fill_(9)
    assert cache.load("toy", tmp_path, registry=toy).train_images.max() == 0
    assert Toy.reads == 1


def test_the_cache_moves_with_the_environment_variable(toy, tmp_path, monkeypatch):
    monkeypatch.setenv("BPF_CACHE_DIR", str(tmp_path / "elsewhere"))
    cache.load("toy", tmp_path / "data", registry=toy)
    assert len(entries(tmp_path / "elsewhere")) == 1
    assert not (tmp_path / "data").exists()


def test_a_new_fingerprint_replaces_the_older_entry(toy, tmp_path, monkeypatch):
    cache.load("toy", tmp_path, registry=toy)
    old = entries(tmp_path / "bpf-cache")
    monkeypatch.setattr(Toy, "version", "2")
    monkeypatch.setattr(Toy, "result", arrays(7))
    assert cache.load("toy", tmp_path, registry=toy).train_images.max() == 7
    new = entries(tmp_path / "bpf-cache")
    assert len(new) == 1
    assert new != old


def flip_a_byte(entry: Path) -> None:
    content = bytearray((entry / "train_images.npy").read_bytes())
    content[-1] ^= 1
    (entry / "train_images.npy").write_bytes(content)


def truncate(entry: Path) -> None:
    content = (entry / "test_labels.npy").read_bytes()
    (entry / "test_labels.npy").write_bytes(content[:-8])


def spoil_meta(entry: Path) -> None:
    (entry / "meta.json").write_text("{", encoding="utf-8")


def older_format(entry: Path) -> None:
    meta = json.loads((entry / "meta.json").read_text(encoding="utf-8"))
    (entry / "meta.json").write_text(json.dumps(meta | {"format": 0}), encoding="utf-8")


def remove_a_file(entry: Path) -> None:
    (entry / "train_labels.npy").unlink()


@pytest.mark.parametrize("damage", [flip_a_byte, truncate, spoil_meta, older_format, remove_a_file])
def test_a_damaged_entry_is_built_anew(toy, tmp_path, damage):
    cache.load("toy", tmp_path, registry=toy)
    damage(entries(tmp_path / "bpf-cache")[0])
    data = cache.load("toy", tmp_path, registry=toy)
    assert Toy.reads == 2
    assert torch.equal(data.train_images, torch.from_numpy(Toy.result.train_images))
    assert torch.equal(data.train_labels, torch.from_numpy(Toy.result.train_labels))
    cache.load("toy", tmp_path, registry=toy)
    assert Toy.reads == 2


def test_what_a_killed_process_left_is_swept_away(toy, tmp_path):
    cache.load("toy", tmp_path, registry=toy)
    entry = entries(tmp_path / "bpf-cache")[0]
    leftover = entry.with_name(f".{entry.name.rpartition('-')[0]}-12345678")
    entry.rename(leftover)
    cache.load("toy", tmp_path, registry=toy)
    assert entries(tmp_path / "bpf-cache") == [entry]


BUILDER = """
import sys
from pathlib import Path
import numpy as np
from bpf.data import store
from bpf.data.base import Arrays

def build():
    with open(sys.argv[2], "a") as log:
        log.write("built ")
    images, labels = np.zeros((500_000, 1, 4, 4), np.uint8), np.zeros(500_000, np.int64)
    return Arrays(images, labels, images, labels, ("a", "b"))

root = Path(sys.argv[1])
sys.stdin.read()
print(store.fetch(store.entry(root, "toy", "", "1"), "1", build).train_images.shape)
"""


def test_processes_that_start_together_build_once(tmp_path):
    command = [sys.executable, "-c", BUILDER, str(tmp_path / "cache"), str(tmp_path / "log")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, cwd=ROOT, **pipes) for _ in range(3)]
    for process in processes:
        process.stdin.close()
    outputs = [process.stdout.read() for process in processes]
    for process in processes:
        process.stdout.close()
        assert process.wait() == 0
    assert outputs == ["(500000, 1, 4, 4)\n"] * 3
    assert (tmp_path / "log").read_text() == "built "


def test_a_place_that_may_not_be_written_is_named(toy, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("BPF_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(UsageError) as caught:
        cache.load("toy", tmp_path, registry=toy)
    assert str(caught.value) == (
        f"Cannot keep the data cache in {tmp_path}/file/cache: Not a directory. "
        "Choose another place with --data-dir or the environment variable BPF_CACHE_DIR."
    )


def test_a_full_disk_is_a_failure_and_leaves_nothing_behind(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(Toy, "result", arrays(size=100_000))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        with pytest.raises(RunError, match=r"Choose another place with --data-dir or .* BPF_CACHE_DIR\.") as caught:
            cache.load("toy", tmp_path, registry=toy)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(caught.value).startswith(f"Cannot keep the data cache in {tmp_path}/bpf-cache: ")
    assert not (tmp_path / "bpf-cache").exists()


def test_digits_write_nothing(tmp_path):
    data = cache.load("digits", tmp_path / "data", registry=registry(**BUILT_IN))
    assert data.train_images.shape == (1437, 1, 8, 8)
    assert list(tmp_path.iterdir()) == []


WRONG = {
    "float images": (
        {"train_images": np.zeros((4, 1, 2, 3))},
        "train_images is float64 with 4 dimensions; it must be a NumPy array, uint8 [N, C, H, W] with values 0 to 255.",
    ),
    "flat images": (
        {"test_images": np.zeros((2, 6), np.uint8)},
        "test_images is uint8 with 2 dimensions; it must be a NumPy array, uint8 [N, C, H, W] with values 0 to 255.",
    ),
    "int32 labels": (
        {"train_labels": np.zeros(4, np.int32)},
        "train_labels is int32 [4]; it must be int64 [4], one label for each image.",
    ),
    "too few labels": (
        {"train_labels": np.zeros(3, np.int64)},
        "train_labels is int64 [3]; it must be int64 [4], one label for each image.",
    ),
    "empty test": (
        {"test_images": np.zeros((0, 1, 2, 3), np.uint8), "test_labels": np.zeros(0, np.int64)},
        "test_images is empty [0, 1, 2, 3]; at least one example is needed.",
    ),
    "label too high": (
        {"train_labels": np.array([0, 1, 2, 0])},
        "train_labels holds values from 0 to 2; labels of 2 classes run from 0 to 1.",
    ),
    "negative label": (
        {"test_labels": np.array([-1, 0])},
        "test_labels holds values from -1 to 0; labels of 2 classes run from 0 to 1.",
    ),
    "one class": ({"classes": ("a",)}, "it has 1 classes; a classification task needs at least 2."),
    "same name": (
        {"classes": ("a", "a")},
        "the class name 'a' occurs more than once; give every class its own name.",
    ),
    "two shapes": (
        {"test_images": np.zeros((2, 1, 3, 3), np.uint8)},
        "training images are [1, 2, 3] and test images [1, 3, 3]; both must have one shape.",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_arrays_against_the_contract_are_refused_and_not_kept(toy, tmp_path, monkeypatch, case):
    changes, problem = WRONG[case]
    monkeypatch.setattr(Toy, "result", Arrays(**(vars(arrays()) | changes)))
    with pytest.raises(UsageError) as caught:
        cache.load("toy", tmp_path, registry=toy)
    assert str(caught.value) == f"The dataset 'toy' of no distribution cannot be used: {problem}"
    assert not (tmp_path / "bpf-cache").exists()


def test_a_declared_shape_must_be_kept(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(Toy, "shape", (3, 2, 2))
    with pytest.raises(UsageError) as caught:
        cache.load("toy", tmp_path, registry=toy)
    assert str(caught.value) == (
        "The dataset 'toy' of no distribution cannot be used: its images are [1, 2, 3], but it declares [3, 2, 2]; "
        "one of the two is wrong."
    )


def test_a_plugin_that_fails_is_named(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(Toy, "result", None)
    with pytest.raises(UsageError) as caught:
        cache.load("toy", tmp_path, registry=toy)
    assert str(caught.value) == (
        "The dataset 'toy' of no distribution cannot be used: reading it gives NoneType; it must give "
        "bpf.data.base.Arrays."
    )


@pytest.mark.parametrize(
    ("name", "image_size", "message"),
    [
        ("mnst", None, "Unknown dataset 'mnst'. Did you mean 'mnist'?"),
        ("mnist:foo", None, "The dataset 'mnist' takes no path; write 'mnist' instead of 'mnist:foo'."),
        ("folder", None, "The dataset 'folder' needs a path; write folder:PATH."),
        ("npz:", None, "The dataset 'npz' needs a path; write npz:PATH."),
        (
            "mnist",
            32,
            "The dataset 'mnist' has images of one size; leave out --image-size. It works with: folder.",
        ),
        ("folder:x", 0, "The image size is 0; it must be at least 1 pixel."),
    ],
)
def test_a_name_or_size_that_cannot_work_says_what_would(tmp_path, name, image_size, message):
    with pytest.raises(UsageError) as caught:
        cache.load(name, tmp_path, image_size, registry(**BUILT_IN))
    assert str(caught.value) == message


def test_the_list_tells_what_is_known(tmp_path):
    infos = cache.available(registry(**BUILT_IN), tmp_path)
    assert [info.name for info in infos] == ["digits", "folder", "mnist", "npz"]
    digits, folder, mnist, _ = infos
    assert (mnist.shape, mnist.class_count, mnist.train_size, mnist.test_size) == (
        (1, 28, 28),
        10,
        60_000,
        10_000,
    )
    assert mnist.summary == "Handwritten digits, 28x28 grey (LeCun et al. 1998)"
    assert (digits.on_disk, folder.on_disk, mnist.on_disk) == (True, False, False)
    assert (folder.takes_source, folder.resizable, mnist.resizable) == (True, True, False)
    assert [info.problem for info in infos] == [""] * 4
    assert mnist.instructions == (
        "To need no download, put train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, "
        f"t10k-images-idx3-ubyte.gz, t10k-labels-idx1-ubyte.gz into {tmp_path}/MNIST/raw."
    )


def test_a_cached_copy_counts_as_on_disk(toy, tmp_path):
    assert not cache.describe("toy", tmp_path, toy).on_disk
    cache.load("toy", tmp_path, registry=toy)
    assert cache.describe("toy", tmp_path, toy).on_disk


def test_describe_takes_a_name_with_its_path(tmp_path):
    known = registry(**BUILT_IN)
    assert cache.describe(f"folder:{tmp_path}", tmp_path, known).on_disk
    assert not cache.describe(f"folder:{tmp_path}/none", tmp_path, known).on_disk
    with pytest.raises(UsageError, match=r"^Unknown dataset 'digit'\. Did you mean 'digits'\?$"):
        cache.describe("digit", tmp_path, known)


def test_broken_plugins_stay_in_the_list_with_their_problem(tmp_path):
    class Unfinished(Dataset):
        """Not done."""

        def present(self) -> bool:
            raise ValueError("not done")

        def instructions(self) -> str:
            return ""

        def fingerprint(self) -> str:
            return ""

        def read(self) -> Arrays:
            raise ValueError("not done")

    known = registry(absent="no_such_module:Set", other=dict, unfinished=Unfinished, digits=BUILT_IN["digits"])
    assert {info.name: info.problem for info in cache.available(known, tmp_path)} == {
        "absent": "module no_such_module is not installed",
        "digits": "",
        "other": "The dataset 'other' of no distribution (bpf.data.base:Dataset) cannot be used: it is no subclass of "
        "bpf.data.base.Dataset. Mend, update or reinstall what it is of, or leave 'other' out.",
        "unfinished": "ValueError: not done",
    }


LISTING = """
import sys
from importlib import metadata
from pathlib import Path
from bpf.data import cache
from bpf.registry import Registry

points = [metadata.EntryPoint(f"n{i}", target, "bpf.datasets") for i, target in enumerate(sys.argv[2:])]
infos = cache.available(Registry("bpf.datasets", lambda group: points), Path(sys.argv[1]))
print(len(infos), sorted({"torch", "torchvision", "PIL", "filelock"} & set(sys.modules)))
"""


def test_listing_imports_neither_torch_nor_torchvision(tmp_path):
    command = [sys.executable, "-c", LISTING, str(tmp_path), *BUILT_IN.values()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "4 []\n"


def test_names_from_plugins_make_safe_directories(tmp_path):
    assert store.entry(tmp_path, "../a b", "", "1").parent == tmp_path
