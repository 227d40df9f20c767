"""`mmfuse shards quarantine`: samples that runs found bad are left out of the plan from now on."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from mmfuse.data.manifest import ShardFacts, content_hash, gather_facts, index_path, read_manifest, update_manifest
from mmfuse.data.recipe import Shard
from mmfuse.data.remote.urls import is_remote
from mmfuse.data.shard_index import ShardIndex
from mmfuse.errors import DataError


class SkippedSamples(NamedTuple):
    """What was taken out of one shard."""

    shard: Shard
    added: int
    """Samples that were not left out before."""
    samples: int
    """Those that remain."""


def read_bad_keys(places: Iterable[Path], *, any_member: bool) -> dict[str, set[str]]:
    """Keys of bad samples by shard, from run folders (`quarantine.rank*.jsonl`), such files, or findings of a check.

    Args:
        any_member: also samples that have a good member besides the bad one; a check does not tell them apart.
    Raises:
        DataError: nothing is there, or a line is not of this kind.
    """
    found: dict[str, set[str]] = {}
    for place in places:
        files = sorted(place.glob("quarantine.rank*.jsonl")) if place.is_dir() else [place]
        if not files:
            raise DataError(f"{place}: no quarantine.rank*.jsonl in it: this run met nothing bad")
        for file in files:
            for number, line in enumerate(_lines(file), start=1):
                try:
                    fault = json.loads(line)
                    if fault["key"] is not None and (any_member or fault.get("lost")):
                        found.setdefault(fault["shard"], set()).add(fault["key"])
                except (ValueError, LookupError, TypeError) as error:
                    raise DataError(f"{file}: line {number} is not one of a quarantine file: {error}") from error
    return found


def skip_samples(shards: Sequence[Shard], bad: dict[str, set[str]]) -> list[SkippedSamples]:
    """Takes samples out of the manifests of their shards; the index hash changes with it, so no run mixes both orders.

    `mmfuse shards index --force` takes everything back.

    Raises:
        DataError: a shard or a key is not among those that are indexed.
    """
    known = {_place(shard.shown): shard for shard in shards}  # a run may have named its recipe by another path
    bad = {_place(shown): keys for shown, keys in bad.items()}
    if strangers := bad.keys() - known.keys():
        raise DataError(f"{min(strangers)}: not among the shards that were named; name its recipe or its folder")
    manifests = {shard.index_folder: read_manifest(shard.index_folder) for shard in known.values()}
    changes: dict[Path, dict[str, ShardFacts]] = {}
    results = []
    for shown, keys in sorted(bad.items()):
        shard = known[shown]
        if shard.name not in manifests[shard.index_folder]:
            raise DataError(f"{shown}: not indexed; run: mmfuse shards index")
        before = manifests[shard.index_folder][shard.name]
        after = _skip(shard, before, keys)
        changes.setdefault(shard.index_folder, {})[shard.name] = after
        results.append(SkippedSamples(shard, len(after.skipped) - len(before.skipped), after.samples))
    for folder, facts in changes.items():
        update_manifest(folder, facts)
    return results


def _place(shown: str) -> str:
    return " + ".join(part if is_remote(part) else os.path.abspath(part) for part in shown.split(" + "))


def _skip(shard: Shard, before: ShardFacts, keys: set[str]) -> ShardFacts:
    index = ShardIndex(index_path(shard.index_folder, shard.name))
    if content_hash(index, skipped=before.skipped) != before.content_hash:
        raise DataError(f"{shard.shown}: its index is not the one that its manifest knows; run: mmfuse shards index")
    numbers = {number for number in range(len(index)) if index.sample(number).key in keys}
    if len(numbers) < len(keys):
        raise DataError(f"{shard.shown}: {len(keys) - len(numbers)} of the bad samples are not in it; has it changed?")
    return gather_facts(index, before.parts, skipped=tuple(sorted(numbers.union(before.skipped))))


def _lines(file: Path) -> list[str]:
    try:
        return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from error
