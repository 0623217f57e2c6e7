"""Steps of the forward and the backward kernel on one tile.

A tile is ROWS sorted rows against COLUMNS sorted columns. Tiles do not align with clusters: a tile of rows is compared
with the columns from the first of its first row's cluster to the last of its last row's, so the grid depends on N
alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from mcl_kernels.backends.triton_device import load_features, multiply


# Triton 3.6 cannot return None in a tuple: a field that a kernel does not use holds some tensor.
class RowTile(NamedTuple):
    """Sorted rows of a program."""

    row: Any  # [ROWS], original row indices
    valid: Any  # [ROWS], false past the last row
    begin: Any  # [ROWS], the sorted columns that each row attends to
    end: Any
    drop_begin: Any  # [ROWS], those among them that it drops, if rows drop any
    drop_end: Any
    ids: Any  # [ROWS], if rows have them
    scale: Any  # [ROWS]
    offsets: Any  # [ROWS], of their features
    features: Any  # [ROWS, FEATURES], if all features are one part


class ColumnTile(NamedTuple):
    """Sorted columns that a tile of rows is compared with."""

    start: Any  # sorted position of the first
    column: Any  # [COLUMNS], original row indices
    valid: Any  # [COLUMNS], false past the last column
    offsets: Any  # [COLUMNS], of their features
    features: Any  # [COLUMNS, FEATURES], if all features are one part


class ColumnRange(NamedTuple):
    """Sorted columns that a tile of rows is compared with: begin to end, with SKIPS_TILES without those of a hole."""

    begin: Any
    end: Any
    stop: Any  # end less the length of the hole: where a loop over the remaining columns stops
    hole_begin: Any
    hole: Any  # its length


@triton.jit
def load_rows(
    rows, tile, n, width, SCALE_STRIDE: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr,
    ONE_PART: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Returns the RowTile number `tile` of RowArguments."""
    sorted_row = tile * ROWS + tl.arange(0, ROWS)
    valid = sorted_row < n
    row = tl.load(rows.order + sorted_row, mask=valid, other=0)
    begin = tl.load(rows.begin + sorted_row, mask=valid, other=0).to(tl.int32)
    end = tl.load(rows.end + sorted_row, mask=valid, other=0).to(tl.int32)
    drop_begin, drop_end, ids, features = end, end, row, row
    if rows.drop_begin is not None:
        drop_begin = tl.load(rows.drop_begin + sorted_row, mask=valid, other=0)
        drop_end = tl.load(rows.drop_end + sorted_row, mask=valid, other=0)
    if rows.ids is not None:
        ids = tl.load(rows.ids + row)
    scale = tl.load(rows.scale + row * SCALE_STRIDE)
    offsets = row * rows.stride
    if ONE_PART:
        features = load_features(rows.x, offsets, valid, rows.step, width, 0, FEATURES, OPERAND)
    return RowTile(row, valid, begin, end, drop_begin, drop_end, ids, scale, offsets, features)


@triton.jit
def load_columns(
    columns, start, end, width, COLUMNS: tl.constexpr, FEATURES: tl.constexpr, ONE_PART: tl.constexpr,
    OPERAND: tl.constexpr,
):  # fmt: skip
    """Returns the ColumnTile of the sorted columns from `start` on, before `end`."""
    sorted_column = start + tl.arange(0, COLUMNS)
    valid = sorted_column < end
    column = tl.load(columns.order + sorted_column, mask=valid, other=0)
    offsets = column * columns.stride
    features = column
    if ONE_PART:
        features = load_features(columns.x, offsets, valid, columns.step, width, 0, FEATURES, OPERAND)
    return ColumnTile(start, column, valid, offsets, features)


