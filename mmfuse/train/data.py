"""A run's training data: its sources, their plan, and this rank's batches from any step on."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

from mmfuse.data.decode import SampleDecoder
from mmfuse.data.loader import BatchRequest, load_batches, training_requests
from mmfuse.data.mixture import open_source
from mmfuse.data.plan import DataPlan, PlannedSource
from mmfuse.files import drop_lines_after
from mmfuse.modalities.base import Processor
from mmfuse.train.engines.base import Engine
from mmfuse.train.metrics import MetricsWriter
from mmfuse.train.run import RunConfig
from mmfuse.types import Batch


class TrainingData:
    """The opened sources of a run and the order in which their samples come."""

    def __init__(self, run: RunConfig) -> None:
        """Opens every source and plans, without reading a sample.

        Raises:
            ConfigError, DataError: a source is missing, not indexed, or does not fit the run.
        """
        self.run = run
        self.sources = [open_source(config, modalities=tuple(run.model.modalities)) for config in run.data.train]
        self.plan = DataPlan(
            [
                # Without weights, sources count by their sizes.
                PlannedSource(source.name, source.counts, config.weight or float(len(source)), source.index_hash)
                for config, source in zip(run.data.train, self.sources, strict=True)
            ],
            seed=run.seed,
            global_batch=run.train.global_batch,
            lanes=run.data.lanes,
            window_shards=run.data.window_shards,
        )

    def batches(
        self, processors: dict[str, Processor], *, start: int, engine: Engine, metrics: MetricsWriter
    ) -> Iterator[Batch]:
        """This rank's micro-batches from step `start` to the end of the run, on its device."""
        run = self.run

        def requests() -> Iterator[BatchRequest]:
            return training_requests(
                self.plan,
                start=start,
                stop=run.train.steps,
                rank=engine.rank,
                world_size=engine.world_size,
                accumulation=run.train.accumulation,
            )

        batches = load_batches(
            SampleDecoder(self.sources, processors, seed=run.seed),
            requests,
            num_workers=run.data.num_workers,
            prefetch_batches=run.data.prefetch_batches,
            pin_memory=engine.device.type == "cuda",
        )
        record = _SampleRecord(run.folder, engine, start) if run.train.record_samples else None
        since = time.perf_counter()
        for batch in batches:
            metrics.count_wait(time.perf_counter() - since)
            if record:
                record.add(batch)
            yield batch.to(engine.device)
            since = time.perf_counter()


class _SampleRecord:
    """`samples.rankN.jsonl`: the keys of every batch that this rank trained on."""

    def __init__(self, folder: Path, engine: Engine, start: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"samples.rank{engine.rank}.jsonl"
        drop_lines_after(path, start)
        for other in folder.glob("samples.rank*.jsonl"):  # of ranks that a larger world had before
            if engine.rank == 0 and int(other.name.split(".")[1].removeprefix("rank")) >= engine.world_size:
                drop_lines_after(other, start)
        self._file = open(path, "a", buffering=1)  # noqa: SIM115  # open as long as the run

    def add(self, batch: Batch) -> None:
        self._file.write(json.dumps({"step": batch.step + 1, "keys": batch.keys}) + "\n")
