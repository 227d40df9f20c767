"""DeepSpeed ZeRO-1 to 3 through Accelerate. Every key that changes results is written here, none left to a default."""

from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from mmfuse.train.engines.base import Engine, PortableState
from mmfuse.types import Batch, StepOutput

_MOMENTS = ("exp_avg", "exp_avg_sq")


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

    def wrap(
        self, task: nn.Module, optimizer: torch.optim.Optimizer, *, clip_norm: float | None, rank_rows: int
    ) -> None:
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

    def forward(self, batch: Batch) -> StepOutput:
        return self.engine(batch)

    def accumulate(self) -> AbstractContextManager[None]:
        return self.accelerator.accumulate(self.engine)

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)  # also steps the optimizer after the last micro-step

    def step(self) -> Tensor:
        return torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32)

    def export_state(self) -> tuple[PortableState, int]:
        self._link_moments()
        state: PortableState = {"model": {**self.frozen}, **{kind: {} for kind in _MOMENTS}}
        for name, parameter in self.trained_parameters():
            shape = parameter.ds_shape if self.stage == 3 else parameter.shape  # type: ignore[attr-defined]
            tensors = {"model": safe_get_full_fp32_param(parameter)}
            tensors |= {kind: safe_get_full_optimizer_state(parameter, kind) for kind in _MOMENTS}
            if self.rank == 0:
                for kind, tensor in tensors.items():
                    assert tensor is not None, f"DeepSpeed has no {kind} of {name}"
                    state[kind][name] = tensor.detach().to("cpu", copy=True).reshape(shape).contiguous()
        parameters = dict(self.task.named_parameters())
        for name, buffer in self.task.state_dict().items():
            if name not in parameters and self.rank == 0:
                state["model"][name] = buffer.detach().to("cpu", copy=True)
        return state, int(self._flat_states()[0]["step"])

    def import_moments(self, state: PortableState, adam_steps: int) -> None:
        inner, flats = self._zero.optimizer, self._flat_groups()
        for flat in flats:
            inner.state[flat] = {
                "step": torch.tensor(float(adam_steps)),
                **{k: torch.zeros_like(flat) for k in _MOMENTS},
            }
        self._link_moments()
        for name, parameter in self.trained_parameters():
            tensors = {kind: state[kind][name].to(self.device) for kind in ("model", *_MOMENTS)}
            if self.stage < 3:
                safe_set_full_fp32_param(parameter, tensors["model"])
                for kind in _MOMENTS:
                    safe_set_full_optimizer_state(parameter, tensors[kind], kind)
            else:
                # Own padding: safe_set_full_* fails where the size is not a multiple of the world size.
                local = {kind: self._local_part(parameter, tensor) for kind, tensor in tensors.items()}
                safe_set_local_fp32_param(parameter, local["model"])
                for kind in _MOMENTS:
                    safe_set_local_optimizer_state(parameter, local[kind], kind)

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
        size = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
        padded = F.pad(tensor.flatten(), (0, size * self.world_size - tensor.numel()))
        return padded.narrow(0, size * self.rank, size)
