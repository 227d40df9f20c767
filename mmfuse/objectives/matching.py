"""Matching: does this set of modalities belong together? Binary cross-entropy on the fused vector, with hard negatives
(ALBEF, Li et al. 2021, arXiv 2107.07651), for any two or more modalities.

In every sample with at least two modalities one of them is exchanged for that of another sample of the global batch,
drawn by its similarity to a modality that stays. The draw is Gumbel-argmax over masked similarities, so a confident
batch cannot make it fail as a multinomial over an underflowed softmax does. All noise is keyed by step and samples.

Shape legend: B rows of this rank, G rows of the global batch, n exchanged rows, L tokens, D width.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from mmfuse.distributed import fetch_rows, gather_rows, largest_over_ranks, sum_over_ranks, world_size
from mmfuse.errors import ConfigError
from mmfuse.hashing import hash_int
from mmfuse.model.model import ModelConfig, at_least_fp32
from mmfuse.objectives.base import Need, Objective, ObjectiveConfig, StepInputs, Term, every_pair
from mmfuse.randomness import keyed_uniform
from mmfuse.types import TokenBatch


class Config(ObjectiveConfig):
    """Matching with hard negatives."""

    reads_fused_batch: ClassVar[bool] = True
    temperature: PositiveFloat = 0.07
    """Of the similarities that negatives are drawn by; lower is harder."""
    negative_pool: PositiveInt | None = None
    """Negatives come from the first this many rows of the global batch; null: from all of it."""

    def needs(self, name: str, modalities: tuple[str, ...]) -> list[Need]:
        return [Need(name, every_pair(modalities))]

    def build(self, model: ModelConfig, *, seed: int) -> "Matching":
        if len(model.modalities) < 2:
            raise ConfigError("objectives.matching needs at least two modalities")
        return Matching(self, model.width, seed=hash_int(seed, "matching"))


class Matching(Objective):
    """One positive and one hard negative for every sample with several modalities."""

    def __init__(self, config: Config, width: int, *, seed: int) -> None:
        super().__init__()
        self.temperature, self.negative_pool, self.seed = config.temperature, config.negative_pool, seed
        self.classifier = nn.Linear(width, 1)

    def forward(self, inputs: StepInputs) -> dict[str, Term]:
        assert inputs.fused is not None
        changed, negatives = self._draw(inputs)
        exchanged = _exchange(inputs, changed, negatives)
        mismatched = inputs.model.fuse(exchanged)
        rows = (changed >= 0).nonzero()[:, 0]
        matched_n = at_least_fp32(self.classifier(inputs.fused.pooled[rows]))[:, 0]
        mismatched_n = at_least_fp32(self.classifier(mismatched.pooled))[:, 0]
        losses_n = (F.softplus(-matched_n) + F.softplus(mismatched_n)) / 2
        count = sum_over_ranks(torch.tensor(len(rows), device=rows.device))
        loss = losses_n.sum() * world_size() / count.clamp(min=1)
        return {"matching": Term(loss, rows, losses_n.detach())}

    @torch.no_grad()
    def _draw(self, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        """For each row the modality that is exchanged (-1: none can be) and the global row that it comes from."""
        batch = inputs.batch
        embeddings = torch.stack(list(inputs.encoded.embeddings.values()), dim=1)  # for one exchange
        everyone = gather_rows(embeddings, global_rows=batch.global_rows).unbind(1)
        present, group, sample = (
            gather_rows(x, global_rows=batch.global_rows) for x in (batch.present, batch.group_id, batch.sample_id)
        )
        ids, step = batch.sample_id, batch.step
        modality_number = torch.arange(len(batch.modalities), device=ids.device)
        # The two present modalities with the largest noise: the first is exchanged, the second draws the negative.
        noise = keyed_uniform(self.seed, step, ids[:, None], modality_number)
        changed, kept = noise.masked_fill(~batch.present, -1.0).topk(2, dim=1).indices.unbind(1)

        own_BME = torch.stack(list(inputs.encoded.embeddings.values()), dim=1)
        kept_BE = own_BME[torch.arange(len(ids), device=ids.device), kept]
        similarity_BMG = torch.stack([kept_BE @ other.T for other in everyone], dim=1)
        similarity_BG = similarity_BMG[torch.arange(len(ids), device=ids.device), changed] / self.temperature
        allowed_BG = present.T[changed] & (batch.group_id[:, None] != group)
        if self.negative_pool is not None:
            allowed_BG[:, self.negative_pool :] = False
        gumbel_BG = -torch.log(-torch.log(keyed_uniform(self.seed + 1, step, ids[:, None], sample)))
        negatives = (similarity_BG + gumbel_BG).masked_fill(~allowed_BG, -torch.inf).argmax(1)
        possible = (batch.present.sum(1) >= 2) & allowed_BG.any(1)
        return torch.where(possible, changed, -1), negatives


def _exchange(inputs: StepInputs, changed: Tensor, negatives: Tensor) -> TokenBatch:
    """The rows with `changed >= 0`, each with that modality's tokens taken from its negative."""
    source = inputs.encoded.token_batch
    place = torch.cumsum(changed >= 0, dim=0) - 1  # row of the batch -> row of the result
    tokens, masks, rows = {}, {}, {}
    for number, name in enumerate(inputs.batch.modalities):
        asking = (changed == number).nonzero()[:, 0]
        fetched, fetched_mask = _fetch_tokens(source, name, negatives[asking], global_rows=inputs.batch.global_rows)
        stays = ((changed >= 0) & (changed != number))[source.rows[name]]
        length = fetched.shape[1]
        own = F.pad(source.tokens[name][stays], (0, 0, 0, length - source.tokens[name].shape[1]))
        own_mask = F.pad(source.masks[name][stays], (0, length - source.masks[name].shape[1]))
        tokens[name] = torch.cat([own, fetched])
        masks[name] = torch.cat([own_mask, fetched_mask])
        rows[name] = place[torch.cat([source.rows[name][stays], asking])]
    return TokenBatch(tokens, masks, rows, int((changed >= 0).sum()))


def _fetch_tokens(source: TokenBatch, name: str, wanted: Tensor, *, global_rows: int) -> tuple[Tensor, Tensor]:
    """Tokens and mask of one modality for rows of the global batch; only these rows travel, with gradient."""
    tokens, mask, rows = source.tokens[name], source.masks[name], source.rows[name]
    length = largest_over_ranks(tokens.shape[1], tokens.device)
    tokens = F.pad(tokens, (0, 0, 0, length - tokens.shape[1]))
    mask = F.pad(mask, (0, length - mask.shape[1]))
    by_row = tokens.new_zeros(source.num_rows, *tokens.shape[1:]).index_copy(0, rows, tokens)
    mask_by_row = mask.new_zeros(source.num_rows, length).index_copy(0, rows, mask).to(torch.uint8)
    fetched = fetch_rows(by_row, wanted, global_rows=global_rows)
    return fetched, fetch_rows(mask_by_row, wanted, global_rows=global_rows).bool()
