"""One pass over the data in CUDA C++ (`csrc/cuda/kmeans_*.cuh`), where Triton is unavailable.

    euclidean   label_i = argmin_k |x_i - c_k|^2,   distance_i = |x_i - c_label|^2
    cosine      label_i = argmax_k <x_i, c_k>,      distance_i = |x_i - c_label|^2 / 2, x_i divided by its norm

A block finds the argmin of |c|^2 / 2 - <x, c> for a tile of rows against tiles of centres: no N x K scores. Products
of fp16 and bf16 rows are in their dtype, on tensor cores (bf16 before compute capability 8.0 on CUDA cores), with
centres as the sum of two parts of that dtype. Products of fp32 rows, relative to the offset, are in fp32. With few
centres, a block adds the rows of a tile to its sums while they are in the cache. With many, rows are sorted by label
and read once more. Sums are exact: fp32 entries are added as integers. No add is atomic.

Few rows against many centres: several blocks share the centres of a tile of rows, and a second kernel joins the two
lowest scores of their parts.

Memory beyond inputs and outputs: with few centres, fp64 sums for each block that runs at a time; with many, the order
and the norms of the rows, and fp64 sums of every 256 rows; for few rows also 12 bytes for each row and part of the
centres, 20 in fp64, at most 2 MiB on GPUs of up to 160 multiprocessors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mcl_kernels.backends import cuda
from mcl_kernels.kmeans.centers import Centers, settle
from mcl_kernels.kmeans.gpu_common import (
    MAX_SUMMED_CENTERS,
    MAX_SUMMED_ELEMENTS,
    choose_parts,
    cut_into_pieces,
    fixed_point,
    make_factors,
    programs_at_a_time,
    score_limits,
)

TILE_EDGES = {torch.float32: 64, torch.float64: 32}  # rows, and centres, of a tile, by the dtype of scores
HIGH_BITS = 22  # bits of the first of an fp32 entry's two integers

# Fixed-point format of entries (see `fixed_point`): rounding of the last integer, scale of the first, value of 1 in the
# last. For fp64 the first of the three is `Centers.rounding`, and the others are None.
_Rounding = tuple[Tensor | None, Tensor | None, Tensor | None]


def assign(x: Tensor, centers: Centers) -> tuple[Tensor, Tensor]:
    """Finds the nearest centre of each row, int64 [N], and the distance to it, [N] in the dtype of the centres."""
    labels, distances, _, _ = _assign(x, centers)
    return labels, distances


def assign_and_sum(x: Tensor, centers: Centers) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`assign`, and in the same pass the sum of each centre's rows relative to the offset, and their count."""
    k, width = centers.points.shape
    rounding = _entry_rounding(centers)
    if k > MAX_SUMMED_CENTERS or k * width > MAX_SUMMED_ELEMENTS:
        labels, distances, index, inverse_norms = _assign(x, centers)
        sums, counts = _sum_by_label(x, centers, rounding, labels, inverse_norms)
        if centers.cosine:
            sums += centers.sum_rows(x[index], labels[index])[0][0]
        return labels, distances, sums, counts
    blocks = min(-(-len(x) // TILE_EDGES[centers.points.dtype]), programs_at_a_time(x.device))
    sums = torch.zeros(blocks, k, width, dtype=torch.float64, device=x.device)
    counts = torch.empty(blocks, k, dtype=torch.int64, device=x.device)
    labels, distances, index, _ = _assign(x, centers, rounding, sums, counts)
    settled_sums, settled_counts = centers.sum_rows(x[index], labels[index])
    return labels, distances, sums.sum(0) + settled_sums[0], counts.sum(0) + settled_counts


def _assign(
    x: Tensor,
    centers: Centers,
    rounding: _Rounding = (None, None, None),
    sums: Tensor | None = None,
    counts: Tensor | None = None,
    parts: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Labels, distances, the index of the rows that were undecided, and for cosine 1 / |x_i| of the other rows.

    Fills `sums` and `counts` of each block, if given, from the decided rows. Else a block has one of `parts` of the
    centres, by default as many as few rows need.
    """
    points, n = centers.points, len(x)
    part_scores = part_labels = None
    if parts is None and sums is None:
        edge = TILE_EDGES[points.dtype]
        parts = choose_parts(-(-n // edge), -(-len(points) // edge), programs_at_a_time(x.device))
    if parts is not None and parts > 1:
        part_scores = points.new_empty(2, parts, n)
        part_labels = torch.empty(parts, n, dtype=torch.int32, device=x.device)
    half = x.dtype.itemsize == 2 and points.dtype == torch.float32
    factors = make_factors(x, centers, half)
    limits = score_limits(x, centers, factors, "half" if half else "fp32")
    labels, distances = torch.empty(n, dtype=torch.int64, device=x.device), points.new_empty(n)
    undecided = torch.empty(n, dtype=torch.bool, device=x.device)
    inverse_norms = points.new_empty(n) if centers.cosine else None
    cuda.ops().assign_clusters(
        [x, centers.offset, *rounding], inverse_norms,
        [points.contiguous(), factors.high, factors.low, factors.half_norms, limits],
        labels, distances, undecided, sums, counts, part_scores, part_labels,
    )  # fmt: skip
    return labels, distances, settle(x, centers, labels, distances, undecided), inverse_norms


def _entry_rounding(centers: Centers) -> _Rounding:
    """Returns the fixed-point format of the entries of rows."""
    if centers.points.dtype == torch.float64:
        return centers.rounding[0], None, None
    first_scale, last_rounding, last_value = fixed_point(centers, HIGH_BITS)
    return last_rounding, first_scale, last_value


def _sum_by_label(
    x: Tensor, centers: Centers, rounding: _Rounding, labels: Tensor, inverse_norms: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Sums and counts for many centres."""
    ops, k = cuda.ops(), len(centers.points)
    pieces = cut_into_pieces(labels, k)
    piece_sums = torch.empty(len(pieces.begin), x.shape[1], dtype=torch.float64, device=x.device)
    sums = torch.empty(k, x.shape[1], dtype=torch.float64, device=x.device)
    order = [pieces.order, pieces.begin, pieces.end]
    ops.sum_pieces([x, centers.offset, *rounding], inverse_norms, order, piece_sums)
    ops.join_pieces(piece_sums, pieces.first, pieces.last, sums)
    return sums, pieces.counts
