"""A trace of a few steps, to be looked at in ui.perfetto.dev or chrome://tracing."""

import logging
from pathlib import Path

import torch
from pydantic import NonNegativeInt, model_validator
from torch.profiler import ProfilerActivity, profile

from mmfuse.config import Settings
from mmfuse.distributed import rank

logger = logging.getLogger(__name__)


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
    """Traces a window of steps on the ranks that were asked for."""

    def __init__(self, config: ProfileConfig, folder: Path) -> None:
        self._window = config.steps if rank() in config.ranks else None
        self._path = folder / "profile" / f"rank{rank()}.json.gz"
        self._profile: profile | None = None

    def before_step(self, step: int) -> None:
        """Begins, where `step` is the first of the window."""
        if self._window and step == self._window[0]:
            cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._profile = profile(activities=[ProfilerActivity.CPU, *cuda], record_shapes=True)
            self._profile.start()

    def after_step(self, step: int) -> None:
        """Ends and writes, where `step` was the last of the window."""
        if self._profile and self._window and step + 1 == self._window[1]:
            self._profile.stop()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._profile.export_chrome_trace(str(self._path))
            self._profile = None
            logger.info("trace of steps %d to %d: %s; open it in ui.perfetto.dev", *self._window, self._path)
