"""Two losses over pairs of sides, exact over ranks, in memory that grows linearly with the global batch.

InfoNCE (CLIP, Radford et al. 2021, arXiv 2103.00020) asks which candidate belongs to a query; the sigmoid loss (SigLIP,
Zhai et al. 2023, arXiv 2303.15343) asks of every two rows whether they belong together. Candidates are all rows of the
global batch that have the other side, those without the query's own included: they are extra negatives. Rows of one
group are never each other's negatives.

Shape legend: B rows of this rank, n queries of it, K candidates of a block.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mmfuse.distributed import world_size
from mmfuse.objectives.base import Term
from mmfuse.objectives.pairs.candidates import Block, CandidateConfig, Side, candidate_blocks, own_block
from mmfuse.types import Batch

_NEVER = -1e30
"""A logit that counts for nothing; minus infinity would make NaN of a block in which all are forbidden."""


class Pair(NamedTuple):
    """Two sides by name, and what makes logits of their similarities."""

    first: str
    second: str
    scale: Tensor
    """Inverse temperature."""
    bias: Tensor | None = None
    """With one, the sigmoid loss; without, InfoNCE."""


def contrast(sides: Mapping[str, Side], pairs: Sequence[Pair], batch: Batch, config: CandidateConfig) -> list[Term]:
    """A term for each pair; every rank must call with the same pairs and settings."""
    own, places = own_block(batch, sides), {name: number for number, name in enumerate(sides)}
    losses = [
        (_InfoNce if pair.bias is None else _Sigmoid)(own, places[pair.first], places[pair.second], pair)
        for pair in pairs
    ]
    with torch.autocast(own.embeddings.device.type, enabled=False):  # bf16 would err by 0.25 at a logit of 100
        for block in candidate_blocks(own, config, global_rows=batch.global_rows):
            compute = operator.call if len(block.row) == batch.global_rows else _compute_again
            for loss in losses:
                loss.meet(block, compute)
        return [loss.term() for loss in losses]


class _InfoNce:
    """Symmetric: rows that have both sides look for theirs, in both directions."""

    def __init__(self, own: Block, first: int, second: int, pair: Pair) -> None:
        self.sides, self.scale = (first, second), pair.scale
        self.rows = own.present[:, [first, second]].all(1).nonzero()[:, 0]
        self.queries = Block._make(column[self.rows] for column in own)
        self.met: tuple[list[Tensor], list[Tensor]] = ([], [])
        self.count = own.row.new_zeros(())

    def meet(self, block: Block, compute: Callable[..., Any]) -> None:
        self.count = self.count + block.present[:, list(self.sides)].all(1).sum()
        for met, sides in zip(self.met, (self.sides, self.sides[::-1]), strict=True):
            met.append(compute(_log_sum_exp, self.queries, block, sides, self.scale))

    def term(self) -> Term:
        first, second = self.queries.embeddings[:, self.sides[0]], self.queries.embeddings[:, self.sides[1]]
        paired_n = self.scale * (first * second).sum(1)
        losses_n = sum((torch.stack(met).logsumexp(0) / 2 for met in self.met), start=-paired_n)
        return Term(losses_n.sum() * world_size() / self.count.clamp(min=1), self.rows, losses_n.detach())


class _Sigmoid:
    """Every row that has the first side against every row that has the second, per pair that belongs together."""

    def __init__(self, own: Block, first: int, second: int, pair: Pair) -> None:
        assert pair.bias is not None
        self.sides, self.scale, self.bias = (first, second), pair.scale, pair.bias
        self.rows = own.present[:, first].nonzero()[:, 0]
        self.queries = Block._make(column[self.rows] for column in own)
        self.costs_n = self.queries.embeddings.new_zeros(len(self.rows))
        self.count, self.askers = own.row.new_zeros(()), own.row.new_zeros(())

    def meet(self, block: Block, compute: Callable[..., Any]) -> None:
        self.count = self.count + block.present[:, list(self.sides)].all(1).sum()
        self.askers = self.askers + block.present[:, self.sides[0]].sum()
        self.costs_n = self.costs_n + compute(_disagreement, self.queries, block, self.sides, self.scale, self.bias)

    def term(self) -> Term:
        # A global batch without any pair trains nothing; 0 and still connected.
        costs_n = self.costs_n * (self.count > 0) / self.count.clamp(min=1)
        return Term(costs_n.sum() * world_size(), self.rows, costs_n.detach() * self.askers)


def _log_sum_exp(queries: Block, block: Block, sides: tuple[int, int], scale: Tensor) -> Tensor:
    """Over the candidates that each query may meet, `(n,)`."""
    logits_nK, _, allowed_nK = _meeting(queries, block, sides, scale)
    return logits_nK.masked_fill(~allowed_nK, _NEVER).logsumexp(1)


def _disagreement(queries: Block, block: Block, sides: tuple[int, int], scale: Tensor, bias: Tensor) -> Tensor:
    """Sum over the candidates of -log sigmoid of the logit, negated for all but the query's own, `(n,)`."""
    logits_nK, own_nK, allowed_nK = _meeting(queries, block, sides, scale)
    logits_nK = logits_nK + bias
    return -F.logsigmoid(torch.where(own_nK, logits_nK, -logits_nK)).masked_fill(~allowed_nK, 0.0).sum(1)


def _meeting(queries: Block, block: Block, sides: tuple[int, int], scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, which candidate is the query's own, and which it may meet: that one and those of other groups."""
    query, candidate = sides
    logits_nK = scale * queries.embeddings[:, query] @ block.embeddings[:, candidate].T
    own_nK = queries.row[:, None] == block.row
    return logits_nK, own_nK, block.present[:, candidate] & (own_nK | (queries.group[:, None] != block.group))


def _compute_again(function: Callable[..., Tensor], *arguments: object) -> Tensor:
    """Logits are all that grows with queries times candidates: a block's are not kept, backward makes them anew."""
    result = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(result, Tensor)
    return result
