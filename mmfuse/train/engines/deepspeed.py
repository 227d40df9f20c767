"""DeepSpeed ZeRO-1 to 3 through Accelerate. Every key that changes results is written here, none left to a default."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager

import torch
from accelerate import Accelerator
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from torch import Tensor, nn

from mmfuse.objectives.base import Seen
from mmfuse.task import Task
from mmfuse.train.engines.adam import moments_of, read_steps, write_steps
from mmfuse.train.engines.base import Engine, Part, Span
from mmfuse.types import Batch, StepOutput


class DeepSpeedEngine(Engine):
    """Optimizer states, gradients (2) and parameters (3) partitioned over ranks."""

    def __init__(self, accelerator: Accelerator, *, accumulation: int) -> None:
        super().__init__(accelerator)
        self.accumulation = accumulation
        plugin = accelerator.state.deepspeed_plugin
        assert plugin is not None
        self.config: dict = plugin.deepspeed_config
        self.stage = int(self.config["zero_optimization"]["stage"])

    @property
    def name(self) -> str:
        return f"zero{self.stage}_offload" if is_offloaded(self.config) else f"zero{self.stage}"

    def wrap(self, task: Task, optimizer: torch.optim.Optimizer, *, clip_norm: float | None, rank_rows: int) -> None:
        self.task = task
        self.trained = {name: p for name, p in task.named_parameters() if p.requires_grad}
        # Kept apart: bf16 would shorten them, and stage 3 cuts them into parts.
        frozen = {name: p for name, p in task.named_parameters() if self.rank == 0 and not p.requires_grad}
        self.frozen = {name: p.detach().to("cpu", torch.float32, copy=True) for name, p in frozen.items()}
        self.config |= {
            # `auto` needs a prepared loader, which we must not have; it only feeds DeepSpeed's own throughput log.
            "train_micro_batch_size_per_gpu": rank_rows,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": clip_norm or 0.0,  # DeepSpeed's own default is 1.0
            "zero_allow_untested_optimizer": True,
        }
        self.config.pop("train_batch_size", None)
        self.engine, self.optimizer = self.accelerator.prepare(task, optimizer)

    def forward(self, batch: Batch, seen: Mapping[str, Seen]) -> StepOutput:
        return self.engine(batch, seen)

    def whole(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
        return GatheredParameters(list(parameters), enabled=self.stage == 3)

    def accumulate(self, *, last: bool) -> AbstractContextManager[None]:
        return self.accelerator.accumulate(self.engine)

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)  # also steps the optimizer after the last micro-step

    def step(self) -> Tensor:
        return torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32)

    def masters(self) -> list[Tensor]:
        """This rank's flat fp32 partitions: one a parameter group, under stage 3 several where a group is large."""
        zero = self._zero
        return zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups

    def layout(self) -> list[list[Span]]:
        """As DeepSpeed 0.19.8 notes it down for its own `safe_get_local_*`."""
        layout: list[list[Span]] = [[] for _ in self.masters()]
        for name, parameter in self.trained.items():
            if self.stage == 3:
                group, offset, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
                size, numel = parameter.ds_tensor.ds_numel, parameter.ds_numel  # type: ignore[attr-defined]
                start = min(self.rank * size, numel)
                layout[group].append(Span(name, start, offset, min(size, numel - start)))
            elif fragment := parameter._hp_mapping:  # type: ignore[attr-defined]
                here, there = fragment.lp_fragment_address, fragment.hp_fragment_address
                layout[fragment.param_group_index].append(Span(name, here.start, there.start, here.numel))
        return layout

    def publish_masters(self) -> None:
        """As ZeRO's own optimizers do at the end of a step (DeepSpeed 0.19.8)."""
        zero = self._zero
        if self.stage < 3:
            zero.update_lp_params()
            return
        zero._partition_all_parameters()
        for group in range(len(zero.fp32_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def replicas(self) -> Mapping[str, Tensor]:
        return dict(self.task.named_parameters()) if self.stage < 3 else {}

    def fixed_parts(self) -> Iterator[Part]:
        if self.rank == 0:
            parameters = dict(self.task.named_parameters())
            buffers = {name: t for name, t in self.task.state_dict().items() if name not in parameters}
            for name, tensor in {**self.frozen, **buffers}.items():
                yield Part(name, 0, tensor.reshape(-1))

    def moments(self) -> list[dict[str, Tensor]]:
        return moments_of(self._zero.optimizer, self.masters())

    @property
    def adam_steps(self) -> int:
        return read_steps(self._zero.optimizer, self.masters())

    @adam_steps.setter
    def adam_steps(self, steps: int) -> None:
        write_steps(self._zero.optimizer, self.masters(), steps)

    @property
    def _zero(self):
        """DeepSpeed's ZeRO optimizer, around ours."""
        return self.engine.optimizer


def is_offloaded(config: Mapping) -> bool:
    """Whether optimizer states or parameters lie in the host's memory."""
    settings = config["zero_optimization"]
    parts = [settings.get(name) or {} for name in ("offload_optimizer", "offload_param")]
    return any(part.get("device", "none") not in ("none", None) for part in parts)
