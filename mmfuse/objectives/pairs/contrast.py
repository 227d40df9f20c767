"""Two losses over pairs of sides, exact over ranks, in memory that grows linearly with the global batch.

InfoNCE (CLIP, Radford et al. 2021, arXiv 2103.00020) asks which candidate belongs to a query; the sigmoid loss (SigLIP,
Zhai et al. 2023, arXiv 2303.15343) asks of every two rows whether they belong together. Candidates are all rows of the
global batch that have the other side, those without the query's own included: they are extra negatives. Rows of one
group are never each other's negatives; where a pair says so, they are each other's positives, and InfoNCE takes the
mean over them outside of the logarithm (Khosla et al. 2020, "Supervised contrastive learning", L_out).

Shape legend: B rows of this rank, n queries of it, K candidates of a block.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mmfuse.distributed import sum_over_ranks, world_size
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
    by_group: bool = False
    """Whether all rows of a group belong together, or each row's own sides alone."""


def contrast(sides: Mapping[str, Side], pairs: Sequence[Pair], batch: Batch, config: CandidateConfig) -> list[Term]:
    """A term for each pair; every rank must call with the same pairs and settings."""
    own, places = own_block(batch, sides), {name: number for number, name in enumerate(sides)}
    losses = [_loss_of(pair)(own, (places[pair.first], places[pair.second]), pair) for pair in pairs]
    with torch.autocast(own.embeddings.device.type, enabled=False):  # bf16 would err by 0.25 at a logit of 100
        for block in candidate_blocks(own, config, batch):
            compute = operator.call if len(block.row) == batch.global_rows else _compute_again
            for loss in losses:
                loss.meet(block, compute)
        return [loss.term() for loss in losses]


def _loss_of(pair: Pair) -> "type[_InfoNce | _GroupInfoNce | _Sigmoid]":
    if pair.bias is not None:
        return _Sigmoid
    return _GroupInfoNce if pair.by_group else _InfoNce


class _InfoNce:
    """Symmetric: rows that have both sides look for theirs, in both directions."""

    def __init__(self, own: Block, sides: tuple[int, int], pair: Pair) -> None:
        self.sides, self.scale = sides, pair.scale
        self.rows = own.present[:, list(sides)].all(1).nonzero()[:, 0]
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


class _GroupInfoNce:
    """Symmetric: every row that has one side looks for all rows of its group that have the other."""

    def __init__(self, own: Block, sides: tuple[int, int], pair: Pair) -> None:
        self.ways = [_Way(own, sides, pair.scale), _Way(own, (sides[1], sides[0]), pair.scale)]

    def meet(self, block: Block, compute: Callable[..., Any]) -> None:
        for way in self.ways:
            way.meet(block, compute)

    def term(self) -> Term:
        counts = [sum_over_ranks(way.answerable_n.sum()) for way in self.ways]
        losses = [way.losses() for way in self.ways]
        shares = [loss_n / (2 * count.clamp(min=1)) for loss_n, count in zip(losses, counts, strict=True)]
        asked = torch.stack(counts).sum()
        row_losses = torch.cat([s[w.answerable_n] for s, w in zip(shares, self.ways, strict=True)]).detach() * asked
        rows = torch.cat([way.rows[way.answerable_n] for way in self.ways])
        return Term(torch.cat(shares).sum() * world_size(), rows, row_losses)


class _Way:
    """One direction of a pair: queries of the first side, candidates of the second."""

    def __init__(self, own: Block, sides: tuple[int, int], scale: Tensor) -> None:
        self.sides, self.scale = sides, scale
        self.rows = own.present[:, sides[0]].nonzero()[:, 0]
        self.queries = Block._make(column[self.rows] for column in own)
        self.groups, self.group_of_n = self.queries.group.unique(return_inverse=True)
        self.sums: list[Tensor] = []
        self.right_n = torch.zeros_like(self.rows)
        self.right_logits_n = own.embeddings.new_zeros(len(self.rows))

    def meet(self, block: Block, compute: Callable[..., Any]) -> None:
        self.sums.append(compute(_log_sum_exp, self.queries, block, self.sides, self.scale, True))
        if not len(self.rows):
            return
        # The sum of a group's logits is the logit of its sum: no second matrix of queries times candidates.
        place_K = torch.searchsorted(self.groups, block.group).clamp(max=len(self.groups) - 1)
        right_K = block.present[:, self.sides[1]] & (self.groups[place_K] == block.group)
        candidates_KE = block.embeddings[:, self.sides[1]] * right_K[:, None]
        sums_gE = candidates_KE.new_zeros(len(self.groups), candidates_KE.shape[1]).index_add(0, place_K, candidates_KE)
        self.right_n = (
            self.right_n + torch.zeros_like(self.groups).index_add(0, place_K, right_K.long())[self.group_of_n]
        )
        own_nE = self.queries.embeddings[:, self.sides[0]]
        self.right_logits_n = self.right_logits_n + self.scale * (own_nE * sums_gE[self.group_of_n]).sum(1)

    @property
    def answerable_n(self) -> Tensor:
        return self.right_n > 0

    def losses(self) -> Tensor:
        """`(n,)`, 0 for queries without any right answer."""
        losses_n = torch.stack(self.sums).logsumexp(0) - self.right_logits_n / self.right_n.clamp(min=1)
        return losses_n * self.answerable_n


