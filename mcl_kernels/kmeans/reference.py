"""One pass over the data, tile by tile in plain PyTorch: the nearest centre of each row, sums, counts.

    euclidean   label_i = argmin_k |x_i - c_k|^2,   distance_i = |x_i - c_label|^2
    cosine      label_i = argmax_k <x_i, c_k>,      distance_i = |x_i - c_label|^2 / 2, x_i divided by its norm

Ties go to the lowest index. Every product has the same shape (the last tile is padded), so that a row gets the same
label whatever the rows around it. The label is the argmin of |c|^2 / 2 - <x, c> relative to the offset. Where rounding
could decide, it is the argmin of distances computed from differences.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mcl_kernels.kmeans.centers import Centers, multiply, score_bound, settle, undecided_rows, unit_rows

TILE = 1024


def assign(x: Tensor, centers: Centers) -> tuple[Tensor, Tensor]:
    """Finds the nearest centre of each row, int64 [N], and the distance to it, [N] in the dtype of the centres."""
    labels = torch.empty(len(x), dtype=torch.int64, device=x.device)
    distances = centers.points.new_empty(len(x))
    undecided = torch.empty(len(x), dtype=torch.bool, device=x.device)
    for start in range(0, len(x), TILE):
        rows = slice(start, min(start + TILE, len(x)))
        labels[rows], distances[rows], undecided[rows] = _assign_tile(x[rows].to(centers.points.dtype), centers)
    settle(x, centers, labels, distances, undecided)
    return labels, distances


def assign_and_sum(x: Tensor, centers: Centers) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`assign`, and the sum of each centre's rows relative to the offset, and their count."""
    labels, distances = assign(x, centers)
    sums, counts = centers.sum_rows(x, labels)
    return labels, distances, sums[0], counts


def _assign_tile(tile: Tensor, centers: Centers) -> tuple[Tensor, Tensor, Tensor]:
    """Labels, distances, and a mask of the undecided rows, to which rounding could give another label."""
    rows = unit_rows(tile) if centers.cosine else tile - centers.offset
    points = centers.points - centers.offset
    half_norms = points.square().sum(1) / 2
    scores = -_fixed_shape_product(rows, points)
    if not centers.cosine:
        scores += half_norms
    lowest, labels = scores.min(1)
    second = scores.scatter_(1, labels.unsqueeze(1), torch.inf).amin(1)
    squares, largest = rows.square().sum(1), (2 * half_norms.max()).sqrt()
    bound = largest * squares.sqrt() if centers.cosine else score_bound(squares, second, largest)
    undecided = undecided_rows(second - lowest, bound, tile.shape[1])
    if centers.cosine:  # `settle` sets the distance of a row without a direction
        return labels, (rows - points[labels]).square().sum(1) / 2, undecided | (squares == 0)
    return labels, (tile - centers.points[labels]).square().sum(1), undecided


def _fixed_shape_product(tile: Tensor, centers: Tensor) -> Tensor:
    """Computes tile @ centers.T with the tile padded to TILE rows, so that a row is rounded the same in any tile."""
    return multiply(F.pad(tile, (0, 0, 0, TILE - len(tile))), centers)[: len(tile)]
