"""One pass over the data as Triton kernels: on CUDA tensors, or on the CPU's under TRITON_INTERPRET=1.

    euclidean   label_i = argmin_k |x_i - c_k|^2,   distance_i = |x_i - c_label|^2
    cosine      label_i = argmax_k <x_i, c_k>,      distance_i = |x_i - c_label|^2 / 2, x_i divided by its norm

A program finds the argmin of |c|^2 / 2 - <x, c> for tiles of rows against tiles of centres, by a running minimum: no
N x K scores. Products of fp16 and bf16 rows are in their dtype, with centres as the sum of two parts of that dtype;
those of fp32 rows, relative to the offset, are in three products of tf32. With few centres, the sums of a tile's rows
are a product with its one-hot labels, while the rows are in the cache. With many, rows are sorted by label and read
once more. Sums are exact, and no add is atomic. Few rows against many centres: several programs share the centres of a
tile of rows (parts.py).

Memory beyond inputs and outputs: with few centres, fp64 sums for each program that runs at a time; with many, the order
and the norms of the rows, and fp64 sums of every 256 rows; for few rows also the scores of parts, at most 2 MiB.
"""

from __future__ import annotations

from torch import Tensor

from mcl_kernels.kmeans.centers import Centers
from mcl_kernels.kmeans.triton.assign import run_assign
from mcl_kernels.kmeans.triton.label_sums import sum_by_label


def assign(x: Tensor, centers: Centers) -> tuple[Tensor, Tensor]:
    """Finds the nearest centre of each row, int64 [N], and the distance to it, [N] in the dtype of the centres."""
    assignment = run_assign(x, centers, with_sums=False)
    return assignment.labels, assignment.distances


def assign_and_sum(x: Tensor, centers: Centers) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`assign`, and in the same pass the sum of each centre's rows relative to the offset, and their count."""
    labels, distances, settled, inverse_norms, sums, counts = run_assign(x, centers, with_sums=True)
    settled_sums, settled_counts = centers.sum_rows(x[settled], labels[settled])
    if sums is not None and counts is not None:
        return labels, distances, sums + settled_sums[0], counts + settled_counts
    sums, counts = sum_by_label(x, centers, labels, inverse_norms)
    # For cosine settled rows have an inverse norm of 0, so that the kernel's sums do not hold them.
    return labels, distances, sums + settled_sums[0] if centers.cosine else sums, counts
