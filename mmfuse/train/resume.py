"""Finds the place to go on from, and goes on."""

import json
import logging
import math
import os
import shutil
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from mmfuse.distributed import first_rank_decides, raise_together
from mmfuse.errors import CheckpointError, ConfigError, on_all_ranks
from mmfuse.modalities.base import Encoder
from mmfuse.model.blocks import checkpoint_activations, compile_blocks
from mmfuse.model.model import ModelConfig
from mmfuse.task import Task
from mmfuse.train.average import WeightAverage
from mmfuse.train.checkpoint import (
    AVERAGE,
    CHECKPOINTS,
    CONSOLIDATED,
    MODALITIES,
    RUN,
    complete_checkpoints,
    folder_name,
    load_weights,
    read_facts,
    remove_unfinished,
    step_of,
    verify_checkpoint,
)
from mmfuse.train.checkpoint_store import COPIES, CheckpointStore, DamagedError
from mmfuse.train.data import TrainingData
from mmfuse.train.engines.base import MODEL, MOMENTS, Engine
from mmfuse.train.optim import build_optimizer
from mmfuse.train.roll_back import forget_roll_backs, left_out_since
from mmfuse.train.run import RunConfig, TrainConfig, changed_settings, load_run
from mmfuse.train.saver import HISTORY
from mmfuse.train.state_files import StoredState

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
    prepare_blocks(task, run.train)
    rows = math.ceil(run.train.global_batch / run.train.accumulation / engine.world_size)
    optimizer = build_optimizer(task, run.optimizer)
    engine.wrap(task, optimizer, clip_norm=run.optimizer.clip_norm, rank_rows=rows)
    average = WeightAverage(engine, run.train.ema_decay)
    if not checkpoint:
        forget_roll_backs(run.folder)
        return 0, average
    facts, stored = read_facts(checkpoint), StoredState(checkpoint)
    if AVERAGE in stored.kinds and not run.train.ema_decay:
        raise CheckpointError(
            f"{checkpoint} holds a moving average of the weights, which would be lost: set train.ema_decay, or choose "
            "another output_dir"
        )
    _fill_engine(engine, stored, adam_steps=facts["adam_steps"])
    average.begin(partial(stored.read, AVERAGE) if AVERAGE in stored.kinds else None)
    logger.info("resumed from %s, written by %s", checkpoint, facts["written_by"])
    left_out, segments = first_rank_decides(lambda: left_out_since(run.folder, facts))
    data.go_on(segments, left_out, start=int(facts["step"]))
    return int(facts["step"]), average


def prepare_blocks(task: Task, config: TrainConfig) -> None:
    """What the run wants of the model's blocks, before an engine wraps them.

    Raises:
        ConfigError: an encoder has no blocks that are known.
    """
    if not (config.activation_checkpointing or config.compile_blocks):
        return
    for name, encoder in task.model.encoders.items():
        if isinstance(encoder, Encoder) and not encoder.layers():
            raise ConfigError(
                f"train.activation_checkpointing and train.compile_blocks: no layers are known of the {name} encoder"
            )
    if config.activation_checkpointing:
        checkpoint_activations(task.model.blocks)
    if config.compile_blocks:
        compile_blocks(task.model.blocks)


def _fill_engine(engine: Engine, stored: StoredState, *, adam_steps: int) -> None:
    engine.fill(engine.masters(), partial(stored.read, MODEL))
    moments = engine.moments()
    for kind in MOMENTS:
        engine.fill([moment[kind] for moment in moments], partial(stored.read, kind))
    engine.adam_steps = adam_steps
    engine.publish_masters()


def newest_checkpoint(run: RunConfig, identity: dict[str, Any]) -> Path | None:
    """The newest complete checkpoint of this run; rank 0 looks, so that all ranks see the same.

    Args:
        identity: of the data plan.
    Raises:
        CheckpointError: it is of a run that differs in what must not change; or its URL cannot be read.
        ConfigError: the URL has an unknown protocol, or needs a package that is missing.
    """

    checkpoint = _fetch_newest(run) if run.train.checkpoint_url else first_rank_decides(partial(_find_newest, run))
    if checkpoint is None:
        return None
    raise_together(lambda: verify_checkpoint(checkpoint))  # before anyone reads: a node may not see the folder
    if CONSOLIDATED in read_facts(checkpoint):
        raise CheckpointError(
            f"{checkpoint} was consolidated: it holds weights without Adam's moments, from which no run goes on; move "
            "it to another folder"
        )
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
        raise on_all_ranks(CheckpointError)(
            f"{checkpoint} belongs to another run. Give the settings back, or choose another name or output_dir:\n  "
            + "\n  ".join(changed)
        )
    return checkpoint


def _find_newest(run: RunConfig) -> Path | None:
    remove_unfinished(run.folder / CHECKPOINTS)
    candidates = reversed(complete_checkpoints(run.folder / CHECKPOINTS))
    return next((folder for folder in candidates if _is_undamaged(folder)), None)


def _fetch_newest(run: RunConfig) -> Path | None:
    """A copy of the newest one at the run's URL, on every node; nodes take an older one where any finds it damaged."""
    stores: list[CheckpointStore] = []
    raise_together(lambda: stores.append(CheckpointStore(run.train.checkpoint_url or "")))
    store, copies, before = stores[0], run.folder / COPIES, None
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    newest_step = max(first_rank_decides(store.steps), default=-1)
    raise_together(partial(_check_nothing_newer, run, newest_step) if is_first else None)
    while found := first_rank_decides(partial(store.newest, before=before)):
        before, files = found
        try:
            raise_together(partial(store.download, before, files, copies) if is_first else None)
            return copies / folder_name(before)
        except DamagedError as error:
            logger.warning("not used: %s", error)
    return None


def _check_nothing_newer(run: RunConfig, newest_step: int) -> None:
    with suppress(FileNotFoundError):  # nodes that share the folder do this at once
        remove_unfinished(run.folder / CHECKPOINTS)
    for folder in complete_checkpoints(run.folder / CHECKPOINTS)[-1:]:
        if (step_of(folder.name) or 0) > newest_step:
            raise CheckpointError(
                f"{folder}: is newer than all at train.checkpoint_url; copy it there to go on from it, or move it away"
            )


def restore_history(checkpoint: Path, folder: Path) -> None:
    """Gives a run's folder what the run had told when a checkpoint was written at a URL; rank 0 works.

    Raises:
        CheckpointError: the folder cannot be written, on all ranks.
    """

    def restore() -> None:
        try:
            if (checkpoint / HISTORY).is_dir():
                shutil.copytree(checkpoint / HISTORY, folder, dirs_exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"{folder}: cannot be written: {error}") from error

    first_rank_decides(restore)


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
