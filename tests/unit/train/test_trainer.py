"""The loop: a resume repeats the dropout, micro-steps add up to a step, and what is not finite never gets saved."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from unit.train.tiny_runs import FOUR_STEPS, killed_after_step_2, read_metrics, train_tiny

from mmfuse.errors import TrainingError
from mmfuse.task import Task
from mmfuse.train.checkpoint import complete_checkpoints
from mmfuse.train.optim import build_optimizer, learning_rate_factor, set_learning_rate
from mmfuse.train.run import load_run
from mmfuse.types import Batch

DROPOUT = "model.modalities.text.dropout=0.3"
TWO_MICRO_STEPS = (
    "model.fusion={num_layers: 1, num_heads: 2}",
    "objectives={contrastive: null, masked_language: {mask_ratio: 0.5}}",
    "train.accumulation=2",
)


@contextmanager
def before_each_micro_step(action: Callable[[Task, Batch], None]) -> Iterator[None]:
    """Calls `action` with the task that trains and its batch."""

    def hook(module: torch.nn.Module, inputs: tuple[Batch, ...]) -> None:
        if isinstance(module, Task) and module.training:
            action(module, inputs[0])

    handle = register_module_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def test_a_resumed_run_drops_out_what_the_uninterrupted_one_did(tiny_run: Path, tmp_path: Path) -> None:
    whole = train_tiny(tiny_run, tmp_path / "whole", DROPOUT)
    killed = killed_after_step_2(whole, tmp_path / "killed")
    train_tiny(tiny_run, killed, DROPOUT)
    without = train_tiny(tiny_run, tmp_path / "without")
    assert read_metrics(killed, "loss", "grad_norm") == read_metrics(whole, "loss", "grad_norm")
    for kind in ("model", "exp_avg", "exp_avg_sq"):
        name = f"checkpoints/step_00000004/{kind}.safetensors"
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), kind
    assert [loss for _, loss in read_metrics(whole, "loss")] != [loss for _, loss in read_metrics(without, "loss")]


def test_every_step_drops_out_something_else(tiny_run: Path, tmp_path: Path) -> None:
    seeds = []
    with before_each_micro_step(lambda *_: seeds.append(torch.initial_seed())):
        train_tiny(tiny_run, tmp_path / "out", DROPOUT)
    assert len(seeds) == len(set(seeds)) == 4


@pytest.mark.parametrize(("checkpoint_every", "kept"), [(1, [1, 2]), (2, [2])])
def test_a_gradient_that_is_not_a_number_stops_the_run_before_it_is_saved(
    tiny_run: Path, tmp_path: Path, checkpoint_every: int, kept: list[int]
) -> None:
    def spoil(task: Task, batch: Batch) -> None:
        if batch.step == 2:  # the third
            next(task.parameters()).register_hook(lambda gradient: gradient * math.nan)

    settings = (f"train.checkpoint_every={checkpoint_every}", "train.keep_checkpoints=9", "train.log_every=9")
    with before_each_micro_step(spoil), pytest.raises(TrainingError, match=r"is nan at step .*Lower the") as error:
        train_tiny(tiny_run, tmp_path / "out", *settings)
    assert error.value.exit_code == 6
    if checkpoint_every == 1:
        assert "grad_norm is nan at step 3" in str(error.value)  # while the loss of this step is a number
    checkpoints = tmp_path / "out" / "checkpoints"
    assert complete_checkpoints(checkpoints) == [checkpoints / f"step_{step:08d}" for step in kept]
    assert len(list(checkpoints.iterdir())) == len(kept)


def test_a_step_of_two_micro_steps_takes_the_mean_of_their_losses_and_gradients(tiny_run: Path, tmp_path: Path) -> None:
    batches: list[Batch] = []
    with before_each_micro_step(lambda _, batch: batches.append(batch)):
        folder = train_tiny(tiny_run, tmp_path / "out", *TWO_MICRO_STEPS)
    assert [len(batch.present) for batch in batches] == [2] * 8
    run = load_run(str(tiny_run), overrides=[*FOUR_STEPS, *TWO_MICRO_STEPS])
    task = Task(run.model, run.objective_configs, seed=run.seed)
    optimizer = build_optimizer(task, run.optimizer)
    expected = []
    for step in range(4):
        set_learning_rate(optimizer, learning_rate_factor(step, config=run.optimizer, total_steps=4))
        loss = sum(task(batch).loss for batch in batches[2 * step : 2 * step + 2]) / 2
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(task.parameters(), 1.0)
        expected += [step + 1, loss.item(), norm.item()]
        optimizer.step()
        optimizer.zero_grad()
    numbers = [number for row in read_metrics(folder, "loss", "grad_norm") for number in row]
    assert numbers == pytest.approx(expected, rel=1e-6)


def test_weights_that_ranks_do_not_share_stop_the_run_and_are_not_saved(
    tiny_run: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("mmfuse.train.resume.find_differences", lambda weights: list(weights)[:2])
    with pytest.raises(TrainingError, match=r"different weights at step \d+, such as model\.\S+ \(2 of them\)"):
        train_tiny(tiny_run, tmp_path / "out")
    assert not list((tmp_path / "out").glob("checkpoints/*"))
