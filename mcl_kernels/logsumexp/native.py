"""The operation on the CPU: `csrc/cpu`, which `backends.native` finds or builds.

    forward   b_i = log sum_j exp(s_ij), c_j = log sum_i exp(s_ij)
    backward  W_ij = where(keep_ij, gb_i exp(s_ij - b_i) + gc_j exp(s_ij - c_j), 0)
              dq_i = scale_i sum_j W_ij k_j,  dk_j = sum_i scale_i W_ij q_i,  dscale_i = sum_j W_ij <q_i, k_j>

Rows are sorted by (label, id) and compared in blocks, one task for each pair of blocks. Tasks that share a block run in
one order, so the bits of a result depend on the machine (its instructions and number of cores) but not on the number of
threads. In the self form a pair is computed once, for both its rows.

Cost in products over the kept pairs, forward + backward: 0.5 + 1.5 (self), 1 + 3 (otherwise). Memory beyond inputs and
outputs: the blocks in work, at most 2 (N + M) D fp32 or 16 MiB; fp32 gradients of half-precision inputs.
"""

from __future__ import annotations

from torch import Tensor

from mcl_kernels.backends.native import ops
from mcl_kernels.logsumexp.inputs import Inputs, LseGradients, Saved, Wanted


def forward(inputs: Inputs) -> Saved:
    """Log-sum-exps and the plan."""
    results = ops().masked_lse_forward(inputs.tensors(), inputs.pairs.negatives, inputs.bidirectional)
    return Saved.unflatten(results)


def backward(inputs: Inputs, saved: Saved, grads: LseGradients, wanted: Wanted) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and scale; [0] for one that is not wanted (and for the key of the self form)."""
    row_lse, column_lse, plan = saved
    gradients: tuple[Tensor, Tensor, Tensor] = ops().masked_lse_backward(
        inputs.tensors(), (row_lse, column_lse, *plan[:4]), grads, inputs.pairs.negatives, inputs.bidirectional, wanted
    )
    return gradients


def count_above(inputs: Inputs, threshold: Tensor) -> Tensor:
    """Number of kept keys of each query with not (<q_i, k_j> <= threshold_i): NaN counts as above; int64 [N]."""
    count: Tensor = ops().count_above(inputs.tensors(), threshold, inputs.pairs.negatives)
    return count
