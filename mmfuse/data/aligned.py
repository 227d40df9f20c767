"""Data sets with one tar per modality, such as `images/00000.tar` and `texts/00000.tar`: one index joins them by key.

The join is an outer one: a key that stands in some of the tars only is a sample without the others' modalities.
Keys are compared whole, with their folders.
"""

import logging
from pathlib import Path
from typing import NamedTuple

from mmfuse.data.index_file import IndexColumns
from mmfuse.data.shard_index import ShardIndex, index_tars
from mmfuse.data.tar_samples import TarSamples
from mmfuse.errors import DataError, ShardError

logger = logging.getLogger(__name__)

_MAX_PARTS = 256
"""One byte a member says which tar it is in."""


class _Place(NamedTuple):
    part: int
    offset: int
    size: int


_Joined = dict[str, dict[str, _Place]]
"""Key -> extension -> place."""


def build_joined_index(shards: tuple[Path, ...], destination: Path) -> ShardIndex:
    """Writes the index of the samples that these tars hold together, in the order of their first appearance.

    Members of the n-th tar have part n, from 0. A damaged tar leaves no index, also no older one.

    Raises:
        ShardError: a tar is damaged or changes meanwhile, two have the same extension for one key, or one shares no key
            with any other.
        DataError: a tar cannot be read, the index not be written, or there are more than 256 tars.
    """
    if not 1 <= len(shards) <= _MAX_PARTS:
        raise DataError(f"{len(shards)} tars cannot be joined into one shard, only 1 to {_MAX_PARTS}: one per modality")
    return index_tars(shards, destination, read=_join_tars)


def _join_tars(shards: tuple[Path, ...]) -> IndexColumns:
    joined: _Joined = {}
    columns = IndexColumns()
    for part, shard in enumerate(shards):
        samples = TarSamples(shard)
        for key, *members in samples:
            entry = joined.setdefault(key, {})
            for extension, offset, size in zip(*members, strict=True):
                if extension in entry:
                    other = shards[entry[extension].part]
                    raise ShardError(
                        f"{shard}: sample {key!r} has a member .{extension} here and in {other}; "
                        "rename it in one of them, or join other tars"
                    )
                entry[extension] = _Place(part, offset, size)
        columns.other_members += samples.others
    _check_shared_keys(joined, shards)
    for key, entry in joined.items():
        parts, offsets, sizes = (list(numbers) for numbers in zip(*entry.values(), strict=True))
        columns.add_sample(key, tuple(entry), offsets=offsets, sizes=sizes, parts=parts)
    return columns


def _check_shared_keys(joined: _Joined, shards: tuple[Path, ...]) -> None:
    """Refuses a tar whose keys are all its own, and logs how many samples each tar lacks."""
    counts, shared = [0] * len(shards), [0] * len(shards)
    for entry in joined.values():
        present = {place.part for place in entry.values()}
        for part in present:
            counts[part] += 1
            shared[part] += len(present) > 1
    filled = [part for part, count in enumerate(counts) if count]
    alone = next((part for part in filled if not shared[part] and len(filled) > 1), None)
    if alone is not None:
        other = next(part for part in filled if part != alone)
        raise ShardError(
            f"{shards[alone]}: shares no key with the tars that it is to be joined with: it has "
            f"{_first_key(joined, alone)!r}, {shards[other]} has {_first_key(joined, other)!r}; "
            "keys are compared with their folders, so build one of them again"
        )
    lacking = ", ".join(f"{shard} lacks {len(joined) - count}" for shard, count in zip(shards, counts, strict=True))
    logger.info("%d samples joined by key; of these %s", len(joined), lacking)


def _first_key(joined: _Joined, part: int) -> str:
    return next(key for key, entry in joined.items() if any(place.part == part for place in entry.values()))
