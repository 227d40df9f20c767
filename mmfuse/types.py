"""The seams between the floors: what one floor hands to the next.

Shape legend: B rows of this rank's batch, M modalities, n rows that have a modality, L tokens, D width, E embedding.
"""

from dataclasses import dataclass, fields, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor

Features = dict[str, Tensor]
"""What a processor makes of one member: the encoder's inputs by name."""


class SampleRef(NamedTuple):
    """The address of one sample in a mixture; `number < 0` is padding."""

    source: int
    number: int
    epoch: int


class Fault(NamedTuple):
    """A member that could not be decoded; its modality is treated as absent."""

    source: str
    shard: str
    key: str
    extension: str
    kind: str
    """For counting."""
    reason: str
    """For reading."""
    lost: bool
    """Whether nothing else is left of the sample."""


class Sample(NamedTuple):
    """One decoded sample. A modality without an entry in `features` is absent; a sample may have lost all of them."""

    sample_id: int
    group_id: int
    key: str
    features: dict[str, Features]
    faults: tuple[Fault, ...] = ()


@dataclass(frozen=True)
class ModalityBatch:
    """The rows that have one modality, and nothing for those that lack it."""

    rows: Tensor
    """int64 `(n,)`, ascending: which rows of the batch these are."""
    inputs: Features
    """Encoder inputs, each `(n, ...)`."""


@dataclass(frozen=True)
class Batch:
    """One rank's micro-batch: compact rows per modality, no placeholders."""

    modalities: tuple[str, ...]
    present: Tensor
    """bool `(B, M)` in the order of `modalities`."""
    group_id: Tensor
    """int64 `(B,)`; rows with the same value are never each other's negatives."""
    sample_id: Tensor
    """int64 `(B,)`; with the step it keys all randomness, so that results do not know the world size."""
    keys: tuple[str, ...]
    inputs: dict[str, ModalityBatch]
    step: int
    global_rows: int
    """Rows of this micro-batch, or of these, over all ranks."""
    faults: tuple[Fault, ...] = ()
    micro_batches: int = 1
    """How many micro-batches stand here one after the other; of each, these are the rows that this rank owns."""

    def to(self, device: torch.device) -> Self:
        """The same batch on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """The same batch in page-locked memory; called by the DataLoader's pinning thread."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function) -> Self:
        tensors = {f.name: function(v) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        inputs = {
            name: ModalityBatch(function(part.rows), {key: function(value) for key, value in part.inputs.items()})
            for name, part in self.inputs.items()
        }
        return replace(self, inputs=inputs, **tensors)


# NamedTuples, not dataclasses: DeepSpeed's ZeRO-3 hooks find tensors in tuples and dicts only.


class EncoderOutput(NamedTuple):
    """One modality's rows after its encoder."""

    tokens: Tensor
    """`(n, L, D_modality)`"""
    mask: Tensor
    """bool `(n, L)`, True for real tokens."""
    pooled: Tensor
    """`(n, D_modality)`"""


class TokenBatch(NamedTuple):
    """Tokens of samples, ready to be fused: a batch as it came, or variants of it that an objective makes."""

    tokens: dict[str, Tensor]
    """`(n, L, D)` per modality at the fusion width; n may be 0."""
    masks: dict[str, Tensor]
    """bool `(n, L)` per modality."""
    rows: dict[str, Tensor]
    """int64 `(n,)` per modality: which sample each entry belongs to."""
    num_rows: int
    """Samples, B."""


class Encoded(NamedTuple):
    """A batch after its encoders."""

    token_batch: TokenBatch
    embeddings: dict[str, Tensor]
    """`(B, E)` per modality in fp32, L2-normalised; zeros in rows that lack the modality."""


class FusionOutput(NamedTuple):
    """A fused token batch."""

    tokens: dict[str, Tensor]
    """`(n, L, D)` per modality, in the places where they went in."""
    pooled: Tensor
    """`(B, D)`: mean over the sample's modalities of their mean token; zeros for a sample without any."""
    embedding: Tensor
    """`(B, E)` in fp32, L2-normalised."""


class StepOutput(NamedTuple):
    """What the task gives for one batch."""

    loss: Tensor
    """Scalar whose mean over ranks is the loss of the global batch."""
    terms: dict[str, Tensor]
    """Detached parts of the loss before weighting, by `objective/term`."""
    row_losses: dict[str, tuple[Tensor, Tensor]]
    """Of each term, the rows of this rank's batch that it is taken over, and what they contribute, both `(n,)`."""
    tokens: dict[str, Tensor]
    """How many real tokens each encoder gave, int64 `()` by modality."""
