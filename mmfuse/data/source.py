"""A source: one split of one recipe, opened for reading by sample number."""

import bisect
import itertools
import re
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mmfuse.config import find_plugin
from mmfuse.data.buckets import LengthBuckets
from mmfuse.data.captions import order_by_weight
from mmfuse.data.manifest import ShardFacts, read_manifest
from mmfuse.data.recipe import MemberRule, Recipe, Shard, find_split
from mmfuse.data.remote.urls import is_remote
from mmfuse.data.shard_files import NodeCache, ShardFiles, check_unchanged
from mmfuse.data.shard_index import ShardIndex, Span
from mmfuse.errors import ConfigError, DataError
from mmfuse.hashing import hash_int


class RawSample(NamedTuple):
    """One sample as bytes."""

    shard: str
    """Shown, for messages and audits."""
    key: str
    group: str | None
    """What samples of one group have in common; None where every sample is its own."""
    members: dict[str, tuple[str, bytes]]
    """Modality -> (extension, bytes)."""


class Source:
    """Samples of one split, numbered 0 to len - 1 in the order of sorted shards, or so within each length bucket."""

    def __init__(
        self,
        recipe: Recipe,
        split: str,
        *,
        place: Path,
        modalities: tuple[str, ...],
        cache: NodeCache | None = None,
        buckets: LengthBuckets | None = None,
        keep_lengths: bool = False,
    ) -> None:
        """Reads the manifests; no shard and no index is opened.

        Args:
            place: the recipe's file.
            cache: where a prefetcher puts remote shards.
            keep_lengths: whether buckets will be chosen by `facts`.
        Raises:
            ConfigError: the recipe has no such split, or holds none of the modalities.
            DataError: no shards, one is not indexed, or the number of samples is not the recipe's.
        """
        self.name = f"{recipe.name}/{split}"
        self.shards = find_split(recipe, split, place=place)
        self.facts = _find_facts(self.shards, place, lengths=buckets is not None or keep_lengths)
        self.rules = _member_rules(recipe, modalities)
        if not self.rules:
            raise ConfigError(f"recipe {recipe.name!r} has none of the run's modalities {', '.join(modalities)}")
        self.buckets = buckets
        self.group_pattern = re.compile(recipe.group_pattern) if recipe.group_pattern else None
        self.files = ShardFiles(self.shards, self.facts, cache=cache)
        self.counts = np.array([facts.samples for facts in self.facts], dtype=np.int64)
        self._check_counts(expected=recipe.splits[split].samples)
        self._shown = [shard.shown for shard in self.shards]
        self._modalities = tuple(self.rules)
        self._choices = tuple(tuple(rule.extensions) for rule in self.rules.values())
        self._weights = {m: rule.extensions for m, rule in self.rules.items() if isinstance(rule.extensions, dict)}
        self._selected: dict[tuple[int, int], np.ndarray] = {}
        self._ends: list[list[int]] = np.cumsum(self.counts_by_bucket, axis=1).tolist()

    def __len__(self) -> int:
        return int(self.counts.sum())

    @cached_property
    def index_hash(self) -> str:
        """Changes when any shard's samples, members or their order do."""
        return f"{hash_int(*(facts.content_hash for facts in self.facts)):016x}"

    @property
    def reading_hash(self) -> str:
        """Changes when the recipe's `members` or `group_pattern` do: they make other samples of the same tars."""
        rules = [f"{name} {rule.model_dump_json(exclude_defaults=True)}" for name, rule in sorted(self.rules.items())]
        return f"{hash_int(*rules, self.group_pattern and self.group_pattern.pattern):016x}"

    @cached_property
    def counts_by_bucket(self) -> np.ndarray:
        """Samples of each shard: int64 `(buckets, shards)`, one bucket where a run has none."""
        if self.buckets is None:
            return self.counts[None]
        extensions = self._bucket_extensions
        return np.stack([self.buckets.count_samples(facts, extensions, name=self.name) for facts in self.facts], axis=1)

    @property
    def remote_shards(self) -> dict[int, tuple[str, ...]]:
        """URLs of the shards that must be fetched, by number."""
        return {n: shard.parts for n, shard in enumerate(self.shards) if shard.is_remote}

    def count_by_modalities(self) -> dict[tuple[str, ...], int]:
        """How many samples hold exactly which of the modalities."""
        counts: dict[tuple[str, ...], int] = {}
        for facts in self.facts:
            for signature, count in zip(facts.signatures, facts.signature_counts, strict=True):
                present = tuple(m for m, rule in self.rules.items() if set(rule.extensions) & set(signature))
                counts[present] = counts.get(present, 0) + count
        return {present: count for present, count in counts.items() if count}

    def check_shards(self) -> None:
        """Compares every local shard with what it was when it was indexed.

        Raises:
            ShardError: one has changed; names it.
        """
        for shard, facts in zip(self.shards, self.facts, strict=True):
            for url, part in zip(shard.parts, facts.parts, strict=True):
                if not is_remote(url):
                    check_unchanged(url, part)

    def read(self, number: int, *, bucket: int = 0, seed: int | None = None) -> RawSample:
        """The members of a sample that hold the run's modalities.

        Args:
            seed: keys the choice among weighted extensions; None for the first.
        Raises:
            ShardError: the shard has changed since it was indexed.
            DataError: it cannot be read.
        """
        shard, inside = self.locate(number, bucket=bucket)
        index = self.files.index(shard)
        key, spans = index.spans(inside, self._choices)
        if seed is not None and self._weights:
            self._draw_extensions(index, inside, spans, seed=seed)
        members = self.files.read(shard, zip(self._modalities, spans, strict=True))
        group = self._group_of(shard, key) if self.group_pattern else None
        return RawSample(self._shown[shard], key, group, members)

    def _draw_extensions(self, index: ShardIndex, inside: int, spans: list[Span | None], *, seed: int) -> None:
        """Replaces the first extensions that a sample has by drawn ones, where a rule weighs them."""
        for place, modality in enumerate(self._modalities):
            if modality in self._weights:
                drawn = order_by_weight(self._weights[modality], seed=hash_int(seed, modality, "extension"))
                spans[place] = index.spans(inside, (drawn,))[1][0]

    def locate(self, number: int, *, bucket: int = 0) -> tuple[int, int]:
        """A sample's shard, and its number in the shard's index."""
        ends = self._ends[bucket]
        shard = bisect.bisect_right(ends, number)
        inside = number - ends[shard - 1] if shard else number
        if self.buckets is None and not self.facts[shard].skipped:
            return shard, inside
        return shard, int(self._numbers(bucket, shard)[inside])

    def _numbers(self, bucket: int, shard: int) -> np.ndarray:
        """Numbers, in the shard's index, of its samples in a bucket, without skipped ones."""
        if (bucket, shard) not in self._selected:
            index = self.files.index(shard)
            kept = np.delete(np.arange(len(index)), self.facts[shard].skipped)
            if self.buckets is not None:
                kept = kept[self.buckets.assign(index.member_sizes(self._bucket_extensions)[kept]) == bucket]
            if len(self._selected) >= _MAX_SELECTIONS:
                self._selected.clear()
            self._selected[bucket, shard] = kept.astype(np.int32)
        return self._selected[bucket, shard]

    @cached_property
    def _bucket_extensions(self) -> tuple[str, ...]:
        assert self.buckets is not None
        rule = self.rules.get(self.buckets.modality)
        return tuple(rule.extensions) if rule else ()

    def _group_of(self, shard: int, key: str) -> str:
        assert self.group_pattern is not None
        found = self.group_pattern.search(key)
        if found is None:
            raise DataError(f"{self._shown[shard]}: group_pattern {self.group_pattern.pattern!r} is not in key {key!r}")
        return found.group(found.lastindex or 0)

    def _check_counts(self, *, expected: int | None) -> None:
        if not len(self):
            raise DataError(f"{self.name}: its {len(self.shards)} shards hold no samples at all")
        skipped = sum(len(facts.skipped) for facts in self.facts)
        if expected is not None and expected != len(self) + skipped:
            raise DataError(f"{self.name}: its recipe says {expected} samples, its shards hold {len(self)}")
        if set(self.count_by_modalities()) == {()}:
            wanted = ", ".join(f"{modality}: {' '.join(rule.extensions)}" for modality, rule in self.rules.items())
            shard, facts = next(pair for pair in zip(self.shards, self.facts, strict=True) if pair[1].samples)
            found = " ".join(f".{extension}" for extension in itertools.islice(facts.signatures[0], 4))
            raise DataError(
                f"{self.name}: no sample has a member that its recipe reads ({wanted}); "
                f"{shard.shown} has {found} (an extension begins at the first dot of a name)"
            )


_MAX_SELECTIONS = 256
"""Shards whose selected numbers are kept, 4 bytes a sample."""


def _find_facts(shards: list[Shard], place: Path, *, lengths: bool) -> list[ShardFacts]:
    """Facts of each shard from the manifests of their folders."""
    manifests = {folder: read_manifest(folder, lengths=lengths) for folder in {shard.index_folder for shard in shards}}
    missing = [shard for shard in shards if shard.name not in manifests[shard.index_folder]]
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        what = str(place) if place.suffix in (".yaml", ".yml") else missing[0].shown
        raise DataError(f"{missing[0].shown}{others}: not indexed; run: mmfuse shards index {what}")
    return [manifests[shard.index_folder][shard.name] for shard in shards]


def _member_rules(recipe: Recipe, modalities: tuple[str, ...]) -> dict[str, MemberRule]:
    """The recipe's rules for the run's modalities, or those that their files name."""
    if recipe.members is None:
        return {m: MemberRule(extensions=find_plugin("mmfuse.modalities", m).EXTENSIONS) for m in modalities}
    return {m: recipe.members[m] for m in modalities if m in recipe.members}
