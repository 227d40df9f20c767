"""The loop: a resume repeats the dropout, micro-steps add up to a step, and what is not finite never gets saved."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from unit.train.tiny_runs import (
    FOUR_STEPS,
    assert_same_state,
    killed_after_step_2,
    read_metrics,
    stored_state,
    train_tiny,
)

from mmfuse.errors import TrainingError
from mmfuse.task import Task
from mmfuse.train.checkpoint import complete_checkpoints, read_facts, verify_checkpoint
from mmfuse.train.engines.base import MOMENTS
from mmfuse.train.optim import build_optimizer, learning_rate_factor, set_learning_rate
from mmfuse.train.run import load_run
from mmfuse.train.state_files import write_parts
from mmfuse.train.stop import SIGNALS
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


class TrainedByHand:
    """What torch alone makes of the batches of four steps, without the update of those in `skips`."""

    def __init__(self, tiny_run: Path, batches: list[Batch], *settings: str, skips: tuple[int, ...] = ()) -> None:
        run = load_run(str(tiny_run), overrides=[*FOUR_STEPS, *settings])
        self.task = Task(run.model, run.objective_configs, seed=run.seed)
        self.optimizer = build_optimizer(self.task, run.optimizer)
        self.losses, self.norms = [], []
        per_step = run.train.accumulation
        for step in range(4):
            set_learning_rate(self.optimizer, learning_rate_factor(step, config=run.optimizer, total_steps=4))
            losses = [self.task(batch).loss for batch in batches[per_step * step : per_step * (step + 1)]]
            loss = torch.stack(losses).mean()
            loss.backward()
            self.losses.append(loss.item())
            self.norms.append(torch.nn.utils.clip_grad_norm_(self.task.parameters(), 1.0).item())
            if step not in skips:
                self.optimizer.step()
            self.optimizer.zero_grad()

    def moments(self, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        return {kind: self.optimizer.state[parameter][kind] for kind in MOMENTS}


def test_a_resumed_run_drops_out_what_the_uninterrupted_one_did(tiny_run: Path, tmp_path: Path) -> None:
    whole = train_tiny(tiny_run, tmp_path / "whole", DROPOUT)
    killed = killed_after_step_2(whole, tmp_path / "killed")
    train_tiny(tiny_run, killed, DROPOUT)
    without = train_tiny(tiny_run, tmp_path / "without")
    assert read_metrics(killed, "loss", "grad_norm") == read_metrics(whole, "loss", "grad_norm")
    assert_same_state(stored_state(killed), stored_state(whole))
    assert [loss for _, loss in read_metrics(whole, "loss")] != [loss for _, loss in read_metrics(without, "loss")]


def test_every_step_drops_out_something_else(tiny_run: Path, tmp_path: Path) -> None:
    seeds = []
    with before_each_micro_step(lambda *_: seeds.append(torch.initial_seed())):
        train_tiny(tiny_run, tmp_path / "out", DROPOUT)
    assert len(seeds) == len(set(seeds)) == 4


def spoil_gradients(task: Task, *, once: bool) -> None:
    """Makes one parameter's gradient NaN, of this step or of all from here on."""

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        if once:
            handle.remove()
        return gradient * math.nan

    handle = next(task.parameters()).register_hook(spoil)


def test_a_step_whose_gradient_is_nan_is_left_out_counted_and_in_no_mean(tiny_run: Path, tmp_path: Path) -> None:
    batches: list[Batch] = []

    def spoil_the_third(task: Task, batch: Batch) -> None:
        batches.append(batch)
        if batch.step == 2:
            spoil_gradients(task, once=True)

    settings = ("train.log_every=4", "train.checkpoint_every=4", "train.max_skipped_steps=1")
    with before_each_micro_step(spoil_the_third):
        folder = train_tiny(tiny_run, tmp_path / "out", *settings)
    alone = TrainedByHand(tiny_run, batches, skips=(2,))
    losses = [alone.losses[step] for step in (0, 1, 3)]
    assert read_metrics(folder, "loss", "skipped_steps", "skipped_in_a_row") == [
        (4, pytest.approx(sum(losses) / 3), 1, 1)
    ]
    stored = stored_state(folder)
    for name, parameter in alone.task.named_parameters():
        for kind, tensor in {"model": parameter.detach(), **alone.moments(parameter)}.items():
            torch.testing.assert_close(stored.whole(kind)[name], tensor, rtol=1e-6, atol=1e-9)
    newest = folder / "checkpoints/step_00000004"
    assert read_facts(newest)["adam_steps"] == alone.optimizer.state[parameter]["step"] == 3


