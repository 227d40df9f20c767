"""What a model's repeated blocks can be told: to keep less for backward, and to be compiled."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_activations(blocks: Iterable[nn.Module]) -> None:
    """Each keeps its inputs alone and computes the rest again in backward: far less memory, a third more time."""
    for block in blocks:
        block.forward = partial(_compute_again, block, block.forward)  # under the hooks that engines put on modules


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Each through `torch.compile`, in place: names of parameters stay."""
    for block in blocks:
        block.compile()


def _compute_again(block: nn.Module, forward: Callable[..., Any], *inputs: Any, **settings: Any) -> Any:
    if not (block.training and torch.is_grad_enabled()):
        return forward(*inputs, **settings)
    return checkpoint(forward, *inputs, use_reentrant=False, **settings)
