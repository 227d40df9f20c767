"""AdamW's state, by whatever an engine lets it update."""

from collections.abc import Iterable

import torch
from torch import Tensor

from mmfuse.train.engines.base import MOMENTS


def moments_of(optimizer: torch.optim.Optimizer, updated: Iterable[Tensor]) -> list[dict[str, Tensor]]:
    """The moments of each tensor that the optimizer updates, made where it has taken no step."""
    for tensor in updated:
        if not optimizer.state[tensor]:
            optimizer.state[tensor] = {"step": _as_step(0, optimizer, tensor)}
            optimizer.state[tensor] |= {kind: torch.zeros_like(tensor) for kind in MOMENTS}
    return [{kind: optimizer.state[tensor][kind] for kind in MOMENTS} for tensor in updated]


def read_steps(optimizer: torch.optim.Optimizer, updated: Iterable[Tensor]) -> int:
    """How many steps it has taken; 0 where it has no state."""
    return max((int(state["step"]) for tensor in updated if (state := optimizer.state[tensor])), default=0)


def write_steps(optimizer: torch.optim.Optimizer, updated: Iterable[Tensor], steps: int) -> None:
    """Goes on counting from here."""
    for tensor in updated:
        optimizer.state[tensor]["step"] = _as_step(steps, optimizer, tensor)


def _as_step(steps: int, optimizer: torch.optim.Optimizer, tensor: Tensor) -> Tensor | int:
    """As torch's AdamW wants it, on the device where it is fused; DeepSpeed's AdamW for offloading counts in int."""
    if not isinstance(optimizer, torch.optim.AdamW):
        return steps
    return torch.tensor(float(steps), device=tensor.device if optimizer.defaults["fused"] else "cpu")
