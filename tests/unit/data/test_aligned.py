"""One tar per modality, joined by key."""

import logging
import os
import re
from pathlib import Path

import pytest
from helpers import ALL, sample_members, write_tar

from mmfuse.data.aligned import build_joined_index
from mmfuse.data.shard_index import ShardIndex, build_index
from mmfuse.errors import DataError, ShardError

Samples = dict[str, dict[str, bytes]]
TARS = {
    "images/00000.tar": {"a/1.jpg": b"i1", "a/2.jpg": b"i2", "b/1.jpg": b"ib"},
    "texts/00000.tar": {"b/1.txt": b"tb", "b/1.json": b"{}", "a/3.txt": b"t3", "a/1.txt": b"t1"},
    "audio/00000.tar": {"a/2.flac": b"s2", "a/3.flac": b"s3", "README": b"nobody's"},
}


def write_tars(folder: Path, tars: dict[str, dict[str, bytes]] = TARS) -> tuple[Path, ...]:
    return tuple(write_tar(folder / name, members) for name, members in tars.items())


def join(shards: tuple[Path, ...], folder: Path) -> ShardIndex:
    return build_joined_index(shards, folder / "00000.tar.mmindex")


def read_joined(index: ShardIndex, shards: tuple[Path, ...]) -> Samples:
    found = {}
    for number in range(len(index)):
        key, members, parts = index.sample(number)
        found[key] = {e: shards[parts[e]].read_bytes()[start : start + size] for e, (start, size) in members.items()}
    return found


def test_samples_are_the_union_of_the_tars_in_the_order_of_first_appearance(tmp_path: Path) -> None:
    shards = write_tars(tmp_path)
    index = join(shards, tmp_path)
    assert list(read_joined(index, shards).items()) == [
        ("a/1", {"jpg": b"i1", "txt": b"t1"}),
        ("a/2", {"jpg": b"i2", "flac": b"s2"}),
        ("b/1", {"jpg": b"ib", "txt": b"tb", "json": b"{}"}),
        ("a/3", {"txt": b"t3", "flac": b"s3"}),
    ]
    assert index.header["other_members"] == 1


def test_spans_say_which_tar_and_sizes_are_those_of_its_members(tmp_path: Path) -> None:
    index = join(write_tars(tmp_path), tmp_path)
    key, spans = index.spans(3, (("jpg",), ("txt",), ("wav", "flac")))
    assert (key, [span and (span[0], span[1], span[3]) for span in spans]) == (
        "a/3",
        [None, ("txt", 1, 2), ("flac", 2, 2)],
    )
    assert index.member_sizes(("flac", "jpg")).tolist() == [2, 2, 2, 2]
    assert index.member_sizes(("json",)).tolist() == [-1, -1, 2, -1]
    assert index.member_part.tolist() == [0, 1, 0, 2, 0, 1, 1, 1, 2]


def test_the_parts_are_described_in_their_order(tmp_path: Path) -> None:
    shards = write_tars(tmp_path)
    os.utime(shards[1], ns=(5, 123_456_789))
    parts = ShardIndex(join(shards, tmp_path).path).parts
    assert [part.name for part in parts] == ["00000.tar"] * 3
    assert [part.bytes for part in parts] == [shard.stat().st_size for shard in shards]
    assert parts[1].modified_ns == 123_456_789


def test_the_order_of_the_tars_is_content_and_their_place_is_not(tmp_path: Path) -> None:
    shards = write_tars(tmp_path)
    moved = write_tars(tmp_path / "moved")
    hashes = [join(tars, tmp_path).header["content_hash"] for tars in (shards, moved, shards[::-1])]
    assert hashes[0] == hashes[1] != hashes[2]


def test_one_tar_alone_is_indexed_as_without_joining(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "x.tar", sample_members(1) | sample_members(2))
    joined, plain = join((shard,), tmp_path), build_index(shard, tmp_path / "plain")
    assert joined.path.read_bytes() == plain.path.read_bytes()


def test_samples_that_only_some_tars_have_are_counted_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    images, texts, audio = write_tars(tmp_path)
    join((images, texts, audio), tmp_path)
    assert f"4 samples joined by key; of these {images} lacks 1, {texts} lacks 1, {audio} lacks 2" in caplog.text


def test_one_extension_of_one_key_in_two_tars_is_refused_with_both(tmp_path: Path) -> None:
    shards = write_tars(tmp_path, TARS | {"more/00000.tar": {"b/1.JPG": b"x"}})
    with pytest.raises(ShardError, match=r"more/00000.tar: sample 'b/1' has a member .jpg here and in .*images/00000"):
        join(shards, tmp_path)


@pytest.mark.parametrize("stranger", ["images", "texts", "audio"])
def test_a_tar_that_shares_no_key_is_refused_with_two_of_the_keys(tmp_path: Path, stranger: str) -> None:
    place = f"{stranger}/00000.tar"
    tars = {
        modality: {f"{n}.{e}": b"x" for n in range(5)} for modality, e in zip(TARS, ("jpg", "txt", "wav"), strict=True)
    }
    tars[place] = {f"folder/{name}": data for name, data in tars[place].items()}
    shards = write_tars(tmp_path, tars)
    with pytest.raises(
        ShardError, match=rf"{place}: shares no key .* it has 'folder/0', .* has '0'; keys are compared"
    ):
        join(shards, tmp_path)


def test_two_tars_that_only_a_third_connects_are_joined(tmp_path: Path) -> None:
    tars = {"0.tar": {"1.jpg": b"x"}, "1.tar": {"2.wav": b"x"}, "2.tar": {"1.txt": b"x", "2.txt": b"x"}, "3.tar": {}}
    index = join(write_tars(tmp_path, tars), tmp_path)
    assert [tuple(index.sample(number).members) for number in range(2)] == [("jpg", "txt"), ("wav", "txt")]


def test_a_damaged_tar_among_good_ones_leaves_no_index(tmp_path: Path) -> None:
    shards = write_tars(tmp_path)
    index = join(shards, tmp_path)
    os.truncate(shards[1], 1000)
    with pytest.raises(ShardError, match=rf"{re.escape(str(shards[1]))}: cut off"):
        join(shards, tmp_path)
    assert not index.path.exists()
    shards[1].unlink()
    with pytest.raises(DataError, match=r"texts/00000\.tar: cannot be indexed|cannot be indexed: .*texts/00000\.tar"):
        join(shards, tmp_path)


def test_more_tars_than_a_byte_can_tell_apart_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="257 tars cannot be joined"):
        join((tmp_path / "x.tar",) * 257, tmp_path)
    with pytest.raises(DataError, match="0 tars cannot be joined"):
        join((), tmp_path)


def test_tars_split_by_modality_hold_the_samples_of_the_whole_one(tmp_path: Path) -> None:
    whole = {name: data for number in range(4) for name, data in sample_members(number).items()}
    by_extension = {e: {n: d for n, d in whole.items() if n.endswith(e)} for e in ("jpg", "txt", "ogg")}
    shards = write_tars(tmp_path, {f"{extension}/0.tar": members for extension, members in by_extension.items()})
    plain = write_tar(tmp_path / "whole.tar", whole)
    index = build_index(plain, tmp_path / "whole.idx")
    assert len(ALL) == len(shards)
    assert read_joined(join(shards, tmp_path), shards) == read_joined(index, (plain,))
