"""The forward kernels, which also count, and their launcher."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mcl_kernels.backends.triton import compute_capability, current_device
from mcl_kernels.backends.triton_device import multiply_rounded
from mcl_kernels.backends.triton_launch import launch
from mcl_kernels.logsumexp.gpu_common import Rows, Side
from mcl_kernels.logsumexp.triton.arguments import Copies, prepare
from mcl_kernels.logsumexp.triton.copies import blocks_of
from mcl_kernels.logsumexp.triton.tile_table import choose_tiles, exact_precision, loss_precision
from mcl_kernels.logsumexp.triton.tiles import (
    add_to_logsumexp,
    load_features,
    load_rows,
    logsumexp_of,
    multiply_tiles,
    rescaling,
    shift_of,
    where_kept,
)
from mcl_kernels.logsumexp.triton.work_list import (
    choose_programs,
    column_of,
    find_row_tile,
    first_unit,
    has_slot,
    next_row_tile,
    program_of,
    slot_of,
    stretch_of,
)


@triton.jit(do_not_specialize=["n", "m", "row_tiles"])
def forward_kernel(
    row_copy,  # [SPLITS, padded, WIDTH], sorted copy of the N rows: a pointer or a descriptor
    column_copy,  # of the M columns
    rows,  # RowArguments
    columns,  # ColumnArguments
    work,  # WorkArguments
    threshold,  # [N]; None: the logsumexp is computed
    result,  # [N]
    partial,  # [slots, 2, ROWS], maximum and sum; with a threshold int64 [slots, ROWS]
    n, m, row_tiles,
    SCALE_STRIDE: tl.constexpr, SKIPS_TILES: tl.constexpr, ACCUMULATOR: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, FEATURES: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """result_i = log sum_j exp(s_ij), by a running maximum and sum: 1 unit of products.

    With a threshold, the number of kept columns with not (<x_i, y_j> <= threshold_i), so that NaN counts as above.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    row_stride = blocks_of(n, ROWS, COLUMNS).to(tl.int64) * ROWS
    column_stride = blocks_of(m, ROWS, COLUMNS).to(tl.int64) * ROWS
    finite = True
    if SPLITS > 1:
        finite = tl.load(work.limits + 1) * WIDTH < 1e38
    all_units = tl.load(work.prefix + row_tiles)
    unit, stop = first_unit(program, programs, all_units), first_unit(program + 1, programs, all_units)
    tile = find_row_tile(work, row_tiles, unit)
    slot = 2 * program
    while unit < stop:
        stretch = stretch_of(work, tile, unit, stop, SKIPS_TILES, COLUMNS)
        row_tile = load_rows(rows, tile, n, SCALE_STRIDE, ROWS)
        row_features = None
        if FEATURES >= WIDTH:
            row_features = load_features(row_copy, row_stride, tile * ROWS, 0, ROWS, WIDTH, FEATURES, SPLITS)
        limit = tl.load(threshold + row_tile.row)[:, None] if threshold is not None else None
        maximum = tl.full((ROWS,), float("-inf"), ACCUMULATOR)
        total = tl.zeros((ROWS,), ACCUMULATOR if threshold is None else tl.int64)
        for at in range(stretch.begin, stretch.stop, COLUMNS):
            start = column_of(stretch, at, SKIPS_TILES)
            column_features = None
            if FEATURES >= WIDTH:
                column_features = load_features(column_copy, column_stride, start, 0, COLUMNS, WIDTH, FEATURES, SPLITS)
            products = multiply_tiles(
                row_copy, row_stride, tile * ROWS, row_features, column_copy, column_stride, start, column_features,
                finite, ROWS, COLUMNS, WIDTH, FEATURES, SPLITS, ACCUMULATOR, PRECISION,
            )  # fmt: skip
            if threshold is None:
                logits = multiply_rounded(products, tl.broadcast_to(row_tile.scale[:, None], products.shape))
                logits = where_kept(logits, float("-inf"), row_tile, rows, columns, start, COLUMNS)
                maximum, total = add_to_logsumexp(maximum, total, logits)
            else:
                above = tl.where(products <= limit, 0, 1)
                total += tl.sum(where_kept(above, 0, row_tile, rows, columns, start, COLUMNS), 1).to(tl.int64)
        at = tl.arange(0, ROWS)
        if stretch.complete:
            store_result(result, row_tile.row, row_tile.valid, maximum, total, threshold)
        elif threshold is None:
            tl.store(partial + slot * 2 * ROWS + at, maximum)
            tl.store(partial + (slot * 2 + 1) * ROWS + at, total)
        else:
            tl.store(partial + slot * ROWS + at, total)
        slot = 2 * program + 1
        unit += stretch.units
        if unit < stop:
            tile = next_row_tile(work, row_tiles, tile, unit)


