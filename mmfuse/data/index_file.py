"""The file of a sidecar index: its layout, how it is written whole or not at all, and what makes it wrong.

Layout (little-endian): magic, u64 length of the header, XXH3-128 of the header, JSON header, then the arrays below in
their order, each aligned to 64 bytes. The header has the XXH3-128 of all from the first array on, so that no damage to
the file passes for an index.
"""

import hashlib
import json
import os
import struct
from array import array
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import xxhash

MAGIC = b"MMINDEX2"
"""Ends with the version of the format."""
_PREFIX = struct.Struct("<8sQ16s")
_ALIGN = 64
ARRAYS: dict[str, tuple[type[np.generic], str]] = {
    "signature": (np.uint16, "samples"),
    "first_member": (np.uint64, "samples"),
    "member_offset": (np.uint64, "members"),
    "member_size": (np.uint64, "members"),
    "key_end": (np.uint64, "samples"),
    "keys": (np.uint8, "key_bytes"),
    "member_part": (np.uint8, "part_members"),
}
"""Name -> type, and which number of the header says how many there are."""


class ShardPart(NamedTuple):
    """One tar as it was when it was indexed; there are several where each modality has a tar of its own."""

    name: str
    bytes: int
    modified_ns: int
    checksum: str | None = None
    """As it was given to `build_index`."""


def read_header(file: BinaryIO) -> tuple[dict[str, Any], dict[str, int]]:
    """The header of an opened sidecar, and where each array starts.

    Raises:
        ValueError, LookupError, TypeError: not a whole index of this format.
    """
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(_PREFIX.size).ljust(_PREFIX.size, b"\0")
    magic, length, digest = _PREFIX.unpack(prefix)
    if magic != MAGIC:
        raise ValueError("it is of another format version" if magic[:-1] == MAGIC[:-1] else "wrong magic")
    text = file.read(min(length, size))
    if xxhash.xxh3_128_digest(text) != digest:
        raise ValueError("its header is damaged or cut off")
    header = json.loads(text)
    starts, end = _place_arrays(_PREFIX.size + length, header)
    if end != size:
        raise ValueError(f"it has {size} bytes instead of {end}")
    return header, starts


def _place_arrays(position: int, counts: dict[str, Any]) -> tuple[dict[str, int], int]:
    """Start of each array, and the size of the file, whose header ends at `position`."""
    starts = {}
    for name, (dtype, count) in ARRAYS.items():
        if not 0 <= counts[count] < 1 << 48:
            raise ValueError(f"{count} = {counts[count]} is not credible")
        starts[name] = position = _aligned(position)
        position += counts[count] * np.dtype(dtype).itemsize
    return starts, _aligned(position)


