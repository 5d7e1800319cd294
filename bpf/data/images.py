"""Decoding image files into one array: many small files at once, one shape for all."""

import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from bpf.data.base import Images
from bpf.errors import UsageError
from bpf.reading import open_regular

if TYPE_CHECKING:
    from PIL import Image

EXTENSIONS = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
)
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Of PIL's, those of the extensions: others could start programs."""
_GREY_MODES = frozenset({"1", "L", "LA"})
_WIDE_MODES = ("I", "F")  # also I;16 and its variants
_CHUNK = 128
_SHOWN = 5

Decoded = npt.NDArray[np.uint8] | str
Size = tuple[int, int]
"""Height and width in pixels."""


def decode(name: str, paths: Sequence[str], image_size: int | Size | None, *, keep_grey: bool) -> Images:
    """Decode image files to uint8 [N, C, H, W] in the order of `paths`.

    With `image_size` each image is scaled to fit a square of that many pixels, or (height, width), keeping its aspect
    ratio, and centred on black; without it all must have one size. C is 3, or 1 if `keep_grey` and every file is
    grey-scale. Grey images among coloured ones get three equal channels; transparency is dropped.

    Raises UsageError, naming `name` and the first 5 files, for files that are no readable 8-bit images and
    for sizes that differ.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    images: Images | None = None
    first = paths[0]
    broken: list[str] = []
    odd: list[str] = []
    coloured = False
    for index, pixels in enumerate(_decode_all(paths, size)):
        if isinstance(pixels, str):
            broken.append(f"{paths[index]}: {pixels}")
            continue
        if images is None:
            first, images = paths[index], np.empty((len(paths), 3, *pixels.shape[:2]), dtype=np.uint8)
        coloured = coloured or pixels.ndim == 3
        if pixels.shape[:2] != images.shape[2:]:
            odd.append(f"{paths[index]}: {_size(pixels.shape)}")
        else:
            images[index] = pixels if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    if broken or images is None:
        raise UsageError(
            f"{len(broken)} of the {len(paths)} images of {name} cannot be read. "
            f"Replace or remove them:{_listed(broken)}"
        )
    if odd:
        raise UsageError(
            f"The images of {name} differ in size; give --image-size to scale them all to one size. "
            f"{first} is {_size(images.shape[2:])}, unlike {len(odd)} of the others:{_listed(odd)}"
        )
    return images if coloured or not keep_grey else images[:, :1].copy()


def _decode_all(paths: Sequence[str], size: Size | None) -> Iterator[Decoded]:
    """The images in order, decoded by as many threads as there are cores (PIL decodes without the GIL)."""
    chunks = [paths[start : start + _CHUNK] for start in range(0, len(paths), _CHUNK)]
    with ThreadPoolExecutor(os.cpu_count()) as pool, _unlikely_sizes_refused():
        for decoded in pool.map(lambda chunk: [_decode_one(path, size) for path in chunk], chunks):
            yield from decoded


@contextmanager
def _unlikely_sizes_refused() -> Iterator[None]:
    """Let PIL's warning of an image that is made to fill the memory be an error, and its others not be printed."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _decode_one(path: str, size: Size | None) -> Decoded:
    """Pixels uint8 [H, W] (grey) or [H, W, 3], or the reason why there are none."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with open_regular(Path(path)) as file, Image.open(file, formats=_FORMATS) as image:
            if image.mode.startswith(_WIDE_MODES):
                return f"has more than 8 bits per channel (mode {image.mode})"
            if size is not None:
                image.draft(None, (2 * size[1], 2 * size[0]))  # JPEG: skip detail that scaling discards
            plain = _plain(image)
            if size is not None:
                plain = ImageOps.pad(plain, (size[1], size[0]), Image.Resampling.BILINEAR, color=0)
            return np.asarray(plain)
    except UnidentifiedImageError:
        return "is not an image"
    except Exception as error:  # decoders raise nearly anything on damaged files
        return str(error) or type(error).__name__


def _plain(image: "Image.Image") -> "Image.Image":
    if image.mode in _GREY_MODES:
        return image.convert("L")
    if "transparency" in image.info:  # a palette with transparency converts to RGB by way of RGBA only
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


def _size(shape: Sequence[int]) -> str:
    return f"{shape[1]}x{shape[0]}"


def _listed(lines: Sequence[str]) -> str:
    more = [f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return "".join(f"\n  {line}" for line in [*lines[:_SHOWN], *more])
