"""Candidates: the rows of the global batch that this rank's rows are contrasted with, a block at a time.

Two ways bring them here, equal in value and gradient. `gather`: everyone's embeddings at once, cut into blocks; one
exchange, memory for the whole global batch of embeddings. `ring`: each rank's embeddings go once around, so that there
is never more than two ranks' of them; as many exchanges as ranks. Either way the logits of one block alone are in
memory, for backward computes them again.

Shape legend: B rows of this rank, G rows of the global batch, K rows of a block, S sides, E embedding.
"""

from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

import torch
from pydantic import PositiveInt
from torch import Tensor

from mmfuse.config import Settings
from mmfuse.distributed import gather_rows, rank, rotate_rows, slice_of_rank, world_size
from mmfuse.types import Batch


class CandidateConfig(Settings):
    """How a global batch meets that is too large for one matrix of logits."""

    exchange: Literal["gather", "ring"] = "gather"
    """`ring` where even the embeddings of the global batch are too many; slower by its many exchanges."""
    block_rows: PositiveInt = 8192
    """Candidates at a time; fewer take less memory. A ring's blocks are at most a rank's rows."""


class Side(NamedTuple):
    """One embedding of every row that has it: of a modality, or of a fusion of some."""

    embedding: Tensor
    """`(B, E)`, L2-normalised; zeros where there is none."""
    present: Tensor
    """bool `(B,)`."""


class Block(NamedTuple):
    """Some rows of the global batch."""

    embeddings: Tensor
    """`(K, S, E)`, with gradient to their owners."""
    present: Tensor
    """bool `(K, S)`."""
    group: Tensor
    """int64 `(K,)`; rows of one group are never each other's negatives."""
    row: Tensor
    """int64 `(K,)`: places in the global batch, -1 for padding."""

    def split(self, num_rows: int) -> Iterator["Block"]:
        """Parts of at most so many rows."""
        yield from map(Block._make, zip(*(column.split(num_rows) for column in self), strict=True))


def own_block(batch: Batch, sides: Mapping[str, Side]) -> Block:
    """This rank's rows, of every micro-batch in turn."""
    part = batch.global_rows // batch.micro_batches
    own = slice_of_rank(part, rank=rank(), world_size=world_size())
    starts = torch.arange(batch.micro_batches, device=batch.group_id.device) * part
    return Block(
        torch.stack([side.embedding for side in sides.values()], dim=1),
        torch.stack([side.present for side in sides.values()], dim=1),
        batch.group_id,
        (starts[:, None] + torch.arange(own.start, own.stop, device=starts.device)).flatten(),
    )


def candidate_blocks(own: Block, config: CandidateConfig, batch: Batch) -> Iterator[Block]:
    """All rows of the global batch; every rank must go through all blocks, and there are as many on each."""
    part, parts = batch.global_rows // batch.micro_batches, batch.micro_batches
    whole = _gathered(own, part, parts) if config.exchange == "gather" else _around(own, part, parts)
    for block in whole:
        yield from block.split(config.block_rows)


def _gathered(own: Block, part: int, parts: int) -> Iterator[Block]:
    by_part = [column.split(len(own.row) // parts) for column in own]
    yield Block._make(torch.cat([gather_rows(x, global_rows=part) for x in column]) for column in by_part)


def _around(own: Block, part: int, parts: int) -> Iterator[Block]:
    most = parts * -(-part // world_size())
    padding = most - len(own.row)
    block = Block(
        torch.cat([own.embeddings, own.embeddings.new_zeros(padding, *own.embeddings.shape[1:])]),
        torch.cat([own.present, own.present.new_zeros(padding, own.present.shape[1])]),
        torch.cat([own.group, own.group.new_zeros(padding)]),
        torch.cat([own.row, own.row.new_full((padding,), -1)]),
    )
    for turn in range(world_size()):
        yield block
        if turn + 1 < world_size():
            block = Block._make(map(rotate_rows, block))
