"""Length buckets: samples of like length in one global batch, on all ranks, so that little of it is padding.

Length is the size of the member that holds the modality, in half octaves: near enough to tokens and seconds, and in the
index already. Samples that lack the modality are dealt to the buckets in turn.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from pydantic import Field

from mmfuse.config import Settings
from mmfuse.data.manifest import ShardFacts, length_class
from mmfuse.errors import ConfigError


class BucketConfig(Settings):
    """Which samples may share a global batch."""

    modality: str
    """By whose length."""
    count: int = Field(ge=2, le=32)
    """Buckets of about equally many samples; fewer where lengths hardly differ."""


class LengthBuckets(NamedTuple):
    """The buckets of a run, the same for all its sources."""

    modality: str
    edges: tuple[int, ...]
    """Length classes at which the second, third, ... bucket begins."""

    @property
    def number(self) -> int:
        """How many buckets there are."""
        return len(self.edges) + 1

    def assign(self, sizes: np.ndarray) -> np.ndarray:
        """The bucket of each sample of a shard from its member's size, -1 for none: int64 `(samples,)`."""
        bucket = np.searchsorted(self.edges, length_class(sizes), side="right")
        lacking = sizes < 0
        bucket[lacking] = np.arange(lacking.sum()) % self.number
        return bucket

    def count_samples(self, facts: ShardFacts, extensions: tuple[str, ...], *, name: str) -> np.ndarray:
        """How many samples of a shard each bucket has: int64 `(buckets,)`; what `assign` gives, from the manifest.

        Raises:
            ConfigError: the shard's lengths were not counted.
        """
        counts = np.zeros(self.number, np.int64)
        lengths, lacking = _count_lengths(facts, extensions, name=name)
        np.add.at(counts, np.searchsorted(self.edges, np.arange(len(lengths)), side="right"), lengths)
        return counts + (lacking + np.arange(self.number, 0, -1) - 1) // self.number


def choose_buckets(
    config: BucketConfig, sources: Iterable[tuple[str, Iterable[ShardFacts], tuple[str, ...]]]
) -> LengthBuckets:
    """Edges that cut all samples of the sources, given as name, facts and extensions, into about equal parts.

    Raises:
        ConfigError: no sample has the modality, or all have one length.
    """
    total = np.zeros(0, np.int64)
    for name, shards, extensions in sources:
        for facts in shards:
            lengths, _ = _count_lengths(facts, extensions, name=name)
            total, lengths = (np.pad(x, (0, max(len(total), len(lengths)) - len(x))) for x in (total, lengths))
            total = total + lengths
    below = np.cumsum(total)
    if not total.sum():
        raise ConfigError(f"data.buckets: no training sample has {config.modality}")
    wanted = below[-1] * np.arange(1, config.count) / config.count
    edges = sorted({int(edge) + 1 for edge in np.searchsorted(below, wanted)} - {int(np.flatnonzero(total)[-1]) + 1})
    if not edges:
        raise ConfigError(f"data.buckets: all {config.modality} members are about equally long; take data.buckets out")
    return LengthBuckets(config.modality, tuple(edges))


def _count_lengths(facts: ShardFacts, extensions: tuple[str, ...], *, name: str) -> tuple[np.ndarray, int]:
    """Samples of a shard by the length class of the first extension that they have, and how many have none."""
    lengths, lacking = np.zeros(0, np.int64), 0
    if facts.samples and not facts.length_counts:
        raise ConfigError(f"data.buckets: {name} has too many kinds of samples, whose lengths were not counted")
    for number, signature in enumerate(facts.signatures):
        extension = next((e for e in extensions if e in signature), None)
        if extension is None:
            lacking += facts.signature_counts[number]
            continue
        first, *counts = facts.length_counts[number][signature.index(extension)]
        more = np.pad(np.array(counts, np.int64), (first, 0))
        lengths, more = (np.pad(x, (0, max(len(lengths), len(more)) - len(x))) for x in (lengths, more))
        lengths = lengths + more
    return lengths, lacking
