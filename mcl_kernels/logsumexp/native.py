"""The operation on the processor: `csrc/cpu`, which `_native` finds or builds.

    forward   b_i = log sum_j exp(s_ij), c_j = log sum_i exp(s_ij)
    backward  W_ij = where(keep_ij, gb_i exp(s_ij - b_i) + gc_j exp(s_ij - c_j), 0)
              dq_i = scale_i sum_j W_ij k_j,  dk_j = sum_i scale_i W_ij q_i,  dscale_i = sum_j W_ij <q_i, k_j>

Rows are sorted by (label, id) and met in blocks, each pair of blocks by one task. Tasks that share a block run in one
order, so the bits of a result are those of the machine (its instructions and how many cores it has), whatever the
number of threads. In the self form a pair is met once, for both its rows.

Cost in products over the kept pairs: 0.5 + 1.5 (self), 1 + 3 (otherwise). Memory beyond inputs and outputs: the
blocks that are being worked on, at most 2 (N + M) D fp32 or 16 MiB; fp32 gradients of half-precision inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mcl_kernels.backends import native
from mcl_kernels.logsumexp.pairs import Pairs, Plan


def _ops() -> Any:
    native.load()
    return torch.ops.mcl_kernels_native


def forward(
    query: Tensor, key: Tensor | None, scale: Tensor, pairs: Pairs, bidirectional: bool
) -> tuple[Tensor, Tensor, Plan]:
    """Row LSE [N], column LSE ([M] where bidirectional, else [0]) and the plan."""
    row_lse, column_lse, *plan = _ops().masked_lse_forward(
        [query, key, scale, *pairs[:4]], pairs.negatives, bidirectional
    )
    return row_lse, column_lse, Plan(*plan)


def backward(
    grad_row: Tensor,  # [N], the gradient of the row LSE
    grad_column: Tensor,  # [M] where bidirectional, else [0]
    query: Tensor,
    key: Tensor | None,
    scale: Tensor,
    pairs: Pairs,
    row_lse: Tensor,
    column_lse: Tensor,
    plan: Plan,
    bidirectional: bool,
    needs_grad: tuple[bool, bool, bool],  # of query, key, scale
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and scale; [0] for one that is not needed (and for the key of the self form)."""
    gradients: tuple[Tensor, Tensor, Tensor] = _ops().masked_lse_backward(
        [query, key, scale, *pairs[:4]],
        [row_lse, column_lse, *plan],
        [grad_row, grad_column],
        pairs.negatives,
        bidirectional,
        list(needs_grad),
    )
    return gradients


def count_above(
    query: Tensor,
    key: Tensor,
    threshold: Tensor,  # [N]
    pairs: Pairs,
) -> Tensor:
    """For each query, how many kept keys have not <q_i, k_j> <= threshold_i; int64 [N]."""
    count: Tensor = _ops().count_above([query, key, None, *pairs[:4]], threshold, pairs.negatives)
    return count
