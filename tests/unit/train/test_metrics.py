"""Numbers over time: a step that was skipped is counted, and what it lost is in no mean."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from batches import make_batch, tiny_task
from unit.train.tiny_runs import read_lines

from mmfuse.data.decode import SOURCE_BITS
from mmfuse.data.quarantine import SourceCounts
from mmfuse.train.encoder_clock import EncoderClock
from mmfuse.train.metrics import MetricsWriter, SkippedSteps, describe_straggler
from mmfuse.train.speed import Speed
from mmfuse.types import StepOutput

CPU = torch.device("cpu")
TERM = "contrastive/text-image"
BATCH = replace(make_batch("ti ti ti"), sample_id=torch.tensor([0, 1 << SOURCE_BITS, 1 | 1 << SOURCE_BITS]))
"""One row of the first source and two of the second."""


@pytest.fixture
def metrics(tmp_path: Path) -> Iterator[MetricsWriter]:
    speed = Speed(tiny_task(("contrastive",)), CPU)
    writer = MetricsWriter(tmp_path, start=0, stop=9, speed=speed, sources=["a", "b"])
    yield writer
    writer.close()


def take_step(metrics: MetricsWriter, *losses: float, norm: float = 1.0) -> None:
    """Of a micro-step for each loss; that of the first source's row is 10 more than the others'."""
    for loss in losses:
        rows = torch.arange(3), torch.tensor([loss + 10, loss, loss])
        output = StepOutput(torch.tensor(loss), {TERM: torch.tensor(loss)}, {TERM: rows}, tokens={})
        metrics.add(output, BATCH, share=1 / len(losses))
    metrics.end_step(torch.tensor(norm))


def write(metrics: MetricsWriter, step: int) -> dict[str, float]:
    return metrics.write(step, rows=3, facts={"grad_norm": 1.0})


def test_what_a_skipped_step_lost_is_in_no_mean(metrics: MetricsWriter) -> None:
    take_step(metrics, 1.0, 3.0)
    take_step(metrics, 7.0, math.nan, norm=math.nan)
    take_step(metrics, 900.0, norm=math.inf)  # the loss is a number, and its gradient is none
    take_step(metrics, 5.0)
    numbers = write(metrics, 4)
    assert numbers["loss"] == numbers[TERM] == (2 + 5) / 2
    assert (numbers[f"sources/a/{TERM}"], numbers[f"sources/b/{TERM}"]) == (3 + 10, 3)  # of 3 micro-steps
    assert (numbers["skipped_steps"], numbers["skipped_in_a_row"]) == (2, 2)
    take_step(metrics, 4.0)
    numbers = write(metrics, 5)
    assert (numbers["loss"], numbers["skipped_steps"], numbers["skipped_in_a_row"]) == (4, 2, 0)


def test_a_run_that_goes_on_counts_on(metrics: MetricsWriter, tmp_path: Path) -> None:
    take_step(metrics, 4.0, norm=math.nan)
    metrics.count_sources([SourceCounts(1, 0, 0), SourceCounts(2, 1, 0)])
    write(metrics, 1)
    take_step(metrics, 4.0, norm=math.nan)
    write(metrics, 2)
    speed = Speed(tiny_task(("contrastive",)), CPU)
    resumed = MetricsWriter(tmp_path, start=1, stop=9, speed=speed, sources=["a", "b"])
    take_step(resumed, 4.0)
    resumed.count_sources([SourceCounts(1, 0, 0), SourceCounts(2, 0, 0)])
    numbers = write(resumed, 2)
    resumed.close()
    assert (numbers["skipped_steps"], numbers["sources/b/samples"], numbers["sources/b/masked"]) == (1, 4, 1)


def test_where_every_step_was_skipped_there_is_no_mean(metrics: MetricsWriter) -> None:
    take_step(metrics, 4.0, norm=math.nan)
    numbers = write(metrics, 1)
    assert math.isnan(numbers["loss"]) and f"sources/a/{TERM}" not in numbers
    (line,) = read_lines(metrics.path)
    assert line["loss"] is None and "NaN" not in metrics.path.read_text()


@pytest.mark.parametrize(
    ("by_rank", "found"),
    [
        ([0.1, 0.5], "rank 1 waits 0.50 s of a step for its data, the mean of the others 0.10 s"),
        ([0.1, 0.1, 0.4, 0.1], "rank 2 waits 0.40 s of a step for its data, the mean of the others 0.10 s"),
        ([0.5, 0.6], ""),
        ([0.0, 0.05], ""),  # of a step of a second
        ([0.9], ""),
    ],
)
def test_a_rank_that_all_others_wait_for_is_named(by_rank: list[float], found: str) -> None:
    assert describe_straggler("waits %s for its data", by_rank, 1.0) == found


def test_time_of_encoders_counts_in_training_alone() -> None:
    task = tiny_task(("contrastive",)).train()
    clock = EncoderClock(task, CPU)
    task(BATCH)
    assert clock.read() > 0
    assert clock.read() == 0
    task.eval()(BATCH)
    assert clock.read() == 0


def test_the_longest_row_of_skipped_steps_counts_across_lines() -> None:
    skips = SkippedSteps(CPU)

    def take(*norms: float) -> tuple[int, int, int]:
        for norm in norms:
            kept = skips.add(torch.tensor(norm))
            assert bool(kept) == math.isfinite(norm)
        return skips.read()

    nan, inf = math.nan, math.inf
    assert take(1, nan, -inf, 1, nan) == (3, 3, 2)
    assert take(inf, nan, 1, nan) == (3, 6, 3)  # one of them before the line
    assert take(1) == (0, 6, 0)
