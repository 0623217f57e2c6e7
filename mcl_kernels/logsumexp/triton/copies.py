"""Sorted copies: the rows of a side in sorted order, contiguous, padded, in the type that products take.

Kernels read tiles from them in whole lines, whatever the strides and the dtype of the rows. Rows that tensor cores
multiply as sums of bfloat16 numbers are split here, once.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from mcl_kernels.backends.triton_device import rounded
from mcl_kernels.logsumexp.triton.tiles import shifted, union


class SourceArguments(NamedTuple):
    """Rows to copy, and the copy."""

    x: Tensor | None  # [N, D]; None: the copy is there
    stride: int  # from row to row
    step: int  # from feature to feature
    order: Tensor  # int64 [N], original row indices in sorted order
    copy: Tensor  # [SPLITS, padded, WIDTH]
    largest: Tensor | None  # [blocks], largest magnitude of a feature, if rows are split
    ids: Tensor | None  # int64 [N], if pairs are compared by them
    copied_ids: Tensor | None  # int64 [padded]


class RangeArguments(NamedTuple):
    """Columns that each sorted row attends to, and by tile of rows their first, the hole and the number of units."""

    begin: Tensor  # int64 [N]
    end: Tensor
    drop_begin: Tensor | None  # int32 [N]
    drop_end: Tensor | None
    first: Tensor  # int32 [row tiles]
    hole_begin: Tensor | None
    hole: Tensor | None
    units: Tensor


class VectorArguments(NamedTuple):
    """Vectors that go with columns, and their sorted, padded copies."""

    lse: Tensor  # [N]
    weight: Tensor
    scale: Tensor | None  # [N], of the columns' logits
    fp16_scale: Tensor | None  # [], factor of the weights
    copied_shift: Tensor  # [padded], of the LSE
    copied_weight: Tensor  # that goes with the shift
    copied_factor: Tensor  # weight exp(-lse)
    copied_scale: Tensor | None
    exponent: Tensor  # [blocks], largest magnitude of a finite shift


@triton.jit
def copy_features(
    source, rows, valid, row, width, padded, block, ROWS: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """Copies ROWS sorted rows; zeros past the last row and past the last feature."""
    largest = tl.zeros((ROWS,), tl.float32)
    row = row * source.stride
    for first in range(0, WIDTH, CHUNK):
        feature = first + tl.arange(0, CHUNK)
        at = source.x + row[:, None] + feature.to(tl.int64)[None, :] * source.step
        values = tl.load(at, mask=valid[:, None] & (feature < width)[None, :], other=0.0)
        to = source.copy + rows.to(tl.int64)[:, None] * WIDTH + feature[None, :]
        written = (feature < WIDTH)[None, :]
        if SPLITS == 1:
            tl.store(to, values.to(source.copy.dtype.element_ty), mask=written)
        else:
            values = values.to(tl.float32)
            largest = tl.maximum(largest, tl.max(tl.abs(values), 1))
            for split in tl.static_range(SPLITS):
                part = rounded(values, tl.bfloat16)
                tl.store(to + split * padded.to(tl.int64) * WIDTH, part, mask=written)
                # An infinity is in the first part alone.
                values = tl.where(tl.abs(values) == float("inf"), 0.0, values - part.to(tl.float32))
    if SPLITS > 1:
        tl.store(source.largest + block, tl.max(largest, 0))


@triton.jit
def copy_vectors(vectors, rows, valid, row, block):
    """Copies the vectors of sorted columns; columns past the last have shift and weight 0."""
    lse = tl.load(vectors.lse + row, mask=valid, other=0.0)
    weight = tl.load(vectors.weight + row, mask=valid, other=0.0)
    if vectors.fp16_scale is not None:
        weight = weight * tl.load(vectors.fp16_scale)
    shift, weight = shifted(lse, weight)
    tl.store(vectors.copied_shift + rows, shift)
    tl.store(vectors.copied_weight + rows, weight)
    # A column that no row keeps has shift -inf and weight 0: 0 in place of NaN.
    tl.store(vectors.copied_factor + rows, weight * tl.exp2(tl.where(shift == float("-inf"), 0.0, -shift)))
    if vectors.scale is not None:
        tl.store(vectors.copied_scale + rows, tl.load(vectors.scale + row, mask=valid, other=0.0))
    exponent = tl.max(tl.where(tl.abs(shift) < float("inf"), tl.abs(shift), 0.0), 0)
    tl.store(vectors.exponent + block, exponent.to(tl.float32))


@triton.jit
def count_units(ranges, rows, valid, tile, SKIPS_TILES: tl.constexpr, COLUMNS: tl.constexpr):
    """Stores the units of a tile of rows, its first column, and with SKIPS_TILES its hole."""
    begin = tl.load(ranges.begin + rows, mask=valid, other=0).to(tl.int32)
    end = tl.load(ranges.end + rows, mask=valid, other=0).to(tl.int32)
    first, last = union(begin, end)
    length = last - first
    if SKIPS_TILES:
        drop_begin = tl.load(ranges.drop_begin + rows, mask=valid, other=0)
        drop_end = tl.load(ranges.drop_end + rows, mask=valid, other=0)
        hole_begin, hole = dropped_tiles(begin, end, drop_begin, drop_end, first, last, COLUMNS)
        tl.store(ranges.hole_begin + tile, hole_begin)
        tl.store(ranges.hole + tile, hole)
        length = tl.maximum(length - hole, 0)
    tl.store(ranges.first + tile, first)
    tl.store(ranges.units + tile, (length + COLUMNS - 1) // COLUMNS)


@triton.jit
def dropped_tiles(begin, end, drop_begin, drop_end, first, last, COLUMNS: tl.constexpr):
    """Returns begin and length of the tiles of columns, counted from `first`, that every row drops completely."""
    attends = begin < end
    drop_begin = tl.max(tl.where(attends, drop_begin, 0), 0)
    drop_end = tl.min(tl.where(attends, drop_end, 0x7FFFFFFF), 0)
    # The last tile is dropped completely too if all its columns are: its rest lies past the end.
    drop_end = tl.where(drop_end < last, drop_end, last + COLUMNS - 1)
    hole_begin = first + (drop_begin - first + COLUMNS - 1) // COLUMNS * COLUMNS
    hole = first + (drop_end - first) // COLUMNS * COLUMNS - hole_begin
    return hole_begin, tl.where((first < last) & (hole > 0), hole, 0)


@triton.jit
def copy_side(
    source, ranges, vectors, block, n, width, SKIPS_TILES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Copies block number `block` of a side."""
    rows = block * ROWS + tl.arange(0, ROWS)
    valid = rows < n
    row = tl.load(source.order + rows, mask=valid, other=0)
    if source.x is not None:
        padded = blocks_of(n, ROWS, COLUMNS) * ROWS
        copy_features(source, rows, valid, row, width, padded, block, ROWS, WIDTH, CHUNK, SPLITS)
    if source.ids is not None:
        tl.store(source.copied_ids + rows, tl.load(source.ids + row, mask=valid, other=0))
    if vectors is not None:
        copy_vectors(vectors, rows, valid, row, block)
    if ranges is not None:
        if block * ROWS < n:
            count_units(ranges, rows, valid, block, SKIPS_TILES, COLUMNS)


