"""Random changes of training images, for many runs at once."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

DRAWS = 5
"""Random numbers for one image: brightness, angle, zoom, shift right, shift down."""
CROP_DRAWS = 3
"""Random numbers for one image: whether it is mirrored, place of the cut across and down."""


def augment(
    images: Tensor,
    *,
    brightness: float,
    rotation: float,
    zoom: float,
    translation: float,
    drawn: Tensor,
) -> Tensor:
    """Change each image at random: float [R, B, C, H, W] in 0..255 -> the same shape and range.

    Uniform for each image: a brightness factor in [1 - brightness, 1 + brightness], an angle in
    [-rotation, rotation] degrees, a magnification in [1 - zoom, 1 + zoom] with zoom < 1, and shifts of up to
    `translation` of the width and of the height. The image is magnified, then turned about its centre, then
    shifted; what comes from outside is black. All magnitudes 0: `images` itself is returned.

    `drawn` are uniform numbers in [0, 1), float32 [R, B, DRAWS], used alike whichever magnitudes are 0. Raises
    ValueError for another shape.
    """
    if not (brightness or rotation or zoom or translation):
        return images
    _check(drawn, images, DRAWS)
    light, angle, scale, right, down = (drawn * 2 - 1).unbind(-1)
    if rotation or zoom or translation:
        images = _transform(
            images,
            angle=angle * math.radians(rotation),
            scale=1 + scale * zoom,
            shift=torch.stack([right, down], -1) * translation,
        )
    if brightness:
        images = images * (1 + light * brightness).to(images.dtype)[:, :, None, None, None]
    return images.clamp(0, 255)


def crop_and_flip(images: Tensor, *, crop: int, flip: float, drawn: Tensor) -> Tensor:
    """Move and mirror each image at random by whole pixels: float [R, B, C, H, W] -> the same shape, no value changed.

    With `crop` black pixels around it, the size is cut out at any of the (2 crop + 1)² places; then it is mirrored left
    to right with probability `flip`. `drawn` are uniform numbers in [0, 1), float32 [R, B, CROP_DRAWS], used alike
    whichever of the two is 0. Raises ValueError for another shape.
    """
    _check(drawn, images, CROP_DRAWS)
    height, width = images.shape[-2:]
    mirrored, across, down = drawn[..., None].unbind(-2)
    across, down = ((one * (2 * crop + 1)).long() - crop for one in (across, down))
    columns, rows = (torch.arange(size, device=images.device) for size in (width, height))
    columns = torch.where(mirrored < flip, width - 1 - columns, columns) + across
    return _taken(_taken(images, columns[:, :, None, None], -1), (rows + down)[:, :, None, :, None], -2)


def _taken(images: Tensor, places: Tensor, axis: int) -> Tensor:
    """What is at these places along an axis, black where they are outside."""
    last = images.shape[axis] - 1
    taken = images.gather(axis, places.clamp(0, last).expand_as(images))
    return taken.mul_((places >= 0) & (places <= last))


def _check(drawn: Tensor, images: Tensor, draws: int) -> None:
    runs, batch = images.shape[:2]
    if drawn.shape != (runs, batch, draws):
        raise ValueError(f"random numbers of the shape {list(drawn.shape)} for {runs} runs of {batch} images")


def _transform(images: Tensor, *, angle: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Magnify, turn (radians, anticlockwise) and shift (fractions of width and height); bilinear.

    `affine_grid` wants the way back, from each output pixel to where its value comes from, in coordinates
    that run from -1 to 1 over the width and over the height, hence the aspect ratio beside the sine.
    """
    height, width = images.shape[-2:]
    cosine, sine = angle.cos() / scale, angle.sin() / scale
    across, along = -sine * height / width, sine * width / height
    back = torch.stack([cosine, across, along, cosine], -1).view(*angle.shape, 2, 2)
    theta = torch.cat([back, back @ (-2 * shift)[..., None]], -1)
    flat = images.flatten(0, 1)
    grid = F.affine_grid(theta.flatten(0, 1).to(flat.dtype), list(flat.shape), align_corners=False)
    moved = F.grid_sample(flat, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return moved.view_as(images)
