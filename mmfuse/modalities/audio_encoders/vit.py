"""A Vision Transformer of timm that reads log-mel spectra up to a clip's length, also with weights from pictures, where
PSLA and AST began (Gong et al. 2021, arXiv 2102.01243 and 2104.01778).

Shape legend: n sounds, F patches in frequency, T in time, N tokens with the special ones, D width.
"""

from collections.abc import Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers.patch_embed import PatchEmbed
from timm.models import VisionTransformer
from torch import Tensor, nn

from mmfuse.errors import ConfigError
from mmfuse.modalities.audio_encoders.strips import StripEncoder
from mmfuse.modalities.base import masked_mean
from mmfuse.modalities.media.class_tokens import has_class_token
from mmfuse.types import EncoderOutput, Features

DEFAULT_VIT = "vit_tiny_patch16_224"


def build_vit(
    name: str, *, pretrained: bool, num_mel_bins: int, num_frames: int, sizes: dict[str, Any]
) -> VisionTransformer:
    """A ViT of one channel, whose positions are those of a full clip; pretrained ones are fitted.

    Raises:
        ConfigError: no ViT of that name, or none with positions for each patch.
    """
    try:
        vit = timm.create_model(
            name,
            pretrained=pretrained,
            in_chans=1,
            img_size=(num_mel_bins, num_frames),
            dynamic_img_size=True,
            num_classes=0,
            global_pool="",
            **sizes,
        )
    except (RuntimeError, TypeError, ValueError, OSError, AssertionError) as error:
        raise ConfigError(f"audio: {name} is no ViT that timm can build for spectra: {error}") from error
    if not isinstance(vit, VisionTransformer) or vit.pos_embed is None or type(vit.patch_embed) is not PatchEmbed:
        raise ConfigError(f"audio: {name} is no Vision Transformer with learned positions, such as {DEFAULT_VIT}")
    embed: Any = vit.patch_embed
    (height, width), (_, time_patches) = embed.patch_size, embed.grid_size
    if num_mel_bins % height or not time_patches:
        raise ConfigError(
            f"audio: patches of {height} mel bins and {width} frames do not fill num_mel_bins = {num_mel_bins} and "
            f"{num_frames} frames (clip_seconds)"
        )
    return vit


class VitAudioEncoder(StripEncoder):
    """The tokens of a ViT over the spectrum as a picture of one channel, frequency upwards."""

    def __init__(self, vit: VisionTransformer, *, num_mel_bins: int, pooling: str) -> None:
        super().__init__()
        if pooling == "cls" and not has_class_token(vit):
            raise ConfigError("audio.pooling = cls: this ViT has no class token; set it to mean")
        self.vit: Any = vit
        self.num_mel_bins, self.pooling = num_mel_bins, pooling
        self.width = int(vit.num_features)
        embed: Any = vit.patch_embed
        self.time_stride, (self.frequency_patches, self.time_patches) = int(embed.patch_size[1]), embed.grid_size

    def forward(self, inputs: Features) -> EncoderOutput:
        mask = self.real_tokens(inputs)
        length = mask.shape[1] * self.time_stride
        fbank = inputs["fbank"][:, :length]
        fbank = F.pad(fbank, (0, 0, 0, length - fbank.shape[1])).to(self.vit.patch_embed.proj.weight.dtype)
        special = self.vit.num_prefix_tokens
        visible = torch.cat([mask.new_ones(len(mask), special), mask.repeat(1, self.frequency_patches)], dim=1)
        x_nND = self._embed(fbank.transpose(1, 2)[:, None])
        for block in self.vit.blocks:
            x_nND = block(x_nND, attn_mask=visible[:, None, None])
        x_nND = self.vit.norm(x_nND)
        tokens = x_nND[:, special:].unflatten(1, (self.frequency_patches, -1)).mean(1)
        pooled = x_nND[:, 0] if self.pooling == "cls" else masked_mean(tokens, mask)
        return EncoderOutput(tokens, mask, pooled)

    def _embed(self, spectra: Tensor) -> Tensor:
        """Special tokens, then patches, each at its own position: timm would stretch those of a full clip over a short
        one, and what a sound becomes would depend on the longest of its batch."""
        vit, (frequency, time) = self.vit, (self.frequency_patches, self.time_patches)
        patches = vit.patch_embed(spectra)
        marks = [token.expand(len(spectra), -1, -1) for token in (vit.cls_token, vit.reg_token) if token is not None]
        before, grid = vit.pos_embed.split([vit.pos_embed.shape[1] - frequency * time, frequency * time], dim=1)
        placed = patches + grid.unflatten(1, (frequency, time))[:, :, : patches.shape[2]]
        if marks and before.shape[1]:
            marks = [torch.cat(marks, dim=1) + before]
        return vit.norm_pre(torch.cat([*marks, placed.flatten(1, 2)], dim=1))

    def layers(self) -> Sequence[nn.Module]:
        return list(self.vit.blocks)
