"""The training loop."""

import logging
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from mmfuse.distributed import first_rank_decides
from mmfuse.errors import MmfuseError, Stopped, TrainingError, on_all_ranks
from mmfuse.hashing import hash_int
from mmfuse.log import set_up_logging
from mmfuse.task import Task
from mmfuse.train.accumulation import micro_steps
from mmfuse.train.average import WeightAverage
from mmfuse.train.checkpoint import stored_model
from mmfuse.train.data import TrainingData, check_fed
from mmfuse.train.engines.base import Engine
from mmfuse.train.engines.start import start_engine
from mmfuse.train.engines.strategy import Asked
from mmfuse.train.environment import write_environment
from mmfuse.train.evaluation import Evaluator, Results
from mmfuse.train.join_node import note_meeting
from mmfuse.train.metrics import MetricsWriter
from mmfuse.train.optim import learning_rate_factor, set_learning_rate
from mmfuse.train.profiling import StepProfiler
from mmfuse.train.resume import newest_checkpoint, restore_history, start_or_resume, write_model_files
from mmfuse.train.roll_back import SpikeGuard
from mmfuse.train.run import RunConfig, TrainConfig
from mmfuse.train.saver import CheckpointSaver
from mmfuse.train.self_test import check_same_on_all_ranks
from mmfuse.train.side_channel import open_store
from mmfuse.train.speed import Speed
from mmfuse.train.stop import StopRequest
from mmfuse.train.watchdog import Watchdog

logger = logging.getLogger(__name__)


_SECONDS_FOR_LAST_CHECKPOINT = 60.0
"""To be written, where training ends in an error; on many ranks some may be gone, and it never is."""


class Training(NamedTuple):
    """What a run trains with, once it is ready to step."""

    run: RunConfig
    engine: Engine
    task: Task
    data: TrainingData
    evaluator: Evaluator
    average: WeightAverage
    saver: CheckpointSaver
    watchdog: Watchdog
    speed: Speed


def train(run: RunConfig) -> Path:
    """Trains from the newest complete checkpoint, or from the start, and reports; returns the run's folder.

    Raises:
        Stopped: somebody asked for it; a checkpoint was written, and the run can go on from there.
        MmfuseError: what is wrong; after the first step only for bad samples, losses that stay NaN or infinite, or a
            last checkpoint that cannot be written.
    """
    limit = run.train.hang_seconds
    engine = start_engine(
        Asked(run.train.precision, run.train.accumulation, run.optimizer.clip_norm, timeout_seconds=2 * limit)
    )
    note_meeting()
    set_up_logging(rank=engine.rank)
    run.check_world_size(engine.world_size)
    with closing(StopRequest(run.folder, timeout_seconds=2 * limit)) as stop:
        training, start = prepare(run, engine)
        with closing(training.watchdog):
            done = go_on(training, stop, start=start)
        engine.close()
    if done < run.train.steps:
        raise Stopped(f"stopped on request after step {done} of {run.train.steps}; started again, it goes on")
    return run.folder


def prepare(run: RunConfig, engine: Engine) -> tuple[Training, int]:
    """All that a run trains with, and the step from which it goes on."""
    store, data = open_store(), TrainingData(run)
    checkpoint = newest_checkpoint(run, data.plan.identity())
    check_same_on_all_ranks(run, data.plan.identity(), checkpoint)
    model = stored_model(run.model, checkpoint) if checkpoint else run.model
    evaluator = Evaluator(run, model)
    opened = (*data.sources, *evaluator.sources.values())
    first_rank_decides(lambda: [source.check_shards() for source in opened])  # once: later, at each shard's first use
    task = Task(model, run.objective_configs, seed=run.seed)
    check_fed(run, data.sources)  # after the task, which knows better where the model lacks something
    _describe_start(run, engine, data, task)

    speed = Speed(task, engine.device)
    shapes = {name: tuple(tensor.shape) for name, tensor in task.state_dict().items()}
    start, average = start_or_resume(run, engine, task, data, checkpoint)
    write_environment(run.folder, run, strategy=engine.name)
    write_model_files(run.folder, model)
    if checkpoint:
        restore_history(checkpoint, run.folder)
    evaluator.forget_after(start, folder=run.folder)
    saver, limit = CheckpointSaver(run, engine, shapes, store), run.train.hang_seconds
    saver.keep_files("run.yaml", "environment.json")  # now, and not at the first checkpoint: it may not be allowed
    watchdog = Watchdog(store, rank=engine.rank, world_size=engine.world_size, limit_seconds=limit, folder=run.folder)
    evaluator.on_batch = watchdog.beat
    return Training(run, engine, task, data, evaluator, average, saver, watchdog, speed), start


