"""Which samples make global batch t: a pure function of seed, sources, weights, global batch and lanes.

No rank, world size or worker count enters the choice, and there is no state: a resumed run starts at its step.

- The global batch is cut into `lanes`, fixed for a run; lane l fills positions `[l*q, (l+1)*q)` with q = batch / lanes.
- The j-th draw of lane l from a source of N samples is draw `d = j * lanes + l` of that source: its epoch is `d // N`.
  So every sample of every epoch is dealt exactly once, epochs end inside a global batch, and no tail is dropped.
- In each epoch the shards are permuted and their samples strung together; lane l takes the next part of that string,
  as long as its number of draws in this epoch, and shuffles it in windows of a few shards. Lanes decide only who reads
  which shard. A source of few shards is shuffled as a whole first: locality would gain nothing there.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mmfuse.data.mixture import PERIOD, Blend
from mmfuse.errors import ConfigError
from mmfuse.hashing import hash_int

MAX_DEFAULT_LANES = 64


class PlannedSource(NamedTuple):
    """What the plan knows of a source."""

    name: str
    counts: np.ndarray
    """Samples of each shard."""
    weight: float
    index_hash: str


class SourceOrder:
    """The endless, shuffled order in which one source's samples are dealt to lanes."""

    def __init__(self, source: PlannedSource, *, lanes: int, seed: int, window_shards: int) -> None:
        self.name, self.lanes, self.seed, self.window_shards = source.name, lanes, seed, window_shards
        self.counts = source.counts
        self.starts = np.cumsum(source.counts) - source.counts
        self.total = int(source.counts.sum())
        self.shuffled_whole = len(source.counts) <= window_shards
        self._cache: OrderedDict[tuple, Any] = OrderedDict()

    def draws(self, lane: int, start: int, stop: int) -> np.ndarray:
        """Draws `[start, stop)` of a lane: int64 `(stop - start, 2)`, sample number and epoch."""
        parts = []
        while start < stop:
            epoch = (start * self.lanes + lane) // self.total
            first, end = self._first_draw(epoch, lane), self._first_draw(epoch + 1, lane)
            until = min(stop, end)
            numbers = self._part(epoch, lane, start - first, until - first)
            parts.append(np.stack([numbers, np.full_like(numbers, epoch)], axis=1))
            start += len(numbers)
        return np.concatenate(parts) if parts else np.empty((0, 2), np.int64)

    def _first_draw(self, epoch: int, lane: int | np.ndarray) -> Any:
        """The lane's first draw j whose `j * lanes + lane` is not before the epoch."""
        return -((lane - epoch * self.total) // self.lanes)

    def _part(self, epoch: int, lane: int, start: int, stop: int) -> np.ndarray:
        """Samples `[start, stop)` of the lane's part of an epoch; may stop early, at the end of a window."""
        begin, edges = self._cached(("windows", epoch, lane), self._windows)
        if self.shuffled_whole:
            return self._cached(("whole", epoch), self._whole_epoch)[begin + start : begin + stop]
        window = int(np.searchsorted(edges, begin + start, side="right")) - 1
        numbers = self._cached(("window", epoch, lane, window), self._shuffled_window)
        return numbers[begin + start - edges[window] : begin + stop - edges[window]]

    def _windows(self, epoch: int, lane: int) -> tuple[int, np.ndarray]:
        """Where the lane's part begins in the string of the epoch, and the edges of its windows."""
        lanes = np.arange(self.lanes + 1)
        lengths = self._first_draw(epoch + 1, lanes) - self._first_draw(epoch, lanes)
        begin = int(lengths[:lane].sum())
        end = begin + int(lengths[lane])
        _, ends = self._cached(("shards", epoch), self._permuted_shards)
        inside = ends[(ends > begin) & (ends < end)]
        return begin, np.array([begin, *inside[self.window_shards - 1 :: self.window_shards], end])

    def _permuted_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        order = self._generator("shards", epoch).permutation(len(self.counts))
        return order, np.cumsum(self.counts[order])

    def _whole_epoch(self, epoch: int) -> np.ndarray:
        return self._generator("whole", epoch).permutation(self.total)

    def _shuffled_window(self, epoch: int, lane: int, window: int) -> np.ndarray:
        _, edges = self._cached(("windows", epoch, lane), self._windows)
        order, ends = self._cached(("shards", epoch), self._permuted_shards)
        begin, end = edges[window], edges[window + 1]
        first, last = np.searchsorted(ends, begin, side="right"), np.searchsorted(ends, end, side="left")
        pieces = []
        for place in range(first, last + 1):
            shard, shard_begin = order[place], ends[place] - self.counts[order[place]]
            low, high = max(begin, shard_begin) - shard_begin, min(end, ends[place]) - shard_begin
            pieces.append(np.arange(low, high) + self.starts[shard])
        numbers = np.concatenate(pieces)
        self._generator("window", epoch, lane, window).shuffle(numbers)
        return numbers

    def _generator(self, *purpose: object) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=hash_int(self.seed, self.name, *purpose)))

    def _cached(self, key: tuple, build: Any) -> Any:
        """`build(*key[1:])`, kept while recent; two entries a lane hold its window and the next."""
        if key not in self._cache:
            self._cache[key] = build(*key[1:])
            if len(self._cache) > 4 * self.lanes + 4:
                self._cache.popitem(last=False)
        self._cache.move_to_end(key)
        return self._cache[key]


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
    ) -> None:
        """Plans without reading any data.

        Raises:
            ConfigError: lanes do not divide the global batch, two sources have one name, or a weight is out of reach.
        """
        names = [source.name for source in sources]
        if len(set(names)) < len(names):
            raise ConfigError(f"two sources of data.train have one name in {', '.join(names)}: rename a recipe")
        self.global_batch, self.seed = global_batch, seed
        self.lanes = lanes or max(
            n for n in range(1, min(MAX_DEFAULT_LANES, global_batch) + 1) if global_batch % n == 0
        )
        if global_batch % self.lanes:
            raise ConfigError(f"data.lanes = {self.lanes} does not divide the global batch of {global_batch}")
        self.sources = tuple(sources)
        self.window_shards = window_shards
        self.blend = Blend([source.weight for source in sources])
        self.orders = [
            SourceOrder(source, lanes=self.lanes, seed=seed, window_shards=window_shards) for source in sources
        ]

    def identity(self) -> dict[str, Any]:
        """All that the order depends on; a resumed run must have the same."""
        return {
            "seed": self.seed,
            "global_batch": self.global_batch,
            "lanes": self.lanes,
            "window_shards": self.window_shards,
            "sources": [{"name": s.name, "weight": s.weight, "index_hash": s.index_hash} for s in self.sources],
        }

    def rows(self, step: int, start: int, stop: int) -> np.ndarray:
        """Positions `[start, stop)` of global batch `step`: int64 `(stop - start, 3)`, a `SampleRef` each."""
        per_lane = self.global_batch // self.lanes
        first, last = start // per_lane, -(-stop // per_lane)
        rows = np.concatenate([self._lane_batch(step, lane, per_lane) for lane in range(first, last)])
        return rows[start - first * per_lane : stop - first * per_lane]

    def _lane_batch(self, step: int, lane: int, per_lane: int) -> np.ndarray:
        # Every lane follows the same table, each from another place, so a global batch mixes the sources.
        turn = lane * PERIOD // self.lanes
        start = turn + step * per_lane
        owners = self.blend.sources(start, start + per_lane)
        drawn = self.blend.drawn(start) - self.blend.drawn(turn)
        rows = np.empty((per_lane, 3), np.int64)
        rows[:, 0] = owners
        for source in np.unique(owners):
            mine = owners == source
            rows[mine, 1:] = self.orders[source].draws(lane, int(drawn[source]), int(drawn[source] + mine.sum()))
        return rows

    def epochs(self, step: int) -> dict[str, float]:
        """How many epochs of each source were dealt before `step`, as numbers for the metrics."""
        turns = [lane * PERIOD // self.lanes for lane in range(self.lanes)]
        slots = step * (self.global_batch // self.lanes)
        dealt = np.sum([self.blend.drawn(turn + slots) - self.blend.drawn(turn) for turn in turns], axis=0)
        return {
            f"epochs/{s.name}": float(n / o.total) for s, o, n in zip(self.sources, self.orders, dealt, strict=True)
        }
