"""Counts bad members and lost samples by source and kind, and stops a run that has too many of them."""

from collections import Counter
from typing import NamedTuple

from pydantic import Field, PositiveInt

from mmfuse.config import Settings
from mmfuse.data.decode import source_of
from mmfuse.errors import DataError
from mmfuse.types import Batch, Fault


class QuarantineConfig(Settings):
    """How much bad data a run puts up with. Each rank judges what it reads, source by source."""

    max_share: float = Field(default=0.01, ge=0, le=1)
    """Largest share of a source's samples with a bad member."""
    judge_after: PositiveInt = 1000
    """Samples of a source before its share is judged."""
    max_consecutive: PositiveInt = 50
    """So many bad samples of a source in a row mean that something else is wrong."""


class SourceCounts(NamedTuple):
    """What a rank met in one source since the run was started."""

    samples: int
    masked: int
    """Samples that went without a modality because its member was bad."""
    lost: int
    """Samples of which nothing was left."""


class Quarantine:
    """The bad members that one rank met."""

    def __init__(self, names: list[str], config: QuarantineConfig) -> None:
        """For the sources of these names, in their order."""
        self.names, self.config = names, config
        self.kinds: Counter[tuple[str, str]] = Counter()
        """By source and kind."""
        self._samples, self._masked, self._lost = ([0] * len(names) for _ in range(3))
        self._consecutive = [0] * len(names)

    def add(self, batch: Batch) -> None:
        """Counts a batch.

        Raises:
            DataError: a source has too many bad samples; the batch's faults are counted.
        """
        faults: dict[str, Fault] = {f"{fault.shard}/{fault.key}": fault for fault in batch.faults}
        self.kinds.update((fault.source, fault.kind) for fault in batch.faults)
        sources = source_of(batch.sample_id, num_sources=len(self.names)).tolist()
        for source, key in zip(sources, batch.keys, strict=True):
            self._samples[source] += 1
            fault = faults.get(key) if faults else None
            self._masked[source] += fault is not None and not fault.lost
            self._lost[source] += fault is not None and fault.lost
            self._consecutive[source] = self._consecutive[source] + 1 if fault else 0
            if fault:
                self._judge(source, fault)

    def counts(self) -> dict[str, SourceCounts]:
        """By source."""
        columns = zip(self._samples, self._masked, self._lost, strict=True)
        return {name: SourceCounts(*row) for name, row in zip(self.names, columns, strict=True)}

    def _judge(self, source: int, fault: Fault) -> None:
        samples, bad = self._samples[source], self._masked[source] + self._lost[source]
        if self._consecutive[source] >= self.config.max_consecutive:
            what = f"the last {self._consecutive[source]} samples that this rank read of it are all bad"
            limit = f"data.quarantine.max_consecutive = {self.config.max_consecutive}"
        elif samples >= self.config.judge_after and bad > self.config.max_share * samples:
            what = f"{bad} of {samples:,} samples that this rank read of it are bad"
            limit = f"data.quarantine.max_share = {self.config.max_share}"
        else:
            return
        raise DataError(
            f"{self.names[source]}: {what} ({limit}); the last is {fault.shard}/{fault.key}.{fault.extension}: "
            f"{fault.reason}. `mmfuse shards check` finds every bad member, `mmfuse shards quarantine` leaves them out"
        )
