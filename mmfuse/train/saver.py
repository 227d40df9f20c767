"""Writes checkpoints beside the training: the step waits only until its rank's part of the state is copied.

With `train.checkpoint_url`, each rank's files go from a folder of its node to that URL."""

import json
import logging
import shutil
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor
from torch.distributed.distributed_c10d import Store

from mmfuse.data.plan import DataPlan
from mmfuse.distributed import find_differences, first_rank_decides
from mmfuse.errors import CheckpointError, TrainingError, on_all_ranks
from mmfuse.train.average import WeightAverage
from mmfuse.train.checkpoint import (
    AVERAGE,
    CHECKPOINTS,
    MODALITIES,
    Keep,
    begin_checkpoint,
    folder_name,
    publish_checkpoint,
    unfinished_folder,
)
from mmfuse.train.checkpoint_store import COPIES, CheckpointStore
from mmfuse.train.engines.base import MODEL, MOMENTS, Engine, Part
from mmfuse.train.environment import describe_environment
from mmfuse.train.manifest import RUN, Fingerprints, store_file
from mmfuse.train.run import RunConfig
from mmfuse.train.state_files import Shapes, write_parts

logger = logging.getLogger(__name__)

HISTORY = "history"
"""The folder within a checkpoint at a URL of what a run has told so far, for one that goes on elsewhere."""
_PATIENCE_SHARE = 4
"""Of `train.hang_seconds`, for one request: the next checkpoint waits for this one, and that is no hang."""
_POLL_SECONDS = 0.02


class _Job(NamedTuple):
    number: int
    """Of this process's checkpoints: keys of one must not meet those of another."""
    step: int
    parts: dict[str, list[Part]]
    facts: dict[str, Any]


