"""The sidecar index of one tar, or of several aligned ones: where each sample's members lie, memory-mapped.

A sample's *signature* is its tuple of extensions; there are few, so one small number says which members a sample has.
Nothing here is a Python list per sample: those are copied into every worker as reference counts change.
"""

import logging
import mmap
import os
import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from mmfuse.data.index_file import ARRAYS, IndexColumns, ShardPart, check_arrays, read_header, write_index
from mmfuse.data.tar_samples import TarSamples
from mmfuse.errors import DataError, ShardError

logger = logging.getLogger(__name__)

SUFFIX = ".mmindex"
_MAX_SIGNATURES = 1 << 16
_MAX_CHOICES = 64

Choices = tuple[tuple[str, ...], ...]
"""Per modality the extensions that hold it, the preferred one first."""
Span = tuple[str, int, int, int]
"""Where one member lies: extension, which tar of several aligned ones (0 in plain shards), offset, size."""


class SampleMembers(NamedTuple):
    """One sample's place in its shard."""

    key: str
    members: dict[str, tuple[int, int]]
    """Extension -> (offset, size)."""
    parts: dict[str, int]
    """Extension -> which tar of several aligned ones; 0 in plain shards."""


class ShardIndex:
    """An opened sidecar: samples by number, 0-based, in the order of the tar.

    Opening reads the header alone; the arrays are mapped and checked when they are first needed. Python keeps a file
    open for every map, so whoever opens thousands of indexes calls `close` on those that are not read from now.
    """

    def __init__(self, path: Path) -> None:
        """Reads and checks the header of the sidecar at `path`.

        Raises:
            ShardError: not a whole index of this format.
        """
        self.path = path
        try:
            with open(path, "rb") as file:
                self.header, self._starts = read_header(file)
            self.signatures = [tuple(map(sys.intern, signature)) for signature in self.header["signatures"]]
            self.parts = tuple(map(_part_of, (self.header, *self.header.get("further_parts", ()))))
            self._length = int(self.header["samples"])
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise self._unreadable(error) from error
        self._checked: tuple[int, ...] = ()
        self._chosen: dict[Choices, list[list[tuple[str, int] | None]]] = {}

    def __reduce__(self):
        """Mapped anew in a spawned worker, not copied to it."""
        return ShardIndex, (self.path,)

    def __len__(self) -> int:
        return self._length

    def close(self) -> None:
        """Lets go of the map; whoever reads next maps it again."""
        self.__dict__.pop("_views", None)
        self.__dict__.pop("_arrays", None)

    @cached_property
    def _arrays(self) -> dict[str, np.ndarray]:
        """Mapped and, where the file is not the one that was checked before, checked."""
        try:
            with open(self.path, "rb") as file:
                status = os.fstat(file.fileno())
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            arrays = {
                name: np.frombuffer(data, dtype, self.header[count], self._starts[name])
                for name, (dtype, count) in ARRAYS.items()
            }
            identity = (status.st_ino, status.st_size, status.st_mtime_ns)
            if identity != self._checked:
                if (
                    xxhash.xxh3_128_hexdigest(memoryview(data)[self._starts["signature"] :])
                    != self.header["arrays_hash"]
                ):
                    raise ValueError("its arrays are damaged, or it was written anew since it was opened")
                check_arrays(arrays, self.header, part_bytes=[part.bytes for part in self.parts])
                self._checked = identity
            return arrays
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> DataError:
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            return DataError(f"{self.path}: cannot be read: {error.strerror}")  # nothing is wrong with the index
        what = "is not there" if isinstance(error, FileNotFoundError) else f"not a readable index ({error}); delete it"
        return ShardError(
            f"{self.path}: {what}, and index the shard again; run: mmfuse shards index {self.path.parent}"
        )

    @property
    def signature(self) -> np.ndarray:
        """uint16 `(samples,)`: each one's place in `signatures`."""
        return self._arrays["signature"]

    @property
    def first_member(self) -> np.ndarray:
        """uint64 `(samples,)`: number of the sample's first member; its others follow in the signature's order."""
        return self._arrays["first_member"]

    @property
    def member_offset(self) -> np.ndarray:
        """uint64 `(members,)`: of the payload, in bytes from the start of its tar."""
        return self._arrays["member_offset"]

    @property
    def member_size(self) -> np.ndarray:
        """uint64 `(members,)`: bytes of the payload."""
        return self._arrays["member_size"]

    @property
    def member_part(self) -> np.ndarray:
        """uint8 `(members,)`: which tar of several aligned ones; empty where every member is in the first."""
        return self._arrays["member_part"]

    @cached_property
    def _views(self) -> tuple[memoryview, ...]:
        """`ARRAYS` for single numbers: 60 ns each, where an array's element takes 230 and a `np.memmap`'s 640."""
        return tuple(array.data for array in self._arrays.values())

    def sample(self, number: int) -> SampleMembers:
        """Key and all members of one sample."""
        signature, first_member, offsets, sizes, key_end, keys, parts = self._views
        first = first_member[number]
        places = {extension: first + i for i, extension in enumerate(self.signatures[signature[number]])}
        return SampleMembers(
            str(keys[key_end[number - 1] if number else 0 : key_end[number]], "utf-8", "surrogateescape"),
            {extension: (offsets[place], sizes[place]) for extension, place in places.items()},
            {extension: parts[place] if parts else 0 for extension, place in places.items()},
        )

    def spans(self, number: int, choices: Choices) -> tuple[str, list[Span | None]]:
        """Key of one sample, and for each of `choices` the member of the first extension that it has, or None."""
        chosen_by_signature = self._chosen.get(choices) or self._choose(choices)
        signature, first_member, offsets, sizes, key_end, keys, parts = self._views
        first = first_member[number]
        spans: list[Span | None] = []
        for chosen in chosen_by_signature[signature[number]]:
            if chosen is None:
                spans.append(None)
            else:
                extension, place = chosen[0], first + chosen[1]
                spans.append((extension, parts[place] if parts else 0, offsets[place], sizes[place]))
        return str(keys[key_end[number - 1] if number else 0 : key_end[number]], "utf-8", "surrogateescape"), spans

    def _choose(self, choices: Choices) -> list[list[tuple[str, int] | None]]:
        """By signature; kept, since what is chosen depends on the signature alone."""
        if len(self._chosen) >= _MAX_CHOICES:
            self._chosen.clear()
        self._chosen[choices] = [_choose_places(signature, choices) for signature in self.signatures]
        return self._chosen[choices]

    def member_sizes(self, extensions: tuple[str, ...]) -> np.ndarray:
        """int64 `(samples,)`: bytes of the first of these extensions that each sample has, -1 where it has none."""
        chosen = [_choose_places(signature, (extensions,))[0] for signature in self.signatures]
        place = np.array([-1 if one is None else one[1] for one in chosen], np.int64)[self.signature]
        sizes = np.full(len(self), -1, np.int64)
        has = place >= 0
        sizes[has] = self.member_size[self.first_member[has].astype(np.int64) + place[has]]
        return sizes


