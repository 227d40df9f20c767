"""What the trainer asks of an engine."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mmfuse.distributed import barrier
from mmfuse.objectives.base import Seen
from mmfuse.task import Task
from mmfuse.types import Batch, StepOutput

Precision = Literal["fp32", "bf16"]

MOMENTS = ("exp_avg", "exp_avg_sq")
PortableState = dict[str, dict[str, Tensor]]
"""`model`, `exp_avg`, `exp_avg_sq`, where there is one the average `ema`: fp32 tensors on the CPU by parameter name;
whole on rank 0, empty elsewhere."""


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

    task: Task
    """The unwrapped task: for evaluation and names."""
    optimizer: torch.optim.Optimizer

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Those with gradient, by name; the others never change and have no moments."""
        return ((name, parameter) for name, parameter in self.task.named_parameters() if parameter.requires_grad)

    @abstractmethod
    def wrap(self, task: Task, optimizer: torch.optim.Optimizer, *, clip_norm: float | None, rank_rows: int) -> None:
        """Distributes the task. Its weights must be loaded before: low-precision copies are made here."""

    @abstractmethod
    def forward(self, batch: Batch, seen: Mapping[str, Seen]) -> StepOutput:
        """The wrapped task's output."""

    def represent(self, batch: Batch) -> dict[str, Tensor]:
        """`Task.represent` in the precision of `forward`, without a graph."""
        with torch.no_grad(), self.accelerator.autocast():
            return self.task.represent(batch)

    def whole(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
        """These parameters are in memory inside, to be read."""
        return nullcontext()

    @abstractmethod
    def accumulate(self) -> AbstractContextManager[None]:
        """Around each micro-step."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None: ...

    @abstractmethod
    def step(self) -> Tensor:
        """One optimizer step after the last micro-step's backward; returns the gradient norm before clipping."""

    @abstractmethod
    def export_weights(self) -> dict[str, Tensor]:
        """All weights for a portable checkpoint; all ranks must call."""

    @abstractmethod
    def export_moments(self) -> tuple[PortableState, int]:
        """Adam's moments of the trained weights for a portable checkpoint, and Adam's step count; all ranks must
        call."""

    @abstractmethod
    def import_weights(self, weights: Mapping[str, Tensor]) -> None:
        """The trained weights among these, which are whole on every rank, into `master_weights`."""

    @abstractmethod
    def import_moments(self, state: PortableState, adam_steps: int) -> None:
        """Adam's moments from a portable checkpoint of any engine and world size. `state` is whole on every rank."""

    @abstractmethod
    def master_weights(self) -> list[Tensor]:
        """What the optimizer of this rank updates, in fp32: trained parameters, or flat parts of them."""

    @abstractmethod
    def publish_weights(self) -> None:
        """Lets `forward` compute with `master_weights` as they are now; all ranks must call."""

    def close(self) -> None:
        """Leaves the process group in order; without it one exit in 60 ends in an abort."""
        barrier()
        self.accelerator.end_training()
