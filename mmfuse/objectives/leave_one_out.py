"""Leave-one-out: fuse all of a sample's modalities but one, and contrast the fused embedding with the one left out.

This is what makes the fused embedding good for retrieval. Samples with every modality take part as queries; the
candidates are all samples of the global batch that have the modality left out, as in `contrastive`.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from mmfuse.errors import ConfigError
from mmfuse.model.model import ModelConfig
from mmfuse.objectives.base import Comparison, Need, ObjectiveConfig, StepInputs, Term
from mmfuse.objectives.contrastive import INITIAL_LOGIT_SCALE, exp_clamped, modality_sides, stack_embeddings
from mmfuse.objectives.pairs.candidates import CandidateConfig, Side
from mmfuse.objectives.pairs.contrast import Pair, contrast
from mmfuse.types import Batch


class Config(ObjectiveConfig):
    """Leave-one-out contrast of the fused embedding."""

    trains_fused_embedding: ClassVar[bool] = True
    candidates: CandidateConfig = CandidateConfig()

    def needs(self, name: str, modalities: tuple[str, ...]) -> list[Need]:
        return [Need(name, (frozenset(modalities),))]

    def build(self, model: ModelConfig, *, seed: int) -> "LeaveOneOut":
        if len(model.modalities) < 3:
            raise ConfigError("objectives.leave_one_out needs at least three modalities")
        return LeaveOneOut(len(model.modalities), self)


class LeaveOneOut(Comparison):
    """Mean InfoNCE between each modality and the fusion of the others."""

    def __init__(self, num_modalities: int, config: Config) -> None:
        super().__init__()
        self.candidates = config.candidates
        self.logit_scale = nn.Parameter(torch.full((num_modalities,), INITIAL_LOGIT_SCALE))

    def represent(self, inputs: StepInputs) -> Tensor:
        """The modalities' embeddings, then the fusions without each of them."""
        mixed = inputs.model.embed_without_each(inputs.encoded.token_batch, inputs.batch.present.all(1))
        return torch.cat([stack_embeddings(inputs), torch.stack(list(mixed.values()), dim=1)], dim=1)

    def compare(self, vectors: Tensor, parameters: Mapping[str, Tensor], batch: Batch) -> dict[str, Term]:
        names, complete = batch.modalities, batch.present.all(1)
        embeddings, mixed = vectors.split(len(names), dim=1)
        sides = modality_sides(embeddings, batch)
        sides |= {f"without {name}": Side(part, complete) for name, part in zip(names, mixed.unbind(1), strict=True)}
        scales = exp_clamped(parameters["logit_scale"])
        pairs = [Pair(f"without {name}", name, scale) for name, scale in zip(names, scales, strict=True)]
        terms = contrast(sides, pairs, batch, self.candidates)
        loss = torch.stack([term.loss for term in terms]).mean()
        rows, row_losses = (torch.cat(parts) for parts in zip(*(term[1:] for term in terms), strict=True))
        return {"leave_one_out": Term(loss, rows, row_losses)}
