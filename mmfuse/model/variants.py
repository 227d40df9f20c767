"""Variants of a token batch that objectives fuse."""

from collections.abc import Mapping

import torch
from torch import Tensor

from mmfuse.types import TokenBatch


def without_some(batch: TokenBatch, dropped: Mapping[str, Tensor]) -> TokenBatch:
    """The same samples, of which some lack a modality more.

    Args:
        dropped: bool `(B,)` by modality.
    """
    kept = {name: ~dropped[name][rows] for name, rows in batch.rows.items() if name in dropped}

    def cut(part: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: values[kept[name]] if name in kept else values for name, values in part.items()}

    return TokenBatch(cut(batch.tokens), cut(batch.masks), cut(batch.rows), batch.num_rows)


def without_each(batch: TokenBatch, chosen: Mapping[str, Tensor]) -> TokenBatch:
    """For each modality the chosen samples without it, those of the first modality first.

    Args:
        chosen: bool `(B,)` by modality.
    """
    counts = {name: int(rows.sum()) for name, rows in chosen.items()}
    places, filled = {}, 0
    for name, rows in chosen.items():
        places[name] = torch.cumsum(rows, dim=0) - 1 + filled
        filled += counts[name]
    tokens, masks, rows = {}, {}, {}
    for name, own in batch.rows.items():
        copies = [(left_out, chosen[left_out][own]) for left_out in chosen if left_out != name]
        tokens[name] = torch.cat([batch.tokens[name][here] for _, here in copies])
        masks[name] = torch.cat([batch.masks[name][here] for _, here in copies])
        rows[name] = torch.cat([places[left_out][own[here]] for left_out, here in copies])
    return TokenBatch(tokens, masks, rows, filled)
