"""Kernel that assigns rows to centres and, for few centres, sums the rows of each; and its launcher."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mcl_kernels.backends.triton import compute_capability, current_device, multiprocessors, product_precision
from mcl_kernels.kmeans.centers import Centers, settle
from mcl_kernels.kmeans.gpu_common import (
    INTERPRETED_PROGRAMS,
    choose_parts,
    fixed_point,
    make_factors,
    programs_at_a_time,
    score_limits,
)
from mcl_kernels.kmeans.triton.arguments import CenterArguments, ResultArguments, RowArguments, SumArguments
from mcl_kernels.kmeans.triton.parts import assign_by_parts
from mcl_kernels.kmeans.triton.tile_table import choose_tiles, tile_constants
from mcl_kernels.kmeans.triton.tiles import decide, finish_rows, lowest_scores

FIRST_BITS = 11  # bits of the first of an entry's three integers


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
    """Assigns tiles of ROWS rows: the nearest centre, the distance to it, and partial sums of the decided rows."""
    for tile in range(tl.program_id(0), tl.cdiv(n, ROWS), tl.num_programs(0)):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        valid = row < n
        lowest, second, label, squares = lowest_scores(
            rows, row * rows.stride, valid, centers, 0, clusters, clusters, width,
            OPERAND, ACCUMULATOR, PRECISION, ROWS, COLUMNS, FEATURES,
        )  # fmt: skip
        decided, inverse_norm = decide(lowest, second, squares, centers.limits, COSINE)
        finish_rows(
            centers, results, partial, rows, row, valid, label, decided, inverse_norm, width,
            COSINE, ACCUMULATOR, ROWS, CHUNK, CLUSTERS,
        )  # fmt: skip
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


def run_assign(x: Tensor, centers: Centers, with_sums: bool, parts: int | None = None) -> Assignment:
    """Assigns rows to centres; settles the undecided ones.

    `parts` of the centres, by default as many as few rows need, are those of a program each. Where sums of few centres
    are in the pass, one program has all centres.
    """
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
    row_tiles, partial = -(-n // tiles.rows), None
    programs = row_tiles
    if constants["CLUSTERS"]:
        programs, parts = min(row_tiles, programs_at_a_time(x.device)), 1
        sums = torch.zeros(programs, width, constants["CLUSTERS"], dtype=torch.float64, device=x.device)
        counts = torch.zeros(programs, constants["CLUSTERS"], dtype=torch.int64, device=x.device)
        first_scale, last_rounding, last_value = fixed_point(centers, FIRST_BITS)
        partial = SumArguments(sums, counts, first_scale, last_rounding)
    if n:
        factors = make_factors(x, centers, precision == "half", tiles.columns)
        limits = score_limits(x, centers, factors, precision)
        low = factors.low if precision == "half" else None
        center_arguments = CenterArguments(points, centers.offset, factors.high, low, factors.half_norms, limits)
        row_arguments = RowArguments(x, x.stride(0), x.stride(1))
        options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
        if parts is None:
            # The tile of many centres has the registers of a multiprocessor.
            at_a_time = multiprocessors(x.device) or INTERPRETED_PROGRAMS
            parts = choose_parts(row_tiles, -(-len(points) // tiles.columns), at_a_time)
        with current_device(x):
            if parts > 1:
                assign_by_parts(center_arguments, results, row_arguments, parts, constants, options)
            else:
                assign_kernel[(programs,)](
                    center_arguments, results, partial, row_arguments, n, len(points), width, **constants, **options
                )
    settled = settle(x, centers, results.labels, results.distances, results.undecided)
    assignment = Assignment(results.labels, results.distances, settled, results.inverse_norms, None, None)
    if partial is None:
        return assignment
    sums = partial.sums.sum(0).T[: len(points)] * last_value
    return assignment._replace(sums=sums, counts=partial.counts.sum(0)[: len(points)])
