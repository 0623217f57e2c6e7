"""Kernels that sum the rows of each of many centres, and their launcher.

Rows are sorted by label and cut into pieces of one cluster each, whose sums are then joined. Entries are rounded to
multiples of a power of 2 of their column, which fp64 sums exactly, in any order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mcl_kernels.backends.triton import current_device, padded_edge
from mcl_kernels.backends.triton_device import load_features
from mcl_kernels.kmeans.centers import Centers
from mcl_kernels.kmeans.gpu_common import cut_into_pieces
from mcl_kernels.kmeans.triton.tiles import relative_to

PIECE_TILE = {"ROWS": 16, "CHUNK": 128}
JOIN_TILE = {"ROWS": 16, "CHUNK": 64}


@triton.jit
def sum_pieces_kernel(
    x,  # [N, D]
    order,  # int64 [N], original row indices sorted by label
    inverse_norms,  # [N] for cosine
    offset,  # [D]
    rounding,  # fp64 [D]
    begin,  # int64 [pieces], in sorted order
    end,
    sums,  # fp64 [pieces, D]
    x_stride, x_step, width,
    COSINE: tl.constexpr, ACCUMULATOR: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Sums the rows of a piece, ROWS at a time, CHUNK of their features."""
    piece = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    exact = tl.load(rounding + feature, mask=feature < width, other=0.0)[None, :]
    last = tl.load(end + piece)
    total = tl.zeros((CHUNK,), tl.float64)
    for first in range(tl.load(begin + piece), last, ROWS):
        sorted_row = first + tl.arange(0, ROWS)
        valid = sorted_row < last
        row = tl.load(order + sorted_row, mask=valid, other=0)
        rows = load_features(x, row * x_stride, valid, x_step, width, tl.program_id(1) * CHUNK, CHUNK, ACCUMULATOR)
        if COSINE:
            rows = rows * tl.load(inverse_norms + row, mask=valid, other=0.0)[:, None]
        rows = relative_to(rows, offset, width, tl.program_id(1) * CHUNK, CHUNK).to(tl.float64)
        total += tl.sum(tl.where(valid[:, None], (rows + exact) - exact, 0.0), 0)
    tl.store(sums + piece * width + feature, total, mask=feature < width)


@triton.jit
def join_pieces_kernel(
    pieces,  # fp64 [pieces, D]
    begin,  # int64 [K], pieces of each cluster
    end,
    sums,  # fp64 [K, D]
    width,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Sums the pieces of a cluster, ROWS at a time, CHUNK of their features."""
    cluster = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    last = tl.load(end + cluster)
    total = tl.zeros((CHUNK,), tl.float64)
    for first in range(tl.load(begin + cluster), last, ROWS):
        piece = first + tl.arange(0, ROWS)
        at = pieces + piece[:, None] * width + feature[None, :]
        total += tl.sum(tl.load(at, mask=(piece < last)[:, None] & (feature < width)[None, :], other=0.0), 0)
    tl.store(sums + cluster * width + feature, total, mask=feature < width)


def sum_by_label(x: Tensor, centers: Centers, labels: Tensor, inverse_norms: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the sum of each centre's rows relative to the offset, fp64 [K, D], and their count, int64 [K]."""
    width, k = x.shape[1], len(centers.points)
    pieces = cut_into_pieces(labels, k)
    piece_sums = torch.empty(len(pieces.begin), width, dtype=torch.float64, device=x.device)
    sums = torch.empty(k, width, dtype=torch.float64, device=x.device)
    accumulator = tl.float64 if centers.points.dtype == torch.float64 else tl.float32
    interpreted = {"ROWS": 32, "CHUNK": min(1024, padded_edge(width))}
    piece_tile, join_tile = (PIECE_TILE, JOIN_TILE) if x.is_cuda else (interpreted, interpreted)
    with current_device(x):
        sum_pieces_kernel[(len(pieces.begin), -(-width // piece_tile["CHUNK"]))](
            x, pieces.order, inverse_norms, centers.offset, centers.rounding[0], pieces.begin, pieces.end, piece_sums,
            x.stride(0), x.stride(1), width, COSINE=centers.cosine, ACCUMULATOR=accumulator, **piece_tile,
        )  # fmt: skip
        join_pieces_kernel[(k, -(-width // join_tile["CHUNK"]))](
            piece_sums, pieces.first, pieces.last, sums, width, **join_tile
        )
    return sums, pieces.counts
