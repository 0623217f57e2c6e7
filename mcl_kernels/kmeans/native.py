"""One pass over the data on the CPU, by the C++ kernels of `csrc/cpu`.

    euclidean   label_i = argmin_k |x_i - c_k|^2,   distance_i = |x_i - c_label|^2
    cosine      label_i = argmax_k <x_i, c_k>,      distance_i = |x_i - c_label|^2 / 2, x_i divided by its norm

A block of rows is read once, and compared with all centres while it is in the cache. Then rows whose label changed
since the pass before are added to the sums of their new centre and subtracted from those of the earlier one: few rows,
after some iterations.

Memory beyond inputs and outputs: K x D fp64 sums for each thread.
"""

from __future__ import annotations

from torch import Tensor

from mcl_kernels.backends.native import ops
from mcl_kernels.kmeans.centers import Centers


def assign(x: Tensor, centers: Centers) -> tuple[Tensor, Tensor]:
    """Finds the nearest centre of each row, int64 [N], and the distance to it, [N] in the dtype of the centres."""
    labels, distances, _, _ = ops().assign_clusters(x, _center_tensors(centers), centers.cosine, False, None)
    return labels, distances


def assign_and_sum(x: Tensor, centers: Centers) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`assign`, and in the same pass the sum of each centre's rows relative to the offset, and their count."""
    labels, distances, sums, counts = ops().assign_clusters(x, _center_tensors(centers), centers.cosine, True, None)
    return labels, distances, sums, counts


def follow(x: Tensor, centers: Centers, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Updates the labels of an earlier pass, int32 [N]; returns distances, and the changes of sums and counts since."""
    _, distances, sums, counts = ops().assign_clusters(x, _center_tensors(centers), centers.cosine, True, labels)
    return distances, sums, counts


def extremes(x: Tensor) -> Tensor:
    """Finds the smallest and the largest entry of each column, [2, D] in the dtype of x; NaN for one that holds NaN."""
    found: Tensor = ops().survey_rows(x)
    return found


def _center_tensors(centers: Centers) -> list[Tensor]:
    """Tensors of the centres, in the order of the operator's schema."""
    return [centers.points, centers.offset, centers.rounding]
