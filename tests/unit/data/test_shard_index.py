"""The sidecar index: what it finds, what it refuses, and that it is whole or not there."""

import logging
import os
import pickle
from pathlib import Path

import pytest
from helpers import write_tar

from mmfuse.data import shard_index
from mmfuse.data.shard_index import ShardIndex, build_index, split_name
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
        key, members = index.sample(number)
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
    ("name", "expected"),
    [
        ("0001.jpg", ("0001", "jpg")),
        ("a.b/0001.SEG.Png", ("a.b/0001", "seg.png")),
        ("./0001.jpg", ("./0001", "jpg")),
        ("0001", ("0001", "")),
        (".hidden", ("", "hidden")),
    ],
)
def test_a_key_ends_at_the_first_dot_of_the_base_name(name: str, expected: tuple[str, str]) -> None:
    assert split_name(name) == expected


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


def test_members_with_dots_before_their_extension_belong_to_the_key_before_the_first(tmp_path: Path) -> None:
    index = index_of({"img.0001.jpg": b"x", "img.0002.jpg": b"y"}, tmp_path)
    assert [index.sample(0).key, *index.sample(0).members] == ["img", "0001.jpg", "0002.jpg"]


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


@pytest.mark.parametrize("length", [0, 4, 12, 100, -64])
def test_a_cut_off_index_is_refused(shard: Path, tmp_path: Path, length: int) -> None:
    place = tmp_path / "x.idx"
    build_index(shard, place)
    os.truncate(place, length if length >= 0 else place.stat().st_size + length)
    with pytest.raises(ShardError, match=r"not a readable index.*index the shard again") as error:
        ShardIndex(place)
    assert str(place) in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        b"garbage" * 100,
        shard_index._MAGIC + b"\xff" * 600,
        shard_index._MAGIC + (2).to_bytes(8, "little") + b"[]" + bytes(600),
        shard_index._MAGIC + (13).to_bytes(8, "little") + b'{"arrays":{}}' + bytes(600),
    ],
    ids=["magic", "length", "no mapping", "no arrays"],
)
def test_garbage_is_no_index(tmp_path: Path, content: bytes) -> None:
    place = tmp_path / "x.idx"
    place.write_bytes(content)
    with pytest.raises(ShardError, match="not a readable index"):
        ShardIndex(place)


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
    assert len(index_of([], tmp_path)) == 0
    assert f"{tmp_path / 'y.tar'}: is empty" in caplog.text
