"""Micro-steps: what runs twice drops out the same, and the loop takes a step of two for a step of one."""

from pathlib import Path

import pytest
import torch
from batches import make_batch, make_samples, objective_configs, tiny_model
from helpers import TINY_MODALITIES
from torch import Tensor
from unit.objectives.plain_engine import PlainEngine
from unit.train.tiny_runs import read_metrics, train_tiny

from mmfuse.distributed import slice_of_rank
from mmfuse.task import Task
from mmfuse.train.accumulation import join_batches, micro_steps
from mmfuse.types import Batch


class OneGraph(PlainEngine):
    """Keeps the graph of every micro-batch's vectors, so that one backward can go through all of them."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.vectors: list[dict[str, Tensor]] = []

    def represent(self, batch: Batch) -> dict[str, Tensor]:
        self.vectors.append(self.task.represent(batch))
        return {name: vectors.detach() for name, vectors in self.vectors[-1].items()}


def accumulate(task: Task, batches: list[Batch], *, seed: int) -> dict[str, Tensor]:
    """Gradients of a step of these micro-batches."""
    task.zero_grad()
    for batch, seen in micro_steps(PlainEngine(task), task.comparisons, iter(batches), count=len(batches), seed=seed):  # type: ignore[arg-type]
        (task(batch, seen).loss / len(batches)).backward()
    return {name: parameter.grad for name, parameter in task.named_parameters() if parameter.grad is not None}


def test_with_dropout_the_gradient_is_that_of_one_graph_over_all_micro_batches() -> None:
    modalities = {**TINY_MODALITIES, "text": {**TINY_MODALITIES["text"], "dropout": 0.4}}
    objectives = objective_configs(("contrastive", "leave_one_out"))
    task = Task(tiny_model(modalities=modalities), objectives, seed=5).double().train()
    samples = make_samples("tia ti ta tia tia t ia tia ti")
    batches = [make_batch(samples[slice_of_rank(9, rank=part, world_size=3)]) for part in range(3)]

    graph = OneGraph(task)
    assert len(list(micro_steps(graph, task.comparisons, iter(batches), count=3, seed=7))) == 3  # type: ignore[arg-type]
    for name, objective in task.comparisons.items():
        vectors = torch.cat([parts[name] for parts in graph.vectors])
        terms = objective.compare(vectors, dict(objective.named_parameters()), join_batches(batches))
        torch.stack([term.loss for term in terms.values()]).sum().backward(retain_graph=True)
    expected = {name: parameter.grad for name, parameter in task.named_parameters() if parameter.grad is not None}

    gradients, others = accumulate(task, batches, seed=7), accumulate(task, batches, seed=8)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).abs().max() <= 1e-12 * expected[name].abs().max().clamp(min=1), name
    assert any((others[name] - gradient).abs().max() > 1e-3 for name, gradient in gradients.items())


@pytest.mark.parametrize("loss", ["info_nce", "sigmoid"])
def test_a_run_learns_the_same_in_two_micro_steps_as_in_one(tiny_run: Path, tmp_path: Path, loss: str) -> None:
    setting = f"objectives.contrastive.loss={loss}"
    whole = train_tiny(tiny_run, tmp_path / "whole", setting)
    halves = train_tiny(tiny_run, tmp_path / "halves", setting, "train.accumulation=2")
    names = ("loss", "contrastive/text-image", "grad_norm")
    expected, found = (read_metrics(folder, *names) for folder in (whole, halves))
    assert len(found) == 4
    for row, other in zip(found, expected, strict=True):
        assert row == pytest.approx(other, rel=2e-6)
