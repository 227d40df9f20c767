"""Retrieval in every direction between modalities: R@k and median rank, ties counted against the model.

Shape legend: N samples of the evaluation set, Q queries, G gallery, E embedding.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from typing import Any, NamedTuple

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor
from tqdm import tqdm

from mmfuse.config import Settings
from mmfuse.distributed import gather_rows, rank
from mmfuse.log import hide_bar
from mmfuse.task import Task
from mmfuse.types import Batch

logger = logging.getLogger(__name__)

_CHUNK = 1024


class EvaluationConfig(Settings):
    """How the validation sets are scored."""

    batch_size: PositiveInt = 64
    """Samples of one evaluation batch, over all ranks."""
    recall_at: tuple[PositiveInt, ...] = Field(default=(1, 5, 10), min_length=1)
    num_examples: NonNegativeInt = 4
    """Queries of each direction that the report shows."""


class EmbeddedSet(NamedTuple):
    """One evaluation set after the model; whole on every rank, in the order of the source."""

    embeddings: dict[str, Tensor]
    """`(N, E)` by modality, on the CPU; zeros where a sample lacks it."""
    present: dict[str, Tensor]
    """bool `(N,)` by modality."""
    group_id: Tensor
    """int64 `(N,)`; samples of one group are each other's right answers."""
    without: dict[str, Tensor] = {}  # noqa: RUF012  # never changed
    """`(N, E)` by the modality left out: the others of a complete sample, fused; nothing where that is not trained."""

    def sides(self) -> Iterator[tuple[tuple[str, ...], Tensor, Tensor]]:
        """What can be a query: modalities, their embedding `(N, E)`, and which samples have it, bool `(N,)`."""
        for name, embedding in self.embeddings.items():
            yield (name,), embedding, self.present[name]
        complete = torch.stack(list(self.present.values())).all(0)
        for left_out, embedding in self.without.items():
            yield tuple(name for name in self.embeddings if name != left_out), embedding, complete


@torch.no_grad()
def embed_set(
    task: Task, batches: Iterable[Batch], *, num_samples: int, device: torch.device, name: str
) -> EmbeddedSet:
    """Embeds every sample once; all ranks take part and all get the result."""
    was_training = task.training
    task.eval()
    parts: dict[str, list[Tensor]] = {}
    for batch in tqdm(batches, desc=f"evaluating {name}", unit="batch", leave=False, disable=hide_bar(rank())):
        batch = batch.to(device)
        columns = {**task.embed(batch), "present": batch.present, "group": batch.group_id}
        for column, rows in columns.items():
            parts.setdefault(column, []).append(gather_rows(rows, global_rows=batch.global_rows).cpu())
    task.train(was_training)
    whole = {column: torch.cat(rows)[:num_samples] for column, rows in parts.items()}
    modalities = task.model.modalities
    present = {modality: whole["present"][:, i] for i, modality in enumerate(modalities)}
    without = {m: whole[f"without {m}"] for m in modalities if f"without {m}" in whole}
    return EmbeddedSet({m: whole[m] for m in modalities}, present, whole["group"], without)


def evaluate_retrieval(embedded: EmbeddedSet, config: EvaluationConfig) -> dict[str, Any]:
    """Scores of every direction that has queries, by `image->text`, `text+audio->image` and so on.

    A query's gallery is every sample that has the other modality; the query's own group are the right answers. Chance
    is what a random order gives.
    """
    directions: dict[str, Any] = {}
    pairs = product(embedded.sides(), embedded.embeddings)
    for (names, embeddings, present), target in ((side, target) for side, target in pairs if target not in side[0]):
        queries, gallery = (column.nonzero()[:, 0] for column in (present, embedded.present[target]))
        groups = embedded.group_id
        right_QG = groups[queries, None] == groups[gallery]
        answerable = right_QG.any(1)
        queries, right_QG = queries[answerable], right_QG[answerable]
        if not len(queries):
            continue
        query_QE, gallery_GE = embeddings[queries], embedded.embeddings[target][gallery]
        ranks = rank_of_right_answer(query_QE, gallery_GE, right_QG)
        directions[f"{'+'.join(names)}->{target}"] = {
            **{f"R@{k}": (ranks < k).double().mean().item() for k in config.recall_at},
            **{f"chance R@{k}": chance_recall(right_QG, k) for k in config.recall_at},
            "median rank": ranks.double().quantile(0.5).item() + 1,
            "queries": len(queries),
            "gallery": len(gallery),
            "examples": _examples(queries, gallery, query_QE, gallery_GE, ranks, config.num_examples),
        }
    return directions


def rank_of_right_answer(query_QE: Tensor, gallery_GE: Tensor, right_QG: Tensor) -> Tensor:
    """For each query how many wrong answers are at least as similar as the best right one: int64 `(Q,)`, 0 is best.

    Ties count against the model: with a strict comparison collapsed embeddings would score 100%.
    """
    ranks = []
    for start in range(0, len(query_QE), _CHUNK):
        right = right_QG[start : start + _CHUNK]
        similarity = query_QE[start : start + _CHUNK] @ gallery_GE.T
        # A NaN must not look like a good answer: not at all similar where it is right, most similar where it is wrong.
        best = similarity.nan_to_num(nan=-torch.inf).masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        ranks.append((~(similarity < best) & ~right).sum(1))
    return torch.cat(ranks)


def chance_recall(right_QG: Tensor, k: int) -> float:
    """Expected R@k of a random order: one minus the chance that k draws without replacement miss every right answer."""
    gallery = right_QG.shape[1]
    right = right_QG.sum(1).double()
    miss = torch.ones_like(right)
    for drawn in range(min(k, gallery)):
        miss *= ((gallery - right - drawn) / (gallery - drawn)).clamp(min=0)
    return (1 - miss).mean().item()


def _examples(
    queries: Tensor, gallery: Tensor, query_QE: Tensor, gallery_GE: Tensor, ranks: Tensor, count: int
) -> list[dict[str, Any]]:
    """Queries spread over the set with their five best answers, all as sample numbers."""
    chosen = torch.linspace(0, len(queries) - 1, min(count, len(queries))).long()
    best = (query_QE[chosen] @ gallery_GE.T).topk(min(5, len(gallery)), dim=1).indices
    return [
        {"query": int(queries[q]), "answers": gallery[answers].tolist(), "rank": int(ranks[q]) + 1}
        for q, answers in zip(chosen.tolist(), best, strict=True)
    ]


def summarize(results: Mapping[str, Mapping[str, Any]], *, k: int) -> list[str]:
    """Lines of a table: R@k of every direction beside chance, one block for each evaluation set."""
    lines = []
    for name, directions in results.items():
        lines.append(f"{name:<20}{'R@' + str(k):>8}{'chance':>9}{'ratio':>8}{'median rank':>13}{'gallery':>9}")
        for direction, scores in directions.items():
            recall, chance = scores[f"R@{k}"], scores[f"chance R@{k}"]
            lines.append(
                f"  {direction:<18}{recall:>8.1%}{chance:>9.1%}{recall / chance:>7.1f}x"
                f"{scores['median rank']:>13.0f}{scores['gallery']:>9}"
            )
    return lines
