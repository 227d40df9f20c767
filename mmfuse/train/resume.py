"""Saves a run, and finds the place to go on from."""

import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import yaml

from mmfuse.data.blend import WeightSegment
from mmfuse.data.plan import DataPlan
from mmfuse.distributed import barrier, find_differences, first_rank_decides
from mmfuse.errors import CheckpointError, ConfigError, TrainingError
from mmfuse.model.model import ModelConfig
from mmfuse.task import Task
from mmfuse.train.average import WeightAverage
from mmfuse.train.checkpoint import (
    CHECKPOINTS,
    MODALITIES,
    RUN,
    complete_checkpoints,
    load_portable_state,
    load_weights,
    read_facts,
    save_checkpoint,
    verify_checkpoint,
)
from mmfuse.train.data import TrainingData
from mmfuse.train.engines.base import Engine
from mmfuse.train.environment import describe_environment
from mmfuse.train.optim import build_optimizer
from mmfuse.train.run import RunConfig, changed_settings, load_run

logger = logging.getLogger(__name__)

_MESSAGE_CHARACTERS = 300


def start_or_resume(
    run: RunConfig, engine: Engine, task: Task, data: TrainingData, checkpoint: Path | None
) -> tuple[int, WeightAverage]:
    """Distributes the task, with the checkpoint's weights and moments if there is one; returns the next step, and the
    average so far.

    The data goes on with the weights of its sources that the checkpoint recorded; those of the run hold from here.
    """
    if checkpoint:
        load_weights(task, checkpoint)  # before wrapping: low-precision copies are made there
    rows = math.ceil(run.train.global_batch / run.train.accumulation / engine.world_size)
    optimizer = build_optimizer(task, run.optimizer)
    engine.wrap(task, optimizer, clip_norm=run.optimizer.clip_norm, rank_rows=rows)
    if not checkpoint:
        return 0, WeightAverage(engine, run.train.ema_decay)
    facts, state = read_facts(checkpoint), load_portable_state(checkpoint)
    if "ema" in state and not run.train.ema_decay:
        raise CheckpointError(
            f"{checkpoint} holds a moving average of the weights, which would be lost: set train.ema_decay, or choose "
            "another output_dir"
        )
    engine.import_moments(state, facts["adam_steps"])
    average = WeightAverage(engine, run.train.ema_decay)
    if "ema" in state:
        average.load(state["ema"], state["model"])
    logger.info("resumed from %s, written by %s", checkpoint, facts["written_by"])
    data.use_segments([WeightSegment(start, tuple(w)) for start, w in facts["weights"]], start=int(facts["step"]))
    return int(facts["step"]), average


def save(run: RunConfig, engine: Engine, plan: DataPlan, average: WeightAverage, *, step: int) -> None:
    """Writes the checkpoint of `step`; all ranks must call.

    Raises:
        TrainingError: ranks whose weights should be the same have different ones.
    """
    weights = dict(engine.task.named_parameters())  # under ZeRO-3 in parts, of which there is nothing to compare
    if wrong := find_differences(weights):
        raise TrainingError(
            f"ranks have different weights at step {step}, such as {wrong[0]} ({len(wrong)} of them); the newest "
            "checkpoint is from before. Different GPUs or CPUs among the ranks, bad memory, or code that changes "
            "weights on one rank alone may be the cause"
        )
    state, adam_steps = engine.export_moments()
    state["model"] = engine.export_weights()
    if average.decay:
        with average.in_place():
            state["ema"] = engine.export_weights()
    if engine.rank == 0:
        facts = {
            "adam_steps": adam_steps,
            "plan": plan.identity(),
            "weights": plan.segments,
            "written_by": f"{engine.name} on {engine.world_size} ranks",
            "environment": describe_environment(engine.name),
        }
        save_checkpoint(
            run.folder / CHECKPOINTS,
            step=step,
            state=state,
            facts=facts,
            run_yaml=yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False),
            modalities=run.folder / MODALITIES,
            keep=run.train.keep_checkpoints,
        )
    barrier()


def newest_checkpoint(run: RunConfig, identity: dict[str, Any]) -> Path | None:
    """The newest complete checkpoint of this run; rank 0 looks, so that all ranks see the same.

    Args:
        identity: of the data plan.
    Raises:
        CheckpointError: the run's folder holds a checkpoint of a run that differs in what must not change.
    """

    def find() -> Path | None:
        candidates = reversed(complete_checkpoints(run.folder / CHECKPOINTS))
        return next((folder for folder in candidates if _is_undamaged(folder)), None)

    checkpoint = first_rank_decides(find)
    if checkpoint is None:
        return None
    changed = changed_settings(load_run(str(checkpoint / RUN)), run)
    stored, now = _flatten(read_facts(checkpoint)["plan"]), _flatten(identity)
    changed += [
        f"data: {name} was {_short(stored.get(name))}, is {_short(now.get(name))}"
        for name in {**stored, **now}
        if stored.get(name) != now.get(name)
    ]
    if int(read_facts(checkpoint)["step"]) > run.train.steps:
        changed.append(
            f"train.steps: it has done {read_facts(checkpoint)['step']} steps, this run ends after {run.train.steps}"
        )
    if changed:
        raise CheckpointError(
            f"{checkpoint} belongs to another run. Give the settings back, or choose another name or output_dir:\n  "
            + "\n  ".join(changed)
        )
    return checkpoint


def write_model_files(folder: Path, model: ModelConfig) -> None:
    """Rank 0 keeps in the run's folder what every checkpoint will hold of the model beside its weights.

    Raises:
        ConfigError: the folder cannot be written, on all ranks.
    """

    def write() -> None:
        try:
            shutil.rmtree(folder / MODALITIES, ignore_errors=True)
            model.save_files(folder / MODALITIES)
        except OSError as error:
            raise ConfigError(f"{folder / MODALITIES}: cannot be written: {error}") from error

    first_rank_decides(write)


def _flatten(identity: dict[str, Any]) -> dict[str, Any]:
    """One level, so that a message has the one thing that differs."""
    flat = {**identity, "sources": [source["name"] for source in identity["sources"]]}
    for source in identity["sources"]:
        flat[f"index_hash of {source['name']}"] = source["index_hash"]
        flat[f"members or group_pattern of {source['name']}'s recipe"] = source.get("reading_hash")
    return flat


def _short(value: Any) -> str:
    """For a message: long lists of sources by their differences would fill a screen."""
    text = json.dumps(value)
    return text if len(text) <= _MESSAGE_CHARACTERS else f"{text[:_MESSAGE_CHARACTERS]} ..."


def _is_undamaged(checkpoint: Path) -> bool:
    """Whether the contents are as they were written; says so if not, and the run goes on from an older one."""
    try:
        verify_checkpoint(checkpoint, contents=True)
    except CheckpointError as error:
        logger.warning("not used: %s", error)
        return False
    return True
