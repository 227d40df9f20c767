"""The shard cache: what it is named, what it keeps, what it lets go, and what it never touches."""

import functools
import os
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from caches import fetch, files_in, join_cache, start_other, use

from mmfuse.data.remote.cache import ShardCache, cache_name
from mmfuse.errors import ConfigError, DataError


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[ShardCache]:
    cache = join_cache(tmp_path)
    yield cache
    cache.close()


def test_a_name_is_of_the_whole_address_and_the_version_but_not_of_secrets() -> None:
    name = cache_name("https://host/a/00000.tar", "v1")
    others = [("https://host/b/00000.tar", "v1"), ("https://host/a/00000.tar", "v2"), ("s3://host/a/00000.tar", "v1")]
    assert len({name, *(cache_name(*other) for other in others)}) == 4
    assert cache_name("https://user:pass@host/a/00000.tar?X-Signature=secret", "v1") == name
    assert name.endswith("-00000.tar")
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,100}", cache_name("http://host/../ü b\n" + "x" * 300, "/../"))


def fewest_downloads(sequence: Sequence[str], room: int) -> int:
    """By trying all choices; a file may go in the second step after its use: in the first, a rank may be at it yet."""

    @functools.cache
    def rest(place: int, held: frozenset[str]) -> int:
        if place == len(sequence):
            return 0
        wanted = sequence[place]
        if wanted in held:
            return rest(place + 1, held)
        if len(held) < room:
            return 1 + rest(place + 1, held | {wanted})
        return 1 + min(rest(place + 1, held - {out} | {wanted}) for out in held - {sequence[place - 1]})

    return rest(0, frozenset())


@pytest.mark.parametrize("seed", range(4))
def test_no_choice_of_what_to_evict_needs_fewer_downloads(cache: ShardCache, seed: int) -> None:
    sequence = random.Random(seed).choices("abcdef", k=18)
    cache.begin(-1, [use(name, step) for step, name in enumerate(sequence)], working_set={})
    downloads = 0
    for step, name in enumerate(sequence):
        cache.advance(step - 1)
        if not (cache.folder / name).exists():
            assert fetch(cache, name)
            downloads += 1
    assert downloads == fewest_downloads(sequence, 3)


def test_nothing_that_is_needed_earlier_makes_room(cache: ShardCache) -> None:
    cache.begin(-1, [use("a", 0, 9), use("b", 20), use("c", 30), use("d", 25), use("e", 40)], working_set={})
    assert [name for name, *_ in cache.missing(9)] == ["a", "b", "d", "c", "e"]
    cache.advance(-1, [use("big", 10, size=25)])
    assert all(fetch(cache, name) for name in "abc")
    assert not fetch(cache, "e") and files_in(cache.folder) == {"a", "b", "c"}
    assert not cache.reserve("d", 10, only_unused=True)
    assert fetch(cache, "d") and files_in(cache.folder) == {"a", "b", "d"}
    assert not cache.reserve("x", 31)
    assert not cache.reserve("big", 25) and files_in(cache.folder) == {"a", "b", "d"}, "without all, none"
    cache.advance(9)
    assert not fetch(cache, "c"), "step 9 is the last of a: a rank may just be reading it"
    cache.advance(10)
    assert fetch(cache, "c") and files_in(cache.folder) == {"b", "c", "d"}


def test_what_is_read_now_or_being_downloaded_makes_room_for_nothing(cache: ShardCache) -> None:
    cache.begin(-1, [use("a", 5, 9), use("b", 90), use("c", 0, 9, size=15)], working_set={})
    assert fetch(cache, "a") and cache.reserve("b", 10)
    cache.advance(4)
    assert not cache.reserve("c", 15)
    cache.temporary("b").write_bytes(bytes(10))
    cache.publish("b")
    assert cache.reserve("c", 15) and files_in(cache.folder) == {"a"}


def test_reservations_count_and_failures_give_them_back(cache: ShardCache) -> None:
    cache.begin(-1, [use("a", 0, 9), use("b", 0, 9, size=15)], working_set={})
    assert cache.reserve("a", 20)
    assert not cache.reserve("b", 15) and not cache.reserve("a", 5)
    cache.temporary("a").write_bytes(b"half")
    cache.fail("a", "gone")
    assert not files_in(cache.folder)
    assert cache.reserve("b", 15)
    assert cache.missing(9) == [], "what failed is not tried again"


def test_files_of_earlier_runs_are_used_again_and_go_first(tmp_path: Path) -> None:
    earlier = join_cache(tmp_path)
    earlier.begin(-1, [use(name, 0, 9) for name in "abc"], working_set={})
    assert all(fetch(earlier, name) for name in "abc")
    earlier.close()
    (tmp_path / "b").write_bytes(b"cut off")
    cache = join_cache(tmp_path)
    assert files_in(tmp_path) == {"a", "c"}
    cache.begin(-1, [use("a", 99), use("b", 50), use("d", 60)], working_set={})
    assert [name for name, *_ in cache.missing(9)] == ["b", "d"]
    assert fetch(cache, "b") and fetch(cache, "d") and files_in(tmp_path) == {"a", "b", "d"}
    cache.close()
    assert files_in(tmp_path) == {"a", "b", "d"} and not os.listdir(tmp_path / "owners")


