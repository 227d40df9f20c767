"""Sketches against the numbers that they stand for."""

import pickle
from collections import Counter

import numpy as np
import pytest

from mmfuse.shards.sketch import Common, Distinct, Sketch

VALUES = np.random.default_rng(0).lognormal(6, 2, 100_000)


def sketch_of(*parts: np.ndarray) -> Sketch:
    sketch = Sketch()
    for part in parts:
        sketch.add(part)
    return sketch


def test_quantiles_are_within_one_percent_and_the_rest_is_exact() -> None:
    sketch = sketch_of(VALUES)
    for q in (0.01, 0.25, 0.5, 0.75, 0.99):
        assert sketch.quantile(q) == pytest.approx(np.quantile(VALUES, q), rel=0.0101)
    assert (sketch.count, sketch.smallest, sketch.largest) == (100_000, VALUES.min(), VALUES.max())
    assert sketch.mean == pytest.approx(VALUES.mean(), rel=1e-12)


def test_small_whole_numbers_are_exact() -> None:
    numbers = np.random.default_rng(1).integers(0, 50, 10_000)
    sketch = sketch_of(numbers)
    assert [sketch.quantile(q) for q in (0.0, 0.1, 0.5, 0.9, 1.0)] == [
        float(np.quantile(numbers, q, method="inverted_cdf")) for q in (0.0, 0.1, 0.5, 0.9, 1.0)
    ]


def test_merged_parts_are_the_whole() -> None:
    whole, merged = sketch_of(VALUES), Sketch()
    for part in np.array_split(VALUES, 7)[::-1]:
        merged.merge(sketch_of(part))
    assert (merged.bins == whole.bins).all()
    assert (merged.smallest, merged.largest, merged.whole) == (whole.smallest, whole.largest, False)


@pytest.mark.parametrize(
    "values",
    [VALUES, np.full(500, 128), np.arange(30), np.array([0, 0, 0]), np.array([2.5]), np.arange(100_000)],
)
def test_bars_hold_what_lies_between_their_ends(values: np.ndarray) -> None:
    bars = sketch_of(values).bars()
    assert len(bars.edges) == len(bars.counts) + 1 <= 50 and (np.diff(bars.edges) > 0).all()
    inside = ((values >= bars.edges[0]) & (values <= bars.edges[-1])).sum()
    assert bars.counts.sum() == pytest.approx(inside, rel=0.01) and inside >= 0.98 * len(values)


def test_bars_of_spread_out_values_are_logarithmic() -> None:
    assert sketch_of(VALUES).bars().logarithmic
    assert not sketch_of(np.arange(100)).bars().logarithmic


def test_a_sketch_without_values_is_empty() -> None:
    sketch = sketch_of(np.zeros(0))
    assert (sketch.count, sketch.mean, sketch.quantile(0.5), sketch.to_json()) == (0, 0.0, 0.0, {"count": 0})


def test_different_texts_are_counted_exactly_while_few_and_closely_when_many() -> None:
    few, many, half = Distinct(), Distinct(), Distinct()
    few.add([b"%d" % (n % 60_000) for n in range(130_000)])
    assert few.count == 60_000
    for first in range(0, 300_000, 10_000):
        (many if first % 20_000 else half).add([b"%d" % n for n in range(first, first + 10_000)])
    many.merge(half)
    assert many.count == pytest.approx(300_000, rel=0.02)
    assert len(pickle.dumps(many)) < 1_000_000


def test_common_values_are_found_among_any_number_of_rare_ones() -> None:
    merged = Common()
    for part in range(10):
        common = Common()
        for first in range(0, 20_000, 1000):
            common.add(Counter(f"rare {part} {n}" for n in range(first, first + 1000)))
            common.add(Counter({"often": 100, "twice as often": 200}))
        merged.merge(common)
    (first, count), (second, half) = merged.most_common(2)
    assert (first, second) == ("twice as often", "often")
    assert count <= 40_000 <= count + merged.error and half <= 20_000 <= half + merged.error
    assert merged.error < 300_000 / 4096 and len(merged.counts) <= 8192


def test_few_values_are_counted_exactly_and_ties_have_an_order() -> None:
    common = Common()
    common.add(Counter({"b": 2, "a": 2, "c": 3}))
    assert common.most_common(3) == [("c", 3), ("a", 2), ("b", 2)] and common.error == 0
