"""The sidecar index: what it finds, what it refuses, and that it is whole or not there."""

import logging
import os
import pickle
from pathlib import Path

import pytest
from helpers import write_tar

from mmfuse.data import shard_index
from mmfuse.data.index_file import ShardPart
from mmfuse.data.shard_index import ShardIndex, build_index
from mmfuse.data.tar import walk_tar
from mmfuse.errors import DataError, ShardError

MEMBERS = {
    "a/0001.jpg": b"picture",
    "a/0001.seg.png": b"mask",
    "a/0002.TXT": b"text",
    "README": b"nobody's",
    "a/.hidden": b"nobody's",
    "b/0001.jpg": b"same name, other folder",
    "b/0001.txt": b"more",
}


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return write_tar(tmp_path / "x.tar", MEMBERS)


def index_of(members, folder: Path) -> ShardIndex:
    return build_index(write_tar(folder / "y.tar", members), folder / "y.idx")


def test_samples_have_the_bytes_of_their_members(shard: Path, tmp_path: Path) -> None:
    index, data = build_index(shard, tmp_path / "x.idx"), shard.read_bytes()
    found = {}
    for number in range(len(index)):
        key, members, _ = index.sample(number)
        found[key] = {extension: data[start : start + size] for extension, (start, size) in members.items()}
    assert found == {
        "a/0001": {"jpg": b"picture", "seg.png": b"mask"},
        "a/0002": {"txt": b"text"},
        "b/0001": {"jpg": b"same name, other folder", "txt": b"more"},
    }


def test_a_reopened_index_is_the_built_one(shard: Path, tmp_path: Path) -> None:
    built = build_index(shard, tmp_path / "x.idx")
    for other in (ShardIndex(tmp_path / "x.idx"), pickle.loads(pickle.dumps(built))):  # noqa: S301  # our own bytes
        assert [other.sample(i) for i in range(len(other))] == [built.sample(i) for i in range(len(built))]
        assert other.header == built.header


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["1.jpg", "2.jpg", "1.txt"], "the members of sample '1' are not next to each other"),
        (["1.jpg", "1.txt", "1.jpg"], "sample '1' has more than one member .jpg"),
        (["1.jpg", "1.JPG"], "sample '1' has more than one member .jpg"),
        (["1.jpg", "1.pkl"], "sample '1' has a member .pkl: pickles run code"),
        (["1.meta.PTH"], "has a member .meta.pth: pickles run code"),
        (["README"], "holds no samples"),
    ],
)
def test_what_cannot_be_read_safely_is_refused_and_nothing_is_left(tmp_path: Path, names, message: str) -> None:
    with pytest.raises(ShardError, match=message) as error:
        index_of([(name, b"x") for name in names], tmp_path)
    assert str(tmp_path / "y.tar") in str(error.value)
    assert os.listdir(tmp_path) == ["y.tar"]


def test_a_shard_found_damaged_loses_its_older_index(shard: Path, tmp_path: Path) -> None:
    build_index(shard, tmp_path / "x.idx")
    with open(shard, "r+b") as file:  # of the same size: nothing else would notice
        file.seek(148)
        file.write(b"7")
    with pytest.raises(ShardError):
        build_index(shard, tmp_path / "x.idx")
    assert os.listdir(tmp_path) == ["x.tar"]


def test_a_disk_that_fills_up_leaves_nothing_half_written(shard: Path, tmp_path: Path, monkeypatch) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(DataError, match="No space left"):
        build_index(shard, tmp_path / "x.idx")
    assert os.listdir(tmp_path) == ["x.tar"]


def test_an_index_written_anew_under_an_open_one_is_noticed(shard: Path, tmp_path: Path) -> None:
    index = build_index(shard, tmp_path / "x.idx")
    before = index.sample(2)
    index.close()
    assert index.sample(2) == before
    write_tar(shard, {name.replace("a/", "c/"): data for name, data in MEMBERS.items()})
    build_index(shard, tmp_path / "x.idx")
    assert index.sample(2) == before  # its map is still that of the older file
    index.close()
    with pytest.raises(ShardError, match="written anew since it was opened"):
        index.sample(2)


def test_a_closed_index_keeps_no_file_open(shard: Path, tmp_path: Path) -> None:
    build_index(shard, tmp_path / "x.idx")
    before = len(os.listdir("/dev/fd"))
    indexes = [ShardIndex(tmp_path / "x.idx") for _ in range(20)]
    assert len(os.listdir("/dev/fd")) == before  # ten thousand shards are opened at once
    for index in indexes:
        index.sample(0)
        index.spans(0, (("jpg",),))
        index.close()
    assert len(os.listdir("/dev/fd")) == before


CHOICES = (("png", "jpg"), ("txt", "seg.png"), ("flac",))


