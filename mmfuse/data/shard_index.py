"""The sidecar index of one tar: where each sample's members lie, memory-mapped.

Layout of `NAME.tar.mmindex` (little-endian): magic, u64 header length, JSON header, then the arrays below, each aligned
to 64 bytes. A sample's *signature* is its tuple of extensions; there are few, so one small number a sample says which
members it has. Nothing here is a Python list per sample: those are copied into every worker as reference counts change.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmfuse.data.tar import Member, walk_tar
from mmfuse.errors import DataError, ShardError

logger = logging.getLogger(__name__)

SUFFIX = ".mmindex"
_MAGIC = b"MMINDEX1"
_ALIGN = 64
_ARRAYS = (
    ("signature", np.uint16),
    ("first_member", np.uint64),
    ("member_offset", np.uint64),
    ("member_size", np.uint64),
    ("key_end", np.uint64),
    ("keys", np.uint8),
)
_MAX_SIGNATURES = 1 << 16
FORBIDDEN = frozenset({"pkl", "pickle", "pyd", "pth", "pt"})
"""Extensions that other loaders unpickle, that is: execute."""


class SampleMembers(NamedTuple):
    """One sample's place in its shard."""

    key: str
    members: dict[str, tuple[int, int]]
    """Extension -> (offset, size)."""


