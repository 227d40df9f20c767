"""timm's NaFlexViT: pictures in their own aspect, each with as many tokens as it has patches.

Shape legend: n pictures, L patches of the longest, N tokens with the special ones, v values of a patch.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmfuse.modalities.base import PatchEncoder, masked_mean
from mmfuse.types import EncoderOutput, Features


class NaFlexEncoder(PatchEncoder):
    """`patches` uint8 `(n, L, v)`, `place (n, L, 2)`, `real (n, L)` -> all tokens, special ones first."""

    mean: Tensor
    std: Tensor

    def __init__(self, vit: Any, *, pooling: str) -> None:
        super().__init__()
        self.vit: Any = vit
        self.width, self.pooling, self.num_special = int(vit.num_features), pooling, int(vit.num_prefix_tokens)
        height, width = vit.embeds.patch_size
        self.num_values = 3 * height * width
        for name in ("mean", "std"):
            statistics = torch.tensor(vit.pretrained_cfg[name]).repeat(height * width) * 255
            self.register_buffer(name, statistics, persistent=False)

    def forward(self, inputs: Features) -> EncoderOutput:
        patches, real = self.patches(inputs)
        mask = torch.cat([real.new_ones(len(real), self.num_special), real], dim=1)
        tokens = self.vit.forward_features(
            patches.to(next(self.vit.parameters()).dtype),
            patch_coord=inputs["place"],
            patch_valid=real,
            attn_mask=mask[:, None, None],  # timm's own has rows without any key, whose softmax is NaN
        )["patches"]
        tokens = self.vit.fc_norm(tokens)  # where a model norms behind its pooling, it has no norm before it
        pooled = tokens[:, 0] if self.pooling == "cls" else masked_mean(self.patch_tokens(tokens), real)
        return EncoderOutput(tokens, mask, pooled)

    def patches(self, inputs: Features) -> tuple[Tensor, Tensor]:
        """Row by row of each picture; the values of a patch are its pixels, three channels each."""
        return (inputs["patches"].float() - self.mean.float()) / self.std.float(), inputs["real"]

    def hide(self, inputs: Features, hidden: Tensor) -> Features:
        patches = torch.where(hidden[..., None], self.mean.float(), inputs["patches"].float())
        return {**inputs, "patches": patches}

    def patch_tokens(self, tokens: Tensor) -> Tensor:
        return tokens[:, self.num_special :]

    def layers(self) -> Sequence[nn.Module]:
        return list(self.vit.blocks)

    def minimal_inputs(self, device: torch.device) -> Features:
        return {
            "patches": torch.zeros(1, 1, self.num_values, dtype=torch.uint8, device=device),
            "place": torch.zeros(1, 1, 2, dtype=torch.int64, device=device),
            "real": torch.ones(1, 1, dtype=torch.bool, device=device),
        }
