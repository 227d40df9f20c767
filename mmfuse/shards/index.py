"""`mmfuse shards index`: the index of every shard, and the manifest of each folder of indexes."""

import logging
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from mmfuse.data.aligned import build_joined_index
from mmfuse.data.manifest import (
    PartFacts,
    ShardFacts,
    content_hash,
    gather_facts,
    index_path,
    local_version,
    read_manifest,
    update_manifest,
)
from mmfuse.data.recipe import Shard
from mmfuse.data.remote.fetch import checksum_of, download, stat_remote
from mmfuse.data.remote.urls import is_remote, show_url
from mmfuse.data.shard_index import ShardIndex, build_index
from mmfuse.errors import DataError, ShardError
from mmfuse.shards.energon import check_energon_offsets
from mmfuse.shards.img2dataset import check_img2dataset
from mmfuse.shards.workers import run_tasks

logger = logging.getLogger(__name__)

_SAVE_SECONDS = 5.0
"""An interrupted command has about this much to do again; more where saving itself takes long."""


class IndexedShard(NamedTuple):
    """One shard and what came of it."""

    shard: Shard
    outcome: ShardFacts | ShardError
    is_new: bool
    """False where its index was up to date."""
    note: str | None = None
    """Where what another tool recorded of the shard is not what is in it."""


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
    saved, pause = time.monotonic(), _SAVE_SECONDS
    try:
        tasks = [(shard, manifests[shard.index_folder].get(shard.name)) for shard in shards]
        for result in run_tasks(partial(_index_one, force=force, checksum=checksum), tasks, jobs=jobs):
            facts = result.outcome if isinstance(result.outcome, ShardFacts) else None
            if result.is_new:
                changes[result.shard.index_folder][result.shard.name] = facts
            if time.monotonic() - saved > pause:
                begun = time.monotonic()
                _save(changes)
                saved = time.monotonic()
                pause = max(_SAVE_SECONDS, 20 * (saved - begun))
            yield result
    finally:
        _save(changes)


def _index_one(task: tuple[Shard, ShardFacts | None], *, force: bool, checksum: bool) -> IndexedShard:
    shard, known = task
    path = index_path(shard.index_folder, shard.name)
    try:
        parts = tuple(map(_describe, shard.parts))
        if known and not force and _is_current(known, parts, checksum=checksum) and path.is_file():
            return IndexedShard(shard, known, is_new=False)
        if shard.is_remote:
            index, parts = _index_copies(shard, parts, path)
        else:
            index = _build(tuple(map(Path, shard.parts)), path)
            if checksum:
                pairs = zip(parts, shard.parts, strict=True)
                parts = tuple(part._replace(checksum=checksum_of(Path(url))) for part, url in pairs)
        skipped = _still_skipped(shard, index, known) if known and not force else ()
        facts, note = gather_facts(index, parts, skipped=skipped), _compare_with_energon(shard, index)
        return IndexedShard(shard, facts, is_new=True, note=note)
    except ShardError as error:
        path.unlink(missing_ok=True)
        return IndexedShard(shard, error, is_new=True)


def _compare_with_energon(shard: Shard, index: ShardIndex) -> str | None:
    tar, *further = shard.parts
    if shard.is_remote or further:
        return None
    try:
        return check_energon_offsets(Path(tar), index)
    except DataError as error:
        return str(error)  # of the list: nothing is wrong with the tar


def compare_with_img2dataset(shards: Iterable[IndexedShard]) -> Iterator[str]:
    """A sentence for each local shard that has not the samples of which img2dataset tells in its folder."""
    counts = [
        (Path(shard.parts[0]), outcome.all_samples)
        for shard, outcome in ((result.shard, result.outcome) for result in shards)
        if isinstance(outcome, ShardFacts) and len(shard.parts) == 1 and not shard.is_remote
    ]
    return check_img2dataset(counts)


def _still_skipped(shard: Shard, index: ShardIndex, known: ShardFacts) -> tuple[int, ...]:
    """What was taken out of a shard, if its samples are still the same."""
    if content_hash(index, skipped=known.skipped) == known.content_hash:
        return known.skipped
    if known.skipped:
        logger.warning("%s: has other samples now; the %d left out are back", shard.shown, len(known.skipped))
    return ()


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
