"""Micro-steps of one optimizer step; objectives that compare rows see the rows of all of them (GradCache, Gao et al.
2021, arXiv 2101.06983).

First every micro-batch goes through the model without a graph and leaves its vectors; these are compared, and the
gradient by each vector is found. Then comes an ordinary micro-step for each: the model runs again, with the same random
numbers, and that gradient goes back through it. So no engine needs a case of its own, the memory is that of one
micro-batch, and the price is one forward more; under ZeRO-3 that one also gathers parameters without prefetching them.

Shape legend: B rows of a micro-batch, S vectors of a row, E embedding.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from mmfuse.hashing import hash_int
from mmfuse.objectives.base import Comparison, Seen, Term
from mmfuse.randomness import seed_torch
from mmfuse.train.engines.base import Engine
from mmfuse.types import Batch


def micro_steps(
    engine: Engine, comparisons: Mapping[str, Comparison], batches: Iterator[Batch], *, count: int, seed: int
) -> Iterator[tuple[Batch, dict[str, Seen]]]:
    """The next `count` micro-batches, and what each needs to know of the others, by objective.

    When one is handed out, torch's generators stand where its forward has to begin. With several, and something to
    compare, the inputs of all of them are in memory together.
    """
    if count == 1 or not comparisons:
        for number in range(count):
            batch = next(batches)
            _seed(engine, seed, number)
            yield batch, {}
        return
    held = [next(batches) for _ in range(count)]
    vectors = []
    for number, batch in enumerate(held):
        _seed(engine, seed, number)
        vectors.append(engine.represent(batch))
    seen = compare_all(engine, comparisons, held, vectors)
    for number, batch in enumerate(held):
        _seed(engine, seed, number)
        yield batch, seen[number]


def compare_all(
    engine: Engine,
    comparisons: Mapping[str, Comparison],
    batches: Sequence[Batch],
    vectors: Sequence[dict[str, Tensor]],
) -> list[dict[str, Seen]]:
    """For each micro-batch, by objective, what a comparison of all their vectors, each `(B, S, E)`, found for it."""
    whole, seen = join_batches(batches), [{} for _ in batches]
    ends = list(accumulate([len(batch.present) for batch in batches], initial=0))
    for name, objective in comparisons.items():
        joined = torch.cat([parts[name] for parts in vectors]).requires_grad_()
        with engine.whole(objective.parameters()):
            values = {key: p.detach().clone().requires_grad_() for key, p in objective.named_parameters()}
        terms = objective.compare(joined, values, whole)
        loss = torch.stack([term.loss for term in terms.values()]).sum()
        by_vectors, *by_values = torch.autograd.grad(loss, [joined, *values.values()])
        gradients = dict(zip(values, by_values, strict=True))
        for number, (start, stop) in enumerate(pairwise(ends)):
            parts = {key: _rows_between(term, start, stop) for key, term in terms.items()}
            seen[number][name] = Seen(len(batches) * by_vectors[start:stop], gradients, parts)
    return seen


def join_batches(batches: Sequence[Batch]) -> Batch:
    """Micro-batches as one, without their inputs."""
    return replace(
        batches[0],
        present=torch.cat([batch.present for batch in batches]),
        group_id=torch.cat([batch.group_id for batch in batches]),
        sample_id=torch.cat([batch.sample_id for batch in batches]),
        keys=tuple(key for batch in batches for key in batch.keys),
        inputs={},
        faults=(),
        global_rows=sum(batch.global_rows for batch in batches),
        micro_batches=len(batches),
    )


def _rows_between(term: Term, start: int, stop: int) -> Term:
    here = (term.rows >= start) & (term.rows < stop)
    return Term(term.loss.detach(), term.rows[here] - start, term.row_losses[here])


def _seed(engine: Engine, seed: int, number: int) -> None:
    """Of the libraries' own dropout; a micro-batch that runs twice drops out the same."""
    seed_torch(hash_int(seed, number, engine.rank), device=engine.device)
