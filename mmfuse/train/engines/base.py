"""What the trainer asks of an engine."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mmfuse.distributed import barrier
from mmfuse.objectives.base import Seen
from mmfuse.task import Task
from mmfuse.types import Batch, StepOutput

Precision = Literal["fp32", "bf16", "fp16"]

MODEL, MOMENTS = "model", ("exp_avg", "exp_avg_sq")
"""Kinds of tensors that every checkpoint has of each trained parameter."""


class Span(NamedTuple):
    """Where a part of a parameter lies in a tensor that this rank's optimizer updates; both flattened."""

    name: str
    start: int
    """In the parameter."""
    offset: int
    """In the tensor."""
    length: int


class Part(NamedTuple):
    """A contiguous part of a weight, flattened, that this rank writes into checkpoints."""

    name: str
    start: int
    values: Tensor


ReadPart = Callable[[str, int, int], Tensor]
"""Name, start and length -> those values of a stored tensor, flat and in fp32."""


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
    def accumulate(self, *, last: bool) -> AbstractContextManager[None]:
        """Around each micro-step; `last` of its step."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None: ...

    @abstractmethod
    def step(self) -> Tensor:
        """One optimizer step after the last micro-step's backward; returns the gradient norm before clipping.

        Where the norm is NaN or infinite, on whichever rank that began, no rank's weights or moments change.
        """

    @abstractmethod
    def masters(self) -> list[Tensor]:
        """What the optimizer of this rank updates, in fp32: trained parameters, or flat parts of them."""

    @abstractmethod
    def layout(self) -> list[list[Span]]:
        """Of each of `masters`, the parameters that it has parts of."""

    def owned_layout(self) -> list[list[Span]]:
        """As `layout`, but no value is owned by two ranks: what this rank writes."""
        return self.layout()

    @abstractmethod
    def publish_masters(self) -> None:
        """Lets `forward` compute with `masters` as they are now; all ranks must call."""

    def replicas(self) -> Mapping[str, Tensor]:
        """Weights of which every rank has a copy of its own, that must be equal."""
        return {}

    @abstractmethod
    def fixed_parts(self) -> Iterator[Part]:
        """Of weights that are not trained, and of buffers, what this rank writes."""

    @abstractmethod
    def moments(self) -> list[dict[str, Tensor]]:
        """`MOMENTS` of each of `masters`; zeros where no step was taken."""

    @property
    @abstractmethod
    def adam_steps(self) -> int:
        """Steps that Adam has taken: those that were skipped do not count."""

    @adam_steps.setter
    @abstractmethod
    def adam_steps(self, steps: int) -> None: ...

    def parts(self, tensors: Sequence[Tensor]) -> Iterator[Part]:
        """Of tensors shaped as `masters`, what this rank writes."""
        for tensor, spans in zip(tensors, self.owned_layout(), strict=True):
            flat = tensor.detach().reshape(-1)
            for name, start, offset, length in spans:
                yield Part(name, start, flat[offset : offset + length])

    @torch.no_grad()
    def fill(self, tensors: Sequence[Tensor], read: ReadPart) -> None:
        """Tensors shaped as `masters` get what is stored by parameter name."""
        for tensor, spans in zip(tensors, self.layout(), strict=True):
            for name, start, offset, length in spans:
                values = read(name, start, length)
                tensor.detach().view(-1)[offset : offset + length].copy_(values)

    def close(self) -> None:
        """Leaves the process group in order; without it one exit in 60 ends in an abort."""
        barrier()
        self.accelerator.end_training()
