"""A trace of a few steps, to be looked at in ui.perfetto.dev or chrome://tracing."""

import gzip
import json
import logging
import math
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import NonNegativeInt, model_validator
from torch.profiler import ProfilerActivity, profile

from mmfuse.config import Settings
from mmfuse.distributed import rank
from mmfuse.errors import MmfuseError

logger = logging.getLogger(__name__)

_COLLECTIVES = ("nccl", "gloo:")
"""How the names of kernels begin that exchange data, and of a CPU's exchanges."""


class ProfileConfig(Settings):
    """Which steps are traced."""

    steps: tuple[NonNegativeInt, NonNegativeInt] | None = None
    """First step, 0-based, and the one after the last, such as [20, 25]; null: none."""
    ranks: tuple[NonNegativeInt, ...] = (0,)

    @model_validator(mode="after")
    def _check_order(self) -> "ProfileConfig":
        if self.steps and self.steps[0] >= self.steps[1]:
            raise ValueError(f"profile.steps = {list(self.steps)}: the first must be below the second")
        return self


class StepProfiler:
    """Traces a window of steps on the ranks that were asked for. A context: what was traced when it ends is written."""

    def __init__(self, config: ProfileConfig, folder: Path) -> None:
        self._window = config.steps if rank() in config.ranks else None
        self._path = folder / "profile" / f"rank{rank()}.json.gz"
        self._profile: profile | None = None

    def before_step(self, step: int) -> None:
        """Begins, where `step` is in the window: also of a run that goes on within."""
        if self._window and self._profile is None and self._window[0] <= step < self._window[1]:
            cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._profile = profile(activities=[ProfilerActivity.CPU, *cuda], record_shapes=True, acc_events=True)
            self._profile.start()

    def after_step(self, step: int) -> None:
        """Ends and writes, where `step` was the last of the window."""
        if self._window and step + 1 == self._window[1]:
            self._write()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None or issubclass(error, MmfuseError):  # after another, a GPU may hang
            self._write()

    def _write(self) -> None:
        traced, self._profile = self._profile, None
        if traced is None:
            return
        traced.stop()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            traced.export_chrome_trace(str(self._path))
            found = describe_communication(read_trace(self._path))
        except (OSError, RuntimeError) as error:  # a run is worth more than its trace
            logger.warning("the trace %s could not be written: %s", self._path, error)
        else:
            logger.info("trace: %s, for ui.perfetto.dev; %s", self._path, found)


def read_trace(path: Path) -> list[dict[str, Any]]:
    """The spans of a trace; times in microseconds."""
    with gzip.open(path) as file:
        return [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]


def describe_communication(events: list[dict[str, Any]]) -> str:
    """For how long collectives were under way and, on a GPU, for how much of it nothing was computed beside them."""
    kernels = [event for event in events if event.get("cat") == "kernel"]
    exchanges = [event for event in kernels or events if event["name"].startswith(_COLLECTIVES)]
    whole = max(event["ts"] + event["dur"] for event in events) - min(event["ts"] for event in events)
    text = f"ranks exchanged data for {_busy(exchanges) / whole:.0%} of {whole / 1e6:.2f} s"
    if not kernels:
        return text
    computing = [kernel for kernel in kernels if not kernel["name"].startswith(_COLLECTIVES)]
    return f"{text}, for {(_busy(kernels) - _busy(computing)) / whole:.0%} with nothing computed beside"


def _busy(events: list[dict[str, Any]]) -> float:
    """Microseconds in which one of these or more were under way."""
    total, reached = 0.0, -math.inf
    for start, end in sorted((event["ts"], event["ts"] + event["dur"]) for event in events):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
