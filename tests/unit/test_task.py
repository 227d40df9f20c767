"""The task: the same calls and every gradient on every rank, whatever its batch holds."""

import pytest
import torch
from batches import ALL_OBJECTIVES, make_batch, objective_configs, tiny_model, tiny_task

from mmfuse.task import Task

PATTERNS = ("tia ti t ta ia i a -", "ia i a", "ta t a", "ti t i", "t t", "i -", "a", "- -")
"""What a rank may hold: everything, each modality missing, two missing, and nothing at all."""


@pytest.mark.parametrize("objectives", [ALL_OBJECTIVES, *((name,) for name in ALL_OBJECTIVES)])
def test_every_parameter_has_a_gradient_of_its_own_whatever_a_rank_lacks(objectives: tuple[str, ...]) -> None:
    task = tiny_task(objectives)
    for pattern in PATTERNS:
        task.zero_grad()
        task(make_batch(pattern)).loss.backward()
        gradients = {name: parameter.grad for name, parameter in task.named_parameters()}
        assert [name for name, gradient in gradients.items() if gradient is None or not gradient.isfinite().all()] == []
        # Two gradients in one memory overwrite each other when DDP averages them.
        memories = {gradient.data_ptr() for gradient in gradients.values() if gradient is not None}
        assert len(memories) == len(gradients), pattern


def test_contrastive_without_fusion_has_every_gradient() -> None:
    task = tiny_task(("contrastive",), fusion=None)
    for pattern in PATTERNS:
        task.zero_grad()
        task(make_batch(pattern)).loss.backward()
        assert all(parameter.grad is not None for parameter in task.parameters()), pattern


def test_all_modules_run_equally_often_in_the_same_order_whatever_a_rank_lacks() -> None:
    task, calls = tiny_task(), []
    for name, module in task.named_modules():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    orders = []
    for pattern in PATTERNS:
        calls.clear()
        task(make_batch(pattern))
        orders.append(list(calls))
    assert all(order == orders[0] for order in orders)
    assert {"model.encoders.text", "model.encoders.image", "model.encoders.audio", "model.fusion"} <= set(orders[0])
    assert orders[0].count("model.encoders.text") == 3  # as it came, with masked words, with other sentences


def test_a_rank_with_nothing_has_a_loss_of_exactly_zero() -> None:
    task = tiny_task()
    task(make_batch("- -")).loss.backward()
    assert task(make_batch("- -")).loss.item() == 0.0
    assert not any(parameter.grad.any() for parameter in task.parameters() if parameter.grad is not None)


def test_the_loss_is_the_weighted_sum_of_its_terms() -> None:
    weights = {"matching": 0.0, "leave_one_out": 2.0, "masked_image": 3.0}
    settings = {name: {"weight": weight} for name, weight in weights.items()}
    configs = objective_configs(contrastive={"weight": 0.5}, **settings)
    output = Task(tiny_model(), configs, seed=0)(make_batch(PATTERNS[0]))
    pairs = [output.terms[f"contrastive/{pair}"] for pair in ("text-image", "text-audio", "image-audio")]
    others = set(ALL_OBJECTIVES) - {"contrastive"}
    assert output.terms.keys() - others == {
        "contrastive/text-image",
        "contrastive/text-audio",
        "contrastive/image-audio",
    }
    expected = 0.5 * sum(pairs) + sum(weights.get(name, 1.0) * output.terms[name] for name in others)
    torch.testing.assert_close(output.loss, expected)
    assert not any(term.requires_grad for term in output.terms.values())


def test_weights_come_from_the_seed_and_leave_torch_s_generator_alone() -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    one = Task(tiny_model(), objective_configs(), seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(456)
    again, other = (Task(tiny_model(), objective_configs(), seed=seed).state_dict() for seed in (1, 2))
    assert all(torch.equal(tensor, again[name]) for name, tensor in one.items())
    drawn = [name for name, tensor in one.items() if tensor.unique().numel() > 1]
    assert len(drawn) > 50 and not any(torch.equal(one[name], other[name]) for name in drawn)


@pytest.mark.parametrize("mode", ["autocast", "weights"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_bf16_gives_about_the_loss_of_fp32(mode: str, pattern: str) -> None:
    task, batch = Task(tiny_model(), objective_configs(), seed=0), make_batch(pattern)
    expected = task(batch).loss.item()
    if mode == "weights":
        task = task.to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
        loss = task(batch).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=0.05)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in task.parameters())
