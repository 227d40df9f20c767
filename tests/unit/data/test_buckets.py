"""Length buckets: the manifest's counts are those of the samples, and no sample is dealt twice or never."""

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers import index_folder, write_tar, write_yaml

from mmfuse.data.buckets import BucketConfig, LengthBuckets, choose_buckets
from mmfuse.data.mixture import SourceConfig, open_source
from mmfuse.data.plan import DataPlan, PlannedSource
from mmfuse.data.source import Source
from mmfuse.errors import ConfigError


def write_texts(folder: Path, *, shards: int = 4, samples: int = 50) -> str:
    """Texts of 1 to 2,000 bytes; a sixth of the samples has none, some have two members that could be the text."""
    draw = np.random.default_rng(0)
    for shard in range(shards):
        members: dict[str, bytes] = {}
        for number in range(samples):
            key = f"{shard}_{number:03d}"
            members[f"{key}.json"] = b"{}"
            if draw.random() < 0.2:
                members[f"{key}.long"] = b"x" * int(draw.integers(1000, 2000))
            if draw.random() < 0.8:
                members[f"{key}.txt"] = b"x" * int(np.exp(draw.uniform(0, np.log(1000))))
        write_tar(folder / f"{shard}.tar", members)
    index_folder(folder)
    rule = {"text": {"extensions": ["txt", "long"]}}
    return str(
        write_yaml(folder / "r.yaml", {"name": "t", "members": rule, "splits": {"train": {"shards": ["*.tar"]}}})
    )


def open_bucketed(recipe: str, *, count: int) -> Source:
    config = SourceConfig(recipe=recipe)
    plain = open_source(config, modalities=("text",), keep_lengths=True)
    buckets = choose_buckets(BucketConfig(modality="text", count=count), [(plain.name, plain.facts, ("txt", "long"))])
    return open_source(config, modalities=("text",), buckets=buckets)


@pytest.mark.parametrize("count", [2, 5])
def test_buckets_part_all_samples_by_length_and_about_equally(tmp_path: Path, count: int) -> None:
    source = open_bucketed(write_texts(tmp_path), count=count)
    seen, ranges = [], []
    for bucket, shards in enumerate(source.counts_by_bucket):
        samples = [source.read(number, bucket=bucket) for number in range(int(shards.sum()))]
        seen += [sample.key for sample in samples]
        lengths = [len(sample.members["text"][1]) for sample in samples if sample.members]
        ranges.append((min(lengths), max(lengths)))
    assert sorted(seen) == sorted(f"{shard}_{number:03d}" for shard in range(4) for number in range(50))
    assert all(low_end < high_start for (_, low_end), (high_start, _) in itertools.pairwise(ranges))
    sizes = source.counts_by_bucket.sum(1)
    assert len(sizes) == count and sizes.min() > 0.5 * sizes.max()


def test_samples_without_the_modality_are_spread_over_all_buckets(tmp_path: Path) -> None:
    source = open_bucketed(write_texts(tmp_path), count=3)
    lacking = [
        sum(not source.read(number, bucket=bucket).members for number in range(int(shards.sum())))
        for bucket, shards in enumerate(source.counts_by_bucket)
    ]
    assert sum(lacking) > 20 and max(lacking) - min(lacking) <= len(source.shards)


def test_a_global_batch_is_of_one_bucket_and_every_sample_comes_once_an_epoch(tmp_path: Path) -> None:
    source = open_bucketed(write_texts(tmp_path), count=3)
    plan = DataPlan(
        [PlannedSource(source.name, source.counts_by_bucket, 1.0, source.index_hash)],
        seed=1,
        global_batch=16,
        lanes=4,
        window_shards=2,
    )
    steps = [plan.rows(step, 0, 16) for step in range(100)]
    assert all(len(set(rows[:, 0])) == 1 for rows in steps)
    times = Counter(map(tuple, np.concatenate(steps).tolist()))
    assert set(times.values()) == {1}
    first = {(bucket, number) for bucket, number, epoch in times if epoch == 0}
    assert first == {(b, n) for b, shards in enumerate(source.counts_by_bucket) for n in range(int(shards.sum()))}
    shares = np.bincount([rows[0, 0] for rows in steps]) / 100
    assert np.abs(shares - source.counts_by_bucket.sum(1) / len(source)).max() < 0.02


def test_lengths_that_cannot_be_parted_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {f"{n}.txt": b"same" for n in range(9)})
    index_folder(tmp_path)
    recipe = write_yaml(tmp_path / "r.yaml", {"name": "t", "splits": {"train": {"shards": ["0.tar"]}}})
    source = open_source(SourceConfig(recipe=str(recipe)), modalities=("text", "audio"), keep_lengths=True)
    with pytest.raises(ConfigError, match="all text members are about equally long"):
        choose_buckets(BucketConfig(modality="text", count=2), [(source.name, source.facts, ("txt",))])
    with pytest.raises(ConfigError, match="no training sample has audio"):
        choose_buckets(BucketConfig(modality="audio", count=2), [(source.name, source.facts, ("wav",))])


def test_the_counts_of_the_manifest_are_those_of_the_samples() -> None:
    buckets = LengthBuckets("text", (4, 9))
    sizes = np.array([-1, 1, 4, 22, -1, 23, 10**6, -1, -1])
    assert buckets.assign(sizes).tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 0]
