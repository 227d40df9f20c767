"""Runs a set of `RECIPES` in two and in three gloo processes, all in one start, and hands back what they gave.

A recipe works on its rank's part of fixed global data. Tests compare what the ranks gave with what one process gives.
"""

import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from batches import ALL_OBJECTIVES, make_batch, make_samples, tiny_task
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from unit.objectives.plain_engine import PlainEngine

from mmfuse.distributed import fetch_rows, find_differences, gather_rows, rank, slice_of_rank, world_size
from mmfuse.evaluate.retrieval import embed_set
from mmfuse.objectives.base import StepInputs
from mmfuse.objectives.contrastive import Config, Contrastive
from mmfuse.train.accumulation import micro_steps
from mmfuse.types import Batch, Encoded, Sample, TokenBatch

WORLD_SIZES = (2, 3)
Result = dict[str, Tensor]

SCENARIOS = {
    "complete": "tia tia tia tia tia tia tia tia",
    # Eleven rows over three ranks are 3, 4 and 4: the last rank has no sound, the first no picture.
    "uneven": "ta t ta tia tia i tia ti t ti i",
    # One rank has nothing to do for any objective, the others share two groups.
    "idle": "t t t tia tia ti tia ia ta tia",
}
LACKING = ("uneven", "idle")
"""The scenarios in which blocks and rings are tried; on complete rows they are compared with open_clip."""
GROUPS = {"complete": None, "uneven": [0, 1, 2, 3, 4, 5, 3, 2, 8, 4, 10], "idle": [0, 1, 2, 3, 4, 5, 3, 4, 3, 9]}


def scenario_batch(name: str) -> Batch:
    """This rank's part of a scenario."""
    samples = make_samples(SCENARIOS[name], groups=GROUPS[name])
    return make_batch(samples, rank=rank(), world_size=world_size())


CANDIDATES = {
    "blocks": {"candidates": {"block_rows": 3}},
    "ring": {"candidates": {"exchange": "ring"}},
    "ring of blocks": {"candidates": {"exchange": "ring", "block_rows": 2}},
}
"""Ways to meet the global batch, which are all equal to the default."""
LOSSES: dict[str, dict[str, Any]] = {
    "info_nce": {},
    "sigmoid": {"loss": "sigmoid"},
    "group info_nce": {"positives": "group"},
    "group sigmoid": {"loss": "sigmoid", "positives": "group"},
}
WAYS = {
    f"{loss} {way}": {**settings, **candidates}
    for loss, settings in LOSSES.items()
    for way, candidates in {"at once": {}, **CANDIDATES}.items()
    if "positives" not in settings or way in ("at once", "ring of blocks")
}

EVEN = ("complete", "idle")
"""The scenarios that fall into two halves."""
ACCUMULATED = {
    **{
        f"contrastive {way}": ("contrastive", s)
        for way, s in WAYS.items()
        if way.endswith(("at once", "ring of blocks"))
    },
    **{f"leave_one_out {way}": ("leave_one_out", CANDIDATES[way]) for way in ("blocks", "ring of blocks")},
}
"""Objectives that accumulate, with their settings."""


def train_step(scenario: str, objective: str, settings: dict[str, Any] | None = None) -> Result:
    """Loss and gradients of one objective; under DDP, where there are ranks, with its average of gradients."""
    task = tiny_task((objective,), settings=settings)
    wrapped = DistributedDataParallel(task) if world_size() > 1 else task
    loss = wrapped(scenario_batch(scenario)).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: gradient_of(task, name) for name, _ in task.named_parameters()}


