"""The training loop, and what stands around it: start, resume, finish."""

import json
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist
import yaml

from mmfuse.data.decode import SampleDecoder
from mmfuse.data.loader import load_batches, training_requests
from mmfuse.data.mixture import open_source
from mmfuse.data.plan import DataPlan, PlannedSource
from mmfuse.data.source import Source
from mmfuse.errors import CheckpointError, TrainingError
from mmfuse.log import set_up_logging
from mmfuse.modalities.base import Processor
from mmfuse.task import Task
from mmfuse.train.checkpoint import (
    RUN,
    complete_checkpoints,
    load_portable_state,
    load_weights,
    read_facts,
    save_checkpoint,
)
from mmfuse.train.engines.base import Engine, start_engine
from mmfuse.train.environment import describe_environment, write_environment
from mmfuse.train.evaluation import Evaluator
from mmfuse.train.files import drop_lines_after
from mmfuse.train.metrics import MetricsWriter
from mmfuse.train.optim import build_optimizer, learning_rate_factor, set_learning_rate
from mmfuse.train.run import RunConfig, changed_settings, load_run
from mmfuse.types import Batch

logger = logging.getLogger(__name__)


def train(run: RunConfig) -> Path:
    """Trains from the newest complete checkpoint, or from the start; returns the run's folder.

    Raises:
        MmfuseError: what is wrong and what to do; all but TrainingError before the first step.
    """
    engine = start_engine(precision=run.train.precision, accumulation=run.train.accumulation)
    set_up_logging(rank=engine.rank)
    run.check_world_size(engine.world_size)
    sources = [open_source(config, modalities=tuple(run.model.modalities)) for config in run.data.train]
    evaluator = Evaluator(run)
    plan = plan_data(run, sources)
    task = Task(run.model, run.objective_configs, seed=run.seed)
    _describe_start(run, engine, sources, task)

    checkpoint = _newest_checkpoint(run, engine, plan)
    start = _wrap_and_restore(run, engine, task, checkpoint)
    write_environment(run.folder, run, strategy=engine.name)
    if start == 0 and evaluator.sources:
        evaluator.evaluate_step(task, engine.device, step=0, folder=run.folder)
    _fit(run, engine, task, plan, evaluator, sources, start=start)
    if evaluator.sources:
        results = evaluator.evaluate_step(task, engine.device, step=run.train.steps, folder=run.folder)
        evaluator.report(results, run.folder)
    engine.close()
    return run.folder


def _fit(
    run: RunConfig,
    engine: Engine,
    task: Task,
    plan: DataPlan,
    evaluator: Evaluator,
    sources: list[Source],
    *,
    start: int,
) -> None:
    config = run.train
    metrics = MetricsWriter(run.folder, start=start, stop=config.steps, device=engine.device)
    batches = _timed(_batches(run, engine, plan, sources, evaluator.processors, start=start), metrics)
    for step in range(start, config.steps):
        factor = learning_rate_factor(step, config=run.optimizer, total_steps=config.steps)
        set_learning_rate(engine.optimizer, factor)  # before backward: DeepSpeed steps inside it
        for _ in range(config.accumulation):
            batch = next(batches).to(engine.device)
            with engine.accumulate():
                output = engine.forward(batch)
                engine.backward(output.loss)
            metrics.add(output, share=1 / config.accumulation)
        grad_norm = engine.step()
        metrics.end_step()

        done = step + 1
        if done % config.log_every == 0 or done == config.steps:
            epochs = {f"epochs/{name}": value for name, value in plan.epochs(done).items()}
            rate = {"learning_rate": factor * run.optimizer.learning_rate, "grad_norm": grad_norm}
            numbers = metrics.write(done, rows=config.global_batch, facts=rate | epochs)
            _check_finite(numbers, done)
        if done % config.checkpoint_every == 0 or done == config.steps:
            with metrics.paused():
                _save(run, engine, plan, step=done)
        if config.evaluate_every and done % config.evaluate_every == 0 and done < config.steps:
            with metrics.paused():
                evaluator.evaluate_step(task, engine.device, step=done, folder=run.folder)
    metrics.close()


def plan_data(run: RunConfig, sources: list[Source]) -> DataPlan:
    """The order of the run's data; without weights, sources count by their sizes."""
    planned = [
        PlannedSource(source.name, source.counts, config.weight or float(len(source)), source.index_hash)
        for config, source in zip(run.data.train, sources, strict=True)
    ]
    return DataPlan(
        planned,
        seed=run.seed,
        global_batch=run.train.global_batch,
        lanes=run.data.lanes,
        window_shards=run.data.window_shards,
    )


