"""What indexed shards hold, in memory that does not grow with the number of samples."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmfuse.data.recipe import MemberRule, Shard
from mmfuse.data.remote.urls import is_remote
from mmfuse.data.shard_index import ShardIndex
from mmfuse.errors import ShardError
from mmfuse.shards.hostile_pool import run_jobs
from mmfuse.shards.member_reader import local_parts, open_index
from mmfuse.shards.modality_rules import default_rules
from mmfuse.shards.probe import Chosen, ProbeTotals, ProbeWork
from mmfuse.shards.sketch import Sketch

_JOB_SAMPLES = 512
_MEMBER_SECONDS = 30.0
_MOST_SETS = 4096


@dataclass
class ShardRow:
    """One shard, for comparing it with the others."""

    name: str
    samples: int
    bytes: int
    modalities: Counter[str]
    """Samples that have each."""
    probed: int = 0
    """Samples whose members were read."""
    unreadable: int = 0
    sums: Counter[str] = field(default_factory=Counter)
    """Of what was read: megapixels, seconds, words."""
    counts: Counter[str] = field(default_factory=Counter)
    """How many values each sum is of."""

    @property
    def means(self) -> dict[str, float]:
        """Means of what was read."""
        return {name: self.sums[name] / count for name, count in self.counts.items() if count}

    def add(self, probe: ProbeTotals) -> None:
        """Counts what was read of some of its samples."""
        self.probed += probe.samples
        self.unreadable += probe.unreadable.total()
        for name, sketch in (
            ("megapixels", probe.pictures.megapixels),
            ("seconds", probe.sounds.seconds),
            ("words", probe.captions.words),
        ):
            self.sums[name] += sketch.total  # type: ignore[assignment]  # typed for whole numbers
            self.counts[name] += sketch.count


@dataclass
class ShardStats:
    """Counts over shards. Distributions are kept in bins that grow by 2%, whatever the number of samples."""

    modalities: tuple[str, ...] = ()
    samples: int = 0
    bytes: int = 0
    """Of the tars."""
    subsets: Counter[tuple[str, ...]] = field(default_factory=Counter)
    """Samples by the modalities that they have, in the order of `modalities`."""
    extensions: Counter[tuple[str, ...]] = field(default_factory=Counter)
    """Samples by their extensions, in alphabetical order; beyond some thousand sets the rarer ones are ("...",)."""
    member_bytes: dict[str, Sketch] = field(default_factory=dict)
    """Sizes of all members by extension."""
    rows: list[ShardRow] = field(default_factory=list)
    """One for each shard."""
    to_probe: int = 0
    probe: ProbeTotals | None = None
    """None where nothing was read but indexes."""

    def to_json(self) -> str:
        """All numbers as one JSON object."""
        numbers: dict[str, Any] = {"shards": len(self.rows), "samples": self.samples, "bytes": self.bytes}
        numbers["subsets"] = {"+".join(subset) or "none": count for subset, count in self.subsets.most_common()}
        numbers["extensions"] = {"+".join(names): count for names, count in self.extensions.most_common()}
        numbers["member_bytes"] = {name: sketch.to_json() for name, sketch in sorted(self.member_bytes.items())}
        numbers["probe"] = _probe_to_json(self.probe) if self.probe else None
        numbers["each_shard"] = [_row_to_json(row) for row in self.rows]
        return json.dumps(numbers, indent=1)


def collect_stats(
    shards: Sequence[Shard],
    *,
    rules: Mapping[str, MemberRule] | None = None,
    probe: bool = False,
    limit: int | None = None,
    seed: int = 0,
    num_workers: int = 1,
) -> Iterator[ShardStats]:
    """The totals so far, one object that grows: after each shard, then after each group of probed samples.

    Args:
        rules: by modality, which members are its; without, what each modality's file reads.
        probe: whether to read the headers of pictures and sounds, and texts. Remote shards cannot be probed.
        limit: probe so many samples at most, of every shard its share, chosen by `seed`.

    Raises:
        ShardError: a shard has no index, or another size than it had when it was indexed.
        DataError: a shard that is to be probed cannot be read.
    """
    rules = default_rules() if rules is None else rules
    stats = ShardStats(modalities=tuple(rules))
    for shard in shards:
        if probe:
            local_parts(shard)
        index = open_index(shard)
        _check_sizes(shard, index)
        _count(stats, shard, index, rules)
        index.close()
        yield stats
    if probe:
        yield from _probe(stats, shards, rules, limit=limit, seed=seed, num_workers=num_workers)


def _check_sizes(shard: Shard, index: ShardIndex) -> None:
    for place, part in zip(shard.parts, index.parts, strict=True):
        if not is_remote(place) and Path(place).is_file() and Path(place).stat().st_size != part.bytes:
            raise ShardError(f"{place}: has another size than when it was indexed; run: mmfuse shards index")


def _count(stats: ShardStats, shard: Shard, index: ShardIndex, rules: Mapping[str, MemberRule]) -> None:
    """Adds what the index of one shard says."""
    row = ShardRow(shard.shown, len(index), sum(part.bytes for part in index.parts), Counter())
    stats.samples, stats.bytes = stats.samples + row.samples, stats.bytes + row.bytes
    stats.rows.append(row)
    for number, extensions in enumerate(index.signatures):
        count = index.header["signature_counts"][number]
        present = tuple(m for m, rule in rules.items() if not set(rule.extensions).isdisjoint(extensions))
        stats.subsets[present] += count
        row.modalities.update(dict.fromkeys(present, count))
        stats.extensions[tuple(sorted(extensions))] += count
        first = index.first_member[index.signature == number].astype(np.int64)
        for place, extension in enumerate(extensions):
            stats.member_bytes.setdefault(extension, Sketch()).add(index.member_size[first + place])
    if len(stats.extensions) > _MOST_SETS:
        rare = stats.extensions.most_common()[_MOST_SETS // 2 :]
        stats.extensions -= Counter(dict(rare))
        stats.extensions[("...",)] += sum(count for _, count in rare)


def _probe(
    stats: ShardStats,
    shards: Sequence[Shard],
    rules: Mapping[str, MemberRule],
    *,
    limit: int | None,
    seed: int,
    num_workers: int,
) -> Iterator[ShardStats]:
    stats.probe = ProbeTotals()
    stats.to_probe = stats.samples if limit is None else min(limit, stats.samples)
    jobs = _choose(shards, [row.samples for row in stats.rows], num_chosen=stats.to_probe, seed=seed)
    rows = dict(zip(shards, stats.rows, strict=True))
    work, preload = ProbeWork(rules), (ProbeWork.__module__,)
    for outcome in run_jobs(jobs, work, num_workers=num_workers, item_seconds=_MEMBER_SECONDS, preload=preload):
        stats.probe.merge(outcome.result)
        rows[outcome.job.shard].add(outcome.result)
        yield stats


def _choose(shards: Sequence[Shard], counts: list[int], *, num_chosen: int, seed: int) -> Iterator[Chosen]:
    """The samples to probe: every shard's share of them, rounded so that they add up, evenly drawn within it."""
    ends = np.cumsum(counts)
    quotas = np.diff(num_chosen * ends // max(1, int(ends[-1]) if len(ends) else 0), prepend=0)
    for place, (shard, count, quota) in enumerate(zip(shards, counts, quotas.tolist(), strict=True)):
        drawn = np.random.default_rng([seed, place]).choice(count, quota, replace=False, shuffle=False)
        numbers = np.sort(drawn)
        for first in range(0, quota, _JOB_SAMPLES):
            yield Chosen(shard, numbers[first : first + _JOB_SAMPLES])


def _row_to_json(row: ShardRow) -> dict[str, Any]:
    counted = {"shard": row.name, "samples": row.samples, "bytes": row.bytes, "modalities": dict(row.modalities)}
    read = {"probed": row.probed, "unreadable": row.unreadable, "means": row.means} if row.probed else {}
    return counted | read


def _probe_to_json(probe: ProbeTotals) -> dict[str, Any]:
    pictures, sounds, captions = probe.pictures, probe.sounds, probe.captions
    sketches = {
        "width": pictures.width, "height": pictures.height, "megapixels": pictures.megapixels,
        "aspect_ratio": pictures.aspect, "seconds": sounds.seconds, "caption_characters": captions.characters,
        "caption_words": captions.words,
    }  # fmt: skip
    return {
        "samples": probe.samples,
        "unreadable": dict(probe.unreadable),
        **{name: sketch.to_json() for name, sketch in sketches.items()},
        "picture_kinds": dict(pictures.kinds.most_common(20)),
        "sound_kinds": dict(sounds.kinds.most_common(20)),
        "empty_texts": captions.empty,
        "distinct_captions": captions.distinct.count,
        "repeated_captions_share": captions.repeated,
        "common_captions": [[caption, count] for caption, count in captions.common.most_common(20) if count > 1],
    }
