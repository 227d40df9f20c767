"""What a modality file must offer; `tests/contracts/test_modalities.py` walks the folder and checks it.

A file `mmfuse/modalities/NAME.py` has three names at its top level:

    EXTENSIONS              the member extensions that it reads when a recipe does not say otherwise
    class Config            its settings; builds its processor and its encoder
    (whatever it likes)     the processor and the encoder themselves

What would not fit into one file lies in `media/`, which has no `__init__.py`, so that no run takes it for a modality.

Shape legend: n rows, L tokens, D width.
"""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor, nn

from mmfuse.config import Settings
from mmfuse.types import EncoderOutput, Features


class Processor(Protocol):
    """Bytes of one member -> tensors on the CPU. Runs in loader workers, so it must pickle."""

    def __call__(self, data: bytes, *, seed: int | None) -> Features:
        """The encoder inputs of one member.

        Args:
            seed: keys the augmentation, to the last bit in any process and thread; None for the deterministic
                transform of evaluation.
        Raises:
            SampleError: the bytes are not what their extension says, or exceed a limit.
        """
        ...

    def to_bytes(self, value: Any) -> bytes:
        """What a user holds in memory, such as a text, a picture or a waveform, as the bytes of a member.

        Raises:
            SampleError: a type or shape that this modality does not read.
        """
        ...

    def collate(self, features: list[Features]) -> Features:
        """One row per item, padded where lengths differ."""
        ...


class Encoder(nn.Module):
    """Encoder inputs of n >= 1 rows -> tokens, mask and pooled vector."""

    width: int
    """D of everything that `forward` gives."""

    def forward(self, inputs: Features) -> EncoderOutput:
        raise NotImplementedError

    def minimal_inputs(self, device: torch.device) -> Features:
        """One cheapest possible row: what a rank without this modality runs, so that all ranks make the same calls."""
        raise NotImplementedError


class PatchEncoder(Encoder):
    """An encoder whose inputs fall into patches, each of which has its own token: `masked_image` hides some.

    Shape legend: P patches, v values of a patch.
    """

    def patches(self, inputs: Features) -> tuple[Tensor, Tensor]:
        """`(n, P, v)` in fp32 as the encoder sees them, and bool `(n, P)`, False for padding."""
        raise NotImplementedError

    def hide(self, inputs: Features, hidden: Tensor) -> Features:
        """Inputs in which the patches of bool `(n, P)` hold the mean, and nothing else of them is left."""
        raise NotImplementedError

    def patch_tokens(self, tokens: Tensor) -> Tensor:
        """Of all tokens, `(n, L, D)`, those of the patches: `(n, P, D)`."""
        raise NotImplementedError


class ModalityConfig(Settings, ABC):
    """Settings of a modality."""

    pooling: Literal["cls", "mean"] = "mean"
    """The pooled vector: the encoder's class token, or the mean over its real tokens."""
    gradient_checkpointing: bool = False
    """Keep each layer's input alone and compute the rest again in backward: far less memory, a third more time."""

    @abstractmethod
    def build_processor(self) -> Processor:
        """The processor of loader workers."""

    @abstractmethod
    def build_encoder(self) -> Encoder:
        """The encoder with fresh or, where the settings say so, pretrained weights."""

    def save_files(self, folder: Path) -> None:  # some name nothing
        """Writes what the settings name and a hub holds, a tokenizer or a structure, to `folder`; weights excepted."""

    def with_files(self, folder: Path) -> Self:
        """The settings of a model that takes from `folder` what `save_files` wrote, and fresh weights."""
        return self

    def count_patch_values(self) -> int | None:
        """How many values a patch of its `PatchEncoder` has; None where it is none."""
        return None


def masked_mean(tokens: Tensor, mask: Tensor) -> Tensor:
    """Mean over real tokens: `(n, L, D)` and bool `(n, L)` -> `(n, D)`; zero where there is none."""
    weights = mask.to(tokens.dtype).unsqueeze(-1)
    return (tokens * weights).sum(1) / weights.sum(1).clamp(min=1)