class CheckpointSaver:
    """Saves a run's checkpoints, one at a time. All ranks call the same methods."""

    def __init__(self, run: RunConfig, engine: Engine, shapes: Shapes, store: Store) -> None:
        """`store` is shared by all ranks; `shapes` are those of the unwrapped task."""
        self._run, self._engine, self._shapes, self._store = run, engine, shapes, store
        self._root = run.folder / CHECKPOINTS
        self._remote = open_remote(run)
        self._saved = 0
        self._thread: threading.Thread | None = None
        self._error = ""

    def save(self, plan: DataPlan, average: WeightAverage, *, step: int) -> None:
        """Copies this rank's part of the state of `step` and lets it be written; waits for an earlier one.

        A checkpoint that cannot be written is logged as an error, and the one before stays the newest.

        Raises:
            TrainingError: ranks whose weights should be the same have different ones.
        """
        if wrong := find_differences(self._engine.replicas()):
            raise on_all_ranks(TrainingError)(
                f"ranks have different weights at step {step}, such as {wrong[0]} ({len(wrong)} of them); the newest "
                "checkpoint is from before. Different GPUs or CPUs among the ranks, bad memory, or code that changes "
                "weights on one rank alone may be the cause"
            )
        self.wait()
        facts = {
            "step": step,
            "adam_steps": self._engine.adam_steps,
            "plan": plan.identity(),
            "weights": plan.segments,
            "left_out": plan.left_out,
            "written_by": f"{self._engine.name} on {self._engine.world_size} ranks",
            "environment": describe_environment(self._engine.name),
        }
        self._saved += 1
        job = _Job(self._saved, step, self._copy_parts(average), facts)
        if self._run.train.checkpoint_in_background:
            self._thread = threading.Thread(target=self._write, args=(job,), name="checkpoint", daemon=True)
            self._thread.start()
        else:
            self._write(job)

    def wait(self, seconds: float | None = None) -> str:
        """Until the last checkpoint is written, or is known not to be; on all ranks the same error, or nothing."""
        if self._thread:
            self._thread.join(seconds)
            self._thread = None
        return self._error

    def finish(self) -> None:
        """Waits for the last checkpoint.

        Raises:
            CheckpointError: it could not be written, on all ranks.
        """
        if error := self.wait():
            raise on_all_ranks(CheckpointError)(error)

    def keep_files(self, *names: str) -> None:
        """Puts files of the run's folder beside the checkpoints at its URL, if it has one; all ranks must call.

        Raises:
            CheckpointError: the URL cannot be written, on all ranks.
        """
        if remote := self._remote:
            files = [name for name in names if (self._run.folder / name).is_file()]
            first_rank_decides(lambda: [remote.upload(self._run.folder / name, name) for name in files])

    def _copy_parts(self, average: WeightAverage) -> dict[str, list[Part]]:
        engine = self._engine
        moments = engine.moments()
        parts = {MODEL: [*engine.parts(engine.masters()), *engine.fixed_parts()]}
        parts |= {kind: list(engine.parts([moment[kind] for moment in moments])) for kind in MOMENTS}
        if average.decay:
            parts[AVERAGE] = list(engine.parts(average.tensors))
        return {kind: [part._replace(values=_to_cpu(part.values)) for part in held] for kind, held in parts.items()}

    def _write(self, job: _Job) -> None:
        """This rank's files; rank 0 then waits for those of the others and gives the checkpoint its name."""
        self._error = f"the writing of the checkpoint of step {job.step} ended without a word"
        try:
            outcome = {"files": self._write_files(job), "error": ""}
        except Exception as error:  # whatever it is, the other ranks wait to hear of it
            outcome = {"files": {}, "error": f"{socket.gethostname()}: {error}"}
        self._tell(job, f"rank {self._engine.rank}", outcome)
        if self._engine.rank == 0:
            self._tell(job, "result", self._publish(job))
        self._error = self._hear(job, "result")
        if self._error and self._engine.rank == 0:
            logger.error("%s", self._error)
        if self._remote:
            shutil.rmtree(unfinished_folder(self._root, job.step), ignore_errors=True)
            if not self._error:
                shutil.rmtree(self._run.folder / COPIES, ignore_errors=True)

    def _write_files(self, job: _Job) -> Fingerprints:
        temporary, files = begin_checkpoint(self._root, job.step), {}
        for kind, parts in job.parts.items():
            file = write_parts(temporary, kind, parts, rank=self._engine.rank, shapes=self._shapes)
            files[file.name] = store_file(file)
            if self._remote:
                self._remote.upload(file, f"{folder_name(job.step)}/{file.name}")
                file.unlink()
        if self._engine.rank == 0:
            settings = self._run.model_dump(mode="json")
            (temporary / RUN).write_text(yaml.safe_dump(settings, sort_keys=False))
            shutil.copytree(self._run.folder / MODALITIES, temporary / MODALITIES, dirs_exist_ok=True)
            if self._remote:
                for path in _history_of(self._run.folder):
                    copy = temporary / HISTORY / path.relative_to(self._run.folder)
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, copy)
        return files

    def _publish(self, job: _Job) -> str:
        """What went wrong, or nothing."""
        temporary = unfinished_folder(self._root, job.step)
        outcomes = [self._hear(job, f"rank {rank}") for rank in range(self._engine.world_size)]
        errors = [outcome["error"] for outcome in outcomes if outcome["error"]]
        keep = Keep(self._run.train.keep_checkpoints, self._run.train.keep_every)
        try:
            if errors:
                raise CheckpointError(errors[0])
            written = {name: print_ for outcome in outcomes for name, print_ in outcome["files"].items()}
            if self._remote:
                self._remote.publish(temporary, written, step=job.step, facts=job.facts, keep=keep)
            else:
                publish_checkpoint(temporary, written, facts=job.facts, keep=keep)
        except Exception as error:  # whatever it is, the other ranks wait to hear of it
            shutil.rmtree(temporary, ignore_errors=True)
            if self._remote:
                with suppress(CheckpointError):  # the next one that succeeds removes it
                    self._remote.remove(job.step)
            return (
                f"the checkpoint of step {job.step} was not written: {error}. The one before is still the newest; "
                f"make room in {self._remote.shown if self._remote else self._root}, or see that it can be written"
            )
        return ""

    def _tell(self, job: _Job, what: str, message: Any) -> None:
        self._store.set(f"checkpoint {job.number} {what}", json.dumps(message))

    def _hear(self, job: _Job, what: str) -> Any:
        """Polls: a waiting call would keep other threads of this process from the store."""
        while not self._store.check([key := f"checkpoint {job.number} {what}"]):
            time.sleep(_POLL_SECONDS)
        return json.loads(self._store.get(key))


def open_remote(run: RunConfig) -> CheckpointStore | None:
    """What keeps the checkpoints of a run that has a `train.checkpoint_url`.

    Raises:
        ConfigError: as of `CheckpointStore`.
    """
    url, patience = run.train.checkpoint_url, run.train.hang_seconds / _PATIENCE_SHARE
    return CheckpointStore(url, patience_seconds=patience) if url else None


def _history_of(folder: Path) -> list[Path]:
    """What a run has told so far, for people and for its report."""
    return [path for path in (folder / "metrics.jsonl", *(folder / "evaluations").glob("*.json")) if path.is_file()]


def _to_cpu(values: Tensor) -> Tensor:
    """A copy that training does not change."""
    return values.detach().to("cpu", torch.float32 if values.is_floating_point() else None, copy=True).contiguous()
