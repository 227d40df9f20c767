"""Processes that die, hang and fail over items, and what is left when they do."""

import multiprocessing
import time
from pathlib import Path

import pytest
from unit.shards.deadly_work import DeadlyJob, die_before_any_item, do_deadly

from mmfuse.errors import DataError
from mmfuse.shards.hostile_pool import run_jobs

pytestmark = pytest.mark.usefixtures("decoders_imported")


def run(jobs: list[DeadlyJob], *, num_workers: int = 2, item_seconds: float = 30.0):
    return list(run_jobs(jobs, do_deadly, num_workers=num_workers, item_seconds=item_seconds))


def test_results_come_in_the_order_of_the_jobs_whoever_is_faster(tmp_path: Path) -> None:
    jobs = [DeadlyJob(f"job{i}-", ("well",) * 3, tmp_path, delay=0.3 * (i % 3 == 0)) for i in range(12)]
    outcomes = run(jobs, num_workers=3)
    assert [outcome.job for outcome in outcomes] == jobs
    assert [outcome.result for outcome in outcomes] == [[f"job{i}-{item}" for item in range(3)] for i in range(12)]


def test_items_that_kill_their_process_are_named_and_all_others_are_done(tmp_path: Path) -> None:
    jobs = [
        DeadlyJob("a", ("well", "segfault", "well", "killed", "killed"), tmp_path),
        DeadlyJob("b", ("well", "well"), tmp_path),
        DeadlyJob("c", ("segfault",), tmp_path),
    ]
    a, b, c = run(jobs)
    assert (a.result, b.result, c.result) == (["a0", "a2"], ["b0", "b1"], [])
    assert [(lost.item, lost.kind) for lost in (*a.lost, *b.lost, *c.lost)] == [
        (1, "crashed"),
        (3, "crashed"),
        (4, "crashed"),
        (0, "crashed"),
    ]
    assert "SIGSEGV" in a.lost[0].message and "memory runs out" in a.lost[1].message


def test_a_process_that_was_killed_once_costs_no_item(tmp_path: Path) -> None:
    (outcome,) = run([DeadlyJob("a", ("well", "killed_once", "well"), tmp_path)])
    assert (outcome.result, outcome.lost) == (["a0", "a1", "a2"], ())


def test_an_item_that_never_ends_is_given_up(tmp_path: Path) -> None:
    start = time.monotonic()
    first, second = run([DeadlyJob("a", ("well", "hang", "well"), tmp_path), DeadlyJob("b", ("well",), tmp_path)],
                        item_seconds=0.6)  # fmt: skip
    assert (first.result, second.result) == (["a0", "a2"], ["b0"])
    assert [(lost.item, lost.kind) for lost in first.lost] == [(1, "too_slow")]
    assert time.monotonic() - start < 30


def test_a_mistake_of_ours_stops_with_its_traceback_and_leaves_no_process(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        run([DeadlyJob("a", ("well", "raise"), tmp_path), DeadlyJob("b", ("hang",), tmp_path)])
    assert not multiprocessing.active_children()


def test_processes_that_die_before_any_item_are_an_error_and_no_endless_loop() -> None:
    with pytest.raises(DataError, match="die before they read any: SIGKILL"):
        list(run_jobs(["x"], die_before_any_item, num_workers=1, item_seconds=1.0))


def test_stopping_early_leaves_no_process(tmp_path: Path) -> None:
    outcomes = run_jobs(
        (DeadlyJob(f"{i}-", ("well",), tmp_path) for i in range(10**9)), do_deadly, num_workers=2, item_seconds=5.0
    )
    assert next(outcomes).result == ["0-0"]
    assert multiprocessing.active_children()
    outcomes.close()
    assert not multiprocessing.active_children()
