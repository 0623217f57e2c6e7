"""The backward kernel: the gradient of the rows of one side, in a single pass over what they meet."""

from __future__ import annotations

import triton
import triton.language as tl

from mcl_kernels.logsumexp.triton_tiles import (
    hole_in,
    load_features,
    load_rows,
    multiply,
    multiply_tile,
    rounded,
    span,
    where_kept,
)


@triton.jit(do_not_specialize=["n"])
def backward_kernel(
    x, x_stride, x_step, row_order, row_begin, row_end, drop_begin, drop_end, row_ids,
    y, y_stride, y_step, column_order, column_ids,
    row_lse, row_weight, column_lse, column_weight, scale, scale_stride, unit, grad_x, grad_scale, n, width,
    ROW_TERM: tl.constexpr, COLUMN_TERM: tl.constexpr, ROW_SCALE_TERM: tl.constexpr, COLUMN_SCALE_TERM: tl.constexpr,
    SCALE_OF_COLUMNS: tl.constexpr, NEEDS_X: tl.constexpr, HAS_DROPPED: tl.constexpr, COMPARES_IDS: tl.constexpr,
    SKIPS_TILES: tl.constexpr, DTYPE: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, FEATURES: tl.constexpr, ONE_PART: tl.constexpr, GRADIENTS: tl.constexpr,
):  # fmt: skip
    """dx_i = sum_j scale W_ij y_j of ROWS sorted rows, with W_ij = gb_i exp(s_ij - b_i) + gc_j exp(s_ij - c_j).

    1 unit of products for the logits and 1 for the sum; one more for each part of GRADIENTS features but the first.
    With a *_SCALE_TERM, too: grad_scale_i = sum_j W_ij <x_i, y_j> of that term.
    """
    row, row_valid, begin, end, dropped_from, dropped_to = load_rows(
        row_order, row_begin, row_end, drop_begin, drop_end, n, HAS_DROPPED, ROWS
    )
    first_feature = tl.program_id(1) * GRADIENTS
    row_id = tl.load(row_ids + row) if COMPARES_IDS else row
    if not SCALE_OF_COLUMNS:
        row_scale = tl.load(scale + row * scale_stride)[:, None]
    row_at = row * x_stride
    row_part = load_features(x, row_at, row_valid, x_step, width, 0, FEATURES, DTYPE) if ONE_PART else row
    if tl.float16 == DTYPE:
        # What fp16 rows are multiplied with is at most 2^15, and not lost where gradients are small.
        to_unit = tl.load(unit)
    if ROW_TERM:
        lse = tl.load(row_lse + row)[:, None]
        weight = tl.load(row_weight + row)[:, None]

    sums = tl.zeros((ROWS, GRADIENTS), SUM)
    scale_sums = tl.zeros((ROWS,), SUM)
    first, last = span(begin, end)
    end_of_tiles = last
    if SKIPS_TILES:
        hole_first, hole = hole_in(first, last, begin, end, dropped_from, dropped_to, COLUMNS)
        end_of_tiles = last - hole
    for start in range(first, end_of_tiles, COLUMNS):
        if SKIPS_TILES:
            start = tl.where(start < hole_first, start, start + hole)
        column, column_valid, gradient_part, products = multiply_tile(
            x, row_at, row_valid, x_step, row_part, y, y_stride, y_step, column_order, start, last, width,
            ROWS, COLUMNS, FEATURES, ONE_PART, DTYPE, SUM, PRECISION,
        )  # fmt: skip
        # The scale belongs to the queries, which are the rows or the columns.
        if SCALE_OF_COLUMNS:
            column_scale = tl.load(scale + column * scale_stride)[None, :]
            logits = products * column_scale
        else:
            logits = products * row_scale
        weights = tl.zeros((ROWS, COLUMNS), SUM)
        scale_weights = tl.zeros((ROWS, COLUMNS), SUM)
        if ROW_TERM:
            weights = weight * tl.exp(logits - lse)
            if ROW_SCALE_TERM:
                scale_weights += weights
        if COLUMN_TERM:
            column_term = tl.load(column_weight + column)[None, :] * tl.exp(
                logits - tl.load(column_lse + column)[None, :]
            )
            weights += column_term
            if COLUMN_SCALE_TERM:
                scale_weights += column_term
        weights = where_kept(
            weights, 0.0, start, column, column_valid, begin, end, dropped_from, dropped_to, row_id, column_ids,
            HAS_DROPPED, COMPARES_IDS, COLUMNS,
        )  # fmt: skip
        if ROW_SCALE_TERM or COLUMN_SCALE_TERM:
            products = where_kept(
                scale_weights * products, 0.0, start, column, column_valid, begin, end, dropped_from, dropped_to,
                row_id, column_ids, HAS_DROPPED, COMPARES_IDS, COLUMNS,
            )  # fmt: skip
            scale_sums += tl.sum(products, 1)
        if NEEDS_X:
            if SCALE_OF_COLUMNS:
                weights = weights * column_scale
            if tl.float16 == DTYPE:
                weights = weights * to_unit
            if not ONE_PART:
                gradient_part = load_features(
                    y, column * y_stride, column_valid, y_step, width, first_feature, GRADIENTS, DTYPE
                )
            sums = multiply(rounded(weights, DTYPE), gradient_part, sums, PRECISION)

    if NEEDS_X:
        if not SCALE_OF_COLUMNS:
            sums = sums * row_scale
        if tl.float16 == DTYPE:
            sums = sums / to_unit
        feature = first_feature + tl.arange(0, GRADIENTS)
        at = grad_x + row[:, None] * width + feature.to(tl.int64)[None, :]
        tl.store(at, rounded(sums, grad_x.dtype.element_ty), mask=row_valid[:, None] & (feature < width)[None, :])
    if ROW_SCALE_TERM or COLUMN_SCALE_TERM:
        if first_feature == 0:  # all parts of the features have it
            tl.store(grad_scale + row, scale_sums, mask=row_valid)