class _Sigmoid:
    """Every row that has the first side against every row that has the second, per row that has a right answer."""

    def __init__(self, own: Block, sides: tuple[int, int], pair: Pair) -> None:
        assert pair.bias is not None
        self.sides, self.scale, self.bias, self.by_group = sides, pair.scale, pair.bias, pair.by_group
        self.rows = own.present[:, sides[0]].nonzero()[:, 0]
        self.queries = Block._make(column[self.rows] for column in own)
        self.costs_n = self.queries.embeddings.new_zeros(len(self.rows))
        self.answered_n = self.queries.present[:, sides[1]]

    def meet(self, block: Block, compute: Callable[..., Any]) -> None:
        if self.by_group:
            found = block.group[block.present[:, self.sides[1]]]
            self.answered_n = self.answered_n | torch.isin(self.queries.group, found)
        self.costs_n = self.costs_n + compute(
            _disagreement, self.queries, block, self.sides, self.scale, self.bias, self.by_group
        )

    def term(self) -> Term:
        count, askers = sum_over_ranks(torch.stack([self.answered_n.sum(), torch.tensor(len(self.rows)).to(self.rows)]))
        # A global batch without any pair trains nothing; 0 and still connected.
        costs_n = self.costs_n * (count > 0) / count.clamp(min=1)
        return Term(costs_n.sum() * world_size(), self.rows, costs_n.detach() * askers)


def _log_sum_exp(queries: Block, block: Block, sides: tuple[int, int], scale: Tensor, by_group: bool = False) -> Tensor:
    """Over the candidates that each query may meet, `(n,)`."""
    logits_nK, _, allowed_nK = _meeting(queries, block, sides, scale, by_group=by_group)
    return logits_nK.masked_fill(~allowed_nK, _NEVER).logsumexp(1)


def _disagreement(
    queries: Block, block: Block, sides: tuple[int, int], scale: Tensor, bias: Tensor, by_group: bool
) -> Tensor:
    """Sum over the candidates of -log sigmoid of the logit, negated for all but right answers, `(n,)`."""
    logits_nK, right_nK, allowed_nK = _meeting(queries, block, sides, scale, by_group=by_group)
    logits_nK = logits_nK + bias
    return -F.logsigmoid(torch.where(right_nK, logits_nK, -logits_nK)).masked_fill(~allowed_nK, 0.0).sum(1)


def _right(queries: Block, block: Block, sides: tuple[int, int], *, by_group: bool) -> Tensor:
    """Which candidates are right answers: the query's own row, or all of its group."""
    if by_group:
        return block.present[:, sides[1]] & (queries.group[:, None] == block.group)
    return block.present[:, sides[1]] & (queries.row[:, None] == block.row)


def _meeting(
    queries: Block, block: Block, sides: tuple[int, int], scale: Tensor, *, by_group: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, right answers, and which candidates a query may meet: those, and all of other groups."""
    query, candidate = sides
    logits_nK = scale * queries.embeddings[:, query] @ block.embeddings[:, candidate].T
    right_nK = _right(queries, block, sides, by_group=by_group)
    other_nK = block.present[:, candidate] & (queries.group[:, None] != block.group)
    return logits_nK, right_nK, right_nK | other_nK


def _compute_again(function: Callable[..., Tensor], *arguments: object) -> Tensor:
    """Logits are all that grows with queries times candidates: a block's are not kept, backward makes them anew."""
    result = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(result, Tensor)
    return result
