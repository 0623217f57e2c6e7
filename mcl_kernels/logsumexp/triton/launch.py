"""The operation as Triton kernels: on CUDA tensors, or on the CPU's under TRITON_INTERPRET=1.

    forward   b_i = log sum_j exp(s_ij), and c_j alike with rows and columns exchanged
    backward  W_ij = where(keep_ij, gb_i exp(s_ij - b_i) + gc_j exp(s_ij - c_j), 0)
              dq_i = scale_i sum_j W_ij k_j,  dk_j = sum_i scale_i W_ij q_i,  dscale_i = <q_i, sum_j W_ij k_j>

Rows are copied once into sorted order. A tile of rows is compared with the columns from the first of its first cluster
to the last of its last one. Those tiles of pairs are a work list, which a fixed number of programs shares evenly
(`work_list.py`). It is counted on the device, so the grid depends on the sizes alone, and nothing waits for the GPU.
Every sum has one order, and no add is atomic. For each side four launches: copies, work list, tiles, join.

Cost in products over the kept pairs, rounded up to tiles: forward 1 (2 where bidirectional); backward 2 (self), 4
(otherwise), and one more per side for each part of the features but the first if a program cannot hold them all. Each
product of fp32 rows is six of bfloat16.
Memory beyond inputs and outputs: the plan, a sorted copy of each side (6 bytes a number for fp32), a few vectors [N]
and [M], and a workspace of at most 64 MiB.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from mcl_kernels.logsumexp import gpu_common
from mcl_kernels.logsumexp.inputs import Inputs, LseGradients, Saved, Wanted
from mcl_kernels.logsumexp.triton.arguments import Copies
from mcl_kernels.logsumexp.triton.backward import run_backward
from mcl_kernels.logsumexp.triton.forward import run_forward


def forward(inputs: Inputs) -> Saved:
    """Log-sum-exps and the plan."""
    return gpu_common.forward(partial(run_forward, Copies()), inputs)


def backward(inputs: Inputs, saved: Saved, grads: LseGradients, wanted: Wanted) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and scale; [0] for one that is not wanted (and for the key of the self form)."""
    return gpu_common.backward(partial(run_backward, Copies()), inputs, saved, grads, wanted)


def count_above(inputs: Inputs, threshold: Tensor) -> Tensor:
    """Number of kept keys of each query with not (<q_i, k_j> <= threshold_i): NaN counts as above; int64 [N]."""
    return gpu_common.count_above(partial(run_forward, Copies()), inputs, threshold)
