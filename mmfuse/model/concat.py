"""Fusion without attention: an MLP over the modalities' mean tokens side by side, a learned vector where one is absent.

What attention is compared with, and cheaper than it. Its result goes back to every token, so that objectives which read
tokens have context too.

Shape legend: B samples, M modalities, D width.
"""

import torch
from torch import Tensor, nn

from mmfuse.modalities.base import masked_mean
from mmfuse.model.fusion import FusionConfig, make_mlp, pool_modalities
from mmfuse.types import TokenBatch


class ConcatFusion(nn.Module):
    """The interface of `Fusion`."""

    def __init__(self, config: FusionConfig, *, modalities: tuple[str, ...], width: int) -> None:
        super().__init__()
        self.modalities = modalities
        self.absent = nn.Parameter(torch.randn(len(modalities), width) * 0.02)
        self.join = nn.Linear(len(modalities) * width, width)
        hidden = config.mlp_ratio * width
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(config.num_layers))
        self.mlps = nn.ModuleList(make_mlp(width, hidden) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, batch: TokenBatch) -> tuple[dict[str, Tensor], Tensor]:
        """Fused tokens `(n, L, D)` per modality, and pooled `(B, D)`."""
        parts = []
        for number, name in enumerate(self.modalities):
            means = masked_mean(batch.tokens[name], batch.masks[name])
            absent_BD = self.absent[number].to(means.dtype).expand(batch.num_rows, -1)
            parts.append(absent_BD.index_copy(0, batch.rows[name], means))
        x_BD = self.join(torch.cat(parts, dim=1))
        for norm, mlp in zip(self.norms, self.mlps, strict=True):
            x_BD = x_BD + mlp(norm(x_BD))
        tokens = {}
        for name in self.modalities:
            fused = self.norm(batch.tokens[name] + x_BD[batch.rows[name], None])
            tokens[name] = fused * batch.masks[name].unsqueeze(-1)  # nothing in padding
        return tokens, pool_modalities(tokens, batch)
