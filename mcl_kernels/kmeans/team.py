"""Rows that are spread over the ranks of a process group: a shard on each, in the order of the ranks the data set.

A pass reads the shard of this rank, and one all-reduce adds up what it found, so that every rank goes on with the same
numbers. They are exact, but for the objective, so the bits of one process. A rank that cannot read its rows says so
there, instead of leaving the others waiting: then all raise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from mcl_kernels.distributed.group import (
    Ranks,
    check_none_failed,
    check_same_on_all_ranks,
    collective_device,
    run_on_each,
    run_on_first,
)
from mcl_kernels.kmeans.rows import Rows
from mcl_kernels.normalize import compute_dtype


def open_shard(open_rows: Callable[[], Rows], ranks: Ranks, arguments: Mapping[str, object]) -> ShardedRows:
    """The rows that this rank opens, of all ranks' data. Where one cannot, or where they differ, every rank raises."""
    device = collective_device(ranks)
    rows = run_on_each(open_rows, ranks, device)
    check_same_on_all_ranks(
        ranks, device, {**arguments, rows.name: rows.like, f"device of {rows.name}": rows.device.type}
    )
    return ShardedRows(rows, ranks)


class ShardedRows(Rows):
    """`local` on this rank. Where all ranks have to call a method together, it says so."""

    def __init__(self, local: Rows, ranks: Ranks) -> None:
        super().__init__(local.name, local.like)
        self.local, self.ranks = local, ranks
        self.shard, self.shards = ranks.rank, ranks.world_size
        self.meeting = collective_device(ranks) if self.device.type == "cpu" else self.device
        self.error: Exception | None = None

    @property
    def held(self) -> range:
        self.survey()
        return self._held

    def chunks(self) -> Iterator[Tensor]:
        """Those of the shard that can be read; `total` raises if not all could be."""
        with self._noting_errors():
            for chunk in self.local.chunks():
                if len(chunk):
                    yield chunk

    def take(self, index: Tensor) -> Tensor:
        """The rows at ascending positions of the data set. Together: each comes from the rank that has it."""
        row_bytes = self.width * self.dtype.itemsize
        held = self.take_held(index).contiguous().view(torch.uint8)
        taken = torch.zeros(len(index) * row_bytes + 1, dtype=torch.uint8, device=self.device)
        rows = taken[:-1].view(len(index), row_bytes)
        if self.error is None:
            rows[self._is_held(index).to(self.device)] = held
        taken[-1] = self.error is not None
        # Of each byte there is one that may not be 0, so that the largest is the row, bit for bit.
        taken = taken.to(self.meeting)
        dist.all_reduce(taken, dist.ReduceOp.MAX, group=self.ranks.group)
        taken = taken.to(self.device)
        if int(taken[-1]):
            self._raise()
        return taken[:-1].view(self.dtype).view(len(index), self.width)

    def take_held(self, index: Tensor) -> Tensor:
        with self._noting_errors():
            return self.local.take(index[self._is_held(index)] - self.held.start)
        return self.like

    def load(self) -> Tensor:
        """All rows of all ranks, on each of them. Together."""
        return self.take(torch.arange(self.count(), device="cpu"))

    def batches(self, size: int, rows: int, generator: torch.Generator) -> Iterator[Tensor]:
        """The part of each batch that this rank has. Together: all draw with the generator of the first rank."""
        generator.set_state(self._of_first(generator.get_state()).cpu())
        yield from super().batches(size, rows, generator)

    def total(self, objective: float, *of_held: Tensor) -> tuple[float, tuple[Tensor, ...]]:
        """Together: in one all-reduce, as fp64."""
        numbers = torch.tensor([objective, self.error is not None], dtype=torch.float64, device="cpu")
        packed = torch.cat([x.to(self.meeting, torch.float64).flatten() for x in (*of_held, numbers)])
        dist.all_reduce(packed, group=self.ranks.group)
        *totals, numbers = packed.to(self.device).split_with_sizes([x.numel() for x in (*of_held, numbers)])
        objective, failed = numbers.tolist()
        if failed:
            self._raise()
        return objective, tuple(total.view(x.shape).to(x.dtype) for total, x in zip(totals, of_held, strict=True))

    def from_first(self, compute: Callable[[], Tensor]) -> Tensor:
        """Together; the other ranks wait."""
        rows = run_on_first(compute, self.ranks, self.meeting)
        n = int(self._of_first(torch.tensor([0 if rows is None else len(rows)], device=self.meeting)))
        if rows is None:
            rows = torch.empty(n, self.width, dtype=compute_dtype(self.like), device=self.device)
        return self._of_first(rows).to(self.device)

    def decide(self, decision: bool) -> bool:
        """Together: one number is broadcast."""
        return bool(self._of_first(torch.tensor([int(decision)], device=self.meeting)))

    def _survey(self) -> tuple[int, Tensor, Tensor]:
        sizes = torch.zeros(self.shards, dtype=torch.int64, device="cpu")
        bounds = torch.zeros(self.shards, 2, self.width, dtype=self.dtype, device=self.device)
        with self._noting_errors():
            n, *local_bounds = self.local.survey()
            sizes[self.shard], bounds[self.shard] = n, torch.stack(local_bounds)
        _, (sizes, bounds) = self.total(0.0, sizes, bounds)
        ends = sizes.cumsum(0).tolist()
        self._held = range(ends[self.shard] - int(sizes[self.shard]), ends[self.shard])
        return ends[-1], bounds[:, 0].amin(0), bounds[:, 1].amax(0)

    def _is_held(self, index: Tensor) -> Tensor:
        return (index >= self.held.start) & (index < self.held.stop)

    def _of_first(self, x: Tensor) -> Tensor:
        x = x.to(self.meeting).contiguous()
        dist.broadcast(x, dist.get_global_rank(self.ranks.group, 0), group=self.ranks.group)
        return x

    @contextmanager
    def _noting_errors(self) -> Iterator[None]:
        """Keeps an error until the next time that the ranks meet."""
        try:
            yield
        except Exception as error:
            self.error = error

    def _raise(self) -> None:
        check_none_failed(self.ranks, self.meeting, self.error)
