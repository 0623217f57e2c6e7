"""Steps of the forward and the backward kernel on one tile.

A tile is ROWS sorted rows against COLUMNS sorted columns, both read from sorted copies. Tiles do not align with
clusters: a tile of rows is compared with the columns from the first of its first row's cluster to the last of its last
row's.

exp(s - b) is 2 ** (log2(e) s - shift), one multiply-add and one exponential, with shift = log2(e) b rounded; what the
rounding left out is a factor of the result for each row. Logits are rounded, so that both passes have the same.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from mcl_kernels.backends.triton_device import multiply, multiply_add, multiply_rounded, rounded


# Triton 3.6 cannot return None in a tuple: a field that a kernel does not use holds some tensor.
class RowTile(NamedTuple):
    """Sorted rows of a tile, the columns that they keep, and what all of them have in common."""

    row: Any  # [ROWS], original row indices
    valid: Any  # [ROWS], false past the last row
    begin: Any  # [ROWS], the sorted columns that each row attends to
    length: Any  # [ROWS], unsigned
    drop_begin: Any  # [ROWS], those among them that it drops, if rows drop any
    drop_length: Any  # [ROWS], unsigned
    ids: Any  # [ROWS], if pairs are compared by them
    scale: Any  # [ROWS]
    all_begin: Any  # every row attends to the columns from here
    all_end: Any  # to here
    some_begin: Any  # some row may drop columns from here
    some_end: Any  # to here


@triton.jit
def union(begin, end):
    """Returns the first begin and the last end of the ranges that are not empty; 0 and 0 if all are."""
    last = tl.max(tl.where(begin < end, end, 0), 0)
    # Not above the last: the compiler adds to the begin of an empty loop, which must not overflow.
    return tl.minimum(tl.min(tl.where(begin < end, begin, 0x7FFFFFFF), 0), last), last


@triton.jit
def load_rows(rows, tile, n, SCALE_STRIDE: tl.constexpr, ROWS: tl.constexpr):
    """Returns the RowTile number `tile` of RowArguments."""
    sorted_row = tile * ROWS + tl.arange(0, ROWS)
    valid = sorted_row < n
    row = tl.load(rows.order + sorted_row, mask=valid, other=0)
    begin = tl.load(rows.begin + sorted_row, mask=valid, other=0).to(tl.int32)
    end = tl.load(rows.end + sorted_row, mask=valid, other=0).to(tl.int32)
    drop_begin, drop_end, ids = end, end, row
    some_begin, some_end = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    if rows.drop_begin is not None:
        drop_begin = tl.load(rows.drop_begin + sorted_row, mask=valid, other=0)
        drop_end = tl.load(rows.drop_end + sorted_row, mask=valid, other=0)
        some_begin, some_end = union(drop_begin, drop_end)
    if rows.ids is not None:
        ids = tl.load(rows.ids + sorted_row)
    scale = tl.load(rows.scale + row * SCALE_STRIDE)
    length, drop_length = (end - begin).to(tl.uint32), (drop_end - drop_begin).to(tl.uint32)
    return RowTile(
        row, valid, begin, length, drop_begin, drop_length, ids, scale, tl.max(begin, 0), tl.min(end, 0), some_begin,
        some_end,
    )  # fmt: skip


@triton.jit
def load_features(
    x, split_stride, start, first_feature, SIZE: tl.constexpr, WIDTH: tl.constexpr, FEATURES: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """Returns FEATURES features of SIZE rows of a copy, from row `start` on: a tensor for each part of the numbers."""
    features = ()
    if isinstance(x, tl.tensor_descriptor):
        for split in tl.static_range(SPLITS):
            row = (start + split * split_stride).to(tl.int32)
            features = features + (x.load([row, first_feature]),)  # type: ignore[assignment]
    else:
        feature = tl.arange(0, FEATURES)[None, :]
        at = x + start.to(tl.int64) * WIDTH + first_feature
        at = at + (tl.arange(0, SIZE)[:, None] * WIDTH + feature)
        for split in tl.static_range(SPLITS):
            if FEATURES > WIDTH:
                part = tl.load(at + split * split_stride * WIDTH, mask=feature < WIDTH, other=0.0)
            else:
                part = tl.load(at + split * split_stride * WIDTH)
            features = features + (part,)  # type: ignore[assignment]
    return features


@triton.jit
def multiply_parts(a, b, sums, SPLITS: tl.constexpr, PRECISION: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Returns sums + a b, with TRANSPOSED sums + a b^T, of numbers that are sums of SPLITS parts.

    Products of parts that are below the rounding of the first ones are left out. Small products come first.
    """
    for order in tl.static_range(SPLITS):
        for split in tl.static_range(SPLITS - order):
            right = b[SPLITS - 1 - order - split]
            if TRANSPOSED:
                right = tl.trans(right)
            sums = multiply(a[split], right, sums, PRECISION)
    return sums


