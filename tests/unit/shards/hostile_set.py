"""Members that somebody's download really holds, and what each must be called."""

import io
import json
import struct
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import soundfile
from helpers import picture_bytes, sound_bytes, write_tar
from PIL import Image

from mmfuse.data.manifest import index_path
from mmfuse.data.recipe import Shard, place_shards
from mmfuse.data.shard_index import build_index


def write_shard(path: Path, members: Mapping[str, bytes] | Iterable[tuple[str, bytes]]) -> Shard:
    """An indexed tar."""
    return index_tar(write_tar(path, members))


def index_tar(tar: Path) -> Shard:
    """A tar with its index beside it."""
    (shard,) = place_shards([str(tar)], index_folder=None)
    build_index(tar, index_path(shard.index_folder, shard.name))
    return shard


def huge_png(side: int = 15_000) -> bytes:
    """A PNG that claims 225 million pixels and has none."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b""))
    parts = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def wav_bytes(values: np.ndarray, *, rate: int = 16_000) -> bytes:
    """A WAV of floats."""
    file = io.BytesIO()
    soundfile.write(file, values, rate, format="WAV", subtype="FLOAT")
    return file.getvalue()


def long_flac(*, seconds: int, rate: int = 1000) -> bytes:
    """Hours of silence in a few kilobytes."""
    file = io.BytesIO()
    soundfile.write(file, np.zeros(seconds * rate, np.int16), rate, format="FLAC")
    return file.getvalue()


def late_nan() -> bytes:
    """Six seconds of which the last value is NaN: a clip of 2.56 s does not see it."""
    values = np.zeros(96_000, np.float32)
    values[-1] = np.nan
    return wav_bytes(values)


def cut_flac() -> bytes:
    """A recording whose second half is missing, behind a header that promises it."""
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(-9000, 9000, 160_000, dtype=np.int16)
    soundfile.write(file, noise, 16_000, format="FLAC")
    return file.getvalue()[: len(file.getvalue()) // 2]


def grey_webp() -> bytes:
    """A good picture."""
    file = io.BytesIO()
    Image.new("L", (50, 40), 99).save(file, "WEBP")
    return file.getvalue()


def object_array() -> bytes:
    """An array of Python objects, which is a pickle."""
    file = io.BytesIO()
    np.save(file, np.array([{}]), allow_pickle=True)
    return file.getvalue()


GOOD = {
    "good.jpg": picture_bytes(1),
    "good.txt": b"a good caption",
    "good.ogg": sound_bytes(1),
    "good.json": json.dumps({"width": 40}).encode(),
    "grey.webp": grey_webp(),
}


def hostile_members() -> dict[str, tuple[bytes, str]]:
    """Members by name, with the kind of each."""
    return {
        "no_bytes.jpg": (b"", "empty"),
        "blanks.txt": (b" \n\t ", "empty"),
        "html.jpg": (b"<html>404 Not Found</html>", "not_decodable"),
        "cut.jpg": (picture_bytes(2, size=200)[:1500], "not_decodable"),
        "huge.png": (huge_png(), "too_large"),
        "latin.txt": ("caf\u00e9".encode("latin-1"), "not_decodable"),
        "nan.wav": (wav_bytes(np.full(16_000, np.nan, np.float32)), "not_finite"),
        "late_nan.wav": (late_nan(), "not_finite"),
        "cut_sound.flac": (cut_flac(), "not_decodable"),
        "hours.flac": (long_flac(seconds=36_000), "too_large"),
        "noise.ogg": (bytes(range(256)) * 9, "not_decodable"),
        "broken.json": (b'{"a": ', "not_decodable"),
        "deep.json": (b"[" * 100_000, "not_decodable"),
        "object.npy": (object_array(), "not_decodable"),
    }
