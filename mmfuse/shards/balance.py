"""Shards that stand out among the others of their data set."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mmfuse.shards.stats import ShardRow

_FEWEST = 5
"""Of fewer shards none can be said to be unusual."""
_DEVIATIONS = 6
"""In robust standard deviations: 1.4826 x the median distance from the median."""
_SHARE, _RELATIVE = 0.05, 0.1
"""Smallest difference that matters: of a share, and of anything else relative to the median."""


class Outlier(NamedTuple):
    """One way in which a shard differs from most."""

    shard: str
    what: str
    value: str
    typical: str
    """The median over all shards."""


class _Measure(NamedTuple):
    what: str
    values: np.ndarray
    show: Callable[[float], str]
    is_share: bool


def find_outliers(rows: Sequence[ShardRow], *, limit: int = 20) -> list[Outlier]:
    """What stands out, the farthest from the median first."""
    if len(rows) < _FEWEST:
        return []
    found: list[tuple[float, Outlier]] = []
    for measure in _measures(rows):
        known = measure.values[np.isfinite(measure.values)]
        middle = float(np.median(known)) if len(known) else 0.0
        distances = np.abs(measure.values - middle)
        spread = 1.4826 * float(np.nanmedian(distances)) if len(known) else 0.0
        least = max(_SHARE if measure.is_share else _RELATIVE * abs(middle), 1e-12)
        scores = distances / max(spread, least / _DEVIATIONS)
        for place in np.flatnonzero(scores > _DEVIATIONS).tolist():
            value = measure.show(float(measure.values[place]))
            found.append((scores[place], Outlier(rows[place].name, measure.what, value, measure.show(middle))))
    found.sort(key=lambda entry: (-entry[0], entry[1]))
    return [outlier for _, outlier in found[:limit]]


def _measures(rows: Sequence[ShardRow]) -> Iterator[_Measure]:
    samples = np.array([row.samples for row in rows], np.float64)
    some = np.where(samples > 0, samples, np.nan)
    yield _Measure("samples", samples, lambda v: f"{v:,.0f}", False)
    size = np.array([row.bytes for row in rows]) / some
    yield _Measure("kB a sample", size / 1000, lambda v: f"{v:,.1f}", False)
    for modality in dict.fromkeys(name for row in rows for name in row.modalities):
        share = np.array([row.modalities[modality] for row in rows]) / some
        yield _Measure(f"samples with {modality}", share, lambda v: f"{v:.1%}", True)
    probed = np.array([row.probed or np.nan for row in rows])
    unreadable = np.array([row.unreadable for row in rows]) / probed
    yield _Measure("unreadable members a sample", unreadable, lambda v: f"{v:.1%}", True)
    for name in dict.fromkeys(name for row in rows for name in row.means):
        means = np.array([row.means.get(name, np.nan) for row in rows])
        yield _Measure(f"mean {name}", means, lambda v: f"{v:,.3g}", False)
