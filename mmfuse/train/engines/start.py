"""Starts the engine that the launcher asked for, and checks that it is what started."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import Accelerator, InitProcessGroupKwargs, PartialState
from accelerate.utils import DistributedType

from mmfuse.errors import LaunchError
from mmfuse.train.engines.base import Engine
from mmfuse.train.engines.ddp import DdpEngine
from mmfuse.train.engines.strategy import (
    Asked,
    check_strategy,
    offloads_optimizer,
    runs_on_cpu,
    uses_deepspeed,
    uses_fsdp,
)

_LONG_TIMEOUT = timedelta(days=7)
"""Of ranks that work on their own: who is done waits for the slowest."""


def start_engine(asked: Asked) -> Engine:
    """The engine that `accelerate launch` asked for.

    Raises:
        ConfigError: the strategy contradicts the run.
        LaunchError: what started is not what was asked for. Three such failures are silent in the libraries.
    """
    check_strategy(asked)
    _load_extensions(adam=offloads_optimizer())
    fsdp = uses_fsdp()
    with _without("ACCELERATE_USE_FSDP", "ACCELERATE_MIXED_PRECISION"):
        accelerator = Accelerator(
            mixed_precision="no" if fsdp or asked.precision == "fp32" else asked.precision,
            gradient_accumulation_steps=asked.accumulation,
            kwargs_handlers=[
                InitProcessGroupKwargs(backend=_backend(), timeout=timedelta(seconds=asked.timeout_seconds))
            ],
        )
    _check_launch(accelerator)
    if fsdp:
        from mmfuse.train.engines.fsdp import FsdpEngine

        return FsdpEngine(accelerator, precision=asked.precision)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from mmfuse.train.engines.deepspeed import DeepSpeedEngine  # its import alone takes seconds

        return DeepSpeedEngine(accelerator, accumulation=asked.accumulation)
    return DdpEngine(accelerator)


@contextmanager
def _without(*names: str) -> Iterator[None]:
    """Hides variables from Accelerate: we do what they ask for."""
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    yield
    os.environ.update(hidden)


def join_ranks() -> torch.device:
    """For work without training: joins the process group that a launcher promised, if any; gives this rank's device.

    Raises:
        LaunchError: other processes started than were asked for.
    """
    _load_extensions(adam=False)
    state = PartialState(cpu=not torch.cuda.is_available(), backend=_backend(), timeout=_LONG_TIMEOUT)
    _check_number(state.num_processes)
    assert state.device is not None
    return state.device


def leave_ranks() -> None:
    """Leaves the process group in order, if there is one; without it one exit in 60 ends in an abort."""
    PartialState().destroy_process_group()


def _backend() -> str | None:
    """Accelerate's own choice on GPUs. On CPU gloo by name: without it DeepSpeed sees a world of 1 on every rank."""
    return "gloo" if runs_on_cpu() and "WORLD_SIZE" in os.environ else None


def _load_extensions(*, adam: bool) -> None:
    if uses_deepspeed():
        from mmfuse.train.engines.extension import load_extensions  # its import alone takes seconds

        load_extensions(adam=adam)


def _check_launch(accelerator: Accelerator) -> None:
    """Compares what runs with what the launcher promised."""
    _check_number(accelerator.num_processes)
    kind = accelerator.distributed_type
    if uses_fsdp() and "WORLD_SIZE" not in os.environ:
        raise LaunchError("asked for fsdp2, but a single process was started; start with launch/train.sh fsdp2")
    if uses_deepspeed() and kind != DistributedType.DEEPSPEED:
        raise LaunchError(f"asked for DeepSpeed, but Accelerate started {kind.value}")


def _check_number(started: int) -> None:
    asked = int(os.environ.get("MMFUSE_NUM_PROCESSES") or os.environ.get("WORLD_SIZE") or 1)
    if started != asked:
        raise LaunchError(
            f"asked for {asked} processes, but Accelerate started {started}. On CPU, `accelerate launch --cpu` runs "
            "one process whatever --num_processes says; start with launch/train.sh, or set ACCELERATE_USE_CPU=true "
            "and pass --multi_gpu"
        )
