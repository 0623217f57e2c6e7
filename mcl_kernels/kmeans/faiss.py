"""One pass over the data by a flat index of faiss, on the GPUs that it supports; for comparison with another library.

Results are as accurate as those of the other implementations. faiss computes in fp32, in an order that depends on the
rows of a chunk. If that could decide which of two centres is nearer, distances are computed from differences.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mcl_kernels.kmeans.centers import Centers, score_bound, settle, undecided_rows, unit_rows

SLAB = 1 << 14  # rows copied at a time


def assign(x: Tensor, centers: Centers) -> tuple[Tensor, Tensor]:
    """Finds the nearest centre of each row, int64 [N], and the distance to it, [N] in the dtype of the centres."""
    import faiss

    points, width = centers.points - centers.offset, centers.points.shape[1]
    # faiss computes in fp32: a power of 2 scales the largest element to about 1.
    scale = 2.0 ** -math.frexp(float(points.abs().max()))[1]
    scaled = (points * scale).float().cpu()
    largest = scaled.square().sum(1).max().sqrt()
    index: Any = faiss.IndexFlatIP(width) if centers.cosine else faiss.IndexFlatL2(width)
    if faiss.get_num_gpus():
        index = faiss.index_cpu_to_all_gpus(index)
    index.add(scaled.numpy())
    labels = torch.empty(len(x), dtype=torch.int64, device=x.device)
    distances = points.new_empty(len(x))
    undecided = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for start in range(0, len(x), SLAB):
        rows = slice(start, min(start + SLAB, len(x)))
        raw = x[rows].to(points.dtype)
        relative = unit_rows(raw) if centers.cosine else raw - centers.offset
        slab = (relative * scale).float().cpu()
        values, nearest = map(torch.from_numpy, index.search(slab.numpy(), min(2, len(points))))
        labels[rows] = nearest[:, 0].clamp(min=0).to(x.device)  # -1 where a row is not finite
        if len(points) > 1:
            undecided[rows] = _undecided(values, slab, largest, centers.cosine).to(x.device)
        # Computed from differences: the distances of faiss lose digits near a centre.
        if centers.cosine:
            undecided[rows] |= (relative == 0).all(1)  # `settle` sets the distance of a row without a direction
            distances[rows] = (relative - points[labels[rows]]).square().sum(1) / 2
        else:
            distances[rows] = (raw - centers.points[labels[rows]]).square().sum(1)
    settle(x, centers, labels, distances, undecided)
    return labels, distances


def assign_and_sum(x: Tensor, centers: Centers) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`assign`, and the sum of each centre's rows relative to the offset, and their count."""
    labels, distances = assign(x, centers)
    sums, counts = centers.sum_rows(x, labels)
    return labels, distances, sums[0], counts


def _undecided(values: Tensor, slab: Tensor, largest: Tensor, cosine: bool) -> Tensor:
    """Returns whether rounding could give a row another label, bool [N].

    `values` are the results of faiss for the two nearest centres: products for cosine, else squared distances.
    """
    squares, width = slab.square().sum(1), slab.shape[1]
    if cosine:
        return undecided_rows(values[:, 0] - values[:, 1], largest * squares.sqrt(), width)
    # Scores are half of |x|^2 + |c|^2 - 2 <x, c>, whose rounding grows with |x|^2 too.
    gap, second = (values[:, 1] - values[:, 0]) / 2, (values[:, 1] - squares) / 2
    return undecided_rows(gap, squares + score_bound(squares, second, largest), width)
