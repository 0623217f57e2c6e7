"""Sends rows between ranks and their gradients back, in collectives that autograd differentiates.

A row travels as bytes, all its tensors side by side: values arrive unrounded, and each exchange is one collective.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain, compress
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mcl_kernels.distributed.group import Ranks, all_gather, reduce_scatter
from mcl_kernels.distributed.routes import Route
from mcl_kernels.normalize import compute_dtype

T = TypeVar("T")


def transport(shipments: Sequence[tuple[Route, list[Tensor]]], ranks: Ranks) -> list[list[Tensor]]:
    """Sends the rows of some tensors by each route; returns the tensors that arrive.

    One node of autograd holds all routes: the backward passes of all ranks then communicate in the same order.
    """
    loads = [_Load(route, tensor_count=len(tensors), row_count=len(tensors[0])) for route, tensors in shipments]
    tensors = chain.from_iterable(tensors for _, tensors in shipments)
    arrived = _Exchange.apply(ranks, loads, *tensors)  # type: ignore[no-untyped-call]
    return [list(tensors) for tensors in _split_by_load(arrived, loads)]


def gather_tensors(tensors: Sequence[Tensor], sizes: Sequence[int], ranks: Ranks) -> list[Tensor]:
    """Concatenates the rows of all ranks, sizes[r] of rank r, in rank order."""
    return list(_Gather.apply(ranks, sizes, *tensors))  # type: ignore[no-untyped-call]


def sum_copies(grad: Tensor, route: Route, rows: int) -> Tensor:
    """Sums for each of the rows the gradients of its copies, in rank order, in fp32 or fp64, [rows, ...]."""
    total = grad.new_zeros(rows, *grad.shape[1:], dtype=compute_dtype(grad))
    for row, part in zip(route.order.split_with_sizes(route.sent), grad.split_with_sizes(route.sent), strict=True):
        if len(row):
            total[row] += part  # no row occurs twice among the copies to one rank
    return total.to(grad.dtype)


class _Load(NamedTuple):
    """Tensors that travel by one route."""

    route: Route
    tensor_count: int
    row_count: int  # of each tensor, before it is sent


class _Exchange(torch.autograd.Function):
    """Sends rows by their routes."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, loads: list[_Load], *tensors: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        ctx.ranks, ctx.loads = ranks, loads
        arrived: list[Tensor] = []
        for load, rows in zip(loads, _split_by_load(tensors, loads), strict=True):
            route = load.route
            packed = _pack(rows).index_select(0, route.order)
            arrived += _unpack(_all_to_all(packed, route.sent, route.received, ranks), rows)
        ctx.mark_non_differentiable(*(x for x in arrived if not x.is_floating_point()))
        return tuple(arrived)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        needed = ctx.needs_input_grad[2:]
        counts = [sum(flags) for flags in _split_by_load(needed, ctx.loads)]
        loads = [load._replace(tensor_count=count) for load, count in zip(ctx.loads, counts, strict=True) if count]
        returned = _Return.apply(ctx.ranks, loads, *compress(grads, needed))  # type: ignore[no-untyped-call]
        return None, None, *_at_needed(needed, returned)


