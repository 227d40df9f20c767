"""What `mmfuse shards` does to a list of tars: index them, check them, count what they hold."""

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mmfuse.data.shard_index import SUFFIX, ShardIndex, build_index
from mmfuse.data.source import open_index
from mmfuse.errors import DataError, SampleError, ShardError
from mmfuse.modalities.base import Processor

logger = logging.getLogger(__name__)


def index_shards(shards: list[Path], *, force: bool = False) -> Iterator[tuple[Path, ShardIndex | ShardError]]:
    """Each shard with its index, written beside it, or with what is wrong with it; up-to-date indexes are kept."""
    for shard in shards:
        try:
            yield shard, _index_one(shard, force=force)
        except ShardError as error:
            yield shard, error


def _index_one(shard: Path, *, force: bool) -> ShardIndex:
    if not force:
        try:
            return open_index(shard)
        except DataError as error:
            logger.debug("%s: indexing, because: %s", shard, error)
    return build_index(shard, shard.with_name(shard.name + SUFFIX))


@dataclass
class ShardStats:
    """Counts over many shards."""

    shards: int = 0
    samples: int = 0
    bytes: int = 0
    subsets: Counter[tuple[str, ...]] = field(default_factory=Counter)
    """Samples by the extensions that they have, in alphabetical order."""
    member_bytes: dict[str, list[np.ndarray]] = field(default_factory=dict)
    """Sizes of all members by extension."""


def count_shards(shards: list[Path]) -> ShardStats:
    """What indexed shards hold.

    Raises:
        DataError: a shard has no index, or has changed since.
    """
    stats = ShardStats()
    for shard in shards:
        index = open_index(shard)
        stats.shards += 1
        stats.samples += len(index)
        stats.bytes += index.header["shard_bytes"]
        for number, extensions in enumerate(index.signatures):
            stats.subsets[tuple(sorted(extensions))] += index.header["signature_counts"][number]
            first = index.first_member[index.signature == number].astype(np.int64)
            for place, extension in enumerate(extensions):
                stats.member_bytes.setdefault(extension, []).append(np.asarray(index.member_size[first + place]))
    return stats


def check_members(shard: Path, processors: dict[str, tuple[tuple[str, ...], Processor]]) -> Iterator[str]:
    """Decodes every known member of a shard and yields one sentence for each that is bad.

    Args:
        processors: by modality, the extensions that it reads and its processor.
    """
    index = open_index(shard)
    by_extension = {extension: processor for extensions, processor in processors.values() for extension in extensions}
    with open(shard, "rb") as file:
        for number in range(len(index)):
            sample = index.sample(number)
            for extension, (offset, size) in sample.members.items():
                processor = by_extension.get(extension)
                if processor is None:
                    continue
                file.seek(offset)
                try:
                    processor(file.read(size), seed=None)
                except SampleError as error:
                    yield f"{shard}/{sample.key}.{extension}: {error}"
