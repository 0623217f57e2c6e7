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
from mcl_kernels.kmeans.centers import Bounds, Centers


def assign(x: Tensor, centers: Centers) -> tuple[Tensor, Tensor]:
    """Finds the nearest centre of each row, int64 [N], and the distance to it, [N] in the dtype of the centres."""
    labels, distances, _, _ = _pass(x, centers, False)
    return labels, distances


def assign_and_sum(x: Tensor, centers: Centers, weights: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`assign`, and in the same pass the sum of each centre's rows relative to the offset, and their count."""
    return _pass(x, centers, True, weights=weights)


def follow(
    x: Tensor,
    centers: Centers,
    labels: Tensor,
    bounds: Bounds | None = None,
    shifts: Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Updates the labels of an earlier pass, int32 [N]; returns distances, and the changes of sums and counts since.

    With `shifts` of the centres since the pass that set the `bounds`, fp32 [K], rows are read whose label may change.
    The distances of the others are NaN.
    """
    _, distances, sums, counts = _pass(x, centers, True, labels, bounds, shifts, weights)
    return distances, sums, counts


def measure(x: Tensor, centers: Centers, labels: Tensor, bounds: Bounds, shifts: Tensor) -> Tensor:
    """Updates labels and bounds as `follow`, and returns the distances of all rows."""
    _, distances, _, _ = _pass(x, centers, False, labels, bounds, shifts)
    return distances


def extremes(x: Tensor, middle: Tensor | None) -> Tensor:
    """`find_extremes` of kmeans/rows.py, in one read: [3, D] in the dtype of centres."""
    found: Tensor = ops().survey_rows(x, middle)
    return found


def _pass(
    x: Tensor,
    centers: Centers,
    with_sums: bool,
    labels: Tensor | None = None,
    bounds: Bounds | None = None,
    shifts: Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tensors = [centers.points, centers.offset, centers.rounding]
    upper, lower, order = bounds or (None, None, None)
    found: tuple[Tensor, Tensor, Tensor, Tensor] = ops().assign_clusters(
        x, tensors, centers.cosine, with_sums, labels, upper, lower, order, shifts, weights
    )
    return found
