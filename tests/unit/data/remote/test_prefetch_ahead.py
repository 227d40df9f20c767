"""The prefetcher's view of the plan."""

import itertools
import random
from collections.abc import Iterator

import pytest

from mmfuse.data.plan import ShardUse
from mmfuse.data.remote.prefetch_ahead import CachedShard, LookAhead
from mmfuse.errors import ConfigError

SHARDS = {(0, n): (CachedShard(f"s3://bucket/{n}.tar", 10 + n, "v"),) for n in range(6)}


def name_of(number: int) -> str:
    return f"-{number}.tar"


def endless(seed: int) -> Iterator[ShardUse]:
    """Uses of remote shards (source 0) and of local ones (source 1), from step 100 on."""
    generator = random.Random(seed)
    for step in itertools.count(100, 3):
        for _ in range(generator.randrange(3)):
            yield ShardUse(step, step + generator.randrange(20), generator.randrange(2), generator.randrange(6))


@pytest.mark.parametrize("seed", range(3))
def test_the_working_set_is_the_largest_that_any_step_needs(seed: int) -> None:
    ahead = LookAhead(SHARDS, itertools.takewhile(lambda use: use.first_step < 300, endless(seed)))
    needs = {}
    for step in range(100, 330):
        # One step after its last, not all ranks have said that they are done.
        needs[step] = {use.name: use.size for use in ahead.uses if use.first_step <= step <= use.last_step + 1}
    found = ahead.working_set()
    assert sum(found.sizes.values()) == max(sum(sizes.values()) for sizes in needs.values())
    assert needs[found.step] == found.sizes


@pytest.mark.parametrize(("gap", "step", "together"), [(1, 5, 2), (2, 0, 1)])
def test_a_shard_is_held_for_one_step_after_its_last(gap: int, step: int, together: int) -> None:
    found = LookAhead(SHARDS, iter([ShardUse(0, 4, 0, 3), ShardUse(4 + gap, 9, 0, 0)])).working_set()
    assert (found.step, len(found.sizes)) == (step, together)


def test_an_endless_plan_is_read_as_far_as_it_matters_and_goes_on(seed: int = 0) -> None:
    ahead = LookAhead(SHARDS, endless(seed))
    assert ahead.step == 99 and 1024 <= len(ahead.uses) <= 2048
    expected = [use for use in itertools.islice(endless(seed), 20_000) if use.source == 0]
    for step in (150, 150, 3000, 3001, 9999):
        ahead.advance(step)
        assert ahead.step == step and ahead.uses[-1].first_step > step + 1
        shown = [(use.first_step, use.last_step, use.name[32:]) for use in ahead.uses]
        whole = [(u.first_step, u.last_step, name_of(u.shard)) for u in expected if u.last_step >= step]
        assert shown == whole[: len(shown)]


def test_a_plan_that_reads_hardly_anything_remote_is_not_read_for_ever() -> None:
    plan = (ShardUse(step, step, 0 if step == 5 else 1, 0) for step in itertools.count())
    ahead = LookAhead(SHARDS, plan)
    for _ in range(100):
        ahead.advance(-1)
    assert next(plan).first_step == 8191 and len(ahead.uses) == 1


def test_the_reach_of_downloads_counts_each_shard_once_and_none_that_is_read_now() -> None:
    uses = [(0, 0), (1, 1), (5, 2), (6, 2), (7, 0), (8, 3), (9, 4)]
    ahead = LookAhead(SHARDS, iter([ShardUse(step, step, 0, shard) for step, shard in uses]))
    assert [ahead.step_after(size) for size in (0, 21, 22, 23, 34, 35, 99)] == [1, 5, 5, 7, 8, 8, 9]


def test_urls_that_differ_in_their_query_alone_need_a_version() -> None:
    urls = ("https://host/get?shard=0", "https://host/get?shard=1")
    with pytest.raises(ConfigError, match=r"^https://host/get: is named with different queries"):
        LookAhead({(0, n): (CachedShard(url, 10, ""),) for n, url in enumerate(urls)}, iter([]))
    LookAhead({(0, n): (CachedShard(url, 10, f"v{n}"),) for n, url in enumerate(urls)}, iter([]))
    LookAhead({(0, n): (CachedShard(url, 10, "signed twice"),) for n, url in enumerate(urls)}, iter([]))
    LookAhead({(n, 0): (CachedShard(urls[0], 10, ""),) for n in range(2)}, iter([]))
