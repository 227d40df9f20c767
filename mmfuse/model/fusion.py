"""Fusion by attention over packed tokens; any subset of modalities in each sample.

The variants differ only in who sees whom:

    cross        within the modality, then the sample's other modalities
    merged       all tokens of the sample at once, as in ViLT (Kim et al. 2021)
    bottleneck   within the modality and a few learned tokens of the sample, which see all: what modalities know of each
                 other goes through these, as in MBT (Nagrani et al. 2021)

`concat.py` is the fourth variant, without attention.

Plain `nn.Linear` and SDPA only: torch's own `nn.MultiheadAttention` takes a fast path in evaluation that silently
ignores adapters such as LoRA.

Shape legend: N packed tokens, D width, H heads, d head width, B samples, g samples of a group, q/k its queries/keys.
"""

from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from mmfuse.config import Settings
from mmfuse.modalities.base import masked_mean
from mmfuse.model.pack import AttentionLayout, Packing, View, pack, unpack
from mmfuse.types import TokenBatch

_BOTTLENECK = "bottleneck"


class FusionConfig(Settings):
    """What joins the modalities of a sample."""

    variant: Literal["cross", "merged", "bottleneck", "concat"] = "cross"
    """`concat` has no attention: an MLP over the modalities' mean tokens, to compare with."""
    num_layers: PositiveInt = 2
    num_heads: PositiveInt = 4
    """Of attention."""
    num_bottlenecks: PositiveInt = 4
    """Learned tokens of a sample with the variant `bottleneck`."""
    mlp_ratio: PositiveInt = 4
    """Width of the hidden layer relative to the fusion width."""
    modality_dropout: float = Field(default=0.0, ge=0, lt=1)
    """How often each other modality of a sample is left out where masked words or patches are predicted, so that
    samples which lack it are no surprise. Drawn by sample."""


