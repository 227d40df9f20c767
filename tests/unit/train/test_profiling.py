"""A window of steps as a trace, and what of it was communication."""

from pathlib import Path
from typing import Any

import pytest
from unit.train.tiny_runs import train_tiny

from mmfuse.train.profiling import describe_communication, read_trace


def span(name: str, start: int, end: int, *, category: str) -> dict[str, Any]:
    return {"ph": "X", "name": name, "cat": category, "ts": start, "dur": end - start}


def test_the_trace_of_a_window_is_written_also_where_the_run_ends_before(
    tiny_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = train_tiny(tiny_run, tmp_path / "run", "profile.steps=[2,9]")
    names = [event["name"] for event in read_trace(output / "profile" / "rank0.json.gz")]
    assert sum(name.startswith("Optimizer.step") for name in names) == 2
    assert "ranks exchanged data for 0% of" in capfd.readouterr().err


def test_collectives_at_the_same_time_count_once() -> None:
    events = [
        span("aten::mm", 0, 100, category="cpu_op"),
        span("gloo:all_reduce", 10, 30, category="user_annotation"),
        span("gloo:all_gather", 20, 40, category="user_annotation"),
        span("gloo:all_gather", 90, 100, category="user_annotation"),
    ]
    assert describe_communication(events) == "ranks exchanged data for 40% of 0.00 s"


def test_on_a_gpu_it_is_told_how_much_computation_hides() -> None:
    events = [
        span("nccl:all_reduce", 0, 100, category="user_annotation"),  # on the host: waiting for nobody
        span("gemm", 0, 60, category="kernel"),
        span("ncclDevKernel_AllReduce", 50, 80, category="kernel"),
        span("gemm", 90, 100, category="kernel"),
    ]
    expected = "ranks exchanged data for 30% of 0.00 s, for 20% with nothing computed beside"
    assert describe_communication(events) == expected
