"""`mmfuse shards index`: the index of every shard, and the manifest of each folder of indexes."""

import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from mmfuse.data.aligned import build_joined_index
from mmfuse.data.fetch import checksum_of, download, stat_remote
from mmfuse.data.manifest import (
    PartFacts,
    ShardFacts,
    gather_facts,
    index_path,
    local_version,
    read_manifest,
    update_manifest,
)
from mmfuse.data.recipe import Shard
from mmfuse.data.shard_index import ShardIndex, build_index
from mmfuse.data.urls import is_remote, show_url
from mmfuse.errors import DataError, ShardError

_SAVE_SECONDS = 5.0
"""An interrupted command has at most this much to do again."""


class IndexedShard(NamedTuple):
    """One shard and what came of it."""

    shard: Shard
    outcome: ShardFacts | ShardError
    is_new: bool
    """False where its index was up to date."""


def index_shards(
    shards: Sequence[Shard], *, jobs: int = 1, force: bool = False, checksum: bool = False
) -> Iterator[IndexedShard]:
    """Indexes shards, several at a time, in the order in which they are done; up-to-date indexes are kept.

    A shard is up to date where its size and its time of change, or its server's tag, are those of the manifest.

    Args:
        force: index again, whatever is there, and take back what `mmfuse shards quarantine` took out.
        checksum: also read every byte and record a checksum; what is fetched later is compared with it.
    Raises:
        DataError: a shard cannot be read or fetched, or an index not be written; what is done is kept.
    """
    manifests = {folder: read_manifest(folder) for folder in {shard.index_folder for shard in shards}}
    changes: dict[Path, dict[str, ShardFacts | None]] = {folder: {} for folder in manifests}
    saved = time.monotonic()
    try:
        for result in _run(shards, manifests, jobs=jobs, force=force, checksum=checksum):
            facts = result.outcome if isinstance(result.outcome, ShardFacts) else None
            if result.is_new:
                changes[result.shard.index_folder][result.shard.name] = facts
            if time.monotonic() - saved > _SAVE_SECONDS:
                _save(changes)
                saved = time.monotonic()
            yield result
    finally:
        _save(changes)


def _run(
    shards: Sequence[Shard],
    manifests: dict[Path, dict[str, ShardFacts]],
    *,
    jobs: int,
    force: bool,
    checksum: bool,
) -> Iterator[IndexedShard]:
    tasks = ((shard, None if force else manifests[shard.index_folder].get(shard.name)) for shard in shards)
    if jobs == 1 or len(shards) == 1:
        for shard, known in tasks:
            yield _index_one(shard, known, checksum=checksum)
        return
    # Spawned: fetching must not follow a fork.
    with ProcessPoolExecutor(min(jobs, len(shards)), mp_context=get_context("spawn")) as pool:
        pending: set[Future[IndexedShard]] = set()
        try:
            while pending or (pending := _submit(pool, tasks, number=4 * jobs, checksum=checksum)):
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                pending |= _submit(pool, tasks, number=len(done), checksum=checksum)
                yield from (future.result() for future in done)
        finally:
            for future in pending:
                future.cancel()


def _submit(
    pool: ProcessPoolExecutor, tasks: Iterator[tuple[Shard, ShardFacts | None]], *, number: int, checksum: bool
) -> set[Future[IndexedShard]]:
    return {pool.submit(_index_one, shard, known, checksum=checksum) for shard, known in islice(tasks, number)}


def _index_one(shard: Shard, known: ShardFacts | None, *, checksum: bool) -> IndexedShard:
    path = index_path(shard.index_folder, shard.name)
    try:
        parts = tuple(map(_describe, shard.parts))
        if known and _is_current(known, parts, checksum=checksum) and path.is_file():
            return IndexedShard(shard, known, is_new=False)
        if shard.is_remote:
            index, parts = _index_copies(shard, parts, path)
        else:
            index = _build(tuple(map(Path, shard.parts)), path)
            if checksum:
                parts = tuple(
                    p._replace(checksum=checksum_of(Path(u))) for p, u in zip(parts, shard.parts, strict=True)
                )
        return IndexedShard(shard, gather_facts(index, parts), is_new=True)
    except ShardError as error:
        path.unlink(missing_ok=True)
        return IndexedShard(shard, error, is_new=True)


def _describe(url: str) -> PartFacts:
    """What a tar is now."""
    if is_remote(url):
        file = stat_remote(url)
        return PartFacts(show_url(url), file.size, file.version)
    try:
        size, version = local_version(url)
    except OSError as error:
        raise DataError(f"{url}: cannot be read: {error.strerror}") from error
    return PartFacts(Path(url).name, size, version)


def _is_current(known: ShardFacts, parts: tuple[PartFacts, ...], *, checksum: bool) -> bool:
    same = [(part.size, part.version) for part in known.parts] == [(part.size, part.version) for part in parts]
    return same and (not checksum or all(part.checksum for part in known.parts))


def _index_copies(shard: Shard, parts: tuple[PartFacts, ...], path: Path) -> tuple[ShardIndex, tuple[PartFacts, ...]]:
    """Indexes remote tars from copies that are deleted again; their checksums cost nothing here."""
    shard.index_folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=shard.index_folder, prefix=".fetching-") as folder:
        copies = [Path(folder) / f"{number}.tar" for number in range(len(parts))]
        for url, copy in zip(shard.parts, copies, strict=True):
            if is_remote(url):
                download(stat_remote(url), copy)
        places = tuple(copy if is_remote(url) else Path(url) for url, copy in zip(shard.parts, copies, strict=True))
        checked = tuple(part._replace(checksum=checksum_of(place)) for part, place in zip(parts, places, strict=True))
        try:
            return _build(places, path), checked
        except ShardError as error:  # it names the copy
            raise ShardError(str(error).replace(folder + "/", f"{shard.shown}: copy ")) from None


def _build(tars: tuple[Path, ...], path: Path) -> ShardIndex:
    return build_index(tars[0], path) if len(tars) == 1 else build_joined_index(tars, path)


def _save(changes: dict[Path, dict[str, ShardFacts | None]]) -> None:
    for folder, shards in changes.items():
        if shards:
            good = {name: facts for name, facts in shards.items() if facts}
            update_manifest(folder, good, remove=shards.keys() - good.keys())
            shards.clear()