@triton.jit
def store_result(result, row, valid, maximum, total, threshold):
    """Stores the logsumexp of rows, or their counts."""
    if threshold is None:
        total = logsumexp_of(maximum, total)
    tl.store(result + row, total, mask=valid)


@triton.jit(do_not_specialize=["n", "row_tiles", "programs"])
def join_forward_kernel(
    order,  # int64 [N]
    prefix,
    threshold,
    result,
    partial,
    n, row_tiles, programs,
    ROWS: tl.constexpr, JOINED: tl.constexpr,
):  # fmt: skip
    """Joins the partial results of each row tile, JOINED slots at a time; a row tile without units keeps nothing."""
    tile = tl.program_id(0)
    all_units = tl.load(prefix + row_tiles)
    before, after = tl.load(prefix + tile), tl.load(prefix + tile + 1)
    first, last = tl.full((), 1, tl.int64), tl.full((), 0, tl.int64)
    if before < after:
        first, last = program_of(before, programs, all_units), program_of(after - 1, programs, all_units)
    if first != last:
        rows = tile * ROWS + tl.arange(0, ROWS)
        row = tl.load(order + rows, mask=rows < n, other=0)
        maximum = tl.full((ROWS,), float("-inf"), partial.dtype.element_ty if threshold is None else tl.float32)
        total = tl.zeros((ROWS,), partial.dtype.element_ty)
        for start in range(first, last + 1, JOINED):
            program = start + tl.arange(0, JOINED)
            joined = has_slot(program, last, programs, all_units)[:, None]
            slot = slot_of(program, programs, all_units, before)
            at = tl.arange(0, ROWS)[None, :]
            if threshold is None:
                at = partial + slot[:, None] * 2 * ROWS + at
                maxima = tl.load(at, mask=joined, other=float("-inf"))
                sums = tl.load(at + ROWS, mask=joined, other=0.0)
                larger = tl.maximum(maximum, tl.max(maxima, 0))
                shift = shift_of(larger)
                total = total * rescaling(maximum, shift) + tl.sum(sums * rescaling(maxima, shift[None, :]), 0)
                maximum = larger
            else:
                total += tl.sum(tl.load(partial + slot[:, None] * ROWS + at, mask=joined, other=0), 0)
        store_result(result, row, rows < n, maximum, total, threshold)


def run_forward(
    copies: Copies,
    rows: Rows,
    columns: Side,
    scale: Tensor,
    negatives: str,
    result: Tensor,
    threshold: Tensor | None,
    programs: int | None = None,
) -> None:
    """Writes the logsumexp of each row to `result`; with a threshold the number of its kept columns above that."""
    if result.shape[0] == 0:
        return
    x, y = rows.side.x, columns.x
    precision = loss_precision(x, y, scale)
    if threshold is not None and precision == "tf32":
        precision = exact_precision(x.device)  # thresholds are products that torch computed in fp32
    tiles = choose_tiles("forward", precision, x.dtype, x.shape[1], compute_capability(x.device))
    programs = programs or choose_programs(tiles, x.device, x.shape[0], y.shape[0])
    with current_device(x):
        prepared = prepare(copies, tiles, rows, columns, scale, negatives)
        if threshold is None:
            partial = scale.new_empty(2 * programs, 2, tiles.rows)
        else:
            partial = result.new_empty(2 * programs, tiles.rows)
        launch(forward_kernel, (programs,), **prepared.arguments, threshold=threshold, result=result, partial=partial)
        launch(
            join_forward_kernel, (prepared.row_tiles,), rows.side.order, prepared.work.prefix, threshold, result,
            partial, x.shape[0], prepared.row_tiles, programs,
            ROWS=tiles.rows, JOINED=tiles.joined, enable_fp_fusion=True,
        )  # fmt: skip