@triton.jit(do_not_specialize=["n", "m"])
def copy_kernel(
    rows,  # SourceArguments of N rows
    columns,  # SourceArguments of M rows; None: the rows are the columns
    ranges,  # RangeArguments of the rows
    vectors,  # VectorArguments of the columns; None: there are none
    n, m, width,
    SKIPS_TILES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """Copies both sides, ROWS sorted rows by each program, and counts the units of each tile of rows."""
    block = tl.program_id(0)
    if columns is None:
        copy_side(rows, ranges, vectors, block, n, width, SKIPS_TILES, ROWS, COLUMNS, WIDTH, CHUNK, SPLITS)
    else:
        row_blocks = blocks_of(n, ROWS, COLUMNS)
        if block < row_blocks:
            copy_side(rows, ranges, None, block, n, width, SKIPS_TILES, ROWS, COLUMNS, WIDTH, CHUNK, SPLITS)
        else:
            block -= row_blocks
            copy_side(columns, None, vectors, block, m, width, SKIPS_TILES, ROWS, COLUMNS, WIDTH, CHUNK, SPLITS)


@triton.jit
def blocks_of(n, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Returns the number of blocks of ROWS rows of a copy, which holds a tile of columns past its last row."""
    return (n + ROWS - 1) // ROWS + (COLUMNS + ROWS - 1) // ROWS
