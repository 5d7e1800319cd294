"""Your own data: folders of images and NumPy archives."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bpf.data import cache
from bpf.data.images import decode
from bpf.data.own import Folder, Npz
from bpf.errors import UsageError
from bpf.registry import DATASETS, Registry

LAYOUT = "Put images into PATH/train/CLASS and PATH/test/CLASS, or into PATH/CLASS to have them split 80/20."
SAVE = (
    "Save uint8 images and whole-number labels with "
    "numpy.savez(PATH, train_images=, train_labels=, test_images=, test_labels=)."
)


def picture(path: Path, colour, size=(4, 3), mode="RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


def tree(root: Path, per_class: int = 5, **options) -> Path:
    """PATH/CLASS/*.png with the class in red and the number in green."""
    for label, name in enumerate(["ant", "bee"]):
        for index in range(per_class):
            picture(root / name / f"{index}.png", (label, index, 0), **options)
    return root


def folder(path: Path, image_size: int | None = None) -> Folder:
    return Folder(path, str(path), image_size)


def refusal(dataset) -> str:
    with pytest.raises(UsageError) as caught:
        dataset.read()
    return str(caught.value)


def test_a_tree_with_train_and_test_is_read_in_order(tmp_path):
    tree(tmp_path / "train", per_class=3)
    tree(tmp_path / "test", per_class=2)
    arrays = folder(tmp_path).read()
    assert arrays.classes == ("ant", "bee")
    assert arrays.train_images.shape == (6, 3, 3, 4)
    assert arrays.train_images[:, :2, 0, 0].tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert arrays.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert arrays.test_labels.tolist() == [0, 0, 1, 1]


def test_a_plain_tree_is_split_80_to_20_per_class_and_the_same_each_time(tmp_path):
    tree(tmp_path, per_class=10)
    arrays, again = folder(tmp_path).read(), folder(tmp_path).read()
    assert np.bincount(arrays.train_labels).tolist() == [8, 8]
    assert np.bincount(arrays.test_labels).tolist() == [2, 2]
    assert np.array_equal(arrays.test_images, again.test_images)
    seen = np.concatenate([arrays.train_images, arrays.test_images])[:, :2, 0, 0]
    assert sorted(map(tuple, seen)) == [(label, index) for label in range(2) for index in range(10)]
    assert np.array_equal(arrays.train_images[:, 0, 0, 0], arrays.train_labels)


def test_all_grey_images_keep_one_channel(tmp_path):
    tree(tmp_path)
    for path in tmp_path.rglob("*.png"):
        picture(path, 77, mode="L")
    assert folder(tmp_path).read().train_images.shape == (8, 1, 3, 4)
    assert folder(tmp_path).read().train_images.min() == 77


def test_a_grey_image_among_coloured_ones_gets_three_equal_channels(tmp_path):
    tree(tmp_path)
    picture(tmp_path / "ant" / "grey.png", 200, mode="L")
    images = folder(tmp_path).read().train_images
    assert [200, 200, 200] in images[:, :, 0, 0].tolist()


@pytest.mark.parametrize(
    ("mode", "colour", "suffix"),
    [("RGBA", (9, 8, 7, 0), "png"), ("P", 0, "png"), ("RGB", (9, 8, 7), "BMP"), ("RGB", (9, 8, 7), "webp")],
)
def test_other_modes_and_formats_become_rgb(tmp_path, mode, colour, suffix):
    for name in ("ant", "bee"):
        for index in range(2):
            path = tmp_path / name / f"{index}.{suffix}"
            path.parent.mkdir(exist_ok=True)
            image = Image.new(mode, (4, 4), colour)
            if mode == "P":
                image.putpalette([9, 8, 7])
                image.info["transparency"] = b"\0"
            image.save(path, lossless=True)
    assert (
        folder(tmp_path).read().train_images[:, :, 0, 0].tolist() == [[9, 8, 7]] * 3
    )  # one of each two stays in training, and the test takes one


def test_image_size_keeps_the_aspect_ratio_and_pads_with_black(tmp_path):
    tree(tmp_path, size=(40, 20))
    for path in tmp_path.rglob("*.png"):
        picture(path, (250, 250, 250), size=(40, 20))
    picture(tmp_path / "ant" / "0.png", (250, 250, 250), size=(7, 7))
    images = folder(tmp_path, 8).read().train_images
    assert images.shape == (8, 3, 8, 8)
    wide = images[-1, 0]
    assert wide[:2].max() == 0
    assert wide[6:].max() == 0
    assert wide[2:6].min() == 250


def test_images_fit_sizes_that_are_not_square(tmp_path):
    """A square in the middle of 4 rows and 6 columns, and in the middle of 6 rows and 4 columns."""
    picture(tmp_path / "a.png", 255, (8, 8), "L")
    wide, high = (decode("x", [str(tmp_path / "a.png")], size, keep_grey=True)[0, 0] for size in ((4, 6), (6, 4)))
    assert wide.tolist() == [[0, 255, 255, 255, 255, 0]] * 4
    assert high.tolist() == wide.T.tolist()


def test_jpegs_are_scaled_from_enough_detail(tmp_path):
    """A JPEG is decoded at reduced size where that suffices; the result must stay close to the full one."""
    blocks = np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8)
    image = Image.fromarray(np.stack([blocks.repeat(4, 0).repeat(4, 1)] * 3, -1))
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        for index in range(2):
            image.save(tmp_path / name / f"{index}.jpg", quality=95)
    got = folder(tmp_path, 16).read().train_images[0, 0].astype(int)
    want = np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR))[:, :, 0].astype(int)
    assert np.abs(got - want).mean() < 8


def test_hidden_files_and_files_without_an_image_extension_are_ignored(tmp_path):
    tree(tmp_path)
    (tmp_path / "ant" / ".hidden.png").write_text("no image")
    (tmp_path / "ant" / "notes.txt").write_text("no image")
    (tmp_path / ".thumbnails").mkdir()
    assert len(folder(tmp_path).read().train_labels) == 8


def test_unreadable_images_are_all_counted_and_five_are_named(tmp_path):
    tree(tmp_path, per_class=4)
    for index in range(6):
        (tmp_path / "ant" / f"bad{index}.jpg").write_text("no image")
    content = (tmp_path / "bee" / "0.png").read_bytes()
    (tmp_path / "bee" / "0.png").write_bytes(content[:-30])
    named = "".join(f"\n  {tmp_path}/ant/bad{index}.jpg: is not an image" for index in range(5))
    assert refusal(folder(tmp_path)) == (
        f"7 of the 14 images of folder:{tmp_path} cannot be read. Replace or remove them:{named}\n  and 2 more"
    )


def test_a_truncated_image_and_a_16_bit_image_say_why(tmp_path):
    tree(tmp_path)
    picture(tmp_path / "ant" / "cut.jpg", (1, 2, 3), size=(64, 64))
    content = (tmp_path / "ant" / "cut.jpg").read_bytes()
    (tmp_path / "ant" / "cut.jpg").write_bytes(content[:-40])
    picture(tmp_path / "bee" / "wide.png", 1000, mode="I;16")
    message = refusal(folder(tmp_path))
    assert message.startswith(f"2 of the 12 images of folder:{tmp_path} cannot be read. Replace or remove them:\n")
    assert f"\n  {tmp_path}/ant/cut.jpg: image file is truncated (" in message
    assert message.endswith(f"\n  {tmp_path}/bee/wide.png: has more than 8 bits per channel (mode I;16)")


def test_differing_sizes_point_to_image_size(tmp_path):
    tree(tmp_path, per_class=2)
    picture(tmp_path / "bee" / "9.png", (1, 1, 1), size=(5, 3))
    assert refusal(folder(tmp_path)) == (
        f"The images of folder:{tmp_path} differ in size; give --image-size to scale them all to one size. "
        f"{tmp_path}/ant/0.png is 4x3, unlike 1 of the others:\n  {tmp_path}/bee/9.png: 5x3"
    )


def test_wrong_layouts_say_what_is_missing(tmp_path):
    path = tmp_path / "set"
    assert refusal(folder(path)) == f"folder:{path}: there is no such path. {LAYOUT}"
    path.mkdir()
    assert refusal(folder(path)) == f"folder:{path}: {path} has no class directories. {LAYOUT}"
    tree(path / "train")
    assert refusal(folder(path)) == f"folder:{path} has train/ but no test/. {LAYOUT}"
    tree(path / "test")
    picture(path / "test" / "cat" / "0.png", (0, 0, 0))
    assert refusal(folder(path)) == (
        f"folder:{path}: train/ and test/ must have the same classes; only one of them has cat."
    )
    (path / "train" / "cat").mkdir()
    assert refusal(folder(path)) == (
        f"folder:{path}: {path}/train/cat has no images. Add some or remove the directory; recognised are "
        ".bmp .gif .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff .webp."
    )


def test_the_fingerprint_follows_every_file(tmp_path):
    tree(tmp_path)
    seen = {folder(tmp_path).fingerprint()}
    assert folder(tmp_path).fingerprint() in seen
    os.utime(tmp_path / "ant" / "0.png", ns=(1, 1))
    seen.add(folder(tmp_path).fingerprint())
    (tmp_path / "bee" / "0.png").rename(tmp_path / "bee" / "00.png")
    seen.add(folder(tmp_path).fingerprint())
    (tmp_path / "bee" / "00.png").unlink()
    seen.add(folder(tmp_path).fingerprint())
    assert len(seen) == 4


def test_image_sizes_and_paths_are_cached_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("BPF_CACHE_DIR", str(tmp_path / "cache"))
    path = tree(tmp_path / "set")
    known = Registry(DATASETS, _entry_points)
    assert cache.load(f"folder:{path}", tmp_path, registry=known).shape == (3, 3, 4)
    assert cache.load(f"folder:{path}", tmp_path, 2, known).shape == (3, 2, 2)
    assert cache.load(f"folder:{tree(tmp_path / 'other')}", tmp_path, registry=known).shape == (3, 3, 4)
    assert len([entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()]) == 3


def _entry_points(group):
    from importlib.metadata import EntryPoint

    return [EntryPoint("folder", "bpf.data.own:Folder", group)]


def test_the_real_cifar10_jpegs(tmp_path):
    path = os.environ.get("BPF_TEST_CIFAR10_JPEG")
    if not path:
        pytest.skip("BPF_TEST_CIFAR10_JPEG does not name the unpacked CIFAR-10 JPEG tree")
    arrays = Folder(tmp_path, path).read()
    assert arrays.train_images.shape == (50_000, 3, 32, 32)
    assert np.bincount(arrays.train_labels).tolist() == [5000] * 10
    assert np.bincount(arrays.test_labels).tolist() == [1000] * 10
    assert arrays.classes[0] == "airplane"
    # the means over CIFAR-10's training set, as published everywhere; JPEG moves them by less than 0.01
    means = arrays.train_images.mean((0, 2, 3)) / 255
    np.testing.assert_allclose(means, [0.4914, 0.4822, 0.4465], atol=0.01)


ARRAYS = {
    "train_images": np.arange(4 * 2 * 3, dtype=np.uint8).reshape(4, 2, 3),
    "train_labels": np.array([0, 1, 2, 1]),
    "test_images": np.zeros((2, 2, 3), np.uint8),
    "test_labels": np.array([0, 2]),
}


def npz(tmp_path: Path, **changes) -> Npz:
    path = tmp_path / "set.npz"
    np.savez(path, **{key: value for key, value in (ARRAYS | changes).items() if value is not None})
    return Npz(tmp_path, str(path))


def test_an_archive_is_read(tmp_path):
    arrays = npz(tmp_path).read()
    assert np.array_equal(arrays.train_images, ARRAYS["train_images"][:, None])
    assert arrays.train_labels.dtype == np.int64
    assert arrays.test_labels.tolist() == [0, 2]
    assert arrays.classes == ("0", "1", "2")


def test_keras_names_channels_last_and_column_labels_are_read(tmp_path):
    images = np.arange(4 * 2 * 5 * 3, dtype=np.uint8).reshape(4, 2, 5, 3)
    arrays = npz(
        tmp_path,
        **dict.fromkeys(ARRAYS),
        x_train=images,
        y_train=np.array([[0], [1], [1], [0]], np.uint8),
        x_test=images,
        y_test=np.array([[1], [1], [1], [0]], np.uint8),
        classes=np.array(["cat", "dog"]),
    ).read()
    assert np.array_equal(arrays.train_images, images.transpose(0, 3, 1, 2))
    assert arrays.train_labels.tolist() == [0, 1, 1, 0]
    assert arrays.classes == ("cat", "dog")


def test_channels_first_is_kept(tmp_path):
    images = np.arange(4 * 3 * 5 * 2, dtype=np.uint8).reshape(4, 3, 5, 2)
    assert np.array_equal(npz(tmp_path, train_images=images).read().train_images, images)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"train_images": np.zeros((4, 2, 3))}, ": train_images is float64; images must be uint8, 0 to 255."),
        (
            {"test_images": np.zeros((2, 7, 3, 5), np.uint8)},
            ": test_images has the shape [2, 7, 3, 5]; images must be [N, H, W], [N, H, W, C] or "
            "[N, C, H, W] with 1 or 3 channels.",
        ),
        ({"train_labels": np.eye(4)}, ": train_labels is float64 [4, 4]; labels must be whole numbers [N]."),
        (
            {"train_labels": np.eye(4, dtype=int)},
            ": train_labels is int64 [4, 4]; labels must be whole numbers [N].",
        ),
        (
            {"test_labels": np.array([0, 10**9])},
            ": a label is 1000000000, with 4 training examples; number the classes from 0 without gaps.",
        ),
        ({"test_images": None, "train_labels": None}, f" lacks train_labels, test_images. {SAVE}"),
        ({"train_labels": np.array([0, 1, None, 2])}, f" holds pickled objects. {SAVE}"),
    ],
)
def test_unusable_archives_say_what_is_wrong(tmp_path, changes, problem):
    assert refusal(npz(tmp_path, **changes)) == f"npz:{tmp_path}/set.npz{problem}"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def text(path: Path) -> None:
    path.write_text("no archive")


def single_array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[200] ^= 255
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, text, single_array, flipped])
def test_damaged_archives_are_refused(tmp_path, damage):
    dataset = npz(tmp_path)
    damage(tmp_path / "set.npz")
    expected = f"npz:{tmp_path}/set.npz is damaged or no .npz archive. {SAVE}"
    assert refusal(dataset) == expected


def test_a_missing_archive_is_named_and_a_changed_one_gets_a_new_fingerprint(tmp_path):
    missing = Npz(tmp_path, f"{tmp_path}/none.npz")
    assert not missing.present()
    assert refusal(missing) == f"npz:{tmp_path}/none.npz: there is no such path. {SAVE}"
    dataset = npz(tmp_path)
    before = dataset.fingerprint()
    os.utime(tmp_path / "set.npz", ns=(1, 1))
    assert dataset.fingerprint() != before
