"""DeepSpeed ZeRO-1 to 3 through Accelerate. Every key that changes results is written here, none left to a default."""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from mmfuse.objectives.base import Seen
from mmfuse.task import Task
from mmfuse.train.engines.base import MOMENTS, Engine, PortableState
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
        return f"zero{self.stage}"

    def wrap(self, task: Task, optimizer: torch.optim.Optimizer, *, clip_norm: float | None, rank_rows: int) -> None:
        self.task = task
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

    def accumulate(self) -> AbstractContextManager[None]:
        return self.accelerator.accumulate(self.engine)

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)  # also steps the optimizer after the last micro-step

    def step(self) -> Tensor:
        return torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32)

    def export_weights(self) -> dict[str, Tensor]:
        weights = dict(self.frozen)
        for name, parameter in self.trained_parameters():
            self._collect(weights, name, parameter, safe_get_full_fp32_param(parameter))
        parameters = dict(self.task.named_parameters())
        for name, buffer in self.task.state_dict().items():
            if name not in parameters and self.rank == 0:
                weights[name] = buffer.detach().to("cpu", copy=True)
        return weights

    def export_moments(self) -> tuple[PortableState, int]:
        self._link_moments()
        state: PortableState = {kind: {} for kind in MOMENTS}
        for name, parameter in self.trained_parameters():
            for kind in MOMENTS:
                self._collect(state[kind], name, parameter, safe_get_full_optimizer_state(parameter, kind))
        return state, int(self._flat_states()[0]["step"])

    def _collect(self, tensors: dict[str, Tensor], name: str, parameter: nn.Parameter, tensor: Tensor | None) -> None:
        """A whole tensor of a parameter, which every rank had to ask for, in rank 0's memory."""
        assert tensor is not None, f"DeepSpeed has nothing of {name}"
        if self.rank == 0:
            shape = parameter.ds_shape if self.stage == 3 else parameter.shape  # type: ignore[attr-defined]
            tensors[name] = tensor.detach().to("cpu", copy=True).reshape(shape).contiguous()

    def import_weights(self, weights: Mapping[str, Tensor]) -> None:
        for name, parameter in self.trained_parameters():
            tensor = weights[name].to(self.device)
            if self.stage < 3:
                safe_set_full_fp32_param(parameter, tensor)
            else:
                safe_set_local_fp32_param(parameter, self._local_part(parameter, tensor))

    def import_moments(self, state: PortableState, adam_steps: int) -> None:
        inner, flats = self._zero.optimizer, self._flat_groups()
        for flat in flats:
            inner.state[flat] = {
                "step": torch.tensor(float(adam_steps)),
                **{k: torch.zeros_like(flat) for k in MOMENTS},
            }
        self._link_moments()
        self.import_weights(state["model"])
        for name, parameter in self.trained_parameters():
            for kind in MOMENTS:
                tensor = state[kind][name].to(self.device)
                if self.stage < 3:
                    safe_set_full_optimizer_state(parameter, tensor, kind)
                else:
                    safe_set_local_optimizer_state(parameter, self._local_part(parameter, tensor), kind)

    def master_weights(self) -> list[Tensor]:
        return self._flat_groups()

    def publish_weights(self) -> None:
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

    def _link_moments(self) -> None:
        """Lets `safe_get_*` and `safe_set_*` find the moments of every parameter.

        DeepSpeed 0.19.8 does so once, after the first parameter group's first step, when the other groups have none yet
        (stage_1_and_2.py, `_optimizer_step`). Remove when it links after the last group.
        """
        if self.stage < 3:
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    @property
    def _zero(self):
        """DeepSpeed's ZeRO optimizer, around ours."""
        return self.engine.optimizer

    def _flat_groups(self) -> list[Tensor]:
        """This rank's flat fp32 partitions, one a parameter group."""
        return (
            self._zero.fp32_partitioned_groups_flat if self.stage == 3 else self._zero.single_partition_of_fp32_groups
        )

    def _flat_states(self) -> list[dict]:
        return [self._zero.optimizer.state[flat] for flat in self._flat_groups()]

    def _local_part(self, parameter: nn.Parameter, tensor: Tensor) -> Tensor:
        """With our own padding: `safe_set_full_*` fails where the size is not a multiple of the world size."""
        size = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
        padded = F.pad(tensor.flatten(), (0, size * self.world_size - tensor.numel()))
        return padded.narrow(0, size * self.rank, size)
