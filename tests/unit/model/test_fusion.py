"""Packed fusion equals a dense masked one, and no sample knows of another."""

import math

import pytest
import torch
from torch import Tensor
from unit.model.token_batches import NAMES, WIDTH, make_tokens, random_presence, stream_of

from mmfuse.model.blocks import checkpoint_activations
from mmfuse.model.concat import ConcatFusion
from mmfuse.model.fusion import Attention, Fusion, FusionConfig, make_views
from mmfuse.model.pack import pack, unpack
from mmfuse.types import TokenBatch

EVERY_KIND = "tia ti ta ia t i a - tia"


ATTENTION = ("cross", "merged", "bottleneck")
VARIANTS = (*ATTENTION, "concat")


def build(variant: str = "cross") -> Fusion:
    torch.manual_seed(0)
    config = FusionConfig.model_validate({"variant": variant, "num_layers": 2, "num_heads": 4, "num_bottlenecks": 2})
    joins = ConcatFusion if variant == "concat" else Fusion
    fusion = joins(config, modalities=NAMES, width=WIDTH).double()
    with torch.no_grad():
        for parameter in fusion.parameters():  # so that no bias or null value starts at 0 and hides a mistake
            parameter.add_(0.1 * torch.randn_like(parameter))
    return fusion


def attend_densely(attention: Attention, x_ND: Tensor, visible_NN: Tensor) -> Tensor:
    """Softmax over all tokens of the rank and the null key, with everything forbidden at minus infinity."""
    heads = attention.num_heads
    split = [linear(x_ND).unflatten(-1, (heads, -1)) for linear in (attention.query, attention.key, attention.value)]
    query = split[0]
    key = torch.cat([attention.null_key.view(1, heads, -1), split[1]])
    value = torch.cat([attention.null_value.view(1, heads, -1), split[2]])
    scores = torch.einsum("nhd,mhd->hnm", query, key) / math.sqrt(query.shape[-1])
    visible = torch.cat([visible_NN.new_ones(len(x_ND), 1), visible_NN], dim=1)
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return attention.output(torch.einsum("hnm,mhd->nhd", weights, value).flatten(1))


def visible_tokens(variant: str, sample: Tensor, modality: Tensor) -> dict[str, Tensor]:
    """Who sees whom, from the definition: bool `(N, N)` by view; modality 3 is the bottleneck."""
    same_sample, same_modality = sample[:, None] == sample, modality[:, None] == modality
    if variant == "merged":
        return {"joint": same_sample}
    if variant == "bottleneck":
        bottleneck = modality == len(NAMES)
        return {"through": same_sample & (same_modality | bottleneck | bottleneck[:, None])}
    return {"within": same_sample & same_modality, "across": same_sample & ~same_modality}


