"""Masked patches (MAE, He et al. 2021, arXiv 2111.06377, with hidden patches left in their places as in SimMIM, Xie et
al. 2021, arXiv 2111.09886): hidden pieces of a picture or sound are predicted from the fused tokens of what is left of
it and of the sample's other modalities.

Shape legend: n members of this rank, P patches, v values of a patch, D width, m hidden patches.
"""

from typing import ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from mmfuse.distributed import sum_over_ranks, world_size
from mmfuse.errors import ConfigError
from mmfuse.hashing import hash_int
from mmfuse.modalities.base import PatchEncoder
from mmfuse.model.model import ModelConfig, at_least_fp32
from mmfuse.objectives.base import Need, Objective, ObjectiveConfig, StepInputs, Term, fuse_masked
from mmfuse.randomness import keyed_uniform
from mmfuse.types import Batch, ModalityBatch

_LEAST_VARIANCE = 1e-6
"""As MAE: a patch of one colour has none."""


class MaskedPatchesConfig(ObjectiveConfig):
    """Settings of `masked_MODALITY`."""

    modality: ClassVar[str]
    mask_ratio: float = Field(gt=0, lt=1)

    def needs(self, name: str, modalities: tuple[str, ...]) -> list[Need]:
        return [Need(name, (frozenset({self.modality}),))]

    def build(self, model: ModelConfig, *, seed: int) -> "MaskedPatches":
        return MaskedPatches(self, model, seed=seed)


class MaskedPatches(Objective):
    """Mean squared error over the values of each hidden patch, which are normalised by its own mean and deviation."""

    def __init__(self, config: MaskedPatchesConfig, model: ModelConfig, *, seed: int) -> None:
        """Raises a ConfigError where the model lacks the modality, or its encoder has no patches."""
        super().__init__()
        self.modality, self.mask_ratio = config.modality, config.mask_ratio
        self.name = f"masked_{self.modality}"
        self.seed = hash_int(seed, self.name)
        encoded = model.modality_configs.get(self.modality)
        if encoded is None:
            raise ConfigError(f"objectives.{self.name} needs the modality {self.modality}")
        values = encoded.count_patch_values()
        if values is None:
            raise ConfigError(
                f"objectives.{self.name}: the encoder of modality {self.modality} has no patches that could be hidden"
            )
        self.decoder = nn.Sequential(nn.Linear(model.width, model.width), nn.GELU(), nn.Linear(model.width, values))

    def forward(self, inputs: StepInputs) -> dict[str, Term]:
        model, batch = inputs.model, inputs.batch
        encoder = model.encoders[self.modality]
        assert isinstance(encoder, PatchEncoder)
        part = batch.inputs.get(self.modality)
        hidden = self._hide(encoder, part, batch) if part is not None else None
        tokens, _, _ = model.encode_modality(self.modality, hidden and hidden.part, batch.present.device)
        fused = fuse_masked(inputs, self.modality, tokens, seed=self.seed)
        tokens_nPD = encoder.patch_tokens(fused.tokens[self.modality])
        if hidden is None:
            hidden = _nothing(tokens_nPD, rows=batch.sample_id[:0])
        predicted_mv = at_least_fp32(self.decoder(tokens_nPD[hidden.hidden_nP]))
        losses_m = (predicted_mv - hidden.targets_mv.to(predicted_mv.dtype)).square().mean(1)
        loss = losses_m.sum() * world_size() / sum_over_ranks(hidden.hidden_nP.sum()).clamp(min=1)
        rows_m = hidden.part.rows[hidden.hidden_nP.nonzero()[:, 0]]
        return {self.name: Term(loss, rows_m, losses_m.detach())}

    def _hide(self, encoder: PatchEncoder, part: ModalityBatch, batch: Batch) -> "_Hidden":
        """Patches drawn by sample, whatever its company."""
        patches_nPv, real_nP = encoder.patches(part.inputs)
        place = torch.arange(patches_nPv.shape[1], device=real_nP.device)
        drawn_nP = keyed_uniform(self.seed, batch.step, batch.sample_id[part.rows][:, None], place) < self.mask_ratio
        hidden_nP = real_nP & drawn_nP
        without = ModalityBatch(part.rows, encoder.hide(part.inputs, hidden_nP))
        return _Hidden(without, hidden_nP, _normalise(patches_nPv[hidden_nP]))


class _Hidden(NamedTuple):
    """Members without some of their patches."""

    part: ModalityBatch
    hidden_nP: Tensor
    targets_mv: Tensor


def _nothing(tokens_nPD: Tensor, *, rows: Tensor) -> _Hidden:
    """Where the batch lacks the modality."""
    hidden_nP = torch.zeros(tokens_nPD.shape[:2], dtype=torch.bool, device=rows.device)
    return _Hidden(ModalityBatch(rows, {}), hidden_nP, tokens_nPD.new_zeros(0, 1))


def _normalise(patches_mv: Tensor) -> Tensor:
    """Each patch by its own mean and variance; MAE found that this makes better features."""
    centred_mv = patches_mv - patches_mv.mean(1, keepdim=True)
    variance = centred_mv.square().sum(1, keepdim=True) / (patches_mv.shape[1] - 1)  # torch.var warns where m is 0
    return centred_mv / (variance + _LEAST_VARIANCE).sqrt()
