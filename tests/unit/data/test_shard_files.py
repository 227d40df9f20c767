"""Indexes of shards that lie in a node's cache: they may come late, or be damaged."""

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from caches import join_cache
from helpers import index_folder, write_tar

from mmfuse.data.manifest import read_manifest
from mmfuse.data.recipe import Shard
from mmfuse.data.remote.cache import cache_name
from mmfuse.data.remote.cache_ledger import index_of
from mmfuse.data.shard_files import NodeCache, ShardFiles
from mmfuse.errors import ShardError

URL = "https://bucket/a.tar"


@pytest.fixture
def files(tmp_path: Path) -> Iterator[ShardFiles]:
    """Of one remote shard, whose copy is in the cache and whose index is not; its manifest is elsewhere."""
    tar = write_tar(tmp_path / "made/a.tar", {"1.txt": b"one", "2.txt": b"two"})
    index_folder(tar.parent)
    facts, cache = read_manifest(tar.parent)["a.tar"], join_cache(tmp_path / "cache", owner="me")
    name = cache_name(URL, facts.parts[0].version, indexed=True)
    shutil.copy(tar, cache.folder / name)
    index_of(cache.folder, name).parent.mkdir(exist_ok=True)
    yield ShardFiles([Shard((URL,), tmp_path, "a.tar")], [facts], cache=NodeCache(cache.folder, "me"))
    cache.close()


def index_in_cache(files: ShardFiles) -> Path:
    assert files.cache
    name = cache_name(URL, files.facts[0].parts[0].version, indexed=True)
    return index_of(files.cache.folder, name)


def test_a_reader_waits_for_an_index_that_was_lost(files: ShardFiles, tmp_path: Path) -> None:
    late = threading.Timer(0.4, shutil.copy, (tmp_path / "made/a.tar.mmindex", index_in_cache(files)))
    late.start()
    assert len(files.index(0)) == 2
    late.join()
    key, (span,) = files.index(0).spans(1, (("txt",),))
    assert (key, files.read(0, [("text", span)])) == ("2", {"text": ("txt", b"two")})


def test_a_damaged_index_stops_its_reader_with_its_name(files: ShardFiles, tmp_path: Path) -> None:
    index_in_cache(files).write_bytes((tmp_path / "made/a.tar.mmindex").read_bytes()[:-1])
    with pytest.raises(ShardError, match=index_in_cache(files).name):
        files.index(0)
