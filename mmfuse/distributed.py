"""Ranks, and the three exchanges that objectives need. All work with and without a process group."""

import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mmfuse.errors import MmfuseError, on_all_ranks

T = TypeVar("T")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def ranks_of_this_node() -> list[int]:
    """Ranks that run on the same kernel and under the same host name, this one among them; all ranks must call."""
    if world_size() == 1:
        return [rank()]
    boot = Path("/proc/sys/kernel/random/boot_id")
    here = socket.gethostname(), boot.read_text() if boot.is_file() else ""
    places: list[tuple[str, str]] = [here] * world_size()
    dist.all_gather_object(places, here)
    return [number for number, place in enumerate(places) if place == here]


def raise_together(act: Callable[[], object] | None) -> None:
    """Calls `act` on the ranks that have one; what goes wrong on any of them ends all ranks, none waits for the dead.

    Raises:
        MmfuseError: the first rank's error; among several ranks with the name of its host.
    """
    problem = None
    try:
        if act:
            act()
    except MmfuseError as error:
        if world_size() == 1:
            raise
        problem = type(error), f"{socket.gethostname()}: {error}"
    problems: list[tuple[type[MmfuseError], str] | None] = [problem] * world_size()
    if world_size() > 1:
        dist.all_gather_object(problems, problem)
    for error_class, text in filter(None, problems):
        raise on_all_ranks(error_class)(text)


def first_rank_decides(act: Callable[[], T]) -> T:
    """What `act` gives on rank 0, on every rank; all ranks must call. Errors as of `raise_together`."""
    answer: list[Any] = []
    raise_together((lambda: answer.append(act())) if rank() == 0 else None)
    answer = answer or [None]
    if world_size() > 1:
        dist.broadcast_object_list(answer)
    return answer[0]


def slice_of_rank(total: int, *, rank: int, world_size: int) -> slice:
    """The part of `total` rows that a rank owns; parts differ by at most one row."""
    return slice(rank * total // world_size, (rank + 1) * total // world_size)


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of every rank's `value`, without gradient."""
    total = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def largest_over_ranks(value: int, device: torch.device) -> int:
    """The largest of every rank's `value`."""
    largest = torch.tensor(value, device=device)
    if world_size() > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def find_differences(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that ranks hold differently, by the sums of their bits; all ranks must call."""
    if world_size() == 1 or not tensors:
        return []
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [x.detach().view(whole[x.element_size()]).sum(dtype=torch.int64) for x in tensors.values()]
    by_rank = gather_rows(torch.stack(sums)[None], global_rows=world_size())
    return [name for name, column in zip(tensors, by_rank.T.tolist(), strict=True) if len(set(column)) > 1]


def _all_gather(x: Tensor) -> Tensor:
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


class _GatherRows(torch.autograd.Function):
    """All-gather whose gradient goes back to every rank: without the remote part an update is 30% wrong."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.num_rows = x.shape[0]
        return _all_gather(x)

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> Tensor:
        total = grad_outputs[0].contiguous()
        dist.all_reduce(total)
        return total[rank() * ctx.num_rows : (rank() + 1) * ctx.num_rows]


def gather_rows(x: Tensor, *, global_rows: int) -> Tensor:
    """Every rank's rows, rank 0 first, with gradient to all of them.

    Args:
        x: `(b, ...)`, this rank's `slice_of_rank` of `global_rows`; b may differ between ranks by one.
    Returns:
        `(global_rows, ...)` in the order of the global batch.
    """
    if world_size() == 1:
        return x
    most = -(-global_rows // world_size())
    padded = torch.cat([x, x.new_zeros(most - x.shape[0], *x.shape[1:])])
    gathered = _GatherRows.apply(padded) if x.is_floating_point() else _all_gather(padded)
    assert isinstance(gathered, Tensor)
    return gathered[_rows_without_padding(global_rows, most).to(x.device)]


class _RotateRows(torch.autograd.Function):
    """To the next rank, from the one before; the gradient travels back."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return _shift(x, by=1)

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> Tensor:
        return _shift(grad_outputs[0], by=-1)


def _shift(x: Tensor, *, by: int) -> Tensor:
    received = torch.empty_like(x, memory_format=torch.contiguous_format)
    target, origin = (rank() + by) % world_size(), (rank() - by) % world_size()
    exchange = [dist.P2POp(dist.isend, x.contiguous(), target), dist.P2POp(dist.irecv, received, origin)]
    for work in dist.batch_isend_irecv(exchange):
        work.wait()
    return received


def rotate_rows(x: Tensor) -> Tensor:
    """The rows of the rank before this one, of the last rank on the first, with gradient to them.

    Args:
        x: `(k, ...)`, of one shape on all ranks.
    """
    if world_size() == 1:
        return x
    rotated = _RotateRows.apply(x) if x.is_floating_point() else _shift(x, by=1)
    assert isinstance(rotated, Tensor)
    return rotated


def _rows_without_padding(global_rows: int, most: int) -> Tensor:
    """Where each global row sits among `world_size` blocks of `most` rows."""
    rows = []
    for r in range(world_size()):
        own = slice_of_rank(global_rows, rank=r, world_size=world_size())
        rows.append(torch.arange(own.stop - own.start) + r * most)
    return torch.cat(rows)


class _ExchangeRows(torch.autograd.Function):
    """Row lists sent to their askers; the gradient travels the same way back and adds up at the owner."""

    @staticmethod
    def forward(ctx, x: Tensor, send_index: Tensor, send_counts: list[int], receive_counts: list[int]) -> Tensor:
        ctx.save_for_backward(send_index)
        ctx.shape, ctx.counts = x.shape, (send_counts, receive_counts)
        received = x.new_empty(sum(receive_counts), *x.shape[1:])
        dist.all_to_all_single(received, x[send_index].contiguous(), receive_counts, send_counts)
        return received

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        (send_index,), (send_counts, receive_counts) = ctx.saved_tensors, ctx.counts
        grad = grad_outputs[0].contiguous()
        returned = grad.new_empty(sum(send_counts), *grad.shape[1:])
        dist.all_to_all_single(returned, grad, send_counts, receive_counts)
        return grad.new_zeros(ctx.shape).index_add_(0, send_index, returned), None, None, None


def fetch_rows(x: Tensor, wanted: Tensor, *, global_rows: int) -> Tensor:
    """The rows of the global batch that this rank asks for, with gradient to their owners.

    Only the rows asked for travel. Every rank must call, also with nothing wanted.

    Args:
        x: `(b, ...)`, this rank's `slice_of_rank` of `global_rows`.
        wanted: int64 `(k,)`, rows of the global batch; k may differ between ranks.
    Returns:
        `(k, ...)` in the order of `wanted`.
    """
    if world_size() == 1:
        return x[wanted]
    starts = torch.tensor(
        [slice_of_rank(global_rows, rank=r, world_size=world_size()).start for r in range(world_size())],
        device=wanted.device,
    )
    owner = torch.bucketize(wanted, starts, right=True) - 1
    order = torch.argsort(owner, stable=True)
    ask = torch.bincount(owner, minlength=world_size())
    told = torch.empty_like(ask)
    dist.all_to_all_single(told, ask)
    receive_counts, send_counts = ask.tolist(), told.tolist()
    send_index = wanted.new_empty(sum(send_counts))
    dist.all_to_all_single(send_index, (wanted - starts[owner])[order].contiguous(), send_counts, receive_counts)
    received = _ExchangeRows.apply(x, send_index, send_counts, receive_counts)
    assert isinstance(received, Tensor)
    return received[torch.argsort(order)]
