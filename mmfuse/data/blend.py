"""Whose turn it is: weighted sources dealt to lanes, with weights that may change in mid-run."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mmfuse.errors import ConfigError

PERIOD = 65_536
"""Slots of the blend table; a weight is met to 1 part in this many."""


def check_weights(weights: Sequence[float], *, names: Sequence[str]) -> None:
    """Refuses sources that the table could not deal by their weights.

    Raises:
        ConfigError: a weight is out of the table's reach; names the source.
    """
    lost = [
        f"{name} ({weight:g})" for name, weight in zip(names, weights, strict=True) if weight * PERIOD < sum(weights)
    ]
    if lost:
        raise ConfigError(
            f"weights of {', '.join(lost)} are below 1/{PERIOD} of their sum {sum(weights):g}, too little to be dealt: "
            "raise them in data.train, or take these sources out"
        )


class Blend:
    """Which owner each turn of an endless sequence belongs to, and how often it had one before: O(1) at any turn.

    The table holds integer counts that add up to PERIOD, each owner's turns evenly spread. (Closed-form rounding of
    cumulative targets looks simpler and gives negative counts in every other blend.)
    """

    def __init__(self, weights: Sequence[float]) -> None:
        """Weights above 0, in any unit; each owner has one turn at least."""
        shares = np.asarray(weights, dtype=np.float64) / sum(weights) * PERIOD
        counts = np.floor(shares).astype(np.int64)
        largest_remainders = np.argsort(counts - shares, kind="stable")
        counts[largest_remainders[: PERIOD - counts.sum()]] += 1
        lacking = counts == 0
        counts[lacking] = 1
        counts[np.argmax(counts)] -= lacking.sum()
        turns = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
        owners = np.repeat(np.arange(len(counts)), counts)
        self.counts = counts
        self._table = owners[np.argsort(turns, kind="stable")]
        self._turns = [np.flatnonzero(self._table == owner) for owner in range(len(counts))]
        self._number = np.empty(PERIOD, np.int64)
        for turns_of_owner in self._turns:
            self._number[turns_of_owner] = np.arange(len(turns_of_owner))

    def owner(self, turn: np.ndarray) -> np.ndarray:
        """Whose turn it is, elementwise."""
        return self._table[turn % PERIOD]

    def number(self, turn: np.ndarray) -> np.ndarray:
        """How many turns the owner of `turn` had before it, elementwise."""
        return turn // PERIOD * self.counts[self.owner(turn)] + self._number[turn % PERIOD]

    def drawn(self, turn: np.ndarray) -> np.ndarray:
        """How many turns each owner had before `turn`: `(n,)` -> int64 `(n, owners)`."""
        rest = [np.searchsorted(turns, turn % PERIOD) for turns in self._turns]
        return turn[:, None] // PERIOD * self.counts + np.stack(rest, axis=1)

    def turn_of(self, draw: int, owner: int) -> int:
        """The turn at which `owner` has its `draw`-th turn, 0-based."""
        periods, rest = divmod(draw, int(self.counts[owner]))
        return periods * PERIOD + int(self._turns[owner][rest])


class WeightSegment(NamedTuple):
    """From which step of the plan on which weights hold, one for each source; a run that never changed them has one."""

    start_step: int
    weights: tuple[float, ...]


class Schedule:
    """Whose turn it is at every slot of every lane, and its number among the owner's draws of that lane.

    Lanes go through one table, each from another place, so that a global batch mixes the owners evenly.
    """

    def __init__(self, blends: Sequence[tuple[int, Blend]], *, lanes: int) -> None:
        """Blends with the slot from which each holds; the first at 0."""
        self._starts = np.array([start for start, _ in blends], dtype=np.int64)
        self._blends = [blend for _, blend in blends]
        self._first_turns = [_spread_lanes(blend, lanes) for blend in self._blends]
        self._skipped = [b.drawn(first) for b, first in zip(self._blends, self._first_turns, strict=True)]
        drawn = np.zeros((lanes, len(self._blends[0].counts)), dtype=np.int64)
        self._drawn_before = [drawn]
        for number, (start, stop) in enumerate(itertools.pairwise(self._starts.tolist())):
            drawn = drawn + self._within(number, slots=stop - start)
            self._drawn_before.append(drawn)

    def at(self, lane: np.ndarray, slot: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Owner and number of its draw, both int64 `(n,)`, for lanes and slots `(n,)`."""
        owner, draw = np.empty_like(slot), np.empty_like(slot)
        segment = np.searchsorted(self._starts, slot, side="right") - 1
        for number in np.unique(segment):
            here = segment == number
            blend, lanes = self._blends[number], lane[here]
            turn = self._first_turns[number][lanes] + slot[here] - self._starts[number]
            owners = owner[here] = blend.owner(turn)
            before = self._drawn_before[number] - self._skipped[number]
            draw[here] = before[lanes, owners] + blend.number(turn)
        return owner, draw

    def drawn(self, slot: int) -> np.ndarray:
        """How often each lane drew from each owner before `slot`: int64 `(lanes, owners)`."""
        number = int(np.searchsorted(self._starts, slot, side="right")) - 1
        return self._drawn_before[number] + self._within(number, slots=slot - int(self._starts[number]))

    def slot_of(self, lane: int, owner: int, draw: int) -> int:
        """The slot of a lane in which an owner's draw comes."""
        drawn = [int(before[lane, owner]) for before in self._drawn_before]
        number = int(np.searchsorted(drawn, draw, side="right")) - 1
        turn = self._blends[number].turn_of(draw - drawn[number] + int(self._skipped[number][lane, owner]), owner)
        return int(self._starts[number]) + turn - int(self._first_turns[number][lane])

    def _within(self, segment: int, *, slots: int) -> np.ndarray:
        """Draws of `slots` slots from the start of a segment: int64 `(lanes, owners)`."""
        return self._blends[segment].drawn(self._first_turns[segment] + slots) - self._skipped[segment]


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
