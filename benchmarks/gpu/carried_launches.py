"""Launches of `benchmarks.gpu.measure`, made with CPU tensors under `stand_in.fill_cache`: by function and index."""

from __future__ import annotations

from unittest.mock import patch

import torch

from benchmarks.gpu.checks import result_and_gradients, smoke_cases
from benchmarks.gpu.times import ALTERNATIVES, TILED, alternatives, kmeans_fit, tiles_of
from benchmarks.gpu.workloads import DTYPES, WORKLOADS, Workload

CPU = torch.device("cpu")
KMEANS = [(width, dtype, clusters) for width in (128, 512) for dtype in DTYPES for clusters in (10, 1000)]


def counts() -> dict[str, int]:
    """Returns the number of indices of each function."""
    return {
        "workloads": len(WORKLOADS) * len(DTYPES), "smoke": len(smoke_cases()), "tiles": len(_tile_changes()),
        "kmeans": len(KMEANS),
    }  # fmt: skip


def workloads(index: int) -> None:
    workload, dtype = WORKLOADS[index // len(DTYPES)], list(DTYPES)[index % len(DTYPES)]
    _step(workload, dtype)


def smoke(index: int) -> None:
    result_and_gradients(smoke_cases()[index], "triton", CPU)


def tiles(index: int) -> None:
    workload, kernel, change = _tile_changes()[index]
    _, table = list(alternatives(kernel, "bf16", 90))[change]
    with tiles_of(table):
        _step(workload, "bf16")


def _tile_changes() -> list[tuple[Workload, str, int]]:
    changes = [(kernel, index) for kernel in ALTERNATIVES for index, _ in enumerate(alternatives(kernel, "bf16", 90))]
    return [(workload, *change) for workload in TILED for change in changes]


def kmeans(index: int) -> None:
    width, dtype, clusters = KMEANS[index]
    x = torch.randn(4096, width).to(DTYPES[dtype])
    with patch("torch.empty", torch.zeros):  # labels that no kernel has written are still those of a centre
        kmeans_fit(x, x[:clusters].float(), 1)


def _step(workload: Workload, dtype: str) -> None:
    workload.step(workload.batch(DTYPES[dtype], CPU), "ours")()
