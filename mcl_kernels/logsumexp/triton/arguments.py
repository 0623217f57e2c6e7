"""Arguments of the kernels, as their launchers build them: tensors in groups, sizes, constants and launch options.

A group is one argument. Triton specialises a kernel on the fields that are None and on those that are 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mcl_kernels.backends.triton_launch import launch
from mcl_kernels.logsumexp import gpu_common
from mcl_kernels.logsumexp.gpu_common import Rows, Side, Terms
from mcl_kernels.logsumexp.triton.copies import RangeArguments, SourceArguments, VectorArguments, copy_kernel
from mcl_kernels.logsumexp.triton.tile_table import Tiles
from mcl_kernels.logsumexp.triton.work_list import COUNTED, WorkArguments, sum_units_kernel


class RowArguments(NamedTuple):
    """The side whose rows are owned."""

    x: Tensor  # [N, D]
    stride: int  # from row to row
    step: int  # from feature to feature
    order: Tensor  # int64 [N], original row indices in sorted order
    begin: Tensor  # int64 [N], by sorted row the sorted columns that it attends to
    end: Tensor
    drop_begin: Tensor | None  # int32 [N], by sorted row those among them that it drops; None: no row drops any
    drop_end: Tensor | None
    ids: Tensor | None  # int64 [padded], sorted, if a row's own id can be that of any column
    scale: Tensor  # [] or [N]


class ColumnArguments(NamedTuple):
    """The other side, whose rows are the columns."""

    ids: Tensor | None  # int64 [padded], sorted, if rows have them


class TermArguments(NamedTuple):
    """Terms of the weights W_ij = row_weight_i exp(s_ij - row_lse_i) + column_weight_j exp(s_ij - column_lse_j).

    Vectors of columns are sorted and padded; the shift of an LSE and the weight are those of `tiles.shifted`.
    """

    row_lse: Tensor | None  # [N], None: no such term
    row_weight: Tensor | None
    column_shift: Tensor | None  # [padded], None: no such term
    column_weight: Tensor | None
    column_factor: Tensor | None  # weight * exp(-LSE)
    column_scale: Tensor | None  # scale of the logits in place of the rows'
    fp16_scale: Tensor | None  # [], power of 2 that brings weights into the range of fp16, if operands are fp16


class Copy(NamedTuple):
    """Sorted copy of a side."""

    x: Tensor  # [splits, padded, width]
    largest: Tensor | None  # [blocks], largest magnitude of a feature, if rows are split


class Copies:
    """Sorted copies of the sides of one forward or backward pass, which its launches share."""

    def __init__(self) -> None:
        self.of_side: dict[int, Copy] = {}


class Prepared(NamedTuple):
    """Arguments of a main kernel that both passes have."""

    arguments: dict[str, Any]
    terms: TermArguments | None
    work: WorkArguments
    row_tiles: int


def prepare(
    copies: Copies, tiles: Tiles, rows: Rows, columns: Side, scale: Tensor, negatives: str, terms: Terms | None = None
) -> Prepared:
    """Copies both sides into sorted order, counts the work, and returns the arguments of the kernel: two launches."""
    side, n, m = rows.side, rows.side.x.shape[0], columns.x.shape[0]
    is_self, skips_tiles = columns is side, negatives == "different"
    blocks, column_blocks = tiles.blocks(n), tiles.blocks(m)
    new = scale.new_empty
    ids, column_ids = None, None
    if gpu_common.compares_ids(side, negatives):
        ids = side.order.new_empty(blocks * tiles.rows)
        column_ids = ids if is_self else side.order.new_empty(column_blocks * tiles.rows)
    source, copy = _source(copies, tiles, side, ids)
    column_source, column_copy = (None, copy) if is_self else _source(copies, tiles, columns, column_ids)

    row_tiles = -(-n // tiles.rows)
    by_tile = side.order.new_empty(4 if skips_tiles else 2, row_tiles, dtype=torch.int32)
    first, units, hole_begin, hole = by_tile if skips_tiles else (*by_tile, None, None)
    ranges = RangeArguments(
        rows.begin, rows.end, rows.drop_begin if skips_tiles else None, rows.drop_end if skips_tiles else None,
        first, hole_begin, hole, units,
    )  # fmt: skip
    vectors, term_arguments = None, None
    if terms is not None:
        fp16_scale = terms.fp16_scale if tiles.operand == torch.float16 else None
        row_lse, row_weight = terms.row or (None, None)
        term_arguments = TermArguments(row_lse, row_weight, None, None, None, None, fp16_scale)
        if terms.column is not None:
            vectors = _vectors(*terms.column, terms.column_scale, fp16_scale, column_blocks, tiles.rows)
            term_arguments = TermArguments(
                row_lse, row_weight, vectors.copied_shift, vectors.copied_weight, vectors.copied_factor,
                vectors.copied_scale, fp16_scale,
            )  # fmt: skip
    constants = {"ROWS": tiles.rows, "COLUMNS": tiles.columns, "WIDTH": tiles.width, "SPLITS": tiles.splits}
    launch(
        copy_kernel, (blocks + (0 if is_self else column_blocks),),
        rows=source, columns=column_source, ranges=ranges, vectors=vectors, n=n, m=m, width=side.x.shape[1],
        SKIPS_TILES=skips_tiles, CHUNK=tiles.copied, **constants, enable_fp_fusion=True,
    )  # fmt: skip
    prefix = side.order.new_empty(row_tiles + 1)
    work = WorkArguments(prefix, first, hole_begin, hole, new(2, dtype=torch.float32))
    launch(
        sum_units_kernel, (1,), units, copy.largest, column_copy.largest,
        None if vectors is None else vectors.exponent, prefix, work.limits,
        row_tiles, blocks, column_blocks, COUNTED=COUNTED, enable_fp_fusion=True,
    )  # fmt: skip
    drops = rows.drop_begin, rows.drop_end
    arguments = {
        "row_copy": _readable(copy.x, tiles, tiles.rows), "column_copy": _readable(column_copy.x, tiles, tiles.columns),
        "rows": RowArguments(
            side.x, side.x.stride(0), side.x.stride(1), side.order, rows.begin, rows.end, *drops, ids, scale
        ),
        "columns": ColumnArguments(column_ids), "work": work, "n": n, "m": m, "row_tiles": row_tiles,
        "SCALE_STRIDE": scale.ndim, "SKIPS_TILES": skips_tiles, "FEATURES": tiles.features, **constants,
        "ACCUMULATOR": tl.float64 if scale.dtype == torch.float64 else tl.float32, "PRECISION": tiles.precision,
        "num_warps": tiles.warps, "num_stages": tiles.stages, "enable_fp_fusion": True,
    }  # fmt: skip
    return Prepared(arguments, term_arguments, work, row_tiles)


def _source(copies: Copies, tiles: Tiles, side: Side, ids: Tensor | None) -> tuple[SourceArguments, Copy]:
    """Arguments of the copy of a side, and the copy; x is None if it is there already."""
    x, copy = side.x, copies.of_side.get(id(side))
    copied_before = copy is not None
    if copy is None:
        blocks = tiles.blocks(x.shape[0])
        largest = x.new_empty(blocks, dtype=torch.float32) if tiles.splits > 1 else None
        # A product may read features past the width of the last row.
        size = tiles.splits * blocks * tiles.rows * tiles.width + tiles.gradients
        copy = copies.of_side[id(side)] = Copy(x.new_empty(size, dtype=tiles.operand), largest)
    source = SourceArguments(
        None if copied_before else x, x.stride(0), x.stride(1), side.order, copy.x, copy.largest,
        None if ids is None else side.ids, ids,
    )  # fmt: skip
    return source, copy


def _vectors(
    lse: Tensor, weight: Tensor, scale: Tensor | None, fp16_scale: Tensor | None, blocks: int, rows: int
) -> VectorArguments:
    """Arguments of the copies of the columns' vectors."""
    size = blocks * rows
    shift, copied_weight, factor = lse.new_empty(3, size).unbind()
    copied_scale = None if scale is None else scale.new_empty(size)
    exponent = lse.new_empty(blocks, dtype=torch.float32)
    return VectorArguments(lse, weight, scale, fp16_scale, shift, copied_weight, factor, copied_scale, exponent)


def _readable(copy: Tensor, tiles: Tiles, rows: int) -> Any:
    """The copy as kernels read it: by the bulk copies of sm_90 and later, or by pointers."""
    if not tiles.descriptors:
        return copy
    width = tiles.width
    shape = [copy.numel() // width, width]
    return TensorDescriptor(copy, shape, [width, 1], [rows, tiles.features])
