"""The sets that torchvision downloads, from small files in their original formats, without a network."""

import gzip
import hashlib
import io
import os
import pickle
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image

from bpf.data import torchvision_sets as sets
from bpf.data.base import validate
from bpf.errors import UsageError

ROOT = Path(__file__).parents[1]
IDX = [f"{part}-ubyte" for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Every attempt fails at once; the list tells what was asked for."""
    asked: list[str] = []

    def refuse(request, *_, **__):
        asked.append(request.full_url)
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    return asked


def refusal(dataset) -> str:
    with pytest.raises(UsageError) as caught:
        dataset.read()
    return str(caught.value)


def visible(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if not path.name.startswith("."))


def idx(array: np.ndarray) -> bytes:
    """LeCun's format: two zero bytes, type 8 (uint8), the number of dimensions, the sizes, the values."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">i4").tobytes() + array.tobytes()


IMAGES = np.random.default_rng(0).integers(0, 256, (30, 28, 28), dtype=np.uint8)
LABELS = (np.arange(30) % 10).astype(np.uint8)
CONTENTS = dict(zip(IDX, map(idx, [IMAGES, LABELS, IMAGES[:10], LABELS[:10]]), strict=True))


def write_idx(folder: Path, packed: bool) -> None:
    folder.mkdir(parents=True)
    for name, content in CONTENTS.items():
        path = folder / (f"{name}.gz" if packed else name)
        path.write_bytes(gzip.compress(content) if packed else content)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("kind", "folder", "first"),
    [
        (sets.Mnist, "MNIST/raw", "zero"),
        (sets.FashionMnist, "FashionMNIST/raw", "T-shirt/top"),
        (sets.KuzushijiMnist, "KMNIST/raw", "o"),
    ],
)
def test_idx_files_are_read_without_a_network(tmp_path, no_network, kind, folder, first, packed):
    dataset = kind(tmp_path)
    assert not dataset.present()
    write_idx(tmp_path / folder, packed)
    assert dataset.present()
    arrays = dataset.read()
    validate("set", arrays, kind.shape)
    assert np.array_equal(arrays.train_images, IMAGES[:, None])
    assert arrays.train_labels.tolist() == LABELS.tolist()
    assert np.array_equal(arrays.test_images, IMAGES[:10, None])
    assert arrays.classes[0] == first
    assert len(arrays.classes) == kind.class_count
    assert no_network == []
    assert visible(tmp_path) == [folder.partition("/")[0]]
    assert set(visible(tmp_path / folder)) >= set(IDX)


def test_a_mixture_of_packed_and_plain_idx_files_is_read(tmp_path, no_network):
    write_idx(tmp_path / "MNIST/raw", packed=True)
    (tmp_path / "MNIST/raw" / f"{IDX[0]}.gz").unlink()
    (tmp_path / "MNIST/raw" / IDX[0]).write_bytes(CONTENTS[IDX[0]])
    assert sets.Mnist(tmp_path).present()
    assert np.array_equal(sets.Mnist(tmp_path).read().train_images, IMAGES[:, None])
    assert no_network == []


@pytest.mark.parametrize(
    ("kind", "name", "mirror"),
    [
        (sets.FashionMnist, "FashionMNIST", "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"),
        (sets.KuzushijiMnist, "KMNIST", "http://codh.rois.ac.jp/kmnist/dataset/kmnist/"),
    ],
)
def test_a_failed_download_says_which_files_go_where(tmp_path, no_network, kind, name, mirror):
    names = ", ".join(f"{name}.gz" for name in IDX)
    assert refusal(kind(tmp_path)) == (
        f"{name} cannot be downloaded (RuntimeError: Error downloading {IDX[0]}.gz: Tried {mirror}, "
        "got: <urlopen error no network>). "
        f"To need no download, put {names} into {tmp_path}/{name}/raw."
    )
    assert no_network == [f"{mirror}{IDX[0]}.gz"]
    assert visible(tmp_path) == []
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_what_a_killed_process_left_is_swept_away(tmp_path):
    leftover = tmp_path / ".bpf-MNIST" / "MNIST" / "raw"
    leftover.mkdir(parents=True)
    (leftover / IDX[0]).write_bytes(b"half a file")
    write_idx(tmp_path / "MNIST/raw", packed=True)
    assert np.array_equal(sets.Mnist(tmp_path).read().train_images, IMAGES[:, None])
    assert not (tmp_path / ".bpf-MNIST").exists()