class _Return(torch.autograd.Function):
    """Sends gradients back to their rows, and sums those of the copies of a row: the transpose of `_Exchange`."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, loads: list[_Load], *grads: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        ctx.ranks, ctx.loads = ranks, loads
        returned: list[Tensor] = []
        for load, rows in zip(loads, _split_by_load(grads, loads), strict=True):
            route = load.route
            copies = _unpack(_all_to_all(_pack(rows), route.received, route.sent, ranks), rows)
            returned += [sum_copies(grad, route, load.row_count) for grad in copies]
        return tuple(returned)

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return None, None, *_Exchange.apply(ctx.ranks, ctx.loads, *tangents)  # type: ignore[no-untyped-call]


class _Gather(torch.autograd.Function):
    """Gathers the rows of all ranks, sizes[r] of rank r."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, sizes: Sequence[int], *tensors: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        ctx.ranks, ctx.sizes = ranks, sizes
        padded = all_gather(_padded(_pack(tensors), max(sizes)), ranks)
        by_rank = padded.split_with_sizes([max(sizes)] * ranks.world_size)
        gathered = _unpack(torch.cat([rows[:n] for rows, n in zip(by_rank, sizes, strict=True)]), tensors)
        ctx.mark_non_differentiable(*(x for x in gathered if not x.is_floating_point()))
        return tuple(gathered)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        needed = ctx.needs_input_grad[2:]
        returned = _Scatter.apply(ctx.ranks, ctx.sizes, *compress(grads, needed))  # type: ignore[no-untyped-call]
        return None, None, *_at_needed(needed, returned)


class _Scatter(torch.autograd.Function):
    """Sums over the ranks, in fp32 or fp64, the gradients of this rank's rows: the transpose of `_Gather`."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, sizes: Sequence[int], *grads: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        ctx.ranks, ctx.sizes = ranks, sizes
        wide = torch.cat([_flat(grad).to(compute_dtype(*grads)) for grad in grads], dim=1)
        padded = [_padded(rows, max(sizes)) for rows in wide.split_with_sizes(list(sizes))]
        own = reduce_scatter(torch.cat(padded), ranks)[: sizes[ranks.rank]]
        sums = own.split_with_sizes([grad.shape[1:].numel() for grad in grads], dim=1)
        return tuple(x.reshape(-1, *grad.shape[1:]).to(grad.dtype) for x, grad in zip(sums, grads, strict=True))

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return None, None, *_Gather.apply(ctx.ranks, ctx.sizes, *tangents)  # type: ignore[no-untyped-call]


def _split_by_load(values: Sequence[T], loads: list[_Load]) -> list[Sequence[T]]:
    """Splits values, one per tensor, into those of each load."""
    ends = accumulate(load.tensor_count for load in loads)
    return [values[end - load.tensor_count : end] for load, end in zip(loads, ends, strict=True)]


def _at_needed(needed: Sequence[bool], grads: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients of all inputs, given those of the inputs that need one."""
    remaining = iter(grads)
    return [next(remaining) if is_needed else None for is_needed in needed]


def _pack(tensors: Sequence[Tensor]) -> Tensor:
    """Bytes of the rows of several tensors side by side, uint8 [N, bytes]."""
    # As a vector first: an empty tensor, or one with a dimension of size 1, can be contiguous with any strides.
    vectors = [x.detach().contiguous().as_strided((x.numel(),), (1,)).view(torch.uint8) for x in tensors]
    rows = [vector.view(len(x), _row_bytes(x)) for vector, x in zip(vectors, tensors, strict=True)]
    return torch.cat(rows, dim=1)


def _unpack(packed: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Tensors with the dtypes and row shapes of `like`, from the bytes of their rows."""
    parts = packed.split_with_sizes([_row_bytes(x) for x in like], dim=1)
    # Always a copy: the part of a single row is contiguous as it is, but may begin at an address that is not aligned.
    vectors = [part.clone(memory_format=torch.contiguous_format).view(-1) for part in parts]
    return [vector.view(x.dtype).view(len(packed), *x.shape[1:]) for vector, x in zip(vectors, like, strict=True)]


def _row_bytes(x: Tensor) -> int:
    return x.shape[1:].numel() * x.element_size()


def _flat(x: Tensor) -> Tensor:
    return x.reshape(len(x), x.shape[1:].numel())


def _padded(rows: Tensor, size: int) -> Tensor:
    return torch.cat((rows, rows.new_zeros(size - len(rows), *rows.shape[1:])))


def _all_to_all(rows: Tensor, sent: list[int], received: list[int], ranks: Ranks) -> Tensor:
    arrived = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(arrived, rows, received, sent, group=ranks.group)
    return arrived
