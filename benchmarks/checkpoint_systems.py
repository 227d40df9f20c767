"""A run with 200 million parameters that can take steps, and ways to write its state, for `benchmarks.checkpoint`."""

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[reportPrivateImportUsage]

from benchmarks.measure import Cost, read_own_wall
from mmfuse.data.decode import SampleDecoder
from mmfuse.data.loader import load_batches, training_requests
from mmfuse.task import Task
from mmfuse.train.average import WeightAverage
from mmfuse.train.checkpoint import CHECKPOINTS
from mmfuse.train.data import TrainingData
from mmfuse.train.engines.base import MODEL, MOMENTS, Engine
from mmfuse.train.engines.start import start_engine
from mmfuse.train.engines.strategy import Asked
from mmfuse.train.optim import build_optimizer
from mmfuse.train.run import RunConfig, load_run
from mmfuse.train.saver import CheckpointSaver
from mmfuse.types import Batch

BACKGROUND, FOREGROUND = "mmfuse, beside the training", "mmfuse, before it goes on"
NOTHING = "no checkpoint, a busy process"
COUNTED_SECONDS = 8
SETTINGS = {
    "model.modalities.text.hidden_size": 1024,
    "model.modalities.text.num_layers": 15,
    "model.modalities.text.num_heads": 16,
    "train.global_batch": 4,
    "data.lanes": 4,
}
"""Over the run quickstart: 201 M parameters, nearly all of them of the text encoder."""
Finished = Callable[[], float | None]
"""When the checkpoint was complete, by `time.time()`; None before."""
Begin = Callable[[Path], Finished]
"""Begins to write a checkpoint into an empty folder."""


def load_large_run(folder: Path) -> RunConfig:
    """The shipped run quickstart with a large text encoder; its checkpoints go to `folder`."""
    settings = {**SETTINGS, "output_dir": folder}
    return load_run("quickstart", overrides=[f"{name}={value}" for name, value in settings.items()])


class Training:
    """A run that can take steps, and its state."""

    def __init__(self, run: RunConfig) -> None:
        self.run = run
        self.engine: Engine = start_engine(Asked("fp32", 1, 1.0, timeout_seconds=60))
        self.data = TrainingData(run)
        task = Task(run.model, run.objective_configs, seed=run.seed).train()
        self.shapes = {name: tuple(tensor.shape) for name, tensor in task.state_dict().items()}
        optimizer = build_optimizer(task, run.optimizer)
        self.engine.wrap(task, optimizer, clip_norm=1.0, rank_rows=run.train.global_batch)
        self._batches = self._read_batches()

    def _read_batches(self) -> Iterator[Batch]:
        """A few over and over, that the decoding is not measured."""
        processors = {name: config.build_processor() for name, config in self.run.model.modality_configs.items()}
        decoder = SampleDecoder(self.data.sources, processors, seed=0)
        requests = list(training_requests(self.data.plan, start=0, stop=8, rank=0, world_size=1))
        return itertools.cycle(list(load_batches(decoder, lambda: iter(requests), num_workers=0)))

    def take_step(self) -> Cost:
        """Its CPU seconds, of this thread alone, and those of `read_own_wall`."""
        begin = Cost(time.thread_time(), read_own_wall())
        with self.engine.accumulate(last=True):
            self.engine.backward(self.engine.forward(next(self._batches), {}).loss)
        self.engine.step()
        return Cost(time.thread_time(), read_own_wall()).since(begin)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """What every system writes, not copied."""
        names = [part.name for (part,) in self.engine.layout()]
        moments = dict(zip(names, self.engine.moments(), strict=True))
        return {MODEL: self.engine.task.state_dict()} | {
            kind: {name: held[kind] for name, held in moments.items()} for kind in MOMENTS
        }


class Ours:
    """`CheckpointSaver` of this training, as its loop calls it."""

    def __init__(self, training: Training, *, in_background: bool) -> None:
        run = training.run
        train = run.train.model_copy(update={"checkpoint_in_background": in_background})
        self._run = run.model_copy(update={"train": train})
        self._saver = CheckpointSaver(self._run, training.engine, training.shapes, HashStore())
        self._plan, self._average = training.data.plan, WeightAverage(training.engine, None)
        self._numbers = itertools.count(1)

    def __call__(self, folder: Path) -> Finished:
        number = next(self._numbers)
        self._saver.save(self._plan, self._average, step=number)
        final = folder / CHECKPOINTS / f"step_{number:08d}"

        def finished() -> float | None:
            if not final.is_dir():
                return None
            self._saver.finish()  # which still looks for others to remove
            return final.stat().st_ctime  # when it got its name

        return finished


def torch_save(folder: Path, state: Mapping) -> Finished:
    """One file of `torch.save`, synced."""
    with open(folder / "state.pt", "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    now = time.time()
    return lambda: now


def dcp_save(folder: Path, state: Mapping) -> Finished:
    """`torch.distributed.checkpoint.save`, which syncs its files."""
    dcp.save(state, checkpoint_id=folder / "dcp", no_dist=True)
    now = time.time()
    return lambda: now


def dcp_async_save(folder: Path, state: Mapping) -> Finished:
    """`torch.distributed.checkpoint.async_save` with its defaults: a copy, and a thread."""
    times: list[float] = []

    def note(done: Future) -> None:
        done.result()
        times.append(time.time())

    future = dcp.async_save(state, checkpoint_id=folder / "dcp", no_dist=True)
    assert isinstance(future, Future)
    future.add_done_callback(note)

    def finished() -> float | None:
        if future.done():
            future.result()
        return times[0] if times else None

    return finished


def nothing(_: Path) -> Finished:
    """No checkpoint: a process that only counts runs beside the steps."""
    counting = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    end = time.time() + COUNTED_SECONDS

    def finished() -> float | None:
        if time.time() < end:
            return None
        counting.kill()
        counting.wait()
        return end

    return finished


def build_systems(training: Training) -> dict[str, Begin]:
    """Ways to write the state."""
    state = training.state()
    return {
        BACKGROUND: Ours(training, in_background=True),
        FOREGROUND: Ours(training, in_background=False),
        "torch.save": lambda folder: torch_save(folder, state),
        "dcp.save": lambda folder: dcp_save(folder, state),
        "dcp.async_save": lambda folder: dcp_async_save(folder, state),
        NOTHING: nothing,
    }
