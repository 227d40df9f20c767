"""Fusion by cross-attention over packed tokens; any subset of modalities in each sample.

Plain `nn.Linear` and SDPA only: torch's own `nn.MultiheadAttention` takes a fast path in evaluation that silently
ignores adapters such as LoRA.

Shape legend: N packed tokens, D width, H heads, d head width, B samples, g samples of a group, q/k its queries/keys.
"""

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from mmfuse.config import Settings
from mmfuse.modalities.base import masked_mean
from mmfuse.model.pack import AttentionLayout, Packing, pack, unpack
from mmfuse.types import TokenBatch


class FusionConfig(Settings):
    """Packed cross-attention."""

    num_layers: PositiveInt = 2
    num_heads: PositiveInt = 4
    mlp_ratio: PositiveInt = 4
    """Width of the hidden layer relative to the fusion width."""


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
    """Self-attention within a modality, cross-attention to the sample's other modalities, MLP; each pre-normalised."""

    def __init__(self, width: int, config: FusionConfig) -> None:
        super().__init__()
        self.within_norm, self.across_norm, self.mlp_norm = (nn.LayerNorm(width) for _ in range(3))
        self.within = Attention(width, config.num_heads)
        self.across = Attention(width, config.num_heads)
        hidden = config.mlp_ratio * width
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x_ND: Tensor, packing: Packing) -> Tensor:
        x_ND = x_ND + self.within(self.within_norm(x_ND), packing.within)
        x_ND = x_ND + self.across(self.across_norm(x_ND), packing.across)
        return x_ND + self.mlp(self.mlp_norm(x_ND))


class Fusion(nn.Module):
    """Blocks over the packed stream."""

    def __init__(self, config: FusionConfig, *, modalities: tuple[str, ...], width: int) -> None:
        super().__init__()
        self.modalities = modalities
        self.modality_embedding = nn.Parameter(torch.randn(len(modalities), width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, config) for _ in range(config.num_layers))
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
        x_ND, packing = pack(batch._replace(tokens=marked))
        for block in self.blocks:
            x_ND = block(x_ND, packing)
        tokens = unpack(self.norm(x_ND), packing)
        return tokens, _pool(tokens, batch)


def _pool(tokens: dict[str, Tensor], batch: TokenBatch) -> Tensor:
    """Mean over a sample's modalities of their mean token, `(B, D)`."""
    first = next(iter(tokens.values()))
    total = first.new_zeros(batch.num_rows, first.shape[-1])
    count = first.new_zeros(batch.num_rows, 1)
    for name, rows in batch.rows.items():
        total = total.index_add(0, rows, masked_mean(tokens[name], batch.masks[name]))
        count = count.index_add(0, rows, count.new_ones(len(rows), 1))
    return total / count.clamp(min=1)
