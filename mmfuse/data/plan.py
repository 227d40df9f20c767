"""Which samples make global batch t: a pure function of seed, sources, weights, global batch and lanes.

No rank, world size or worker count enters the choice, and there is no state: a resumed run starts at its step.

- The global batch is cut into `lanes`, fixed for a run; lane l fills positions `[l*q, (l+1)*q)` with q = batch / lanes.
- The j-th draw of lane l from a source of N samples is draw `d = j * lanes + l` of that source: its epoch is `d // N`.
  So every sample of every epoch is dealt exactly once, epochs end inside a global batch, and no tail is dropped.
- Length buckets, where a run has them, come first: a table says which bucket step t draws from, on all lanes, and each
  bucket deals its own part of every source as below. Without them there is one bucket.
- In which order an epoch's samples come is `SourceOrder`'s matter; a lane reads few shards at a time.
"""

import heapq
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from mmfuse.data.blend import Blend, Schedule, WeightSegment, check_weights
from mmfuse.data.left_out import LeftOut, PlannedSteps
from mmfuse.data.order import ShardUse, SourceOrder
from mmfuse.errors import ConfigError

MAX_DEFAULT_LANES = 64


class PlannedSource(NamedTuple):
    """What the plan knows of a source."""

    name: str
    counts: np.ndarray
    """Samples of each shard: int64 `(shards,)`, or `(buckets, shards)`."""
    weight: float
    index_hash: str
    reading_hash: str = ""
    """Of which members are read, and how."""


