"""Distributions of any number of values in fixed memory, merged exactly, and the same whatever the order."""

import math
from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import xxhash

_GROWTH = 1.02
_SMALLEST = 1e-3
_NUM_BINS = 2096
"""Up to 1e15; 16.8 kB."""
_MOST_DIFFERENT = 1 << 16
_MOST_COUNTED = 4096
_MAX_BARS = 48
_LOG_FROM_RATIO = 30
"""Where the middle 98% of the values span more than this, a linear axis would show one bar."""


class Bars(NamedTuple):
    """A histogram to draw."""

    edges: np.ndarray
    """`(bars + 1,)`, ascending."""
    counts: np.ndarray
    """`(bars,)`, not whole where a bin lies under two bars."""
    logarithmic: bool
    """Whether the edges are evenly spread on a logarithmic axis."""


class Sketch:
    """Counts of values >= 0 in bins whose borders grow by 2%, so quantiles are right within 1%.

    Mean, sum, smallest and largest are exact; values under 0.001 are one bin.
    """

    def __init__(self) -> None:
        self.bins = np.zeros(_NUM_BINS, np.int64)
        self.total = 0.0
        self.smallest, self.largest = math.inf, -math.inf
        self.whole = True
        """Whether all values are whole numbers."""

    @property
    def count(self) -> int:
        """How many values."""
        return int(self.bins.sum())

    @property
    def mean(self) -> float:
        """0 where there is no value."""
        return self.total / max(1, self.count)

    def add(self, values: np.ndarray) -> None:
        """Counts finite values >= 0 of any shape."""
        if not values.size:
            return
        values = values.astype(np.float64, copy=False).ravel()
        places = np.ceil(np.log(np.maximum(values, _SMALLEST) / _SMALLEST) / math.log(_GROWTH)).astype(np.int64)
        self.bins += np.bincount(np.clip(places, 0, _NUM_BINS - 1), minlength=_NUM_BINS)
        self.total += float(values.sum())
        self.smallest, self.largest = min(self.smallest, float(values.min())), max(self.largest, float(values.max()))
        self.whole = self.whole and not (values % 1).any()

    def merge(self, other: "Sketch") -> None:
        """Counts what another sketch has counted."""
        self.bins += other.bins
        self.total += other.total
        self.smallest, self.largest = min(self.smallest, other.smallest), max(self.largest, other.largest)
        self.whole = self.whole and other.whole

    def quantile(self, q: float) -> float:
        """The value below which a share `q` lies, within 1%; 0 where there is no value."""
        count = self.count
        if not count:
            return 0.0
        place = int(np.searchsorted(np.cumsum(self.bins), max(1, math.ceil(q * count))))
        return min(max(self._value_of(place), self.smallest), self.largest)

    def _value_of(self, place: int) -> float:
        """The middle of a bin, or the whole number in it."""
        high = _SMALLEST * _GROWTH**place
        middle = high * (1 + 1 / _GROWTH) / 2
        return float(round(middle)) if self.whole else middle

    def bars(self) -> Bars:
        """A histogram of what lies between the 0.5th and the 99.5th percentile: a few far values would flatten it."""
        low, high = self.quantile(0.005), self.quantile(0.995)
        wide = self.quantile(0.99) > _LOG_FROM_RATIO * self.quantile(0.01) and (high > 256 or not self.whole)
        edges = self._edges(low, high, logarithmic=low > 0 and wide)
        counts = np.zeros(len(edges) - 1)
        for place in np.flatnonzero(self.bins).tolist():  # a bin's values are spread evenly over the bars below it
            start, end = self._span(place)
            below = np.clip((edges - start) / (end - start), 0, 1)
            counts += self.bins[place] * np.diff(below)
        return Bars(edges, counts, low > 0 and wide)

    def _span(self, place: int) -> tuple[float, float]:
        """Where the values of a bin lie; whole numbers are as wide as one."""
        high = _SMALLEST * _GROWTH**place
        start, end = high / _GROWTH, high
        if self.whole and end - start < 1:
            start, end = (middle := round((start + end) / 2)) - 0.5, middle + 0.5
        half = 0.5 if self.whole else 1e-9 + 1e-9 * self.largest
        return max(start, self.smallest - half), min(end, self.largest + half)

    def _edges(self, low: float, high: float, *, logarithmic: bool) -> np.ndarray:
        if self.whole and not logarithmic:  # a bar for each number, or for each so many
            step = max(1, math.ceil((high - low + 1) / _MAX_BARS))
            return np.arange(low - 0.5, high + step, step)
        if high <= low:
            return np.array([low * 0.9, low * 1.1]) if low else np.array([0.0, 1.0])
        return np.geomspace(low, high, _MAX_BARS + 1) if logarithmic else np.linspace(low, high, _MAX_BARS + 1)

    def to_json(self) -> dict[str, float]:
        """Count, sum, extremes and quantiles."""
        if not self.count:
            return {"count": 0}
        quantiles = {f"p{round(100 * q)}": self.quantile(q) for q in (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)}
        extremes = {"min": self.smallest, "max": self.largest}
        return {"count": self.count, "sum": self.total, "mean": self.mean, **extremes, **quantiles}


