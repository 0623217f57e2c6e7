"""Distances of rows to all centres."""

from __future__ import annotations

import torch
from torch import Tensor

from mcl_kernels._validate import check_same_width
from mcl_kernels.kmeans.assign import check_range
from mcl_kernels.kmeans.centers import Centers, prepare, unit_rows
from mcl_kernels.kmeans.rows import RowsLike, open_rows
from mcl_kernels.normalize import compute_dtype

TILE_ENTRIES = 1 << 20  # fp64 distances at a time, and fp64 entries of rows
# Squared distances below this share of |x|^2 + |c|^2 are computed from differences. Above it the rounding of an fp64
# product is 2^-33 of them times the width, in the worst case: less than that of an fp32 result.
CLOSE = 2.0**-20


def distances_to_all(x: RowsLike, centers: Tensor, metric: str) -> Tensor:
    """Returns |x_i - c_k|, or for cosine 1 - <x_i, c_k> / (|x_i| |c_k|), of all rows and centres, [N, K].

    They are computed in fp64, where they cancel from differences, and rounded once: to fp64 if rows or centres are
    fp64, else to fp32.
    """
    rows = open_rows("x", x)
    check_same_width("centers", centers, rows.name, rows.like)
    dtype, begin = compute_dtype(rows.like, centers), 0
    with torch.autocast(rows.device.type, enabled=False):
        prepared = prepare(centers.double(), metric)
        tile = max(TILE_ENTRIES // max(centers.shape), 1)
        distances = []
        for chunk in rows.chunks():
            part = torch.empty(len(chunk), len(centers), dtype=dtype, device=chunk.device)
            for start in range(0, len(chunk), tile):
                part[start : start + tile] = _tile_distances(chunk[start : start + tile], prepared, dtype)
            if not bool(part.isfinite().all()):
                rows.refuse_not_finite(chunk, begin)
                check_range(rows.name, chunk)
            distances.append(part)
            begin += len(chunk)
    return distances[0] if len(distances) == 1 else torch.cat(distances)


def _tile_distances(rows: Tensor, centers: Centers, dtype: torch.dtype) -> Tensor:
    """Distances of rows to all centres, fp64 [N, K], exact enough for results of the dtype."""
    rows, points = unit_rows(rows.double()) if centers.cosine else rows, centers.points
    if dtype == torch.float64:  # a product would have to be wider
        squared = torch.cdist(rows.double(), points, compute_mode="donot_use_mm_for_euclid_dist").square_()
    else:
        squared = _squared_by_product(rows, points, centers.offset)
    if not centers.cosine:
        return squared.sqrt_()
    has_no_direction = (rows == 0).all(1, keepdim=True) | (points == 0).all(1)
    return squared.div_(2).masked_fill_(has_no_direction, 1.0)


def _squared_by_product(rows: Tensor, points: Tensor, offset: Tensor) -> Tensor:
    """Squared distances |x|^2 + |c|^2 - 2 <x, c> relative to the offset, fp64; close ones from differences."""
    relative, relative_points = rows - offset, points - offset
    norms = torch.linalg.vector_norm(relative, dim=1, keepdim=True)
    scale = norms.square_() + relative_points.square().sum(1)
    squared = torch.addmm(scale, relative, relative_points.T, alpha=-2)
    close_rows, close_points = (squared <= CLOSE * scale).nonzero(as_tuple=True)
    size = max(TILE_ENTRIES // rows.shape[1], 1)
    for i, k in zip(torch.split(close_rows, size), torch.split(close_points, size), strict=True):
        squared[i, k] = (rows[i] - points[k]).square().sum(1)
    return squared
