"""What a modality file must offer; `tests/contracts/test_modalities.py` walks the folder and checks it.

A file `mmfuse/modalities/NAME.py` has three names at its top level:

    EXTENSIONS              the member extensions that it reads when a recipe does not say otherwise
    class Config            its settings; builds its processor and its encoder
    (whatever it likes)     the processor and the encoder themselves

What would not fit into one file lies in `media/`, `audio_encoders/`, `image_encoders/` and `adaptation/`, which have no
`__init__.py`, so that no run takes them for modalities.

Shape legend: n rows, L tokens, D width.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import torch
from pydantic import NonNegativeInt, model_validator
from torch import Tensor, nn

from mmfuse.config import Settings
from mmfuse.errors import ConfigError
from mmfuse.modalities.adaptation.lora import LoraConfig, add_lora
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

    def layers(self) -> Sequence[nn.Module]:
        """The repeated ones, first to last; empty where an encoder has none."""
        return ()

    def depths(self) -> dict[str, int]:
        """By parameter: 0 before the first layer, 1 for the first, one more than there are behind the last."""
        layers = self.layers()
        within = {id(p): depth for depth, layer in enumerate(layers, start=1) for p in layer.parameters()}
        depths, outside = {}, 0
        for name, parameter in self.named_parameters():
            depths[name] = within.get(id(parameter), outside)
            if id(parameter) in within:
                outside = len(layers) + 1
        return depths


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
    frozen_layers: NonNegativeInt | Literal["all"] = 0
    """How many of the encoder's first layers keep their weights, with all that is before them."""
    lora: LoraConfig | None = None
    """Null: the weights themselves are trained."""

    @model_validator(mode="after")
    def _check_trained(self) -> Self:
        if self.lora and self.frozen_layers:
            raise ValueError(f"lora keeps all weights of the encoder: frozen_layers = {self.frozen_layers} says less")
        return self

    @abstractmethod
    def build_processor(self) -> Processor:
        """The processor of loader workers."""

    @abstractmethod
    def build_encoder(self) -> Encoder:
        """The encoder with fresh or, where the settings say so, pretrained weights."""

    def build_trained_encoder(self) -> Encoder:
        """The encoder, of which `lora` and `frozen_layers` leave some or all parameters without gradient.

        Raises:
            ConfigError: it has fewer layers, or none where LoRA could learn, or peft is missing.
        """
        encoder = self.build_encoder()
        if self.lora:
            device = next(encoder.parameters()).device
            add_lora(encoder, encoder.layers(), self.lora, run_once=lambda: encoder(encoder.minimal_inputs(device)))
        elif self.frozen_layers == "all":
            encoder.requires_grad_(False)
        elif self.frozen_layers:
            num_layers = len(encoder.layers())
            if self.frozen_layers > num_layers:
                raise ConfigError(
                    f"frozen_layers = {self.frozen_layers}, but {num_layers} layers are known of the encoder; "
                    "frozen_layers = all freezes any encoder"
                )
            depths = encoder.depths()
            for name, parameter in encoder.named_parameters():
                if depths[name] <= self.frozen_layers:
                    parameter.requires_grad_(False)
        return encoder

    def save_files(self, folder: Path) -> None:
        """Writes what the settings name and a hub holds, a tokenizer or a structure, to `folder`; weights excepted."""

    def with_files(self, folder: Path) -> Self:
        """The settings of a model that takes from `folder` what `save_files` wrote, and fresh weights."""
        return self

    def count_patch_values(self) -> int | None:
        """How many values a patch of its `PatchEncoder` has; None where it is none."""
        return None


def find_layers(model: nn.Module, count: int) -> Sequence[nn.Module]:
    """The one list of so many modules: where families of transformers keep their layers, whatever they call it.

    Empty where there are several such lists: XLM has its layers in pieces.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    return list(lists[0]) if len(lists) == 1 else ()


def masked_mean(tokens: Tensor, mask: Tensor) -> Tensor:
    """Mean over real tokens: `(n, L, D)` and bool `(n, L)` -> `(n, D)`; zero where there is none."""
    weights = mask.to(tokens.dtype).unsqueeze(-1)
    return (tokens * weights).sum(1) / weights.sum(1).clamp(min=1)
