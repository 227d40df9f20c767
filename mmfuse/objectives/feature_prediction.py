"""Cross-modal feature prediction: what the fusion of a sample's other modalities tells of the embedding of the one left
out. The target gets no gradient (BYOL, Grill et al. 2020, arXiv 2006.07733), so it needs an objective that shapes it.

Shape legend: B rows of this rank, k predictions of a modality, D width, E embedding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfuse.distributed import sum_over_ranks, world_size
from mmfuse.errors import ConfigError
from mmfuse.model.model import ModelConfig, at_least_fp32
from mmfuse.model.variants import without_each
from mmfuse.objectives.base import Need, Objective, ObjectiveConfig, StepInputs, Term, every_pair


class Config(ObjectiveConfig):
    """Prediction of embeddings from the other modalities."""

    def needs(self, name: str, modalities: tuple[str, ...]) -> list[Need]:
        return [Need(name, every_pair(modalities))]

    def build(self, model: ModelConfig, *, seed: int) -> "FeaturePrediction":
        if len(model.modalities) < 2:
            raise ConfigError("objectives.feature_prediction needs at least two modalities")
        return FeaturePrediction(tuple(model.modalities), model.width, model.embedding_dim)


class FeaturePrediction(Objective):
    """1 - cosine between prediction and embedding, the mean over every modality of every sample that has another."""

    def __init__(self, modalities: tuple[str, ...], width: int, embedding_dim: int) -> None:
        super().__init__()
        self.predictors = nn.ModuleDict(
            {
                name: nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, embedding_dim))
                for name in modalities
            }
        )

    def forward(self, inputs: StepInputs) -> dict[str, Term]:
        batch, embeddings = inputs.batch, inputs.encoded.embeddings
        has_another = batch.present.sum(1) > 1
        columns = dict(zip(batch.modalities, batch.present.unbind(1), strict=True))
        chosen = {name: column & has_another for name, column in columns.items()}
        rows = {name: column.nonzero()[:, 0] for name, column in chosen.items()}
        fused = inputs.model.fuse(without_each(inputs.encoded.token_batch, chosen))
        losses: list[Tensor] = []
        pooled = fused.pooled.split([len(own) for own in rows.values()])
        for (name, own), pooled_kD in zip(rows.items(), pooled, strict=True):
            predicted_kE = F.normalize(at_least_fp32(self.predictors[name](pooled_kD)), dim=-1)
            losses.append(1 - (predicted_kE * embeddings[name].detach()[own]).sum(1))
        row_losses, all_rows = torch.cat(losses), torch.cat(list(rows.values()))
        count = sum_over_ranks(torch.tensor(len(all_rows), device=all_rows.device))
        return {
            "feature_prediction": Term(
                row_losses.sum() * world_size() / count.clamp(min=1), all_rows, row_losses.detach()
            )
        }
