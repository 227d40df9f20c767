"""Every rank makes the same calls and has every gradient, whatever its batch holds."""

import pytest
import torch
from batches import ALL_OBJECTIVES, make_batch, objective_configs, tiny_model, tiny_task

from mmfuse.task import Task

COMPLETE = "tia tia tia ti ta ia"
PATTERNS = [COMPLETE, "t i t i", "ti ti t i", "ta ta t a", "ia ia i a", "t t", "i i", "a a", "- -"]


def calls_of(task: Task, pattern: str) -> list[str]:
    """The names of the modules with parameters, in the order in which a forward pass calls them."""
    calls: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda _module, _inputs, name=name: calls.append(name))
        for name, module in task.named_modules()
        if next(module.parameters(recurse=False), None) is not None or name.startswith("model.encoders")
    ]
    task(make_batch(pattern))
    for hook in hooks:
        hook.remove()
    return calls


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_parameter_has_a_finite_gradient(pattern):
    task = tiny_task()
    output = task(make_batch(pattern))
    assert torch.isfinite(output.loss)
    output.loss.backward()
    for name, parameter in task.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_the_calls_are_the_same_whatever_the_batch_holds():
    task = tiny_task()
    expected = calls_of(task, COMPLETE)
    assert expected.count("model.encoders.image") == 1
    assert expected.count("model.encoders.text") == 2  # once more with masked words
    for pattern in PATTERNS:
        assert calls_of(task, pattern) == expected, pattern


def test_an_empty_batch_has_a_loss_of_exactly_zero():
    output = tiny_task()(make_batch("- - -"))
    assert output.loss.item() == 0.0
    assert set(output.terms) >= {"matching", "masked_language", "leave_one_out", "contrastive/text-image"}


def test_the_loss_is_the_weighted_sum_of_its_terms():
    weights = {"contrastive": 1.0, "matching": 0.5, "masked_language": 0.25, "leave_one_out": 2.0}
    configs = objective_configs(**{name: {"weight": weight} for name, weight in weights.items()})
    output = Task(tiny_model(), configs, seed=0)(make_batch(COMPLETE))
    expected = sum(weights[name.split("/")[0]] * value for name, value in output.terms.items())
    assert output.loss.item() == pytest.approx(float(expected), rel=1e-6)


def test_weights_come_from_the_seed_alone():
    def weights(seed: int) -> torch.Tensor:
        task = Task(tiny_model(), objective_configs(), seed=seed)
        return torch.cat([parameter.detach().flatten() for parameter in task.parameters()])

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = weights(3)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(first, weights(3))
    assert not torch.equal(first, weights(4))


@pytest.mark.parametrize("objectives", [[name] for name in ALL_OBJECTIVES])
def test_one_objective_alone_trains_every_parameter_of_its_model(objectives):
    fusion = {} if objectives != ["contrastive"] else {"fusion": None}
    task = tiny_task(objectives, **fusion)
    task(make_batch(COMPLETE)).loss.backward()
    assert [name for name, parameter in task.named_parameters() if parameter.grad is None] == []
