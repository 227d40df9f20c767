"""The task: model and weighted objectives in the one module that engines wrap, so that a step is one call."""

from collections.abc import Mapping

import torch
from torch import nn

from mmfuse.model.model import FusionModel, ModelConfig
from mmfuse.objectives.base import Objective, ObjectiveConfig, StepInputs
from mmfuse.randomness import seeded_torch
from mmfuse.types import Batch, StepOutput


class Task(nn.Module):
    """Batch -> loss. Every rank makes the same calls in the same order, whatever its batch holds."""

    def __init__(self, model: ModelConfig, objectives: Mapping[str, ObjectiveConfig], *, seed: int) -> None:
        """Builds with weights drawn from `seed`, the same on every rank.

        Raises:
            ConfigError: an objective needs what the model lacks.
        """
        super().__init__()
        with seeded_torch(seed):
            self.model = FusionModel(model)
            self.objectives = nn.ModuleDict({n: config.build(model, seed=seed) for n, config in objectives.items()})
        # The fused embedding's head must have a gradient on every rank, if only a zero.
        reads = any(config.reads_fused_batch for config in objectives.values())
        trains = any(config.trains_fused_embedding for config in objectives.values())
        self.fuses_batch = self.model.fusion is not None and (reads or not trains)
        self.weights = {name: config.weight for name, config in objectives.items()}

    def forward(self, batch: Batch) -> StepOutput:
        encoded = self.model.encode(batch)
        fused = self.model.fuse(encoded.token_batch) if self.fuses_batch else None
        inputs = StepInputs(self.model, batch, encoded, fused)
        # Heads that no objective reads must have a gradient too, if only a zero.
        loss = 0.0 * torch.stack(list(encoded.embeddings.values())).sum()
        if fused is not None:
            loss = loss + 0.0 * fused.embedding.sum()
        terms, row_losses = {}, {}
        for name, objective in self.objectives.items():
            assert isinstance(objective, Objective)
            for part, term in objective(inputs).items():
                loss = loss + self.weights[name] * term.loss
                shown = f"{name}/{part}" if part != name else name
                terms[shown], row_losses[shown] = term.loss.detach(), (term.rows, term.row_losses)
        return StepOutput(loss, terms, row_losses)