class Attention(nn.Module):
    """Multi-head attention within groups, with a learned null key: a sample with one modality has no empty softmax."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        self.null_key = nn.Parameter(torch.randn(width) * 0.02)
        self.null_value = nn.Parameter(torch.zeros(width))

    def forward(self, x_ND: Tensor, layout: AttentionLayout) -> Tensor:
        """`(N, D)` -> `(N, D)`."""
        q_NHd, k_NHd, v_NHd = (
            linear(x_ND).unflatten(-1, (self.num_heads, -1)) for linear in (self.query, self.key, self.value)
        )
        null_k, null_v = (
            null.to(x_ND.dtype).view(1, 1, self.num_heads, -1) for null in (self.null_key, self.null_value)
        )
        # Empty, but connected to everything: a rank without any token still has every gradient. Cut first, then added:
        # the gradients of a sum are one memory, in which DDP would overwrite the first by the second.
        outputs = [q_NHd[:0] + k_NHd[:0] + v_NHd[:0] + null_k[0, :0] + null_v[0, :0]]
        for group in layout.groups:
            size = len(group.key_gk)
            k = torch.cat([null_k.expand(size, -1, -1, -1), k_NHd[group.key_gk]], dim=1)
            v = torch.cat([null_v.expand(size, -1, -1, -1), v_NHd[group.key_gk]], dim=1)
            visible_gk = torch.cat([group.key_mask_gk.new_ones(size, 1), group.key_mask_gk], dim=1)
            attended = F.scaled_dot_product_attention(
                q_NHd[group.query_gq].transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), visible_gk[:, None, None]
            )
            outputs.append(attended.transpose(1, 2)[group.query_mask_gq])
        return self.output(torch.cat(outputs)[layout.inverse_N].flatten(1))


class Block(nn.Module):
    """One attention for each view, then an MLP; each pre-normalised and added."""

    def __init__(self, width: int, config: FusionConfig, *, views: Iterable[str]) -> None:
        super().__init__()
        self.norms = nn.ModuleDict({view: nn.LayerNorm(width) for view in views})
        self.mlp_norm = nn.LayerNorm(width)
        self.attentions = nn.ModuleDict({view: Attention(width, config.num_heads) for view in views})
        self.mlp = make_mlp(width, config.mlp_ratio * width)

    def forward(self, x_ND: Tensor, packing: Packing) -> Tensor:
        for view, attention in self.attentions.items():
            x_ND = x_ND + attention(self.norms[view](x_ND), packing.layouts[view])
        return x_ND + self.mlp(self.mlp_norm(x_ND))


class Fusion(nn.Module):
    """Blocks over the packed stream."""

    def __init__(self, config: FusionConfig, *, modalities: tuple[str, ...], width: int) -> None:
        super().__init__()
        self.modalities = modalities
        self.views = make_views(config.variant, modalities)
        self.modality_embedding = nn.Parameter(torch.randn(len(modalities), width) * 0.02)
        self.bottleneck: nn.Parameter | None = None
        if config.variant == "bottleneck":
            self.bottleneck = nn.Parameter(torch.randn(config.num_bottlenecks, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, config, views=self.views) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, batch: TokenBatch) -> tuple[dict[str, Tensor], Tensor]:
        """Fused tokens `(n, L, D)` per modality, and pooled `(B, D)`.

        Raises:
            KeyError: a modality that the fusion was not built for.
        """
        marked = {
            name: batch.tokens[name] + self.modality_embedding[number].to(batch.tokens[name].dtype)
            for number, name in enumerate(self.modalities)
        }
        asking = batch._replace(tokens=marked)
        if self.bottleneck is not None:
            asking = _add_bottleneck(asking, self.bottleneck)
        x_ND, packing = pack(asking, self.views)
        for block in self.blocks:
            x_ND = block(x_ND, packing)
        unpacked = unpack(self.norm(x_ND), packing)
        tokens = {name: unpacked[name] for name in self.modalities}
        return tokens, pool_modalities(tokens, batch)


def make_views(variant: str, modalities: tuple[str, ...]) -> dict[str, View]:
    """Who sees whom in the attentions of each block, in their order."""
    match variant:
        case "cross":
            others = {name: tuple(other for other in modalities if other != name) for name in modalities}
            return {"within": {name: (name,) for name in modalities}, "across": others}
        case "merged":
            return {"joint": dict.fromkeys(modalities, modalities)}
        case "bottleneck":
            through = {name: (name, _BOTTLENECK) for name in modalities}
            return {"through": {**through, _BOTTLENECK: (*modalities, _BOTTLENECK)}}
        case _:
            raise AssertionError(variant)


def make_mlp(width: int, hidden: int) -> nn.Sequential:
    """Two layers around a GELU."""
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


def _add_bottleneck(batch: TokenBatch, bottleneck_KD: Tensor) -> TokenBatch:
    """The learned tokens as one more modality that every sample has."""
    rows = torch.arange(batch.num_rows, device=bottleneck_KD.device)
    dtype = next(iter(batch.tokens.values())).dtype
    tokens = bottleneck_KD.to(dtype).expand(batch.num_rows, -1, -1)
    mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=rows.device)
    return TokenBatch(
        {**batch.tokens, _BOTTLENECK: tokens},
        {**batch.masks, _BOTTLENECK: mask},
        {**batch.rows, _BOTTLENECK: rows},
        batch.num_rows,
    )


def pool_modalities(tokens: dict[str, Tensor], batch: TokenBatch) -> Tensor:
    """Mean over a sample's modalities of their mean token, `(B, D)`."""
    first = next(iter(tokens.values()))
    total = first.new_zeros(batch.num_rows, first.shape[-1])
    count = first.new_zeros(batch.num_rows, 1)
    for name, rows in batch.rows.items():
        total = total.index_add(0, rows, masked_mean(tokens[name], batch.masks[name]))
        count = count.index_add(0, rows, count.new_ones(len(rows), 1))
    return total / count.clamp(min=1)