def test_spans_are_the_preferred_members_of_a_sample(tmp_path: Path) -> None:
    members = {"0.jpg": b"123", "0.png": b"12", "1.seg.png": b"1", "1.txt": b"1234", "2.json": b"", "ü.jpg": b"x"}
    index = index_of(members, tmp_path)
    data = (tmp_path / "y.tar").read_bytes()

    def read(number: int, choices) -> tuple[str, list[tuple[str, bytes] | None]]:
        key, spans = index.spans(number, choices)
        return key, [span and (span[0], data[span[2] : span[2] + span[3]]) for span in spans]

    expected = [
        ("0", [("png", b"12"), None, None]),
        ("1", [None, ("txt", b"1234"), None]),
        ("2", [None, None, None]),
        ("ü", [("jpg", b"x"), None, None]),
    ]
    assert [read(number, CHOICES) for number in range(4)] == expected
    assert read(1, (("seg.png",),)) == ("1", [("seg.png", b"1")])
    assert [read(number, CHOICES) for number in range(4)] == expected
    assert {span[1] for span in index.spans(0, CHOICES)[1] if span} == {0}
    assert index.member_sizes(("png", "jpg")).tolist() == [2, -1, -1, 1]
    assert index.member_sizes(("seg.png", "json")).tolist() == [-1, 1, 0, -1]
    assert index.member_sizes(("wav",)).tolist() == [-1] * 4


def test_what_was_chosen_is_not_kept_without_end(shard: Path, tmp_path: Path) -> None:
    index = build_index(shard, tmp_path / "x.idx")
    for number in range(500):
        assert index.spans(2, ((f"no{number}", "txt"),))[1][0] == index.spans(2, (("txt",),))[1][0]
    assert len(index._chosen) <= shard_index._MAX_CHOICES


def test_more_sets_of_extensions_than_two_bytes_can_tell_apart_are_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(shard_index, "_MAX_SIGNATURES", 2)
    members = {"img.1.jpg": b"", "b.2.jpg": b"", "c.3.jpg": b""}
    with pytest.raises(
        ShardError, match=r"3 different sets of extensions, such as \.1\.jpg; a key ends at its first dot"
    ):
        index_of(members, tmp_path)
    assert len(index_of(dict(list(members.items())[:2]), tmp_path)) == 2


def test_what_is_known_of_the_tar_is_kept_and_does_not_change_the_content_hash(shard: Path, tmp_path: Path) -> None:
    os.utime(shard, ns=(1, 1_234_567_890_123_456_789))
    index = build_index(shard, tmp_path / "x.idx", checksum="xxh3:00")
    assert index.parts == (ShardPart("x.tar", shard.stat().st_size, 1_234_567_890_123_456_789, "xxh3:00"),)
    header = index.header
    assert (header["shard_bytes"], header["modified_ns"], header["checksum"], header["version"]) == (
        *index.parts[0][1:],
        2,
    )
    assert header["other_members"] == 2
    copied = build_index(shard.rename(tmp_path / "z.tar"), tmp_path / "z.idx")
    os.utime(copied.path.with_suffix(".tar"), ns=(1, 1))
    assert build_index(tmp_path / "z.tar", tmp_path / "z.idx").header["content_hash"] == header["content_hash"]


def test_a_tar_that_changes_while_it_is_indexed_is_refused(shard: Path, tmp_path: Path, monkeypatch) -> None:
    def walk_and_touch(path: Path):
        yield from walk_tar(path)
        os.utime(path, ns=(1, 1))

    monkeypatch.setattr("mmfuse.data.tar_samples.walk_tar", walk_and_touch)
    with pytest.raises(ShardError, match="has changed while it was indexed"):
        build_index(shard, tmp_path / "x.idx")
    assert os.listdir(tmp_path) == ["x.tar"]


def test_the_content_hash_knows_names_sizes_and_order_but_not_the_shard_name(tmp_path: Path) -> None:
    def hash_of(members: list[tuple[str, bytes]], name: str = "x") -> str:
        shard = write_tar(tmp_path / f"{name}.tar", members)
        return build_index(shard, tmp_path / f"{name}.idx").header["content_hash"]

    base = [("1.jpg", b"xx"), ("1.txt", b"x"), ("2.jpg", b"xx")]
    same = hash_of(base)
    assert hash_of(base, "other") == same
    changed = [
        [("1.jpg", b"xx"), ("1.txt", b"x"), ("3.jpg", b"xx")],
        [("1.jpg", b"xx"), ("1.png", b"x"), ("2.jpg", b"xx")],
        [("1.jpg", b"xx"), ("1.txt", b"xy"), ("2.jpg", b"xx")],
        [("2.jpg", b"xx"), ("1.jpg", b"xx"), ("1.txt", b"x")],
        base[:2],
    ]
    assert len({same, *map(hash_of, changed)}) == len(changed) + 1


def test_an_empty_tar_is_a_shard_of_no_samples(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("mmfuse").propagate = True
    index = index_of([], tmp_path)
    assert (len(index), index.member_sizes(("jpg",)).tolist(), index.signatures) == (0, [], [])
    assert f"{tmp_path / 'y.tar'}: is empty" in caplog.text
