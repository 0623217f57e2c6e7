"""The kernel that finds the columns that rows drop, and its launcher."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mcl_kernels.backends.triton import current_device

ROWS = 256  # of a program


@triton.jit(do_not_specialize=["n", "steps"])
def find_dropped_kernel(
    row_order,  # int64 [N]
    row_begin,  # int64 [N], sorted
    row_end,
    row_values,  # int64 [N]
    column_order,  # int64 [M]
    column_values,  # int64 [M]
    drop_begin,  # int32 [N], sorted
    drop_end,
    n,
    steps,
    ROWS: tl.constexpr,
):
    """Finds for ROWS sorted rows the columns of their value among those that they attend to, by bisection.

    Columns are sorted by value within a row's range: `steps` steps find the first and the last.
    """
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


def find_dropped(rows: list[Tensor], columns: list[Tensor], drop_begin: Tensor, drop_end: Tensor) -> None:
    """Writes begin and end of the sorted columns that each sorted row drops, int32 [N].

    `rows` are their order, begin, end and values; `columns` their order and values.
    """
    n, (column_order, column_values) = len(drop_begin), columns
    if n:
        with current_device(drop_begin):
            find_dropped_kernel[(-(-n // ROWS),)](
                *rows, column_order, column_values, drop_begin, drop_end, n, len(column_order).bit_length(), ROWS=ROWS
            )