class DataPlan:
    """The samples of every global batch."""

    def __init__(
        self,
        sources: Sequence[PlannedSource],
        *,
        seed: int,
        global_batch: int,
        lanes: int | None = None,
        window_shards: int = 8,
        segments: Sequence[WeightSegment] = (),
        left_out: Sequence[LeftOut] = (),
    ) -> None:
        """Plans without reading any data.

        Args:
            segments: the weights that held so far, of a resumed run; without, the sources' own hold from the start.
            left_out: global batches that no step has.
        Raises:
            ConfigError: lanes do not divide the global batch, two sources have one name, or a weight is out of reach.
        """
        names = [source.name for source in sources]
        if len(set(names)) < len(names):
            raise ConfigError(f"two sources of data.train have one name in {', '.join(names)}: rename a recipe")
        self.global_batch, self.seed, self.window_shards = global_batch, seed, window_shards
        self.lanes = lanes or _default_lanes(global_batch)
        if global_batch % self.lanes:
            raise ConfigError(f"data.lanes = {self.lanes} does not divide the global batch of {global_batch}")
        self.sources, self.left_out = tuple(sources), tuple(left_out)
        self.planned_steps = PlannedSteps(left_out)
        self.segments = tuple(segments) or (WeightSegment(0, tuple(source.weight for source in sources)),)
        for segment in self.segments:
            check_weights(segment.weights, names=names)
        shares = self._bucket_shares()
        # Summed in a fixed order: a matrix product may differ in its last bit from machine to machine.
        mixed = [(s.start_step, (np.array(s.weights)[:, None] / sum(s.weights) * shares).sum(0)) for s in self.segments]
        self._buckets = Schedule([(start, Blend(weights.tolist())) for start, weights in mixed], lanes=1)
        self._parts = [self._plan_bucket(number, shares) for number in range(shares.shape[1])]

    def identity(self) -> dict[str, Any]:
        """All that samples and their order depend on but for weights and batches that are left out; a resumed run must
        have the same."""
        return {
            "seed": self.seed,
            "global_batch": self.global_batch,
            "lanes": self.lanes,
            "window_shards": self.window_shards,
            "buckets": len(self._parts),
            "sources": [
                {"name": source.name, "index_hash": source.index_hash, "reading_hash": source.reading_hash}
                for source in self.sources
            ],
        }

    def rows(self, step: int, start: int, stop: int) -> np.ndarray:
        """Positions `[start, stop)` of global batch `step`: int64 `(stop - start, 3)`, a `SampleRef` each."""
        positions = np.arange(start, stop)
        return self.locate(np.full_like(positions, step), positions)

    def locate(self, step: np.ndarray, position: np.ndarray) -> np.ndarray:
        """The samples at positions of global batches, elementwise: int64 `(n,)` both -> `(n, 3)`, a `SampleRef` each.

        A thousand at once cost a microsecond each, one alone costs a millisecond.
        """
        bucket, number = self._buckets.at(np.zeros_like(step), self.planned_steps.of(step))
        refs = np.empty((len(step), 3), np.int64)
        for part in np.unique(bucket):
            here = bucket == part
            refs[here] = self._parts[part].locate(number[here], position[here])
            refs[here, 0] += part * len(self.sources)
        return refs

    def shard_uses(self, start: int, *, rows: Sequence[range]) -> Iterator[ShardUse]:
        """What these rows of the global batches from step `start` on are read from: endless, by first step."""
        drawn = self._buckets.drawn(int(self.planned_steps.of(start)))[0]
        per_lane = self.global_batch // self.lanes
        lanes = sorted({lane for r in rows for lane in range(r.start // per_lane, -(-r.stop // per_lane))})
        return heapq.merge(*(self._uses_of_bucket(n, int(drawn[n]), lanes) for n in range(len(self._parts))))

    def epochs(self, step: int) -> np.ndarray:
        """How many epochs of each source were dealt or left out before `step`: float64 `(sources,)`."""
        done = self._buckets.drawn(int(self.planned_steps.of(step)))[0]
        dealt = np.sum([part.dealt(int(n)) for part, n in zip(self._parts, done, strict=True)], axis=0)
        return dealt / [source.counts.sum() for source in self.sources]

    def _uses_of_bucket(self, part: int, start: int, lanes: list[int]) -> Iterator[ShardUse]:
        for use in self._parts[part].shard_uses(start, lanes):
            first, last = (self._buckets.slot_of(0, part, step) for step in (use.first_step, use.last_step))
            first, last = self.planned_steps.step_of(first), self.planned_steps.step_of(last)
            yield ShardUse(first, last, use.source, use.shard)

    def _bucket_shares(self) -> np.ndarray:
        """`(sources, buckets)`: which part of each source is in which bucket."""
        counts = np.stack([np.atleast_2d(source.counts).sum(1) for source in self.sources])
        return counts / counts.sum(1, keepdims=True)

    def _plan_bucket(self, number: int, shares: np.ndarray) -> "_LanePlan":
        held = [source for source in range(len(self.sources)) if shares[source, number] > 0]
        per_lane = self.global_batch // self.lanes
        blends = [
            (
                int(self._buckets.drawn(segment.start_step)[0, number]) * per_lane,
                Blend([segment.weights[source] * shares[source, number] for source in held]),
            )
            for segment in self.segments
        ]
        orders = [
            SourceOrder(
                f"{self.sources[source].name}#{number}" if shares.shape[1] > 1 else self.sources[source].name,
                np.atleast_2d(self.sources[source].counts)[number],
                lanes=self.lanes,
                seed=self.seed,
                window_shards=self.window_shards,
            )
            for source in held
        ]
        schedule = Schedule(blends, lanes=self.lanes)
        return _LanePlan(held, orders, schedule, per_lane=per_lane, num_sources=len(self.sources))


class _LanePlan:
    """The samples of every global batch that draws from one bucket; steps are counted within the bucket."""

    def __init__(
        self, held: list[int], orders: list[SourceOrder], schedule: Schedule, *, per_lane: int, num_sources: int
    ) -> None:
        self.held, self.orders, self.schedule = np.array(held), orders, schedule
        self.per_lane, self.num_sources = per_lane, num_sources

    def locate(self, step: np.ndarray, position: np.ndarray) -> np.ndarray:
        lane, within = position // self.per_lane, position % self.per_lane
        owner, draw = self.schedule.at(lane, step * self.per_lane + within)
        refs = np.empty((len(step), 3), np.int64)
        refs[:, 0] = self.held[owner]
        for number in np.unique(owner):
            here = owner == number
            refs[here, 1:] = self.orders[number].draws(lane[here], draw[here])
        return refs

    def shard_uses(self, start: int, lanes: list[int]) -> Iterator[ShardUse]:
        drawn = self.schedule.drawn(start * self.per_lane)
        return heapq.merge(
            *(
                self._uses_of_lane(number, lane, int(drawn[lane, number]))
                for number in range(len(self.orders))
                for lane in lanes
            )
        )

    def _uses_of_lane(self, number: int, lane: int, draw: int) -> Iterator[ShardUse]:
        for first, last, shard in self.orders[number].windows(lane, draw):
            first_step = self.schedule.slot_of(lane, number, first) // self.per_lane
            last_step = self.schedule.slot_of(lane, number, last) // self.per_lane
            yield ShardUse(first_step, last_step, int(self.held[number]), shard)

    def dealt(self, step: int) -> np.ndarray:
        """Draws from every source before a step."""
        dealt = np.zeros(self.num_sources, np.int64)
        dealt[self.held] = self.schedule.drawn(step * self.per_lane).sum(0)
        return dealt


def _default_lanes(global_batch: int) -> int:
    """The largest divisor up to MAX_DEFAULT_LANES: as much locality as possible, whatever the number of ranks."""
    return max(n for n in range(1, min(MAX_DEFAULT_LANES, global_batch) + 1) if math.gcd(global_batch, n) == n)