@triton.jit
def add_product(a, b, sums, SPLITS: tl.constexpr, PRECISION: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Returns `multiply_parts`. Tensor cores truncate their sums: those of exact products are kept short.

    A product of numbers in parts is summed apart, and added with rounding to nearest.
    """
    if SPLITS == 1:
        return multiply_parts(a, b, sums, SPLITS, PRECISION, TRANSPOSED)
    return sums + multiply_parts(a, b, tl.zeros(sums.shape, sums.dtype), SPLITS, PRECISION, TRANSPOSED)


@triton.jit
def multiply_tiles(
    a, a_stride, a_start, a_features, b, b_stride, b_start, b_features, finite,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, FEATURES: tl.constexpr, SPLITS: tl.constexpr,
    ACCUMULATOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Returns the products <x_i, y_j> of a tile [ROWS, COLUMNS].

    `a_features` and `b_features` are all features of the tile's rows and columns if one product multiplies them;
    else they are loaded, FEATURES at a time. If sums of products of parts may overflow (not `finite`), the product of
    the first parts replaces NaN.
    """
    products = tl.zeros((ROWS, COLUMNS), ACCUMULATOR)
    if FEATURES >= WIDTH:
        products = multiply_parts(a_features, b_features, products, SPLITS, PRECISION, True)
    else:
        for first in range(0, WIDTH, FEATURES):
            left = load_features(a, a_stride, a_start, first, ROWS, WIDTH, FEATURES, SPLITS)
            right = load_features(b, b_stride, b_start, first, COLUMNS, WIDTH, FEATURES, SPLITS)
            products = add_product(left, right, products, SPLITS, PRECISION, True)
    if SPLITS > 1:
        if not finite:
            large = tl.zeros((ROWS, COLUMNS), ACCUMULATOR)
            if FEATURES >= WIDTH:
                large = multiply_parts(a_features, b_features, large, 1, PRECISION, True)
            else:
                for first in range(0, WIDTH, FEATURES):
                    left = load_features(a, a_stride, a_start, first, ROWS, WIDTH, FEATURES, 1)
                    right = load_features(b, b_stride, b_start, first, COLUMNS, WIDTH, FEATURES, 1)
                    large = multiply_parts(left, right, large, 1, PRECISION, True)
            products = tl.where(products == products, products, large)
    return products


@triton.jit
def split_parts(values, OPERAND: tl.constexpr, SPLITS: tl.constexpr):
    """Returns values as a sum of SPLITS tensors of OPERAND.

    All parts but the last are cut, not rounded: a mask takes no conversion, which would share the unit of exponentials.
    """
    parts = ()
    for _ in tl.static_range(SPLITS - 1):
        cut = (values.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)
        parts = parts + (cut.to(OPERAND),)  # type: ignore[assignment]
        values = values - cut
    return parts + (rounded(values, OPERAND),)


@triton.jit
def where_kept(values, otherwise, row_tile, rows, columns, start, COLUMNS: tl.constexpr):
    """Returns the values of a tile, `otherwise` for pairs that are not kept.

    Masks are computed only for tiles in which a pair may not be kept. (c - begin) < (end - begin), unsigned, is
    begin <= c < end.
    """
    stop = start + COLUMNS
    mixed = (row_tile.all_begin > start) | (row_tile.all_end < stop)
    if rows.drop_begin is not None:
        mixed = mixed | ((row_tile.some_begin < stop) & (row_tile.some_end > start))
    if rows.ids is not None:
        mixed = True
    if mixed:
        column = (start + tl.arange(0, COLUMNS))[None, :]
        keep = (column - row_tile.begin[:, None]).to(tl.uint32) < row_tile.length[:, None]
        if rows.drop_begin is not None:
            keep = keep & ((column - row_tile.drop_begin[:, None]).to(tl.uint32) >= row_tile.drop_length[:, None])
        if rows.ids is not None:
            column_ids = tl.load(columns.ids + start + tl.arange(0, COLUMNS))
            keep = keep & (row_tile.ids[:, None] != column_ids[None, :])
        values = tl.where(keep, values, otherwise)
    return values


@triton.jit
def exponential(logits, shift):
    """Returns exp(logits) / 2 ** shift: one fused multiply-add and one exponential of 2."""
    log2_e = tl.full(logits.shape, 1.4426950408889634, logits.dtype)
    return tl.exp2(multiply_add(logits, log2_e, -shift))


@triton.jit
def shift_of(logit):
    """Returns log2(e) logit, rounded, that `exponential` subtracts; 0 for an infinite logit."""
    finite = tl.where(tl.abs(logit) == float("inf"), 0.0, logit)
    return multiply_rounded(finite, tl.full(finite.shape, 1.4426950408889634, finite.dtype))


@triton.jit
def shift_error(logit, shift):
    """Returns log2(e) logit - shift, what rounding left out of `shift_of`."""
    finite = tl.where(tl.abs(logit) == float("inf"), 0.0, logit)
    return multiply_add(finite, tl.full(finite.shape, 1.4426950408889634, finite.dtype), -shift)


@triton.jit
def shifted(lse, weight):
    """Returns the shift of an LSE and the weight that goes with it: weight exp(s - lse) = result exp(s) / 2 ** shift.

    An LSE of -inf, of a row that keeps nothing, has shift -inf.
    """
    shift = shift_of(lse)
    weight = weight * tl.exp2(-shift_error(lse, shift))
    return tl.where(tl.abs(lse) == float("inf"), lse, shift), weight


@triton.jit
def add_to_logsumexp(maximum, total, logits):
    """Returns the running maximum of each row and the sum of exp(logit) / 2 ** shift, with a tile of logits added."""
    larger = tl.maximum(maximum, tl.max(logits, 1))
    shift = shift_of(larger)
    total = total * rescaling(maximum, shift) + tl.sum(exponential(logits, shift[:, None]), 1)
    return larger, total


@triton.jit
def rescaling(maximum, shift):
    """Returns the factor that brings a sum relative to the shift of `maximum` to another shift; 0 for an empty sum."""
    return tl.where(maximum == float("-inf"), 0.0, tl.exp2(shift_of(maximum) - shift))


@triton.jit
def logsumexp_of(maximum, total):
    """Returns the logsumexp of a running maximum and sum."""
    finite = tl.where(tl.abs(maximum) == float("inf"), 0.0, maximum)
    shift = shift_of(maximum)
    return finite + (tl.log2(total) - shift_error(maximum, shift)) * 0.6931471805599453
