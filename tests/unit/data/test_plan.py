"""The plan: every sample once an epoch, whatever the world; no state; refusals and identity."""

import json
import tracemalloc
from collections import Counter
from itertools import pairwise, takewhile
from typing import Any

import numpy as np
import pytest

from mmfuse.data.blend import WeightSegment
from mmfuse.data.loader import training_requests
from mmfuse.data.plan import DataPlan, PlannedSource
from mmfuse.errors import ConfigError

SHARDS = {
    "tiny": [3],
    "one sample": [1],
    "odd": [7, 1, 12, 5, 30],
    "windows": [int(n) for n in np.random.default_rng(0).integers(1, 40, 61)],
}


def make_plan(*shards: list[int], weights: tuple[float, ...] = (), **changes: Any) -> DataPlan:
    sources = [
        PlannedSource(f"source {i}", np.array(counts), (weights or [sum(s) for s in shards])[i], f"hash {i}")
        for i, counts in enumerate(shards)
    ]
    return DataPlan(sources, **{"seed": 5, "global_batch": 24, "window_shards": 3} | changes)


def rows_of(plan: DataPlan, start: int, stop: int) -> np.ndarray:
    positions, steps = np.arange(plan.global_batch), np.arange(start, stop)
    return plan.locate(np.repeat(steps, len(positions)), np.tile(positions, len(steps)))