def _batches(
    run: RunConfig,
    engine: Engine,
    plan: DataPlan,
    sources: list[Source],
    processors: dict[str, Processor],
    *,
    start: int,
) -> Iterator[Batch]:
    """This rank's micro-batches from step `start` on."""
    record = _SampleRecord(run.folder, engine.rank, start) if run.train.record_samples else None
    batches = load_batches(
        SampleDecoder(sources, processors, seed=run.seed),
        lambda: training_requests(
            plan,
            start=start,
            stop=run.train.steps,
            rank=engine.rank,
            world_size=engine.world_size,
            accumulation=run.train.accumulation,
        ),
        num_workers=run.data.num_workers,
        prefetch_batches=run.data.prefetch_batches,
        pin_memory=engine.device.type == "cuda",
    )
    for batch in batches:
        if record:
            record.add(batch)
        yield batch


def _timed(batches: Iterator[Batch], metrics: MetricsWriter) -> Iterator[Batch]:
    while True:
        since = time.perf_counter()
        batch = next(batches, None)
        metrics.count_wait(time.perf_counter() - since)
        if batch is None:
            return
        yield batch


class _SampleRecord:
    """`samples.rankN.jsonl`: the keys of every batch that this rank trained on."""

    def __init__(self, folder: Path, rank: int, start: int) -> None:
        path = folder / f"samples.rank{rank}.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        drop_lines_after(path, start)
        self._file = open(path, "a", buffering=1)  # noqa: SIM115  # open as long as the run

    def add(self, batch: Batch) -> None:
        self._file.write(json.dumps({"step": batch.step + 1, "keys": batch.keys}) + "\n")


def _wrap_and_restore(run: RunConfig, engine: Engine, task: Task, checkpoint: Path | None) -> int:
    """Distributes the task with fresh or restored weights and moments; returns the step to go on from."""
    if checkpoint:
        load_weights(task, checkpoint)
    rows = math.ceil(run.train.global_batch / run.train.accumulation / engine.world_size)
    optimizer = build_optimizer(task, run.optimizer)
    engine.wrap(task, optimizer, clip_norm=run.optimizer.clip_norm, rank_rows=rows)
    if not checkpoint:
        return 0
    facts = read_facts(checkpoint)
    engine.import_moments(load_portable_state(checkpoint), facts["adam_steps"])
    logger.info("resumed from %s, written by %s", checkpoint, facts["written_by"])
    return int(facts["step"])


def _newest_checkpoint(run: RunConfig, engine: Engine, plan: DataPlan) -> Path | None:
    """The newest complete checkpoint of this run; rank 0 looks, so that all ranks see the same.

    Raises:
        CheckpointError: the folder holds a checkpoint of a run that differs in what must not change.
    """
    found: list[Path | None] = [None]
    if engine.rank == 0:
        found = [next(reversed(complete_checkpoints(run.folder / "checkpoints")), None)]
    if engine.world_size > 1:
        dist.broadcast_object_list(found, src=0)
    checkpoint = found[0]
    if checkpoint is None:
        return None
    changed = changed_settings(load_run(str(checkpoint / RUN)), run)
    stored, ours = read_facts(checkpoint)["plan"], plan.identity()
    changed += [f"data: {name} has changed" for name in ours if ours[name] != stored.get(name)]
    if changed:
        raise CheckpointError(
            f"{checkpoint} belongs to another run. Give the settings back, or choose another name or output_dir:\n  "
            + "\n  ".join(changed)
        )
    return checkpoint


def _save(run: RunConfig, engine: Engine, plan: DataPlan, *, step: int) -> None:
    state, adam_steps = engine.export_state()
    if engine.rank == 0:
        facts = {
            "adam_steps": adam_steps,
            "plan": plan.identity(),
            "written_by": f"{engine.name} on {engine.world_size} ranks",
            "environment": describe_environment(engine.name),
        }
        save_checkpoint(
            run.folder / "checkpoints",
            step=step,
            state=state,
            facts=facts,
            run_yaml=yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False),
            keep=run.train.keep_checkpoints,
        )
    engine.accelerator.wait_for_everyone()


def _check_finite(numbers: dict[str, float], step: int) -> None:
    if not math.isfinite(numbers["loss"]):
        raise TrainingError(
            f"the loss is {numbers['loss']} at step {step}; the newest checkpoint is from before. Lower the learning "
            "rate, raise optimizer.warmup_steps, or use precision fp32"
        )


def _describe_start(run: RunConfig, engine: Engine, sources: list[Source], task: Task) -> None:
    parameters = sum(parameter.numel() for parameter in task.parameters())
    samples = ", ".join(f"{source.name} ({len(source):,} samples)" for source in sources)
    logger.info(
        "run %s: %s on %d ranks (%s); %.1f M parameters; %s",
        run.name,
        engine.name,
        engine.world_size,
        engine.device,
        parameters / 1e6,
        samples,
    )
