"""Steps of two micro-steps over two processes: the same numbers as in one."""

from pathlib import Path

import pytest
from distributed.launches import (
    TOLERANCE,
    ZERO2,
    ZERO3,
    finish,
    read_numbers,
    read_samples,
    start,
    write_run,
    write_sparse_shards,
)

pytestmark = pytest.mark.slow
STEPS = 6
TWO_MICRO_STEPS = ("objectives.matching=null", "train.accumulation=2")
NORM_TOLERANCE = 2e-5
"""A norm is not what is minimised: it feels the last bits of the weights at first order."""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in one process; its YAML stands beside it."""
    folder = tmp_path_factory.mktemp("accumulation")
    run = write_run(folder / "run.yaml", write_sparse_shards(folder / "shards"), steps=STEPS)
    finish(start("cpu", run, folder / "alone", settings=TWO_MICRO_STEPS), folder / "alone")
    return folder / "alone"


@pytest.mark.parametrize("strategy", ["ddp", ZERO2, ZERO3])
def test_two_processes_accumulate_what_one_does(alone: Path, strategy: str) -> None:
    together = alone.with_name(strategy)
    finish(start(strategy, alone.with_name("run.yaml"), together, settings=TWO_MICRO_STEPS), together)
    samples = [{step: sorted(keys) for step, keys in read_samples(output).items()} for output in (alone, together)]
    assert samples[0] == samples[1]  # in another order: each rank has its part of both micro-batches
    for name, tolerance in (("loss", TOLERANCE), ("grad_norm", NORM_TOLERANCE)):
        expected = read_numbers(alone, name)
        assert sorted(expected) == list(range(1, STEPS + 1))
        assert read_numbers(together, name) == pytest.approx(expected, rel=tolerance), name
