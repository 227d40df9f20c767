"""One process, or DistributedDataParallel through Accelerate."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mmfuse.distributed import slice_of_rank
from mmfuse.objectives.base import Seen
from mmfuse.task import Task
from mmfuse.train.engines.adam import moments_of, read_steps, write_steps
from mmfuse.train.engines.base import Engine, Part, Span
from mmfuse.types import Batch, StepOutput


class DdpEngine(Engine):
    """Replicated weights; gradients averaged over ranks."""

    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__(accelerator)
        self.scales_loss = accelerator.mixed_precision == "fp16"

    @property
    def name(self) -> str:
        return "ddp" if self.world_size > 1 else "one process"

    def wrap(self, task: Task, optimizer: torch.optim.Optimizer, *, clip_norm: float | None, rank_rows: int) -> None:
        self.task, self.clip_norm = task, clip_norm
        self.trained = {name: p for name, p in task.named_parameters() if p.requires_grad}
        self.optimizer = optimizer
        # A gradient that autograd summed over an expanded row has other strides in dimensions of size 1: no copy more.
        warnings.filterwarnings("ignore", r"Grad strides do not match bucket view strides[^=]+= \[1, 1, \d+\]")
        self.wrapped, self._prepared_optimizer = self.accelerator.prepare(task, optimizer)

    def forward(self, batch: Batch, seen: Mapping[str, Seen]) -> StepOutput:
        return self.wrapped(batch, seen)

    def accumulate(self, *, last: bool) -> AbstractContextManager[None]:
        return self.accelerator.accumulate(self.wrapped)

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def step(self) -> Tensor:
        if self.scales_loss:
            self.accelerator.unscale_gradients(self._prepared_optimizer)
        norm = nn.utils.clip_grad_norm_(self.task.parameters(), self.clip_norm or torch.inf)
        if not self.scales_loss:  # where the loss is scaled, torch's scaler does the same
            skip_where_not_finite(self.optimizer, norm)
        self._prepared_optimizer.step()
        self._prepared_optimizer.zero_grad()
        return norm

    def masters(self) -> list[Tensor]:
        return list(self.trained.values())

    def layout(self) -> list[list[Span]]:
        return [[Span(name, 0, 0, p.numel())] for name, p in self.trained.items()]

    def owned_layout(self) -> list[list[Span]]:
        """All ranks have the same; each writes its part of the whole."""
        total = sum(p.numel() for p in self.trained.values())
        own = slice_of_rank(total, rank=self.rank, world_size=self.world_size)
        owned, before = [], 0
        for ((name, _, _, length),) in self.layout():
            first, end = max(own.start - before, 0), min(own.stop - before, length)
            owned.append([Span(name, first, first, end - first)] if first < end else [])
            before += length
        return owned

    def publish_masters(self) -> None:
        """The parameters themselves are the masters."""

    def replicas(self) -> Mapping[str, Tensor]:
        return dict(self.task.named_parameters())

    def fixed_parts(self) -> Iterator[Part]:
        if self.rank == 0:
            for name, tensor in self.task.state_dict().items():
                if name not in self.trained:
                    yield Part(name, 0, tensor.reshape(-1))

    def moments(self) -> list[dict[str, Tensor]]:
        return moments_of(self.optimizer, self.masters())

    @property
    def adam_steps(self) -> int:
        return read_steps(self.optimizer, self.masters())

    @adam_steps.setter
    def adam_steps(self, steps: int) -> None:
        write_steps(self.optimizer, self.masters(), steps)


def skip_where_not_finite(optimizer: torch.optim.Optimizer, norm: Tensor) -> None:
    """The optimizer's next step changes nothing, not its count either, where the norm is not finite.

    As `torch.amp.GradScaler` tells a fused optimizer: on the device, without waiting for it.
    """
    optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
