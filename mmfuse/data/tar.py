"""Walks the headers of one tar shard and checks every one of them; reads no payload.

Formats: POSIX ustar, PAX (long names, large sizes) and GNU (long names, base-256 sizes).
Own code: 6 times faster than `tarfile`, and `tarfile` and webdataset end in silence at a zeroed header.
"""

import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn
from zlib import adler32

from mmfuse.errors import ShardError

logger = logging.getLogger(__name__)

BLOCK = 512
_RECORD_BYTES = 20 * BLOCK
"""Most programs fill the end with zeros up to a multiple of this, some not at all."""
_ZERO_BLOCK = bytes(BLOCK)
_WINDOW_BYTES = 8 * BLOCK
"""Read at once: captions and metadata are small, so that one call brings the headers of a whole sample."""
_MAX_EXTENSION_BYTES = 1 << 20
"""PAX and GNU records above this are an attack, not a name."""
_REGULAR = (b"0", b"\0", b"7")
_RECORDS = (b"x", b"g", b"L", b"K", b"V")
"""PAX headers of one member and of all, GNU long names and link names, volume labels: about members, not members."""
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}


class Member(NamedTuple):
    """One regular file in a tar."""

    name: str
    offset: int
    """Of its payload, in bytes from the start of the tar."""
    size: int