def test_more_nan_steps_in_a_row_than_allowed_end_the_run_and_what_was_before_stays(
    tiny_run: Path, tmp_path: Path
) -> None:
    def spoil_from_the_third_on(task: Task, batch: Batch) -> None:
        if batch.step == 2:
            spoil_gradients(task, once=False)

    message = (
        r"2 steps in a row, up to step 4, were skipped .*1 may be: train.max_skipped_steps.*Lower the learning rate"
    )
    with before_each_micro_step(spoil_from_the_third_on):
        with pytest.raises(TrainingError, match=message) as error:
            train_tiny(tiny_run, tmp_path / "out", "train.max_skipped_steps=1", "train.checkpoint_in_background=false")
        patient = train_tiny(tiny_run, tmp_path / "patient", "train.max_skipped_steps=2")
    assert error.value.exit_code == 6
    checkpoints = tmp_path / "out" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step_00000002"]
    verify_checkpoint(checkpoints / "step_00000002", contents=True)
    assert_same_state(stored_state(patient), stored_state(patient, step=2))  # two skipped steps changed nothing
    assert read_facts(patient / "checkpoints/step_00000004")["adam_steps"] == 2


def test_a_step_of_two_micro_steps_takes_the_mean_of_their_losses_and_gradients(tiny_run: Path, tmp_path: Path) -> None:
    batches: list[Batch] = []
    with before_each_micro_step(lambda _, batch: batches.append(batch)):
        folder = train_tiny(tiny_run, tmp_path / "out", *TWO_MICRO_STEPS)
    assert [len(batch.present) for batch in batches] == [2] * 8
    alone = TrainedByHand(tiny_run, batches, *TWO_MICRO_STEPS)
    expected = [number for step in range(4) for number in (step + 1, alone.losses[step], alone.norms[step])]
    numbers = [number for row in read_metrics(folder, "loss", "grad_norm") for number in row]
    assert numbers == pytest.approx(expected, rel=1e-6)


def test_weights_that_ranks_do_not_share_stop_the_run_and_are_not_saved(
    tiny_run: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("mmfuse.train.saver.find_differences", lambda weights: list(weights)[:2])
    with pytest.raises(TrainingError, match=r"different weights at step \d+, such as model\.\S+ \(2 of them\)"):
        train_tiny(tiny_run, tmp_path / "out")
    assert not list((tmp_path / "out").glob("checkpoints/*"))


def test_an_error_leaves_the_checkpoint_before_it_whole_and_nothing_running(
    tiny_run: Path, tmp_path: Path, monkeypatch
) -> None:
    def write_slowly(*arguments, **settings) -> Path:
        time.sleep(0.2)
        return write_parts(*arguments, **settings)

    def spoil_from_the_third_on(task: Task, batch: Batch) -> None:
        if batch.step == 2:
            spoil_gradients(task, once=False)

    monkeypatch.setattr("mmfuse.train.saver.write_parts", write_slowly)
    before = set(threading.enumerate()), [signal.getsignal(number) for number in SIGNALS]
    with before_each_micro_step(spoil_from_the_third_on), pytest.raises(TrainingError):
        train_tiny(tiny_run, tmp_path / "out", "train.max_skipped_steps=1")
    checkpoints = tmp_path / "out" / "checkpoints"
    assert complete_checkpoints(checkpoints) == [checkpoints / "step_00000002"]
    for thread in set(threading.enumerate()) - before[0]:
        thread.join(timeout=1)
    names = [thread.name for thread in set(threading.enumerate()) - before[0]]
    assert "watchdog" not in names and "checkpoint" not in names  # in half an hour it would end this process
    assert [signal.getsignal(number) for number in SIGNALS] == before[1]
