"""Masked patches (MAE, He et al. 2021, arXiv 2111.06377, with hidden patches left in their places as in SimMIM, Xie et
al. 2021, arXiv 2111.09886): hidden pieces of a picture or sound are predicted from the fused tokens of what is left of
it and of the sample's other modalities.

Shape legend: n members of this rank, P patches, v values of a patch, D width, m hidden patches.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmfuse.distributed import sum_over_ranks, world_size
from mmfuse.errors import ConfigError
from mmfuse.hashing import hash_int
from mmfuse.modalities.base import PatchEncoder
from mmfuse.model.model import ModelConfig, at_least_fp32
from mmfuse.objectives.base import Objective, StepInputs, Term
from mmfuse.randomness import keyed_uniform
from mmfuse.types import Batch, ModalityBatch

_LEAST_VARIANCE = 1e-6
"""As MAE: a patch of one colour has none."""


class MaskedPatches(Objective):
    """Mean squared error over the values of each hidden patch, which are normalised by its own mean and deviation."""

    def __init__(self, name: str, model: ModelConfig, *, modality: str, mask_ratio: float, seed: int) -> None:
        """Raises a ConfigError where the model lacks the modality, or its encoder has no patches."""
        super().__init__()
        config = model.modality_configs.get(modality)
        if config is None:
            raise ConfigError(f"objectives.{name} needs the modality {modality}")
        values = config.count_patch_values()
        if values is None:
            raise ConfigError(
                f"objectives.{name}: the encoder of modality {modality} has no patches that could be hidden"
            )
        self.name, self.modality, self.mask_ratio, self.seed = name, modality, mask_ratio, hash_int(seed, name)
        self.decoder = nn.Sequential(nn.Linear(model.width, model.width), nn.GELU(), nn.Linear(model.width, values))

    def forward(self, inputs: StepInputs) -> dict[str, Term]:
        model, batch = inputs.model, inputs.batch
        encoder = model.encoders[self.modality]
        assert isinstance(encoder, PatchEncoder)
        part = batch.inputs.get(self.modality)
        hidden = self._hide(encoder, part, batch) if part is not None else None
        tokens, _, _ = model.encode_modality(self.modality, hidden and hidden.part, batch.present.device)
        source = inputs.encoded.token_batch
        fused = model.fuse(source._replace(tokens={**source.tokens, self.modality: tokens}))
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
    variance, mean = torch.var_mean(patches_mv, dim=1, keepdim=True)
    return (patches_mv - mean) / (variance + _LEAST_VARIANCE).sqrt()
