"""What the trainer asks of an engine."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mmfuse.distributed import barrier
from mmfuse.types import Batch, StepOutput

Precision = Literal["fp32", "bf16"]

PortableState = dict[str, dict[str, Tensor]]
"""`model`, `exp_avg`, `exp_avg_sq`: fp32 tensors on the CPU by parameter name; whole on rank 0, empty elsewhere."""


class Engine(ABC):
    """One way to train a task on many ranks."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.device: torch.device = accelerator.device
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes

    @property
    @abstractmethod
    def name(self) -> str:
        """The strategy that runs, for logs, reports and checkpoints."""

    task: nn.Module
    """The unwrapped task: for evaluation and names."""
    optimizer: torch.optim.Optimizer

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Those with gradient, by name; the others never change and have no moments."""
        return ((name, parameter) for name, parameter in self.task.named_parameters() if parameter.requires_grad)

    @abstractmethod
    def wrap(
        self, task: nn.Module, optimizer: torch.optim.Optimizer, *, clip_norm: float | None, rank_rows: int
    ) -> None:
        """Distributes the task. Its weights must be loaded before: low-precision copies are made here."""

    @abstractmethod
    def forward(self, batch: Batch) -> StepOutput:
        """The wrapped task's output."""

    @abstractmethod
    def accumulate(self) -> AbstractContextManager[None]:
        """Around each micro-step."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None: ...

    @abstractmethod
    def step(self) -> Tensor:
        """One optimizer step after the last micro-step's backward; returns the gradient norm before clipping."""

    @abstractmethod
    def export_state(self) -> tuple[PortableState, int]:
        """All weights and, of the trained ones, Adam's moments for a portable checkpoint, and Adam's step count; all
        ranks must call."""

    @abstractmethod
    def import_moments(self, state: PortableState, adam_steps: int) -> None:
        """Adam's moments from a portable checkpoint of any engine and world size. `state` is whole on every rank."""

    def close(self) -> None:
        """Leaves the process group in order; without it one exit in 60 ends in an abort."""
        barrier()
        self.accelerator.end_training()