def test_a_smaller_budget_shrinks_the_cache_at_once(tmp_path: Path) -> None:
    earlier = join_cache(tmp_path)
    assert all(fetch(earlier, name) for name in "abc")
    earlier.close()
    cache = join_cache(tmp_path, budget=15)
    cache.begin(-1, [use("b", 5)], working_set={})
    assert files_in(tmp_path) == {"b"}
    cache.close()


def test_what_any_living_run_reads_now_stays_and_what_both_need_last_goes_first(tmp_path: Path) -> None:
    one, two = join_cache(tmp_path, owner="one"), join_cache(tmp_path, owner="two")
    # Steps of two runs mean nothing to each other: what counts is how many steps away a use is.
    one.begin(999, [use("a", 1000, 1009), use("b", 1003)], working_set={})
    two.begin(-1, [use("b", 50), use("c", 40), use("d", 30), use("e", 0)], working_set={})
    assert all(fetch(one, name) for name in "ab") and fetch(two, "c")
    assert fetch(two, "d") and files_in(tmp_path) == {"a", "b", "d"}
    assert fetch(two, "e") and files_in(tmp_path) == {"a", "b", "e"}
    one.close()
    assert fetch(two, "d") and files_in(tmp_path) == {"b", "d", "e"}, "a is nobody's any more"
    two.close()


def test_two_runs_that_need_more_than_the_budget_at_one_time_are_told_of_each_other(tmp_path: Path) -> None:
    other = start_other(tmp_path, lambda cache: cache.begin(-1, [use("a", 0, 9), use("b", 50)], working_set={}))
    cache = join_cache(tmp_path)
    told = rf"process {other.pid}\) reads .* but data\.cache\.budget_gib = .* another data\.cache\.folder"
    with pytest.raises(ConfigError, match=told):
        cache.begin(-1, [use("c", 0), use("d", 0), use("e", 0)], working_set={"c": 10, "d": 10, "e": 10})
    assert cache.missing(9) == [], "who is refused holds nothing"
    cache.begin(-1, [use("a", 0), use("c", 0), use("d", 0)], working_set={"a": 10, "c": 10, "d": 10})
    other.kill()
    cache.close()


def test_room_that_another_run_holds_may_come_free(tmp_path: Path) -> None:
    one, two = join_cache(tmp_path, owner="one"), join_cache(tmp_path, owner="two")
    one.begin(-1, [use("a", 0, 9), use("b", 5, 9)], working_set={})
    two.begin(-1, [use("c", 0, 9), use("d", 0, 9)], working_set={})
    assert fetch(one, "a") and fetch(two, "c") and fetch(two, "d") and one.find_overflow() is None
    one.advance(4)
    problem, may_pass = one.find_overflow() or ("", False)
    assert f"(process {os.getpid()})" in problem and may_pass and not fetch(one, "b")
    two.advance(10)
    assert one.find_overflow() is None and fetch(one, "b")
    one.close()
    two.close()


def test_a_working_set_that_outgrows_the_budget_is_seen(cache: ShardCache) -> None:
    cache.begin(-1, [use("a", 0, 9), use("b", 0, 9), use("c", 0, 9), use("d", 5, 9)], working_set={})
    assert cache.find_overflow() is None
    cache.advance(4)
    problem, may_pass = cache.find_overflow() or ("", True)
    assert "this step reads 4 shards" in problem and not may_pass


def test_a_stranger_s_file_is_neither_deleted_nor_overwritten_nor_counted(cache: ShardCache) -> None:
    strangers = {"00000.tar": bytes(99), "b": b"mine", "a.me.part.old": b"mine"}
    for name, content in strangers.items():
        (cache.folder / name).write_bytes(content)
    with pytest.raises(DataError, match=r"/b: is in the way"):
        cache.reserve("b", 10)
    assert all(fetch(cache, name) for name in "acdefg")
    assert files_in(cache.folder) == {"e", "f", "g", *strangers}
    assert {name: (cache.folder / name).read_bytes() for name in strangers} == strangers


def test_a_needed_file_that_somebody_deleted_is_downloaded_again(cache: ShardCache) -> None:
    cache.begin(-1, [use("a", 0, 9)], working_set={})
    fetch(cache, "a")
    (cache.folder / "a").unlink()
    assert cache.missing(1) == []
    cache.keep_alive()
    assert cache.missing(1) == [use("a", 0, 9)]


def test_a_file_of_another_size_than_its_shard_goes_unless_a_run_reads_it(tmp_path: Path) -> None:
    one, two = join_cache(tmp_path, owner="one"), join_cache(tmp_path, owner="two")
    one.begin(-1, [use("a", 0)], working_set={})
    assert fetch(one, "a") and fetch(one, "b")
    two.drop_changed({"b": 11, "c": 10})
    assert files_in(tmp_path) == {"a"}
    with pytest.raises(
        DataError, match=rf"a: has 10 bytes, its shard has 11 now, and the run of process {os.getpid()}"
    ):
        two.drop_changed({"a": 11})
    one.close()
    two.close()
