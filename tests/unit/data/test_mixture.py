"""Weights: the table of turns, and what a mixture refuses."""

import numpy as np
import pytest

from mmfuse.config import validate
from mmfuse.data.mixture import PERIOD, Blend, DataConfig
from mmfuse.errors import ConfigError


def test_every_period_holds_each_source_by_its_weight_to_one_sample() -> None:
    draw = np.random.default_rng(0)
    for _ in range(50):
        weights = draw.random(draw.integers(1, 9)) + 0.01
        blend = Blend(weights)
        shares = weights / weights.sum()
        assert blend.counts.sum() == PERIOD
        assert (np.abs(blend.counts - shares * PERIOD) < 1).all()
        start = int(draw.integers(10 * PERIOD))
        drawn = np.bincount(blend.sources(start, start + PERIOD), minlength=len(weights))
        assert (drawn == blend.counts).all()


def test_counts_never_go_back_and_equal_the_turns_over_200_random_blends() -> None:
    draw = np.random.default_rng(1)
    for _ in range(200):
        weights = draw.exponential(size=draw.integers(2, 9)) + 0.001
        blend = Blend(weights)
        start = int(draw.integers(PERIOD - 50, 3 * PERIOD))  # many stretches cross the end of a period
        slots = [start, *np.sort(start + draw.integers(0, 300, size=20))]
        counts = np.array([blend.drawn(int(slot)) for slot in slots])
        assert (np.diff(counts, axis=0) >= 0).all()
        turns = np.bincount(blend.sources(slots[0], slots[-1]), minlength=len(weights))
        assert (counts[-1] - counts[0] == turns).all()
        assert (blend.drawn(0) == 0).all()


def test_turns_are_spread_evenly() -> None:
    blend = Blend([3, 1])
    slots = np.arange(0, 2 * PERIOD, 97)
    drawn = np.array([blend.drawn(int(slot)) for slot in slots])
    assert np.abs(drawn - slots[:, None] * np.array([0.75, 0.25])).max() <= 1


def test_a_weight_too_small_to_ever_be_drawn_is_refused() -> None:
    with pytest.raises(ConfigError, match="would never be drawn"):
        Blend([1, 1e-6])


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ([{"recipe": "a", "weight": 1}, {"recipe": "b"}], "every source of data.train a weight, or none"),
        ([{"recipe": "a"}, {"recipe": "a", "split": "train"}], "names one source twice"),
        ([{"recipe": "a", "weight": 0}], r"train.0.weight = 0: Input should be greater than 0"),
        ([], r"train = \[\]"),
    ],
)
def test_a_mixture_that_is_not_one_is_refused(train, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(DataConfig, {"train": train}, source="test")