def walk_tar(path: Path) -> Iterator[Member]:
    """The regular members of an uncompressed tar, in order; directories are passed over.

    Raises:
        ShardError: a header is damaged, a member is cut off or a link, the end-of-archive blocks are missing, something
            follows them, or the file is compressed or no file; the message names the byte.
        OSError: there is no such file, or it cannot be read.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):  # to open a FIFO would wait for its writer for ever
        what = "directory" if stat.S_ISDIR(mode) else "FIFO, a socket or a device"
        raise ShardError(f"{path}: is a {what}, not a tar file; name the file itself, or copy it to a disk")
    with open(path, "rb", buffering=0) as file:
        descriptor, end = file.fileno(), os.fstat(file.fileno()).st_size
        window, window_start = b"", 0
        position, records = 0, _NO_RECORDS
        while True:
            if position + BLOCK > window_start + len(window):
                window, window_start = os.pread(descriptor, _WINDOW_BYTES, position), position
            header = window[position - window_start : position - window_start + BLOCK]
            if header == _ZERO_BLOCK:
                _check_end(path, descriptor, position, end, records=records)
                return
            kind, size = _check_header(path, header, position, end)
            if kind in _RECORDS:
                _check_fits(path, position, size, end)
                payload = os.pread(descriptor, size, position + BLOCK)
                records = _read_records(path, kind, payload, position, before=records)
            else:
                name = records.name or _name(header)
                size = _payload_bytes(path, name, kind, position, size if records.size is None else records.size)
                _check_fits(path, position, size, end)
                if kind in _REGULAR:
                    yield Member(name, position + BLOCK, size)
                records = _NO_RECORDS
            position += BLOCK + -(-size // BLOCK) * BLOCK


class _Records(NamedTuple):
    """What extended headers say of the next member."""

    name: str | None = None
    size: int | None = None


_NO_RECORDS = _Records()


def _read_records(path: Path, kind: bytes, payload: bytes, position: int, *, before: _Records) -> _Records:
    if kind == b"L":
        return before._replace(name=payload.split(b"\0", 1)[0].decode("utf-8", "surrogateescape"))
    if kind not in (b"x", b"g"):
        return before
    try:
        fields = _parse_pax(payload)
        size = int(fields["size"]) if "size" in fields else before.size
    except (ValueError, IndexError) as error:
        raise ShardError(f"{path}: damaged extended header at byte {position}; copy or build it again") from error
    if (size or 0) < 0 or any(field.startswith("GNU.sparse.") for field in fields):
        raise ShardError(f"{path}: the member at byte {position} is sparse or of no credible size; build it again")
    if kind == b"x":
        return _Records(fields.get("path", before.name), size)
    if not fields.keys().isdisjoint(("path", "size")):
        raise ShardError(f"{path}: the global header at byte {position} names all members alike; build it again")
    return before


def _payload_bytes(path: Path, name: str, kind: bytes, position: int, size: int) -> int:
    """`size`, or 0 for a directory; what is neither file nor directory would be a member lost in silence."""
    if kind in _REGULAR:
        return size
    if kind != b"5":
        raise ShardError(
            f"{path}: {name!r} at byte {position} is a link or a special file (type {kind.decode('latin-1')!r}), whose "
            "bytes are not there; build this shard again from plain files (tar --dereference --hard-dereference)"
        )
    return 0


def _check_header(path: Path, header: bytes, position: int, end: int) -> tuple[bytes, int]:
    """Type flag and payload size of a header whose checksum is right."""
    try:
        stored, size = _octal(header[148:156]), _number(header[124:136])
    except (ValueError, IndexError):
        stored, size = -1, 0
    if (stored != _byte_sum(header) and stored != _signed_byte_sum(header)) or size < 0 or len(header) < BLOCK:
        _refuse_header(path, header, position, end)
    kind = header[156:157]
    if kind in _RECORDS and size > _MAX_EXTENSION_BYTES:
        raise ShardError(f"{path}: extended header of {size} bytes at byte {position} is not credible")
    return kind, size


def _refuse_header(path: Path, header: bytes, position: int, end: int) -> NoReturn:
    packer = next((name for magic, name in _COMPRESSED.items() if header.startswith(magic)), None)
    if position == 0 and packer:
        raise ShardError(f"{path}: is compressed with {packer}; samples cannot be read in place, so unpack it first")
    if len(header) < BLOCK:
        raise ShardError(f"{path}: cut off at byte {end}: no end-of-archive blocks; copy or build this shard again")
    raise ShardError(f"{path}: damaged header at byte {position}; copy or build this shard again")


def _check_fits(path: Path, position: int, size: int, end: int) -> None:
    if position + BLOCK + size > end:
        raise ShardError(
            f"{path}: cut off: the member at byte {position} needs {size} bytes, the file ends at byte {end}; "
            "copy or build this shard again"
        )


def _check_end(path: Path, descriptor: int, position: int, end: int, *, records: _Records) -> None:
    """Only zeros may follow the first zero block: a zeroed header in the middle would lose the rest silently."""
    if records != _NO_RECORDS:
        raise ShardError(f"{path}: the extended header before byte {position} has no member; copy or build it again")
    if end - position < 2 * BLOCK:
        raise ShardError(f"{path}: cut off at byte {end}: only one end-of-archive block; copy or build it again")
    seen = position
    while block := os.pread(descriptor, 1 << 20, seen):
        if block.strip(b"\0"):
            raise ShardError(f"{path}: zeroed header at byte {position} with data after it; copy or build it again")
        seen += len(block)
    if end <= -(-(position + 2 * BLOCK) // _RECORD_BYTES) * _RECORD_BYTES:
        return
    if position == 0:
        raise ShardError(f"{path}: holds nothing but {end} zeros, as a copy that was cut short does; copy it again")
    # Nothing in a tar tells a copy that was cut short, in a file of the full size, from a generous writer.
    logger.warning(
        "%s: the last %d bytes are zeros; if it was copied, compare it with the original", path, end - position
    )


def _byte_sum(header: bytes) -> int:
    """Sum of the header's bytes, its checksum field taken as blanks.

    Adler-32 from 0 has the sum of up to 256 bytes in its low half: 0.7 us, where `sum` takes 4.
    """
    parts = (adler32(header[:148], 0) & 0xFFFF) + (adler32(header[156:404], 0) & 0xFFFF)
    return parts + (adler32(header[404:], 0) & 0xFFFF) + 8 * 32


def _signed_byte_sum(header: bytes) -> int:
    """The same with bytes from -128 to 127, as some old programs wrote it."""
    return _byte_sum(header) - 256 * sum(byte > 127 for byte in header[:148] + header[156:])


def _number(field: bytes) -> int:
    """Octal digits, or GNU's base-256 where the first bit is set."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    return _octal(field)


def _octal(field: bytes) -> int:
    return int(field.split(b"\0", 1)[0].strip() or b"0", 8)


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    if header[345] and header[257:263] == b"ustar\0":
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return name.decode("utf-8", "surrogateescape")


def _parse_pax(payload: bytes) -> dict[str, str]:
    """The `length key=value` records of a PAX header; ValueError or IndexError where they are none."""
    records = {}
    while payload:
        length = int(payload.split(b" ", 1)[0])
        record = payload[:length]
        if length < 1 or len(record) < length or not record.endswith(b"\n"):
            raise ValueError("a record is cut off")
        key, value = record[:-1].split(b" ", 1)[1].split(b"=", 1)
        records[key.decode()] = value.decode("utf-8", "surrogateescape")
        payload = payload[length:]
    return records
