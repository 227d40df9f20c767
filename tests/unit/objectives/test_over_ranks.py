"""Every objective over two and three processes, with rows missing here and there, is the same as in one."""

import pytest
import torch
from batches import ALL_OBJECTIVES
from open_clip.loss import ClipLoss, SigLipLoss
from unit.objectives.ranks import (
    ACCUMULATED,
    CANDIDATES,
    EVEN,
    GROUPS,
    LACKING,
    LOSSES,
    SCENARIOS,
    WAYS,
    WORLD_SIZES,
    pair_embeddings,
    result_alone,
    results_on_ranks,
    train_step,
)

from mmfuse.distributed import slice_of_rank
from mmfuse.objectives.contrastive import INITIAL_LOGIT_SCALE, INITIAL_SIGMOID_BIAS, INITIAL_SIGMOID_SCALE

TOLERANCE = 1e-12
"""fp64, relative to the largest number of a tensor."""


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1))


def results_of(recipe: str, size: int) -> list[dict[str, torch.Tensor]]:
    """What each rank of a world of this size gave."""
    if size == 1:
        return [result_alone(recipe)]
    return [results[recipe] for results in results_on_ranks("objectives")[size]]


def check_equal(ranks: list[dict[str, torch.Tensor]], expected: dict[str, torch.Tensor]) -> None:
    """The mean loss of the ranks, and every rank's gradients, are the expected ones."""
    assert expected["loss"] > 0
    assert error(torch.stack([result["loss"] for result in ranks]).mean(), expected["loss"]) < TOLERANCE
    for name in expected.keys() - {"loss"}:
        for result in ranks:
            assert error(result[name], expected[name]) < TOLERANCE, name


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("objective", ALL_OBJECTIVES)
@pytest.mark.parametrize("size", WORLD_SIZES)
def test_loss_and_gradients_do_not_know_the_world_size(size: int, objective: str, scenario: str) -> None:
    recipe = f"{scenario} {objective}"
    check_equal(results_of(recipe, size), result_alone(recipe))


BLOCKED = {
    **{f"contrastive {way}": "contrastive {} at once" for way in WAYS if not way.endswith("at once")},
    **{f"leave_one_out {way}": "leave_one_out" for way in CANDIDATES},
}
"""Recipes that meet candidates in blocks or around a ring, each with the plain one that it equals."""


@pytest.mark.parametrize("scenario", LACKING)
@pytest.mark.parametrize("blocked", BLOCKED)
@pytest.mark.parametrize("size", (1, *WORLD_SIZES))
def test_blocks_and_rings_of_candidates_change_nothing(size: int, blocked: str, scenario: str) -> None:
    plain = BLOCKED[blocked].format(next((loss for loss in LOSSES if blocked.startswith(f"contrastive {loss} ")), ""))
    check_equal(results_of(f"{scenario} {blocked}", size), result_alone(f"{scenario} {plain}"))


@pytest.mark.parametrize("scenario", EVEN)
@pytest.mark.parametrize("way", ACCUMULATED)
@pytest.mark.parametrize("size", (1, *WORLD_SIZES))
def test_two_micro_steps_are_one_step_of_the_whole_batch(size: int, way: str, scenario: str) -> None:
    check_equal(results_of(f"{scenario} {way} accumulated", size), train_step(scenario, *ACCUMULATED[way]))


def test_the_scenarios_have_what_they_promise() -> None:
    uneven, idle = SCENARIOS["uneven"].split(), SCENARIOS["idle"].split()
    parts = [uneven[slice_of_rank(len(uneven), rank=r, world_size=3)] for r in range(3)]
    assert len({len(part) for part in parts}) == 2
    assert not any("a" in row for row in parts[2]) and not any("i" in row for row in parts[0])
    assert set(idle[slice_of_rank(len(idle), rank=0, world_size=3)]) == {"t"}
    assert all(groups is None or len(groups) == len(SCENARIOS[name].split()) for name, groups in GROUPS.items())
    assert all(
        result["loss"].isfinite()
        for results in results_on_ranks("objectives")[3]
        for result in results.values()
        if "loss" in result
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", (1, *WORLD_SIZES))
def test_contrastive_is_open_clip_on_complete_batches(size: int, way: str) -> None:
    embeddings, is_sigmoid = pair_embeddings().requires_grad_(), "sigmoid" in way
    start, first = (INITIAL_SIGMOID_SCALE if is_sigmoid else INITIAL_LOGIT_SCALE), embeddings[:, 0]
    log_scale = torch.tensor([start]).double().requires_grad_()
    bias = torch.tensor([INITIAL_SIGMOID_BIAS], dtype=torch.float64, requires_grad=True)
    if is_sigmoid:
        loss = SigLipLoss()(first, embeddings[:, 1], log_scale.exp(), bias)
    else:
        loss = ClipLoss()(first, embeddings[:, 1], log_scale.exp())
    loss.backward()
    recipe = f"complete pairs {way}"
    ranks = results_of(recipe, size)
    assert error(torch.stack([result["loss"] for result in ranks]).mean(), loss.detach()) < TOLERANCE
    # Each rank's loss is `size` times its part, for engines take the mean of gradients.
    assert error(torch.cat([result["embeddings"] for result in ranks]) / size, embeddings.grad) < TOLERANCE
    assert error(torch.stack([result["logit_scale"] for result in ranks]).mean(0), log_scale.grad) < TOLERANCE
    if is_sigmoid:
        assert error(torch.stack([result["logit_bias"] for result in ranks]).mean(0), bias.grad) < TOLERANCE