class Distinct:
    """How many different texts: exact up to 65,536, beyond within about 1% (K minimum values, Bar-Yossef 2002)."""

    def __init__(self) -> None:
        self._smallest = np.zeros(0, np.uint64)
        self._added: list[np.ndarray] = []
        """Hashes that wait: to sort for every few would take longer than to read them."""

    def add(self, texts: list[bytes]) -> None:
        """Counts texts."""
        self._keep(np.array([xxhash.xxh3_64_intdigest(text) for text in texts], np.uint64))

    def merge(self, other: "Distinct") -> None:
        """Counts what another has counted."""
        self._keep(other.hashes())

    def _keep(self, hashes: np.ndarray) -> None:
        if len(self._smallest) == _MOST_DIFFERENT:
            hashes = hashes[hashes < self._smallest[-1]]
        self._added.append(hashes)
        if sum(map(len, self._added)) > _MOST_DIFFERENT:
            self.hashes()

    def hashes(self) -> np.ndarray:
        """The smallest hashes, ascending."""
        if self._added:
            self._smallest = np.unique(np.concatenate([self._smallest, *self._added]))[:_MOST_DIFFERENT]
            self._added.clear()
        return self._smallest

    @property
    def count(self) -> int:
        """How many different texts were added."""
        hashes = self.hashes()
        if len(hashes) < _MOST_DIFFERENT:
            return len(hashes)
        return round((_MOST_DIFFERENT - 1) / (float(hashes[-1]) / 2.0**64))


class Common:
    """The most common values: exact up to 4,096 different ones, beyond with counts too low by at most `error`.

    A value that is more than 1/4096 of all is never missed (Misra and Gries 1982; merged as in Agarwal et al. 2012).
    """

    def __init__(self) -> None:
        self.counts: Counter[Any] = Counter()
        self.error = 0

    def add(self, values: Counter[Any]) -> None:
        """Counts values."""
        self.counts.update(values)
        self._shrink()

    def merge(self, other: "Common") -> None:
        """Counts what another has counted."""
        self.error += other.error
        self.add(other.counts)

    def _shrink(self) -> None:
        if len(self.counts) > 2 * _MOST_COUNTED:  # not at every value: this looks at all of them
            excess = sorted(self.counts.values(), reverse=True)[_MOST_COUNTED]
            self.counts = Counter({value: count - excess for value, count in self.counts.items() if count > excess})
            self.error += excess

    def most_common(self, number: int) -> list[tuple[Any, int]]:
        """The most common first; equal ones in the order of their text."""
        return sorted(self.counts.items(), key=lambda item: (-item[1], str(item[0])))[:number]