@pytest.mark.parametrize(
    ("kind", "name", "archive", "folder"),
    [
        (sets.Cifar10, "CIFAR10", "cifar-10-python.tar.gz", ""),
        (sets.Cifar100, "CIFAR100", "cifar-100-python.tar.gz", ""),
        (sets.Caltech256, "Caltech256", "256_ObjectCategories.tar", "/caltech256"),
        (sets.EuroSat, "EuroSAT", "EuroSAT.zip", "/eurosat"),
    ],
)
def test_without_network_each_set_names_its_archive(tmp_path, kind, name, archive, folder):
    assert refusal(kind(tmp_path)) == (
        f"{name} cannot be downloaded (URLError: <urlopen error no network>). "
        f"To need no download, put {archive} into {tmp_path}{folder}."
    )


def test_a_damaged_archive_is_named(tmp_path):
    write_idx(tmp_path / "MNIST/raw", packed=True)
    broken = tmp_path / "MNIST/raw" / f"{IDX[2]}.gz"
    broken.write_bytes(broken.read_bytes()[:-9])
    assert f" {broken} cannot be used: damaged or not the official file. To need" in refusal(sets.Mnist(tmp_path))
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"half a download")
    assert refusal(sets.Cifar10(tmp_path)) == (
        f"CIFAR10 cannot be downloaded (URLError: <urlopen error no network>). "
        f"{tmp_path}/cifar-10-python.tar.gz cannot be used: damaged or not the official file. "
        f"To need no download, put cifar-10-python.tar.gz into {tmp_path}."
    )
    assert (tmp_path / "cifar-10-python.tar.gz").read_bytes() == b"half a download"


def test_damaged_raw_files_name_their_folder(tmp_path):
    write_idx(tmp_path / "MNIST/raw", packed=False)
    (tmp_path / "MNIST/raw" / IDX[0]).write_bytes(CONTENTS[IDX[0]][:1000])
    message = refusal(sets.Mnist(tmp_path))
    assert message.startswith(f"The files of MNIST in {tmp_path}/MNIST/raw are damaged or incomplete (")
    assert "). Delete that directory to have them fetched again. To need no download, put train-" in message


def test_a_place_that_may_not_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    assert refusal(sets.Cifar10(tmp_path / "file")) == (
        f"Cannot unpack CIFAR10 in {tmp_path}/file: File exists. Choose another place with --data-dir."
    )


def cifar_files(kind) -> dict[str, bytes]:
    """The batches of CIFAR as pickled dictionaries, 20 images each."""
    rows = np.random.default_rng(1).integers(0, 256, (20, 3072), dtype=np.uint8)
    labels = [index % kind.class_count for index in range(20)]
    key = "labels" if kind is sets.Cifar10 else "fine_labels"
    contents = {name: {"data": rows, key: labels} for name in kind.raw[:-1]}
    meta_key = "label_names" if kind is sets.Cifar10 else "fine_label_names"
    contents[kind.raw[-1]] = {meta_key: [f"class {index}" for index in range(kind.class_count)]}
    return {name: pickle.dumps(content, protocol=2) for name, content in contents.items()}


def trust(monkeypatch, kind, files: dict[str, bytes], archive: bytes = b"") -> None:
    """Make torchvision expect the checksums of the test's own files."""
    official = getattr(torchvision.datasets, kind.torchvision_class)
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    for attribute in ("train_list", "test_list"):
        monkeypatch.setattr(official, attribute, [[name, md5[name]] for name, _ in getattr(official, attribute)])
    monkeypatch.setattr(official, "meta", official.meta | {"md5": md5[kind.raw[-1]]})
    monkeypatch.setattr(official, "tgz_md5", hashlib.md5(archive).hexdigest())


