"""A loss that spikes and stays high: back before it, past its data, and the rest of the run as if it had never been."""

import json
import math
from pathlib import Path

import pytest
import torch
from unit.train.tiny_runs import read_lines, read_metrics, train_tiny

from mmfuse.errors import Stopped
from mmfuse.task import Task
from mmfuse.train.spikes import RollBackConfig, SpikeDetector
from mmfuse.types import Batch, StepOutput

LONG = ("train.steps=20", "train.checkpoint_every=4", "train.record_samples=true", "train.keep_checkpoints=3")
ROLL_BACK = "train.roll_back={loss_factor: 2.3, losses_in_a_row: 2}"
POISON = 9
"""The first step, 0-based, whose batch blows the weights up."""


@pytest.mark.parametrize(
    ("losses", "begin"),
    [
        ([5, 4, 4, 3, 3, 9, 9, 9], 5),
        ([5, 4, 4, 3, 3, 9, 3, 9, 9, 3], None),  # passes by itself
        ([5, 4, 4, 3, 3, 9, math.nan, 9, 9], 5),  # steps that were skipped tell nothing
        ([5, 4, 9, 9, 9, 9], None),  # too few to say what is usual
    ],
)
def test_a_spike_is_a_loss_that_stays_high(losses: list[float], begin: int | None) -> None:
    detector = SpikeDetector(RollBackConfig(), [])
    assert [detector.add(loss, step=step) for step, loss in enumerate(losses, start=1)][-1] == begin


def test_losses_of_before_a_resume_count() -> None:
    detector = SpikeDetector(RollBackConfig(losses_in_a_row=1), enumerate([4.0] * 5, start=1))
    assert detector.add(9, step=6) == 5


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Gets the keys of the one batch that blew the weights up."""
    forward, batches = Task.forward, []

    def blow_up(task: Task, batch: Batch, seen=None) -> StepOutput:
        if batch.step == POISON and not batches:
            batches.append(batch.keys)
            with torch.no_grad():
                for name, parameter in task.named_parameters():
                    parameter.copy_(
                        torch.full_like(parameter, 4.6) if "logit_scale" in name else torch.randn_like(parameter)
                    )
        return forward(task, batch, seen)

    monkeypatch.setattr(Task, "forward", blow_up)
    return batches


def test_a_run_goes_back_before_a_spike_and_leaves_its_data_out(
    tiny_run: Path, tmp_path: Path, poisoned: list[list[str]]
) -> None:
    output = tmp_path / "run"
    with pytest.raises(Stopped, match=r"back to the checkpoint of step 8; started again, .* leaves out the 3 global"):
        train_tiny(tiny_run, output, *LONG, ROLL_BACK)
    before = read_metrics(output, "loss")
    assert [step for step, _ in before] == list(range(1, 12))  # the losses of steps 10 and 11 were too high
    dealt = [line["keys"] for line in read_lines(output / "samples.rank0.jsonl")]
    assert [list(keys) for keys in poisoned] == [dealt[POISON]]

    train_tiny(tiny_run, output, *LONG, ROLL_BACK)
    after = read_metrics(output, "loss")
    assert after[:8] == before[:8]
    assert max(loss for _, loss in after[8:]) < 8
    whole = train_tiny(tiny_run, tmp_path / "calm", *LONG, "train.steps=23")
    calm = [line["keys"] for line in read_lines(whole / "samples.rank0.jsonl")]
    assert [line["keys"] for line in read_lines(output / "samples.rank0.jsonl")] == calm[:8] + calm[11:]
    newest = json.loads((output / "checkpoints" / "step_00000020" / "state.json").read_text())
    assert newest["left_out"] == [[8, 3]]
