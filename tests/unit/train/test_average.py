"""The moving average of the weights: what it is, that training does not feel it, and who takes it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from unit.train.tiny_runs import assert_same_state, killed_after_step_2, stored_state, train_tiny

import mmfuse
from mmfuse.errors import CheckpointError
from mmfuse.train.state_files import StoredState

DECAY = 0.3
EVERY_STEP = ("train.checkpoint_every=1", "train.keep_checkpoints=9", "train.evaluate_every=1")
AVERAGED = (*EVERY_STEP, f"train.ema_decay={DECAY}")


def weights_of(folder: Path, kind: str) -> Iterator[dict[str, Tensor]]:
    """After each step that stored this kind."""
    for state in map(StoredState, sorted(folder.glob("checkpoints/step_*"))):
        if kind in state.kinds:
            yield state.whole(kind)


def test_the_average_follows_the_weights_and_forgets_the_random_start_first(tiny_run: Path, tmp_path: Path) -> None:
    folder = train_tiny(tiny_run, tmp_path / "out", *AVERAGED)
    expected = None
    for step, (weights, average) in enumerate(zip(weights_of(folder, "model"), weights_of(folder, "ema"), strict=True)):
        decay = min(DECAY, (1 + step) / (10 + step))
        if expected is not None:
            expected = {name: decay * expected[name] + (1 - decay) * weight for name, weight in weights.items()}
            for name, tensor in average.items():
                torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-8)
            assert any(not torch.equal(average[name], weight) for name, weight in weights.items())
        expected = average
    assert step == 3


def test_training_does_not_feel_it(tiny_run: Path, tmp_path: Path) -> None:
    averaged = train_tiny(tiny_run, tmp_path / "averaged", *AVERAGED)
    plain = train_tiny(tiny_run, tmp_path / "plain", *EVERY_STEP)
    for part in (averaged / "checkpoints").glob("*/ema-*"):  # all that may differ
        part.unlink()
    assert_same_state(stored_state(averaged), stored_state(plain))


def test_a_resumed_run_has_the_average_of_the_uninterrupted_one(tiny_run: Path, tmp_path: Path) -> None:
    whole = train_tiny(tiny_run, tmp_path / "whole", f"train.ema_decay={DECAY}")
    killed = train_tiny(tiny_run, killed_after_step_2(whole, tmp_path / "killed"), f"train.ema_decay={DECAY}")
    assert "ema" in stored_state(whole).kinds
    assert_same_state(stored_state(killed), stored_state(whole))


def test_a_run_that_asks_for_it_later_begins_with_the_weights_of_then(tiny_run: Path, tmp_path: Path) -> None:
    killed = killed_after_step_2(train_tiny(tiny_run, tmp_path / "whole"), tmp_path / "killed")
    (before,) = weights_of(killed, "model")
    train_tiny(tiny_run, killed, *AVERAGED)
    averages, weights = list(weights_of(killed, "ema")), list(weights_of(killed, "model"))
    decay = min(DECAY, 3 / 12)
    for name, tensor in averages[0].items():
        torch.testing.assert_close(tensor, decay * before[name] + (1 - decay) * weights[1][name], rtol=1e-6, atol=1e-8)


def test_a_resume_that_would_lose_it_is_refused(tiny_run: Path, tmp_path: Path) -> None:
    killed = killed_after_step_2(train_tiny(tiny_run, tmp_path / "whole", *AVERAGED[2:]), tmp_path / "killed")
    with pytest.raises(CheckpointError, match=r"moving average .* would be lost: set train\.ema_decay"):
        train_tiny(tiny_run, killed)


@pytest.mark.parametrize(("averaged", "kind"), [(True, "ema"), (False, "model")])
def test_a_loaded_model_has_it_unless_told_otherwise(tiny_run: Path, tmp_path: Path, averaged: bool, kind: str) -> None:
    folder = train_tiny(tiny_run, tmp_path / "out", f"train.ema_decay={DECAY}")
    stored = list(weights_of(folder, kind))[-1]
    for name, parameter in mmfuse.load(folder, averaged=averaged).model.named_parameters():
        assert torch.equal(parameter, stored[f"model.{name}"]), name
