"""Batches that are left out: all others come in the same order, whatever asks the plan."""

import numpy as np
from unit.data.test_plan import make_plan, rows_of

from mmfuse.data.left_out import LeftOut, PlannedSteps

WINDOWS = (LeftOut(5, 3), LeftOut(9, 1))


def test_other_batches_come_in_the_order_of_the_plan() -> None:
    counts = [7, 1, 12, 5, 30, 19]
    plan, whole = make_plan(counts, left_out=WINDOWS), rows_of(make_plan(counts), 0, 24)
    kept = [*range(5), *range(8, 12), *range(13, 24)]
    expected = whole.reshape(24, plan.global_batch, 3)[kept]
    assert np.array_equal(rows_of(plan, 0, len(kept)).reshape(expected.shape), expected)


def test_a_left_out_batch_belongs_to_the_step_that_comes_in_its_place() -> None:
    steps = PlannedSteps(WINDOWS)
    assert [steps.step_of(planned) for planned in range(15)] == [0, 1, 2, 3, 4, 5, 5, 5, 5, 6, 7, 8, 9, 9, 10]
    assert [steps.step_of(int(steps.of(step))) for step in range(20)] == list(range(20))


def test_every_shard_that_a_step_reads_is_foretold_for_this_step() -> None:
    plan, rows = make_plan([7, 1, 12, 5, 30, 19], left_out=WINDOWS), range(24)
    start, stop = 5, 20
    uses = []
    for use in plan.shard_uses(start, rows=[rows]):
        if use.first_step >= stop:
            break
        uses.append(use)
    ends = np.cumsum([7, 1, 12, 5, 30, 19])
    refs = rows_of(plan, start, stop).reshape(stop - start, 24, 3)
    for step, batch in enumerate(refs, start=start):
        for shard in np.unique(np.searchsorted(ends, batch[:, 1], side="right")):
            assert any(use.shard == shard and use.first_step <= step <= use.last_step for use in uses), (step, shard)
