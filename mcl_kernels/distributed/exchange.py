"""Rows of a batch that is spread over ranks, brought to where they are compared, and their gradients brought back.

Every rank holds a shard. By "gather" all keys come to every rank, which compares its own anchors with them. By
"cluster" the rows of a cluster come to the ranks that compute it (`plan`), in one all-to-all, and their
gradients go back in another. A row travels as bytes, with its label and its id: nothing is rounded, and no rank has to
be told whose row it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mcl_kernels.distributed.cost_model import block_of, bucket_count, buckets_of, plan_exchange
from mcl_kernels.distributed.group import Ranks, all_gather, reduce_scatter
from mcl_kernels.logsumexp.pairs import Pairs
from mcl_kernels.normalize import compute_dtype

T = TypeVar("T")


class Side(NamedTuple):
    """Rows that travel together: anchors, keys, or samples that are both."""

    columns: tuple[Tensor, ...]  # [N, D] or [N] each, floating point
    labels: Tensor | None  # int64 [N]
    ids: Tensor | None  # int64 [N]

    def tensors(self) -> list[Tensor]:
        return [*self.columns, *(x for x in (self.labels, self.ids) if x is not None)]

    def like(self, tensors: Sequence[Tensor]) -> Side:
        """Other rows: `tensors` in the order of `tensors()`."""
        rest = iter(tensors)
        columns = tuple(next(rest) for _ in self.columns)
        labels, ids = (None if x is None else next(rest) for x in (self.labels, self.ids))
        return Side(columns, labels, ids)

    def pairs(self, negatives: str) -> Pairs:
        """Of samples that are compared with each other."""
        return Pairs(self.labels, self.labels, self.ids, self.ids, negatives)

    def take(self, index: Tensor) -> Side:
        return self.like([x.index_select(0, index) for x in self.tensors()])


class Blocks(NamedTuple):
    """Anchors and the keys that they are compared with."""

    anchors: Side
    keys: Side

    def pairs(self, negatives: str) -> Pairs:
        return Pairs(self.anchors.labels, self.keys.labels, self.anchors.ids, self.keys.ids, negatives)


class Share(NamedTuple):
    """What this rank computes of a batch of samples that are anchors and keys at once."""

    whole: Side | None  # samples of clusters that are here alone, compared with each other
    blocks: Blocks | None  # of all other clusters
    total: int  # samples of all ranks


def share_samples(samples: Side, loss: str, exchange: str, ranks: Ranks) -> Share:
    """Sends the samples of this rank to where they are compared, and receives what this rank compares."""
    owners = _Owners.of(samples, None, loss, exchange, ranks)
    if owners is None:
        keys, total = _gathered_keys(samples, samples, ranks)
        return Share(None, Blocks(samples, keys), total)
    bucket = _bucket(samples, ranks)
    home = owners.home(bucket)
    whole = (owners.blocks[bucket] <= 1).nonzero().squeeze(1)
    index, to = owners.copies(bucket, at_least=2)
    # A rank's anchors before its other keys, so that their number says which they are.
    is_anchor = to == home[index]
    order = torch.cat((is_anchor.nonzero(), (~is_anchor).nonzero())).squeeze(1)
    anchors = _per_rank(to[is_anchor], ranks)
    moves, received = _moves([(whole, home[whole]), (index[order], to[order])], [anchors], ranks)
    if not owners.any_cut:
        return Share(_exchange([(moves[0], samples)], ranks)[0], None, owners.total)
    together, keys = _exchange([(move, samples) for move in moves], ranks)
    begins = [0, *accumulate(moves[1].received)]
    here = [torch.arange(begin, begin + n, device="cpu") for begin, n in zip(begins, received[0], strict=False)]
    anchors_here = keys.take(torch.cat(here).to(home.device))
    return Share(together, Blocks(anchors_here, keys), owners.total)


def share_queries(queries: Side, keys: Side, exchange: str, ranks: Ranks) -> tuple[Blocks, int]:
    """The same of queries and keys; returned with the number of queries of all ranks."""
    owners = _Owners.of(queries, keys, "masked_info_nce", exchange, ranks)
    if owners is None:
        gathered, total = _gathered_keys(queries, keys, ranks)
        return Blocks(queries, gathered), total
    home = owners.home(_bucket(queries, ranks))
    routes = [(torch.arange(len(home), device=home.device), home), owners.copies(_bucket(keys, ranks), at_least=1)]
    moves, _ = _moves(routes, [], ranks)
    anchors, everything = _exchange(list(zip(moves, (queries, keys), strict=True)), ranks)
    return Blocks(anchors, everything), owners.total


def gather_rows(side: Side, sizes: Sequence[int], ranks: Ranks) -> Side:
    """The rows of all ranks, `sizes` of them, in the order of the ranks."""
    return side.like(_Gather.apply(ranks, sizes, *side.tensors()))  # type: ignore[no-untyped-call]


def gather_vectors(vectors: Sequence[Tensor], ranks: Ranks) -> tuple[list[Tensor], slice]:
    """Those of all ranks one after the other, and where in them those of this rank are."""
    sizes = [n for (n,) in all_sizes([len(vectors[0])], ranks, vectors[0].device)]
    begin = sum(sizes[: ranks.rank])
    gathered = gather_rows(Side(tuple(vectors), None, None), sizes, ranks)
    return list(gathered.columns), slice(begin, begin + len(vectors[0]))


def all_sizes(values: Sequence[int], ranks: Ranks, device: torch.device) -> list[list[int]]:
    """What each rank gives, [W, values]."""
    sizes: list[list[int]] = all_gather(torch.tensor([values], device=device), ranks).tolist()
    return sizes


def _gathered_keys(anchors: Side, keys: Side, ranks: Ranks) -> tuple[Side, int]:
    sizes = all_sizes([len(anchors.columns[0]), len(keys.columns[0])], ranks, keys.columns[0].device)
    return gather_rows(keys, [m for _, m in sizes], ranks), sum(n for n, _ in sizes)


class _Owners(NamedTuple):
    """The ranks that compute each bucket of labels."""

    blocks: Tensor  # int64 [K + 1], how many; the last entry is that of rows that match nothing
    begin: Tensor  # int64 [K + 1], of the ranks of a bucket in
    flat: Tensor  # int64
    any_cut: bool
    total: int  # anchors of all ranks
    ranks: Ranks

    @classmethod
    def of(cls, anchors: Side, keys: Side | None, loss: str, exchange: str, ranks: Ranks) -> _Owners | None:
        """None where the keys are gathered."""
        if exchange == "gather" or (exchange == "auto" and anchors.labels is None):
            return None
        sides = [anchors] if keys is None else [anchors, keys]
        buckets = bucket_count(ranks.world_size)
        counts = torch.stack([_bucket(side, ranks).add(1).bincount(minlength=buckets + 1) for side in sides])
        dist.all_reduce(counts, group=ranks.group)
        histogram = counts.cpu()
        features, dtype = anchors.columns[0].shape[1], anchors.columns[0].dtype
        plan = plan_exchange(
            histogram[0, 1:], ranks.world_size, key_histogram=None if keys is None else histogram[1, 1:], loss=loss,
            features=features, dtype=dtype, exchange=exchange,
        )  # fmt: skip
        if plan.exchange == "gather":
            return None
        blocks = torch.tensor([*map(len, plan.owners), 0], device="cpu")
        flat = torch.tensor(list(chain.from_iterable(plan.owners)), dtype=torch.int64, device="cpu")
        any_cut, total = bool(blocks.max() > 1), int(histogram[0].sum())
        tensors = [x.to(counts.device) for x in (blocks, blocks.cumsum(0) - blocks, flat)]
        return cls(tensors[0], tensors[1], tensors[2], any_cut, total, ranks)

    def home(self, bucket: Tensor) -> Tensor:
        """The rank that compares each row, [N]: of the owners of its bucket in turns; where there is none, this one."""
        order = bucket.argsort(stable=True)
        in_order = bucket[order]
        position = torch.empty_like(order)
        position[order] = torch.arange(len(order), device=order.device) - torch.searchsorted(in_order, in_order)
        blocks = self.blocks[bucket]
        owner = self.begin[bucket] + block_of(position, self.ranks.rank, blocks.clamp(min=1))
        home = torch.full_like(bucket, self.ranks.rank)
        owned = blocks > 0
        home[owned] = self.flat[owner[owned]]
        return home

    def copies(self, bucket: Tensor, *, at_least: int) -> tuple[Tensor, Tensor]:
        """Which rows go to which ranks, so that every owner of a bucket has all of it; of buckets of so many owners."""
        blocks = self.blocks[bucket]
        blocks = torch.where(blocks >= at_least, blocks, 0)
        index = torch.repeat_interleave(blocks)
        turn = torch.arange(len(index), device=index.device) - (blocks.cumsum(0) - blocks)[index]
        return index, self.flat[self.begin[bucket][index] + turn]


def _bucket(side: Side, ranks: Ranks) -> Tensor:
    """Of each row, [N]; -1 for one that matches nothing."""
    if side.labels is None:
        return torch.zeros(len(side.columns[0]), dtype=torch.int64, device=side.columns[0].device)
    return buckets_of(side.labels, ranks.world_size)


class _Move(NamedTuple):
    """Rows on their way from every rank to every rank."""

    order: Tensor  # int64, the rows as they are sent: by rank; some of them to several
    sent: list[int]  # how many to each rank
    received: list[int]


def _moves(
    routes: list[tuple[Tensor, Tensor]], counts: list[Tensor], ranks: Ranks
) -> tuple[list[_Move], list[list[int]]]:
    """Of rows and the ranks that they go to; further counts for each rank, [W], are exchanged on the way."""
    sent = torch.stack([*(_per_rank(to, ranks) for _, to in routes), *counts], dim=1)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=ranks.group)
    arriving: list[list[int]] = received.T.tolist()
    moves = [
        _Move(index[to.argsort(stable=True)], leaving, arrive)
        for (index, to), leaving, arrive in zip(routes, sent.T.tolist(), arriving, strict=False)
    ]
    return moves, arriving[len(routes) :]


def _per_rank(to: Tensor, ranks: Ranks) -> Tensor:
    return torch.bincount(to, minlength=ranks.world_size)


def _exchange(moves: list[tuple[_Move, Side]], ranks: Ranks) -> list[Side]:
    """What arrives of each move. One step of autograd, so that all ranks communicate in one order in backward too."""
    tensors = [side.tensors() for _, side in moves]
    arrived = iter(_Exchange.apply(ranks, [move for move, _ in moves], [len(x) for x in tensors], *chain(*tensors)))  # type: ignore[no-untyped-call]
    return [side.like([next(arrived) for _ in side.tensors()]) for _, side in moves]


class _Exchange(torch.autograd.Function):
    """Rows to other ranks, some tensors for each move."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, moves: list[_Move], parts: list[int], *tensors: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        ctx.ranks, ctx.moves, ctx.parts = ranks, moves, parts
        ctx.rows, arrived = [], []
        for move, here in zip(moves, _in_parts(tensors, parts), strict=True):
            ctx.rows.append(len(here[0]))
            packed = _as_bytes(here).index_select(0, move.order)
            arrived += _from_bytes(_all_to_all(packed, move.sent, move.received, ranks), here)
        ctx.mark_non_differentiable(*(x for x in arrived if not x.is_floating_point()))
        return tuple(arrived)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        wanted = ctx.needs_input_grad[3:]
        numbers = [sum(of_move) for of_move in _in_parts(wanted, ctx.parts)]
        moved = [(move, n, rows) for move, n, rows in zip(ctx.moves, numbers, ctx.rows, strict=True) if n]
        moves, parts, rows = (list(column) for column in zip(*moved, strict=True))
        returned = iter(_Return.apply(ctx.ranks, moves, parts, rows, *_where(wanted, grads)))  # type: ignore[no-untyped-call]
        return None, None, None, *(next(returned) if is_wanted else None for is_wanted in wanted)


