"""How much of the hardware's arithmetic training uses."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmfuse.distributed import sum_over_ranks, world_size
from mmfuse.task import Task
from mmfuse.train.encoder_clock import EncoderClock

_PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12}
"""Dense bf16 and fp16 on tensor cores, by NVIDIA's data sheets; H100 as SXM."""
_TENSOR_FLOPS_A_WEIGHT = 6
"""A multiplication and an addition, forward and twice in backward (Kaplan et al. 2020, arXiv 2001.08361)."""


class Speed:
    """Tokens that went through the model, counted on the device, and what they mean for the hardware."""

    def __init__(self, task: Task, device: torch.device) -> None:
        """Before an engine wraps the task, and cuts its parameters into parts."""
        self.device, self._flops_by_token = device, count_flops_by_token(task)
        self.encoder_clock = EncoderClock(task, device)
        self._tokens = dict.fromkeys(self._flops_by_token, torch.zeros((), dtype=torch.int64, device=device))

    def add(self, tokens: Mapping[str, Tensor]) -> None:
        """Of one micro-step of this rank."""
        for name, number in tokens.items():
            self._tokens[name] = self._tokens[name] + number

    def read(self, seconds: float) -> dict[str, float]:
        """Of all ranks since the last call: tokens a second and, on a GPU whose peak is known, the share of it that the
        model's arithmetic takes (MFU: Chowdhery et al. 2022, arXiv 2204.02311, appendix B)."""
        names = list(self._tokens)
        numbers = sum_over_ranks(torch.stack([self._tokens[name] for name in names])).tolist()
        self._tokens = {name: torch.zeros_like(number) for name, number in self._tokens.items()}
        speed = {"tokens_per_second": sum(numbers) / seconds}
        flops = sum(number * self._flops_by_token[name] for name, number in zip(names, numbers, strict=True))
        if peak := peak_flops(self.device):
            speed["mfu"] = flops / seconds / (peak * world_size())
        return speed


def count_flops_by_token(task: Task) -> dict[str, float]:
    """Of forward and backward of a token of each modality: its encoder, projection and the fusion's blocks, once.

    Weights that are looked up are left out, and attention over positions; so it is a little less than what is done.
    Objectives that fuse variants of a batch do more.
    """
    model = task.model
    fusion = _count_weights(model.fusion) if model.fusion is not None else 0
    flops = {}
    for name in model.modalities:
        own = _count_weights(model.encoders[name]) + _count_weights(model.projections[name])
        flops[name] = float(_TENSOR_FLOPS_A_WEIGHT * (own + fusion))
    return flops


def _count_weights(module: nn.Module) -> int:
    looked_up = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    return sum(p.numel() for p in module.parameters() if p.ndim >= 2 and id(p) not in looked_up)


def peak_flops(device: torch.device) -> float | None:
    """Of the device in 16 bits; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for model, peak in _PEAK_FLOPS.items() if model in name), None)
