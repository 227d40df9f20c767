"""Weights: the table of turns, and lanes that go through it."""

import numpy as np
import pytest

from mmfuse.data.blend import PERIOD, Blend, Schedule, check_weights
from mmfuse.errors import ConfigError


def make_blend(weights) -> Blend:
    return Blend(weights)


def test_every_period_holds_each_source_by_its_weight_to_one_sample() -> None:
    draw = np.random.default_rng(0)
    for _ in range(50):
        weights = draw.random(draw.integers(1, 9)) + 0.01
        blend = make_blend(weights)
        assert blend.counts.sum() == PERIOD
        assert (np.abs(blend.counts - weights / weights.sum() * PERIOD) < 1).all()
        start = int(draw.integers(10 * PERIOD))
        owners = blend.owner(np.arange(start, start + PERIOD))
        assert (np.bincount(owners, minlength=len(weights)) == blend.counts).all()


def test_counts_never_go_back_and_equal_the_turns_over_200_random_blends() -> None:
    draw = np.random.default_rng(1)
    for _ in range(200):
        weights = draw.exponential(size=draw.integers(2, 9)) + 0.001
        blend = make_blend(weights)
        start = int(draw.integers(PERIOD - 50, 3 * PERIOD))  # many stretches cross the end of a period
        slots = np.array([start, *np.sort(start + draw.integers(0, 300, size=20))])
        counts = blend.drawn(slots)
        assert (np.diff(counts, axis=0) >= 0).all()
        turns = np.bincount(blend.owner(np.arange(slots[0], slots[-1])), minlength=len(weights))
        assert (counts[-1] - counts[0] == turns).all()
        assert not blend.drawn(np.array([0])).any()


def test_the_turn_of_a_draw_is_where_it_is_drawn() -> None:
    blend = make_blend([5, 1, 2])
    owners = blend.owner(np.arange(2 * PERIOD))
    for owner in range(3):
        turns = np.flatnonzero(owners == owner)
        for draw in (0, 1, 7, len(turns) // 2, len(turns) - 1):
            assert blend.turn_of(draw, owner) == turns[draw]


def test_turns_are_spread_evenly() -> None:
    blend = make_blend([3, 1])
    slots = np.arange(0, 2 * PERIOD, 97)
    drawn = blend.drawn(slots)
    assert np.abs(drawn - slots[:, None] * np.array([0.75, 0.25])).max() <= 1


@pytest.mark.parametrize("changes", [(), (17,), (17, 18, 70_000)])
def test_every_draw_of_a_lane_comes_once_and_in_order_whatever_the_weights_were(changes: tuple[int, ...]) -> None:
    draw = np.random.default_rng(len(changes))
    blends = [(start, make_blend(draw.random(3) + 0.05)) for start in (0, *changes)]
    schedule = Schedule(blends, lanes=4)
    slots = np.concatenate([np.arange(200), np.arange(69_900, 70_100)])
    for lane in range(4):
        owner, number = schedule.at(np.full_like(slots, lane), slots)
        assert all(schedule.slot_of(lane, int(o), int(n)) == s for o, n, s in zip(owner, number, slots, strict=True))
        for o in range(3):
            mine = number[(owner == o) & (slots < 200)]
            assert mine.tolist() == list(range(len(mine)))
            assert schedule.drawn(200)[lane, o] == len(mine)


def test_a_weight_too_small_to_ever_be_drawn_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"weights of source 1 \(1e-06\) are below 1/65536 of their sum"):
        check_weights([1, 1e-6], names=["source 0", "source 1"])
    check_weights([1, 1e-4], names=["source 0", "source 1"])
    assert Blend([1, 1e-9]).counts.tolist() == [PERIOD - 1, 1]


@pytest.mark.parametrize("weights", [(1, 1), (1, 3), (5, 2, 1), (1, 100), (8, 4, 2, 1)])
@pytest.mark.parametrize("lanes", [8, 64])
def test_lanes_are_not_in_step_with_each_other(weights: tuple[int, ...], lanes: int) -> None:
    schedule = Schedule([(0, make_blend(weights))], lanes=lanes)
    for slot in range(0, 3000, 7):
        owner, _ = schedule.at(np.arange(lanes), np.full(lanes, slot))
        fair = np.array(weights) * lanes / sum(weights)
        assert np.abs(np.bincount(owner, minlength=len(weights)) - fair).max() <= 1 + lanes / 16
