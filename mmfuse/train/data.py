"""A run's training data: its sources, their plan, and this rank's batches from any step on."""

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from mmfuse.data.blend import WeightSegment
from mmfuse.data.buckets import LengthBuckets, choose_buckets
from mmfuse.data.decode import SampleDecoder
from mmfuse.data.left_out import LeftOut, PlannedSteps
from mmfuse.data.loader import BatchRequest, load_batches, positions_of_rank, training_requests
from mmfuse.data.mixture import open_source
from mmfuse.data.order import ShardUse
from mmfuse.data.plan import DataPlan, PlannedSource
from mmfuse.data.quarantine import Quarantine
from mmfuse.data.source import Source
from mmfuse.errors import ConfigError
from mmfuse.modalities.base import Processor
from mmfuse.train.engines.base import Engine
from mmfuse.train.metrics import MetricsWriter
from mmfuse.train.prefetch import node_cache, prefetching
from mmfuse.train.rank_lines import RankLines
from mmfuse.train.run import RunConfig
from mmfuse.train.watchdog import Watchdog
from mmfuse.types import Batch

logger = logging.getLogger(__name__)


class TrainingData:
    """The opened sources of a run and the order in which their samples come."""

    def __init__(self, run: RunConfig) -> None:
        """Opens every source and plans, without reading a sample.

        Raises:
            ConfigError, DataError: a source is missing, not indexed, or does not fit the run.
        """
        self.run = run
        self.sources = _open_sources(run)
        self.plan = self._build_plan(())

    def go_on(self, segments: Sequence[WeightSegment], left_out: Sequence[LeftOut], *, start: int) -> None:
        """Goes on with the weights that a checkpoint recorded; from `start` on with the run's, where they differ."""
        now, planned = self.plan.segments[-1].weights, int(PlannedSteps(left_out).of(start))
        if segments[-1].weights != now:
            logger.info("weights of the sources from step %d on: %s, before: %s", start, now, segments[-1].weights)
            segments = [*(s for s in segments if s.start_step < planned), WeightSegment(planned, now)]
        for window in left_out:
            logger.info("from step %d on, %d global batches are left out: their loss spiked", *window)
        self.plan = self._build_plan(segments, left_out)

    def epochs(self, step: int) -> dict[str, float]:
        """How many epochs of each source were dealt before `step`, for the metrics."""
        epochs = zip(self.sources, self.plan.epochs(step).tolist(), strict=True)
        return {f"sources/{source.name}/epochs": number for source, number in epochs}

    def batches(
        self,
        processors: dict[str, Processor],
        *,
        start: int,
        engine: Engine,
        metrics: MetricsWriter,
        watchdog: Watchdog,
        beside: Mapping[str, int] | None = None,
    ) -> Iterator[Batch]:
        """This rank's micro-batches from step `start` to the end of the run, on its device.

        Args:
            beside: size by name of what evaluation will need of the node's cache meanwhile.
        """
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
        quarantine = Quarantine([source.name for source in self.sources], run.data.quarantine)
        records = _Records(run.folder, engine, start=start, samples=run.train.record_samples)
        uses = partial(self._uses, start, engine.world_size)
        with prefetching(
            run.data.cache, self.sources, uses, run_folder=run.folder, purpose="train", beside=beside
        ) as report:
            for number in itertools.count(1):
                since = time.perf_counter()
                with watchdog.phase("data", step=start + (number - 1) // run.train.accumulation):
                    batch = next(batches, None)
                if batch is None:
                    return
                metrics.count_wait(time.perf_counter() - since)
                is_last = number % run.train.accumulation == 0
                report(batch.step if is_last else batch.step - 1)
                records.add(batch)
                quarantine.add(batch)
                metrics.count_sources(list(quarantine.counts().values()))
                yield batch.to(engine.device)

    def _uses(self, start: int, world_size: int, ranks: list[int]) -> Callable[[], Iterator[ShardUse]]:
        """What these ranks read from step `start` on."""
        run = self.run
        positions = [
            positions_of_rank(
                run.train.global_batch, rank=rank, world_size=world_size, accumulation=run.train.accumulation
            )
            for rank in ranks
        ]
        rows = [range(int(part[0]), int(part[-1]) + 1) for parts in positions for part in parts]
        return partial(self.plan.shard_uses, start, rows=rows)

    def _build_plan(self, segments: Sequence[WeightSegment], left_out: Sequence[LeftOut] = ()) -> DataPlan:
        run = self.run
        return DataPlan(
            [
                # Without weights, sources count by their sizes.
                PlannedSource(
                    source.name,
                    source.counts_by_bucket,
                    config.weight or float(len(source)),
                    source.index_hash,
                    source.reading_hash,
                )
                for config, source in zip(run.data.train, self.sources, strict=True)
            ],
            seed=run.seed,
            global_batch=run.train.global_batch,
            lanes=run.data.lanes,
            window_shards=run.data.window_shards,
            segments=segments,
            left_out=left_out,
        )


def _open_sources(run: RunConfig) -> list[Source]:
    modalities = tuple(run.model.modalities)
    cache = node_cache(run.data.cache, run.folder, purpose="train")
    sources = [
        open_source(config, modalities=modalities, cache=cache, keep_lengths=run.data.buckets is not None)
        for config in run.data.train
    ]
    if run.data.buckets is None:
        return sources
    by = run.data.buckets.modality
    rules = [source.rules.get(by) for source in sources]
    extensions = [tuple(rule.extensions) if rule else () for rule in rules]
    facts = ((source.name, source.facts, e) for source, e in zip(sources, extensions, strict=True))
    buckets: LengthBuckets = choose_buckets(run.data.buckets, facts)
    return [open_source(c, modalities=modalities, cache=cache, buckets=buckets) for c in run.data.train]


def check_fed(run: RunConfig, sources: Sequence[Source]) -> None:
    """Refuses an objective that would be 0 all the time.

    Raises:
        ConfigError: an objective needs samples that no source holds.
    """
    held = {frozenset(present) for source in sources for present in source.count_by_modalities()}
    readings = {str(rule.captions) for source in sources for rule in source.rules.values()}
    for name, config in run.objective_configs.items():
        for need in config.needs(name, tuple(run.model.modalities)):
            if need.captions and need.captions not in readings:
                raise ConfigError(
                    f"objectives.{need.setting} learns from texts that a recipe of data.train reads as "
                    f"`captions: {need.captions}`, and none does; data_shards/README.md tells how"
                )
            seen = {frozenset().union(*held)} if need.across_samples else held
            if not any(wanted <= present for wanted in need.any_of for present in seen):
                wanted = " or ".join("+".join(sorted(wanted)) for wanted in need.any_of)
                there = ", ".join("+".join(sorted(present)) or "none of these" for present in sorted(held, key=sorted))
                raise ConfigError(
                    f"objectives.{need.setting} learns from samples with {wanted}, of which data.train "
                    f"({', '.join(source.name for source in sources)}) has none; its samples hold: {there}"
                )


class _Records:
    """`quarantine.rankN.jsonl`: bad members that this rank met; `samples.rankN.jsonl`: its keys, for audits."""

    def __init__(self, folder: Path, engine: Engine, *, start: int, samples: bool) -> None:
        self._faults = RankLines(folder, "quarantine", engine.rank, engine.world_size, start=start)
        self._told: set[str] = set()
        self._samples = RankLines(folder, "samples", engine.rank, engine.world_size, start=start) if samples else None

    def add(self, batch: Batch) -> None:
        if self._samples:
            self._samples.write(batch.step + 1, {"keys": batch.keys})
        for fault in batch.faults:
            if fault.source not in self._told:
                self._told.add(fault.source)
                logger.warning(
                    "%s/%s.%s: %s; it counts as missing, as will other bad members of %s; all are in %s",
                    *(fault.shard, fault.key, fault.extension, fault.reason, fault.source, self._faults.path),
                )
            self._faults.write(batch.step + 1, fault._asdict())