@pytest.mark.parametrize("lanes", [1, 8, 24])
@pytest.mark.parametrize("counts", SHARDS.values(), ids=SHARDS)
def test_every_sample_is_dealt_exactly_once_an_epoch(counts: list[int], lanes: int) -> None:
    plan, total, epochs = make_plan(counts, lanes=lanes), sum(counts), 3
    steps = -(-epochs * total // plan.global_batch)
    dealt = rows_of(plan, 0, steps)
    for epoch in range(epochs):
        assert sorted(dealt[dealt[:, 2] == epoch, 1]) == list(range(total))
    assert sorted(dealt[:, 2]) == sorted(i // total for i in range(len(dealt)))  # no epoch begins before it is its turn


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (5.0, 0.2, 2.0)])
def test_weighted_sources_of_different_sizes_each_deal_every_sample_once_an_epoch(weights) -> None:
    plan = make_plan([2], [40, 25, 9], SHARDS["windows"], weights=weights)
    dealt = rows_of(plan, 0, 400)
    for source, planned in enumerate(plan.sources):
        total = int(planned.counts.sum())
        times = Counter(map(tuple, dealt[dealt[:, 0] == source, 1:].tolist()))
        assert set(times.values()) == {1}, "a sample came twice in one epoch"
        # Lanes draw at slightly different paces, so only epochs well before the last are over on all of them.
        last = max(epoch for _, epoch in times)
        for epoch in range(last - plan.lanes // total - 1):
            assert all((index, epoch) in times for index in range(total))
        share = sum(times.values()) / len(dealt)
        assert abs(share - weights[source] / sum(weights)) < 0.01


@pytest.mark.parametrize("accumulation", [1, 3])
def test_global_batches_do_not_know_the_world_size(accumulation: int) -> None:
    def global_batches(world_size: int) -> list[list[list[int]]]:
        plan = make_plan([40, 25, 9], SHARDS["windows"])  # of its own: no help from another rank's cache
        ranks = [
            list(training_requests(plan, start=0, stop=40, rank=r, world_size=world_size, accumulation=accumulation))
            for r in range(world_size)
        ]
        assert {len(requests) for requests in ranks} == {40 * accumulation}
        assert {request.global_rows for requests in ranks for request in requests} == {24 // accumulation}
        return [np.concatenate([request.refs for request in parts]).tolist() for parts in zip(*ranks, strict=True)]

    alone = global_batches(1)
    assert all(len(batch) == 24 // accumulation for batch in alone)
    for world_size in (2, 3, 4, 7):
        assert global_batches(world_size) == alone


def test_accumulation_cuts_the_same_global_batch_into_parts() -> None:
    def refs(accumulation: int) -> np.ndarray:
        requests = training_requests(
            make_plan([50, 30]), start=2, stop=9, rank=0, world_size=1, accumulation=accumulation
        )
        return np.concatenate([request.refs for request in requests])

    assert (refs(1) == refs(4)).all()


def test_jumping_to_a_step_gives_what_walking_to_it_gives() -> None:
    walked = make_plan([40, 25, 9], SHARDS["windows"], weights=(1.0, 3.0))
    rows = rows_of(walked, 0, 300)
    for step in (299, 0, 120, 121, 77):
        jumped = make_plan([40, 25, 9], SHARDS["windows"], weights=(1.0, 3.0))
        assert (jumped.rows(step, 0, 24) == rows[step * 24 : (step + 1) * 24]).all()
        assert (jumped.rows(step, 5, 17) == rows[step * 24 + 5 : step * 24 + 17]).all()


def test_a_far_step_is_planned_without_walking_to_it() -> None:
    order = make_plan([100] * 50).rows(10**9, 0, 24)
    assert (order[:, 2] == 10**9 * 24 // 5000).all()


def test_the_order_changes_with_seed_and_epoch() -> None:
    assert rows_of(make_plan([40]), 0, 5).tolist() != rows_of(make_plan([40], seed=6), 0, 5).tolist()
    epochs = rows_of(make_plan([48]), 0, 4)[:, 1].reshape(2, 48)
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0].tolist() != epochs[1].tolist()


def test_a_lane_begins_every_epoch_in_other_shards() -> None:
    plan = make_plan([30] * 64, global_batch=8, lanes=8, window_shards=1)
    starts = [frozenset(plan.rows(epoch * 64 * 30 // 8, 0, 8)[:, 1] // 30) for epoch in range(4)]
    assert len(set(starts)) == 4


def test_a_lane_reads_few_shards_at_a_time_where_there_are_many() -> None:
    plan = make_plan([30] * 64, global_batch=8, lanes=8, window_shards=2)
    shards = rows_of(plan, 0, 40)[:, 1].reshape(40, 8) // 30
    for lane in range(8):  # 40 draws of a lane, out of windows of 60 samples
        assert len(set(shards[:, lane])) <= 4
    changes = np.mean([a != b for lane in shards.T for a, b in pairwise(lane)])
    assert changes > 0.3, "a window is not shuffled"


@pytest.mark.parametrize(
    ("global_batch", "lanes"), [(64, 64), (256, 64), (24, 24), (96, 48), (67, 1), (130, 26), (1, 1)]
)
def test_default_lanes_are_the_largest_divisor_up_to_64(global_batch: int, lanes: int) -> None:
    assert make_plan([9], global_batch=global_batch).lanes == lanes


def test_lanes_that_do_not_divide_the_global_batch_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data.lanes = 7 does not divide the global batch of 24"):
        make_plan([9], lanes=7)


def test_two_sources_of_one_name_are_refused() -> None:
    source = PlannedSource("same", np.array([3]), 1.0, "hash")
    with pytest.raises(ConfigError, match="one name in same, same"):
        DataPlan([source, source._replace(index_hash="other")], seed=0, global_batch=4)


def test_the_identity_changes_with_all_that_the_order_depends_on() -> None:
    a, b = PlannedSource("a", np.array([3]), 1.0, "hash a"), PlannedSource("b", np.array([4]), 2.0, "hash b")

    def identity(*sources: PlannedSource, **changes: Any) -> dict[str, Any]:
        return DataPlan(sources or (a, b), **{"seed": 0, "global_batch": 8} | changes).identity()

    same = identity()
    assert identity(lanes=8) == same
    others = [
        identity(seed=1),
        identity(global_batch=16),
        identity(lanes=4),
        identity(window_shards=3),
        identity(a),
        identity(b, a),
        identity(a, b._replace(index_hash="other")),
        identity(a, b._replace(name="c")),
        identity(a, b._replace(reading_hash="other")),
    ]
    assert all(other != same for other in others)


def test_the_state_of_twenty_sources_is_a_few_kilobytes() -> None:
    sources = [
        PlannedSource(f"a_long_name_of_a_data_set_{i}/train", np.array([9]), 0.1 + i, "f" * 16, "f" * 16)
        for i in range(20)
    ]
    plan = DataPlan(sources, seed=2**63, global_batch=32_768)
    assert len(json.dumps({"step": 10**9, **plan.identity(), "weights": plan.segments})) <= 4096


def test_epochs_count_what_was_dealt() -> None:
    plan = make_plan([40, 8], [13], weights=(3.0, 1.0))
    dealt = rows_of(plan, 0, 50)
    expected = [np.sum(dealt[:, 0] == source) / total for source, total in enumerate((48, 13))]
    assert plan.epochs(50).tolist() == pytest.approx(expected)


def test_weights_that_change_in_mid_run_leave_what_was_dealt_and_deal_the_rest_once() -> None:
    shards = ([40, 25, 9], SHARDS["windows"])
    before = make_plan(*shards, weights=(1.0, 3.0))
    after = make_plan(*shards, segments=[WeightSegment(0, (1.0, 3.0)), WeightSegment(50, (4.0, 1.0))])
    assert (rows_of(after, 0, 50) == rows_of(before, 0, 50)).all()
    dealt = rows_of(after, 0, 200)
    assert set(Counter(map(tuple, dealt.tolist())).values()) == {1}
    later = dealt[50 * 24 :, 0]
    assert np.mean(later == 0) == pytest.approx(0.8, abs=0.01)
    expected = [np.sum(dealt[:, 0] == source) / sum(counts) for source, counts in enumerate(shards)]
    assert after.epochs(200).tolist() == pytest.approx(expected)
    assert (make_plan(*shards, segments=after.segments).rows(133, 3, 9) == after.rows(133, 3, 9)).all()


@pytest.mark.parametrize("rows", [[range(24)], [range(5, 11)], [range(2), range(12, 14)]], ids=["all", "few", "parts"])
@pytest.mark.parametrize("start", [0, 7, 90])
def test_shard_uses_cover_what_is_read_and_little_else(rows: list[range], start: int) -> None:
    segments = [WeightSegment(0, (1.0, 3.0, 1.0)), WeightSegment(60, (2.0, 1.0, 1.0))]
    bucketed = np.stack([np.array(SHARDS["windows"]), np.array(SHARDS["windows"])[::-1]])
    sources = [
        PlannedSource("few", np.array([[4, 2], [3, 5]]), 1.0, ""),
        PlannedSource("many", bucketed, 1.0, ""),
        PlannedSource("holes", np.array([[9, 0, 7, 0, 12, 8] * 5] * 2), 1.0, ""),
    ]
    plan = DataPlan(sources, seed=5, global_batch=24, lanes=12, window_shards=2, segments=segments)
    stop, read = start + 150, set()
    for step in range(start, stop):
        for source, number, _ in np.concatenate([plan.rows(step, part.start, part.stop) for part in rows]).tolist():
            bucket, source = divmod(source, 3)
            shard = int(np.searchsorted(np.cumsum(sources[source].counts[bucket]), number, side="right"))
            read.add((step, source, shard))
    uses = list(takewhile(lambda use: use.first_step < stop, plan.shard_uses(start, rows=rows)))
    assert [use.first_step for use in uses] == sorted(use.first_step for use in uses)
    used = {(s, use.source, use.shard) for use in uses for s in range(use.first_step, min(use.last_step + 1, stop))}
    assert read <= used
    over = [use for use in uses if use.last_step < stop]
    unread = [u for u in over if not any((s, u.source, u.shard) in read for s in range(u.first_step, u.last_step + 1))]
    # The other rows of a lane may read what these do not; with all rows, nothing is copied in vain.
    assert len(unread) <= (0 if rows == [range(24)] else 0.2) * len(over)


def test_lanes_and_seed_and_buckets_are_in_the_identity() -> None:
    counts = np.array([[4, 2], [3, 5]])
    bucketed = DataPlan([PlannedSource("a", counts, 1.0, "")], seed=0, global_batch=4).identity()
    plain = DataPlan([PlannedSource("a", counts.sum(0), 1.0, "")], seed=0, global_batch=4).identity()
    assert bucketed != plain


def test_a_plan_of_a_billion_samples_holds_no_number_for_each() -> None:
    plan = make_plan([100_000] * 10_000, global_batch=4096, window_shards=8)
    tracemalloc.start()
    for step in (0, 10**6, 10**6 + 1):
        plan.rows(step, 0, 4096)
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()
