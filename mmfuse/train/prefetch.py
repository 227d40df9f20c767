"""Fetching for this node: one of its ranks starts the prefetcher, all of them tell it how far they are."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from mmfuse.data.order import ShardUse
from mmfuse.data.remote.prefetch import Prefetcher
from mmfuse.data.remote.prefetch_ahead import CachedShard, LookAhead
from mmfuse.data.remote.prefetch_loop import CacheConfig
from mmfuse.data.remote.prefetch_progress import Progress, owner_of
from mmfuse.data.remote.urls import is_remote
from mmfuse.data.shard_files import NodeCache
from mmfuse.data.source import Source
from mmfuse.distributed import raise_together, rank, ranks_of_this_node
from mmfuse.hashing import hash_int


def node_cache(config: CacheConfig, run_folder: Path, *, purpose: str) -> NodeCache:
    """What loader workers must know of the cache before a prefetcher is started; the same for all ranks of a node."""
    return NodeCache(config.place, owner_of(_progress_of(config, run_folder, purpose)))


@contextmanager
def prefetching(
    config: CacheConfig,
    sources: Sequence[Source],
    uses: Callable[[list[int]], Callable[[], Iterator[ShardUse]]],
    *,
    run_folder: Path,
    purpose: str,
    beside: Mapping[str, int] | None = None,
) -> Iterator[Callable[[int], None]]:
    """Remote shards of the sources are copied to this node meanwhile, if there are any; all ranks must call.

    Args:
        uses: what the ranks of a node read; gives something that pickles.
        purpose: tells this cache user from others of the same run.
        beside: size by name of copies that others of the same run will need meanwhile.
    Returns:
        To be called with every step for which this rank has got all that it reads. Raises a DataError when the
        prefetcher has ended.
    """
    shards = _copies(sources)
    if not shards:
        yield lambda step: None
        return
    ranks, path = ranks_of_this_node(), _progress_of(config, run_folder, purpose)
    prefetcher = None
    if rank() == ranks[0]:
        prefetcher = Prefetcher(config, shards, uses(ranks), progress=path, num_ranks=len(ranks), beside=beside)
    try:
        # After the start alone: the others must not open the progress file of an earlier one.
        raise_together(prefetcher.start if prefetcher else None)
        progress, slot = Progress(path), ranks.index(rank())

        def report(step: int) -> None:
            progress.report(slot, step)
            if prefetcher:
                prefetcher.check()

        yield report
    finally:
        if prefetcher:
            prefetcher.close()


def evaluation_uses(shards: Sequence[int], *, batch_size: int) -> Iterator[ShardUse]:
    """What evaluation reads: the only source from its first shard to its last.

    Args:
        shards: samples of each.
    """
    ends = list(itertools.accumulate(shards))
    for number, (samples, end) in enumerate(zip(shards, ends, strict=True)):
        if samples:
            yield ShardUse((end - samples) // batch_size, (end - 1) // batch_size, 0, number)


def copies_at_a_time(source: Source, uses: Iterator[ShardUse]) -> dict[str, int]:
    """Size by name of the most that must be in the cache at one time where the only source is read so."""
    return LookAhead(copies, uses).working_set().sizes if (copies := _copies([source])) else {}


def _copies(sources: Sequence[Source]) -> dict[tuple[int, int], tuple[CachedShard, ...]]:
    """What must be fetched, by source and shard."""
    copies = {}
    for number, source in enumerate(sources):
        for shard, urls in source.remote_shards.items():
            facts = source.facts[shard]
            index_bytes = facts.index_bytes if len(urls) == 1 else 0
            copies[number, shard] = tuple(
                CachedShard(url, part.size, part.version, part.checksum, index_bytes)
                for url, part in zip(urls, facts.parts, strict=True)
                if is_remote(url)  # of aligned tars, some may be here
            )
    return copies


def _progress_of(config: CacheConfig, run_folder: Path, purpose: str) -> Path:
    return config.place / "runs" / f"{hash_int(run_folder.absolute()):016x}.{purpose}"
