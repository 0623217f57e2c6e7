"""Nearest centres of rows: `assign_clusters`, and the checks of rows and centres that a fit shares with it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from mcl_kernels._validate import check_choice, check_same_width
from mcl_kernels.backends.table import load, resolve
from mcl_kernels.kmeans.centers import prepare
from mcl_kernels.kmeans.rows import Array, RowsLike, open_rows
from mcl_kernels.normalize import compute_dtype

METRICS = ("euclidean", "cosine")


def assign_clusters(x: RowsLike, centers: Tensor | Array, *, metric: str = "euclidean") -> tuple[Tensor, Tensor]:
    """Finds the nearest centre of each row and the distance to it.

        euclidean   argmin_k |x_i - c_k|^2                         squared Euclidean distance, >= 0
        cosine      argmin_k 1 - <x_i, c_k> / (|x_i| |c_k|)        1 - cosine

    Ties go to the lowest index. A row gets the same label whatever the rows around it.

    Args:
        x: [N, D], anything that `KMeans.fit` takes.
        centers: [K, D] with K >= 1, on the device of x.
        metric: "euclidean" or "cosine".

    Returns:
        labels, int64 [N], and distances, fp32 [N], which may round to 0 or to infinity.

    Raises:
        TypeError, ValueError: as `KMeans`.

    Source: the assignment step of Lloyd 1982.

    Example:
        >>> assign_clusters(torch.tensor([[1.0], [4.0]]), torch.tensor([[0.0], [5.0]]))
        (tensor([0, 1]), tensor([1., 1.]))
    """
    check_choice("metric", metric, METRICS)
    return find_nearest(x, centers, metric, "auto")


def find_nearest(
    x: RowsLike, centers: Tensor | Array, metric: str, impl: str, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Computes `assign_clusters` with a given implementation and products of a given dtype."""
    chunks = [(labels, distances.float()) for labels, distances in nearest_by_chunk(x, centers, metric, impl, dtype)]
    if len(chunks) == 1:  # no copy
        return chunks[0]
    labels, distances = zip(*chunks, strict=True)
    return torch.cat(labels), torch.cat(distances)


def nearest_by_chunk(
    x: RowsLike, centers: Tensor | Array, metric: str, impl: str, dtype: torch.dtype | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields labels and distances of each chunk of rows, the distances in the dtype of products."""
    rows, centers = open_rows("x", x), finite_rows("centers", centers)
    check_same_width("centers", centers, rows.name, rows.like)
    if len(centers) == 0:
        raise ValueError("centers must have at least one row: got 0")
    module, begin = load_implementation(impl, rows.device), 0
    wide = compute_dtype(rows.like, centers)
    with torch.autocast(rows.device.type, enabled=False):
        prepared = prepare(centers.to(wide), metric, dtype=torch.float64 if wide == torch.float64 else dtype)
    for chunk in rows.chunks():
        with torch.autocast(rows.device.type, enabled=False):
            labels, distances = module.assign(chunk, prepared)
        # The distance of a row that is not finite is not finite either: x needs no pass of its own for the check.
        if not math.isfinite(float(distances.sum())):
            rows.refuse_not_finite(chunk, begin)
            check_range(rows.name, chunk)
            check_range("centers", centers)
        yield labels, distances
        begin += len(chunk)


def load_implementation(impl: str, device: torch.device) -> ModuleType:
    """Returns the module that computes passes; raises if `impl` does not run on the device."""
    return load("kmeans", resolve("kmeans", impl, device))


def check_range(name: str, x: Tensor) -> None:
    """Raises if squared distances would overflow fp64. Narrower dtypes are replaced by fp64 before they overflow."""
    width = x.shape[1]
    largest, limit = float(x.abs().max()), math.sqrt(torch.finfo(torch.float64).max / (8 * width))
    if largest > limit:
        raise ValueError(f"{name} must be at most {limit:.3g} by magnitude for {width} features: got {largest:.3g}")


def finite_rows(name: str, x: object) -> Tensor:
    """Returns rows as a tensor without a graph; raises a ValueError that names the first one that is not finite."""
    rows = open_rows(name, x)
    rows.survey()
    return rows.load()
