"""The backward kernels: gradients of the rows of one side in a single pass over their columns; their launcher."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mcl_kernels.backends.triton import compute_capability, current_device
from mcl_kernels.backends.triton_device import multiply_rounded, rounded
from mcl_kernels.backends.triton_launch import launch
from mcl_kernels.logsumexp.gpu_common import Rows, Side, Terms
from mcl_kernels.logsumexp.triton.arguments import Copies, prepare
from mcl_kernels.logsumexp.triton.copies import blocks_of
from mcl_kernels.logsumexp.triton.tile_table import choose_tiles, loss_precision, operand_of
from mcl_kernels.logsumexp.triton.tiles import (
    add_product,
    exponential,
    load_features,
    load_rows,
    multiply_tiles,
    shifted,
    split_parts,
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

# Powers of 2 up to which the two factors of a weight, and their product, neither overflow nor vanish.
MAX_EXPONENT = tl.constexpr(62.0)


@triton.jit
def pair_weights(
    logits, row_shift, row_weight, row_factor, terms, start, COLUMNS: tl.constexpr, ONE_EXPONENTIAL: tl.constexpr
):  # fmt: skip
    """Returns W_ij = row_weight_i exp(s_ij - row_lse_i) + column_weight_j exp(s_ij - column_lse_j) of a tile.

    With ONE_EXPONENTIAL exp(s_ij - column_lse_j) is exp(s_ij - row_lse_i) exp(row_lse_i) exp(-column_lse_j).
    """
    at = start + tl.arange(0, COLUMNS)
    if row_shift is not None and (ONE_EXPONENTIAL or terms.column_shift is None):
        factor = row_weight
        if terms.column_shift is not None:
            factor = row_weight + row_factor * tl.load(terms.column_factor + at)[None, :]
        weights = exponential(logits, row_shift) * factor
    else:
        column_term = exponential(logits, tl.load(terms.column_shift + at)[None, :])
        weights = tl.load(terms.column_weight + at)[None, :] * column_term
        if row_shift is not None:
            weights += row_weight * exponential(logits, row_shift)
    return weights


@triton.jit
def add_columns(
    sums, stretch, row_tile, row_features, row_shift, row_weight, row_factor, row_copy, column_copy, rows, columns,
    terms, finite, row_stride, column_stride, first_feature,
    ONE_EXPONENTIAL: tl.constexpr, SKIPS_TILES: tl.constexpr,
    OPERAND: tl.constexpr, ACCUMULATOR: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, FEATURES: tl.constexpr, GRADIENTS: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """Returns the sums [ROWS, GRADIENTS] with sum_j W_ij y_j of the columns of a Stretch added."""
    for at in range(stretch.begin, stretch.stop, COLUMNS):
        start = column_of(stretch, at, SKIPS_TILES)
        features = None
        if FEATURES >= WIDTH:
            features = load_features(column_copy, column_stride, start, 0, COLUMNS, WIDTH, FEATURES, SPLITS)
        products = multiply_tiles(
            row_copy, row_stride, stretch.tile * ROWS, row_features, column_copy, column_stride, start, features,
            finite, ROWS, COLUMNS, WIDTH, FEATURES, SPLITS, ACCUMULATOR, PRECISION,
        )  # fmt: skip
        if terms.column_scale is not None:
            scale = tl.load(terms.column_scale + start + tl.arange(0, COLUMNS))
            logits = multiply_rounded(products, tl.broadcast_to(scale[None, :], products.shape))
        else:
            logits = multiply_rounded(products, tl.broadcast_to(row_tile.scale[:, None], products.shape))
        weights = pair_weights(logits, row_shift, row_weight, row_factor, terms, start, COLUMNS, ONE_EXPONENTIAL)
        weights = where_kept(weights, 0.0, row_tile, rows, columns, start, COLUMNS)
        if FEATURES < WIDTH:
            features = load_features(
                column_copy, column_stride, start, first_feature, COLUMNS, WIDTH, GRADIENTS, SPLITS
            )
        parts = split_parts(weights, OPERAND, SPLITS)
        sums = add_product(parts, features, sums, SPLITS, PRECISION, False)
    return sums


@triton.jit(do_not_specialize=["n", "m", "row_tiles"])
def backward_kernel(
    row_copy,  # [SPLITS, padded, WIDTH], sorted copy of the N rows: a pointer or a descriptor
    column_copy,  # of the M columns
    terms,  # TermArguments
    grad_x,  # [N, D] or None
    grad_scale,  # [parts, N] or None
    rows,  # RowArguments
    columns,  # ColumnArguments
    work,  # WorkArguments
    partial,  # [slots, ROWS, SUMS], unscaled sums of all parts
    n, m, row_tiles, width,
    SCALE_STRIDE: tl.constexpr, SKIPS_TILES: tl.constexpr,
    OPERAND: tl.constexpr, ACCUMULATOR: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, FEATURES: tl.constexpr, GRADIENTS: tl.constexpr,
    SUMS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """grad_x_i = scale_i sum_j W_ij y_j, and grad_scale_i = <x_i, sum_j W_ij y_j>.

    Programs (g, p) sum part p of the features, GRADIENTS of them. 1 unit of products for the logits and 1 for the sum;
    one more for each part but the first.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    first_feature = tl.program_id(1) * GRADIENTS
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
        row_shift, row_weight, row_factor = None, None, None
        one_exponential = True
        if terms.row_lse is not None:
            lse = tl.load(terms.row_lse + row_tile.row)
            weight = tl.load(terms.row_weight + row_tile.row)
            if terms.fp16_scale is not None:
                weight = weight * tl.load(terms.fp16_scale)
            shift, weight = shifted(lse, weight)
            row_shift, row_weight = shift[:, None], weight[:, None]
            if terms.column_shift is not None:
                row_factor = tl.exp2(row_shift)
                largest = tl.max(tl.where(tl.abs(lse) < float("inf"), tl.abs(shift), 0.0), 0)
                one_exponential = (largest <= MAX_EXPONENT) & (tl.load(work.limits) <= MAX_EXPONENT)
        sums = tl.zeros((ROWS, GRADIENTS), ACCUMULATOR)
        if one_exponential:
            sums = add_columns(
                sums, stretch, row_tile, row_features, row_shift, row_weight, row_factor, row_copy, column_copy, rows,
                columns, terms, finite, row_stride, column_stride, first_feature, True, SKIPS_TILES,
                OPERAND, ACCUMULATOR, PRECISION, ROWS, COLUMNS, WIDTH, FEATURES, GRADIENTS, SPLITS,
            )  # fmt: skip
        else:
            sums = add_columns(
                sums, stretch, row_tile, row_features, row_shift, row_weight, row_factor, row_copy, column_copy, rows,
                columns, terms, finite, row_stride, column_stride, first_feature, False, SKIPS_TILES,
                OPERAND, ACCUMULATOR, PRECISION, ROWS, COLUMNS, WIDTH, FEATURES, GRADIENTS, SPLITS,
            )  # fmt: skip
        sorted_row = tile * ROWS + tl.arange(0, ROWS)
        if stretch.complete:
            store_rows(
                sums, sorted_row, rows, terms, grad_x, grad_scale, n, width, tl.program_id(1), SCALE_STRIDE, GRADIENTS
            )
        else:
            at = partial + (slot.to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None] * SUMS + first_feature
            tl.store(at + tl.arange(0, GRADIENTS)[None, :], sums)
        slot = 2 * program + 1
        unit += stretch.units
        if unit < stop:
            tile = next_row_tile(work, row_tiles, tile, unit)


