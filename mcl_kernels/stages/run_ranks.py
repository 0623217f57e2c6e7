"""The processes that share a multistage run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor

from mcl_kernels.distributed.exchange import gather_vectors
from mcl_kernels.distributed.group import (
    check_same_on_all_ranks,
    collective_device,
    ranks_of,
    run_on_each,
    run_on_first,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")


class RunRanks:
    """The ranks of a process group, or this process alone without a group.

    Attributes:
        group: the process group, or None.
        rank, world_size: this process among them; 0 and 1 without a group.
    """

    def __init__(self, group: ProcessGroup | None) -> None:
        self.group = group
        self._ranks = None if group is None else ranks_of(group)
        self.rank = 0 if self._ranks is None else self._ranks.rank
        self.world_size = 1 if self._ranks is None else self._ranks.world_size

    @property
    def is_first(self) -> bool:
        """True on the rank that writes the files."""
        return self.rank == 0

    def part_of(self, n_samples: int) -> range:
        """Returns the samples of this rank: contiguous, and equally many on every rank up to one."""
        return range(n_samples * self.rank // self.world_size, n_samples * (self.rank + 1) // self.world_size)

    def run_on_each(self, work: Callable[[], T]) -> T:
        """Returns the result of `work()` on this rank; an error on one rank is raised on every rank."""
        return work() if self._ranks is None else run_on_each(work, self._ranks, collective_device(self._ranks))

    def run_on_first(self, work: Callable[[], T]) -> T | None:
        """Returns the result of `work()` on the first rank, None on the others; its error is raised on every rank."""
        return work() if self._ranks is None else run_on_first(work, self._ranks, collective_device(self._ranks))

    def check_same(self, arguments: Mapping[str, object]) -> None:
        """Raises a ValueError on every rank if `arguments` differ between the ranks."""
        if self._ranks is not None:
            check_same_on_all_ranks(self._ranks, collective_device(self._ranks), arguments)

    def concatenate(self, clusters: Tensor) -> Tensor:
        """Returns the cluster ids of all ranks, in the order of the ranks, on the CPU."""
        if self._ranks is not None:
            (clusters,), _ = gather_vectors([clusters.int().to(collective_device(self._ranks))], self._ranks)
        return clusters.cpu()
