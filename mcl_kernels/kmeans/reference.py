"""One pass over the data, tile by tile in plain PyTorch: the nearest centre of each row, sums, counts.

    euclidean   label_i = argmin_k |x_i - c_k|^2,   distance_i = |x_i - c_label|^2
    cosine      label_i = argmax_k <x_i, c_k>,      distance_i = 1 - <x_i, c_label>,    x_i and c_k of unit length

Ties go to the lowest index. Every product has the same shape, the last tile being padded, so that a row gets
the same label whatever the rows around it. The argmin is taken of |c|^2 / 2 - <x, c> with the mean of the
centres subtracted from both: an offset of the data costs no digits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from mcl_kernels._rows import normalize_rows

TILE = 1024


def tiles(x: Tensor, dtype: torch.dtype, metric: str) -> Iterator[tuple[slice, Tensor]]:
    """The rows of x, [N, D], in the dtype of the centres, of unit length for the cosine metric."""
    for start in range(0, len(x), TILE):
        rows = slice(start, min(start + TILE, len(x)))
        tile = x[rows].to(dtype)
        yield rows, normalize_rows(tile) if metric == "cosine" else tile


def assign(x: Tensor, centers: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """The nearest centre of each row, int64 [N], and the distance to it, [N] in the dtype of the centres."""
    centers = normalize_rows(centers) if metric == "cosine" else centers
    labels = torch.empty(len(x), dtype=torch.int64, device=x.device)
    distances = centers.new_empty(len(x))
    for rows, tile in tiles(x, centers.dtype, metric):
        labels[rows], distances[rows] = _assign_tile(tile, centers, metric)
    return labels, distances


def assign_and_sum(x: Tensor, centers: Tensor, metric: str, largest: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`assign`, and in the same pass the sum (fp64 [K, D]) and the number (int64 [K]) of each centre's rows.

    These sums need no bound: `largest`, of the entries of x by magnitude, is what others need.
    """
    labels = torch.empty(len(x), dtype=torch.int64, device=x.device)
    distances = centers.new_empty(len(x))
    sums = torch.zeros_like(centers, dtype=torch.float64)
    for rows, tile in tiles(x, centers.dtype, metric):
        labels[rows], distances[rows] = _assign_tile(tile, centers, metric)
        # A product with the one-hot labels: no scattered adds, so one order of summation on every device.
        sums += F.one_hot(labels[rows], len(centers)).double().T @ tile.double()
    return labels, distances, sums, torch.bincount(labels, minlength=len(centers))


def squared_distances(x: Tensor, points: Tensor, metric: str) -> Tensor:
    """|x_i - p_j|^2 of the (unit) rows, [N, P]; exactly 0 between equal rows."""
    out = points.new_empty(len(x), len(points))
    for rows, tile in tiles(x, points.dtype, metric):
        out[rows] = torch.cdist(tile, points, compute_mode="donot_use_mm_for_euclid_dist").square()
    return out


def mean_variance(x: Tensor, metric: str) -> float:
    """The variance of each column, averaged over the columns."""
    total = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
    for _, tile in tiles(x, torch.float64, metric):
        total += tile.sum(0)
    mean = total / len(x)
    squares = torch.zeros_like(total)
    for _, tile in tiles(x, torch.float64, metric):
        squares += (tile - mean).square().sum(0)
    return float(squares.mean()) / len(x)


def _assign_tile(tile: Tensor, centers: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    if metric == "cosine":
        scores = -_fixed_shape_product(tile, centers)
    else:
        offset = centers.mean(0)
        relative = centers - offset
        scores = relative.square().sum(1) / 2 - _fixed_shape_product(tile - offset, relative)
    labels = scores.argmin(1)
    nearest = centers[labels]
    if metric == "cosine":
        return labels, (1.0 - (tile * nearest).sum(1)).clamp(min=0.0)
    return labels, (tile - nearest).square().sum(1)


def _fixed_shape_product(tile: Tensor, centers: Tensor) -> Tensor:
    """tile @ centers.T, computed as if the tile were full: the rounding of a row must not depend on the others."""
    return (F.pad(tile, (0, 0, 0, TILE - len(tile))) @ centers.T)[: len(tile)]
