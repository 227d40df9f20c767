"""Scores stand for what a run has done: those of steps that it has not done, or not yet again, go."""

import shutil
from pathlib import Path

import pytest
from unit.train.tiny_runs import killed_after_step_2, train_tiny


def evaluated_steps(folder: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("step_")) for path in (folder / "evaluations").iterdir())


@pytest.fixture
def validation(tmp_path: Path) -> str:
    """The setting that evaluates on the training set."""
    return f"data.validation={{seen: {{recipe: {tmp_path / 'set/recipe.yaml'}}}}}"


def test_a_resumed_run_forgets_the_scores_of_steps_after_its_checkpoint(
    tiny_run: Path, tmp_path: Path, validation: str
) -> None:
    whole = train_tiny(tiny_run, tmp_path / "whole", validation, "train.evaluate_every=1")
    assert evaluated_steps(whole) == [0, 1, 2, 3, 4]
    killed = killed_after_step_2(whole, tmp_path / "killed")
    train_tiny(tiny_run, killed, validation)
    assert evaluated_steps(killed) == [0, 1, 2, 4]  # 3 is from before the kill, 4 from this time


def test_a_run_from_the_start_forgets_the_scores_of_a_longer_one_before_it(
    tiny_run: Path, tmp_path: Path, validation: str
) -> None:
    folder = train_tiny(tiny_run, tmp_path / "out", validation, "train.steps=5")
    shutil.rmtree(folder / "checkpoints")
    train_tiny(tiny_run, folder, validation)
    assert evaluated_steps(folder) == [0, 4]
