"""Tells a loss that stays high from one that is high for a moment."""

import math
import statistics
from collections import deque
from collections.abc import Iterable

from pydantic import Field, PositiveInt

from mmfuse.config import Settings

_WINDOW, _FEWEST = 50, 5
"""Lines of metrics whose median a loss is compared with."""


class RollBackConfig(Settings):
    """When a run goes back. A loss is the mean of a line of metrics."""

    loss_factor: float = Field(default=2.0, gt=1)
    """A loss above so many times the median of those before is part of a spike."""
    losses_in_a_row: PositiveInt = 3
    """With so many of them the spike is one that does not pass by itself."""
    at_most: PositiveInt = 3
    """Roll-backs of a run; where one more would be needed it ends with an error."""


class SpikeDetector:
    """Tells a loss that stays high from one that is high for a moment."""

    def __init__(self, config: RollBackConfig, losses: Iterable[tuple[int, float]]) -> None:
        """`losses` are those so far, each with the steps that were done."""
        self._config = config
        self._calm: deque[float] = deque(maxlen=_WINDOW)
        self._high: list[tuple[int, float]] = []
        """The spike so far: after which step each loss began, and the loss."""
        self._before = 0
        for step, loss in losses:
            self.add(loss, step=step)

    @property
    def median(self) -> float:
        """Of the losses that are no spike."""
        return statistics.median(self._calm)

    def add(self, loss: float, *, step: int) -> int | None:
        """Whether a spike has lasted too long: the steps that were done when it began."""
        before, self._before = self._before, step
        if math.isnan(loss):  # all steps were skipped
            return None
        if len(self._calm) < _FEWEST or loss <= self._config.loss_factor * self.median:
            self._calm.extend([*(passed for _, passed in self._high), loss])
            self._high = []
            return None
        self._high.append((before, loss))
        return self._high[0][0] if len(self._high) >= self._config.losses_in_a_row else None
