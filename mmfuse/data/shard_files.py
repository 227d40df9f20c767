"""Open shards and their indexes: a few at a time, each checked against the manifest when it is opened."""

import os
import resource
from collections import OrderedDict
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from mmfuse.data.manifest import PartFacts, ShardFacts, content_hash, index_path, local_version
from mmfuse.data.recipe import Shard
from mmfuse.data.remote.cache import cache_name
from mmfuse.data.remote.cache_ledger import index_of
from mmfuse.data.remote.cache_read import is_evicted, open_cached, wait_for_shard
from mmfuse.data.remote.urls import is_remote, show_url
from mmfuse.data.shard_index import ShardIndex, Span
from mmfuse.errors import DataError, ShardError

_MAX_OPEN = 512
"""Tars, and as many indexes: what 64 lanes with windows of 8 shards read at one time."""


class NodeCache(NamedTuple):
    """The cache of this node as a reader sees it."""

    folder: Path
    owner: str
    """The prefetcher that fills it for this run."""


class ShardFiles:
    """Bytes of members, by shard number; remote shards are read from the node's cache, where a prefetcher puts them."""

    def __init__(self, shards: list[Shard], facts: list[ShardFacts], *, cache: NodeCache | None) -> None:
        self.shards, self.facts, self.cache = shards, facts, cache
        self._files: OrderedDict[tuple[int, int], int] = OrderedDict()
        self._indexes: OrderedDict[int, ShardIndex] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """Without what is open: file numbers mean others in a spawned worker."""
        return {**self.__dict__, "_files": OrderedDict(), "_indexes": OrderedDict()}

    def read(self, shard: int, spans: Iterable[tuple[str, Span | None]]) -> dict[str, tuple[str, bytes]]:
        """Members of one sample by the given names: extension and bytes, nothing for None.

        Neighbours are not read in one go: the copies of them cost as much as the calls that it saves.

        Raises:
            ShardError: the tar has changed since it was indexed.
            DataError: it cannot be read, or fetched.
        """
        members: dict[str, tuple[str, bytes]] = {}
        file, opened, offset = -1, -1, 0
        try:
            for name, span in spans:
                if span is None:
                    continue
                extension, part, offset, size = span
                if part != opened:
                    file, opened = self._file(shard, part), part
                data = os.pread(file, size, offset)
                if len(data) != size:
                    raise ShardError(f"{self.shards[shard].shown}: ends before byte {offset + size}: it has changed")
                members[name] = (extension, data)
        except OSError as error:
            raise DataError(f"{self.shards[shard].shown}: cannot be read at byte {offset}: {error.strerror}") from error
        return members

    def index(self, shard: int) -> ShardIndex:
        """The index of a shard.

        Raises:
            ShardError: it is damaged, or not the one that the manifest knows.
        """
        index = self._indexes.get(shard)
        if index is None:
            index = self._indexes[shard] = self._open_index(shard)
            if len(self._indexes) > _max_open():
                self._indexes.popitem(last=False)[1].close()
        else:
            self._indexes.move_to_end(shard)
        return index

    def _file(self, shard: int, part: int) -> int:
        file = self._files.get((shard, part))
        if file is None:
            return self._open_file(shard, part)
        self._files.move_to_end((shard, part))
        return file

    def _open_file(self, shard: int, part: int) -> int:
        if len(self._files) >= _max_open():
            os.close(self._files.popitem(last=False)[1])
        url, facts = self.shards[shard].parts[part], self.facts[shard].parts[part]
        if is_remote(url):
            self._close_evicted()
            cache = self._cache_of(url)
            name = cache_name(url, facts.version, indexed=len(self.shards[shard].parts) == 1)
            file = open_cached(cache.folder, name, owner=cache.owner)
        else:
            file = _open_unchanged(url, facts)
        self._files[shard, part] = file
        return file

    def _close_evicted(self) -> None:
        """An evicted copy takes disk space until nobody has it open."""
        for key in [key for key, file in self._files.items() if is_evicted(file)]:
            os.close(self._files.pop(key))

    def _open_index(self, shard: int) -> ShardIndex:
        place, facts = self.shards[shard], self.facts[shard]
        path = index_path(place.index_folder, place.name)
        if place.is_remote and len(place.parts) == 1 and not path.is_file():
            name = cache_name(place.parts[0], facts.parts[0].version, indexed=True)
            index = self._open_cached_index(self._cache_of(place.parts[0]), name)
        else:
            index = ShardIndex(path)
        if content_hash(index, skipped=facts.skipped) != facts.content_hash:
            raise ShardError(
                f"{place.shown}: {index.path} is not the index that its manifest knows; index the shard again"
            )
        return index

    def _open_cached_index(self, cache: NodeCache, name: str) -> ShardIndex:
        """What the prefetcher made of a copy that it fetched."""
        path = index_of(cache.folder, name)
        while True:
            wait_for_shard(cache.folder, name, owner=cache.owner, with_index=True)
            try:
                index = ShardIndex(path)
                _ = index.signature  # maps it: now it may be evicted
                return index
            except ShardError:
                if path.exists():
                    raise

    def _cache_of(self, url: str) -> NodeCache:
        if self.cache is None:
            raise DataError(f"{show_url(url)}: is remote, and nothing fetches it here")
        return self.cache


def check_unchanged(path: str, facts: PartFacts) -> None:
    """Compares a local tar with what its manifest says.

    Raises:
        ShardError: its size or time of change differs.
        DataError: it cannot be read.
    """
    os.close(_open_unchanged(path, facts))


def _open_unchanged(path: str, facts: PartFacts) -> int:
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise DataError(f"{path}: cannot be read any more: {error.strerror}") from error
    size, version = local_version(file)
    if (size, version) == (facts.size, facts.version):
        return file
    os.close(file)
    what = f"has {size} bytes, but {facts.size} when it was indexed"
    if size == facts.size:
        what = "has been written to since it was indexed"
    raise ShardError(f"{path}: {what}; if the change is meant, run: mmfuse shards index {os.path.dirname(path) or '.'}")


@cache
def _max_open() -> int:
    """How many tars, and indexes, each source may have open; both take a descriptor, and there may be some sources."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return max(8, min(_MAX_OPEN, (soft - 256) // 8))
