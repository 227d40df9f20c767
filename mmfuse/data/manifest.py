"""The manifest of an index folder: what the plan must know of every shard, in one small file.

Ten thousand shards are planned without opening ten thousand indexes; a rank opens those alone that it reads. For remote
shards the manifest is all that must be at hand, since their indexes can be made again from the shards themselves.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmfuse.data.remote.urls import is_remote, show_url
from mmfuse.data.shard_index import SUFFIX, ShardIndex
from mmfuse.errors import DataError
from mmfuse.files import locked, write_text
from mmfuse.hashing import hash_int

MANIFEST = "manifest.mmindex.json"
_FORMAT = 2
_MAX_MEASURED_SIGNATURES = 64
"""Above this a shard's keys hold dots or its extensions are chaos, and nobody wants length buckets of it."""


class PartFacts(NamedTuple):
    """One tar as it was when it was indexed."""

    url: str
    """For people and for comparison, without secrets; a local tar in the manifest's folder has its name alone."""
    size: int
    """In bytes."""
    version: str
    """`modified:<seconds>` of a local file, to the microsecond, the server's tag of a remote one."""
    checksum: str | None = None


class ShardFacts(NamedTuple):
    """One shard: a tar, or several whose samples are joined by key."""

    parts: tuple[PartFacts, ...]
    samples: int
    """Without skipped ones."""
    signatures: tuple[tuple[str, ...], ...]
    """The sets of extensions that samples have."""
    signature_counts: tuple[int, ...]
    """Samples of each, without skipped ones."""
    length_counts: tuple[tuple[tuple[int, ...], ...], ...]
    """Of each signature and extension, how many members have `length_class` c, c + 1, ..., after c itself; empty where
    not counted, or not asked for."""
    index_bytes: int
    """Size of the index, which stands beside a shard in the cache."""
    content_hash: str
    """Changes with keys, members, their order and what is skipped."""
    skipped: tuple[int, ...] = ()
    """Numbers of samples that `mmfuse shards quarantine` took out, ascending."""

    @property
    def all_samples(self) -> int:
        """With skipped ones: what is in the tars."""
        return self.samples + len(self.skipped)


def length_class(size: np.ndarray) -> np.ndarray:
    """Sizes in bytes -> half octaves: 0 for 0 and 1, then a class more for every factor of the root of 2."""
    fraction, exponent = np.frexp(np.maximum(size, 1))  # no logarithm: it may differ from machine to machine
    return 2 * (exponent.astype(np.int64) - 1) + (fraction >= 0.5**0.5)


def index_name(parts: tuple[str, ...], *, beside: bool) -> str:
    """The name of a shard in its manifest and, with a suffix, of its index.

    Args:
        beside: whether the index lies beside the shard; elsewhere `a/0.tar` and `b/0.tar` must have two names.
    """
    base = show_url(parts[0]).rpartition("/")[2]
    if beside and len(parts) == 1:
        return base
    places = [show_url(part) if is_remote(part) else os.path.abspath(part) for part in parts]
    if beside:  # named by its neighbours' names, so that the folder may be moved
        places = [os.path.relpath(place, os.path.dirname(places[0])) for place in places]
    return f"{base}{'+' * (len(parts) > 1)}.{hash_int(*places):016x}"


def gather_facts(index: ShardIndex, parts: tuple[PartFacts, ...], *, skipped: tuple[int, ...] = ()) -> ShardFacts:
    """What the manifest keeps of an index, counted without the skipped samples."""
    kept = np.ones(len(index), bool)
    kept[list(skipped)] = False
    signature = index.signature
    counts = np.bincount(signature[kept], minlength=len(index.signatures))
    lengths: tuple[tuple[tuple[int, ...], ...], ...] = ()
    if len(index.signatures) <= _MAX_MEASURED_SIGNATURES:
        lengths = tuple(
            tuple(_count_lengths(index, kept & (signature == number), extension) for extension in extensions)
            for number, extensions in enumerate(index.signatures)
        )
    return ShardFacts(
        parts=parts,
        samples=int(kept.sum()),
        signatures=tuple(index.signatures),
        signature_counts=tuple(counts.tolist()),
        length_counts=lengths,
        index_bytes=index.path.stat().st_size,
        content_hash=content_hash(index, skipped=skipped),
        skipped=skipped,
    )


def content_hash(index: ShardIndex, *, skipped: tuple[int, ...]) -> str:
    """What identifies the samples of an index, without skipped ones."""
    content = str(index.header["content_hash"])
    return f"{hash_int(content, *skipped):016x}" if skipped else content


def _count_lengths(index: ShardIndex, chosen: np.ndarray, extension: str) -> tuple[int, ...]:
    classes = length_class(index.member_sizes((extension,))[chosen])
    least = int(classes.min(initial=int(classes.max(initial=0))))
    return (least, *np.bincount(classes - least).tolist())


def read_manifest(folder: Path, *, lengths: bool = True) -> dict[str, ShardFacts]:
    """Facts of every shard by `index_name`; empty where the folder has no manifest.

    Args:
        lengths: whether to keep `length_counts`, most of the memory of it all.

    Raises:
        DataError: it is damaged or of another format.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise ValueError(f"format {content['format']}")
        return {name: _from_json(facts, lengths=lengths) for name, facts in content["shards"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not a readable manifest ({error}); delete it and index the shards again") from error


def update_manifest(folder: Path, changes: Mapping[str, ShardFacts], *, remove: Iterable[str] = ()) -> None:
    """Adds, replaces and removes shards of a manifest, in one move.

    Raises:
        DataError: the folder cannot be written to.
    """
    gone = set(remove)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            shards = {
                name: facts for name, facts in (read_manifest(folder) | dict(changes)).items() if name not in gone
            }
            rows = (f"{json.dumps(name)}: {json.dumps(facts._asdict())}" for name, facts in sorted(shards.items()))
            text = f'{{"format": {_FORMAT}, "shards": {{\n' + ",\n".join(rows) + "\n}}\n"
            write_text(folder / MANIFEST, text)
    except OSError as error:
        raise DataError(
            f"{folder}: the manifest of its indexes cannot be written ({error.strerror}); where shards are read-only, "
            "name another folder as `index` in the recipe, or with --index-dir"
        ) from error


def index_path(folder: Path, name: str) -> Path:
    """Where the index of a shard lies."""
    return folder / f"{name}{SUFFIX}"


def local_version(path: str | int) -> tuple[int, str]:
    """Size and version of a local file or descriptor, as `PartFacts` has them; OSError where there is none."""
    status = os.stat(path)
    return status.st_size, f"modified:{status.st_mtime_ns / 10**9:.6f}"


def _from_json(facts: dict[str, Any], *, lengths: bool) -> ShardFacts:
    length_counts = facts["length_counts"] if lengths else ()
    return ShardFacts(
        parts=tuple(PartFacts(*part) for part in facts["parts"]),
        samples=int(facts["samples"]),
        signatures=tuple(map(tuple, facts["signatures"])),
        signature_counts=tuple(facts["signature_counts"]),
        length_counts=tuple(tuple(map(tuple, extensions)) for extensions in length_counts),
        index_bytes=int(facts["index_bytes"]),
        content_hash=str(facts["content_hash"]),
        skipped=tuple(facts["skipped"]),
    )
