"""LoRA (Hu et al. 2021, arXiv 2106.09685) for any encoder, through peft."""

from collections.abc import Sequence

from pydantic import Field, PositiveInt
from torch import nn

from mmfuse.config import Settings
from mmfuse.errors import ConfigError


class LoraConfig(Settings):
    """The encoder's weights stay as they are; each linear map within its layers learns a change of low rank."""

    rank: PositiveInt = 8
    alpha: PositiveInt = 16
    """A change counts alpha / rank times."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Of what enters a change. Above 0 the numbers depend on the world size."""


def add_lora(encoder: nn.Module, layers: Sequence[nn.Module], config: LoraConfig) -> None:
    """Puts a change, zero at first, beside every linear map of the layers; nothing else of the encoder has a gradient.

    Raises:
        ConfigError: there is no such map, or peft is missing.
    """
    try:
        import peft  # takes a second, and only this needs it
    except ImportError as error:
        raise ConfigError("lora needs the library peft: pip install mmfuse[lora]") from error
    maps = {id(module) for layer in layers for module in layer.modules() if isinstance(module, nn.Linear)}
    # By whole names: patterns would differ from one family of encoders to the next.
    targets = [name for name, module in encoder.named_modules() if id(module) in maps]
    if not targets:
        raise ConfigError(f"lora: {type(encoder).__name__} has no layers with linear maps")
    settings = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=targets
    )
    peft.inject_adapter_in_model(settings, encoder)
