"""Packs the tokens of all samples and modalities into one stream, and finds who attends to whom.

Linear layers and norms run on the stream `(N, D)` of real tokens, so they waste nothing on padding or on modalities
that a sample lacks. Attention runs in groups of samples with the same set of modalities, each group dense, so plain
SDPA serves on every device. The groups live inside the attention function: the number of module calls does not depend
on the batch, which ZeRO-3 and FSDP need.

Shape legend: N packed tokens, n entries of a modality, L tokens of an entry, g samples of a group.
"""

from collections.abc import Mapping
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from mmfuse.types import TokenBatch

View = Mapping[str, tuple[str, ...]]
"""By modality whose tokens ask: the modalities of the same sample whose tokens they see."""


class AttentionGroup(NamedTuple):
    """Queries and keys of samples that attend alike, as places in the stream."""

    query_gq: Tensor
    """int64 `(g, Lq)`; 0 where `query_mask_gq` is False."""
    query_mask_gq: Tensor
    key_gk: Tensor
    """int64 `(g, Lk)`; 0 where `key_mask_gk` is False. Lk may be 0: the null key is always there."""
    key_mask_gk: Tensor


class AttentionLayout(NamedTuple):
    """Groups that together hold every token exactly once as a query."""

    groups: list[AttentionGroup]
    inverse_N: Tensor
    """Where each token of the stream stands in the concatenated outputs of the groups."""


class Packing(NamedTuple):
    """Where each modality's tokens went."""

    spans: dict[str, slice]
    """Each modality's part of the stream."""
    masks: dict[str, Tensor]
    layouts: dict[str, AttentionLayout]
    """By the name of the view."""


def pack(batch: TokenBatch, views: Mapping[str, View]) -> tuple[Tensor, Packing]:
    """The stream `(N, D)`, modality after modality, and its packing for these views."""
    x_ND = torch.cat([batch.tokens[name][batch.masks[name]] for name in batch.tokens])
    # Layouts are built on the CPU: their sizes decide what is launched next.
    masks = {name: mask.cpu() for name, mask in batch.masks.items()}
    places, spans, filled = {}, {}, 0
    for name, mask in masks.items():
        spans[name] = slice(filled, filled + int(mask.sum()))
        places[name] = torch.zeros(mask.shape, dtype=torch.int64)
        places[name][mask] = torch.arange(filled, spans[name].stop)
        filled = spans[name].stop
    entries = {name: _entry_of_row(rows.cpu(), batch.num_rows) for name, rows in batch.rows.items()}
    groups = {name: _groups(view, places, masks, entries) for name, view in views.items()}
    layouts = {name: _layout(found, filled, x_ND.device) for name, found in groups.items()}
    return x_ND, Packing(spans, batch.masks, layouts)


def unpack(x_ND: Tensor, packing: Packing) -> dict[str, Tensor]:
    """The stream's tokens back in `(n, L, D)` per modality, zeros in padding."""
    unpacked = {}
    for name, mask in packing.masks.items():
        padded = x_ND.new_zeros(*mask.shape, x_ND.shape[-1])
        unpacked[name] = padded.masked_scatter(mask.unsqueeze(-1), x_ND[packing.spans[name]])
    return unpacked


def _entry_of_row(rows: Tensor, num_rows: int) -> Tensor:
    """int64 `(B,)`: which entry of a modality is a sample's, -1 where it has none."""
    return torch.full((num_rows,), -1).index_put_((rows,), torch.arange(len(rows)))


def _groups(
    view: View, places: dict[str, Tensor], masks: dict[str, Tensor], entries: dict[str, Tensor]
) -> list[AttentionGroup]:
    """One group for each modality that asks and each set of seen modalities that occurs with it."""
    groups = []
    for name, seen in view.items():
        for keys in (keys for size in range(len(seen) + 1) for keys in combinations(seen, size)):
            chosen = entries[name] >= 0
            for other in seen:
                chosen = chosen & ((entries[other] >= 0) == (other in keys))
            if not chosen.any():
                continue
            mine = entries[name][chosen]
            theirs = [(places[other], masks[other], entries[other][chosen]) for other in keys]
            empty = torch.zeros(len(mine), 0, dtype=torch.int64)
            groups.append(
                AttentionGroup(
                    places[name][mine],
                    masks[name][mine],
                    torch.cat([empty, *(place[entry] for place, _, entry in theirs)], dim=1),
                    torch.cat([empty.bool(), *(mask[entry] for _, mask, entry in theirs)], dim=1),
                )
            )
    return groups


def _layout(groups: list[AttentionGroup], num_tokens: int, device: torch.device) -> AttentionLayout:
    groups = [group for group in groups if group.query_mask_gq.any()]
    order = torch.cat([torch.zeros(0, dtype=torch.int64), *(g.query_gq[g.query_mask_gq] for g in groups)])
    inverse = torch.empty(num_tokens, dtype=torch.int64)
    inverse[order] = torch.arange(num_tokens)
    return AttentionLayout(
        [AttentionGroup(*(tensor.to(device, non_blocking=True) for tensor in group)) for group in groups],
        inverse.to(device, non_blocking=True),
    )
