"""A loss that spikes and stays high: back before it, past its data, and the rest of the run as if it had never been."""

import json
import math
from pathlib import Path

import pytest
import torch
from unit.data.test_plan import make_plan
from unit.train.tiny_runs import read_lines, read_metrics, train_tiny

from mmfuse.data.left_out import LeftOut
from mmfuse.errors import ConfigError, Stopped, TrainingError
from mmfuse.task import Task
from mmfuse.train.profiling import read_trace
from mmfuse.train.roll_back import ROLL_BACKS, choose_checkpoint, leave_out
from mmfuse.train.spikes import RollBackConfig, SpikeDetector
from mmfuse.types import Batch, StepOutput

LONG = ("train.steps=20", "train.checkpoint_every=4", "train.record_samples=true", "train.keep_checkpoints=3")
ROLL_BACK = "train.roll_back={loss_factor: 2.3, losses_in_a_row: 2}"
POISON = 9
"""The first step, 0-based, whose batch blows the weights up."""


@pytest.mark.parametrize(
    ("losses", "begins"),
    [
        ([5, 4, 4, 3, 3, 9, 9, 9], {8: 5}),
        ([5, 4, 4, 3, 3, 9, 9, 3, 9, 9, 3], {}),  # passes by itself, and the next is another
        ([5, 4, 4, 3, 3, 9, math.nan, 9, 9], {9: 5}),  # steps that were skipped tell nothing
        ([5, 4, 99, 99, 99], {}),  # too few to say what is usual
    ],
)
def test_a_spike_is_a_loss_that_stays_high(losses: list[float], begins: dict[int, int]) -> None:
    detector = SpikeDetector(RollBackConfig(), [])
    found = {step: detector.add(loss, step=step) for step, loss in enumerate(losses, start=1)}
    assert {step: begin for step, begin in found.items() if begin is not None} == begins


def test_losses_of_before_a_resume_count() -> None:
    detector = SpikeDetector(RollBackConfig(losses_in_a_row=1), enumerate([4.0] * 5, start=1))
    assert detector.add(9, step=6) == 5


def blow_up(task: Task) -> None:
    with torch.no_grad():
        for name, parameter in task.named_parameters():
            parameter.copy_(torch.full_like(parameter, 4.6) if "logit_scale" in name else torch.randn_like(parameter))


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Gets the keys of the one batch that blew the weights up."""
    forward, batches = Task.forward, []

    def poison(task: Task, batch: Batch, seen=None) -> StepOutput:
        if batch.step == POISON and not batches:
            batches.append(list(batch.keys))
            blow_up(task)
        return forward(task, batch, seen)

    monkeypatch.setattr(Task, "forward", poison)
    return batches


def test_a_run_goes_back_before_a_spike_and_leaves_its_data_out(
    tiny_run: Path, tmp_path: Path, poisoned: list[list[str]]
) -> None:
    output = tmp_path / "run"
    with pytest.raises(Stopped, match=r"back to the checkpoint of step 8; started again, .* leaves out the 3 global"):
        train_tiny(tiny_run, output, *LONG, ROLL_BACK, "profile.steps=[10,20]")
    assert read_trace(output / "profile" / "rank0.json.gz")  # of a window that the spike cut short
    before = read_metrics(output, "loss")
    assert [step for step, _ in before] == list(range(1, 12))  # the losses of steps 10 and 11 were too high
    dealt = [line["keys"] for line in read_lines(output / "samples.rank0.jsonl")]
    assert poisoned == [dealt[POISON]]

    train_tiny(tiny_run, output, *LONG, ROLL_BACK)
    after = read_metrics(output, "loss")
    assert after[:8] == before[:8]
    assert max(loss for _, loss in after[8:]) < 8
    whole = train_tiny(tiny_run, tmp_path / "calm", *LONG, "train.steps=23")
    calm = [line["keys"] for line in read_lines(whole / "samples.rank0.jsonl")]
    assert [line["keys"] for line in read_lines(output / "samples.rank0.jsonl")] == calm[:8] + calm[11:]
    newest = json.loads((output / "checkpoints" / "step_00000020" / "state.json").read_text())
    assert newest["left_out"] == [[8, 3]]


def test_where_it_spikes_again_an_older_checkpoint_is_taken_and_then_the_run_ends(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, output = Task.forward, tmp_path / "run"

    def stay_high(task: Task, batch: Batch, seen=None) -> StepOutput:
        output = forward(task, batch, seen)
        return output._replace(loss=output.loss + 50) if batch.step >= POISON - 1 else output

    monkeypatch.setattr(Task, "forward", stay_high)
    settings = (*LONG, "train.checkpoint_every=2", "train.roll_back={loss_factor: 2, losses_in_a_row: 2, at_most: 2}")
    for _ in range(2):
        with pytest.raises(Stopped, match="back to the checkpoint of step"):
            train_tiny(tiny_run, output, *settings)
    with pytest.raises(TrainingError, match="after 2 roll-backs"):
        train_tiny(tiny_run, output, *settings)
    record = json.loads((output / ROLL_BACKS).read_text())
    assert [roll_back["to_step"] for roll_back in record["roll_backs"]] == [6, 4]  # 8 is where it began


def test_a_damaged_checkpoint_is_no_goal(tiny_run: Path, tmp_path: Path, poisoned: list[list[str]]) -> None:
    output = train_tiny(
        tiny_run, tmp_path / "run", "train.steps=8", "train.checkpoint_every=2", "train.keep_checkpoints=3"
    )
    weights = next((output / "checkpoints" / "step_00000006").glob("model-*"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    assert choose_checkpoint(output / "checkpoints", before=8, used=[]) == 4


def test_windows_of_an_older_roll_back_come_earlier_after_one_that_goes_further_back() -> None:
    plan = make_plan([7, 1, 12, 5, 30], left_out=[LeftOut(2, 1), LeftOut(8, 3)])
    windows = leave_out(plan, since=4, until=7)
    after, before = make_plan([7, 1, 12, 5, 30], left_out=windows).planned_steps, plan.planned_steps
    assert [int(after.of(step)) for step in range(4, 12)] == [int(before.of(step)) for step in range(7, 15)]
    assert [int(after.of(step)) for step in range(4)] == [int(before.of(step)) for step in range(4)]


def test_kept_checkpoints_must_reach_back_before_a_spike(tiny_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"finds a spike after 3 steps .* reach back 2 only"):
        train_tiny(tiny_run, tmp_path / "run", "train.roll_back={}")
