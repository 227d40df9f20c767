"""Pictures: opened within limits, loaded upright and on white, and changed at random as torchvision would.

No modality: a folder without `__init__.py` is none.
"""

import io
import math
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageEnhance
from torch import Generator, Tensor
from torch.overrides import TorchFunctionMode

from mmfuse.errors import SampleError
from mmfuse.modalities.media.picture_shapes import PictureShape

_ASPECTS = (3 / 4, 4 / 3)
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By EXIF orientation, what sets a photograph upright; from 5 on width and height change places."""


def open_picture(data: bytes, *, max_pixels: int, image_size: int) -> Image.Image:
    """A JPEG, whose pixels are not decoded yet, or a decoded PNG or WebP.

    Raises:
        SampleError: it is none of these, or its header promises more pixels than the limit.
    """
    with warnings.catch_warnings(), _refuses_unreadable():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit decides
        picture = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
        size = f"{picture.width} x {picture.height}"
        if picture.width * picture.height > max_pixels:
            raise SampleError(f"picture of {size} pixels exceeds max_pixels = {max_pixels}", kind="too_large")
        # What evaluation would make of it: 60,000 x 1 pixels become 5,760,000 x 96.
        if image_size**2 * max(picture.size) > max_pixels * min(picture.size):
            raise SampleError(f"picture of {size} pixels is too thin", kind="too_large")
        if picture.format != "JPEG":
            picture.load()  # the EXIF of a PNG may stand after its pixels
    return picture


@contextmanager
def _refuses_unreadable() -> Iterator[None]:
    try:
        yield
    except Image.DecompressionBombError as error:
        raise SampleError(f"a picture beyond Pillow's own limit: {error}", kind="too_large") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise SampleError(f"not a readable JPEG, PNG or WebP picture: {error}") from error


def load_upright(picture: Image.Image) -> Image.Image:
    """8-bit RGB with its EXIF orientation undone; 16-bit grey is scaled, what is transparent lies on white."""
    orientation = _orientation(picture)
    with _refuses_unreadable():
        picture.load()
        if picture.mode.startswith("I"):  # Pillow would cut 16 bits at 255
            picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
        if picture.has_transparency_data:
            layer = picture.convert("RGBA")
            picture = Image.new("RGB", layer.size, "white")
            picture.paste(layer, mask=layer)
        picture = picture if picture.mode == "RGB" else picture.convert("RGB")
    return picture.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else picture


def crop_at_random(picture: Image.Image, shape: PictureShape, *, min_scale: float, generator: Generator) -> Image.Image:
    """The upright picture's random resized crop, in the shape's target size.

    A JPEG whose crop is at least twice as large as needed is decoded at 1/2, 1/4 or 1/8 of its size, which changes
    pixels a little: libjpeg averages, in the frequency domain, what a filter would have averaged afterwards.
    """
    full_width, full_height = picture.size
    sideways = _orientation(picture) >= 5
    upright = (full_height, full_width) if sideways else (full_width, full_height)
    around = upright[0] / upright[1] if shape.keeps_aspect else 1.0
    left, top, width, height = _draw_crop(upright, min_scale, generator, around=around)
    size = shape.target(width, height)
    shrink, scale = min(width // size[0], height // size[1]), 1
    if shrink > 1:
        drafted = picture.draft(None, (full_width // shrink, full_height // shrink))  # None for other formats
        scale = round(full_width / drafted[1][2]) if drafted else 1
    picture, box = load_upright(picture), (left, top, left + width, top + height)
    if scale == 1:
        return picture.crop(box).resize(size, Image.Resampling.BILINEAR)  # as torchvision
    left, top, right, bottom = (edge / scale for edge in box)
    return picture.resize(size, Image.Resampling.BILINEAR, box=(left, top, right, bottom))


def _orientation(picture: Image.Image) -> int:
    """The EXIF orientation; 1, upright, where there is none or it is unreadable."""
    try:
        orientation = picture.getexif().get(ExifTags.Base.Orientation)
    except (struct.error, KeyError, SyntaxError, TypeError, ValueError, ZeroDivisionError):  # Pillow's own list
        return 1
    return orientation if orientation in _UPRIGHT else 1


def _draw_crop(
    size: tuple[int, int], min_scale: float, generator: Generator, *, around: float
) -> tuple[int, int, int, int]:
    """Left, top, width and height of what torchvision's RandomResizedCrop draws; it would need the decoded picture.

    Aspects are 3/4 to 4/3 of `around`.
    """
    (full_width, full_height), (low, high) = size, torch.tensor(_ASPECTS).log().tolist()
    for _ in range(10):
        area = full_width * full_height * torch.empty(1).uniform_(min_scale, 1, generator=generator).item()
        aspect = around * torch.empty(1).uniform_(low, high, generator=generator).exp().item()
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= full_width and 0 < height <= full_height:
            top = int(torch.randint(full_height - height + 1, (1,), generator=generator))
            left = int(torch.randint(full_width - width + 1, (1,), generator=generator))
            return left, top, width, height
    width = min(full_width, round(full_height * around * _ASPECTS[1]))
    height = min(full_height, round(full_width / (around * _ASPECTS[0])))
    return (full_width - width) // 2, (full_height - height) // 2, width, height


def jitter_colors(picture: Image.Image, *, strength: float, generator: Generator) -> Image.Image:
    """torchvision's ColorJitter of brightness, contrast and saturation, pixel for pixel."""
    order = torch.randperm(4, generator=generator).tolist()  # the fourth is hue
    factors = torch.empty(3).uniform_(max(1 - strength, 0), 1 + strength, generator=generator).tolist()
    changes = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for number in order:
        if number < len(changes):
            picture = changes[number](picture).enhance(factors[number])
    return picture


class DrawsFrom(TorchFunctionMode):
    """Inside, in this thread, torchvision draws from `generator`; it knows only torch's global one."""

    _RANDOM = (torch.rand, torch.randint, torch.randperm, Tensor.uniform_)

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.generator = generator

    def __torch_function__(self, func, types, args=(), kwargs=None) -> Any:
        seeded = {"generator": self.generator} if func in self._RANDOM else {}
        return func(*args, **(kwargs or {}), **seeded)
