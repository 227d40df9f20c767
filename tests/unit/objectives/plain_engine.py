"""What `micro_steps` needs of an engine, without Accelerate."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from mmfuse.distributed import rank
from mmfuse.task import Task
from mmfuse.types import Batch


class PlainEngine:
    """Of a task that DDP wraps, or nobody."""

    def __init__(self, task: Task) -> None:
        self.task, self.rank, self.device = task, rank(), torch.device("cpu")

    def represent(self, batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad():
            return self.task.represent(batch)

    def whole(self, _: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
        return nullcontext()
