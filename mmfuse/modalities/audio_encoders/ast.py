"""The Audio Spectrogram Transformer (Gong et al. 2021) of transformers, for clips of any length."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers import ASTConfig, ASTModel

from mmfuse.modalities.audio_encoders.strips import StripEncoder
from mmfuse.modalities.audio_encoders.variable_length import VariableLengthEmbeddings
from mmfuse.modalities.base import find_layers, masked_mean
from mmfuse.types import EncoderOutput, Features


def build_ast(shape: ASTConfig, *, pretrained: str | None) -> ASTModel:
    """With pretrained or fresh weights."""
    if pretrained:
        return ASTModel.from_pretrained(pretrained, dtype=torch.float32)
    ast = ASTModel(shape)
    # transformers leaves these at 0, where the first norm makes gradients 10^6 times too large; the authors do this.
    embeddings = ast.embeddings
    for parameter in (embeddings.cls_token, embeddings.distillation_token, embeddings.position_embeddings):
        torch.nn.init.trunc_normal_(parameter, std=0.02)
    return ast


class AstEncoder(StripEncoder):
    """`fbank (n, frames, mel)`, `frames (n,)` -> AST's patch tokens, averaged over frequency."""

    def __init__(self, ast: ASTModel, *, pooling: str) -> None:
        super().__init__()
        self.ast, self.pooling = ast, pooling
        self.width, self.num_mel_bins = ast.config.hidden_size, ast.config.num_mel_bins
        patches = ast.embeddings.patch_embeddings.projection
        self.patch_size, self.time_stride = patches.kernel_size[1], patches.stride[1]
        self.frequency_patches, self.time_patches = ast.embeddings.get_shape(ast.config)
        ast.embeddings = VariableLengthEmbeddings(ast.embeddings)  # type: ignore[assignment]  # takes its place

    def forward(self, inputs: Features) -> EncoderOutput:
        fbank = inputs["fbank"]
        # AST masks patches, not frames; its two class tokens are always real.
        mask = self.real_tokens(inputs)
        time_patches = mask.shape[1]
        attention_mask = torch.cat([mask.new_ones(len(mask), 2), mask.repeat(1, self.frequency_patches)], dim=1)
        missing = (time_patches - 1) * self.time_stride + self.patch_size - fbank.shape[1]
        fbank = F.pad(fbank, (0, 0, 0, missing)).to(next(self.ast.parameters()).dtype)
        output = self.ast(input_values=fbank, attention_mask=attention_mask.long())
        patches = output.last_hidden_state[:, 2:].unflatten(1, (self.frequency_patches, time_patches))
        tokens = patches.mean(1)
        pooled = output.pooler_output if self.pooling == "cls" else masked_mean(tokens, mask)
        return EncoderOutput(tokens, mask, pooled)

    def layers(self) -> Sequence[nn.Module]:
        return find_layers(self.ast, self.ast.config.num_hidden_layers)
