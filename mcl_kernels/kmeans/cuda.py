"""One pass over the data in CUDA C++: `csrc/cuda`, for GPUs and systems that Triton is not for.

    euclidean   label_i = argmin_k |x_i - c_k|^2,   distance_i = |x_i - c_label|^2
    cosine      label_i = argmax_k <x_i, c_k>,      distance_i = 1 - <x_i, c_label>,    x_i divided by its norm

The argmin is taken of |c|^2 / 2 - <x, c> by tiles of rows against tiles of centres, by a running minimum: no N x K
scores. Rows are relative to the offset, and for products of half precision as they are, with centres as the sum of two
numbers of that precision. For sums rows are sorted by label, and read once more. Sums are exact, and no add is atomic.

Memory beyond inputs and outputs: the order and the norms of the rows, and fp64 sums of every 256 rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mcl_kernels import _cuda
from mcl_kernels.kmeans import by_label
from mcl_kernels.kmeans.centers import Centers

PIECE_ROWS = 256


def assign(x: Tensor, centers: Centers) -> tuple[Tensor, Tensor]:
    """The nearest centre of each row, int64 [N], and the distance to it, [N] in the dtype of the centres."""
    labels, distances, _ = _assign(x, centers)
    return labels, distances


def assign_and_sum(x: Tensor, centers: Centers) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`assign`, and the sum of each centre's rows relative to the offset, and their number."""
    labels, distances, inverse_norms = _assign(x, centers)
    sums, counts = by_label.sum_by_label(_run_pieces, _run_join, x, centers, labels, inverse_norms, PIECE_ROWS)
    return labels, distances, sums, counts


def _assign(x: Tensor, centers: Centers) -> tuple[Tensor, Tensor, Tensor]:
    """Labels, distances, and for cosine 1 / |x_i|."""
    points, n = centers.points, len(x)
    half = x.dtype if x.dtype.itemsize == 2 and points.dtype == torch.float32 else None
    relative, multiplied, half_norms = by_label.factors(centers, half)
    labels, distances = torch.empty(n, dtype=torch.int64, device=x.device), points.new_empty(n)
    inverse_norms = points.new_empty(n if centers.cosine else 0)
    _cuda.ops(x.device).nearest(
        x, centers.offset, relative, multiplied, half_norms, centers.cosine, labels, distances, inverse_norms
    )
    return labels, distances, inverse_norms


def _run_pieces(
    x: Tensor, order: Tensor, inverse_norms: Tensor, centers: Centers, begin: Tensor, end: Tensor, sums: Tensor
) -> None:
    norms = inverse_norms if centers.cosine else None
    _cuda.ops(x.device).sum(x, order, norms, centers.offset, centers.rounding, begin, end, sums)


def _run_join(pieces: Tensor, begin: Tensor, end: Tensor, sums: Tensor) -> None:
    _cuda.ops(pieces.device).sum(pieces, None, None, None, None, begin, end, sums)
