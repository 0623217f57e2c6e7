"""Kernels that assign few rows to many centres, which several programs share; and their launcher.

A program finds the two lowest scores of a tile of rows in one part of the centres. They are joined in the order of the
centres, which gives the results of one program that has all of them. Memory: 12 bytes for each row and part, 20 in
fp64, and a number for each row; by `choose_parts` at most 2 MiB on GPUs of up to 160 multiprocessors.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from mcl_kernels.kmeans.triton.arguments import CenterArguments, PartArguments, ResultArguments, RowArguments
from mcl_kernels.kmeans.triton.tiles import decide, finish_rows, lowest_scores, merge_lowest

FIND_CONSTANTS = ("OPERAND", "ACCUMULATOR", "PRECISION", "ROWS", "COLUMNS", "FEATURES")
JOIN_CONSTANTS = ("COSINE", "ACCUMULATOR", "ROWS", "CHUNK")


@triton.jit(do_not_specialize=["n", "clusters"])
def find_parts_kernel(
    centers,  # CenterArguments
    found,  # PartArguments
    rows,  # RowArguments of N rows
    n, clusters, width,
    OPERAND: tl.constexpr, ACCUMULATOR: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """Finds the two lowest scores of ROWS rows in one part of the centres: successive tiles, or none."""
    part, parts = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < n
    tiles = tl.cdiv(clusters, COLUMNS)
    first, past = (part * tiles // parts).to(tl.int32), ((part + 1) * tiles // parts).to(tl.int32)
    lowest, second, label, squares = lowest_scores(
        rows, row * rows.stride, valid, centers, first * COLUMNS, past * COLUMNS, clusters, width,
        OPERAND, ACCUMULATOR, PRECISION, ROWS, COLUMNS, FEATURES,
    )  # fmt: skip
    tl.store(found.lowest + part * n + row, lowest, mask=valid)
    tl.store(found.second + part * n + row, second, mask=valid)
    tl.store(found.labels + part * n + row, label, mask=valid)
    if part == parts - 1:  # which has a tile
        tl.store(found.squares + row, squares, mask=valid)


@triton.jit(do_not_specialize=["n", "parts"])
def join_parts_kernel(
    centers,  # CenterArguments
    results,  # ResultArguments
    found,  # PartArguments
    rows,  # RowArguments of N rows
    n, width, parts,
    COSINE: tl.constexpr, ACCUMULATOR: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Assigns ROWS rows, by their two lowest scores in the parts."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < n
    lowest = tl.load(found.lowest + row, mask=valid, other=0.0)
    second = tl.load(found.second + row, mask=valid, other=0.0)
    label = tl.load(found.labels + row, mask=valid, other=0)
    for part in range(1, parts):
        at = tl.cast(part, tl.int64) * n + row
        later_lowest = tl.load(found.lowest + at, mask=valid, other=0.0)
        later_second = tl.load(found.second + at, mask=valid, other=0.0)
        later_label = tl.load(found.labels + at, mask=valid, other=0)
        lowest, second, label = merge_lowest(lowest, second, label, later_lowest, later_second, later_label)
    squares = tl.load(found.squares + row, mask=valid, other=0.0)
    decided, inverse_norm = decide(lowest, second, squares, centers.limits, COSINE)
    finish_rows(
        centers, results, None, rows, row, valid, label, decided, inverse_norm, width,
        COSINE, ACCUMULATOR, ROWS, CHUNK, 0,
    )  # fmt: skip


def assign_by_parts(
    centers: CenterArguments,
    results: ResultArguments,
    rows: RowArguments,
    parts: int,
    constants: dict[str, Any],
    options: dict[str, Any],
) -> None:
    """Writes the results of rows, whose centres are in `parts`; constants and options are those of `assign_kernel`."""
    n, width = rows.x.shape
    lowest, second = centers.points.new_empty(2, parts, n)
    labels = torch.empty(parts, n, dtype=torch.int32, device=rows.x.device)
    found = PartArguments(lowest, second, labels, centers.points.new_empty(n))
    row_tiles = -(-n // constants["ROWS"])
    find_constants, join_constants = (
        {name: constants[name] for name in names} for names in (FIND_CONSTANTS, JOIN_CONSTANTS)
    )
    find_parts_kernel[(row_tiles, parts)](
        centers, found, rows, n, len(centers.points), width, **find_constants, **options
    )
    join_parts_kernel[(row_tiles,)](centers, results, found, rows, n, width, parts, **join_constants, **options)
