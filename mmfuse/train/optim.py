"""AdamW with two learning rates, and the schedule as a pure function of the step."""

import math

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat
from torch import nn

from mmfuse.config import Settings
from mmfuse.errors import ConfigError
from mmfuse.modalities.base import Encoder


class OptimizerConfig(Settings):
    """AdamW (Loshchilov and Hutter 2019), linear warm-up, cosine decay."""

    learning_rate: PositiveFloat = 5e-4
    """Peak, of the modules that start from nothing: fusion, projections, heads, objectives."""
    encoder_learning_rate: PositiveFloat = 1e-4
    """Peak, of the encoders' last layers."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Each layer of an encoder learns at this times the rate of the one above it; 0.75 is usual after `pretrained`
    (BEiT, Bao et al. 2021, arXiv 2106.08254)."""
    warmup_steps: NonNegativeInt = 100
    final_fraction: float = Field(default=0.01, ge=0, le=1)
    """Where the cosine ends, relative to the peak."""
    weight_decay: NonNegativeFloat = 0.1
    """Of matrices; norms, biases, embeddings and scales have none."""
    betas: tuple[float, float] = (0.9, 0.98)
    eps: PositiveFloat = 1e-6
    clip_norm: PositiveFloat | None = 1.0
    """Largest gradient norm over all parameters; null: no clipping."""


def learning_rate_factor(step: int, *, config: OptimizerConfig, total_steps: int) -> float:
    """Fraction of the peak at a step, 0-based: linear to 1 over the warm-up, then a cosine to `final_fraction`."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    cosine = (1 + math.cos(math.pi * min(1.0, progress))) / 2
    return config.final_fraction + (1 - config.final_fraction) * cosine


def build_optimizer(task: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over groups of the parameters that are trained; each group remembers its peak as `peak_lr`.

    Raises:
        ConfigError: a layer decay, and an encoder without known layers.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    encoder_rates = _encoder_rates(task, config)
    embeddings = {id(p) for m in task.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    for name, parameter in task.named_parameters():
        if not parameter.requires_grad:
            continue
        peak = encoder_rates.get(id(parameter), config.learning_rate)
        decays = parameter.ndim >= 2 and id(parameter) not in embeddings
        groups.setdefault((peak, decays and not _is_position_or_token(name)), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "weight_decay": config.weight_decay if decays else 0.0,
                "peak_lr": peak,
            }
            for (peak, decays), parameters in groups.items()
        ],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        fused=True,  # which can be told on the device to skip a step; see `engines/ddp.py`
    )


def _encoder_rates(task: nn.Module, config: OptimizerConfig) -> dict[int, float]:
    """Peak by identity of each parameter of an encoder."""
    rates = {}
    for encoder in (module for module in task.modules() if isinstance(module, Encoder)):
        depths, last = encoder.depths(), len(encoder.layers()) + 1
        if config.layer_decay < 1 and last == 1:
            raise ConfigError(
                f"optimizer.layer_decay = {config.layer_decay}: no layers are known of a {type(encoder).__name__}; "
                "set it to 1"
            )
        for name, parameter in encoder.named_parameters():
            above = max(0, last - 1 - depths[name])  # what is behind the last layer learns as the last layer
            rates[id(parameter)] = config.encoder_learning_rate * config.layer_decay**above
    return rates


def _is_position_or_token(name: str) -> bool:
    """ViT and AST keep position embeddings and class tokens as bare parameters."""
    return name.rsplit(".", 1)[-1] in {
        "pos_embed",
        "pos_embed_x",
        "pos_embed_y",
        "cls_token",
        "reg_token",
        "position_embeddings",
        "distillation_token",
        "modality_embedding",
    }


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Every group to this fraction of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
