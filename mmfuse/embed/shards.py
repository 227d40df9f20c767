"""Embeds every sample of a source, shard by shard, on all ranks; a killed command goes on where it stopped."""

import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from mmfuse.data.decode import SampleDecoder
from mmfuse.data.loader import BatchRequest, load_batches
from mmfuse.data.order import ShardUse
from mmfuse.data.recipe import ChosenSplit
from mmfuse.data.source import Source
from mmfuse.distributed import barrier, first_rank_decides, rank, world_size
from mmfuse.embed.embedder import Embedder, load
from mmfuse.embed.store import EmbeddingStore, Form, Part
from mmfuse.hashing import hash_int
from mmfuse.log import hide_bar, set_up_logging
from mmfuse.train.checkpoint import AVERAGE, MODALITIES, read_manifest, verify_checkpoint
from mmfuse.train.checkpoint_store import find_checkpoint
from mmfuse.train.engines.base import MODEL
from mmfuse.train.engines.start import join_ranks, leave_ranks
from mmfuse.train.prefetch import node_cache, prefetching
from mmfuse.types import Batch

logger = logging.getLogger(__name__)

_PURPOSE = "embed"


def embed_shards(
    checkpoint: str | os.PathLike[str], chosen: ChosenSplit, *, out: Path, form: Form, overrides: Iterable[str] = ()
) -> None:
    """Writes the embeddings of a split to the folder `out`, see `EmbeddingStore`; all ranks must call.

    Args:
        checkpoint: its folder, or a run's; or, on one node, the URL of either.
        overrides: settings of the checkpoint's run, such as `data.num_workers` and `evaluation.batch_size`, which here
            is that of one rank.
    Raises:
        CheckpointError: not a whole checkpoint.
        ConfigError: the folder holds something else.
        DataError: shards are missing, not indexed, or cannot be read.
    """
    device = join_ranks()
    set_up_logging(rank=rank())
    embedder = load(first_rank_decides(partial(_find_whole, checkpoint)), device=device, overrides=overrides)
    cache = node_cache(embedder.run.data.cache, out, purpose=_PURPOSE)
    source = Source(chosen.recipe, chosen.split, place=chosen.place, modalities=embedder.modalities, cache=cache)
    shards = np.flatnonzero(source.counts).tolist()
    open_store = partial(EmbeddingStore, out, identity=_identity(embedder, source), form=form)
    missing = first_rank_decides(lambda: open_store().prepare(len(shards)))
    store = open_store()  # on every rank, when the first has written what the folder is for
    if len(missing) < len(shards):
        logger.info("%s: %d of %d parts are there", out, len(shards) - len(missing), len(shards))
    _write_parts(embedder, source, shards, store, missing=missing)
    manifest = first_rank_decides(lambda: store.finish(len(shards), samples=len(source)))
    bad = manifest["undecodable_members"]
    if bad:
        logger.warning("%d members could not be decoded and count as absent: see `faults` in the parts", bad)
    logger.info("%s: embeddings of %d samples in %d parts", out, manifest["samples"], len(shards))
    leave_ranks()


def _find_whole(checkpoint: str | os.PathLike[str]) -> Path:
    folder = find_checkpoint(checkpoint)
    verify_checkpoint(folder, contents=True)
    return folder


def _write_parts(
    embedder: Embedder, source: Source, shards: list[int], store: EmbeddingStore, *, missing: list[int]
) -> None:
    """This rank's share of the missing parts."""
    mine = missing[rank() :: world_size()]
    starts = np.cumsum(source.counts) - source.counts
    spans = [range(starts[shards[n]], starts[shards[n]] + source.counts[shards[n]]) for n in mine]
    run, total, begun = embedder.run, sum(map(len, spans)), time.perf_counter()
    decoder = SampleDecoder([source], embedder.processors, seed=None)
    requests = partial(_requests, spans, batch_size=run.evaluation.batch_size)
    batches = load_batches(
        decoder, requests, num_workers=run.data.num_workers, pin_memory=embedder.device.type == "cuda"
    )

    def uses(ranks: list[int]) -> Callable[[], Iterator[ShardUse]]:
        return partial(_uses, [shards[n] for n in missing], ranks=ranks, world_size=world_size())

    bar = tqdm(total=total, desc="embedding", unit="sample", disable=hide_bar(rank()))
    with prefetching(run.data.cache, [source], uses, run_folder=store.folder, purpose=_PURPOSE) as report, bar:
        for step, group in groupby(batches, key=lambda batch: batch.step):
            shown = source.shards[shards[mine[step]]].shown
            store.write(mine[step], _embed_part(embedder, group, shown=shown, advance=bar.update))
            report(step)
        barrier()  # the prefetcher serves all ranks of its node
    if total:
        logger.info("%d samples in %.0f s", total, time.perf_counter() - begun)


def _embed_part(embedder: Embedder, batches: Iterator[Batch], *, shown: str, advance: Callable[[int], object]) -> Part:
    keys, faults, columns = [], [], {}
    for batch in batches:
        for name, rows in {**embedder.embed(batch), "present": batch.present}.items():
            columns.setdefault(name, []).append(rows.cpu())
        keys += [key.removeprefix(f"{shown}/") for key in batch.keys]
        faults += batch.faults
        advance(len(batch.keys))
    return Part(shown, keys, {name: torch.cat(rows) for name, rows in columns.items()}, faults)


def _requests(spans: list[range], *, batch_size: int) -> Iterator[BatchRequest]:
    """Batches within one shard each; the step is the place of the shard in the list."""
    for step, span in enumerate(spans):
        for start in range(span.start, span.stop, batch_size):
            numbers = np.arange(start, min(start + batch_size, span.stop))
            refs = np.stack([np.zeros_like(numbers), numbers, np.zeros_like(numbers)], axis=1)
            yield BatchRequest(step, refs, len(numbers))


def _uses(shards: list[int], *, ranks: list[int], world_size: int) -> Iterator[ShardUse]:
    """What these ranks read: at each step every rank one shard, dealt in turn."""
    for place, shard in enumerate(shards):
        if place % world_size in ranks:
            yield ShardUse(place // world_size, place // world_size, 0, shard)


def _identity(embedder: Embedder, source: Source) -> dict[str, object]:
    """All that the embeddings depend on."""
    prints = {name: file["blake2b"] for name, file in read_manifest(embedder.checkpoint).items()}
    return {
        "weights": {name: text for name, text in prints.items() if name.startswith((MODEL, AVERAGE))},
        "model_files": {name: text for name, text in prints.items() if name.startswith(f"{MODALITIES}/")},
        "run": embedder.run.name,
        "settings": f"{hash_int(json.dumps(embedder.run.model.model_dump(mode='json'), sort_keys=True)):016x}",
        "source": source.name,
        "index_hash": source.index_hash,
        "reading_hash": source.reading_hash,
        "modalities": list(embedder.modalities),
        "embedding_dim": embedder.run.model.embedding_dim,
    }
