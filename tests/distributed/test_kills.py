"""SIGKILLs at random moments, of one rank or of all, with automatic restart."""

from pathlib import Path

import pytest
from distributed.kills import measure
from distributed.launches import ZERO2, ZERO3, write_run, write_sparse_shards

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kills")
    return write_run(folder / "run.yaml", write_sparse_shards(folder / "shards"), steps=10)


@pytest.mark.parametrize("strategy", ["ddp", ZERO2, ZERO3])
def test_a_run_killed_twice_has_the_history_of_one_that_nobody_disturbed(run: Path, strategy: str) -> None:
    outcome = measure(strategy, run, run.parent, kills=2, seed=1)
    assert outcome.kills == {"all": 1, "one rank": 1}
    assert outcome.resumes + 1 >= outcome.kills.total()
    assert outcome.not_used == 0