class ShardIndex:
    """An opened sidecar: samples by number, 0-based, in the order of the tar."""

    def __init__(self, path: Path) -> None:
        """Maps the sidecar at `path`.

        Raises:
            ShardError: not a whole index of this format.
        """
        self.path = path
        try:
            with open(path, "rb") as file:
                magic, length = file.read(len(_MAGIC)), int.from_bytes(file.read(8), "little")
                if magic != _MAGIC or length > path.stat().st_size:
                    raise ValueError("wrong magic or length")
                self.header: dict[str, Any] = json.loads(file.read(length))
            data = np.memmap(path, mode="r")
            for name, dtype in _ARRAYS:
                start, count = self.header["arrays"][name]
                array = data[start : start + count * np.dtype(dtype).itemsize].view(dtype)
                if len(array) != count:
                    raise ValueError(f"{name} is cut off")
                setattr(self, name, array)
            self.signatures = [tuple(signature) for signature in self.header["signatures"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ShardError(f"{path}: not a readable index ({error}); delete it and index the shard again") from error

    def __reduce__(self):
        """Mapped anew in a spawned worker, not copied to it."""
        return ShardIndex, (self.path,)

    signature: np.ndarray
    first_member: np.ndarray
    member_offset: np.ndarray
    member_size: np.ndarray
    key_end: np.ndarray
    keys: np.ndarray

    def __len__(self) -> int:
        return len(self.signature)

    def sample(self, number: int) -> SampleMembers:
        """Key and members of one sample."""
        extensions = self.signatures[self.signature[number]]
        first = int(self.first_member[number])
        members = {
            extension: (int(self.member_offset[first + i]), int(self.member_size[first + i]))
            for i, extension in enumerate(extensions)
        }
        start = int(self.key_end[number - 1]) if number else 0
        key = self.keys[start : int(self.key_end[number])].tobytes().decode("utf-8", "surrogateescape")
        return SampleMembers(key, members)


def split_name(name: str) -> tuple[str, str]:
    """WebDataset's rule: the key ends at the first dot of the base name; what follows is the extension, lower-cased."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def build_index(shard: Path, destination: Path) -> ShardIndex:
    """Walks `shard`, checks it, and writes its sidecar to `destination`; a damaged shard keeps none, also no older one.

    Raises:
        ShardError: the tar is damaged, a key returns after other keys, a member comes twice, or a member is a pickle.
        DataError: the shard cannot be read, or the sidecar not be written.
    """
    try:
        _write(destination, *_read_columns(shard), shard=shard)
        return ShardIndex(destination)
    except OSError as error:
        raise DataError(f"{shard}: cannot be indexed: {error}") from error
    except ShardError:
        destination.unlink(missing_ok=True)  # it would let training read a shard that is known to be damaged
        raise


def _read_columns(shard: Path) -> tuple[dict[str, np.ndarray], list[tuple[str, ...]]]:
    """The index's arrays by name, and the signatures."""
    signatures: dict[tuple[str, ...], int] = {}
    columns: dict[str, list[int]] = {name: [] for name, _ in _ARRAYS}
    keys = bytearray()
    seen: set[str] = set()
    for key, members in _group_samples(shard):
        if key in seen:
            raise ShardError(
                f"{shard}: the members of sample {key!r} are not next to each other; build it again sorted"
            )
        seen.add(key)
        extensions = tuple(split_name(member.name)[1] for member in members)
        _check_members(shard, key, extensions)
        columns["signature"].append(signatures.setdefault(extensions, len(signatures)))
        columns["first_member"].append(len(columns["member_offset"]))
        columns["member_offset"] += [member.offset for member in members]
        columns["member_size"] += [member.size for member in members]
        keys += key.encode("utf-8", "surrogateescape")
        columns["key_end"].append(len(keys))
    if not seen and next(walk_tar(shard), None):
        raise ShardError(f"{shard}: holds no samples, that is: no member named KEY.EXTENSION")
    if not seen:
        logger.warning("%s: is empty", shard)  # img2dataset leaves such a tar where every download failed
    if len(signatures) > _MAX_SIGNATURES:
        raise ShardError(
            f"{shard}: {len(signatures):,} different sets of extensions, such as .{next(iter(signatures))[0]}; "
            "a key ends at its first dot, so build this shard again without dots in keys"
        )
    arrays = {name: np.asarray(columns[name], dtype=dtype) for name, dtype in _ARRAYS if name != "keys"}
    arrays["keys"] = np.frombuffer(bytes(keys), np.uint8)
    return arrays, list(signatures)


def _group_samples(shard: Path) -> Iterator[tuple[str, list[Member]]]:
    """`(key, members)` of consecutive members with one key; files without an extension are nobody's member."""
    current = ""
    members: list[Member] = []
    for member in walk_tar(shard):
        key, extension = split_name(member.name)
        if not extension or not key.rpartition("/")[2]:
            continue
        if key != current and members:
            yield current, members
            members = []
        current = key
        members.append(member)
    if members:
        yield current, members


def _check_members(shard: Path, key: str, extensions: tuple[str, ...]) -> None:
    for extension in extensions:
        if extension.rpartition(".")[2] in FORBIDDEN:
            raise ShardError(
                f"{shard}: sample {key!r} has a member .{extension}: pickles run code when read and are refused; "
                "store arrays as .npy and metadata as .json"
            )
    if len(set(extensions)) < len(extensions):
        twice = sorted({extension for extension in extensions if extensions.count(extension) > 1})
        raise ShardError(f"{shard}: sample {key!r} has more than one member .{twice[0]}; build this shard again")


def _write(destination: Path, arrays: dict[str, np.ndarray], signatures: list[tuple[str, ...]], *, shard: Path) -> None:
    digest = hashlib.blake2b(digest_size=16)
    for name, _ in _ARRAYS:
        digest.update(arrays[name].tobytes())
    digest.update(json.dumps(signatures).encode())
    header: dict[str, Any] = {
        "shard": shard.name,
        "shard_bytes": shard.stat().st_size,
        "samples": len(arrays["signature"]),
        "signatures": signatures,
        "signature_counts": np.bincount(arrays["signature"], minlength=len(signatures)).tolist(),
        "content_hash": digest.hexdigest(),
        "arrays": {name: [10**18, len(arrays[name])] for name, _ in _ARRAYS},  # as wide as any real offset
    }
    position = _aligned(len(_MAGIC) + 8 + len(json.dumps(header)))
    data_start = position
    for name, _ in _ARRAYS:
        header["arrays"][name][0] = position
        position = _aligned(position + arrays[name].nbytes)
    text = json.dumps(header).encode()
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = destination.with_name(f"{destination.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(_MAGIC + len(text).to_bytes(8, "little") + text)
            assert file.tell() <= data_start
            for name, _ in _ARRAYS:
                file.seek(header["arrays"][name][0])
                file.write(arrays[name].tobytes())
            file.truncate(position)
        temporary.replace(destination)
    finally:
        temporary.unlink(missing_ok=True)


def _aligned(position: int) -> int:
    return -(-position // _ALIGN) * _ALIGN
