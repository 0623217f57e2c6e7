"""The forward kernel, which also counts, and its launcher."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mcl_kernels.backends.triton import current_device, product_precision
from mcl_kernels.logsumexp.gpu_common import Rows, Side
from mcl_kernels.logsumexp.triton.arguments import common_arguments
from mcl_kernels.logsumexp.triton.tiles import (
    add_to_logsumexp,
    column_range,
    finite_or_zero,
    load_columns,
    load_rows,
    multiply_tiles,
    skip_hole,
    where_kept,
)


@triton.jit(do_not_specialize=["n"])
def forward_kernel(
    rows,  # RowArguments of N rows
    columns,  # ColumnArguments
    threshold,  # [N]; None: the logsumexp is computed
    result,  # [N]
    n, width,
    SCALE_STRIDE: tl.constexpr, SKIPS_TILES: tl.constexpr,
    OPERAND: tl.constexpr, ACCUMULATOR: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, FEATURES: tl.constexpr, ONE_PART: tl.constexpr,
):  # fmt: skip
    """result_i = log sum_j exp(s_ij) of ROWS sorted rows, by a running maximum and sum: 1 unit of products.

    With a threshold, the number of kept columns with not (<x_i, y_j> <= threshold_i), so that NaN counts as above.
    """
    tile = load_rows(rows, tl.program_id(0), n, width, SCALE_STRIDE, ROWS, FEATURES, ONE_PART, OPERAND)
    limit = tl.load(threshold + tile.row)[:, None] if threshold is not None else None

    maximum = tl.full((ROWS,), float("-inf"), ACCUMULATOR)
    total = tl.zeros((ROWS,), ACCUMULATOR if threshold is None else tl.int64)
    compared = column_range(tile, SKIPS_TILES, COLUMNS)
    for start in range(compared.begin, compared.stop, COLUMNS):
        others = load_columns(
            columns, skip_hole(start, compared, SKIPS_TILES), compared.end, width, COLUMNS, FEATURES, ONE_PART, OPERAND
        )
        products = multiply_tiles(
            rows, tile, columns, others, width, ROWS, COLUMNS, FEATURES, ONE_PART, OPERAND, ACCUMULATOR, PRECISION
        )
        if threshold is None:
            logits = where_kept(products * tile.scale[:, None], float("-inf"), rows, tile, columns, others, COLUMNS)
            maximum, total = add_to_logsumexp(maximum, total, logits)
        else:
            above = tl.where(products <= limit, 0, 1)
            total += tl.sum(where_kept(above, 0, rows, tile, columns, others, COLUMNS), 1).to(tl.int64)
    if threshold is None:
        total = finite_or_zero(maximum) + tl.log(total)
    tl.store(result + tile.row, total, mask=tile.valid)


def run_forward(
    rows: Rows, columns: Side, scale: Tensor, negatives: str, result: Tensor, threshold: Tensor | None
) -> None:
    """Writes the logsumexp of each row to `result`; with a threshold the number of its kept columns above that."""
    if len(result) == 0:
        return
    precision = product_precision(rows.side.x, columns.x, scale)
    if threshold is not None and precision == "tf32":
        precision = "tf32x3"  # thresholds are products that torch computed in fp32
    arguments = common_arguments("forward", rows, columns, scale, negatives, precision)
    with current_device(result):
        forward_kernel[(-(-len(result) // arguments["ROWS"]),)](**arguments, threshold=threshold, result=result)
