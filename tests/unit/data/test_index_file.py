"""The file of an index: cut off, garbage, or hostile, it is refused."""

import os
from pathlib import Path

import numpy as np
import pytest
import xxhash
from helpers import write_tar

from mmfuse.data import index_file
from mmfuse.data.index_file import MAGIC, IndexColumns
from mmfuse.data.shard_index import ShardIndex, build_index
from mmfuse.errors import ShardError


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    members = {"a/1.jpg": b"picture", "a/1.png": b"mask", "a/2.txt": b"text", "b/1.jpg": b"other", "b/1.txt": b"more"}
    return write_tar(tmp_path / "x.tar", members)


@pytest.mark.parametrize("length", [0, 4, 12, 100, -64])
def test_a_cut_off_index_is_refused(shard: Path, tmp_path: Path, length: int) -> None:
    place = tmp_path / "x.idx"
    build_index(shard, place)
    os.truncate(place, length if length >= 0 else place.stat().st_size + length)
    with pytest.raises(ShardError, match=r"not a readable index.*index the shard again") as error:
        ShardIndex(place)
    assert str(place) in str(error.value)


def with_header(text: bytes, *, body: bytes = bytes(640)) -> bytes:
    """A sidecar whose header says what it likes, with a right digest: what a hostile one looks like."""
    return index_file._padded(index_file._PREFIX.pack(MAGIC, len(text), xxhash.xxh3_128_digest(text)) + text) + body


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"garbage" * 100, "wrong magic"),
        (b"MMINDEX1" + bytes(600), "of another format version"),
        (MAGIC + b"\xff" * 600, "header is damaged"),
        (with_header(b"[]"), ""),
        (with_header(b"{}"), ""),
        (with_header(b"[" * 200_000), ""),
        (with_header(b'{"samples": -1, "members": 1, "key_bytes": 1, "part_members": 0}'), "samples = -1"),
        (with_header(b'{"samples": 1e3, "members": 1, "key_bytes": 1, "part_members": 0}'), ""),
        (with_header(b'{"samples": 9, "members": 1, "key_bytes": 1, "part_members": 0}'), "bytes instead of"),
    ],
    ids=["magic", "version 1", "digest", "no mapping", "empty", "deep", "negative", "fraction", "size"],
)
def test_garbage_is_no_index(tmp_path: Path, content: bytes, message: str) -> None:
    place = tmp_path / "x.idx"
    place.write_bytes(content)
    with pytest.raises(ShardError, match=rf"not a readable index \(.*{message}.*index the shard again"):
        ShardIndex(place)


@pytest.mark.parametrize(
    ("array", "position", "change", "message"),
    [
        ("member_offset", -1, 1 << 40, "points outside its tar"),
        ("member_size", -1, 1 << 63, "points outside its tar"),
        ("member_part", -1, 1, "a tar that it does not list"),
        ("first_member", -1, 1, "other members than it says"),
        ("signature", -1, 1, "other extensions than it says"),
        ("key_end", -1, 1 << 40, "keys overlap"),
        ("key_end", 0, 7, "keys overlap"),
    ],
)
def test_an_index_of_right_digests_that_points_elsewhere_is_refused(
    shard: Path, tmp_path: Path, monkeypatch, array: str, position: int, change: int, message: str
) -> None:
    whole = IndexColumns.to_arrays

    def changed(columns: IndexColumns) -> dict[str, np.ndarray]:
        arrays = whole(columns)
        arrays["member_part"] = np.zeros_like(arrays["member_size"], np.uint8)
        arrays[array][position] += arrays[array].dtype.type(change)
        return arrays

    monkeypatch.setattr(IndexColumns, "to_arrays", changed)
    build_index(shard, tmp_path / "x.idx")  # writes; reads only the header again
    with pytest.raises(ShardError, match=rf"x.idx: not a readable index \(.*{message}"):
        ShardIndex(tmp_path / "x.idx").sample(0)
