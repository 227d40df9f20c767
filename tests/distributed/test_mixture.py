"""Every objective at once for 50 steps over samples with any subset: two processes do what one does.

That ranks hold equal weights is a matter of the product: under DDP no checkpoint is written where they differ.
"""

import pytest
from distributed.launches import (
    TOLERANCE,
    ZERO2,
    ZERO3,
    finish,
    read_losses,
    read_samples,
    start,
    write_run,
    write_sparse_shards,
)

pytestmark = pytest.mark.slow
STEPS = 50
OBJECTIVES = "objectives={feature_prediction: {}, masked_image: {}, masked_audio: {}}"  # and those that the run has


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("mixture")
    run = write_run(folder / "run.yaml", write_sparse_shards(folder / "shards"), steps=STEPS)
    finish(start("cpu", run, folder / "alone", settings=[OBJECTIVES]), folder / "alone")
    return folder / "alone"


@pytest.mark.parametrize("strategy", ["ddp", ZERO2, ZERO3])
def test_two_processes_with_every_objective_do_what_one_does(alone, strategy) -> None:
    together = alone.with_name(strategy)
    finish(start(strategy, alone.with_name("run.yaml"), together, settings=[OBJECTIVES]), together)
    assert read_samples(together) == read_samples(alone)
    expected = read_losses(alone)
    assert sorted(expected) == list(range(1, STEPS + 1))
    assert read_losses(together) == pytest.approx(expected, rel=TOLERANCE)
