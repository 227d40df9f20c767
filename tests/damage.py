"""What tests of damaged tars are made of: a tar whose every byte is known by its role, and a watchdog."""

import io
import signal
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

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
