"""Pictures and sounds that a user holds in memory -> the bytes of a file, without loss."""

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from PIL import Image

from mmfuse.errors import SampleError

_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


def read_file(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a file that is a member by itself.

    Raises:
        SampleError: it cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise SampleError(f"{path}: cannot be read: {error}") from error


def picture_to_bytes(value: Any) -> bytes:
    """A PNG of a PIL picture or an array of pixels; of a path its own bytes.

    Raises:
        SampleError: another type or shape, or no such file.
    """
    if isinstance(value, str):
        return read_file(value)
    if not isinstance(value, Image.Image):
        value = Image.fromarray(_pixels(value))
    exif, picture = value.getexif(), value
    if value.mode == "I":  # Pillow would cut 32 bits at 255
        picture = Image.fromarray(_to_16_bits(np.asarray(value)))
    elif value.mode == "F":
        raise SampleError("a picture of floats (mode F) has no known range; convert it to 8 or 16 bits")
    elif value.mode not in _PNG_MODES:
        picture = value.convert("RGB")
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=0, exif=exif)  # with the orientation that it is stored in
    return file.getvalue()


def sound_to_bytes(value: Any) -> bytes:
    """A WAV of `(waveform, sample rate)`; of a path its own bytes.

    Raises:
        SampleError: another type or shape, or no such file.
    """
    if isinstance(value, str):
        return read_file(value)
    if not isinstance(value, tuple) or len(value) != 2:
        raise SampleError(f"expected a path or (waveform, sample rate), got {_describe(value)}")
    waveform, rate = value
    values = waveform.detach().cpu().numpy().T if isinstance(waveform, torch.Tensor) else waveform
    if not isinstance(values, np.ndarray) or values.dtype.kind != "f" or values.ndim not in (1, 2):
        raise SampleError(f"expected a waveform of floats with one or two dimensions, got {_describe(waveform)}")
    file = io.BytesIO()
    try:
        soundfile.write(file, values, int(rate), format="WAV", subtype="FLOAT")
    except (soundfile.LibsndfileError, TypeError, ValueError) as error:
        raise SampleError(f"no sound: {_describe(waveform)} at {rate} values a second: {error}") from error
    return file.getvalue()


def _to_16_bits(pixels: np.ndarray) -> np.ndarray:
    if pixels.min() < 0 or pixels.max() >= 1 << 16:
        raise SampleError(f"a grey picture with values from {pixels.min()} to {pixels.max()} does not fit 16 bits")
    return pixels.astype(np.uint16)


def _pixels(value: Any) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        pixels = value.detach().cpu().numpy()
        pixels = pixels.transpose(1, 2, 0) if pixels.ndim == 3 else pixels
    else:
        pixels = value
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8:
        raise SampleError(f"expected a path, a PIL picture or uint8 pixels, got {_describe(value)}")
    pixels = pixels[:, :, 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
    if pixels.ndim != 2 and (pixels.ndim != 3 or pixels.shape[2] not in (3, 4)):
        expected = "(3, H, W)" if isinstance(value, torch.Tensor) else "(H, W, 3)"
        raise SampleError(f"expected pixels {expected}, got {_describe(value)}; several pictures are a list")
    return pixels


def _describe(value: Any) -> str:
    shape = f" {tuple(value.shape)} of {value.dtype}" if isinstance(value, np.ndarray | torch.Tensor) else ""
    return type(value).__name__ + shape
