"""Sounds and pictures with known content, and their files."""

import io

import numpy as np
import soundfile
from PIL import Image


def noise(seconds: float) -> np.ndarray:
    return (np.random.default_rng(0).standard_normal(int(seconds * 16_000)) * 0.1).astype(np.float32)


def sound_file(values: np.ndarray, *, rate: int = 16_000, kind: str = "WAV", subtype: str | None = "FLOAT") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, values, rate, format=kind, subtype=subtype)
    return file.getvalue()


def photograph(width: int, height: int, *, cells: int = 7) -> Image.Image:
    """Smooth blotches of all colours; with many cells, fine ones."""
    pixels = np.random.default_rng(0).integers(0, 256, (cells, cells, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def picture_file(picture: Image.Image, kind: str = "PNG", **settings) -> bytes:
    """`settings` are Pillow's for this kind of file."""
    file = io.BytesIO()
    picture.save(file, kind, **settings)
    return file.getvalue()