def go_on(training: Training, stop: StopRequest, *, start: int) -> int:
    """Trains from step `start` with all that comes before and after; returns how many steps are done."""
    run, saver = training.run, training.saver
    if start == 0:
        evaluate(training, step=0)
    try:
        done = fit(training, stop, start=start)
    except MmfuseError:
        saver.wait(_SECONDS_FOR_LAST_CHECKPOINT)  # which would end with the process
        raise
    with training.watchdog.phase("end of the last checkpoint"):
        saver.finish()
    stop.honour()  # also where it came too late
    if done == run.train.steps:
        training.evaluator.report(evaluate(training, step=done), run.folder)
        saver.keep_files("metrics.jsonl", "report.json", "report.html")
    return done


def fit(training: Training, stop: StopRequest, *, start: int) -> int:
    """Steps `start` to the end of the run, or to where it is asked to stop; returns how many are done.

    All ranks do the same in the same order.
    """
    run, engine, task, data, evaluator, average, saver, watchdog, speed = training
    config = run.train
    sources = [source.name for source in data.sources]
    metrics = MetricsWriter(run.folder, start=start, stop=config.steps, speed=speed, sources=sources)
    beside = evaluator.copies_at_a_time() if 0 < config.evaluate_every < config.steps else None
    batches = data.batches(
        evaluator.processors, start=start, engine=engine, metrics=metrics, watchdog=watchdog, beside=beside
    )
    profiler, spikes = StepProfiler(run.profile, run.folder), SpikeGuard(config.roll_back, run.folder, start=start)
    task.train()
    done = start
    with closing(metrics), profiler:
        for step in range(start, config.steps):
            profiler.before_step(step)
            rate = learning_rate_factor(step, config=run.optimizer, total_steps=config.steps)
            set_learning_rate(engine.optimizer, rate)  # before backward: DeepSpeed steps inside it
            seed = hash_int(run.seed, "dropout", step)
            micro_batches = micro_steps(engine, task.comparisons, batches, count=config.accumulation, seed=seed)
            for number, (batch, seen) in enumerate(micro_batches, start=1):
                last_of_step = number == config.accumulation
                with watchdog.phase("forward and backward", step=step), engine.accumulate(last=last_of_step):
                    output = engine.forward(batch, seen)
                    engine.backward(output.loss)
                metrics.add(output, batch, share=1 / config.accumulation)
            with watchdog.phase("optimizer step", step=step):
                grad_norm = engine.step()
            average.update(step)
            metrics.end_step(grad_norm)
            profiler.after_step(step)

            done, last, stops = step + 1, step + 1 == config.steps, stop.agreed()
            saves = last or stops or done % config.checkpoint_every == 0
            if saves or done % config.log_every == 0:
                rates = {"learning_rate": rate * run.optimizer.learning_rate, "grad_norm": grad_norm}
                numbers = metrics.write(done, rows=config.global_batch, facts=rates | data.epochs(done))
                check_skipped(numbers, config, step=done)
                spikes.check(numbers["loss"], data.plan, saver, step=done)
            if config.evaluate_every and done % config.evaluate_every == 0 and not last:
                with metrics.paused():
                    evaluate(training, step=done)
            if saves:
                with metrics.paused(), watchdog.phase("checkpoint", step=step):
                    saver.save(data.plan, average, step=done)
            if stops:
                break
    return done


def evaluate(training: Training, *, step: int) -> Results:
    """Scores the average of the weights, where one is kept, and keeps the scores."""
    with training.watchdog.phase("evaluation", step=step), training.average.in_place():
        return training.evaluator.evaluate_step(
            training.task, training.engine.device, step=step, folder=training.run.folder
        )


def check_skipped(numbers: dict[str, float], config: TrainConfig, *, step: int) -> None:
    """Stops all ranks, which have the same numbers.

    Raises:
        TrainingError: too many steps in a row had a gradient that is NaN or infinite.
    """
    limit = min(config.max_skipped_steps, config.steps // 2)
    if numbers["skipped_in_a_row"] > limit:
        raise on_all_ranks(TrainingError)(
            f"{numbers['skipped_in_a_row']:.0f} steps in a row, up to step {step}, were skipped for a gradient that is "
            f"NaN or infinite ({limit} may be: train.max_skipped_steps); the weights are those of before. "
            "Lower the learning rate, raise optimizer.warmup_steps, or use precision fp32"
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
