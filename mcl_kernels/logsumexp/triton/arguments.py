"""Arguments of the kernels, as their launchers build them: tensors in groups, sizes, constants and launch options.

A group is one argument. Triton specialises a kernel on the fields that are None and on those that are 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from mcl_kernels.backends.triton import compute_capability
from mcl_kernels.logsumexp import gpu_common
from mcl_kernels.logsumexp.gpu_common import Rows, Side
from mcl_kernels.logsumexp.triton.tile_table import choose_tiles, tile_constants


class RowArguments(NamedTuple):
    """The side whose rows the programs own."""

    x: Tensor  # [N, D]
    stride: int  # from row to row
    step: int  # from feature to feature
    order: Tensor  # int64 [N], original row indices in sorted order
    begin: Tensor  # int64 [N], by sorted row the sorted columns that it attends to
    end: Tensor
    drop_begin: Tensor | None  # int32 [N], by sorted row those among them that it drops; None: no row drops any
    drop_end: Tensor | None
    ids: Tensor | None  # int64 [N], if a row's own id can be that of any column
    scale: Tensor  # [] or [N]


class ColumnArguments(NamedTuple):
    """The other side, whose rows are the columns."""

    x: Tensor  # [M, D]
    stride: int
    step: int
    order: Tensor  # int64 [M]
    ids: Tensor | None  # int64 [M], if rows have them


class TermArguments(NamedTuple):
    """Terms of the weights W_ij = row_weight_i exp(s_ij - row_lse_i) + column_weight_j exp(s_ij - column_lse_j)."""

    row_lse: Tensor | None  # [N], None: no such term
    row_weight: Tensor | None
    column_lse: Tensor | None  # [M], None: no such term
    column_weight: Tensor | None
    column_scale: Tensor | None  # [M], scale of the logits in place of the rows'
    fp16_scale: Tensor | None  # [], power of 2 that brings weights into the range of fp16, if operands are fp16


def common_arguments(
    kernel: str, rows: Rows, columns: Side, scale: Tensor, negatives: str, precision: str
) -> dict[str, Any]:
    """Returns the arguments that the forward and the backward kernel share."""
    x, width = rows.side.x, rows.side.x.shape[1]
    tiles = choose_tiles(kernel, precision, width, compute_capability(x.device))
    compares_ids = gpu_common.compares_ids(rows.side, negatives)
    return {
        "rows": RowArguments(
            x, x.stride(0), x.stride(1), rows.side.order, rows.begin, rows.end, rows.drop_begin, rows.drop_end,
            rows.side.ids if compares_ids else None, scale,
        ),
        "columns": ColumnArguments(
            columns.x, columns.x.stride(0), columns.x.stride(1), columns.order, columns.ids if compares_ids else None
        ),
        "n": len(x), "width": width, "SCALE_STRIDE": scale.ndim, "SKIPS_TILES": negatives == "different",
        **tile_constants(kernel, precision, x.dtype, width, tiles),
        "num_warps": tiles.warps, "num_stages": tiles.stages,
    }  # fmt: skip
