"""A source: one split of one recipe, opened for reading by sample number."""

import os
import re
from collections import OrderedDict
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmfuse.config import find_plugin
from mmfuse.data.recipe import MemberRule, Recipe, find_shards
from mmfuse.data.shard_index import SUFFIX, SampleMembers, ShardIndex
from mmfuse.errors import ConfigError, DataError, ShardError
from mmfuse.hashing import hash_int

_MAX_OPEN_SHARDS = 64


class RawSample(NamedTuple):
    """One sample as bytes."""

    key: str
    """`shard/key`, for messages and audits."""
    group_id: int
    members: dict[str, tuple[str, bytes]]
    """Modality -> (extension, bytes)."""


class Source:
    """Samples of one split, numbered 0 to len - 1 in the order of sorted shards."""

    def __init__(self, recipe: Recipe, split: str, *, folder: Path, modalities: tuple[str, ...]) -> None:
        """Opens every shard's index.

        Raises:
            ConfigError: the recipe has no such split, or holds none of the modalities.
            DataError: no shards, an index is missing, or the number of samples is not the recipe's.
            ShardError: a shard has changed since it was indexed.
        """
        if split not in recipe.splits:
            raise ConfigError(f"recipe {recipe.name!r} has no split {split!r}; it has {', '.join(recipe.splits)}")
        self.name = f"{recipe.name}/{split}"
        self.rules = _member_rules(recipe, modalities)
        if not self.rules:
            raise ConfigError(f"recipe {recipe.name!r} has none of the run's modalities {', '.join(modalities)}")
        self.group_pattern = re.compile(recipe.group_pattern) if recipe.group_pattern else None
        self.shards = find_shards(recipe.splits[split].shards, folder=folder)
        self.indexes = [open_index(shard) for shard in self.shards]
        self.counts = np.array([len(index) for index in self.indexes], dtype=np.int64)
        self._ends = np.cumsum(self.counts)
        if not len(self):
            raise DataError(f"{self.name}: its {len(self.shards)} shards hold no samples at all")
        self._files: OrderedDict[int, int] = OrderedDict()
        expected = recipe.splits[split].samples
        if expected is not None and expected != len(self):
            raise DataError(f"{self.name}: recipe {recipe.name!r} says {expected} samples, its shards hold {len(self)}")
        if set(self.count_by_modalities()) == {()}:
            wanted = ", ".join(f"{modality}: {' '.join(rule.extensions)}" for modality, rule in self.rules.items())
            found = " ".join(f".{extension}" for extension in self.indexes[0].signatures[0][:4])
            raise DataError(
                f"{self.name}: no sample has a member that recipe {recipe.name!r} reads ({wanted}); "
                f"{self.shards[0]} has {found} (an extension begins at the first dot of a name)"
            )

    def __getstate__(self) -> dict[str, Any]:
        """Without open files: their numbers mean others in a spawned worker."""
        return {**self.__dict__, "_files": OrderedDict()}

    def __len__(self) -> int:
        return int(self._ends[-1])

    @cached_property
    def index_hash(self) -> str:
        """Changes when any shard's samples, members or their order do."""
        return f"{hash_int(*(index.header['content_hash'] for index in self.indexes)):016x}"

    def count_by_modalities(self) -> dict[tuple[str, ...], int]:
        """How many samples hold exactly which of the modalities; read from the headers alone."""
        counts: dict[tuple[str, ...], int] = {}
        for index in self.indexes:
            for signature, count in zip(index.signatures, index.header["signature_counts"], strict=True):
                present = tuple(m for m, rule in self.rules.items() if set(rule.extensions) & set(signature))
                counts[present] = counts.get(present, 0) + count
        return counts

    def locate(self, number: int) -> tuple[int, SampleMembers]:
        """Shard number and members of a sample."""
        shard = int(np.searchsorted(self._ends, number, side="right"))
        return shard, self.indexes[shard].sample(number - int(self._ends[shard] - self.counts[shard]))

    def read(self, number: int) -> RawSample:
        """The members of a sample that hold the run's modalities."""
        shard, sample = self.locate(number)
        members = {}
        for modality, rule in self.rules.items():
            extension = next((e for e in rule.extensions if e in sample.members), None)
            if extension is not None:
                members[modality] = (extension, self._read_bytes(shard, *sample.members[extension]))
        return RawSample(f"{self.shards[shard]}/{sample.key}", self._group_of(shard, sample.key), members)

    def _group_of(self, shard: int, key: str) -> int:
        if self.group_pattern is None:
            return hash_int(self.name, self.shards[shard].name, key)
        found = self.group_pattern.search(key)
        if found is None:
            raise DataError(f"{self.shards[shard]}: group_pattern {self.group_pattern.pattern!r} is not in key {key!r}")
        return hash_int(found.group(found.lastindex or 0))

    def _read_bytes(self, shard: int, offset: int, size: int) -> bytes:
        if shard not in self._files:
            if len(self._files) >= _MAX_OPEN_SHARDS:
                os.close(self._files.popitem(last=False)[1])
            try:
                self._files[shard] = os.open(self.shards[shard], os.O_RDONLY)
            except OSError as error:
                raise DataError(f"{self.shards[shard]}: cannot be read any more: {error.strerror}") from error
        self._files.move_to_end(shard)
        data = os.pread(self._files[shard], size, offset)
        if len(data) != size:
            raise ShardError(f"{self.shards[shard]}: ends before byte {offset + size}; it has changed, index it again")
        return data


def _member_rules(recipe: Recipe, modalities: tuple[str, ...]) -> dict[str, MemberRule]:
    """The recipe's rules for the run's modalities, or those that their files name."""
    if recipe.members is None:
        return {m: MemberRule(extensions=find_plugin("mmfuse.modalities", m).EXTENSIONS) for m in modalities}
    return {m: recipe.members[m] for m in modalities if m in recipe.members}


def open_index(shard: Path) -> ShardIndex:
    """The index beside a shard, checked against the shard's size."""
    place = shard.with_name(shard.name + SUFFIX)
    if not place.is_file():
        raise DataError(f"{shard} has no index; run: mmfuse shards index {shard.parent}")
    index = ShardIndex(place)
    size = shard.stat().st_size
    if index.header["shard_bytes"] != size:
        raise ShardError(
            f"{shard}: has {size} bytes, but {index.header['shard_bytes']} when it was indexed; "
            f"if the change is meant, run: mmfuse shards index --force {shard}"
        )
    return index
