"""What an objective file must offer; `tests/contracts/test_objectives.py` walks the folder and checks it.

A file `mmfuse/objectives/NAME.py` has a `Config` that builds its objective.

Every term is normalised by its global count and multiplied by the world size, so that the mean over ranks, which is
what data-parallel training takes of gradients, is the value of the global batch, however the rows fall on the ranks.
A term that finds nothing to do on this rank is an exact 0 that is still connected to its parameters.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
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


class Seen(NamedTuple):
    """What a comparison of a whole step found for one of its micro-batches, before that micro-batch's backward."""

    gradient: Tensor
    """Of the step's loss by this micro-batch's vectors, times the number of micro-batches, over which engines average;
    `(B, S, E)`."""
    parameter_gradients: dict[str, Tensor]
    """Of the step's loss by the objective's own parameters, by name."""
    terms: dict[str, Term]
    """Of the whole step, with the rows of this micro-batch alone."""


class Comparison(Objective):
    """An objective that compares the rows of a global batch with each other, by vectors that each has on its own.

    In two parts, so that it is the same however many micro-batches a step has (GradCache, Gao et al. 2021, arXiv
    2101.06983): first the vectors of all of them, without a graph, are compared (`train/accumulation.py`); then each
    micro-batch gives its vectors once more, and the gradient that was found for them goes back through them.
    """

    def represent(self, inputs: StepInputs) -> Tensor:
        """`(B, S, E)` in fp32: S vectors of each row, zeros where it lacks one. Draws no random numbers."""
        raise NotImplementedError

    def compare(self, vectors: Tensor, parameters: Mapping[str, Tensor], batch: Batch) -> dict[str, Term]:
        """Terms by name, of vectors `(B, S, E)` and the values of this objective's own parameters."""
        raise NotImplementedError

    def forward(self, inputs: StepInputs, seen: Seen | None = None) -> dict[str, Term]:
        """Terms by name; with `seen` those of the whole step, of whose gradient this micro-batch has its part."""
        vectors, parameters = self.represent(inputs), dict(self.named_parameters())
        if seen is None:
            return self.compare(vectors, parameters, inputs.batch)
        part = (seen.gradient * vectors).sum()
        for name, gradient in seen.parameter_gradients.items():
            part = part + (gradient * parameters[name]).sum()
        (name, first), *others = seen.terms.items()
        # The value is the step's; only the gradient is that of `part`.
        return {name: first._replace(loss=first.loss + (part - part.detach())), **dict(others)}


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
    captions: str | None = None
    """How a recipe must read its texts."""


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