@triton.jit
def store_rows(
    sums, sorted_row, rows, terms, grad_x, grad_scale, n, width, part, SCALE_STRIDE: tl.constexpr,
    GRADIENTS: tl.constexpr,
):  # fmt: skip
    """Stores the gradients of sorted rows from their sums, of part number `part` of the features."""
    valid = sorted_row < n
    row = tl.load(rows.order + sorted_row, mask=valid, other=0)
    if terms.fp16_scale is not None:
        sums = sums / tl.load(terms.fp16_scale)
    feature = part * GRADIENTS + tl.arange(0, GRADIENTS)
    mask = valid[:, None] & (feature < width)[None, :]
    if grad_scale is not None:
        at = rows.x + row[:, None] * rows.stride + feature.to(tl.int64)[None, :] * rows.step
        along = tl.sum(sums * tl.load(at, mask=mask, other=0.0).to(sums.dtype), 1)
        # A row that keeps nothing may hold NaN.
        begin, end = tl.load(rows.begin + sorted_row, mask=valid), tl.load(rows.end + sorted_row, mask=valid)
        tl.store(grad_scale + part.to(tl.int64) * n + row, tl.where(begin < end, along, 0.0), mask=valid)
    if grad_x is not None:
        scale = tl.load(rows.scale + row * SCALE_STRIDE)
        gradient = rounded(sums * scale[:, None], grad_x.dtype.element_ty)
        tl.store(grad_x + row[:, None] * width + feature[None, :], gradient, mask=mask)


