"""Next sentence (BERT, Devlin et al. 2019, arXiv 1810.04805): does the second sentence of a text follow the first?

In half of the texts of two sentences the second one is that of another sample of the global batch, drawn by noise that
is keyed by step and samples; the text's embedding, before it is normalised, has to tell.

Shape legend: B rows of this rank, G rows of the global batch, n texts of two sentences, L tokens.
"""

from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfuse.distributed import (
    fetch_rows,
    gather_rows,
    largest_over_ranks,
    rank,
    slice_of_rank,
    sum_over_ranks,
    world_size,
)
from mmfuse.errors import ConfigError
from mmfuse.hashing import hash_int
from mmfuse.modalities import text
from mmfuse.model.model import ModelConfig, at_least_fp32
from mmfuse.objectives.base import Need, Objective, ObjectiveConfig, StepInputs, Term
from mmfuse.randomness import keyed_uniform
from mmfuse.types import Batch, Features, ModalityBatch


class Config(ObjectiveConfig):
    """Next sentence, for sources whose recipe says `captions: sentences`."""

    uses_fusion: ClassVar[bool] = False

    def needs(self, name: str, modalities: tuple[str, ...]) -> list[Need]:
        return [Need(name, (frozenset({"text"}),), captions="sentences")]

    def build(self, model: ModelConfig, *, seed: int) -> "NextSentence":
        config = model.modalities.get("text")
        if not isinstance(config, text.Config):
            raise ConfigError("objectives.next_sentence needs the modality text")
        return NextSentence(model.embedding_dim, config.max_tokens, seed=hash_int(seed, "next_sentence"))


class Question(NamedTuple):
    """What the model has to judge."""

    part: ModalityBatch | None
    """The texts; null where this rank has none."""
    rows: Tensor
    """int64 `(n,)`: of which row each is."""
    follows: Tensor
    """bool `(n,)`: whether the second sentence is the text's own."""


class NextSentence(Objective):
    """Binary cross-entropy over the texts of two sentences."""

    def __init__(self, embedding_dim: int, max_tokens: int, *, seed: int) -> None:
        super().__init__()
        self.max_tokens, self.seed = max_tokens, seed
        self.classifier = nn.Linear(embedding_dim, 1)

    def forward(self, inputs: StepInputs) -> dict[str, Term]:
        part, rows, follows_n = self.ask(inputs.batch)
        _, _, text_nE = inputs.model.encode_modality("text", part, rows.device)
        logits_n = at_least_fp32(self.classifier(text_nE))[:, 0]
        losses_n = F.binary_cross_entropy_with_logits(logits_n, follows_n.to(logits_n.dtype), reduction="none")
        count = sum_over_ranks(torch.tensor(len(rows), device=rows.device))
        return {"next_sentence": Term(losses_n.sum() * world_size() / count.clamp(min=1), rows, losses_n.detach())}

    def ask(self, batch: Batch) -> "Question":
        """Every text of two sentences, of which some have got another second one."""
        texts = _texts_by_row(batch)
        rows = texts.is_pair.nonzero()[:, 0]
        follows_n, wanted_n = self._draw(batch, texts.is_pair, rows)
        length = largest_over_ranks(texts.ids.shape[1], rows.device)
        padded = F.pad(texts.ids, (0, length - texts.ids.shape[1]))
        columns = torch.cat([padded, texts.second[:, None], texts.length[:, None]], dim=1)
        found = fetch_rows(columns, wanted_n, global_rows=batch.global_rows)
        if not len(rows):
            return Question(None, rows, follows_n)
        second = _Texts(found[:, :length], found[:, length], found[:, length + 1])
        first = _Texts(padded[rows], texts.second[rows], texts.length[rows])
        return Question(ModalityBatch(rows, _join(first, second, max_tokens=self.max_tokens)), rows, follows_n)

    def _draw(self, batch: Batch, is_pair: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """For each of the rows whether its own second sentence stays, and the global row of the one that it gets.

        A text of another group takes part only if there is one; else its own stays.
        """
        pair_G, group_G, sample_G = (
            gather_rows(x, global_rows=batch.global_rows) for x in (is_pair, batch.group_id, batch.sample_id)
        )
        own = slice_of_rank(batch.global_rows, rank=rank(), world_size=world_size())
        sample, step = batch.sample_id[rows], batch.step
        allowed_nG = pair_G & (batch.group_id[rows, None] != group_G)
        noise_nG = keyed_uniform(self.seed + 1, step, sample[:, None], sample_G)
        other_n = noise_nG.masked_fill(~allowed_nG, -1.0).argmax(1)
        stays_n = (keyed_uniform(self.seed, step, sample) < 0.5) | ~allowed_nG.any(1)
        return stays_n, torch.where(stays_n, rows + own.start, other_n)


class _Texts(NamedTuple):
    """Texts as token ids."""

    ids: Tensor
    """int64 `(k, L)`, padded."""
    second: Tensor
    """int64 `(k,)`: where the second sentence begins; the length where there is none."""
    length: Tensor
    """int64 `(k,)`; 0 for a row without text."""

    @property
    def is_pair(self) -> Tensor:
        return self.second < self.length


def _texts_by_row(batch: Batch) -> _Texts:
    """`(B, ...)`, whether a row has a text or not."""
    num_rows, part = len(batch.present), batch.inputs.get("text")
    if part is None:
        nothing = batch.sample_id.new_zeros(num_rows)
        return _Texts(nothing[:, None], nothing, nothing)
    ids, second, length = part.inputs["input_ids"], part.inputs["second"], part.inputs["attention_mask"].sum(1)
    columns = (column.new_zeros(num_rows, *column.shape[1:]) for column in (ids, second, length))
    return _Texts(*(c.index_copy(0, part.rows, x) for c, x in zip(columns, (ids, second, length), strict=True)))


def _join(first: _Texts, second: _Texts, *, max_tokens: int) -> Features:
    """Inputs of the text encoder: each first sentence, and behind it the second one of the other text.

    What is longer than `max_tokens` is cut before its last token, which says that the text is over.
    """
    place = torch.arange(min(max_tokens, 2 * first.ids.shape[1]), device=first.ids.device)
    length = (first.second + second.length - second.second).clamp(max=max_tokens)
    in_second = place - first.second[:, None] + second.second[:, None]
    last = first.ids.shape[1] - 1
    ids = torch.where(
        place < first.second[:, None],
        first.ids[:, place.clamp(max=last)],
        second.ids.gather(1, in_second.clamp(0, last)),
    )
    end = second.ids.gather(1, second.length[:, None] - 1)
    ids = ids.scatter(1, length[:, None] - 1, end)
    return {"input_ids": ids, "attention_mask": place < length[:, None], "second": first.second}
