"""The forward kernel, and the one that counts."""

from __future__ import annotations

import triton
import triton.language as tl

from mcl_kernels.backends.triton_device import load_features
from mcl_kernels.logsumexp.triton.tiles import (
    finite_or_zero,
    hole_in,
    load_rows,
    multiply_tile,
    span,
    where_kept,
)


@triton.jit(do_not_specialize=["n"])
def forward_kernel(
    x, x_stride, x_step, row_order, row_begin, row_end, drop_begin, drop_end, row_ids,
    y, y_stride, y_step, column_order, column_ids,
    scale, threshold, result, n, width,
    scale_stride: tl.constexpr, COUNT: tl.constexpr, HAS_DROPPED: tl.constexpr, COMPARES_IDS: tl.constexpr,
    SKIPS_TILES: tl.constexpr, OPERAND: tl.constexpr, ACCUMULATOR: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, FEATURES: tl.constexpr, ONE_PART: tl.constexpr,
):  # fmt: skip
    """result_i = log sum_j exp(s_ij) of ROWS sorted rows, by a running maximum and sum: 1 unit of products.

    With COUNT how many kept columns have not <x_i, y_j> <= threshold_i.
    """
    row, row_valid, begin, end, dropped_from, dropped_to = load_rows(
        tl.program_id(0), row_order, row_begin, row_end, drop_begin, drop_end, n, HAS_DROPPED, ROWS
    )
    row_id = tl.load(row_ids + row) if COMPARES_IDS else row
    row_scale = tl.load(scale + row * scale_stride)
    row_at = row * x_stride
    row_part = load_features(x, row_at, row_valid, x_step, width, 0, FEATURES, OPERAND) if ONE_PART else row
    row_threshold = tl.load(threshold + row) if COUNT else row_scale

    maximum = tl.full((ROWS,), float("-inf"), ACCUMULATOR)
    total = tl.zeros((ROWS,), tl.int64 if COUNT else ACCUMULATOR)
    first, last = span(begin, end)
    end_of_tiles = last
    if SKIPS_TILES:
        hole_first, hole = hole_in(first, last, begin, end, dropped_from, dropped_to, COLUMNS)
        end_of_tiles = last - hole
    for start in range(first, end_of_tiles, COLUMNS):
        if SKIPS_TILES:
            start = tl.where(start < hole_first, start, start + hole)
        column, column_valid, _, products = multiply_tile(
            x, row_at, row_valid, x_step, row_part, y, y_stride, y_step, column_order, start, last, width,
            ROWS, COLUMNS, FEATURES, ONE_PART, OPERAND, ACCUMULATOR, PRECISION,
        )  # fmt: skip
        if COUNT:
            above = where_kept(
                tl.where(products <= row_threshold[:, None], 0, 1), 0, start, column, column_valid,
                begin, end, dropped_from, dropped_to, row_id, column_ids, HAS_DROPPED, COMPARES_IDS, COLUMNS,
            )  # fmt: skip
            total += tl.sum(above, 1).to(tl.int64)
        else:
            logits = where_kept(
                products * row_scale[:, None], float("-inf"), start, column, column_valid,
                begin, end, dropped_from, dropped_to, row_id, column_ids, HAS_DROPPED, COMPARES_IDS, COLUMNS,
            )  # fmt: skip
            larger = tl.maximum(maximum, tl.max(logits, 1))
            shift = finite_or_zero(larger)
            total = total * tl.exp(maximum - shift) + tl.sum(tl.exp(logits - shift[:, None]), 1)
            maximum = larger
    if COUNT:
        tl.store(result + row, total, mask=row_valid)
    else:
        tl.store(result + row, finite_or_zero(maximum) + tl.log(total), mask=row_valid)