def fuse_densely(variant: str, fusion: Fusion, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """The stream's fused tokens and the samples' pooled vectors, from the paper definition."""
    x_ND, sample, modality = stream_of(batch)
    x_ND, num_tokens = x_ND + fusion.modality_embedding[modality], len(x_ND)
    if fusion.bottleneck is not None:
        owner = torch.arange(batch.num_rows).repeat_interleave(len(fusion.bottleneck))
        x_ND = torch.cat([x_ND, fusion.bottleneck.repeat(batch.num_rows, 1)])
        sample, modality = torch.cat([sample, owner]), torch.cat([modality, torch.full_like(owner, len(NAMES))])
    for block in fusion.blocks:
        for view, visible_NN in visible_tokens(variant, sample, modality).items():
            x_ND = x_ND + attend_densely(block.attentions[view], block.norms[view](x_ND), visible_NN)
        x_ND = x_ND + block.mlp(block.mlp_norm(x_ND))
    x_ND, sample, modality = x_ND[:num_tokens], sample[:num_tokens], modality[:num_tokens]
    x_ND = fusion.norm(x_ND)
    pooled = []
    for row in range(batch.num_rows):
        parts = [x_ND[(sample == row) & (modality == m)] for m in range(3)]
        means = [part.mean(0) for part in parts if len(part)]
        pooled.append(torch.stack(means).mean(0) if means else x_ND.new_zeros(WIDTH))
    return x_ND, torch.stack(pooled)


def gradients(fusion: Fusion, batch: TokenBatch, x_ND: Tensor, pooled: Tensor) -> dict[str, Tensor]:
    """Of a function of everything that comes out."""
    weights = torch.linspace(-1, 1, x_ND.numel() + pooled.numel(), dtype=torch.float64)
    loss = (weights * torch.cat([x_ND.flatten(), pooled.flatten()]).square()).sum()
    leaves = {**dict(fusion.named_parameters()), **batch.tokens}
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


@pytest.mark.parametrize("variant", ATTENTION)
@pytest.mark.parametrize("presence", [EVERY_KIND, "t t", "ia", *(random_presence(seed) for seed in range(4))])
def test_packed_equals_dense_in_output_and_gradients(presence: str, variant: str) -> None:
    fusion, batch = build(variant), make_tokens(presence)
    tokens, pooled = fusion(batch)
    packed = torch.cat([tokens[name][batch.masks[name]] for name in NAMES])
    dense, dense_pooled = fuse_densely(variant, fusion, batch)
    torch.testing.assert_close(packed, dense, rtol=0, atol=1e-12)
    torch.testing.assert_close(pooled, dense_pooled, rtol=0, atol=1e-12)
    expected = gradients(fusion, batch, dense, dense_pooled)
    for name, gradient in gradients(fusion, batch, packed, pooled).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def pick(batch: TokenBatch, row: int, *, padding: int) -> TokenBatch:
    """One sample on its own, with more padding."""
    tokens, masks, rows = {}, {}, {}
    for name in NAMES:
        mine = batch.rows[name] == row
        extra = torch.full((int(mine.sum()), padding, WIDTH), 9.0, dtype=torch.float64)
        tokens[name] = torch.cat([batch.tokens[name][mine], extra], dim=1)
        masks[name] = torch.cat([batch.masks[name][mine], torch.zeros(extra.shape[:2], dtype=torch.bool)], dim=1)
        rows[name] = torch.zeros(int(mine.sum()), dtype=torch.int64)
    return TokenBatch(tokens, masks, rows, 1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_sample_s_output_does_not_depend_on_batch_mates_or_on_padding(variant: str) -> None:
    fusion, batch = build(variant), make_tokens(EVERY_KIND)
    tokens, pooled = fusion(batch)
    for row in range(batch.num_rows):
        alone = pick(batch, row, padding=3)
        own_tokens, own_pooled = fusion(alone)
        torch.testing.assert_close(own_pooled[0], pooled[row], rtol=0, atol=1e-12)
        for name in NAMES:
            mine = batch.rows[name] == row
            expected = tokens[name][mine][batch.masks[name][mine]]
            torch.testing.assert_close(own_tokens[name][alone.masks[name]], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_holds_zeros_afterwards_and_gets_no_gradient(variant: str) -> None:
    fusion, batch = build(variant), make_tokens(EVERY_KIND)
    tokens, pooled = fusion(batch)
    (pooled.square().sum() + sum(x.square().sum() for x in tokens.values())).backward()
    for name in NAMES:
        padding = ~batch.masks[name]
        gradient = batch.tokens[name].grad
        assert gradient is not None and not gradient[padding].any() and not tokens[name][padding].any()
        assert gradient[batch.masks[name]].abs().sum(-1).gt(0).all()


def test_a_sample_with_one_modality_sees_the_null_key_and_stays_finite() -> None:
    fusion, batch = build(), make_tokens("t t")
    tokens, pooled = fusion(batch)
    pooled.square().sum().backward()
    gradients = [parameter.grad for parameter in fusion.parameters()] + [batch.tokens["text"].grad]
    assert tokens["text"].isfinite().all() and all(g is not None and g.isfinite().all() for g in gradients)
    null_value = fusion.blocks[0].attentions["across"].null_value.grad
    assert null_value is not None and null_value.any()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("presence", ["-", "- - -"])
def test_a_rank_without_any_token_has_every_gradient_each_in_memory_of_its_own(presence: str, variant: str) -> None:
    fusion, batch = build(variant), make_tokens(presence)
    tokens, pooled = fusion(batch)
    assert torch.equal(pooled, torch.zeros_like(pooled)) and len(pooled) == len(presence.split())
    (pooled.sum() + sum(x.sum() for x in tokens.values())).backward()
    gradients = [parameter.grad for parameter in fusion.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)
    # Two in one memory: DDP writes both averages there, and one parameter takes the other's.
    assert len({gradient.data_ptr() for gradient in gradients if gradient is not None}) == len(gradients)


def test_unpack_undoes_pack() -> None:
    batch = make_tokens(EVERY_KIND)
    x_ND, packing = pack(batch, {})
    assert len(x_ND) == sum(int(mask.sum()) for mask in batch.masks.values())
    for name, tokens in unpack(x_ND, packing).items():
        assert torch.equal(tokens, batch.tokens[name] * batch.masks[name][..., None])


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_token_is_a_query_exactly_once_and_all_modules_run_once_whatever_the_batch(variant: str) -> None:
    fusion, calls = build(variant), []
    for name, module in fusion.named_modules():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    orders = []
    for presence in (EVERY_KIND, "t i", "tia tia", "-"):
        batch = make_tokens(presence)
        x_ND, packing = pack(batch, make_views("cross", NAMES) | make_views("merged", NAMES))
        for layout in packing.layouts.values():
            queries = torch.cat([g.query_gq[g.query_mask_gq] for g in layout.groups] or [torch.zeros(0)])
            assert sorted(queries.tolist()) == list(range(len(x_ND)))
        calls.clear()
        fusion(batch)
        orders.append(list(calls))
    assert all(order == orders[0] for order in orders) and len(orders[0]) > 10


@pytest.mark.parametrize("variant", ATTENTION)
def test_blocks_that_compute_again_change_no_gradient_and_rest_where_nobody_trains(variant: str) -> None:
    fusion, batch, calls = build(variant), make_tokens(EVERY_KIND), []
    fusion.blocks[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))

    def differentiate(*, training: bool) -> tuple[int, dict[str, Tensor]]:
        calls.clear()
        tokens, pooled = fusion.train(training)(batch)
        x_ND = torch.cat([tokens[name][batch.masks[name]] for name in NAMES])
        found = gradients(fusion, batch, x_ND, pooled)
        return len(calls), found

    once, expected = differentiate(training=True)
    checkpoint_activations(fusion.blocks)
    twice, found = differentiate(training=True)
    once_again, found_at_rest = differentiate(training=False)
    for other in (found, found_at_rest):
        torch.testing.assert_close(other, expected, rtol=1e-12, atol=1e-12)
    assert (once, twice, once_again) == (1, 2, 1)