def _aligned(position: int) -> int:
    return -(-position // _ALIGN) * _ALIGN


def check_arrays(arrays: dict[str, np.ndarray], header: dict[str, Any], *, part_bytes: list[int]) -> None:
    """ValueError where the arrays contradict the header or point outside the tars, whoever wrote them."""
    lengths = np.array([len(signature) for signature in header["signatures"]], np.uint64)
    counts = np.bincount(arrays["signature"], minlength=len(lengths))
    if len(counts) != len(lengths) or counts.tolist() != header["signature_counts"]:
        raise ValueError("its samples have other extensions than it says")
    members = lengths[arrays["signature"]]
    if (arrays["first_member"] != np.cumsum(members) - members).any() or members.sum() != header["members"]:
        raise ValueError("its samples have other members than it says")
    key_ends = arrays["key_end"]
    if (key_ends[1:] < key_ends[:-1]).any() or (key_ends[-1] if len(key_ends) else 0) != header["key_bytes"]:
        raise ValueError("its keys overlap")
    parts = arrays["member_part"]
    if len(parts) not in (0, header["members"]) or (len(parts) and parts.max() >= len(part_bytes)):
        raise ValueError("it names a tar that it does not list")
    ends = np.array(part_bytes, np.uint64)[parts if len(parts) else 0]
    offsets, sizes = arrays["member_offset"], arrays["member_size"]
    if (offsets > ends).any() or (sizes > ends - offsets).any():
        raise ValueError("it points outside its tar")


class IndexColumns:
    """What an index will hold, sample by sample."""

    def __init__(self) -> None:
        self.signatures: dict[tuple[str, ...], int] = {}
        self.keys = bytearray()
        self.other_members = 0
        """How many members of the tars are nobody's, for those who count."""
        self._signature = array("L")
        self._first_member, self._key_end = array("Q"), array("Q")
        self._member_offset, self._member_size = array("Q"), array("Q")
        self._member_part = array("B")

    def __len__(self) -> int:
        return len(self._signature)

    def add_sample(
        self, key: str, extensions: tuple[str, ...], *, offsets: list[int], sizes: list[int], parts: list[int] | None
    ) -> None:
        """Appends one sample; `parts` says which tar each member is in, None that all are in the only one."""
        self._signature.append(self.signatures.setdefault(extensions, len(self.signatures)))
        self._first_member.append(len(self._member_offset))
        self._member_offset.extend(offsets)
        self._member_size.extend(sizes)
        if parts is not None:
            self._member_part.extend(parts)
        self.keys += key.encode("utf-8", "surrogateescape")
        self._key_end.append(len(self.keys))

    def to_arrays(self) -> dict[str, np.ndarray]:
        """By the names of `ARRAYS`; `member_part` is empty where all members are in the first tar."""
        columns: dict[str, array[int] | bytearray] = {
            "signature": self._signature,
            "first_member": self._first_member,
            "member_offset": self._member_offset,
            "member_size": self._member_size,
            "key_end": self._key_end,
            "keys": self.keys,
            "member_part": self._member_part if any(self._member_part) else array("B"),
        }
        return {name: np.asarray(memoryview(columns[name])).astype(dtype) for name, (dtype, _) in ARRAYS.items()}


def write_index(destination: Path, columns: IndexColumns, *, parts: tuple[ShardPart, ...]) -> None:
    """Writes a sidecar in one move."""
    arrays, signatures = columns.to_arrays(), list(columns.signatures)
    body = b"".join(_padded(arrays[name].tobytes()) for name in ARRAYS)
    described = [
        {"shard": part.name, "shard_bytes": part.bytes, "modified_ns": part.modified_ns, "checksum": part.checksum}
        for part in parts
    ]
    header: dict[str, Any] = described[0] | ({"further_parts": described[1:]} if len(parts) > 1 else {})
    header |= {count: len(arrays[name]) for name, (_, count) in ARRAYS.items()}
    header |= {
        "version": int(MAGIC[-1:]),
        "other_members": columns.other_members,
        "signatures": signatures,
        "signature_counts": np.bincount(arrays["signature"], minlength=len(signatures)).tolist(),
        "content_hash": _content_hash(arrays, signatures),
        "arrays_hash": xxhash.xxh3_128_hexdigest(body),
    }
    text = json.dumps(header).encode()
    prefix = _PREFIX.pack(MAGIC, len(text), xxhash.xxh3_128_digest(text))
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = destination.with_name(f"{destination.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(_padded(prefix + text) + body)
        temporary.replace(destination)
    finally:
        temporary.unlink(missing_ok=True)


def _padded(data: bytes) -> bytes:
    return data.ljust(_aligned(len(data)), b"\0")


def _content_hash(arrays: dict[str, np.ndarray], signatures: list[tuple[str, ...]]) -> str:
    """Of what the samples are, not of the tars' names, times or checksums: a copied data set keeps it."""
    digest = hashlib.blake2b(digest_size=16)
    for name in ARRAYS:
        digest.update(arrays[name].tobytes())
    digest.update(json.dumps(signatures).encode())
    return digest.hexdigest()
