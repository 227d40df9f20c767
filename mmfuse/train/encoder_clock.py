"""How long the encoders of this rank compute: which rank has a slow device, or more to compute than others."""

import time

import torch
from torch import nn

from mmfuse.task import Task


class EncoderClock:
    """Time of the encoders' forward in training. Ranks meet only after it, so none of it is waiting for another, but
    where an engine gathers their weights (ZeRO-3, FSDP2)."""

    def __init__(self, task: Task, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._begin: float | torch.cuda.Event = 0.0
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        for encoder in task.model.encoders.values():
            encoder.register_forward_pre_hook(self._before)
            encoder.register_forward_hook(self._after)

    def read(self) -> float:
        """Seconds since the last call. The device must have done all that was asked of it."""
        milliseconds = sum(begin.elapsed_time(end) for begin, end in self._events)
        seconds, self._seconds, self._events = self._seconds + milliseconds / 1000, 0.0, []
        return seconds

    def _before(self, encoder: nn.Module, _: object) -> None:
        self._begin = self._now()

    def _after(self, encoder: nn.Module, *_: object) -> None:
        if not encoder.training:
            return
        begin, end = self._begin, self._now()
        if isinstance(begin, float) and isinstance(end, float):
            self._seconds += end - begin
        elif isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
            self._events.append((begin, end))

    def _now(self) -> "float | torch.cuda.Event":
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
