"""The model: encoders, projections to a shared width, fusion, and embeddings.

Shape legend: B rows of the batch, n rows that have a modality, L tokens, D fusion width, E embedding.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, Field, PositiveInt, model_validator
from torch import Tensor, nn

from mmfuse.config import PluginSettings, Settings, plugin_settings
from mmfuse.errors import ConfigError
from mmfuse.modalities.base import Encoder, ModalityConfig
from mmfuse.model.concat import ConcatFusion
from mmfuse.model.fusion import Fusion, FusionConfig
from mmfuse.model.variants import without_each
from mmfuse.types import Batch, Encoded, Features, FusionOutput, ModalityBatch, TokenBatch


def _modalities(value: Any) -> Any:
    return plugin_settings("mmfuse.modalities", value)


class ModelConfig(Settings):
    """Modalities, what joins them, and the space in which they meet."""

    modalities: Annotated[PluginSettings, BeforeValidator(_modalities)] = Field(min_length=1)
    """By the name of a file in `mmfuse/modalities`."""
    width: PositiveInt = 128
    """D of the fusion; every modality is projected to it."""
    embedding_dim: PositiveInt = 64
    fusion: FusionConfig | None = FusionConfig()
    """Null: encoders only."""

    @model_validator(mode="after")
    def _check_heads(self) -> "ModelConfig":
        if self.fusion and self.width % self.fusion.num_heads:
            raise ValueError(f"width = {self.width} is not a multiple of fusion.num_heads = {self.fusion.num_heads}")
        return self

    @property
    def modality_configs(self) -> dict[str, ModalityConfig]:
        """`modalities` with the type that their files promise."""
        configs = {}
        for name, config in self.modalities.items():
            assert isinstance(config, ModalityConfig)
            configs[name] = config
        return configs

    def save_files(self, folder: Path) -> None:
        """What the modalities' settings name only, in a folder for each; see `ModalityConfig.save_files`."""
        for name, config in self.modality_configs.items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            config.save_files(folder / name)

    def with_files(self, folder: Path) -> Self:
        """The settings of the same model without pretrained weights, that reads what `save_files` wrote."""
        modalities = {name: config.with_files(folder / name) for name, config in self.modality_configs.items()}
        return self.model_copy(update={"modalities": modalities})


def at_least_fp32(x: Tensor) -> Tensor:
    """`x` in fp32, or in fp64 where it came so: the tests compare ranks at 1e-12."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _build_encoder(name: str, config: ModalityConfig) -> Encoder:
    try:
        return config.build_trained_encoder()
    except ConfigError as error:
        raise ConfigError(f"model.modalities.{name}: {error}") from error


class FusionModel(nn.Module):
    """Encodes any subset of the modalities of each sample, and fuses them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.modalities = tuple(config.modalities)
        encoders = {name: _build_encoder(name, modality) for name, modality in config.modality_configs.items()}
        widths = {name: encoder.width for name, encoder in encoders.items()}
        self.encoders = nn.ModuleDict(encoders)
        # Only the fusion uses them; a parameter without a gradient would stop DDP.
        self.projections = nn.ModuleDict(
            {name: nn.Linear(widths[name], config.width) if config.fusion else nn.Identity() for name in widths}
        )
        self.heads = nn.ModuleDict(
            {name: nn.Linear(widths[name], config.embedding_dim, bias=False) for name in self.modalities}
        )
        self.fusion: Fusion | ConcatFusion | None = None
        self.modality_dropout = config.fusion.modality_dropout if config.fusion else 0.0
        if config.fusion:
            joins = ConcatFusion if config.fusion.variant == "concat" else Fusion
            self.fusion = joins(config.fusion, modalities=self.modalities, width=config.width)
            self.fused_head = nn.Linear(config.width, config.embedding_dim, bias=False)

    @property
    def blocks(self) -> list[nn.Module]:
        """The repeated ones of all encoders and of the fusion: what engines shard and `model/blocks.py` changes."""
        encoders = [encoder for encoder in self.encoders.values() if isinstance(encoder, Encoder)]
        fused = self.fusion.blocks if isinstance(self.fusion, Fusion) else ()
        return [*(layer for encoder in encoders for layer in encoder.layers()), *fused]

    def encode(self, batch: Batch) -> Encoded:
        """Every modality's tokens and embeddings; each encoder runs once, also where the batch lacks its modality."""
        tokens, masks, rows, embeddings = {}, {}, {}, {}
        for name in self.modalities:
            part = batch.inputs.get(name)
            tokens[name], masks[name], pooled_nE = self.encode_modality(name, part, batch.present.device)
            rows[name] = part.rows if part else batch.sample_id[:0]
            embedding = F.normalize(at_least_fp32(pooled_nE), dim=-1)
            embeddings[name] = embedding.new_zeros(len(batch.present), embedding.shape[-1]).index_copy(
                0, rows[name], embedding
            )
        return Encoded(TokenBatch(tokens, masks, rows, len(batch.present)), embeddings)

    def encode_modality(
        self, name: str, part: ModalityBatch | None, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens `(n, L, D)`, mask `(n, L)` and unnormalised embedding `(n, E)`.

        Without a part, one minimal row goes through and is cut off: a rank that skipped a module would hang the others.
        What is left has no rows but is still connected, so that the rank goes back through the same modules too.
        """
        encoder = self.encoders[name]
        assert isinstance(encoder, Encoder)
        inputs: Features = part.inputs if part else encoder.minimal_inputs(device)
        output = encoder(inputs)
        tokens_nLD = self.projections[name](output.tokens)
        pooled_nE = self.heads[name](output.pooled)
        if part:
            return tokens_nLD, output.mask, pooled_nE
        return tokens_nLD[:0], output.mask[:0], pooled_nE[:0]

    def fuse(self, batch: TokenBatch) -> FusionOutput:
        """Fused tokens, pooled vectors and embeddings of any token batch.

        Raises:
            AssertionError: the model was built without fusion; RunConfig refuses such runs.
        """
        assert self.fusion is not None, "model.fusion is null"
        tokens, pooled_BD = self.fusion(batch)
        return FusionOutput(tokens, pooled_BD, F.normalize(at_least_fp32(self.fused_head(pooled_BD)), dim=-1))

    def embed_without_each(self, batch: TokenBatch, complete: Tensor) -> dict[str, Tensor]:
        """By the modality left out, what the fusion makes of a sample's others: `(B, E)`; zeros where not `complete`.

        Args:
            complete: bool `(B,)`, which samples have every modality.
        """
        fused = self.fuse(without_each(batch, dict.fromkeys(self.modalities, complete))).embedding
        rows = complete.nonzero()[:, 0]
        parts = fused.split([len(rows)] * len(self.modalities))
        empty = fused.new_zeros(len(complete), fused.shape[-1])
        return {name: empty.index_copy(0, rows, part) for name, part in zip(self.modalities, parts, strict=True)}

    def embed(self, batch: Batch) -> Mapping[str, Tensor]:
        """`(B, E)` by modality, and as `fused` the whole sample; zeros where a row lacks it."""
        encoded = self.encode(batch)
        fused = {"fused": self.fuse(encoded.token_batch).embedding} if self.fusion else {}
        return {**encoded.embeddings, **fused}
