"""Fits of k-means on the ranks of a process group, compared with a fit of one process."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mcl_kernels import KMeans
from mcl_kernels.kmeans import initial, rows
from tests import conftest  # noqa: F401  # registers the emulated CUDA kernels in the processes of the pool
from tests.process_pool import RankPool

N, D, K = 1200, 12, 7

# Boundaries of the shards of 60 rows: even, uneven, with empty shards.
ENDS = {
    2: {"even": [0, 30, 60], "uneven": [0, 47, 60], "empty": [0, 0, 60]},
    4: {"even": [0, 15, 30, 45, 60], "uneven": [0, 7, 40, 41, 60], "empty": [0, 0, 53, 53, 60]},
}


def rows_without_structure(n: int = N) -> Tensor:
    """Rows that need many iterations, so that a difference in rounding changes the result."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, D, generator=generator) + 0.3 * (torch.arange(n) % K).unsqueeze(1)


def grid_rows(n: int = N) -> Tensor:
    """Rows on a coarse grid: many equal ones, and many as far away as others."""
    return torch.randint(-3, 4, (n, 2), generator=torch.Generator().manual_seed(0)).float()


def far_centers(x: Tensor) -> Any:
    """Centres of which all but two have no rows; an array, since a pipe would move the memory of a tensor."""
    return torch.cat((x[:2], x[:5] + 1000.0)).numpy()


class Fitted(NamedTuple):
    """Results of a fit on one rank, as a pipe can carry them."""

    centers: Any
    labels: Any
    inertia: float
    n_iter: int
    init_rows: int
    splits: list[int]
    shifts: list[float]
    objectives: list[float]
    warnings: list[str]


def fit(kmeans: KMeans, x: Any, sample_weight: Any = None) -> Fitted:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kmeans.fit(x, sample_weight=sample_weight)
    history = {key: [step[key] for step in kmeans.history_] for key in ("splits", "shift", "objective")}
    return Fitted(
        kmeans.cluster_centers_.numpy(), kmeans.labels_.numpy(), kmeans.inertia_, kmeans.n_iter_, kmeans.init_rows_,
        history["splits"], history["shift"], history["objective"], [str(each.message) for each in caught],
    )  # fmt: skip


@contextmanager
def small_sizes() -> Iterator[None]:
    """Sets small sizes of chunks and of the sample for k-means++, so that a small shard has several chunks."""
    with (
        mock.patch.object(rows, "CHUNK_BYTES", 100 * D * 4),
        mock.patch.object(rows, "CHUNK_MULTIPLE", 10),
        mock.patch.object(initial, "SAMPLE_ROWS", 1000),
    ):
        yield


def as_form(x: Tensor, form: str, path: str) -> Any:
    """Returns a shard in the form of an argument of `fit`; an empty one cannot be an iterable."""
    if form == "file":
        np.save(path, x.numpy())
        return np.load(path, mmap_mode="r") if len(x) else x.numpy()
    if form == "chunks":
        return list(x.split(37)) if len(x) else x
    if form == "array":
        return x.numpy()
    return x.T.contiguous().T if form == "strided" else x


def fit_shard(x: Any, ends: list[int], form: str, path: str, options: dict[str, Any]) -> Fitted:
    x, weights = torch.as_tensor(x).to(options.pop("dtype", torch.float32)), options.pop("sample_weight", None)
    rank = dist.get_rank()
    here = slice(ends[rank], ends[rank + 1])
    weights = None if weights is None else weights[here]
    with small_sizes():
        if form == "part of a file":
            return fit(KMeans(**options, group=dist.group.WORLD), np.load(path, mmap_mode="r")[here], weights)
        shard = as_form(x[here], form, f"{path}.{rank}.npy")
        return fit(KMeans(**options, group=dist.group.WORLD), shard, weights)


def check_is_one_process(
    ranks: RankPool, x: Tensor, ends: list[int], form: str = "tensor", path: str = "", **options: Any
) -> Fitted:
    """Asserts the bits of one process, except for sums of distances, whose order differs. Returns its results."""
    dtype, weights = options.get("dtype", torch.float32), options.get("sample_weight")
    with small_sizes():
        arguments = {k: v for k, v in options.items() if k not in ("dtype", "sample_weight")}
        expected = fit(KMeans(**arguments), x.to(dtype), weights)
    parts = ranks.run(fit_shard, x.numpy(), ends, form, path, options)
    for rank, part in enumerate(parts):
        assert len(part.labels) == ends[rank + 1] - ends[rank]
        assert (part.centers == expected.centers).all()
        assert part.centers.dtype == expected.centers.dtype
        for same in ("n_iter", "init_rows", "splits", "shifts", "warnings"):
            assert getattr(part, same) == getattr(expected, same), same
        assert part.inertia == parts[0].inertia
        assert part.inertia == pytest.approx(expected.inertia, rel=1e-12)
        assert part.objectives == pytest.approx(expected.objectives, rel=1e-12)
    assert (np.concatenate([part.labels for part in parts]) == expected.labels).all()
    return expected


def ends_of(ranks: RankPool, kind: str, n: int = N) -> list[int]:
    return [n * end // 60 for end in ENDS[ranks.world_size][kind]]
