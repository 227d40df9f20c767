"""What tests of damage are made of: tars whose every byte has a known role, members that lie, and a watchdog."""

import io
import signal
import struct
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import soundfile

BLOCK = tarfile.BLOCKSIZE


class Place(NamedTuple):
    """Where one member stands in a tar, in bytes."""

    start: int
    """Of its headers, the extended ones included."""
    header: int
    payload: int
    end: int
    """Of its payload, without padding."""


def tar_bytes(
    members: Mapping[str, bytes] | Iterable[tuple[str, bytes]], *, tar_format: int = tarfile.USTAR_FORMAT
) -> bytes:
    """A tar of these members, in their order."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tar_format) as tar:
        for name, data in members.items() if isinstance(members, Mapping) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def find_members(tar: bytes) -> dict[str, Place]:
    """Members of an undamaged tar by name, as the standard library finds them."""
    with tarfile.open(fileobj=io.BytesIO(tar)) as opened:
        return {
            info.name: Place(info.offset, info.offset_data - BLOCK, info.offset_data, info.offset_data + info.size)
            for info in opened
        }


def rechecked(header: bytes) -> bytes:
    """The header with a right checksum, so that only what a test changed is wrong."""
    header = header[:148] + b" " * 8 + header[156:]
    return header[:148] + b"%06o\0 " % sum(header) + header[156:]


def change(data: bytes, start: int, new: bytes) -> bytes:
    """`data` with `new` in the place of what stands at `start`; of the same length."""
    return data[:start] + new + data[start + len(new) :]


def huge_png(width: int, height: int) -> bytes:
    """A PNG that claims so many pixels and has none."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(99)))]
    parts = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def wav_bytes(values: np.ndarray, *, rate: int = 16_000) -> bytes:
    """A WAV of floats."""
    file = io.BytesIO()
    soundfile.write(file, values, rate, format="WAV", subtype="FLOAT")
    return file.getvalue()


def wav_that_claims(*, hours: int, seconds: int, rate: int = 16_000) -> bytes:
    """Silence of some seconds behind a header that claims hours."""
    claim = hours * 3600 * rate * 2
    form = struct.pack("<IHHIIHH", 16, 1, 1, rate, rate * 2, 2, 16)
    head = b"RIFF" + struct.pack("<I", 36 + claim) + b"WAVEfmt " + form + b"data" + struct.pack("<I", claim)
    return head + bytes(seconds * rate * 2)


def flac_of_hours(hours: int) -> bytes:
    """Silence, in a kilobyte: at 8 Hz."""
    file = io.BytesIO()
    soundfile.write(file, np.zeros(hours * 3600 * 8, np.int16), 8, format="FLAC")
    return file.getvalue()


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Fails with TimeoutError where the block takes longer, also inside a system call."""

    def fail(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