class _Return(torch.autograd.Function):
    """The transpose: rows back to where they came from, those of the copies of a row summed."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, ranks: Ranks, moves: list[_Move], parts: list[int], rows: list[int], *grads: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.ranks, ctx.moves, ctx.parts = ranks, moves, parts
        returned: list[Tensor] = []
        for move, n, here in zip(moves, rows, _in_parts(grads, parts), strict=True):
            back = _from_bytes(_all_to_all(_as_bytes(here), move.received, move.sent, ranks), here)
            returned += [_sum_of_copies(grad, move, n) for grad in back]
        return tuple(returned)

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return None, None, None, None, *_Exchange.apply(ctx.ranks, ctx.moves, ctx.parts, *tangents)  # type: ignore[no-untyped-call]


class _Gather(torch.autograd.Function):
    """The rows of all ranks, `sizes` of them."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, sizes: Sequence[int], *tensors: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        ctx.ranks, ctx.sizes = ranks, sizes
        padded = all_gather(_padded(_as_bytes(tensors), max(sizes)), ranks)
        by_rank = padded.split_with_sizes([max(sizes)] * ranks.world_size)
        gathered = _from_bytes(torch.cat([rows[:n] for rows, n in zip(by_rank, sizes, strict=True)]), tensors)
        ctx.mark_non_differentiable(*(x for x in gathered if not x.is_floating_point()))
        return tuple(gathered)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        wanted = ctx.needs_input_grad[2:]
        returned = iter(_Scatter.apply(ctx.ranks, ctx.sizes, *_where(wanted, grads)))  # type: ignore[no-untyped-call]
        return None, None, *(next(returned) if is_wanted else None for is_wanted in wanted)


