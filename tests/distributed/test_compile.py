"""Blocks through `torch.compile`: the same curve."""

from pathlib import Path

import pytest
from distributed.launches import TOLERANCE, needs_compiler, read_losses, train_many, write_run, write_sparse_shards

STEPS = 6


@pytest.mark.slow
@needs_compiler
def test_compiled_blocks_learn_the_same_with_activation_checkpointing_too(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run.yaml", write_sparse_shards(tmp_path / "shards"), steps=STEPS)
    compiled = ["train.compile_blocks=true", "train.activation_checkpointing=true"]
    train_many("cpu", run, tmp_path, {"plain": [], "compiled": compiled})
    assert read_losses(tmp_path / "compiled") == pytest.approx(read_losses(tmp_path / "plain"), rel=TOLERANCE)
