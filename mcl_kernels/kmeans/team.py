"""The processes that cluster a data set together: this process alone, or the ranks of a process group.

Each process reads its own rows. One all-reduce per pass adds up the results, so that all processes continue with the
same values. Except for the objective, whose rounding depends on the order, they have the bits of one process.

A process that cannot read its rows keeps the error until the next reduction, where every process raises it. Otherwise
the other processes would wait for this one forever.
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


class Team:
    """This process alone. A subclass for several processes overrides all methods but `decide`.

    All processes call each method together, except `keeping_errors`.
    """

    rank, size = 0, 1

    def total(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Returns the sum over the processes of each tensor, in its dtype and on its device."""
        return parts

    def broadcast(self, x: Tensor) -> Tensor:
        """Returns the tensor of the first process."""
        return x

    def decide(self, decision: bool) -> bool:
        """Returns the decision of the first process, since on other machines rounding may lead to another one."""
        return bool(self.broadcast(torch.tensor([int(decision)], device="cpu")))

    def compute_on_first(self, compute: Callable[[], Tensor], like: Tensor) -> Tensor:
        """Returns the rows that the first process computes, of the width, dtype and device of `like`."""
        return compute()

    def join(self, rows: Tensor, is_own: Tensor) -> Tensor:
        """Returns all rows on every process, from the rows that each process has.

        Args:
            rows: rows of this process, [own rows, D], in the order of `is_own`; ignored after an error.
            is_own: bool [N], true for the rows of this process; each row is of exactly one process.
        """
        return rows

    @contextmanager
    def keeping_errors(self) -> Iterator[None]:
        """Context for reading rows: an error of one process is raised on every process by the next reduction."""
        yield


class GroupTeam(Team):
    """The ranks of a process group, whose rows are on `device`."""

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        self.ranks = ranks
        self.rank, self.size = ranks.rank, ranks.world_size
        self.collective_device = collective_device(ranks) if device.type == "cpu" else device
        self.error: Exception | None = None

    def total(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Adds up in fp64, in one all-reduce that also counts the processes with an error."""
        failed = torch.tensor(self.error is not None, device="cpu")
        packed = torch.cat([x.to(self.collective_device, torch.float64).flatten() for x in (*parts, failed)])
        dist.all_reduce(packed, group=self.ranks.group)
        *totals, n_failed = packed.split_with_sizes([x.numel() for x in (*parts, failed)])
        if int(n_failed):
            self._raise()
        return tuple(total.view(x.shape).to(x.device, x.dtype) for total, x in zip(totals, parts, strict=True))

    def broadcast(self, x: Tensor) -> Tensor:
        on_device = x.to(self.collective_device).contiguous()
        dist.broadcast(on_device, dist.get_global_rank(self.ranks.group, 0), group=self.ranks.group)
        return on_device.to(x.device)

    def compute_on_first(self, compute: Callable[[], Tensor], like: Tensor) -> Tensor:
        rows = run_on_first(compute, self.ranks, self.collective_device)
        n = int(self.broadcast(torch.tensor([0 if rows is None else len(rows)], device="cpu")))
        return self.broadcast(like.new_empty(n, like.shape[1]) if rows is None else rows)

    def join(self, rows: Tensor, is_own: Tensor) -> Tensor:
        row_bytes = rows.shape[1] * rows.dtype.itemsize
        packed = torch.zeros(len(is_own) * row_bytes + 1, dtype=torch.uint8, device=rows.device)
        if self.error is None:
            packed[:-1].view(len(is_own), row_bytes)[is_own.to(rows.device)] = rows.contiguous().view(torch.uint8)
        packed[-1] = self.error is not None
        # Only the owner of a row has bytes other than 0 for it, so that the maximum is the row, bit for bit.
        packed = packed.to(self.collective_device)
        dist.all_reduce(packed, dist.ReduceOp.MAX, group=self.ranks.group)
        packed = packed.to(rows.device)
        if int(packed[-1]):
            self._raise()
        return packed[:-1].view(rows.dtype).view(len(is_own), rows.shape[1])

    @contextmanager
    def keeping_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.error = error

    def _raise(self) -> None:
        check_none_failed(self.ranks, self.collective_device, self.error)


def open_with_group(
    open_rows: Callable[[], Rows], ranks: Ranks, arguments: Mapping[str, object]
) -> tuple[Rows, GroupTeam]:
    """Opens the rows of this rank. Every rank raises if one cannot open its rows, or if the arguments differ."""
    device = collective_device(ranks)
    rows = run_on_each(open_rows, ranks, device)
    check_same_on_all_ranks(
        ranks, device, {**arguments, rows.name: rows.like, f"device of {rows.name}": rows.device.type}
    )
    return rows, GroupTeam(ranks, rows.device)
