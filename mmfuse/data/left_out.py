"""Global batches that a run leaves out: the data of a spike, after it went back to the checkpoint before."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class LeftOut(NamedTuple):
    """A window of the plan."""

    before_step: int
    """The step that would have had the first of these batches."""
    batches: int


class PlannedSteps:
    """Which global batch of the plan each step of training has."""

    def __init__(self, left_out: Sequence[LeftOut]) -> None:
        windows = sorted(left_out)
        self._before = np.array([window.before_step for window in windows], dtype=np.int64)
        self._shifts = np.cumsum([0, *(window.batches for window in windows)], dtype=np.int64)

    def of(self, step: np.ndarray | int) -> np.ndarray:
        """The batch's number in the plan, elementwise."""
        return step + self._shifts[np.searchsorted(self._before, step, side="right")]

    def step_of(self, planned: int) -> int:
        """The step that has this batch of the plan; for one that is left out, the step that comes in its place."""
        number = int(np.searchsorted(self._before + self._shifts[1:], planned, side="right"))
        step = planned - int(self._shifts[number])
        return min(step, int(self._before[number])) if number < len(self._before) else step
