"""Masked language modelling (BERT, Devlin et al. 2019, arXiv 1810.04805) with cross-modal context: masked words are
predicted from the fused tokens of the caption, the picture and the sound, whichever the sample has.

Shape legend: n captions of this rank, L tokens, D width, m masked tokens, V vocabulary.
"""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mmfuse.distributed import sum_over_ranks, world_size
from mmfuse.errors import ConfigError
from mmfuse.hashing import hash_int
from mmfuse.modalities import text
from mmfuse.model.model import ModelConfig, at_least_fp32
from mmfuse.objectives.base import Need, Objective, ObjectiveConfig, StepInputs, Term, fuse_masked
from mmfuse.randomness import keyed_uniform
from mmfuse.types import ModalityBatch

_REPLACED_BY_MASK, _REPLACED_BY_RANDOM = 0.8, 0.1


class Config(ObjectiveConfig):
    """Masked language modelling."""

    mask_ratio: float = Field(default=0.15, gt=0, lt=1)
    """Share of the tokens that are predicted; special tokens never are."""

    def needs(self, name: str, modalities: tuple[str, ...]) -> list[Need]:
        return [Need(name, (frozenset({"text"}),))]

    def build(self, model: ModelConfig, *, seed: int) -> "MaskedLanguage":
        config = model.modalities.get("text")
        if not isinstance(config, text.Config):
            raise ConfigError("objectives.masked_language needs the modality text")
        return MaskedLanguage(self, config, model.width, seed=hash_int(seed, "masked_language"))


class MaskedLanguage(Objective):
    """Cross-entropy on masked positions only."""

    special_ids: Tensor

    def __init__(self, config: Config, text_config: text.Config, width: int, *, seed: int) -> None:
        super().__init__()
        self.mask_ratio, self.seed = config.mask_ratio, seed
        self.vocab_size = text_config.vocab_size
        tokenizer = text_config.build_tokenizer()
        self.mask_id = int(tokenizer.mask_token_id)
        self.register_buffer("special_ids", torch.tensor(tokenizer.all_special_ids), persistent=False)
        self.transform = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.decoder = nn.Linear(width, self.vocab_size)

    def forward(self, inputs: StepInputs) -> dict[str, Term]:
        model, batch = inputs.model, inputs.batch
        part = batch.inputs.get("text")
        masked_part, targets_nL = None, torch.zeros(0, 1, dtype=torch.int64, device=batch.present.device)
        if part is not None:
            masked_ids, targets_nL = self._mask(part, batch.sample_id[part.rows], batch.step)
            masked_part = ModalityBatch(part.rows, {**part.inputs, "input_ids": masked_ids})
        tokens, _, _ = model.encode_modality("text", masked_part, batch.present.device)
        fused = fuse_masked(inputs, "text", tokens, seed=self.seed)
        predicted_nL = targets_nL >= 0
        logits_mV = at_least_fp32(self.decoder(self.transform(fused.tokens["text"][predicted_nL])))
        losses_m = F.cross_entropy(logits_mV, targets_nL[predicted_nL], reduction="none")
        loss = losses_m.sum() * world_size() / sum_over_ranks(predicted_nL.sum()).clamp(min=1)
        text_rows = part.rows if part is not None else predicted_nL.new_zeros(0, dtype=torch.int64)
        return {"masked_language": Term(loss, text_rows[predicted_nL.nonzero()[:, 0]], losses_m.detach())}

    def _mask(self, part: ModalityBatch, sample_id: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Ids with the chosen tokens changed (80% [MASK], 10% random, 10% kept), and targets, -1 elsewhere."""
        ids = part.inputs["input_ids"]
        position = torch.arange(ids.shape[1], device=ids.device)
        choice, change, word = (keyed_uniform(self.seed + i, step, sample_id[:, None], position) for i in range(3))
        ordinary = part.inputs["attention_mask"] & ~torch.isin(ids, self.special_ids)
        chosen = ordinary & (choice < self.mask_ratio)
        random_ids = (word * self.vocab_size).long()
        masked = torch.where(chosen & (change < _REPLACED_BY_MASK), self.mask_id, ids)
        masked = torch.where(chosen & (change >= 1 - _REPLACED_BY_RANDOM), random_ids, masked)
        return masked, torch.where(chosen, ids, -1)
