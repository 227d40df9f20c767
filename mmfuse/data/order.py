"""The endless, shuffled order in which one source's samples are dealt to the lanes.

In each epoch the shards are permuted and their samples strung together. Lane l takes the next part of that string, as
long as its number of draws in this epoch, and shuffles it in windows of a few shards, so that it reads few shards at a
time. A source of no more shards than a window is shuffled as a whole: locality would gain nothing there. Shuffles have
no table (`permutation.py`), so memory is the shards' alone and any draw is found at once.
"""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from mmfuse.data.permutation import mix, permute
from mmfuse.hashing import hash_int

_CACHED_EPOCHS = 4
"""Lanes are about one epoch apart at most."""
_NEVER = 1 << 60


class ShardUse(NamedTuple):
    """A shard is read from its first step to its last, both included."""

    first_step: int
    last_step: int
    source: int
    shard: int


class _Epoch(NamedTuple):
    """The string of one epoch."""

    shards: np.ndarray
    """Shards in their order."""
    ends: np.ndarray
    """Where each one's samples end in the string."""


class SourceOrder:
    """Draws of one source, by lane."""

    def __init__(self, name: str, counts: np.ndarray, *, lanes: int, seed: int, window_shards: int) -> None:
        """From the samples of each shard, int64 `(shards,)`."""
        self.name, self.counts = name, counts
        self.lanes, self.seed, self.window_shards = lanes, seed, window_shards
        self.starts = np.cumsum(counts) - counts
        self.total = int(counts.sum())
        self.shuffled_whole = np.count_nonzero(counts) <= window_shards
        self._key = np.uint64(hash_int(seed, name, "shuffle"))
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()

    def draws(self, lane: np.ndarray, draw: np.ndarray) -> np.ndarray:
        """The draws of lanes, elementwise: int64 `(n,)` both -> `(n, 2)`, sample number and epoch."""
        epoch, place = np.divmod(draw * self.lanes + lane, self.total)
        if self.shuffled_whole:
            size = np.full_like(place, self.total)
            return np.stack([permute(place, size, self._window_key(epoch, np.zeros_like(place))), epoch], axis=1)
        number = np.empty_like(draw)
        for e in np.unique(epoch):
            here = epoch == e
            number[here] = self._in_windows(int(e), lane[here], draw[here])
        return np.stack([number, epoch], axis=1)

    def windows(self, lane: int, draw: int) -> Iterator[tuple[int, int, int]]:
        """What a lane reads from a draw on: `(first draw, last draw, shard)`, endless, by first draw."""
        if self.shuffled_whole:
            # Never over: the next epoch needs them again.
            yield from ((draw, _NEVER, int(shard)) for shard in np.flatnonzero(self.counts))
            return
        epoch = (draw * self.lanes + lane) // self.total
        while True:
            first = self._first_draw(epoch, lane)
            begin, end = self._part_of(epoch, np.array([lane]))
            while begin < end:
                _, stop = self._window_at(epoch, np.array([lane]), begin)
                last = first + int(stop[0] - begin[0]) - 1
                if last >= draw:
                    yield from ((max(first, draw), last, shard) for shard in self._shards_in(epoch, begin, stop))
                first, begin = last + 1, stop
            epoch += 1

    def _first_draw(self, epoch: int, lane: Any) -> Any:
        """The lane's first draw j whose `j * lanes + lane` is not before the epoch."""
        return -((lane - epoch * self.total) // self.lanes)

    def _draws_before(self, epoch: int, lane: np.ndarray) -> np.ndarray:
        """Draws of all lanes below `lane` before the epoch: the sum of their `_first_draw`."""
        whole, rest = divmod(epoch * self.total, self.lanes)
        return lane * whole + np.minimum(lane, rest)

    def _part_of(self, epoch: int, lane: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the lane's part of the epoch's string begins and ends."""
        begin = self._draws_before(epoch + 1, lane) - self._draws_before(epoch, lane)
        end = self._draws_before(epoch + 1, lane + 1) - self._draws_before(epoch, lane + 1)
        return begin, end

    def _in_windows(self, epoch: int, lane: np.ndarray, draw: np.ndarray) -> np.ndarray:
        """Sample numbers of draws that all fall into one epoch."""
        begin, _ = self._part_of(epoch, lane)
        first = self._first_draw(epoch, lane)
        place = begin + draw - first
        low, high = self._window_at(epoch, lane, place)
        return self._number_at(
            epoch, low + permute(place - low, high - low, self._window_key(np.full_like(low, epoch), low))
        )

    def _window_at(self, epoch: int, lane: np.ndarray, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The window around a place in the lane's part of the string: begin and end."""
        ends = self._string(epoch).ends
        begin, end = self._part_of(epoch, lane)
        first = np.searchsorted(ends, begin, side="right")
        window = (np.searchsorted(ends, place, side="right") - first) // self.window_shards
        before = first + window * self.window_shards - 1
        low = np.where(window == 0, begin, ends[before])
        return low, np.minimum(end, ends[np.minimum(before + self.window_shards, len(ends) - 1)])

    def _number_at(self, epoch: int, place: np.ndarray) -> np.ndarray:
        """Sample numbers at places of the epoch's string."""
        shards, ends = self._string(epoch)
        found = np.searchsorted(ends, place, side="right")
        shard = shards[found]
        return self.starts[shard] + place - (ends[found] - self.counts[shard])

    def _shards_in(self, epoch: int, begin: np.ndarray, end: np.ndarray) -> list[int]:
        shards, ends = self._string(epoch)
        first, last = np.searchsorted(ends, [begin[0], end[0] - 1], side="right")
        return [int(shard) for shard in shards[first : last + 1] if self.counts[shard]]

    def _window_key(self, epoch: np.ndarray, low: np.ndarray) -> np.ndarray:
        """A key for each window: epoch and the place where it begins."""
        return mix(mix(self._key ^ epoch.astype(np.uint64)) ^ low.astype(np.uint64))

    def _string(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            generator = np.random.Philox(key=hash_int(self.seed, self.name, "shards", epoch))
            # Of raw numbers: numpy may change what `permutation` makes of them from one version to the next.
            shards = np.argsort(generator.random_raw(len(self.counts)), kind="stable")
            self._epochs[epoch] = _Epoch(shards, np.cumsum(self.counts[shards]))
            if len(self._epochs) > _CACHED_EPOCHS:
                self._epochs.popitem(last=False)
        self._epochs.move_to_end(epoch)
        return self._epochs[epoch]
