"""What the Triton kernels share: rows of a tile, products, and which pairs are kept.

A tile is ROWS sorted rows against COLUMNS sorted columns. Tiles do not align with clusters: a tile of rows meets the
columns from the first of its first row's cluster to the last of its last row's, so the grid depends on N alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mcl_kernels.backends.triton_device import load_features, multiply


@triton.jit
def finite_or_zero(maximum):
    """An infinite maximum is not subtracted: -inf has to stay -inf, and inf to stay inf."""
    return tl.where(tl.abs(maximum) == float("inf"), 0.0, maximum)


@triton.jit
def load_rows(
    tile, row_order, row_begin, row_end, drop_begin, drop_end, n, HAS_DROPPED: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """The rows of a tile, which of them there are, the sorted columns each meets, and those among them it drops."""
    rows = tile * ROWS + tl.arange(0, ROWS)
    valid = rows < n
    row = tl.load(row_order + rows, mask=valid, other=0)
    begin = tl.load(row_begin + rows, mask=valid, other=0).to(tl.int32)
    end = tl.load(row_end + rows, mask=valid, other=0).to(tl.int32)
    dropped_from, dropped_to = end, end
    if HAS_DROPPED:
        dropped_from = tl.load(drop_begin + rows, mask=valid, other=0)
        dropped_to = tl.load(drop_end + rows, mask=valid, other=0)
    return row, valid, begin, end, dropped_from, dropped_to


@triton.jit
def multiply_tile(
    x, row_at, row_valid, x_step, row_part, y, y_stride, y_step, column_order, start, last, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, FEATURES: tl.constexpr, ONE_PART: tl.constexpr,
    OPERAND: tl.constexpr, ACCUMULATOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The columns of a tile, which of them there are, their features and the products <x_i, y_j>.

    Where all features are one part, they stay for the gradient, and `row_part` are the rows'; else both are unused.
    """
    columns = start + tl.arange(0, COLUMNS)
    valid = columns < last
    column = tl.load(column_order + columns, mask=valid, other=0)
    column_at = column * y_stride
    products = tl.zeros((ROWS, COLUMNS), ACCUMULATOR)
    part = column
    if ONE_PART:
        part = load_features(y, column_at, valid, y_step, width, 0, FEATURES, OPERAND)
        products = multiply(row_part, tl.trans(part), products, PRECISION)
    else:
        for first in range(0, width, FEATURES):
            a = load_features(x, row_at, row_valid, x_step, width, first, FEATURES, OPERAND)
            b = load_features(y, column_at, valid, y_step, width, first, FEATURES, OPERAND)
            products = multiply(a, tl.trans(b), products, PRECISION)
    return column, valid, part, products


@triton.jit
def span(begin, end):
    """From the first begin to the last end of the ranges that are not empty; 0 to 0 where all are."""
    last = tl.max(tl.where(begin < end, end, 0), 0)
    # Not above the last: what the compiler adds to an empty loop's first column must not wrap around.
    return tl.minimum(tl.min(tl.where(begin < end, begin, 0x7FFFFFFF), 0), last), last


@triton.jit
def hole_in(first, last, begin, end, dropped_from, dropped_to, COLUMNS: tl.constexpr):
    """Begin and length of the whole tiles of columns, counted from the first one, that every row drops: no work."""
    meets = begin < end
    drop_first = tl.max(tl.where(meets, dropped_from, 0), 0)
    drop_last = tl.min(tl.where(meets, dropped_to, 0x7FFFFFFF), 0)
    # The last tile counts as whole too.
    drop_last = tl.where(drop_last < last, drop_last, last + COLUMNS - 1)
    hole_first = first + (drop_first - first + COLUMNS - 1) // COLUMNS * COLUMNS
    hole = first + (drop_last - first) // COLUMNS * COLUMNS - hole_first
    return hole_first, tl.where((first < last) & (hole > 0), hole, 0)


@triton.jit
def where_kept(
    values, otherwise, start, column, column_valid, begin, end, dropped_from, dropped_to, row_id, column_ids,
    HAS_DROPPED: tl.constexpr, COMPARES_IDS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The values of a tile, `otherwise` where a pair is not kept. Pairs are looked at only where some may not be."""
    stop = start + COLUMNS
    mixed = (tl.max(begin, 0) > start) | (tl.min(end, 0) < stop)
    if HAS_DROPPED:
        first_dropped, last_dropped = span(dropped_from, dropped_to)
        mixed = mixed | ((first_dropped < stop) & (last_dropped > start))
    if COMPARES_IDS:
        mixed = True
    if mixed:
        columns = (start + tl.arange(0, COLUMNS))[None, :]
        keep = (columns >= begin[:, None]) & (columns < end[:, None])
        if HAS_DROPPED:
            keep = keep & ((columns < dropped_from[:, None]) | (columns >= dropped_to[:, None]))
        if COMPARES_IDS:
            column_id = tl.load(column_ids + column, mask=column_valid, other=0)
            keep = keep & (row_id[:, None] != column_id[None, :])
        values = tl.where(keep, values, otherwise)
    return values


@triton.jit(do_not_specialize=["n", "steps"])
def drop_kernel(
    row_order, row_begin, row_end, row_values, column_order, column_values,
    drop_begin, drop_end,  # int32 [n], sorted
    n, steps, ROWS: tl.constexpr,
):  # fmt: skip
    """The columns a row meets but drops, since they have its value: neighbours, found by bisection in `steps` steps."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_valid = rows < n
    value = tl.load(row_values + tl.load(row_order + rows, mask=row_valid, other=0))
    begin = tl.load(row_begin + rows, mask=row_valid, other=0)
    end = tl.load(row_end + rows, mask=row_valid, other=0)
    # The first column whose value is not below the row's, and the first whose value is above it.
    first_low, first_high, last_low, last_high = begin, end, begin, end
    for _ in range(0, steps):
        middle = (first_low + first_high) // 2
        searching = first_low < first_high
        at = tl.load(column_values + tl.load(column_order + middle, mask=searching, other=0))
        below = searching & (at < value)
        first_low = tl.where(below, middle + 1, first_low)
        first_high = tl.where(searching & (at >= value), middle, first_high)

        middle = (last_low + last_high) // 2
        searching = last_low < last_high
        at = tl.load(column_values + tl.load(column_order + middle, mask=searching, other=0))
        below = searching & (at <= value)
        last_low = tl.where(below, middle + 1, last_low)
        last_high = tl.where(searching & (at > value), middle, last_high)
    tl.store(drop_begin + rows, first_low.to(tl.int32), mask=row_valid)
    tl.store(drop_end + rows, last_low.to(tl.int32), mask=row_valid)
