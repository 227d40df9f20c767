"""An exponential moving average of the weights (Polyak and Juditsky 1992), for use instead of the last ones.

Each rank averages the fp32 weights that its optimizer updates: whole parameters, or its flat parts of them under ZeRO.
So nothing travels in a step, and the memory is partitioned as the engine's own is.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mmfuse.train.engines.base import Engine, ReadPart

_SWAPPED_AT_ONCE = 1 << 22
"""Numbers of a flat tensor, or rows of a matrix."""


class WeightAverage:
    """The average of the weights after every step so far; without a decay there is none, and nothing happens."""

    def __init__(self, engine: Engine, decay: float | None) -> None:
        """Begins with the weights of now. `decay` is what remains of the average in a step, once there were many."""
        self.engine, self.decay = engine, decay
        self.tensors = self._copies() if decay else []

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After step `step`, 0-based; the first ones count for more, that the average may forget the random start."""
        if self.decay:
            decay = min(self.decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(self.tensors, self.engine.masters(), 1 - decay)  # type: ignore[reportPrivateImportUsage]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the engine's weights are the average; all ranks must enter and leave, and nobody may take a step."""
        if self.decay:
            self._swap()
        yield
        if self.decay:
            self._swap()

    def begin(self, read: ReadPart | None) -> None:
        """Goes on with a stored average, or begins again with the weights of now."""
        if self.decay:
            self.tensors = self._copies()
        if self.decay and read:
            self.engine.fill(self.tensors, read)

    def _copies(self) -> list[Tensor]:
        return [weight.detach().clone() for weight in self.engine.masters()]

    @torch.no_grad()
    def _swap(self) -> None:
        for mine, master in zip(self.tensors, self.engine.masters(), strict=True):
            # In parts: under ZeRO one tensor may be all that this rank holds.
            for part, other in zip(mine.split(_SWAPPED_AT_ONCE), master.detach().split(_SWAPPED_AT_ONCE), strict=True):
                kept = other.clone()
                other.copy_(part)
                part.copy_(kept)
        self.engine.publish_masters()
