"""The moving average of the weights: what it is, that training does not feel it, and who takes it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from unit.train.tiny_runs import killed_after_step_2, train_tiny

import mmfuse
from mmfuse.errors import CheckpointError

DECAY = 0.3
EVERY_STEP = ("train.checkpoint_every=1", "train.keep_checkpoints=9", "train.evaluate_every=1")
AVERAGED = (*EVERY_STEP, f"train.ema_decay={DECAY}")


def weights_of(folder: Path, kind: str) -> Iterator[dict[str, Tensor]]:
    """After each step."""
    for path in sorted(folder.glob(f"checkpoints/step_*/{kind}.safetensors")):
        yield load_file(path)


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
    for kind in ("model", "exp_avg", "exp_avg_sq"):
        name = f"checkpoints/step_00000004/{kind}.safetensors"
        assert (averaged / name).read_bytes() == (plain / name).read_bytes(), kind
    assert not (plain / "checkpoints" / "step_00000004" / "ema.safetensors").exists()


def test_a_resumed_run_has_the_average_of_the_uninterrupted_one(tiny_run: Path, tmp_path: Path) -> None:
    whole = train_tiny(tiny_run, tmp_path / "whole", f"train.ema_decay={DECAY}")
    killed = train_tiny(tiny_run, killed_after_step_2(whole, tmp_path / "killed"), f"train.ema_decay={DECAY}")
    name = "checkpoints/step_00000004/ema.safetensors"
    assert (killed / name).read_bytes() == (whole / name).read_bytes()


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
