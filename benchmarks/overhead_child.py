"""One process of `benchmarks.overhead`: `mmfuse.train.trainer.train`, and the same training without mmfuse's loop.

Both have a model and an engine of their own in the same process, and take turns of a few steps: whatever slows the
machine down slows both.
"""

import argparse
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from benchmarks.measure import Cost, read_clock, read_own_wall
from mmfuse.data.decode import SampleDecoder
from mmfuse.data.loader import PlannedDataset, training_requests
from mmfuse.distributed import sum_over_ranks
from mmfuse.modalities.base import Processor
from mmfuse.task import Task
from mmfuse.train import trainer
from mmfuse.train.data import TrainingData
from mmfuse.train.engines.base import Engine
from mmfuse.train.engines.strategy import uses_deepspeed
from mmfuse.train.metrics import MetricsWriter
from mmfuse.train.optim import build_optimizer, learning_rate_factor, set_learning_rate
from mmfuse.train.run import RunConfig, load_run
from mmfuse.train.watchdog import Watchdog
from mmfuse.types import Batch

WARM_UP, BLOCK = 5, 10
"""Steps of a turn. As blocks begin 5 steps after the metrics of every tenth step, the checkpoint of step 100 is written
in the middle of one of ours."""
Step = Callable[[Batch], Tensor]


def plain_step(task: Task, run: RunConfig) -> tuple[Step, torch.optim.Optimizer]:
    """A step of PyTorch alone, with DistributedDataParallel where there is a process group."""
    optimizer = build_optimizer(task, run.optimizer)
    wrapped = DistributedDataParallel(task) if distributed.is_initialized() else task
    largest = run.optimizer.clip_norm
    assert largest

    def step(batch: Batch) -> Tensor:
        loss = wrapped(batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(task.parameters(), largest)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step, optimizer


def deepspeed_step(task: Task, run: RunConfig, config: Mapping) -> tuple[Step, torch.optim.Optimizer]:
    """A step of DeepSpeed alone, with the configuration that mmfuse's engine has."""
    import deepspeed  # its import alone takes seconds

    engine, optimizer, *_ = deepspeed.initialize(
        model=task, optimizer=build_optimizer(task, run.optimizer), config=json.loads(json.dumps(config))
    )

    def step(batch: Batch) -> Tensor:
        loss = engine(batch).loss
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return step, optimizer


def read_costs() -> Cost:
    """CPU time of all threads, and wall time without that in which other processes had the cores."""
    return read_clock()._replace(wall_seconds=read_own_wall())


class BareLoop:
    """The loop that one writes by hand: PyTorch's loader, the learning rate, and a step; the order of samples is ready
    before it begins."""

    def __init__(self, data: TrainingData, processors: dict[str, Processor], engine: Engine) -> None:
        run = self.run = data.run
        task = Task(run.model, run.objective_configs, seed=run.seed).train()
        requests = training_requests(
            data.plan, start=0, stop=run.train.steps + BLOCK, rank=engine.rank, world_size=engine.world_size
        )
        decoder = SampleDecoder(data.sources, processors, seed=run.seed)
        self._batches = iter(DataLoader(PlannedDataset(decoder), sampler=list(requests), batch_size=None))  # type: ignore[arg-type]
        if uses_deepspeed():
            self._step, self._optimizer = deepspeed_step(task, run, engine.config)  # type: ignore[attr-defined]
        else:
            self._step, self._optimizer = plain_step(task, run)
        self.losses: list[Tensor] = []

    def take(self, steps: int) -> None:
        """So many steps more."""
        for _ in range(steps):
            rate = learning_rate_factor(len(self.losses), config=self.run.optimizer, total_steps=self.run.train.steps)
            set_learning_rate(self._optimizer, rate)
            self.losses.append(self._step(next(self._batches)))


class TurnTaking(TrainingData):
    """A run's data. Whenever the training loop asks for a batch behind a block of steps, the bare loop has its turn."""

    def batches(
        self,
        processors: dict[str, Processor],
        *,
        start: int,
        engine: Engine,
        metrics: MetricsWriter,
        watchdog: Watchdog,
        beside: Mapping[str, int] | None = None,
    ) -> Iterator[Batch]:
        """As of the base, with the costs of each turn written at the end."""
        ours = super().batches(
            processors, start=start, engine=engine, metrics=metrics, watchdog=watchdog, beside=beside
        )
        bare = BareLoop(self, processors, engine)
        costs: dict[str, list[Cost]] = {"ours": [], "bare": []}
        since = read_costs()
        for number in itertools.count():
            if number == 0 or number % BLOCK == WARM_UP:
                before = read_costs()
                costs["ours"].append(before.since(since))
                bare.take(WARM_UP if number == 0 else BLOCK)
                since = read_costs()
                costs["bare"].append(since.since(before))
            if number == self.run.train.steps - 1:
                self._write(costs, torch.stack(bare.losses), engine)
            if (batch := next(ours, None)) is None:
                return
            yield batch

    def _write(self, costs: dict[str, list[Cost]], losses: Tensor, engine: Engine) -> None:
        """Without the start and the warm-up."""
        losses = sum_over_ranks(losses) / engine.world_size
        figures = {"ours": costs["ours"][2:], "bare": costs["bare"][1:], "losses": losses.tolist()}
        (self.run.folder / f"costs.rank{engine.rank}.json").write_text(json.dumps(figures))


def build_run(folder: Path, *, blocks: int, rows: int) -> RunConfig:
    """The shipped run quickstart with metrics and checkpoints as often as by default, without evaluation, and one step
    more than is measured."""
    settings = {
        "output_dir": folder,
        "train.steps": WARM_UP + BLOCK * blocks + 1,
        "train.global_batch": rows,
        "train.evaluate_every": 0,
        "optimizer.warmup_steps": BLOCK,
    }
    run = load_run("quickstart", overrides=[f"{name}={value}" for name, value in settings.items()])
    return run.model_copy(update={"data": run.data.model_copy(update={"validation": {}})})


def main() -> None:
    """Trains; the costs are in the run's folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, required=True)
    parser.add_argument("--rows", type=int, required=True)
    arguments = parser.parse_args()
    with patch.object(trainer, "TrainingData", TurnTaking):
        trainer.train(build_run(arguments.folder, blocks=arguments.blocks, rows=arguments.rows))


if __name__ == "__main__":
    main()
