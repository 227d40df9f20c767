"""What `mmfuse shards` does to lists of tars."""

from pathlib import Path

from helpers import picture_bytes, write_tar

from mmfuse.data.checks import check_members, count_shards, index_shards
from mmfuse.data.shard_index import SUFFIX, ShardIndex
from mmfuse.errors import ShardError
from mmfuse.modalities import image, text


def test_a_damaged_shard_does_not_keep_others_from_being_indexed(tmp_path: Path) -> None:
    good = [write_tar(tmp_path / f"{i}.tar", {"1.txt": b"x"}) for i in range(3)]
    good[1].write_bytes(b"garbage" * 200)
    outcomes = [outcome for _, outcome in index_shards(good)]
    assert [type(outcome) for outcome in outcomes] == [ShardIndex, ShardError, ShardIndex]


def test_an_index_of_the_right_size_is_kept_unless_forced(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "x.tar", {"1.txt": b"x"})
    list(index_shards([shard]))
    write_tar(shard, {"2.txt": b"y"})  # of the same size
    (_, kept), (_, forced) = *index_shards([shard]), *index_shards([shard], force=True)
    assert (kept.sample(0).key, forced.sample(0).key) == ("1", "2")
    write_tar(shard, {f"{i}.txt": b"y" for i in range(20)})
    (_, renewed) = next(index_shards([shard]))
    assert len(renewed) == 20


def test_an_unreadable_index_is_built_again(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "x.tar", {"1.txt": b"x"})
    Path(f"{shard}{SUFFIX}").write_bytes(b"garbage")
    ((_, index),) = index_shards([shard])
    assert len(index) == 1


def test_counts_and_sizes_are_those_of_the_members(tmp_path: Path) -> None:
    a = write_tar(tmp_path / "a.tar", {"1.jpg": b"x" * 5, "1.txt": b"x", "2.jpg": b"x" * 7, "3.txt": b"xyz"})
    b = write_tar(tmp_path / "b.tar", {"1.txt": b"xx", "1.jpg": b"x" * 9})  # the same two members the other way round
    list(index_shards([a, b]))
    stats = count_shards([a, b])
    assert (stats.shards, stats.samples, stats.bytes) == (2, 4, a.stat().st_size + b.stat().st_size)
    assert stats.subsets == {("jpg", "txt"): 2, ("jpg",): 1, ("txt",): 1}
    sizes = {
        extension: sorted(int(s) for part in parts for s in part) for extension, parts in stats.member_bytes.items()
    }
    assert sizes == {"jpg": [5, 7, 9], "txt": [1, 2, 3]}


def test_every_member_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    members = {"1.jpg": picture_bytes(1), "1.txt": b"good", "2.jpg": b"text", "2.txt": b"\xff", "3.json": b"{"}
    shard = write_tar(tmp_path / "x.tar", members)
    list(index_shards([shard]))
    processors = {m.__name__: (m.EXTENSIONS, m.Config().build_processor()) for m in (image, text)}
    first, second = check_members(shard, processors)
    assert first.startswith(f"{shard}/2.jpg: not a readable")
    assert second.startswith(f"{shard}/2.txt: not UTF-8")
