"""LoRA (Hu et al. 2021, arXiv 2106.09685) for any encoder, through peft."""

from collections.abc import Callable, Sequence

import torch
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


def add_lora(
    encoder: nn.Module, layers: Sequence[nn.Module], config: LoraConfig, *, run_once: Callable[[], object]
) -> None:
    """Puts a change, zero at first, beside the linear maps of the layers; nothing else of the encoder has a gradient.

    Args:
        run_once: the encoder's forward pass. A map that it does not call gets no change, for nothing would come of it:
            some families, such as timm's BEiT, read a map's weight instead.
    Raises:
        ConfigError: there is no such map, or peft is missing.
    """
    try:
        import peft  # takes a second, and only this needs it
    except ImportError as error:
        raise ConfigError(f"lora needs the library peft (pip install mmfuse[lora]): {error}") from error
    maps = [module for layer in layers for module in layer.modules() if isinstance(module, nn.Linear)]
    called = _find_called(maps, run_once)
    # By whole names: patterns would differ from one family of encoders to the next.
    targets = [name for name, module in encoder.named_modules() if id(module) in called]
    if not targets:
        raise ConfigError("lora: no layers with linear maps are known of this encoder")
    settings = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=targets
    )
    peft.inject_adapter_in_model(settings, encoder)


def _find_called(maps: Sequence[nn.Module], run_once: Callable[[], object]) -> set[int]:
    """Which of them, by identity, take part in a forward pass."""
    called: set[int] = set()
    handles = [module.register_forward_hook(lambda module, *_: called.add(id(module))) for module in maps]
    with torch.no_grad():
        run_once()
    for handle in handles:
        handle.remove()
    return called