def accumulated_step(scenario: str, objective: str, settings: dict[str, Any] | None = None) -> Result:
    """As `train_step`, in two micro-steps of half of the global batch each."""
    task = tiny_task((objective,), settings=settings).train()
    wrapped = DistributedDataParallel(task) if world_size() > 1 else task
    samples = make_samples(SCENARIOS[scenario], groups=GROUPS[scenario])
    halves = samples[: len(samples) // 2], samples[len(samples) // 2 :]
    batches = iter([make_batch(half, rank=rank(), world_size=world_size()) for half in halves])
    losses = []
    for batch, seen in micro_steps(PlainEngine(task), task.comparisons, batches, count=2, seed=1):  # type: ignore[arg-type]
        alone = world_size() == 1 or losses
        with nullcontext() if alone else wrapped.no_sync():  # type: ignore[union-attr]
            losses.append(wrapped(batch, seen).loss / 2)
            losses[-1].backward()
    loss = torch.stack(losses).sum().detach()
    return {"loss": loss} | {name: gradient_of(task, name) for name, _ in task.named_parameters()}


def gradient_of(module: nn.Module, name: str) -> Tensor:
    gradient = module.get_parameter(name).grad
    assert gradient is not None, f"{name} has no gradient on rank {rank()}"
    return gradient


def pair_embeddings(count: int = 11) -> Tensor:
    """L2-normalised `(count, 2, 6)` of two modalities in fp64."""
    generator = torch.Generator().manual_seed(1)
    return torch.nn.functional.normalize(torch.randn(count, 2, 6, generator=generator, dtype=torch.float64), dim=-1)


def contrastive_inputs(embeddings: dict[str, Tensor], batch: Batch) -> StepInputs:
    """Inputs for an objective that reads nothing but embeddings."""
    tokens = TokenBatch({}, {}, {}, len(batch.present))
    return StepInputs(None, batch, Encoded(tokens, embeddings), None)  # type: ignore[arg-type]


def contrast_complete_pairs(settings: dict[str, Any]) -> Result:
    """Loss and gradients of captioned pictures, each rank holding its part of `pair_embeddings`."""
    embeddings = pair_embeddings()
    own = slice_of_rank(len(embeddings), rank=rank(), world_size=world_size())
    leaf = embeddings[own].clone().requires_grad_()
    batch = make_batch(" ".join(["ti"] * len(embeddings)), letters="ti", rank=rank(), world_size=world_size())
    objective = Contrastive({("text", "image"): 1.0}, Config.model_validate(settings)).double()
    ((loss, _, _),) = objective(contrastive_inputs({"text": leaf[:, 0], "image": leaf[:, 1]}, batch)).values()
    loss.backward()
    assert leaf.grad is not None
    gradients = {name: gradient_of(objective, name) for name, _ in objective.named_parameters()}
    return {"loss": loss.detach(), "embeddings": leaf.grad, **gradients}


def global_rows(count: int) -> Tensor:
    return torch.randn(count, 2, 3, generator=torch.Generator().manual_seed(count), dtype=torch.float64)


def rank_weights(count: int, number: int) -> Tensor:
    """What a rank multiplies its result with, so that each rank asks for another gradient."""
    return torch.randn(count, 2, 3, generator=torch.Generator().manual_seed(50 + number), dtype=torch.float64)


def gather(count: int) -> Result:
    """Everyone's rows and the gradient of this rank's."""
    own = global_rows(count)[slice_of_rank(count, rank=rank(), world_size=world_size())].requires_grad_()
    everyone = gather_rows(own, global_rows=count)
    (everyone * rank_weights(count, rank())).sum().backward()
    assert own.grad is not None
    return {"rows": everyone.detach(), "gradient": own.grad}


def wanted_rows(count: int, number: int) -> Tensor:
    """Rows that a rank asks for: some twice, in no order; rank 1 wants none."""
    if number == 1:
        return torch.zeros(0, dtype=torch.int64)
    return torch.randint(count, (7,), generator=torch.Generator().manual_seed(number))


def fetch(count: int) -> Result:
    """The rows asked for and the gradient of this rank's."""
    own = global_rows(count)[slice_of_rank(count, rank=rank(), world_size=world_size())].requires_grad_()
    wanted = wanted_rows(count, rank())
    fetched = fetch_rows(own, wanted, global_rows=count)
    (fetched * rank_weights(len(wanted), rank())).sum().backward()
    assert own.grad is not None
    return {"rows": fetched.detach(), "gradient": own.grad}


def exchange_types(count: int) -> Result:
    """Both exchanges of `(count, 3)` rows of other types than floats with a gradient."""
    own = slice_of_rank(count, rank=rank(), world_size=world_size())
    result = {}
    for dtype in (torch.int64, torch.uint8, torch.bool, torch.bfloat16):
        rows = typed_rows(count, dtype)
        result[f"gather {dtype}"] = gather_rows(rows[own], global_rows=count)
        result[f"fetch {dtype}"] = fetch_rows(rows[own], wanted_rows(count, rank()), global_rows=count)
    return result


def typed_rows(count: int, dtype: torch.dtype) -> Tensor:
    return torch.randint(200, (count, 3), generator=torch.Generator().manual_seed(count)).to(dtype)


def differences() -> Result:
    """Which of three tensors ranks hold differently: rank 1 has another last bit in one of them."""
    spoilt = torch.ones(3, dtype=torch.bfloat16)
    if rank() == 1:
        spoilt.view(torch.int16)[1] ^= 1
    tensors = {"scalar": torch.tensor(2.5), "spoilt": spoilt, "rows": global_rows(5)}
    return {name: torch.tensor(True) for name in find_differences(tensors)}


def embed_evaluation_set() -> Result:
    """A set of nine samples in batches of five, the last row padding, as every rank has it afterwards."""
    task, samples = tiny_task().train(), make_samples("tia ti t ta ia tia i a tia")
    padding = Sample(sample_id=-1, group_id=-1, key="", features={})
    parts = (samples[:5], [*samples[5:], padding])
    batches = (make_batch(part, rank=rank(), world_size=world_size()) for part in parts)
    embedded = embed_set(task, batches, num_samples=9, device=torch.device("cpu"), name="test")
    assert task.training
    present = {f"present {name}": column for name, column in embedded.present.items()}
    without = {f"without {name}": rows for name, rows in embedded.without.items()}
    return {**embedded.embeddings, **present, **without, "group": embedded.group_id}


RECIPES: dict[str, dict[str, Callable[[], Result]]] = {
    "exchanges": {
        **{f"gather {n}": functools.partial(gather, n) for n in (2, 6, 11)},
        **{f"fetch {n}": functools.partial(fetch, n) for n in (2, 6, 11)},
        "differences": differences,
        "exchange_types": functools.partial(exchange_types, 11),
    },
    "evaluation": {"embed_evaluation_set": embed_evaluation_set},
    "objectives": {
        **{f"complete pairs {way}": functools.partial(contrast_complete_pairs, s) for way, s in WAYS.items()},
        **{f"{s} {o}": functools.partial(train_step, s, o) for s in SCENARIOS for o in ALL_OBJECTIVES},
        **{
            f"{s} contrastive {way}": functools.partial(train_step, s, "contrastive", settings)
            for s in LACKING
            for way, settings in WAYS.items()
        },
        **{
            f"{s} leave_one_out {way}": functools.partial(train_step, s, "leave_one_out", settings)
            for s in LACKING
            for way, settings in CANDIDATES.items()
        },
        **{
            f"{s} {way} accumulated": functools.partial(accumulated_step, s, *ACCUMULATED[way])
            for s in EVEN
            for way in ACCUMULATED
        },
    },
}
"""By the set to which they belong: processes run one set."""


def results_on_ranks(chosen: str) -> dict[int, list[dict[str, Result]]]:
    """By world size what each rank's recipes of this set gave."""
    results, errors = _start_ranks(chosen)
    assert not errors, errors
    return results


@functools.cache
def _start_ranks(chosen: str) -> tuple[dict[int, list[dict[str, Result]]], str]:
    """The results, or what the first process to fail said: the others would wait for it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        environment.pop("RANK", None)
        processes = []
        for number in range(max(WORLD_SIZES)):
            command = [sys.executable, "-m", "unit.objectives.ranks", chosen, name, str(number)]
            with open(folder / f"{number}.log", "w") as log:
                processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        while None in (codes := [process.poll() for process in processes]) and not any(codes):
            time.sleep(0.1)
        for process in processes:
            process.kill()
            process.wait()
        for number, code in enumerate(codes):
            if code:
                return {}, f"rank {number} ended with {code}: " + (folder / f"{number}.log").read_text()
        return {size: [torch.load(folder / f"{size}-{r}.pt") for r in range(size)] for size in WORLD_SIZES}, ""


@functools.cache
def result_alone(recipe: str) -> Result:
    """What one process gives."""
    return next(recipes[recipe] for recipes in RECIPES.values() if recipe in recipes)()


def run_recipes(chosen: str, folder: Path, number: int) -> None:
    """One process: all recipes of a set, in each world that this rank belongs to."""
    for size in WORLD_SIZES:
        if number >= size:
            continue
        store = dist.FileStore(str(folder / f"store-{size}"), size)
        dist.init_process_group("gloo", store=store, rank=number, world_size=size, timeout=timedelta(minutes=2))
        torch.save({name: recipe() for name, recipe in RECIPES[chosen].items()}, folder / f"{size}-{number}.pt")
        dist.destroy_process_group()


if __name__ == "__main__":
    run_recipes(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
