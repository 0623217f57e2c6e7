"""Counter of the bytes that this rank sends to other ranks and receives from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist

from mcl_kernels.distributed.cost_model import all_reduce_bytes

UNCOUNTED = ("all_gather", "broadcast", "gather", "reduce", "reduce_scatter", "scatter", "send", "recv")


class Traffic:
    """Bytes sent and received so far, int64 [2]. An all-reduce counts as one by a ring."""

    def __init__(self) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.bytes = np.zeros(2, dtype=np.int64)

    def add_all_reduce(self, tensor: torch.Tensor, *rest: Any, **options: Any) -> None:
        self.bytes += all_reduce_bytes(tensor.nbytes, self.world_size)

    def add_all_gather(self, output: torch.Tensor, tensor: torch.Tensor, **options: Any) -> None:
        self.bytes += (self.world_size - 1) * tensor.nbytes

    def add_reduce_scatter(self, output: torch.Tensor, tensor: torch.Tensor, **options: Any) -> None:
        self.bytes += (self.world_size - 1) * output.nbytes

    def add_all_to_all(
        self, output: torch.Tensor, tensor: torch.Tensor, received: Any = None, sent: Any = None, **options: Any
    ) -> None:
        for direction, (rows, split) in enumerate(((tensor, sent), (output, received))):
            split = split or [len(rows) // self.world_size] * self.world_size
            if len(rows):
                self.bytes[direction] += rows.nbytes // len(rows) * (sum(split) - split[self.rank])


@contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Counts the collectives that the losses call inside the block; any other collective raises AssertionError."""
    traffic = Traffic()
    counters = {
        "all_reduce": traffic.add_all_reduce,
        "all_to_all_single": traffic.add_all_to_all,
        "all_gather_single": traffic.add_all_gather,
        "all_gather_into_tensor": traffic.add_all_gather,
        "reduce_scatter_single": traffic.add_reduce_scatter,
        "reduce_scatter_tensor": traffic.add_reduce_scatter,
    }

    def counted(name: str) -> Callable[..., Any]:
        collective, count = getattr(dist, name), counters[name]

        def call(*arguments: Any, **options: Any) -> Any:
            count(*arguments, **options)
            return collective(*arguments, **options)

        return call

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("a collective that is not counted")

    patched = {name: counted(name) for name in counters if hasattr(dist, name)} | dict.fromkeys(UNCOUNTED, refuse)
    with patch.multiple(dist, **patched):
        yield traffic
