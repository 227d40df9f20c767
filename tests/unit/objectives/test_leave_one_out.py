"""Leave-one-out: triplets are the queries, everyone else only a negative."""

import pytest
import torch
from batches import make_batch, make_samples, objective_configs, tiny_model, tiny_task
from unit.objectives.by_hand import info_nce_by_hand

from mmfuse.errors import ConfigError
from mmfuse.objectives.base import StepInputs
from mmfuse.objectives.leave_one_out import LeaveOneOut

NAMES = ("text", "image", "audio")


def step_inputs(presence: str, groups: list[int] | None = None) -> tuple[LeaveOneOut, StepInputs]:
    task = tiny_task(("leave_one_out",))
    batch = make_batch(make_samples(presence, groups=groups))
    return task.objectives["leave_one_out"], StepInputs(task.model, batch, task.model.encode(batch), None)


def test_loss_is_the_definition_with_each_sample_fused_on_its_own() -> None:
    presence, groups = "tia t ti tia ia a tia tia", [0, 1, 2, 3, 4, 3, 6, 0]
    objective, inputs = step_inputs(presence, groups)
    model, samples, losses = inputs.model, make_samples(presence, groups=groups), []
    for left_out in NAMES:
        fused = torch.zeros(len(samples), 8, dtype=torch.float64)
        for row, sample in enumerate(samples):
            if len(sample.features) == 3:
                features = {name: x for name, x in sample.features.items() if name != left_out}
                alone = make_batch([type(sample)(sample.sample_id, sample.group_id, sample.key, features)])
                fused[row] = model.embed(alone)["fused"].detach()
        embedding = inputs.encoded.embeddings[left_out].detach()
        present = [(len(row) == 3, left_out[0] in row) for row in presence.split()]
        losses.append(info_nce_by_hand(fused, embedding, present, groups))
    expected = sum(losses) / 3
    assert objective(inputs)["leave_one_out"].loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("presence", ["ti ta ia", "t", "- -"])
def test_without_a_triplet_the_loss_is_an_exact_zero_that_has_gradients(presence: str) -> None:
    objective, inputs = step_inputs(presence)
    loss = objective(inputs)["leave_one_out"].loss
    assert loss.item() == 0.0
    loss.backward()
    model = inputs.model
    used = [*objective.parameters(), *model.fusion.parameters(), *model.fused_head.parameters()]
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in used)


def test_two_modalities_are_refused() -> None:
    with pytest.raises(ConfigError, match="three modalities"):
        objective_configs(("leave_one_out",))["leave_one_out"].build(tiny_model("ti"), seed=0)
