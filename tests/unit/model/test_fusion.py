"""Packed fusion equals dense attention with a mask, for any subset of modalities."""

import pytest
import torch
from torch import nn

from mmfuse.model.fusion import Attention, Block, Fusion, FusionConfig
from mmfuse.model.pack import pack, unpack
from mmfuse.types import TokenBatch

WIDTH, NAMES = 12, ("text", "image", "audio")
PRESENCE = ["tia", "t", "ia", "ti", "a", "", "ta", "tia", "i"]


def make_tokens(presence: list[str], *, seed: int = 0) -> TokenBatch:
    """Random tokens of samples that have these modalities; text and sound differ in length."""
    generator = torch.Generator().manual_seed(seed)
    tokens, masks, rows = {}, {}, {}
    for name, longest in zip(NAMES, (5, 4, 6), strict=True):
        has = torch.tensor([row for row, letters in enumerate(presence) if name[0] in letters], dtype=torch.int64)
        tokens[name] = torch.randn(len(presence), longest, WIDTH, generator=generator, dtype=torch.float64)[has]
        lengths = torch.randint(1, longest + 1, (len(presence),), generator=generator)[has]
        masks[name] = torch.arange(longest) < (lengths[:, None] if name != "image" else longest)
        masks[name] = masks[name].expand(len(has), longest).clone()
        rows[name] = has
    return TokenBatch(tokens, masks, rows, len(presence))


def fusion() -> Fusion:
    torch.manual_seed(0)
    built = Fusion(FusionConfig(num_layers=2, num_heads=3), modalities=NAMES, width=WIDTH).double()
    for parameter in built.parameters():   # zeros and tiny values would hide mistakes
        nn.init.normal_(parameter, std=0.5)
    return built


def dense_attention(attention: Attention, x: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """The same with one dense mask over all tokens, the null key in front."""
    heads = [linear(x).unflatten(-1, (attention.num_heads, -1)) for linear in (attention.query, attention.key)]
    q, k, v = *heads, attention.value(x).unflatten(-1, (attention.num_heads, -1))
    k = torch.cat([attention.null_key.view(1, attention.num_heads, -1), k])
    v = torch.cat([attention.null_value.view(1, attention.num_heads, -1), v])
    mask = torch.cat([torch.ones(len(x), 1, dtype=torch.bool), visible], dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return attention.output(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))


def dense_fusion(model: Fusion, batch: TokenBatch) -> torch.Tensor:
    """The stream of all real tokens, modality after modality, through dense attention."""
    sample = torch.cat([batch.rows[n][:, None].expand_as(batch.masks[n])[batch.masks[n]] for n in NAMES])
    modality = torch.cat([torch.full((int(batch.masks[n].sum()),), i) for i, n in enumerate(NAMES)])
    x = torch.cat([batch.tokens[n][batch.masks[n]] for n in NAMES]) + model.modality_embedding[modality]
    same_sample, same_modality = sample[:, None] == sample, modality[:, None] == modality
    for block in model.blocks:
        assert isinstance(block, Block)
        x = x + dense_attention(block.within, block.within_norm(x), same_sample & same_modality)
        x = x + dense_attention(block.across, block.across_norm(x), same_sample & ~same_modality)
        x = x + block.mlp(block.mlp_norm(x))
    return model.norm(x)


def test_packed_equals_dense_in_value_and_gradient():
    model, batch = fusion(), make_tokens(PRESENCE)
    packed, _ = model(batch)
    packed = torch.cat([packed[name][batch.masks[name]] for name in NAMES])
    dense = dense_fusion(model, batch)
    torch.testing.assert_close(packed, dense, rtol=0, atol=1e-10)
    direction = torch.randn(dense.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = [torch.autograd.grad((x * direction).sum(), list(model.parameters())) for x in (packed, dense)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_unpacking_gives_back_what_was_packed():
    batch = make_tokens(PRESENCE)
    stream, packing = pack(batch)
    assert len(stream) == sum(int(mask.sum()) for mask in batch.masks.values())
    for name, tokens in unpack(stream, packing).items():
        assert torch.equal(tokens, batch.tokens[name] * batch.masks[name].unsqueeze(-1))


def test_a_sample_does_not_depend_on_its_batch_mates_or_their_padding():
    model, batch = fusion(), make_tokens(PRESENCE)
    _, pooled = model(batch)
    for row, letters in enumerate(PRESENCE):
        if not letters:
            assert torch.equal(pooled[row], torch.zeros(WIDTH, dtype=torch.float64))
            continue
        alone = TokenBatch({}, {}, {}, 1)
        for name in NAMES:
            own = batch.rows[name] == row
            longest = int(batch.masks[name][own].sum()) or 1
            alone.tokens[name], alone.masks[name] = batch.tokens[name][own][:, :longest], batch.masks[name][own][:, :longest]
            alone.rows[name] = torch.zeros(int(own.sum()), dtype=torch.int64)
        torch.testing.assert_close(model(alone)[1][0], pooled[row], rtol=0, atol=1e-10)


@pytest.mark.parametrize("presence", [["t", "t"], ["a"], ["", ""]])
def test_every_parameter_has_a_finite_gradient_whatever_is_missing(presence):
    model = fusion()
    tokens, pooled = model(make_tokens(presence))
    (pooled.square().sum() + sum(x.sum() for x in tokens.values())).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    if presence[0]:
        assert model.blocks[0].across.null_value.grad.norm() > 0   # all that a lone modality can look across to


def test_evaluation_is_the_same_as_training():
    model, batch = fusion(), make_tokens(PRESENCE)
    with torch.no_grad():
        assert torch.equal(model.eval()(batch)[1], model.train()(batch)[1])
    # torch's own attention has a fast path in evaluation that skips adapters.
    kinds = {type(module) for module in model.modules()}
    assert not kinds & {nn.MultiheadAttention, nn.TransformerEncoderLayer}
