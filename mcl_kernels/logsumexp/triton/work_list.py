"""The work list: tiles of pairs, shared evenly by a number of programs that does not depend on the labels.

A unit is one tile of columns of one tile of rows. Row tile t has units[t] of them, counted on the device, and prefix[t]
units come before it. Program g of G does the units from g W / G to (g + 1) W / G of the W in all. A row tile whose
units are all of one program is finished by it. Another's partial results go to a workspace of two slots a program: 2 g
for the row tile that the program begins with, 2 g + 1 for the one that it ends with. A second kernel joins the slots of
each row tile in the order of the programs, so sums have one order.

Source: stream-K, Osama et al. 2023 (arXiv 2301.03598).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mcl_kernels.backends.triton import multiprocessors
from mcl_kernels.logsumexp.triton.tile_table import Tiles

INTERPRETED_PROGRAMS = 3  # a row tile of the interpreter is then cut now and then
COUNTED = 1024  # row tiles that `sum_units_kernel` adds at a time


class WorkArguments(NamedTuple):
    """The work list of a side whose rows are owned."""

    prefix: Tensor  # int64 [row tiles + 1]
    first: Tensor  # int32 [row tiles], the first column that a row tile is compared with
    hole_begin: Tensor | None  # int32 [row tiles], a hole of whole tiles that every row drops; None: there are none
    hole: Tensor | None  # int32 [row tiles], its length
    limits: Tensor  # [2], of `sum_units_kernel`


def choose_programs(tiles: Tiles, device: torch.device, n: int, m: int) -> int:
    """Number of programs for n rows and m columns: as many as run at a time, not more than there may be units."""
    count = multiprocessors(device)
    at_a_time = INTERPRETED_PROGRAMS if count is None else max(1, tiles.per_multiprocessor * count // tiles.parts)
    return max(1, min(at_a_time, -(-n // tiles.rows) * -(-m // tiles.columns)))


# Triton 3.6 cannot return None in a tuple: a field that a kernel does not use holds some tensor.
class Stretch(NamedTuple):
    """Successive units of one row tile."""

    tile: Any  # number of the row tile
    begin: Any  # the first column; `begin` to `stop` counts columns without those of the hole
    stop: Any
    complete: Any  # whether these are all units of the row tile
    units: Any
    hole_begin: Any  # the hole, if there are any
    hole: Any  # its length


@triton.jit
def first_unit(program, programs, units):
    """Returns the first unit of a program, of all `units`."""
    return tl.cast(program, tl.int64) * units // programs


@triton.jit
def program_of(unit, programs, units):
    """Returns the program that does a unit."""
    return ((unit + 1) * programs - 1) // units


@triton.jit
def slot_of(program, programs, units, before):
    """Returns the slot of a program's partial result of a row tile; `before` units come before the row tile.

    A program that begins within the row tile has it in its first slot.
    """
    return tl.where(first_unit(program, programs, units) >= before, 2 * program, 2 * program + 1)


@triton.jit
def has_slot(program, last, programs, units):
    """Returns whether a program up to the `last` of a row tile has a partial result: those without units have none."""
    begins, ends = first_unit(program, programs, units), first_unit(program + 1, programs, units)
    return (program <= last) & (begins < ends)


@triton.jit
def find_row_tile(work, row_tiles, unit):
    """Returns the last row tile with prefix <= unit, by bisection: the one that the unit is of."""
    low, high = tl.full((), 0, tl.int32), row_tiles
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(work.prefix + middle) <= unit:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def stretch_of(work, tile, unit, stop, SKIPS_TILES: tl.constexpr, COLUMNS: tl.constexpr):
    """Returns the Stretch of a row tile from a unit on, before unit `stop`."""
    before, after = tl.load(work.prefix + tile), tl.load(work.prefix + tile + 1)
    units = tl.minimum(stop, after) - unit
    begin = tl.load(work.first + tile) + (unit - before).to(tl.int32) * COLUMNS
    end = begin + units.to(tl.int32) * COLUMNS
    hole_begin, hole = end, end
    if SKIPS_TILES:
        hole_begin, hole = tl.load(work.hole_begin + tile), tl.load(work.hole + tile)
    return Stretch(tile, begin, end, units == after - before, units, hole_begin, hole)


@triton.jit
def column_of(stretch, start, SKIPS_TILES: tl.constexpr):
    """Returns the sorted column at `start` of a Stretch, whose columns leave out the hole."""
    if SKIPS_TILES:
        start = tl.where(start < stretch.hole_begin, start, start + stretch.hole)
    return start


@triton.jit
def next_row_tile(work, row_tiles, tile, unit):
    """Returns the row tile of a unit that is the first of its row tile: the next one that has units."""
    tile += 1
    while (tile < row_tiles) & (tl.load(work.prefix + tl.minimum(tile + 1, row_tiles)) <= unit):
        tile += 1
    return tile


@triton.jit(do_not_specialize=["row_tiles", "row_blocks", "column_blocks"])
def sum_units_kernel(
    units,  # int32 [row tiles]
    row_largest,  # [row blocks], largest magnitude of a feature; None: not needed
    column_largest,  # [column blocks]
    column_exponent,  # [column blocks], largest magnitude of an LSE in powers of 2; None: not needed
    prefix,  # int64 [row tiles + 1]
    limits,  # [2]
    row_tiles,
    row_blocks,
    column_blocks,
    COUNTED: tl.constexpr,
):
    """Sums the units of row tiles, and reduces what the copies of both sides found.

    limits[0] is the largest exponent of a column's LSE; limits[1] bounds |x_id y_jd|.
    """
    total = tl.full((), 0, tl.int64)
    tl.store(prefix, total)
    for start in range(0, row_tiles, COUNTED):
        at = start + tl.arange(0, COUNTED)
        counted = tl.load(units + at, mask=at < row_tiles, other=0).to(tl.int64)
        tl.store(prefix + 1 + at, total + tl.cumsum(counted, 0), mask=at < row_tiles)
        total += tl.sum(counted, 0)
    if column_exponent is not None:
        tl.store(limits, largest(column_exponent, column_blocks, COUNTED))
    if row_largest is not None:
        bound = largest(row_largest, row_blocks, COUNTED) * largest(column_largest, column_blocks, COUNTED)
        tl.store(limits + 1, bound)


@triton.jit
def largest(values, n, BLOCK: tl.constexpr):
    """Returns the largest of n values that are not negative."""
    found = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        found = tl.maximum(found, tl.load(values + at, mask=at < n, other=0.0))
    return tl.max(found, 0)
