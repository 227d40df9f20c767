"""Pair contrastive in one process: who is a query, who is a candidate, and the learned scale."""

from typing import Any

import pytest
import torch
from batches import make_batch, make_samples, tiny_model
from torch import Tensor
from unit.objectives.by_hand import group_info_nce_by_hand, group_sigmoid_by_hand, info_nce_by_hand
from unit.objectives.ranks import contrastive_inputs

from mmfuse.errors import ConfigError
from mmfuse.objectives.base import Term
from mmfuse.objectives.contrastive import LARGEST_LOGIT_SCALE, Config, Contrastive, exp_clamped

MIXED = "tia ti t ta ia i a tia - ti"


def embed(presence: str, *, seed: int = 0) -> dict[str, Tensor]:
    """Random unit vectors in fp64, zeros where a row lacks the modality, as the model gives them."""
    generator = torch.Generator().manual_seed(seed)
    rows = presence.split()
    embeddings = {}
    for letter, name in zip("tia", ("text", "image", "audio"), strict=True):
        unit = torch.nn.functional.normalize(
            torch.randn(len(rows), 5, generator=generator, dtype=torch.float64), dim=-1
        )
        has = torch.tensor([letter in row for row in rows])
        embeddings[name] = (unit * has[:, None]).requires_grad_()
    return embeddings


def contrast(
    embeddings: dict[str, Tensor], presence: str, groups: list[int] | None = None, **settings: Any
) -> dict[str, Tensor]:
    batch = make_batch(make_samples(presence, groups=groups))
    objective = Config(**settings).build(tiny_model(), seed=0).double()
    return losses_of(objective(contrastive_inputs(embeddings, batch)))


def losses_of(terms: dict[str, Term]) -> dict[str, Tensor]:
    return {name: term.loss for name, term in terms.items()}


@pytest.mark.parametrize("groups", [list(range(10)), [0, 1, 2, 0, 4, 1, 0, 7, 8, 7]])
def test_loss_is_the_definition_with_extra_negatives_and_groups(groups: list[int]) -> None:
    embeddings = {name: x.detach() for name, x in embed(MIXED).items()}
    terms = contrast(embeddings, MIXED, groups)
    assert list(terms) == ["text-image", "text-audio", "image-audio"]
    for pair, loss in terms.items():
        a, b = pair.split("-")
        present = [(a[0] in row, b[0] in row) for row in MIXED.split()]
        expected = info_nce_by_hand(embeddings[a], embeddings[b], present, groups) / 3
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-6)  # the scale starts as an fp32 number


@pytest.mark.parametrize(
    ("loss", "by_hand"), [("info_nce", group_info_nce_by_hand), ("sigmoid", group_sigmoid_by_hand)]
)
@pytest.mark.parametrize("groups", [list(range(10)), [0, 1, 2, 0, 4, 1, 0, 7, 8, 7]])
def test_with_positives_of_the_group_loss_is_the_definition(groups: list[int], loss: str, by_hand) -> None:
    embeddings = {name: x.detach() for name, x in embed(MIXED).items()}
    for pair, value in contrast(embeddings, MIXED, groups, loss=loss, positives="group").items():
        a, b = pair.split("-")
        present = [(a[0] in row, b[0] in row) for row in MIXED.split()]
        expected = by_hand(embeddings[a], embeddings[b], present, groups) / 3
        assert float(value.detach()) == pytest.approx(expected, rel=1e-6)  # the scale starts as an fp32 number


@pytest.mark.parametrize("loss", ["info_nce", "sigmoid"])
def test_a_text_and_a_picture_of_one_group_belong_together_though_no_sample_has_both(loss: str) -> None:
    embeddings = embed("t i i")
    value = contrast(embeddings, "t i i", [0, 0, 1], loss=loss, positives="group")["text-image"]
    (gradient,) = torch.autograd.grad(value, embeddings["image"])
    towards = embeddings["text"][0].detach()
    assert value > 0 and gradient[1] @ towards < 0 < gradient[2] @ towards
    assert contrast(embeddings, "t i i", [0, 0, 1], loss=loss)["text-image"] == 0


def test_a_picture_without_caption_is_a_negative_and_one_of_the_same_group_is_none() -> None:
    for groups, is_negative in (([0, 1], True), ([0, 0], False)):
        embeddings = embed("ti i")
        sum(contrast(embeddings, "ti i", groups).values()).backward()
        assert embeddings["image"].grad is not None
        assert bool(embeddings["image"].grad[1].any()) is is_negative


def test_without_a_pair_every_term_is_an_exact_zero_that_has_gradients() -> None:
    embeddings, presence = embed("t i a t -"), "t i a t -"
    batch = make_batch(presence)
    objective = Config().build(tiny_model(), seed=0).double()
    terms = losses_of(objective(contrastive_inputs(embeddings, batch)))
    assert all(loss.item() == 0.0 for loss in terms.values()) and len(terms) == 3
    sum(terms.values()).backward()
    leaves = [*embeddings.values(), *objective.parameters()]
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in leaves)


def test_weights_of_pairs_are_relative_and_a_pair_of_weight_zero_is_left_out() -> None:
    embeddings, batch = embed(MIXED), make_batch(MIXED)
    every = losses_of(Config().build(tiny_model(), seed=0).double()(contrastive_inputs(embeddings, batch)))
    config = Config(pairs={"image-text": 3, "text-audio": 1, "image-audio": 0})
    chosen = losses_of(config.build(tiny_model(), seed=0).double()(contrastive_inputs(embeddings, batch)))
    assert list(chosen) == ["text-image", "text-audio"]
    torch.testing.assert_close(chosen["text-image"], every["text-image"] * 3 * 3 / 4)
    torch.testing.assert_close(chosen["text-audio"], every["text-audio"] * 3 / 4)


@pytest.mark.parametrize("pairs", [{"text-smell": 1}, {"text": 1}, {"text-image": 0}, {}])
def test_pairs_that_train_nothing_are_refused(pairs: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="contrastive"):
        Config(pairs=pairs).build(tiny_model(), seed=0)


def test_the_scale_stays_within_bounds_and_may_leave_them_inwards_only() -> None:
    # Gradient descent moves against the sign of the gradient.
    for start, sign, moves in (
        (LARGEST_LOGIT_SCALE + 1, 1.0, True),
        (LARGEST_LOGIT_SCALE + 1, -1.0, False),
        (-0.5, -1.0, True),
        (-0.5, 1.0, False),
        (2.0, 1.0, True),
        (2.0, -1.0, True),
    ):
        log_scale = torch.tensor([start], requires_grad=True)
        scale = exp_clamped(log_scale)
        assert 1 <= scale.item() <= 100.001
        (sign * scale).sum().backward()
        assert log_scale.grad is not None and bool(log_scale.grad.item()) is moves
        if moves:
            assert log_scale.grad.item() == pytest.approx(sign * scale.item())


def test_logits_stay_in_fp32_under_autocast() -> None:
    embeddings = {name: x.detach().float() for name, x in embed(MIXED).items()}
    objective, inputs = (
        Contrastive({("text", "image"): 1.0}, Config()),
        contrastive_inputs(embeddings, make_batch(MIXED)),
    )
    expected = objective(inputs)["text-image"].loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(objective(inputs)["text-image"].loss, expected)
