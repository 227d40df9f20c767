"""Batches in the order of the plan, through the stock DataLoader; workers are stateless.

The loader takes `rank` and `world_size` as arguments, so tests of order simulate many ranks in one process. It must not
go through `accelerator.prepare`: that deals batches a second time (16 of 32 samples arrive) or reads for all on rank 0.
"""

import itertools
import signal
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mmfuse.data.collate import collate_samples
from mmfuse.data.decode import SampleDecoder
from mmfuse.data.plan import DataPlan
from mmfuse.distributed import slice_of_rank
from mmfuse.errors import MmfuseError
from mmfuse.types import Batch, SampleRef

_PLANNED_AT_ONCE = 2048
"""Samples whose places are computed in one go: alone, each would cost a hundred times as much."""


_SECONDS_AFTER_SIGTERM = 20
"""That a worker lives on."""


class BatchRequest(NamedTuple):
    """What the sampler asks a worker for."""

    step: int
    refs: np.ndarray
    """int64 `(rows, 3)`, a `SampleRef` each."""
    global_rows: int


class PlannedDataset(Dataset[Batch | MmfuseError]):
    """A request gives a batch. Errors come back as values, so that the main process raises them in plain words."""

    def __init__(self, decoder: SampleDecoder) -> None:
        self.decoder = decoder

    def __getitem__(self, request: BatchRequest) -> Batch | MmfuseError:
        try:
            samples = self.decoder(itertools.starmap(SampleRef, request.refs.tolist()))
        except MmfuseError as error:
            return error
        return collate_samples(samples, self.decoder.processors, step=request.step, global_rows=request.global_rows)


def training_requests(
    plan: DataPlan, *, start: int, stop: int, rank: int, world_size: int, accumulation: int = 1
) -> Iterator[BatchRequest]:
    """This rank's slices of the micro-batches of global batches `[start, stop)`, `accumulation` of them a step."""
    positions = positions_of_rank(plan.global_batch, rank=rank, world_size=world_size, accumulation=accumulation)
    chunk = max(1, _PLANNED_AT_ONCE // max(1, positions.size))
    for first in range(start, stop, chunk):
        steps = np.arange(first, min(first + chunk, stop))
        refs = plan.locate(np.repeat(steps, positions.size), np.tile(positions.ravel(), len(steps)))
        for number, part in enumerate(np.split(refs, len(steps) * accumulation)):
            yield BatchRequest(int(steps[number // accumulation]), part, plan.global_batch // accumulation)


def positions_of_rank(global_batch: int, *, rank: int, world_size: int, accumulation: int = 1) -> np.ndarray:
    """Which positions of every global batch a rank reads: int64 `(accumulation, rows)`."""
    own = slice_of_rank(global_batch // accumulation, rank=rank, world_size=world_size)
    begins = np.arange(accumulation) * (global_batch // accumulation)
    return begins[:, None] + np.arange(own.start, own.stop)


def evaluation_requests(num_samples: int, *, batch_size: int, rank: int, world_size: int) -> Iterator[BatchRequest]:
    """Every sample exactly once and the same number of steps on all ranks; the last batch is padded with number -1."""
    for step, start in enumerate(range(0, num_samples, batch_size)):
        indexes = np.arange(start, start + batch_size)
        indexes[indexes >= num_samples] = -1
        refs = np.stack([np.zeros_like(indexes), indexes, np.zeros_like(indexes)], axis=1)
        yield BatchRequest(step, refs[slice_of_rank(batch_size, rank=rank, world_size=world_size)], batch_size)


class _Requests:
    """An iterable that can be started anew, which the DataLoader expects of a sampler."""

    def __init__(self, build: Callable[[], Iterator[BatchRequest]]) -> None:
        self._build = build

    def __iter__(self) -> Iterator[BatchRequest]:
        return self._build()


def load_batches(
    decoder: SampleDecoder,
    requests: Callable[[], Iterator[BatchRequest]],
    *,
    num_workers: int,
    prefetch_batches: int = 4,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Batches in the order of the requests, whatever the number of workers.

    Raises:
        SampleError, ShardError: what a worker met, when its batch is due.
    """
    loader = DataLoader(
        PlannedDataset(decoder),
        sampler=_Requests(requests),  # type: ignore[arg-type]  # typed as ints, used as opaque requests
        batch_size=None,
        collate_fn=_unchanged,  # type: ignore[arg-type]
        num_workers=num_workers,
        prefetch_factor=prefetch_batches if num_workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        # Each start of a loader draws a number. From torch's own generator, it would shift the dropout of a run's first
        # step, which a resumed run has elsewhere.
        generator=torch.Generator(),
    )
    for item in loader:
        if isinstance(item, MmfuseError):
            raise item
        yield item


def _unchanged(item: Batch | MmfuseError) -> Batch | MmfuseError:
    return item


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)  # workers share the cores; their tensors are small
    # A scheduler asks all processes to stop, and the run needs its batches until it has agreed when. But a run that
    # dies ends its workers by the same signal, and waits for them.
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_SECONDS_AFTER_SIGTERM))
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
