"""Numbers over time, to the log, `metrics.jsonl` and TensorBoard, without a sync inside a step."""

import json
import logging
import math
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from mmfuse.data.decode import source_of
from mmfuse.data.quarantine import SourceCounts
from mmfuse.distributed import first_rank_decides, rank, sum_over_ranks, world_size
from mmfuse.files import drop_lines_after
from mmfuse.log import hide_bar
from mmfuse.train.speed import Speed
from mmfuse.types import Batch, StepOutput

logger = logging.getLogger(__name__)


_STRAGGLER_SHARE, _STRAGGLER_FACTOR = 0.1, 1.5
"""A rank is named that takes so much longer than the others do in the mean, if that is such a share of the step."""


class MetricsWriter:
    """Sums on the device, writes on rank 0. All ranks call the same methods."""

    def __init__(self, folder: Path, *, start: int, stop: int, speed: Speed, sources: list[str]) -> None:
        self.path, self.device, self._speed = folder / "metrics.jsonl", speed.device, speed
        self._sums: dict[str, Tensor] = {}
        self._step_sums: dict[str, Tensor] = {}
        self._steps = 0
        self._waited = 0.0
        self._sources, self._counts = sources, [SourceCounts(0, 0, 0)] * len(sources)
        last = first_rank_decides(lambda: _go_on_after(self.path, start))
        self._skips = SkippedSteps(self.device, total=int(last.get("skipped_steps", 0)))
        self._before = [SourceCounts(0, 0, 0)] * len(sources)
        """What all ranks had met when the run went on; rank 0 has it."""
        self._source_losses: dict[str, Tensor] = {}
        self._step_source_losses: dict[str, Tensor] = {}
        self._since = time.perf_counter()
        if rank() == 0:
            self._before = [SourceCounts(*(int(last.get(n, 0)) for n in _count_names(source))) for source in sources]
            self._file = open(self.path, "a", buffering=1)  # noqa: SIM115  # open as long as the run
            self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
        self._bar = tqdm(
            total=stop, initial=start, unit="step", disable=hide_bar(rank()), dynamic_ncols=True, leave=False
        )

    def count_wait(self, seconds: float) -> None:
        """Time that the step stood waiting for data."""
        self._waited += seconds

    def add(self, output: StepOutput, batch: Batch, *, share: float) -> None:
        """One micro-step; `share` is its part of the step."""
        for name, value in {"loss": output.loss.detach(), **output.terms}.items():
            value = value.float() * share
            self._step_sums[name] = self._step_sums[name] + value if name in self._step_sums else value
        self._speed.add(output.tokens)
        if len(self._sources) > 1:
            self._add_by_source(output, batch)

    def count_sources(self, counts: list[SourceCounts]) -> None:
        """What this rank met in each source since the run was started."""
        self._counts = counts

    def end_step(self, grad_norm: Tensor) -> None:
        """All micro-steps were added. Losses of a step that was skipped are in no mean."""
        kept = self._skips.add(grad_norm)
        pairs = (self._sums, self._step_sums), (self._source_losses, self._step_source_losses)
        for sums, step_sums in pairs:
            for name, value in step_sums.items():
                value = torch.where(kept, value, 0)
                sums[name] = sums[name] + value if name in sums else value
            step_sums.clear()
        self._steps += 1
        self._bar.update()

    def write(self, step: int, *, rows: int, facts: dict[str, Any]) -> dict[str, float]:
        """Means since the last call, over steps and ranks, with rates and memory; the same on every rank.

        Means over steps that were not skipped: NaN where all of them were.

        Args:
            step: steps done so far.
            rows: samples of a global batch.
            facts: more numbers of this moment, tensors or floats.
        """
        names = list(self._sums)
        skipped, total, in_a_row = self._skips.read()
        kept_steps = torch.tensor(self._steps - skipped)  # a tensor: 0 / 0 is NaN
        means = sum_over_ranks(torch.stack([self._sums[name] for name in names])).cpu() / (world_size() * kept_steps)
        seconds = time.perf_counter() - self._since
        numbers = dict(zip(names, means.tolist(), strict=True)) | {name: float(value) for name, value in facts.items()}
        numbers |= {
            "samples_per_second": self._steps * rows / seconds,
            "step_seconds": seconds / self._steps,
            **self._speed.read(seconds),
            **self._by_rank(seconds / self._steps),
            "memory_gib": _peak_memory_gib(self.device),
            "skipped_steps": total,
            "skipped_in_a_row": in_a_row,
        }
        numbers |= self._count_sources() | self._mean_by_source()
        if rank() == 0:
            self._write_line(step, numbers)
        self._sums, self._source_losses = {}, {}
        self._steps, self._waited, self._since = 0, 0.0, time.perf_counter()
        return numbers

    def _by_rank(self, step_seconds: float) -> dict[str, float]:
        """How long a step stood waiting for data, and how long its encoders computed: the mean over ranks, and the rank
        that all others waited for."""
        own = torch.zeros(2, world_size(), dtype=torch.float64, device=self.device)
        own[0, rank()], own[1, rank()] = self._waited / self._steps, self._speed.encoder_clock.read() / self._steps
        waits, encoders = sum_over_ranks(own).tolist()
        if rank() == 0:
            for name, by_rank in (("waits %s for its data", waits), ("computes its encoders for %s", encoders)):
                if found := describe_straggler(name, by_rank, step_seconds):
                    logger.warning("%s", found)
        return _mean_and_most("data_wait", waits) | _mean_and_most("encoders", encoders)

    def _count_sources(self) -> dict[str, float]:
        """`sources/NAME/samples`, `masked` and `lost`, over all ranks, since the run's first step."""
        counts = torch.tensor([self._counts, self._before], dtype=torch.float64, device=self.device).sum(0)
        names = [name for source in self._sources for name in _count_names(source)]
        return dict(zip(names, sum_over_ranks(counts).flatten().tolist(), strict=True))

    def _add_by_source(self, output: StepOutput, batch: Batch) -> None:
        source = source_of(batch.sample_id, num_sources=len(self._sources))
        for name, (rows, losses) in output.row_losses.items():
            sums = self._step_source_losses.setdefault(name, torch.zeros(2, len(self._sources), device=self.device))
            sums[0].index_add_(0, source[rows], losses.float())
            sums[1].index_add_(0, source[rows], torch.ones_like(losses, dtype=torch.float32))

    def _mean_by_source(self) -> dict[str, float]:
        """`sources/NAME/TERM`: mean over the source's rows, for terms that it had any for."""
        if not self._source_losses:
            return {}
        sums, counts = sum_over_ranks(torch.stack(list(self._source_losses.values()))).unbind(1)
        means, found = (sums / counts).tolist(), (counts > 0).tolist()
        return {
            f"sources/{source}/{term}": means[i][j]
            for i, term in enumerate(self._source_losses)
            for j, source in enumerate(self._sources)
            if found[i][j]
        }

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves what is done inside (checkpoints, evaluations) out of the step time."""
        since = time.perf_counter()
        yield
        self._since += time.perf_counter() - since

    def close(self) -> None:
        self._bar.close()
        if rank() == 0:
            self._file.close()
            self._tensorboard.close()

    def _describe_sources(self, numbers: dict[str, float]) -> str:
        return ", ".join(f"{name} {numbers[f'sources/{name}/samples']:,.0f}" for name in self._sources)

    def _write_line(self, step: int, numbers: dict[str, float]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}  # JSON has no NaN
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        for name, value in numbers.items():
            self._tensorboard.add_scalar(name, value, step)
        terms = " ".join(
            f"{n.rpartition('/')[2]} {v:.3f}" for n, v in numbers.items() if n in self._sums and n != "loss"
        )
        logger.info(
            "step %d  loss %.4f (%s)  %.0f samples/s  %.0f tokens/s%s  step %.3f s  data wait %.3f s  grad norm %.2f  "
            "memory %.2f GiB%s%s",
            step,
            numbers["loss"],
            terms,
            numbers["samples_per_second"],
            numbers["tokens_per_second"],
            f"  MFU {numbers['mfu']:.1%}" if "mfu" in numbers else "",
            numbers["step_seconds"],
            numbers["data_wait_seconds"],
            numbers["grad_norm"],
            numbers["memory_gib"],
            f"  skipped {numbers['skipped_steps']:.0f} steps" if numbers["skipped_steps"] else "",
            f"  samples of {self._describe_sources(numbers)}" if len(self._sources) > 1 else "",
        )


class SkippedSteps:
    """Counts on the device, so that no step waits for its count."""

    def __init__(self, device: torch.device, *, total: int = 0) -> None:
        """`total` are those before the run went on."""
        self._since_read, self._total, self._now, self._longest = torch.zeros(4, dtype=torch.int64, device=device)
        self._total = self._total + total

    def add(self, grad_norm: Tensor) -> Tensor:
        """One step, skipped where the norm is not finite; whether it was kept, bool `()`."""
        kept = torch.isfinite(grad_norm)
        skipped = (~kept).to(self._total.device, torch.int64)
        self._since_read, self._total = self._since_read + skipped, self._total + skipped
        self._now = (self._now + 1) * skipped
        self._longest = torch.maximum(self._longest, self._now)
        return kept.to(self._total.device)

    def read(self) -> tuple[int, int, int]:
        """Since the last call and in all, and the most of them in a row since the last call."""
        numbers = torch.stack([self._since_read, self._total, self._longest]).tolist()
        self._since_read, self._longest = torch.zeros_like(self._total), torch.zeros_like(self._total)
        return numbers[0], numbers[1], numbers[2]


def describe_straggler(does: str, by_rank: list[float], step_seconds: float) -> str:
    """A sentence on the rank that takes far longer than others; empty where there is none.

    Args:
        does: what it does in so many seconds, `%s`.
    """
    most = max(by_rank)
    others = (sum(by_rank) - most) / max(1, len(by_rank) - 1)
    if len(by_rank) == 1 or most - others < _STRAGGLER_SHARE * step_seconds or most < _STRAGGLER_FACTOR * others:
        return ""
    return f"rank {by_rank.index(most)} {does % f'{most:.2f} s of a step'}, the mean of the others {others:.2f} s"


def _mean_and_most(name: str, by_rank: list[float]) -> dict[str, float]:
    most = max(by_rank)
    mean = sum(by_rank) / len(by_rank)
    return {f"{name}_seconds": mean, f"{name}_most_seconds": most, f"{name}_most_rank": by_rank.index(most)}


def _count_names(source: str) -> list[str]:
    return [f"sources/{source}/{field}" for field in SourceCounts._fields]


def _go_on_after(path: Path, start: int) -> dict[str, Any]:
    """The line of step `start`, which becomes the last one; nothing at the start. A checkpoint's step has one."""
    drop_lines_after(path, start)
    lines = path.read_text().splitlines() if path.is_file() else []
    return json.loads(lines[-1]) if lines else {}


def _peak_memory_gib(device: torch.device) -> float:
    """Peak of the device's allocator, or of this process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
