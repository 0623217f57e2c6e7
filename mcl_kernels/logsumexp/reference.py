"""The definition of the operation, dense and differentiable by autograd.

    s_ij = scale_i * <q_i, k_j>
    keep = match(y_i, y_j) and u_i != u_j
    b_i  = log sum_{j: keep_ij} exp(s_ij)           -inf where nothing is kept
    c_j  = log sum_{i: keep_ij} exp(s_ij)

Cost: one N x M x D product forward and two backward, over all pairs; it stores several N x M matrices.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mcl_kernels.logsumexp.pairs import Pairs, kept_pairs


def masked_logsumexp(
    query: Tensor,  # [N, D]
    key: Tensor,  # [M, D]
    scale: Tensor,  # [] or [N], fp32 or fp64: the dtype of the logits
    pairs: Pairs,
    bidirectional: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    with torch.autocast(query.device.type, enabled=False):
        products = _rows(query, pairs.labels, scale.dtype) @ _rows(key, pairs.key_labels, scale.dtype).T
        logits = scale.unsqueeze(-1) * products  # [N, M]
        keep = kept_pairs(pairs)
        if keep is not None:
            logits = logits.masked_fill(~keep, -math.inf)
        row_lse = logits.logsumexp(1)
        return (row_lse, logits.logsumexp(0)) if bidirectional else row_lse


def count_above(query: Tensor, key: Tensor, threshold: Tensor, pairs: Pairs) -> Tensor:
    """For each query, how many kept keys have not <q_i, k_j> <= threshold_i; int64 [N]."""
    with torch.autocast(query.device.type, enabled=False):
        above = ~(query.to(threshold.dtype) @ key.to(threshold.dtype).T <= threshold.unsqueeze(1))
    keep = kept_pairs(pairs)
    return (above if keep is None else above & keep).sum(1)


def _rows(x: Tensor, labels: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The rows in the dtype of the logits. A row that matches nothing (an unfilled slot) may hold anything."""
    x = x.to(dtype)
    return x if labels is None else x.masked_fill((labels < 0).unsqueeze(1), 0.0)
