"""The task: model and weighted objectives in the one module that engines wrap, so that a step is one call."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmfuse.model.model import FusionModel, ModelConfig
from mmfuse.objectives.base import Comparison, Objective, ObjectiveConfig, Seen, StepInputs
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
        self.trains_fused_embedding = any(config.trains_fused_embedding for config in objectives.values())
        self.fuses_batch = self.model.fusion is not None and (reads or not self.trains_fused_embedding)
        self.weights = {name: config.weight for name, config in objectives.items()}

    @property
    def comparisons(self) -> dict[str, Comparison]:
        """The objectives that compare rows of the whole global batch."""
        return {name: o for name, o in self.objectives.items() if isinstance(o, Comparison)}

    def represent(self, batch: Batch) -> dict[str, Tensor]:
        """What the comparisons see of a batch, `(B, S, E)` each."""
        inputs = StepInputs(self.model, batch, self.model.encode(batch), None)
        return {name: objective.represent(inputs) for name, objective in self.comparisons.items()}

    def embed(self, batch: Batch) -> dict[str, Tensor]:
        """What evaluation scores, `(B, E)` each: the modalities' embeddings by name and, where it is trained, by
        `without NAME` the fusion of a complete sample's others."""
        encoded = self.model.encode(batch)
        if not self.trains_fused_embedding:
            return encoded.embeddings
        mixed = self.model.embed_without_each(encoded.token_batch, batch.present.all(1))
        return encoded.embeddings | {f"without {name}": rows for name, rows in mixed.items()}

    def forward(self, batch: Batch, seen: Mapping[str, Seen] | None = None) -> StepOutput:
        """The batch's loss, or the step's where comparisons have `seen` other micro-batches; whose gradient is this
        batch's part."""
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
            found = objective(inputs, seen[name]) if seen and name in seen else objective(inputs)
            for part, term in found.items():
                loss = loss + self.weights[name] * term.loss
                shown = f"{name}/{part}" if part != name else name
                terms[shown], row_losses[shown] = term.loss.detach(), (term.rows, term.row_losses)
        tokens = {name: mask.sum() for name, mask in encoded.token_batch.masks.items()}
        return StepOutput(loss, terms, row_losses, tokens)
