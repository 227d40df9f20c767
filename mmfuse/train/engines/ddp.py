"""One process, or DistributedDataParallel through Accelerate."""

from collections.abc import Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from mmfuse.objectives.base import Seen
from mmfuse.task import Task
from mmfuse.train.engines.base import MOMENTS, Engine, PortableState
from mmfuse.types import Batch, StepOutput


class DdpEngine(Engine):
    """Replicated weights; gradients averaged over ranks."""

    @property
    def name(self) -> str:
        return "ddp" if self.world_size > 1 else "one process"

    def wrap(self, task: Task, optimizer: torch.optim.Optimizer, *, clip_norm: float | None, rank_rows: int) -> None:
        self.task, self.clip_norm = task, clip_norm
        self.optimizer = optimizer
        self.wrapped, self._prepared_optimizer = self.accelerator.prepare(task, optimizer)

    def forward(self, batch: Batch, seen: Mapping[str, Seen]) -> StepOutput:
        return self.wrapped(batch, seen)

    def accumulate(self) -> AbstractContextManager[None]:
        return self.accelerator.accumulate(self.wrapped)

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def step(self) -> Tensor:
        norm = nn.utils.clip_grad_norm_(self.task.parameters(), self.clip_norm or torch.inf)
        self._prepared_optimizer.step()
        self._prepared_optimizer.zero_grad()
        return norm

    def export_weights(self) -> dict[str, Tensor]:
        return {name: _to_cpu(tensor) for name, tensor in self.task.state_dict().items()} if self.rank == 0 else {}

    def export_moments(self) -> tuple[PortableState, int]:
        moments = {name: self.optimizer.state[p] for name, p in self.trained_parameters()}
        adam_steps = int(next(iter(moments.values()))["step"])
        if self.rank != 0:
            return {}, adam_steps
        return {kind: {name: _to_cpu(moment[kind]) for name, moment in moments.items()} for kind in MOMENTS}, adam_steps

    @torch.no_grad()
    def import_weights(self, weights: Mapping[str, Tensor]) -> None:
        for name, parameter in self.trained_parameters():
            parameter.copy_(weights[name])

    def import_moments(self, state: PortableState, adam_steps: int) -> None:
        for name, parameter in self.trained_parameters():
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(adam_steps)),
                **{kind: state[kind][name].to(parameter.device) for kind in MOMENTS},
            }

    def master_weights(self) -> list[Tensor]:
        return [parameter for _, parameter in self.trained_parameters()]

    def publish_weights(self) -> None:
        """The parameters themselves are the masters."""


def _to_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else None, copy=True).contiguous()
