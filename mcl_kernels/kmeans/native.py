"""One pass over the data on the processor: `csrc/cpu/cluster.h`, which `_native` finds or builds.

    euclidean   label_i = argmin_k |x_i - c_k|^2,   distance_i = |x_i - c_label|^2
    cosine      label_i = argmax_k <x_i, c_k>,      distance_i = 1 - <x_i, c_label>,    x_i and c_k of unit length

A block of rows is read once: it meets all centres, and then is added to its own while it is in the cache. Entries are
rounded to multiples of one number, at most what fp32 resolves of the largest one for up to 2^29 rows, of which the
fp64 sums are exact: the same bits in any order of rows, so for any number of threads and any chunks of the data.

Memory beyond inputs and outputs: K x D fp64 sums a thread.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mcl_kernels import _native
from mcl_kernels._rows import normalize_rows


def assign(x: Tensor, centers: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """The nearest centre of each row, int64 [N], and the distance to it, [N] in the dtype of the centres."""
    centers = normalize_rows(centers) if metric == "cosine" else centers
    labels, distances, _, _, _ = _ops().assign_clusters(x, centers, metric == "cosine", 0.0, len(x), False)
    return labels, distances


def assign_and_sum(x: Tensor, centers: Tensor, metric: str, largest: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`assign`, and in the same pass the sum (fp64 [K, D]) and the number (int64 [K]) of each centre's rows.

    No entry of x is larger than `largest` by magnitude; for the cosine metric centres are of unit length.
    """
    cosine = metric == "cosine"
    labels, distances, sums, counts, offset = _ops().assign_clusters(x, centers, cosine, largest, len(x), True)
    return labels, distances, sums + counts.unsqueeze(1) * offset, counts


def _ops() -> Any:
    _native.load()
    return torch.ops.mcl_kernels_native