class _Scatter(torch.autograd.Function):
    """The transpose: for each row of this rank the sum of what all ranks have for it, in fp32 or fp64."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, sizes: Sequence[int], *grads: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        ctx.ranks, ctx.sizes = ranks, sizes
        wide = torch.cat([_flat(grad).to(compute_dtype(*grads)) for grad in grads], dim=1)
        padded = [_padded(rows, max(sizes)) for rows in wide.split_with_sizes(list(sizes))]
        own = reduce_scatter(torch.cat(padded), ranks)[: sizes[ranks.rank]]
        parts = own.split_with_sizes([grad.shape[1:].numel() for grad in grads], dim=1)
        return tuple(part.reshape(-1, *x.shape[1:]).to(x.dtype) for part, x in zip(parts, grads, strict=True))

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return None, None, *_Gather.apply(ctx.ranks, ctx.sizes, *tangents)  # type: ignore[no-untyped-call]


def _in_parts(values: Sequence[T], parts: list[int]) -> list[Sequence[T]]:
    ends = list(accumulate(parts))
    return [values[end - part : end] for part, end in zip(parts, ends, strict=True)]


def _where(wanted: Sequence[bool], values: Sequence[T]) -> list[T]:
    return [value for is_wanted, value in zip(wanted, values, strict=True) if is_wanted]


def _sum_of_copies(grad: Tensor, move: _Move, rows: int) -> Tensor:
    """For each row the sum over the ranks that it was sent to, in their order."""
    total = grad.new_zeros(rows, *grad.shape[1:], dtype=compute_dtype(grad))
    for index, part in zip(move.order.split_with_sizes(move.sent), grad.split_with_sizes(move.sent), strict=True):
        if len(index):
            total[index] += part  # a row goes to a rank once at most
    return total.to(grad.dtype)


def _as_bytes(tensors: Sequence[Tensor]) -> Tensor:
    """Rows of several tensors side by side, uint8 [N, bytes]."""
    # As a vector first: what is empty, or has a dimension of size 1, may be contiguous with any strides.
    columns = [x.detach().contiguous().as_strided((x.numel(),), (1,)).view(torch.uint8) for x in tensors]
    return torch.cat([x.view(len(like), _row_bytes(like)) for x, like in zip(columns, tensors, strict=True)], dim=1)


def _from_bytes(packed: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    parts = packed.split_with_sizes([_row_bytes(x) for x in like], dim=1)
    # A copy in any case: a part of a single row is contiguous where it stands, at bytes that no number may begin at.
    copies = [part.clone(memory_format=torch.contiguous_format).view(-1) for part in parts]
    return [part.view(x.dtype).view(len(packed), *x.shape[1:]) for part, x in zip(copies, like, strict=True)]


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
