"""Evaluates a task on a run's validation sets, in training and from a checkpoint, and keeps the results."""

import json
import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mmfuse.data.decode import SampleDecoder
from mmfuse.data.loader import BatchRequest, evaluation_requests, load_batches
from mmfuse.data.mixture import open_source
from mmfuse.data.order import ShardUse
from mmfuse.data.shard_files import NodeCache
from mmfuse.data.source import Source
from mmfuse.distributed import barrier, rank, world_size
from mmfuse.evaluate.report import write_report
from mmfuse.evaluate.retrieval import embed_set, evaluate_retrieval, summarize
from mmfuse.files import write_text
from mmfuse.model.model import ModelConfig
from mmfuse.task import Task
from mmfuse.train.checkpoint import load_stored_run, load_weights, read_facts, verify_checkpoint
from mmfuse.train.environment import write_environment
from mmfuse.train.prefetch import copies_at_a_time, evaluation_uses, node_cache, prefetching
from mmfuse.train.run import RunConfig
from mmfuse.types import Batch, Fault

logger = logging.getLogger(__name__)

Results = dict[str, dict[str, Any]]
"""Scores by evaluation set and direction."""


class Evaluator:
    """The opened validation sets of a run."""

    def __init__(self, run: RunConfig, model: ModelConfig, *, folder: Path | None = None) -> None:
        """Opens them now, so that a missing one is known before the first step.

        Args:
            model: the run's, or as a checkpoint has it.
            folder: who evaluates beside a run that may be alive names another folder, and is another user of the cache.
        """
        self.config, self.num_workers = run.evaluation, run.data.num_workers
        modalities = tuple(run.model.modalities)
        self._cache, self._folder = run.data.cache, folder or run.folder
        self.on_batch: Callable[[], None] = lambda: None
        """Called for every batch: evaluation is slow, and must not be taken for a hang."""
        self.sources = {
            name: open_source(config, modalities=modalities, cache=self._node_cache(name))
            for name, config in run.data.validation.items()
        }
        self.processors = {name: config.build_processor() for name, config in model.modality_configs.items()}

    def evaluate(self, task: Task, device: torch.device) -> Results:
        """Scores of every set; all ranks must call."""
        results = {}
        for name, source in self.sources.items():
            batches = self._batches(name, source)
            embedded = embed_set(task, batches, num_samples=len(source), device=device, name=name)
            results[name] = evaluate_retrieval(embedded, self.config)
        return results

    def copies_at_a_time(self) -> dict[str, int]:
        """Size by name of what the largest set needs of the node's cache at one time."""
        needs = [copies_at_a_time(source, self._uses(source)) for source in self.sources.values()]
        return max(needs, key=lambda need: sum(need.values()), default={})

    def _uses(self, source: Source) -> Iterator[ShardUse]:
        return evaluation_uses(source.counts.tolist(), batch_size=self._batch_size)

    @property
    def _batch_size(self) -> int:
        return max(self.config.batch_size, world_size())

    def _batches(self, name: str, source: Source) -> Iterator[Batch]:
        batch_size = self._batch_size

        def requests() -> Iterator[BatchRequest]:
            return evaluation_requests(len(source), batch_size=batch_size, rank=rank(), world_size=world_size())

        def uses(_: list[int]) -> Callable[[], Iterator[ShardUse]]:
            return partial(evaluation_uses, source.counts.tolist(), batch_size=batch_size)

        decoder = SampleDecoder([source], self.processors, seed=None)
        batches = load_batches(decoder, requests, num_workers=self.num_workers)
        faults: list[Fault] = []
        with prefetching(self._cache, [source], uses, run_folder=self._folder, purpose=_purpose(name)) as report:
            for batch in batches:
                report(batch.step)
                self.on_batch()
                faults += batch.faults
                yield batch
        if faults:
            first = faults[0]
            example = f"{first.shard}/{first.key}.{first.extension}: {first.reason}"
            logger.warning("%s: %d members of this rank are bad and left out, such as %s", name, len(faults), example)

    def _node_cache(self, name: str) -> NodeCache:
        return node_cache(self._cache, self._folder, purpose=_purpose(name))

    def evaluate_step(self, task: Task, device: torch.device, *, step: int, folder: Path) -> Results:
        """Evaluates and, on rank 0, keeps the scores as `evaluations/step_NNNNNNNN.json`."""
        results = self.evaluate(task, device)
        if results and rank() == 0:
            text = json.dumps({"step": step, "sets": results}, indent=1)
            write_text(folder / "evaluations" / f"step_{step:08d}.json", text)
        return results

    def forget_after(self, step: int, *, folder: Path) -> None:
        """Removes scores of later steps, which a run left that was killed, or that stood in this folder before."""
        if rank() == 0:
            for path in (folder / "evaluations").glob("step_*.json"):
                if path.name > f"step_{step:08d}.json":
                    path.unlink()

    def report(self, results: Results, folder: Path) -> None:
        """Writes the report and logs the table; rank 0 works, the others wait."""
        if rank() == 0:
            page = write_report(folder, sources=self.sources, k=max(self.config.recall_at))
            table = "\n".join(summarize(results, k=max(self.config.recall_at)))
            logger.info("retrieval:\n%s\nreport: %s", table or "no validation set", page)
        barrier()


def _purpose(name: str) -> str:
    return f"evaluate-{name}"


def evaluate_checkpoint(
    checkpoint: Path, *, output: Path | None, overrides: list[str], device: torch.device, averaged: bool = True
) -> Results:
    """Scores a checkpoint beside a randomly initialised model and writes the report.

    It goes to `output`, by default the folder `CHECKPOINT.evaluation`.

    Args:
        averaged: as of `load_weights`.
    Raises:
        CheckpointError: incomplete, damaged, or of another model.
    """
    verify_checkpoint(checkpoint, contents=True)
    run, model = load_stored_run(checkpoint, overrides=overrides)
    step = int(read_facts(checkpoint)["step"])
    folder = output or checkpoint.with_name(f"{checkpoint.name}.evaluation")
    write_environment(folder, run, strategy="evaluation")
    evaluator = Evaluator(run, model, folder=folder)
    task = Task(model, run.objective_configs, seed=run.seed).to(device)
    evaluator.evaluate_step(task, device, step=0, folder=folder)
    load_weights(task, checkpoint, averaged=averaged)
    results = evaluator.evaluate_step(task, device, step=step, folder=folder)
    evaluator.report(results, folder)
    return results
