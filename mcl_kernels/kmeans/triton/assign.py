"""Kernel that assigns rows to centres and, for few centres, sums the rows of each; and its launcher."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mcl_kernels.backends.triton import compute_capability, current_device, product_precision
from mcl_kernels.backends.triton_device import load_features
from mcl_kernels.kmeans.centers import Centers, settle
from mcl_kernels.kmeans.gpu_common import fixed_point, make_factors, programs_at_a_time, score_limits
from mcl_kernels.kmeans.triton.tile_table import choose_tiles, tile_constants
from mcl_kernels.kmeans.triton.tiles import add_to_sums, nearest_centers, relative_to

FIRST_BITS = 11  # bits of the first of an entry's three integers


class RowArguments(NamedTuple):
    """The data."""

    x: Tensor  # [N, D]
    stride: int  # from row to row
    step: int  # from feature to feature


class CenterArguments(NamedTuple):
    """Centres, and the factors of their products: see `make_factors` and `score_limits`."""

    points: Tensor  # [K, D]
    offset: Tensor  # [D]
    high: Tensor  # [K, D], relative to the offset
    low: Tensor | None  # [K, D], the second part for products of 16 bits
    half_norms: Tensor  # [K padded to tiles], infinity past the last centre
    limits: Tensor  # [8]


class ResultArguments(NamedTuple):
    """Results of each row."""

    labels: Tensor  # int64 [N]
    distances: Tensor  # [N]
    undecided: Tensor  # bool [N]
    inverse_norms: Tensor  # [N] for cosine


class SumArguments(NamedTuple):
    """Partial sums of each program, and the fixed-point format of entries: see `fixed_point`."""

    sums: Tensor  # fp64 [programs, D, CLUSTERS]
    counts: Tensor  # int64 [programs, CLUSTERS]
    first_scale: Tensor  # fp32 [D]
    last_rounding: Tensor  # fp32 [D]


@triton.jit(do_not_specialize=["n", "clusters"])
def assign_kernel(
    centers,  # CenterArguments
    results,  # ResultArguments
    partial,  # SumArguments, or None
    rows,  # RowArguments of N rows
    n, clusters, width,
    COSINE: tl.constexpr, OPERAND: tl.constexpr, ACCUMULATOR: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, FEATURES: tl.constexpr, CHUNK: tl.constexpr, CLUSTERS: tl.constexpr,
):  # fmt: skip
    """Assigns tiles of ROWS rows: the nearest centre, the distance to it, and partial sums of the decided rows.

    A row is loaded for its products, and from the cache for its distance and its cluster's sum.
    """
    program = tl.program_id(0).to(tl.int64)
    cluster = tl.arange(0, CLUSTERS if CLUSTERS else 1)
    if partial is not None:
        counts = partial.counts + program * CLUSTERS + cluster
        sums = partial.sums + program * width * CLUSTERS
    for tile in range(tl.program_id(0), tl.cdiv(n, ROWS), tl.num_programs(0)):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        valid = row < n
        offsets = row * rows.stride
        label, decided, inverse_norm = nearest_centers(
            rows, offsets, valid, centers, clusters, width,
            COSINE, OPERAND, ACCUMULATOR, PRECISION, ROWS, COLUMNS, FEATURES,
        )  # fmt: skip
        one_hot = label
        if partial is not None:
            members = (label[:, None] == cluster[None, :]) & (valid & decided)[:, None]
            one_hot = members.to(tl.float16)
            tl.store(counts, tl.load(counts) + tl.sum(members.to(tl.int32), 0))
        center_offsets = label.to(tl.int64) * width
        distance = tl.zeros((ROWS,), ACCUMULATOR)
        for first in range(0, width, CHUNK):
            x = load_features(rows.x, offsets, valid, rows.step, width, first, CHUNK, ACCUMULATOR)
            if COSINE:
                x = x * inverse_norm[:, None]
            center = load_features(centers.points, center_offsets, valid, 1, width, first, CHUNK, ACCUMULATOR)
            distance += tl.sum((x - center) * (x - center), 1)
            if partial is not None:
                if not COSINE:
                    x = relative_to(x, centers.offset, width, first, CHUNK)
                # 0 past the last row, where x is the offset, and for undecided rows: fp16 may hold neither.
                x = tl.where((valid & decided)[:, None], x, 0.0)
                add_to_sums(sums, x, one_hot, partial, width, first, CHUNK, CLUSTERS)
        if COSINE:
            distance = distance * 0.5
            tl.store(results.inverse_norms + row, inverse_norm, mask=valid)
        tl.store(results.undecided + row, decided == 0, mask=valid)
        tl.store(results.labels + row, label.to(tl.int64), mask=valid)
        tl.store(results.distances + row, distance, mask=valid)
        if partial is not None:
            # The next tile's sums are loaded by other threads than those that stored them.
            tl.debug_barrier()


class Assignment(NamedTuple):
    """Nearest centres, and sums of few centres."""

    labels: Tensor  # int64 [N]
    distances: Tensor  # [N] in the dtype of the centres
    settled: Tensor  # int64, indices of the rows that the kernel left undecided
    inverse_norms: Tensor  # [N] for cosine, 0 for settled rows, else [0]
    sums: Tensor | None  # fp64 [K, D] of the other rows, relative to the offset; None for many centres
    counts: Tensor | None  # int64 [K] of the other rows


def run_assign(x: Tensor, centers: Centers, with_sums: bool) -> Assignment:
    """Assigns rows to centres; settles the undecided ones."""
    points, (n, width) = centers.points, x.shape
    precision = product_precision(x, x, points)
    # Three products: with a single one of tf32 every fourth row would be undecided (counted on normal data).
    precision = "tf32x3" if precision == "tf32" else precision
    tiles = choose_tiles(precision, width, len(points), compute_capability(x.device))
    constants = tile_constants(precision, x.dtype, width, len(points), centers.cosine, with_sums, tiles)
    results = ResultArguments(
        torch.empty(n, dtype=torch.int64, device=x.device),
        points.new_empty(n),
        torch.empty(n, dtype=torch.bool, device=x.device),
        points.new_empty(n if centers.cosine else 0),
    )
    programs, partial = -(-n // tiles.rows), None
    if constants["CLUSTERS"]:
        programs = min(programs, programs_at_a_time(x.device))
        sums = torch.zeros(programs, width, constants["CLUSTERS"], dtype=torch.float64, device=x.device)
        counts = torch.zeros(programs, constants["CLUSTERS"], dtype=torch.int64, device=x.device)
        first_scale, last_rounding, last_value = fixed_point(centers, FIRST_BITS)
        partial = SumArguments(sums, counts, first_scale, last_rounding)
    if n:
        factors = make_factors(x, centers, precision == "half", tiles.columns)
        limits = score_limits(x, centers, factors, precision)
        low = factors.low if precision == "half" else None
        with current_device(x):
            assign_kernel[(programs,)](
                CenterArguments(points, centers.offset, factors.high, low, factors.half_norms, limits),
                results, partial, RowArguments(x, x.stride(0), x.stride(1)), n, len(points), width, **constants,
                num_warps=tiles.warps, num_stages=tiles.stages,
            )  # fmt: skip
    settled = settle(x, centers, results.labels, results.distances, results.undecided)
    assignment = Assignment(results.labels, results.distances, settled, results.inverse_norms, None, None)
    if partial is None:
        return assignment
    sums = partial.sums.sum(0).T[: len(points)] * last_value
    return assignment._replace(sums=sums, counts=partial.counts.sum(0)[: len(points)])
