"""What the launcher asked for, and that it does not contradict the run."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mmfuse.errors import ConfigError
from mmfuse.train.engines.base import Precision


class Asked(NamedTuple):
    """The run's own settings, which no strategy may change."""

    precision: Precision
    accumulation: int
    clip_norm: float | None
    timeout_seconds: float
    """Of collectives: longer than the watchdog's, who says more."""


def uses_deepspeed() -> bool:
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"


def uses_fsdp() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "false") == "true"


def runs_on_cpu() -> bool:
    return not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in {"1", "true"}


def offloads_optimizer() -> bool:
    """Whether Adam steps in the host's memory, which Accelerate leaves to a library of DeepSpeed's.

    Raises:
        ConfigError: the user's DeepSpeed JSON is none.
    """
    device, path = "auto", os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if path != "none":
        offload = _read_json(path)["zero_optimization"].get("offload_optimizer") or {}
        device = offload.get("device") or "none"
    if device == "auto":
        device = os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none")
    return device.lower() not in ("none", "")


def check_strategy(asked: Asked) -> None:
    """Compares the run with the files that the launcher read.

    Raises:
        ConfigError: a strategy file says something else than the run, all differences at once; or a precision that
            this strategy or this machine does not have.
    """
    problems = [*_environment_contradictions(asked)]
    path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if uses_deepspeed() and path != "none":
        problems += _json_contradictions(_read_json(path), asked)
    if problems:
        raise ConfigError("the strategy contradicts the run: " + "; ".join(problems))
    if asked.precision == "fp16" and runs_on_cpu():
        raise ConfigError("train.precision = fp16 needs a GPU: Accelerate and DeepSpeed refuse it on the CPU; use bf16")
    if asked.precision == "fp16" and uses_fsdp():
        raise ConfigError("train.precision = fp16 with fsdp2 was never measured here: use bf16, or ddp or ZeRO")


def _environment_contradictions(asked: Asked) -> list[str]:
    """Of an Accelerate YAML file, whose settings reach us in the environment; its defaults say nothing."""
    said = {name: os.environ.get(f"ACCELERATE_{name}", "").lower() for name in _ENVIRONMENT}
    problems = []
    if said["MIXED_PRECISION"] == "fp8":
        problems.append("mixed_precision: fp8 is refused until it was measured on a GPU")
    elif said["MIXED_PRECISION"] not in ("", "no", asked.precision):
        problems.append(f"mixed_precision: {said['MIXED_PRECISION']}, but train.precision = {asked.precision}")
    if said["GRADIENT_ACCUMULATION_STEPS"] not in ("", "1", "auto", str(asked.accumulation)):
        steps = said["GRADIENT_ACCUMULATION_STEPS"]
        problems.append(f"gradient_accumulation_steps: {steps}, but train.accumulation = {asked.accumulation}")
    if "nvme" in (said["DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE"], said["DEEPSPEED_OFFLOAD_PARAM_DEVICE"]):
        problems.append("offload to nvme: checkpoints would not find what lies there; use cpu")
    clip = said["GRADIENT_CLIPPING"]
    if clip not in ("", "auto", "none") and not _is_number(clip, asked.clip_norm or 0.0):
        problems.append(f"gradient_clipping: {clip}, but optimizer.clip_norm = {asked.clip_norm}")
    return problems


_ENVIRONMENT = (
    *("MIXED_PRECISION", "GRADIENT_ACCUMULATION_STEPS", "GRADIENT_CLIPPING"),
    *("DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "DEEPSPEED_OFFLOAD_PARAM_DEVICE"),
)


def _is_number(text: str, number: float) -> bool:
    try:
        return float(text) == number
    except ValueError:
        return False


def _json_contradictions(config: Mapping[str, Any], asked: Asked) -> list[str]:
    """Of a user's DeepSpeed JSON."""
    expected = {
        "gradient_accumulation_steps": (asked.accumulation, "train.accumulation"),
        "gradient_clipping": (asked.clip_norm or 0.0, "optimizer.clip_norm"),
    }
    problems = [
        f"{key}: {config[key]}, but {setting} = {value}"
        for key, (value, setting) in expected.items()
        if config.get(key, "auto") not in ("auto", value)
    ]
    offload = [config["zero_optimization"].get(f"offload_{what}") or {} for what in ("optimizer", "param")]
    if any(part.get("device") == "nvme" for part in offload):
        problems.append("offload to nvme: checkpoints would not find what lies there; use cpu")
    problems += [f"{key}: the run decides; set it to auto" for key in _BATCH if config.get(key, "auto") != "auto"]
    problems += [f"{key}: the run has its own; take it out" for key in ("optimizer", "scheduler") if key in config]
    for precision in ("bf16", "fp16"):
        section = config.get(precision, {})
        enabled = section.get("enabled", "auto") if isinstance(section, dict) else section
        if isinstance(section, dict) and not section.get("check_grad_overflow", True):
            problems.append(f"{precision}.check_grad_overflow: without it a NaN would be learned; take it out")
        if enabled not in ("auto", asked.precision == precision):
            problems.append(f"{precision}.enabled: {enabled}, but train.precision = {asked.precision}")
    return problems


_BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu")


def _read_json(path: str) -> dict[str, Any]:
    try:
        config = json.loads(Path(path).read_text())
        stage = config["zero_optimization"]["stage"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: is no DeepSpeed configuration with zero_optimization.stage: {error}") from error
    if stage not in (1, 2, 3):
        raise ConfigError(f"{path}: zero_optimization.stage = {stage}; 1, 2 and 3 are known; without ZeRO use ddp")
    return config
