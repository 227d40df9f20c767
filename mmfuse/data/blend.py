"""Whose turn it is: weighted sources dealt to lanes, with weights that may change in mid-run."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mmfuse.errors import ConfigError

PERIOD = 65_536
"""Slots of the blend table; a weight is met to 1 part in this many."""


class Blend:
    """Which owner each turn of an endless sequence belongs to, and how often it had one before: O(1) at any turn.

    The table holds integer counts that add up to PERIOD, each owner's turns evenly spread. (Closed-form rounding of
    cumulative targets looks simpler and gives negative counts in every other blend.)
    """

    def __init__(self, weights: Sequence[float], *, names: Sequence[str]) -> None:
        """Weights in any unit.

        Raises:
            ConfigError: a weight is out of the table's reach; names the owner.
        """
        shares = np.asarray(weights, dtype=np.float64) / sum(weights) * PERIOD
        counts = np.floor(shares).astype(np.int64)
        largest_remainders = np.argsort(counts - shares, kind="stable")
        counts[largest_remainders[: PERIOD - counts.sum()]] += 1
        if (counts == 0).any():
            lost = [f"{name} ({weight:g})" for name, weight, n in zip(names, weights, counts, strict=True) if n == 0]
            raise ConfigError(
                f"weights of {', '.join(lost)} are below 1/{PERIOD} of their sum {sum(weights):g}, so no sample would "
                "ever be drawn: raise them in data.train, or take these sources out"
            )
        turns = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
        owners = np.repeat(np.arange(len(counts)), counts)
        self.counts = counts
        self.table = owners[np.argsort(turns, kind="stable")]
        self.turns = [np.flatnonzero(self.table == owner) for owner in range(len(counts))]
        self.before = np.zeros((PERIOD + 1, len(counts)), dtype=np.int32)
        self.before[1:] = np.cumsum(self.table[:, None] == np.arange(len(counts)), axis=0)

    def owner(self, turn: np.ndarray) -> np.ndarray:
        """Whose turn it is, elementwise."""
        return self.table[turn % PERIOD]

    def drawn(self, turn: np.ndarray, owner: np.ndarray) -> np.ndarray:
        """How many turns `owner` had before `turn`, elementwise."""
        return turn // PERIOD * self.counts[owner] + self.before[turn % PERIOD, owner]

    def turn_of(self, draw: int, owner: int) -> int:
        """The turn at which `owner` has its `draw`-th turn, 0-based."""
        periods, rest = divmod(draw, int(self.counts[owner]))
        return periods * PERIOD + int(self.turns[owner][rest])


class WeightSegment(NamedTuple):
    """From which step on which weights hold, one for each source; a run that never changed them has one."""

    start_step: int
    weights: tuple[float, ...]


class Schedule:
    """Whose turn it is at every slot of every lane, and its number among the owner's draws of that lane.

    Lanes go through one table, each from another place, so that a global batch mixes the owners evenly.
    """

    def __init__(self, blends: Sequence[tuple[int, Blend]], *, lanes: int) -> None:
        """Blends with the slot from which each holds; the first at 0."""
        self.starts = np.array([start for start, _ in blends], dtype=np.int64)
        self.blends = [blend for _, blend in blends]
        self.first_turns = [_spread_lanes(blend, lanes) for blend in self.blends]
        drawn = np.zeros((lanes, len(self.blends[0].counts)), dtype=np.int64)
        self.drawn_before = [drawn]
        for number, (start, stop) in enumerate(itertools.pairwise(self.starts.tolist())):
            drawn = drawn + self._within(number, slots=stop - start)
            self.drawn_before.append(drawn)

    def at(self, lane: np.ndarray, slot: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Owner and number of its draw, both int64 `(n,)`, for lanes and slots `(n,)`."""
        owner, draw = np.empty_like(slot), np.empty_like(slot)
        segment = np.searchsorted(self.starts, slot, side="right") - 1
        for number in np.unique(segment):
            here = segment == number
            blend, first = self.blends[number], self.first_turns[number][lane[here]]
            turn = first + slot[here] - self.starts[number]
            owner[here] = blend.owner(turn)
            done = blend.drawn(turn, owner[here]) - blend.drawn(first, owner[here])
            draw[here] = self.drawn_before[number][lane[here], owner[here]] + done
        return owner, draw

    def drawn(self, slot: int) -> np.ndarray:
        """How often each lane drew from each owner before `slot`: int64 `(lanes, owners)`."""
        number = int(np.searchsorted(self.starts, slot, side="right")) - 1
        return self.drawn_before[number] + self._within(number, slots=slot - int(self.starts[number]))

    def slot_of(self, lane: int, owner: int, draw: int) -> int:
        """The slot of a lane in which an owner's draw comes."""
        drawn = [int(before[lane, owner]) for before in self.drawn_before]
        number = int(np.searchsorted(drawn, draw, side="right")) - 1
        blend, first = self.blends[number], int(self.first_turns[number][lane])
        skipped = int(blend.drawn(np.array(first), np.array(owner)))
        return int(self.starts[number]) + blend.turn_of(draw - drawn[number] + skipped, owner) - first

    def _within(self, segment: int, *, slots: int) -> np.ndarray:
        """Draws of `slots` slots from the start of a segment: int64 `(lanes, owners)`."""
        blend, first = self.blends[segment], self.first_turns[segment][:, None]
        owners = np.arange(len(blend.counts))
        return blend.drawn(first + slots, owners) - blend.drawn(first, owners)


_STRIDES = (0, 1, 3, 7, 10_007, 25_033, 40_507, 57_073)
"""What is added to the even distance of lanes; some are primes, which are in step with no simple weights."""
_TRIED_SLOTS = 2048


def _spread_lanes(blend: Blend, lanes: int) -> np.ndarray:
    """The turn at which each lane begins, so that the lanes' draws at any slot are a fair sample of the table.

    No distance suits every table: with weights 1 to 3 and lanes a multiple of four turns apart, all lanes would draw
    from the same source at the same time. So a few are tried, and the fairest is taken.
    """
    slots, lane, owners = np.arange(_TRIED_SLOTS)[:, None], np.arange(lanes), len(blend.counts)
    expected = blend.counts * lanes / PERIOD
    best, least = lane, np.inf
    for stride in _STRIDES:
        first = lane * (PERIOD // lanes + stride) % PERIOD
        drawn = blend.owner(slots + first) + slots * owners
        counts = np.bincount(drawn.ravel(), minlength=_TRIED_SLOTS * owners).reshape(_TRIED_SLOTS, owners)
        unfair = float(((counts - expected) ** 2).sum())
        if unfair < least:
            best, least = first, unfair
    return best
