"""Fetching for this node: one of its ranks starts the prefetcher, all of them tell it how far they are."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mmfuse.data.order import ShardUse
from mmfuse.data.prefetch import Prefetcher
from mmfuse.data.prefetch_ahead import CachedShard
from mmfuse.data.prefetch_loop import CacheConfig
from mmfuse.data.prefetch_progress import Progress, owner_of
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
) -> Iterator[Callable[[int], None]]:
    """Remote shards of the sources are copied to this node meanwhile, if there are any; all ranks must call.

    Args:
        uses: what the ranks of a node read; gives something that pickles.
        purpose: tells this cache user from others of the same run.
    Returns:
        To be called with every step for which this rank has got all that it reads. Raises a DataError when the
        prefetcher has ended.
    """
    shards = {(number, shard): parts for number, source in enumerate(sources) for shard, parts in _copies(source)}
    if not shards:
        yield lambda step: None
        return
    ranks, path = ranks_of_this_node(), _progress_of(config, run_folder, purpose)
    leads = rank() == ranks[0]
    prefetcher = Prefetcher(config, shards, uses(ranks), progress=path, num_ranks=len(ranks)) if leads else None
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


def _copies(source: Source) -> Iterator[tuple[int, tuple[CachedShard, ...]]]:
    for number, urls in source.remote_shards.items():
        facts = source.facts[number]
        parts = zip(urls, facts.parts, strict=True)
        yield (
            number,
            tuple(
                CachedShard(url, part.size, part.version, part.checksum, facts.index_bytes if len(urls) == 1 else 0)
                for url, part in parts
            ),
        )


def _progress_of(config: CacheConfig, run_folder: Path, purpose: str) -> Path:
    return config.place / "runs" / f"{hash_int(run_folder.absolute()):016x}.{purpose}"
