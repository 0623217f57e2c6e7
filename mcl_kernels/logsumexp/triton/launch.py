"""The operation as Triton kernels: on CUDA tensors, or on the CPU's under TRITON_INTERPRET=1.

    forward   b_i = log sum_j exp(s_ij), and c_j alike with rows and columns exchanged
    backward  W_ij = where(keep_ij, gb_i exp(s_ij - b_i) + gc_j exp(s_ij - c_j), 0)
              dq_i = scale_i sum_j W_ij k_j,  dk_j = sum_i scale_i W_ij q_i,  dscale_i = sum_j W_ij <q_i, k_j>

Each program owns a tile of sorted rows and writes each of them once: no atomics, and sums in one order. A tile of rows
is compared with the columns from the first of its first cluster to the last of its last one. That range is read on the
device, so the grid depends on N alone, and nothing waits for the GPU.

Cost in products over the kept pairs, rounded up to tiles: forward 1 (2 where bidirectional); backward 2 (self), 4
(otherwise), and one more per side for each part of the features but the first if a program cannot hold them all.
Memory beyond inputs and outputs: the plan and a few vectors [N] and [M].
"""

from __future__ import annotations

from functools import partial

from mcl_kernels.logsumexp import gpu_common
from mcl_kernels.logsumexp.triton.backward import run_backward
from mcl_kernels.logsumexp.triton.forward import run_forward

forward = partial(gpu_common.forward, run_forward)
backward = partial(gpu_common.backward, run_backward)
count_above = partial(gpu_common.count_above, run_forward)