@triton.jit
def multiply_tiles(
    rows, row_tile, columns, column_tile, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FEATURES: tl.constexpr,
    ONE_PART: tl.constexpr, OPERAND: tl.constexpr, ACCUMULATOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Returns the products <x_i, y_j> of a tile [ROWS, COLUMNS]."""
    products = tl.zeros((ROWS, COLUMNS), ACCUMULATOR)
    if ONE_PART:
        products = multiply(row_tile.features, tl.trans(column_tile.features), products, PRECISION)
    else:
        for first in range(0, width, FEATURES):
            a = load_features(rows.x, row_tile.offsets, row_tile.valid, rows.step, width, first, FEATURES, OPERAND)
            b = load_features(
                columns.x, column_tile.offsets, column_tile.valid, columns.step, width, first, FEATURES, OPERAND
            )
            products = multiply(a, tl.trans(b), products, PRECISION)
    return products


@triton.jit
def column_range(row_tile, SKIPS_TILES: tl.constexpr, COLUMNS: tl.constexpr):
    """Returns the ColumnRange of a tile of rows, with SKIPS_TILES without the tiles of columns that every row drops."""
    begin, end = union(row_tile.begin, row_tile.end)
    stop, hole_begin, hole = end, end, end
    if SKIPS_TILES:
        hole_begin, hole = dropped_tiles(row_tile, begin, end, COLUMNS)
        stop = end - hole
    return ColumnRange(begin, end, stop, hole_begin, hole)


@triton.jit
def skip_hole(start, columns, SKIPS_TILES: tl.constexpr):
    """Returns the sorted column at `start` in a ColumnRange without its hole."""
    if SKIPS_TILES:
        start = tl.where(start < columns.hole_begin, start, start + columns.hole)
    return start


@triton.jit
def union(begin, end):
    """Returns the first begin and the last end of the ranges that are not empty; 0 and 0 if all are."""
    last = tl.max(tl.where(begin < end, end, 0), 0)
    # Not above the last: the compiler adds to the begin of an empty loop, which must not overflow.
    return tl.minimum(tl.min(tl.where(begin < end, begin, 0x7FFFFFFF), 0), last), last


@triton.jit
def dropped_tiles(row_tile, begin, end, COLUMNS: tl.constexpr):
    """Returns begin and length of the tiles of columns, counted from `begin`, that every row drops completely."""
    attends = row_tile.begin < row_tile.end
    drop_begin = tl.max(tl.where(attends, row_tile.drop_begin, 0), 0)
    drop_end = tl.min(tl.where(attends, row_tile.drop_end, 0x7FFFFFFF), 0)
    # The last tile is dropped completely too if all its columns are: its rest lies past the end.
    drop_end = tl.where(drop_end < end, drop_end, end + COLUMNS - 1)
    hole_begin = begin + (drop_begin - begin + COLUMNS - 1) // COLUMNS * COLUMNS
    hole = begin + (drop_end - begin) // COLUMNS * COLUMNS - hole_begin
    return hole_begin, tl.where((begin < end) & (hole > 0), hole, 0)


@triton.jit
def where_kept(values, otherwise, rows, row_tile, columns, column_tile, COLUMNS: tl.constexpr):
    """Returns the values of a tile, `otherwise` for pairs that are not kept.

    Masks are computed only for tiles in which a pair may not be kept.
    """
    start, stop = column_tile.start, column_tile.start + COLUMNS
    mixed = (tl.max(row_tile.begin, 0) > start) | (tl.min(row_tile.end, 0) < stop)
    if rows.drop_begin is not None:
        drop_begin, drop_end = union(row_tile.drop_begin, row_tile.drop_end)
        mixed = mixed | ((drop_begin < stop) & (drop_end > start))
    if rows.ids is not None:
        mixed = True
    if mixed:
        sorted_column = (start + tl.arange(0, COLUMNS))[None, :]
        keep = (sorted_column >= row_tile.begin[:, None]) & (sorted_column < row_tile.end[:, None])
        if rows.drop_begin is not None:
            keep = keep & (
                (sorted_column < row_tile.drop_begin[:, None]) | (sorted_column >= row_tile.drop_end[:, None])
            )
        if rows.ids is not None:
            column_ids = tl.load(columns.ids + column_tile.column, mask=column_tile.valid, other=0)
            keep = keep & (row_tile.ids[:, None] != column_ids[None, :])
        values = tl.where(keep, values, otherwise)
    return values


@triton.jit
def add_to_logsumexp(maximum, total, logits):
    """Returns the running maximum of each row and the sum of exp(logit - maximum), with a tile of logits added."""
    larger = tl.maximum(maximum, tl.max(logits, 1))
    shift = finite_or_zero(larger)
    total = total * tl.exp(maximum - shift) + tl.sum(tl.exp(logits - shift[:, None]), 1)
    return larger, total


@triton.jit
def finite_or_zero(maximum):
    """Returns what is subtracted from logits: 0 for an infinite maximum, so that -inf stays -inf, and inf stays inf."""
    return tl.where(tl.abs(maximum) == float("inf"), 0.0, maximum)
