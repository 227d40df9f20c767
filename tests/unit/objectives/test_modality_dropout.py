"""Modality dropout: masked objectives lose context by chance, and by sample alone."""

import pytest
import torch
from batches import make_batch, make_samples, tiny_task

from mmfuse.task import Task
from mmfuse.types import Batch

MASKED = {"masked_language": ("text", "t"), "masked_image": ("image", "i"), "masked_audio": ("audio", "a")}
SETTINGS = {"masked_language": {"mask_ratio": 0.5}}


def make_task(name: str, dropout: float) -> Task:
    fusion = {"num_layers": 1, "num_heads": 2, "modality_dropout": dropout}
    return tiny_task([name], settings=SETTINGS.get(name), fusion=fusion)


def row_losses(task: Task, batch: Batch) -> dict[int, list[float]]:
    """By sample what each of its hidden words or patches costs."""
    losses: dict[int, list[float]] = {}
    ((rows, values),) = task(batch).row_losses.values()
    for row, value in zip(rows.tolist(), values.tolist(), strict=True):
        losses.setdefault(int(batch.sample_id[row]), []).append(value)
    return losses


@pytest.mark.parametrize("name", MASKED)
def test_without_any_context_samples_are_those_of_one_modality(name: str) -> None:
    letter = MASKED[name][1]
    task = make_task(name, 0.999999)
    dropped, alone = row_losses(task, make_batch("tia tia tia")), row_losses(task, make_batch(" ".join([letter] * 3)))
    assert dropped.keys() == alone.keys() and dropped
    assert all(dropped[key] == pytest.approx(alone[key], rel=1e-9) for key in dropped)
    seen = row_losses(task.eval(), make_batch("tia tia tia"))  # nothing is dropped but in training
    assert all(seen[key] != pytest.approx(alone[key], rel=1e-6) for key in seen)


@pytest.mark.parametrize("name", MASKED)
def test_what_is_dropped_does_not_know_the_batch(name: str) -> None:
    task, samples = make_task(name, 0.5), make_samples(" ".join(["tia"] * 12))
    together = row_losses(task, make_batch(samples))
    apart = row_losses(task, make_batch(samples[:5])) | row_losses(task, make_batch(samples[5:]))
    assert together.keys() == apart.keys()
    assert all(together[key] == pytest.approx(apart[key], rel=1e-9) for key in together)
    whole = row_losses(make_task(name, 0.0), make_batch(samples))
    changed = sum(together[key] != pytest.approx(whole[key], rel=1e-9) for key in whole)
    assert 5 <= changed <= 12  # three of four lose something


def test_every_encoder_has_a_gradient_where_all_context_is_dropped() -> None:
    task = make_task("masked_language", 0.999999)
    task(make_batch("tia tia")).loss.backward()
    assert [name for name, parameter in task.named_parameters() if parameter.grad is None] == []
    assert torch.stack([p.grad.abs().max() for p in task.model.encoders["image"].parameters()]).max() == 0
