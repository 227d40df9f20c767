"""Pair contrastive: InfoNCE of every two modalities (CLIP, Radford et al. 2021, arXiv 2103.00020), exact over ranks.

Queries of a pair are the samples that have both of its modalities. Candidates are all samples of the global batch that
have the other modality, those without the query's own included: they are extra negatives. Samples of the same group are
never each other's negatives.

Shape legend: B rows of this rank, G rows of the global batch, E embedding, n queries.
"""

import math
from itertools import combinations
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat
from torch import Tensor, nn

from mmfuse.distributed import gather_rows, rank, slice_of_rank, world_size
from mmfuse.errors import ConfigError
from mmfuse.model.model import ModelConfig, at_least_fp32
from mmfuse.objectives.base import Objective, ObjectiveConfig, StepInputs, Term

INITIAL_LOGIT_SCALE = math.log(1 / 0.07)
LARGEST_LOGIT_SCALE = math.log(100)


class Config(ObjectiveConfig):
    """InfoNCE over pairs of modalities."""

    uses_fusion: ClassVar[bool] = False
    pairs: dict[str, NonNegativeFloat] | None = None
    """Weight by pair, such as `{text-image: 1, text-audio: 0.5}`; null: every pair, equally. The loss is their mean."""

    def build(self, model: ModelConfig, *, seed: int) -> "Contrastive":
        every = {frozenset(pair): pair for pair in combinations(model.modalities, 2)}
        weights: dict[tuple[str, str], float] = dict.fromkeys(every.values(), 1.0)
        if self.pairs is not None:
            weights = {}
            for name, weight in self.pairs.items():
                pair = every.get(frozenset(name.split("-")))
                if pair is None:
                    known = ", ".join("-".join(pair) for pair in every.values())
                    raise ConfigError(f"objectives.contrastive.pairs: {name!r} is not one of {known or 'no pairs'}")
                weights[pair] = weight
        weights = {pair: weight for pair, weight in weights.items() if weight > 0}
        if not weights:
            raise ConfigError("objectives.contrastive needs two modalities and a pair with a weight above 0")
        return Contrastive(weights)


class Contrastive(Objective):
    """Weighted mean of the pairs' InfoNCE, one learned scale a pair."""

    def __init__(self, weights: dict[tuple[str, str], float]) -> None:
        super().__init__()
        total = sum(weights.values())
        self.weights = {pair: weight / total for pair, weight in weights.items()}
        # Not 0-dimensional: DeepSpeed refuses such parameters.
        self.logit_scale = nn.Parameter(torch.full((len(weights),), INITIAL_LOGIT_SCALE))

    def forward(self, inputs: StepInputs) -> dict[str, Term]:
        batch, embeddings = inputs.batch, inputs.encoded.embeddings
        rows = GlobalRows.of(inputs)
        everyone = dict(
            zip(embeddings, gather_embeddings(list(embeddings.values()), global_rows=batch.global_rows), strict=True)
        )
        present = gather_rows(batch.present, global_rows=batch.global_rows)
        scales = exp_clamped(self.logit_scale)
        terms = {}
        for scale, ((a, b), weight) in zip(scales, self.weights.items(), strict=True):
            column_a, column_b = present[:, batch.modalities.index(a)], present[:, batch.modalities.index(b)]
            term = info_nce(
                (embeddings[a], embeddings[b]), (everyone[a], everyone[b]), (column_a, column_b), scale, rows
            )
            terms[f"{a}-{b}"] = Term(weight * term.loss, term.rows, weight * term.row_losses)
        return terms


class GlobalRows(NamedTuple):
    """Which rows of the global batch are this rank's, and the groups of all."""

    global_rows: int
    own: Tensor
    """int64 `(B,)`: places of this rank's rows in the global batch."""
    group_G: Tensor

    @classmethod
    def of(cls, inputs: StepInputs) -> "GlobalRows":
        batch = inputs.batch
        own = slice_of_rank(batch.global_rows, rank=rank(), world_size=world_size())
        places = torch.arange(own.start, own.stop, device=batch.group_id.device)
        return cls(batch.global_rows, places, gather_rows(batch.group_id, global_rows=batch.global_rows))


def info_nce(
    own: tuple[Tensor, Tensor],
    everyone: tuple[Tensor, Tensor],
    present: tuple[Tensor, Tensor],
    scale: Tensor,
    rows: GlobalRows,
) -> Term:
    """Symmetric InfoNCE of two sides.

    Args:
        own: both sides' embeddings of this rank, `(B, E)`, L2-normalised.
        everyone: the same of all ranks, `(G, E)`, with gradient.
        present: bool `(G,)` of both sides: which rows have an embedding.
        scale: inverse temperature.
    """
    paired_G = present[0] & present[1]
    queries = paired_G[rows.own].nonzero()[:, 0]
    places = rows.own[queries]
    losses_n = scale.new_zeros(len(queries))
    for query, candidate in ((0, 1), (1, 0)):
        with torch.autocast(scale.device.type, enabled=False):  # bf16 would err by 0.25 at a logit of 100
            logits_nG = scale * own[query][queries] @ everyone[candidate].T
        forbidden_nG = ~present[candidate] | (rows.group_G[places, None] == rows.group_G)
        forbidden_nG[torch.arange(len(places), device=places.device), places] = False
        logits_nG = logits_nG.masked_fill(forbidden_nG, -torch.inf)
        losses_n = losses_n + F.cross_entropy(logits_nG, places, reduction="none") / 2
    return Term(losses_n.sum() * world_size() / paired_G.sum().clamp(min=1), queries, losses_n.detach())


def gather_embeddings(embeddings: list[Tensor], *, global_rows: int) -> list[Tensor]:
    """Several `(B, E)` gathered to `(G, E)` with gradient in one exchange."""
    joined = gather_rows(torch.stack(embeddings, dim=1), global_rows=global_rows)
    return list(joined.unbind(1))


class _ClampInward(torch.autograd.Function):
    """Clamp whose gradient may leave the bound inwards: the same as clamping the parameter after each step, which under
    DeepSpeed would have to reach the fp32 master weights."""

    @staticmethod
    def forward(ctx, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bounds = low, high
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        (x,), (low, high), grad = ctx.saved_tensors, ctx.bounds, grad_outputs[0]
        outward = ((x >= high) & (grad < 0)) | ((x <= low) & (grad > 0))
        return grad.masked_fill(outward, 0), None, None


def exp_clamped(logit_scale: Tensor) -> Tensor:
    """The scales, between 1 and 100, in fp32 also where the parameter is bf16."""
    scale = _ClampInward.apply(at_least_fp32(logit_scale), 0.0, LARGEST_LOGIT_SCALE)
    assert isinstance(scale, Tensor)
    return scale.exp()
