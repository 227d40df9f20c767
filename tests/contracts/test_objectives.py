"""Every file in `mmfuse/objectives` keeps the contract of `base.py`; over several ranks: `unit/objectives`."""

import pytest
import torch
from batches import make_batch, make_samples, tiny_task

from mmfuse.config import plugin_names

NAMES = plugin_names("mmfuse.objectives")
BATCH = "tia tia ti ta ia tia t"


def changes_for(name: str) -> dict:
    return {"fusion": None} if name == "contrastive" else {}


@pytest.mark.parametrize("name", NAMES)
def test_it_falls_on_a_repeated_batch(name):
    task = tiny_task([name], **changes_for(name))
    optimizer = torch.optim.AdamW(task.parameters(), lr=3e-3)
    batch, losses = make_batch(BATCH), []
    for _ in range(200 if name == "masked_image" else 25):  # its target, pixels of noise, is learned by heart
        loss = task(batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if losses[-1] < 0.8 * losses[0]:
            break
    assert all(torch.isfinite(torch.tensor(losses)))
    assert losses[-1] < 0.8 * losses[0], losses


@pytest.mark.parametrize("name", NAMES)
def test_rows_without_any_modality_change_nothing(name):
    task = tiny_task([name], **changes_for(name))
    samples = make_samples(BATCH + " - -")
    with_absent, without = (task(make_batch(part)).loss.item() for part in (samples, samples[:-2]))
    assert with_absent == pytest.approx(without, abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_the_rows_changes_nothing(name):
    task = tiny_task([name], **changes_for(name))
    samples = make_samples(BATCH)
    turned = samples[3:] + samples[:3]
    assert task(make_batch(turned)).loss.item() == pytest.approx(task(make_batch(samples)).loss.item(), abs=1e-10)