def _choose_places(signature: tuple[str, ...], choices: Choices) -> list[tuple[str, int] | None]:
    """For each choice its extension in the signature, and which of the sample's members that is."""
    places = {extension: place for place, extension in enumerate(signature)}
    return [next(((name, places[name]) for name in choice if name in places), None) for choice in choices]


def _part_of(entry: dict[str, Any]) -> ShardPart:
    return ShardPart(entry["shard"], int(entry["shard_bytes"]), int(entry["modified_ns"]), entry["checksum"])


def build_index(shard: Path, destination: Path, *, checksum: str | None = None) -> ShardIndex:
    """Walks `shard`, checks it, and writes its sidecar to `destination`; a damaged shard keeps none, also no older one.

    Args:
        checksum: of the shard where it is known; stored as it is.

    Raises:
        ShardError: the tar is damaged, a key returns after other keys, a member comes twice, a member is a pickle, or
            the tar changes meanwhile.
        DataError: the shard cannot be read, or the sidecar not be written.
    """
    return index_tars((shard,), destination, read=_read_plain, checksum=checksum)


def _read_plain(shards: tuple[Path, ...]) -> IndexColumns:
    samples, columns = TarSamples(shards[0]), IndexColumns()
    for key, extensions, offsets, sizes in samples:
        columns.add_sample(key, extensions, offsets=offsets, sizes=sizes, parts=None)
    columns.other_members = samples.others
    return columns


def index_tars(
    shards: tuple[Path, ...],
    destination: Path,
    *,
    read: Callable[[tuple[Path, ...]], IndexColumns],
    checksum: str | None = None,
) -> ShardIndex:
    """The index of what `read` finds in these tars, written to `destination`. Errors as those of `build_index`."""
    names = ", ".join(map(str, shards))
    try:
        before = tuple(_describe(shard, checksum) for shard in shards)
        columns = read(shards)
        if tuple(_describe(shard, checksum) for shard in shards) != before:
            raise ShardError(f"{names}: has changed while it was indexed; index it again when it is written")
        if not columns:
            logger.warning("%s: is empty", names)  # img2dataset leaves such a tar where every download failed
        if len(columns.signatures) > _MAX_SIGNATURES:
            raise ShardError(
                f"{names}: {len(columns.signatures):,} different sets of extensions, such as "
                f".{next(iter(columns.signatures))[0]}; a key ends at its first dot, so build this shard again without "
                "dots in keys"
            )
        write_index(destination, columns, parts=before)
        return ShardIndex(destination)
    except OSError as error:
        raise DataError(f"{names}: cannot be indexed: {error}") from error
    except ShardError:
        destination.unlink(missing_ok=True)  # it would let training read a shard that is known to be damaged
        raise


def _describe(shard: Path, checksum: str | None) -> ShardPart:
    status = os.stat(shard)
    return ShardPart(shard.name, status.st_size, status.st_mtime_ns, checksum)
