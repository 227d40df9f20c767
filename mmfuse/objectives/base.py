"""What an objective file must offer; `tests/contracts/test_objectives.py` walks the folder and checks it.

A file `mmfuse/objectives/NAME.py` has a `Config` that builds its objective.

Every term is normalised by its global count and multiplied by the world size, so that the mean over ranks, which is
what data-parallel training takes of gradients, is the value of the global batch, however the rows fall on the ranks.
A term that finds nothing to do on this rank is an exact 0 that is still connected to its parameters.
"""

from abc import ABC, abstractmethod
from itertools import combinations
from typing import ClassVar, NamedTuple

from pydantic import NonNegativeFloat
from torch import Tensor, nn

from mmfuse.config import Settings
from mmfuse.hashing import hash_int
from mmfuse.model.model import FusionModel, ModelConfig
from mmfuse.model.variants import without_some
from mmfuse.randomness import keyed_uniform
from mmfuse.types import Batch, Encoded, FusionOutput


class StepInputs(NamedTuple):
    """What every objective sees of one batch."""

    model: FusionModel
    """For objectives that encode or fuse variants of the batch."""
    batch: Batch
    encoded: Encoded
    fused: FusionOutput | None
    """The batch as it came; null where no objective reads it."""


def every_pair(modalities: tuple[str, ...]) -> tuple[frozenset[str], ...]:
    """All sets of two modalities."""
    return tuple(map(frozenset, combinations(modalities, 2)))


class Term(NamedTuple):
    """One part of the loss."""

    loss: Tensor
    """Scalar whose mean over ranks is the value of the global batch."""
    rows: Tensor
    """int64 `(n,)`: the rows of this rank's batch that it is taken over; a row may come more than once."""
    row_losses: Tensor
    """`(n,)`, detached: what each contributes. Their mean over all ranks is the value of the global batch too."""


class Objective(nn.Module):
    """Terms of the loss, with their own heads and scales."""

    def forward(self, inputs: StepInputs) -> dict[str, Term]:
        """Terms by name; the objective's loss is their sum."""
        raise NotImplementedError


def fuse_masked(inputs: StepInputs, modality: str, tokens: Tensor, *, seed: int) -> FusionOutput:
    """The batch, fused with these tokens `(n, L, D)` of a modality instead of its own.

    In training the model's `fusion.modality_dropout` leaves out others, by what `seed`, the step and the sample say.
    """
    source, batch, model = inputs.encoded.token_batch, inputs.batch, inputs.model
    masked = source._replace(tokens={**source.tokens, modality: tokens})
    if model.training and model.modality_dropout:
        draws = {
            name: keyed_uniform(hash_int(seed, "modality_dropout", name), batch.step, batch.sample_id)
            for name in source.tokens
            if name != modality
        }
        masked = without_some(masked, {name: draw < model.modality_dropout for name, draw in draws.items()})
    return model.fuse(masked)


class Need(NamedTuple):
    """Samples without which a setting does nothing."""

    setting: str
    any_of: tuple[frozenset[str], ...]
    """A sample must hold all modalities of one of these."""
    across_samples: bool = False
    """Whether several samples may hold them together."""


class ObjectiveConfig(Settings, ABC):
    """Settings of an objective."""

    weight: NonNegativeFloat = 1.0
    """Factor of this objective's terms in the loss."""
    uses_fusion: ClassVar[bool] = True
    """Whether the objective trains the fusion."""
    reads_fused_batch: ClassVar[bool] = False
    """Whether it reads `StepInputs.fused`; without such an objective the batch as it came is not fused in training."""
    trains_fused_embedding: ClassVar[bool] = False

    @abstractmethod
    def needs(self, name: str, modalities: tuple[str, ...]) -> list[Need]:
        """What the data must have for the objective `objectives.NAME` of a model of these modalities."""

    @abstractmethod
    def build(self, model: ModelConfig, *, seed: int) -> Objective:
        """The objective for a model of this configuration.

        Raises:
            ConfigError: the model lacks what the objective needs.
        """