def packed(folder: str, files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.mark.parametrize("kind", [sets.Cifar10, sets.Cifar100])
@pytest.mark.parametrize("as_archive", [True, False])
def test_cifar_batches_are_read_without_a_network(tmp_path, monkeypatch, no_network, kind, as_archive):
    files = cifar_files(kind)
    archive = packed(kind.folder, files)
    trust(monkeypatch, kind, files, archive)
    if as_archive:
        (tmp_path / kind.archives[0]).write_bytes(archive)
    else:
        (tmp_path / kind.folder).mkdir()
        for name, content in files.items():
            (tmp_path / kind.folder / name).write_bytes(content)
    assert kind(tmp_path).present()
    arrays = kind(tmp_path).read()
    validate("cifar", arrays, kind.shape)
    rows = pickle.loads(files[kind.raw[0]])["data"]
    assert np.array_equal(arrays.test_images.reshape(20, -1), rows)
    assert len(arrays.train_images) == 20 * (len(kind.raw) - 2)
    assert arrays.test_labels.tolist() == [index % kind.class_count for index in range(20)]
    assert arrays.classes[1] == "class 1"
    assert no_network == []
    assert {path.name for path in (tmp_path / kind.folder).iterdir()} == set(kind.raw)


def test_cifar_batches_with_wrong_checksums_are_not_unpickled(tmp_path, monkeypatch, no_network):
    files = cifar_files(sets.Cifar10)
    trust(monkeypatch, sets.Cifar10, files)
    folder = tmp_path / sets.Cifar10.folder
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "data_batch_3").write_bytes(b"cos\nabort\n(tR.")  # would end this process
    assert refusal(sets.Cifar10(tmp_path)) == (
        f"The files of CIFAR10 in {folder} are damaged or incomplete (RuntimeError: Dataset not found or "
        "corrupted. You can use download=True to download it). "
        "Delete that directory to have them fetched again. "
        f"To need no download, put cifar-10-python.tar.gz into {tmp_path}."
    )
    assert no_network == []


def test_eurosat_tiles_are_read_exactly_and_split_80_to_20(tmp_path, no_network):
    for label, name in enumerate(["Forest", "River"]):
        folder = tmp_path / "eurosat" / "2750" / name
        folder.mkdir(parents=True)
        for index in range(10):
            Image.new("RGB", (64, 64), (100 * label, 20 * index, 0)).save(folder / f"{name}_{index}.jpg", quality=100)
    arrays = sets.EuroSat(tmp_path).read()
    assert arrays.classes == ("Forest", "River")
    assert np.bincount(arrays.train_labels).tolist() == [8, 8]
    assert np.bincount(arrays.test_labels).tolist() == [2, 2]
    assert arrays.train_images.shape == (16, 3, 64, 64)
    assert np.abs(arrays.train_images[:, 0, 9, 9].astype(int) - 100 * arrays.train_labels).max() <= 2
    assert no_network == []


def test_an_archive_of_eurosat_is_unpacked_where_its_checksum_agrees(tmp_path, monkeypatch, no_network):
    picture = io.BytesIO()
    Image.new("RGB", (64, 64)).save(picture, "JPEG")
    (tmp_path / "eurosat").mkdir()
    with zipfile.ZipFile(tmp_path / "eurosat" / "EuroSAT.zip", "w") as archive:
        for name in ("Forest/1.jpg", "Forest/2.jpg", "River/1.jpg", "River/2.jpg"):
            archive.writestr(f"2750/{name}", picture.getvalue())
    assert "EuroSAT.zip cannot be used: damaged or not the official file." in refusal(sets.EuroSat(tmp_path))
    assert len(no_network) == 1
    monkeypatch.setattr("torchvision.datasets.utils.check_md5", lambda *_: True)
    arrays = sets.EuroSat(tmp_path).read()
    assert len(arrays.train_labels) + len(arrays.test_labels) == 4
    assert visible(tmp_path) == ["eurosat"]
    assert visible(tmp_path / "eurosat") == ["2750", "EuroSAT.zip"]


