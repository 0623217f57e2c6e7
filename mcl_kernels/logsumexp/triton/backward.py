"""The backward kernel: the gradient of the rows of one side, in a single pass over what they meet."""

from __future__ import annotations

import triton
import triton.language as tl

from mcl_kernels.backends.triton_device import load_features, multiply, rounded
from mcl_kernels.logsumexp.triton.tiles import (
    hole_in,
    load_rows,
    multiply_tile,
    span,
    where_kept,
)


@triton.jit(do_not_specialize=["n"])
def backward_kernel(
    x, x_stride, x_step, row_order, row_begin, row_end, drop_begin, drop_end, row_ids,
    y, y_stride, y_step, column_order, column_ids,
    row_lse, row_weight, column_lse, column_weight, scale, column_scale, unit, grad_x, grad_scale, n, width,
    scale_stride: tl.constexpr, ROW_TERM: tl.constexpr, COLUMN_TERM: tl.constexpr, SCALES_COLUMNS: tl.constexpr,
    NEEDS_X: tl.constexpr, NEEDS_SCALE: tl.constexpr, HAS_DROPPED: tl.constexpr, COMPARES_IDS: tl.constexpr,
    SKIPS_TILES: tl.constexpr, OPERAND: tl.constexpr, ACCUMULATOR: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, FEATURES: tl.constexpr, ONE_PART: tl.constexpr,
    GRADIENTS: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """dx_i = scale_i sum_j W_ij y_j of ROWS sorted rows, with W_ij = gb_i exp(s_ij - b_i) + gc_j exp(s_ij - c_j).

    1 unit of products for the logits and 1 for the sum; one more for each part of GRADIENTS features but the first.
    Where it is needed, too: grad_scale_i = sum_j W_ij <x_i, y_j>.
    """
    row, row_valid, begin, end, dropped_from, dropped_to = load_rows(
        tl.program_id(0) // PARTS, row_order, row_begin, row_end, drop_begin, drop_end, n, HAS_DROPPED, ROWS
    )
    first_feature = tl.program_id(0) % PARTS * GRADIENTS
    row_id = tl.load(row_ids + row) if COMPARES_IDS else row
    row_scale = tl.load(scale + row * scale_stride)[:, None]
    row_at = row * x_stride
    row_part = load_features(x, row_at, row_valid, x_step, width, 0, FEATURES, OPERAND) if ONE_PART else row
    if tl.float16 == OPERAND:
        # What fp16 rows are multiplied with is at most 2^15, and not lost where gradients are small.
        to_unit = tl.load(unit)
    if ROW_TERM:
        lse = tl.load(row_lse + row)[:, None]
        weight = tl.load(row_weight + row)[:, None]

    sums = ()  # a tensor for each CHUNK of the features
    for _ in tl.static_range(GRADIENTS // CHUNK):
        sums = sums + (tl.zeros((ROWS, CHUNK), ACCUMULATOR),)  # type: ignore[assignment]
    scale_sums = tl.zeros((ROWS,), ACCUMULATOR)
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
            ROWS, COLUMNS, FEATURES, ONE_PART, OPERAND, ACCUMULATOR, PRECISION,
        )  # fmt: skip
        logits = products * (tl.load(column_scale + column)[None, :] if SCALES_COLUMNS else row_scale)
        weights = tl.zeros((ROWS, COLUMNS), ACCUMULATOR)
        if ROW_TERM:
            weights = weight * tl.exp(logits - lse)
        if COLUMN_TERM:
            column_part = tl.exp(logits - tl.load(column_lse + column)[None, :])
            weights += tl.load(column_weight + column)[None, :] * column_part
        weights = where_kept(
            weights, 0.0, start, column, column_valid, begin, end, dropped_from, dropped_to, row_id, column_ids,
            HAS_DROPPED, COMPARES_IDS, COLUMNS,
        )  # fmt: skip
        if NEEDS_SCALE:
            products = where_kept(
                weights * products, 0.0, start, column, column_valid, begin, end, dropped_from, dropped_to,
                row_id, column_ids, HAS_DROPPED, COMPARES_IDS, COLUMNS,
            )  # fmt: skip
            scale_sums += tl.sum(products, 1)
        if NEEDS_X:
            if tl.float16 == OPERAND:
                weights = weights * to_unit
            weights = rounded(weights, OPERAND)
            added = ()
            for chunk in tl.static_range(GRADIENTS // CHUNK):
                if not ONE_PART or CHUNK < GRADIENTS:
                    gradient_part = load_features(
                        y, column * y_stride, column_valid, y_step, width, first_feature + chunk * CHUNK, CHUNK, OPERAND
                    )
                added = added + (multiply(weights, gradient_part, sums[chunk], PRECISION),)  # type: ignore[assignment]
            sums = added

    if NEEDS_SCALE:
        if first_feature == 0:  # all parts of the features have it
            tl.store(grad_scale + row, scale_sums, mask=row_valid)
    if NEEDS_X:
        for chunk in tl.static_range(GRADIENTS // CHUNK):
            gradient = sums[chunk] * row_scale
            if tl.float16 == OPERAND:
                gradient = gradient / to_unit
            feature = first_feature + chunk * CHUNK + tl.arange(0, CHUNK)
            at = grad_x + row[:, None] * width + feature.to(tl.int64)[None, :]
            written = row_valid[:, None] & (feature < width)[None, :]
            tl.store(at, rounded(gradient, grad_x.dtype.element_ty), mask=written)
