"""The training loop."""

import logging
import math
from pathlib import Path

from mmfuse.errors import TrainingError
from mmfuse.hashing import hash_int
from mmfuse.log import set_up_logging
from mmfuse.task import Task
from mmfuse.train.accumulation import micro_steps
from mmfuse.train.average import WeightAverage
from mmfuse.train.checkpoint import stored_model
from mmfuse.train.data import TrainingData, check_fed
from mmfuse.train.engines.base import Engine
from mmfuse.train.engines.start import start_engine
from mmfuse.train.environment import write_environment
from mmfuse.train.evaluation import Evaluator
from mmfuse.train.metrics import MetricsWriter
from mmfuse.train.optim import learning_rate_factor, set_learning_rate
from mmfuse.train.resume import newest_checkpoint, save, start_or_resume, write_model_files
from mmfuse.train.run import RunConfig

logger = logging.getLogger(__name__)


def train(run: RunConfig) -> Path:
    """Trains from the newest complete checkpoint, or from the start, and reports; returns the run's folder.

    Raises:
        MmfuseError: what is wrong; after the first step only for a bad sample or a loss that is not finite.
    """
    engine = start_engine(precision=run.train.precision, accumulation=run.train.accumulation)
    set_up_logging(rank=engine.rank)
    run.check_world_size(engine.world_size)
    data = TrainingData(run)
    checkpoint = newest_checkpoint(run, data.plan.identity())
    model = stored_model(run.model, checkpoint) if checkpoint else run.model
    evaluator = Evaluator(run, model)
    if engine.rank == 0:  # once a run: a rank looks at each shard again when it opens it
        for source in (*data.sources, *evaluator.sources.values()):
            source.check_shards()
    task = Task(model, run.objective_configs, seed=run.seed)
    check_fed(run, data.sources)  # after the task, which knows better where the model lacks something
    _describe_start(run, engine, data, task)

    start, average = start_or_resume(run, engine, task, data, checkpoint)
    write_environment(run.folder, run, strategy=engine.name)
    write_model_files(run.folder, model)
    evaluator.forget_after(start, folder=run.folder)
    if start == 0:
        evaluator.evaluate_step(task, engine.device, step=0, folder=run.folder)
    fit(run, engine, task, data, evaluator, average, start=start)
    with average.in_place():
        results = evaluator.evaluate_step(task, engine.device, step=run.train.steps, folder=run.folder)
    evaluator.report(results, run.folder)
    engine.close()
    return run.folder


def fit(
    run: RunConfig,
    engine: Engine,
    task: Task,
    data: TrainingData,
    evaluator: Evaluator,
    average: WeightAverage,
    *,
    start: int,
) -> None:
    """Steps `start` to the end of the run; all ranks in the same order."""
    config, plan = run.train, data.plan
    sources = [source.name for source in data.sources]
    metrics = MetricsWriter(run.folder, start=start, stop=config.steps, device=engine.device, sources=sources)
    beside = evaluator.copies_at_a_time() if 0 < config.evaluate_every < config.steps else None
    batches = data.batches(evaluator.processors, start=start, engine=engine, metrics=metrics, beside=beside)
    task.train()
    for step in range(start, config.steps):
        rate = learning_rate_factor(step, config=run.optimizer, total_steps=config.steps)
        set_learning_rate(engine.optimizer, rate)  # before backward: DeepSpeed steps inside it
        seed = hash_int(run.seed, "dropout", step)
        for batch, seen in micro_steps(engine, task.comparisons, batches, count=config.accumulation, seed=seed):
            with engine.accumulate():
                output = engine.forward(batch, seen)
                engine.backward(output.loss)
            metrics.add(output, batch, share=1 / config.accumulation)
        grad_norm = engine.step()
        average.update(step)
        metrics.end_step()

        done, last = step + 1, step + 1 == config.steps
        saves = last or done % config.checkpoint_every == 0
        if saves or done % config.log_every == 0:
            facts = {"learning_rate": rate * run.optimizer.learning_rate, "grad_norm": grad_norm, **data.epochs(done)}
            check_finite(metrics.write(done, rows=config.global_batch, facts=facts), step=done)
        if config.evaluate_every and done % config.evaluate_every == 0 and not last:
            with metrics.paused(), average.in_place():
                evaluator.evaluate_step(task, engine.device, step=done, folder=run.folder)
        if saves:
            with metrics.paused():
                save(run, engine, plan, average, step=done)
    metrics.close()


def check_finite(numbers: dict[str, float], *, step: int) -> None:
    """Stops all ranks, which have the same numbers.

    Raises:
        TrainingError: the loss or the gradient is NaN or infinite.
    """
    bad = [name for name in ("loss", "grad_norm") if not math.isfinite(numbers[name])]
    if bad:
        raise TrainingError(
            f"{bad[0]} is {numbers[bad[0]]} at step {step}; the newest checkpoint is from before. Lower the learning "
            "rate, raise optimizer.warmup_steps, or use precision fp32"
        )


def _describe_start(run: RunConfig, engine: Engine, data: TrainingData, task: Task) -> None:
    parameters = sum(parameter.numel() for parameter in task.parameters())
    trained = sum(parameter.numel() for parameter in task.parameters() if parameter.requires_grad)
    samples = ", ".join(f"{source.name} ({len(source):,} samples)" for source in data.sources)
    logger.info(
        "run %s: %s, world size %d (%s); %.1f M parameters, %.1f M of them trained; %s",
        run.name,
        engine.name,
        engine.world_size,
        engine.device,
        parameters / 1e6,
        trained / 1e6,
        samples,
    )