@triton.jit(do_not_specialize=["n", "row_tiles", "programs"])
def join_backward_kernel(
    terms, grad_x, grad_scale, rows, prefix, partial,
    n, row_tiles, programs, width,
    SCALE_STRIDE: tl.constexpr, ACCUMULATOR: tl.constexpr,
    ROWS: tl.constexpr, SUMS: tl.constexpr, GRADIENTS: tl.constexpr, PIECE: tl.constexpr, JOINED: tl.constexpr,
):  # fmt: skip
    """Joins the partial results of PIECE rows of a row tile, in the order of the programs.

    The loads of JOINED slots do not wait for one another. A row tile without units has gradient 0.
    """
    tile, piece, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    all_units = tl.load(prefix + row_tiles)
    before, after = tl.load(prefix + tile), tl.load(prefix + tile + 1)
    first, last = tl.full((), 1, tl.int64), tl.full((), 0, tl.int64)
    if before < after:
        first, last = program_of(before, programs, all_units), program_of(after - 1, programs, all_units)
    if first != last:
        row = piece * PIECE + tl.arange(0, PIECE)
        at = partial + row[:, None] * SUMS + part * GRADIENTS + tl.arange(0, GRADIENTS)[None, :]
        sums = tl.zeros((PIECE, GRADIENTS), ACCUMULATOR)
        for start in range(first, last + 1, JOINED):
            for joined in tl.static_range(JOINED):
                program = tl.zeros((PIECE,), tl.int64) + start + joined  # a vector, since masks are not scalars
                slot = slot_of(program, programs, all_units, before)[:, None]
                mask = has_slot(program, last, programs, all_units)[:, None]
                sums += tl.load(at + slot * ROWS * SUMS, mask=mask, other=0.0)
        store_rows(sums, tile * ROWS + row, rows, terms, grad_x, grad_scale, n, width, part, SCALE_STRIDE, GRADIENTS)


def run_backward(
    copies: Copies,
    rows: Rows,
    columns: Side,
    scale: Tensor,
    negatives: str,
    terms: Terms,
    grad_x: Tensor | None,
    grad_scale: Tensor | None,
    programs: int | None = None,
) -> None:
    """Writes the gradients of the rows that are given: of x [N, D], and each row's share of that of the scale [N]."""
    n, width = rows.side.x.shape
    if n == 0:
        return
    x, y = rows.side.x, columns.x
    precision = loss_precision(x, y, scale)
    tiles = choose_tiles("backward", precision, x.dtype, width, compute_capability(x.device))
    programs = programs or choose_programs(tiles, x.device, n, y.shape[0])
    sums = tiles.parts * tiles.gradients
    with current_device(x):
        prepared = prepare(copies, tiles, rows, columns, scale, negatives, terms)
        partial = scale.new_empty(2 * programs, tiles.rows, sums)
        by_part = grad_scale
        if grad_scale is not None and tiles.parts > 1:
            by_part = grad_scale.new_empty(tiles.parts, n)
        shared = {
            "terms": prepared.terms, "grad_x": grad_x, "grad_scale": by_part, "rows": prepared.arguments["rows"],
            "partial": partial, "width": width, "SCALE_STRIDE": scale.ndim, "ROWS": tiles.rows,
            "ACCUMULATOR": prepared.arguments["ACCUMULATOR"], "GRADIENTS": tiles.gradients, "SUMS": sums,
        }  # fmt: skip
        launch(backward_kernel, (programs, tiles.parts), **{**prepared.arguments, **shared}, OPERAND=operand_of(tiles))
        launch(
            join_backward_kernel, (prepared.row_tiles, tiles.rows // tiles.piece, tiles.parts),
            **shared, prefix=prepared.work.prefix, n=n, row_tiles=prepared.row_tiles, programs=programs,
            PIECE=tiles.piece, JOINED=tiles.joined, enable_fp_fusion=True,
        )  # fmt: skip
        if by_part is not None and by_part is not grad_scale:
            torch.sum(by_part, 0, out=grad_scale)
