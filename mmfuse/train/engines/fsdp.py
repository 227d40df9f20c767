"""FSDP2, torch's `fully_shard`. Accelerate starts the processes and no more: on CPU it would silently run DDP."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from mmfuse.objectives.base import Seen
from mmfuse.task import Task
from mmfuse.train.engines.adam import moments_of, read_steps, write_steps
from mmfuse.train.engines.base import Engine, Part, Precision, Span
from mmfuse.train.engines.ddp import skip_where_not_finite
from mmfuse.types import Batch, StepOutput


class FsdpEngine(Engine):
    """Parameters, gradients and optimizer states sharded by rows, each block gathered while it computes."""

    def __init__(self, accelerator: Accelerator, *, precision: Precision) -> None:
        super().__init__(accelerator)
        dtype = torch.bfloat16 if precision == "bf16" else None
        self._policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)

    @property
    def name(self) -> str:
        return "fsdp2"

    def wrap(self, task: Task, optimizer: torch.optim.Optimizer, *, clip_norm: float | None, rank_rows: int) -> None:
        task.to(self.device)
        self.task, self.clip_norm, self.optimizer = task, clip_norm, optimizer
        names = {id(parameter): name for name, parameter in task.named_parameters()}
        mesh = init_device_mesh(self.device.type, (self.world_size,))
        for block in task.model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=self._policy)
        fully_shard(task, mesh=mesh, mp_policy=self._policy)
        for method in ("represent", "embed"):
            register_fsdp_forward_method(task, method)
        # Taken now: while a block computes, it has other parameters in their place.
        self.parameters: dict[str, Any] = dict(task.named_parameters())
        self.trained = {name: p for name, p in self.parameters.items() if p.requires_grad}
        for group in optimizer.param_groups:
            group["params"] = [self.parameters[names[id(parameter)]] for parameter in group["params"]]

    def forward(self, batch: Batch, seen: Mapping[str, Seen]) -> StepOutput:
        return self.task(batch, seen)

    @contextmanager
    def _gathered(self) -> Iterator[None]:
        assert isinstance(self.task, FSDPModule)
        self.task.unshard()
        try:
            yield
        finally:
            self.task.reshard()

    def whole(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
        """Those outside of blocks, as the objectives' are."""
        return self._gathered()

    def accumulate(self, *, last: bool) -> AbstractContextManager[None]:
        assert isinstance(self.task, FSDPModule)
        self.task.set_requires_gradient_sync(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        (loss / self.accelerator.gradient_accumulation_steps).backward()

    def step(self) -> Tensor:
        norm: Any = nn.utils.clip_grad_norm_(self.trained.values(), self.clip_norm or torch.inf)
        norm = norm.full_tensor()
        skip_where_not_finite(self.optimizer, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def masters(self) -> list[Tensor]:
        return [parameter.to_local() for parameter in self.trained.values()]

    def layout(self) -> list[list[Span]]:
        return [[_span(name, parameter)] for name, parameter in self.trained.items()]

    def publish_masters(self) -> None:
        for module in self.task.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def fixed_parts(self) -> Iterator[Part]:
        for name, parameter in self.parameters.items():
            if name not in self.trained:
                yield Part(name, _span(name, parameter).start, parameter.to_local().detach().reshape(-1))
        if self.rank == 0:
            for name, tensor in self.task.state_dict().items():
                if name not in self.parameters:
                    yield Part(name, 0, tensor.reshape(-1))

    def moments(self) -> list[dict[str, Tensor]]:
        states: list[dict[str, Any]] = moments_of(self.optimizer, self.trained.values())
        return [{kind: moment.to_local() for kind, moment in state.items()} for state in states]

    @property
    def adam_steps(self) -> int:
        return read_steps(self.optimizer, self.trained.values())

    @adam_steps.setter
    def adam_steps(self, steps: int) -> None:
        write_steps(self.optimizer, self.trained.values(), steps)


def _span(name: str, parameter: DTensor) -> Span:
    """The rows that this rank has."""
    shape, first = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    row = parameter.numel() // max(1, parameter.shape[0])
    return Span(name, first[0] * row if shape[0] else 0, 0, shape[0] * row)
