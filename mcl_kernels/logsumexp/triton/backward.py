"""The backward kernel, for the gradient of the rows of one side in a single pass over their columns; its launcher."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mcl_kernels.backends.triton import current_device, product_precision
from mcl_kernels.backends.triton_device import load_features, multiply, rounded
from mcl_kernels.logsumexp.gpu_common import Rows, Side, Terms
from mcl_kernels.logsumexp.triton.arguments import TermArguments, common_arguments
from mcl_kernels.logsumexp.triton.tiles import (
    column_range,
    load_columns,
    load_rows,
    multiply_tiles,
    skip_hole,
    where_kept,
)


@triton.jit
def pair_weights(
    logits, terms, row_lse, row_weight, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACCUMULATOR: tl.constexpr
):
    """Returns W_ij = row_weight_i exp(s_ij - row_lse_i) + column_weight_j exp(s_ij - column_lse_j) of a tile."""
    weights = tl.zeros((ROWS, COLUMNS), ACCUMULATOR)
    if terms.row_lse is not None:
        weights = row_weight * tl.exp(logits - row_lse)
    if terms.column_lse is not None:
        column_term = tl.exp(logits - tl.load(terms.column_lse + column)[None, :])
        weights += tl.load(terms.column_weight + column)[None, :] * column_term
    return weights


@triton.jit
def add_to_gradient(
    sums, weights, columns, column_tile, first_feature, width, GRADIENTS: tl.constexpr, CHUNK: tl.constexpr,
    ONE_PART: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Returns the sums, a tensor for each CHUNK of features, with sum_j W_ij y_j of a tile added."""
    added = ()
    for chunk in tl.static_range(GRADIENTS // CHUNK):
        if ONE_PART and CHUNK == GRADIENTS:
            features = column_tile.features
        else:
            first = first_feature + chunk * CHUNK
            features = load_features(
                columns.x, column_tile.offsets, column_tile.valid, columns.step, width, first, CHUNK, OPERAND
            )
        added = added + (multiply(weights, features, sums[chunk], PRECISION),)  # type: ignore[assignment]
    return added


@triton.jit
def store_gradient(
    grad_x, sums, tile, fp16_scale, first_feature, width, GRADIENTS: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Stores scale_i times the sums of each row."""
    for chunk in tl.static_range(GRADIENTS // CHUNK):
        gradient = sums[chunk] * tile.scale[:, None]
        if fp16_scale is not None:
            gradient = gradient / fp16_scale
        feature = first_feature + chunk * CHUNK + tl.arange(0, CHUNK)
        at = grad_x + tile.row[:, None] * width + feature.to(tl.int64)[None, :]
        written = tile.valid[:, None] & (feature < width)[None, :]
        tl.store(at, rounded(gradient, grad_x.dtype.element_ty), mask=written)


@triton.jit(do_not_specialize=["n"])
def backward_kernel(
    # Pointers before the groups that hold integers: in another order it takes a few more registers on sm_100.
    terms,  # TermArguments
    grad_x,  # [N, D] or None
    grad_scale,  # [N] or None
    rows,  # RowArguments of N rows
    columns,  # ColumnArguments
    n, width,
    SCALE_STRIDE: tl.constexpr, SKIPS_TILES: tl.constexpr,
    OPERAND: tl.constexpr, ACCUMULATOR: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, FEATURES: tl.constexpr, ONE_PART: tl.constexpr,
    GRADIENTS: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """grad_x_i = scale_i sum_j W_ij y_j of ROWS sorted rows, and grad_scale_i = sum_j W_ij <x_i, y_j>.

    1 unit of products for the logits and 1 for the sum; one more for each part of GRADIENTS features but the first.
    """
    tile = load_rows(rows, tl.program_id(0) // PARTS, n, width, SCALE_STRIDE, ROWS, FEATURES, ONE_PART, OPERAND)
    first_feature = tl.program_id(0) % PARTS * GRADIENTS
    fp16_scale = tl.load(terms.fp16_scale) if terms.fp16_scale is not None else None
    row_lse = tl.load(terms.row_lse + tile.row)[:, None] if terms.row_lse is not None else None
    row_weight = tl.load(terms.row_weight + tile.row)[:, None] if terms.row_lse is not None else None

    sums = ()  # a tensor for each CHUNK of features
    for _ in tl.static_range(GRADIENTS // CHUNK):
        sums = sums + (tl.zeros((ROWS, CHUNK), ACCUMULATOR),)  # type: ignore[assignment]
    scale_sums = tl.zeros((ROWS,), ACCUMULATOR)
    compared = column_range(tile, SKIPS_TILES, COLUMNS)
    for start in range(compared.begin, compared.stop, COLUMNS):
        others = load_columns(
            columns, skip_hole(start, compared, SKIPS_TILES), compared.end, width, COLUMNS, FEATURES, ONE_PART, OPERAND
        )
        products = multiply_tiles(
            rows, tile, columns, others, width, ROWS, COLUMNS, FEATURES, ONE_PART, OPERAND, ACCUMULATOR, PRECISION
        )
        if terms.column_scale is not None:
            logits = products * tl.load(terms.column_scale + others.column)[None, :]
        else:
            logits = products * tile.scale[:, None]
        weights = pair_weights(logits, terms, row_lse, row_weight, others.column, ROWS, COLUMNS, ACCUMULATOR)
        weights = where_kept(weights, 0.0, rows, tile, columns, others, COLUMNS)
        if grad_scale is not None:
            # Products of pairs that are not kept may be NaN: weights of 0 do not remove them.
            scale_sums += tl.sum(where_kept(weights * products, 0.0, rows, tile, columns, others, COLUMNS), 1)
        if grad_x is not None:
            if fp16_scale is not None:
                weights = weights * fp16_scale
            weights = rounded(weights, OPERAND)
            sums = add_to_gradient(
                sums, weights, columns, others, first_feature, width, GRADIENTS, CHUNK, ONE_PART, OPERAND, PRECISION
            )

    if grad_scale is not None:
        if first_feature == 0:  # the programs of all parts have the same sums
            tl.store(grad_scale + tile.row, scale_sums, mask=tile.valid)
    if grad_x is not None:
        store_gradient(grad_x, sums, tile, fp16_scale, first_feature, width, GRADIENTS, CHUNK)


def run_backward(
    rows: Rows,
    columns: Side,
    scale: Tensor,
    negatives: str,
    terms: Terms,
    grad_x: Tensor | None,
    grad_scale: Tensor | None,
) -> None:
    """Writes the gradients of the rows that are given: of x [N, D], and each row's share of that of the scale [N]."""
    n = len(rows.side.x)
    if n == 0:
        return
    precision = product_precision(rows.side.x, columns.x, scale)
    arguments = common_arguments("backward", rows, columns, scale, negatives, precision)
    if grad_x is None:
        arguments["PARTS"] = 1
    row_lse, row_weight = terms.row or (None, None)
    column_lse, column_weight = terms.column or (None, None)
    fp16_scale = terms.fp16_scale if arguments["OPERAND"] == tl.float16 else None
    term_arguments = TermArguments(row_lse, row_weight, column_lse, column_weight, terms.column_scale, fp16_scale)
    with current_device(rows.side.x):
        backward_kernel[(-(-n // arguments["ROWS"]) * arguments["PARTS"],)](
            **arguments, terms=term_arguments, grad_x=grad_x, grad_scale=grad_scale
        )
