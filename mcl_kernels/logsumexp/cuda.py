"""The operation in CUDA C++: `csrc/cuda`, for GPUs and systems on which Triton is unavailable.

    forward   b_i = log sum_j exp(s_ij), and c_j alike with rows and columns exchanged
    backward  W_ij = where(keep_ij, gb_i exp(s_ij - b_i) + gc_j exp(s_ij - c_j), 0)
              dq_i = scale_i sum_j W_ij k_j,  dk_j = sum_i scale_i W_ij q_i,  dscale_i = sum_j W_ij <q_i, k_j>

A tile of sorted rows is compared with the columns from the first of its first cluster to the last of its last one. A
first launch reads these ranges and lists the column tiles of all row tiles, and the blocks of the second share them
equally: the grid depends on N, M and the GPU alone, and nothing waits for the GPU. Row tiles that several blocks share
are left in parts in a workspace, and a third launch adds the parts in one order: no atomics.

Cost in products over the kept pairs, rounded up to tiles: forward 1 (2 where bidirectional); backward 2 (self), 4
(otherwise), and one more per side for every 256 features but the first. fp16 is multiplied on tensor cores, and so is
bf16 from compute capability 8.0 on; fp32 and mixed inputs are multiplied in fp32.
Memory beyond inputs and outputs: the plan, a few vectors [N] and [M], a workspace of at most 64 MiB, and 24 bytes
for each tile of 64 rows.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from mcl_kernels.backends import cuda
from mcl_kernels.logsumexp import gpu_common
from mcl_kernels.logsumexp.gpu_common import Rows, Side, Terms


def _common_arguments(rows: Rows, columns: Side, scale: Tensor, negatives: str) -> tuple[Any, ...]:
    """Returns the arguments that the forward and the backward kernel share."""
    side = rows.side
    compares_ids = gpu_common.compares_ids(side, negatives)
    return (
        [side.x, side.order, *rows[1:], side.ids if compares_ids else None],
        [columns.x, columns.order, columns.ids if compares_ids else None],
        negatives == "different",
        scale,
    )


def _run_forward(
    rows: Rows,
    columns: Side,
    scale: Tensor,
    negatives: str,
    result: Tensor,
    threshold: Tensor | None,
    *,
    programs: int | None = None,
) -> None:
    """Computes the LSE of each row, or the count above its threshold; `programs` share the work."""
    arguments = _common_arguments(rows, columns, scale, negatives)
    cuda.ops().masked_lse_forward(*arguments, threshold, result, programs or 0)


def _run_backward(
    rows: Rows,
    columns: Side,
    scale: Tensor,
    negatives: str,
    terms: Terms,
    grad_x: Tensor | None,
    grad_scale: Tensor | None,
    *,
    programs: int | None = None,
) -> None:
    """Computes the gradients that are given a tensor; `programs` share the work."""
    absent = None, None
    fp16_scale = terms.fp16_scale if _multiplies_float16(rows.side, columns) else None
    cuda.ops().masked_lse_backward(
        *_common_arguments(rows, columns, scale, negatives),
        [*(terms.row or absent), *(terms.column or absent), terms.column_scale, fp16_scale],
        grad_x,
        grad_scale,
        programs or 0,
    )


def _multiplies_float16(rows: Side, columns: Side) -> bool:
    return rows.x.dtype == columns.x.dtype == torch.float16


forward = partial(gpu_common.forward, _run_forward)
backward = partial(gpu_common.backward, _run_backward)
count_above = partial(gpu_common.count_above, _run_forward)
