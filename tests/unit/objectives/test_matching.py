"""Matching: by which law negatives are drawn, who may be one, and what the fused rows are made of."""

from dataclasses import replace

import pytest
import torch
from batches import make_batch, make_samples, tiny_model, tiny_task
from torch import Tensor
from unit.objectives.ranks import contrastive_inputs

from mmfuse.objectives.base import StepInputs
from mmfuse.objectives.matching import Config, Matching, _exchange
from mmfuse.types import Batch

QUERIES, CANDIDATES = 1500, 6


def build(**settings) -> Matching:
    return Config(**settings).build(tiny_model(), seed=0)


def draw(objective: Matching, batch: Batch, embeddings: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return objective._draw(contrastive_inputs(embeddings, batch))


def many_queries() -> tuple[Batch, dict[str, Tensor]]:
    """1500 equal captioned pictures of one group, four that may be drawn, and two that lack one of the modalities."""
    samples = make_samples("ti ti ti ti ti t i")
    batch = make_batch(samples, letters="ti")
    count = torch.tensor([QUERIES] + [1] * CANDIDATES)
    present, groups = batch.present.repeat_interleave(count, 0), batch.group_id.repeat_interleave(count)
    generator = torch.Generator().manual_seed(4)
    embeddings = {}
    for column, name in enumerate(("text", "image")):
        unit = torch.nn.functional.normalize(torch.randn(len(count), 5, generator=generator), dim=-1)
        embeddings[name] = unit.repeat_interleave(count, 0) * present[:, column, None]
    rows = torch.arange(len(groups))
    return replace(batch, present=present, group_id=groups, sample_id=rows, global_rows=len(rows)), embeddings


def test_negatives_follow_the_softmax_over_candidates_that_have_the_modality() -> None:
    batch, embeddings = many_queries()
    objective = build(temperature=0.5)
    names, drawn = list(embeddings), torch.zeros(2, CANDIDATES)
    for step in range(4):
        changed, negatives = draw(objective, replace(batch, step=step), embeddings)
        assert (negatives[:QUERIES] >= QUERIES).all()  # never one of the same group
        for modality in range(2):
            mine = negatives[:QUERIES][changed[:QUERIES] == modality] - QUERIES
            drawn[modality] += torch.bincount(mine, minlength=CANDIDATES)
    for modality, kept in ((0, 1), (1, 0)):
        has = batch.present[QUERIES:, modality]
        similarity = embeddings[names[kept]][0] @ embeddings[names[modality]][QUERIES:].T / 0.5
        law = similarity.masked_fill(~has, -torch.inf).softmax(0)
        assert not drawn[modality][~has].any() and has.sum() == CANDIDATES - 1
        expected = law[has] * drawn[modality].sum()
        # 99.9% of a chi-square with 4 degrees of freedom lie below 18.5; the law itself is far from uniform.
        assert ((drawn[modality][has] - expected) ** 2 / expected).sum() < 18.5
        assert law.max() > 3 * law[has].min()
    assert drawn.sum(1).min() > 0.48 * drawn.sum()  # each modality is exchanged as often as the other


def test_extreme_similarities_do_not_fail_and_take_the_hardest() -> None:
    batch, embeddings = many_queries()
    changed, negatives = draw(build(), batch, {name: 1e6 * x for name, x in embeddings.items()})
    hardest = [
        (embeddings[kept][0] @ embeddings[name][QUERIES:].T).masked_fill(~batch.present[QUERIES:, i], -9).argmax()
        for i, (name, kept) in enumerate((("text", "image"), ("image", "text")))
    ]
    assert torch.equal(negatives[:QUERIES] - QUERIES, torch.stack(hardest)[changed[:QUERIES]])


def test_only_rows_of_the_pool_are_drawn() -> None:
    batch, embeddings = many_queries()
    _, negatives = draw(build(negative_pool=QUERIES + 2), batch, embeddings)
    assert set(negatives[:QUERIES].tolist()) == {QUERIES, QUERIES + 1}
    changed, _ = draw(build(negative_pool=QUERIES), batch, embeddings)
    assert (changed[:QUERIES] == -1).all() and (changed[QUERIES : QUERIES + 4] >= 0).all()


def step_inputs(presence: str, groups: list[int] | None = None):
    task = tiny_task(("matching",))
    batch = make_batch(make_samples(presence, groups=groups))
    encoded = task.model.encode(batch)
    return task.objectives["matching"], StepInputs(task.model, batch, encoded, task.model.fuse(encoded.token_batch))


@pytest.mark.parametrize(("presence", "groups"), [("t i a -", None), ("tia ta ti", [4, 4, 4]), ("tia", None)])
def test_without_a_candidate_the_loss_is_an_exact_zero_that_has_gradients(presence, groups) -> None:
    objective, inputs = step_inputs(presence, groups)
    loss = objective(inputs)["matching"].loss
    assert loss.item() == 0.0
    loss.backward()
    used = [*objective.named_parameters(), *inputs.model.fusion.named_parameters()]
    assert all(parameter.grad is not None and not parameter.grad.any() for _, parameter in used)


def test_a_mismatched_row_is_its_own_tokens_with_one_modality_of_another_row() -> None:
    objective, inputs = step_inputs("tia ti t ta ia tia")
    changed, negatives = objective._draw(inputs)
    assert changed.tolist()[2] == -1 and (changed >= 0).sum() == 5
    exchanged, source = _exchange(inputs, changed, negatives), inputs.encoded.token_batch
    for place, row in enumerate((changed >= 0).nonzero()[:, 0].tolist()):
        for number, name in enumerate(inputs.batch.modalities):
            origin = int(negatives[row]) if changed[row] == number else row
            expected = real_tokens(source, name, origin)
            torch.testing.assert_close(real_tokens(exchanged, name, place), expected, rtol=0, atol=0)
            assert (len(expected) > 0) == bool(inputs.batch.present[row, number])


def real_tokens(tokens, name: str, row: int) -> Tensor:
    entry = tokens.rows[name] == row
    return tokens.tokens[name][entry][tokens.masks[name][entry]]


def test_loss_is_the_mean_cross_entropy_of_matched_and_mismatched_rows() -> None:
    objective, inputs = step_inputs("tia ti t ta ia tia")
    changed, negatives = objective._draw(inputs)
    mismatched = objective.classifier(inputs.model.fuse(_exchange(inputs, changed, negatives)).pooled)[:, 0]
    matched = objective.classifier(inputs.fused.pooled[changed >= 0])[:, 0]
    truth = torch.cat([torch.ones_like(matched), torch.zeros_like(mismatched)])
    expected = torch.nn.functional.binary_cross_entropy_with_logits(torch.cat([matched, mismatched]), truth)
    torch.testing.assert_close(objective(inputs)["matching"].loss, expected)
    assert len(matched) == len(mismatched) == 5


def test_the_draw_is_keyed_by_step_and_sample() -> None:
    batch, embeddings = many_queries()
    objective = build()
    first = draw(objective, batch, embeddings)
    again, later = draw(objective, batch, embeddings), draw(objective, replace(batch, step=9), embeddings)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[1], later[1])
    order = torch.randperm(len(batch.present), generator=torch.Generator().manual_seed(0))
    shuffled = replace(
        batch, present=batch.present[order], group_id=batch.group_id[order], sample_id=batch.sample_id[order]
    )
    changed, negatives = draw(objective, shuffled, {name: x[order] for name, x in embeddings.items()})
    assert torch.equal(changed, first[0][order])
    drawn = changed >= 0
    assert torch.equal(order[negatives][drawn], first[1][order][drawn])