def test_caltech_photographs_become_squares_of_three_channels(tmp_path, no_network):
    root = tmp_path / "caltech256" / "256_ObjectCategories"
    for label, name in enumerate(["001.ak47", "002.american-flag"]):
        (root / name).mkdir(parents=True)
        (root / name / "RENAME2").touch()
        for index in range(1, 6):
            mode, colour = ("L", 200) if index == 1 else ("RGB", (200, 200, 200))
            Image.new(mode, (128, 64), colour).save(root / name / f"{label + 1:03d}_{index:04d}.jpg")
    arrays = sets.Caltech256(tmp_path).read()
    assert arrays.classes == ("ak47", "american-flag")
    assert arrays.train_images.shape == (8, 3, 64, 64)
    assert arrays.test_images.shape == (2, 3, 64, 64)
    assert arrays.train_images[:, :, :16].max() == 0
    assert arrays.train_images[:, :, 16:48].min() >= 198
    assert sets.Caltech256(tmp_path, image_size=32).read().train_images.shape == (8, 3, 32, 32)
    assert no_network == []


def test_caltech_photographs_that_are_missing_or_broken_are_named(tmp_path):
    root = tmp_path / "caltech256" / "256_ObjectCategories"
    for label, name in enumerate(["001.ak47", "002.american-flag"]):
        (root / name).mkdir(parents=True)
        for index in range(1, 3):
            Image.new("RGB", (8, 8)).save(root / name / f"{label + 1:03d}_{index:04d}.jpg")
    broken = root / "001.ak47" / "001_0002.jpg"
    broken.write_text("no image")
    assert refusal(sets.Caltech256(tmp_path)) == (
        f"1 of the 4 images of Caltech256 in {tmp_path}/caltech256 cannot be read. Replace or remove them:"
        f"\n  {broken}: is not an image"
    )


LATER_START = """
import sys
from importlib import metadata
from pathlib import Path
from bpf.data import cache
from bpf.registry import Registry

point = metadata.EntryPoint("mnist", "bpf.data.torchvision_sets:Mnist", "bpf.datasets")
data = cache.load("mnist", Path(sys.argv[1]), registry=Registry("bpf.datasets", lambda group: [point]))
print(len(data.train_labels), "torchvision" in sys.modules)
"""


def test_a_later_start_imports_no_torchvision_and_needs_no_raw_files(tmp_path, monkeypatch, capsys):
    write_idx(tmp_path / "MNIST/raw", packed=False)
    monkeypatch.setattr(sys, "argv", ["-c", str(tmp_path)])
    monkeypatch.delenv("BPF_CACHE_DIR", raising=False)
    exec(LATER_START, {})
    assert capsys.readouterr() == ("30 True\n", "")
    for path in (tmp_path / "MNIST/raw").iterdir():
        path.unlink()
    command = [sys.executable, "-c", LATER_START, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("30 False\n", "")


@pytest.mark.slow
def test_the_real_fashion_mnist(tmp_path, no_network):
    source = os.environ.get("BPF_TEST_FASHION_MNIST")
    if not source:
        pytest.skip("BPF_TEST_FASHION_MNIST does not name the directory with the four gzipped IDX files")
    (tmp_path / "FashionMNIST").mkdir()
    (tmp_path / "FashionMNIST" / "raw").symlink_to(source)
    dataset = sets.FashionMnist(tmp_path)
    assert dataset.present()
    (tmp_path / "FashionMNIST" / "raw").unlink()
    (tmp_path / "FashionMNIST" / "raw").mkdir()
    for name in IDX:
        (tmp_path / "FashionMNIST" / "raw" / f"{name}.gz").symlink_to(Path(source) / f"{name}.gz")
    arrays = dataset.read()
    validate("fmnist", arrays, dataset.shape)
    assert (len(arrays.train_labels), len(arrays.test_labels)) == (dataset.train_size, dataset.test_size)
    assert np.bincount(arrays.train_labels).tolist() == [6000] * 10
    # mean and standard deviation of the training pixels, as published everywhere
    pixels = arrays.train_images / np.float32(255)
    assert (round(float(pixels.mean()), 4), round(float(pixels.std()), 4)) == (0.286, 0.353)
    assert no_network == []
