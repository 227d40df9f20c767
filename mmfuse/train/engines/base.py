"""What the trainer asks of an engine, and the engine that the launcher asked for."""

import os
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Literal

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import DistributedType
from torch import Tensor, nn

from mmfuse.errors import LaunchError
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

    name: str
    task: nn.Module
    """The unwrapped task: for evaluation and names."""
    optimizer: torch.optim.Optimizer

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
        """Weights and Adam's moments for a portable checkpoint, and Adam's step count. All ranks must call."""

    @abstractmethod
    def import_moments(self, state: PortableState, adam_steps: int) -> None:
        """Adam's moments from a portable checkpoint of any engine and world size. `state` is whole on every rank."""

    def wait_for_everyone(self) -> None:
        """Until all ranks are here."""
        self.accelerator.wait_for_everyone()

    def close(self) -> None:
        """Leaves the process group in order; without it one exit in 60 ends in an abort."""
        self.wait_for_everyone()
        self.accelerator.end_training()


def start_engine(*, precision: Precision, accumulation: int) -> Engine:
    """The engine that `accelerate launch` asked for.

    Raises:
        LaunchError: what started is not what was asked for. Three such failures are silent in the libraries.
    """
    accelerator = Accelerator(
        mixed_precision="no" if precision == "fp32" else precision,
        gradient_accumulation_steps=accumulation,
        kwargs_handlers=[InitProcessGroupKwargs(backend=_backend(), timeout=timedelta(minutes=30))],
    )
    _check_launch(accelerator)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from mmfuse.train.engines.deepspeed import DeepSpeedEngine  # its import alone takes seconds

        return DeepSpeedEngine(accelerator, accumulation=accumulation)
    from mmfuse.train.engines.ddp import DdpEngine

    return DdpEngine(accelerator)


def _backend() -> str | None:
    """Accelerate's own choice on GPUs. On CPU gloo by name: without it DeepSpeed sees a world of 1 on every rank."""
    on_cpu = not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in {"1", "true"}
    return "gloo" if on_cpu and "WORLD_SIZE" in os.environ else None


def _check_launch(accelerator: Accelerator) -> None:
    """Compares the processes that run with those that the launcher promised."""
    asked = int(os.environ.get("MMFUSE_NUM_PROCESSES") or os.environ.get("WORLD_SIZE") or 1)
    if accelerator.num_processes != asked:
        raise LaunchError(
            f"asked for {asked} processes, but Accelerate started {accelerator.num_processes}. On CPU, "
            "`accelerate launch --cpu` runs one process whatever --num_processes says; start with launch/train.sh, "
            "or set ACCELERATE_USE_CPU=true and pass --multi_gpu"
        )
    kind = accelerator.distributed_type
    if os.environ.get("ACCELERATE_USE_FSDP", "false") == "true":
        raise LaunchError("FSDP is not supported yet; use launch/accelerate/ddp.yaml, zero2.yaml or zero3.yaml")
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true" and kind != DistributedType.DEEPSPEED:
        raise LaunchError(f"asked for DeepSpeed, but Accelerate started {kind.value}")
