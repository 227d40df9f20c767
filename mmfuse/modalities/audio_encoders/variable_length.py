"""The patch embeddings of an Audio Spectrogram Transformer for clips of any length."""

import math

import torch
from torch import Tensor, nn
from transformers.models.audio_spectrogram_transformer.modeling_audio_spectrogram_transformer import ASTEmbeddings


class VariableLengthEmbeddings(nn.Module):
    """The ASTEmbeddings it is made of, for any number of frames: takes the positions of the patches that are there."""

    def __init__(self, full: ASTEmbeddings) -> None:
        super().__init__()
        self.cls_token, self.distillation_token = full.cls_token, full.distillation_token
        self.position_embeddings = full.position_embeddings
        self.patch_embeddings, self.dropout = full.patch_embeddings, full.dropout
        self.grid = full.get_shape(full.config)

    def forward(self, input_values: Tensor) -> Tensor:
        patches = self.patch_embeddings(input_values)
        time_patches = patches.shape[1] // self.grid[0]
        special, grid = self.position_embeddings.split([2, math.prod(self.grid)], dim=1)
        positions = grid.unflatten(1, self.grid)[:, :, :time_patches].flatten(1, 2)
        marks = torch.cat([self.cls_token, self.distillation_token], dim=1) + special
        return self.dropout(torch.cat([marks.expand(len(patches), -1, -1), patches + positions], dim=1))
