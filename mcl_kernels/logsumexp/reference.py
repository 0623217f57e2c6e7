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

from mcl_kernels.logsumexp.inputs import Inputs
from mcl_kernels.logsumexp.pairs import kept_pairs


def logsumexp(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Returns b, [N], and c, [M] where bidirectional, else [0]."""
    query, key, scale, pairs, bidirectional = inputs.rectangle()
    assert key is not None
    with torch.autocast(query.device.type, enabled=False):
        products = _rows(query, pairs.labels, scale.dtype) @ _rows(key, pairs.key_labels, scale.dtype).T
        logits = scale.unsqueeze(-1) * products  # [N, M]
        keep = kept_pairs(pairs)
        if keep is not None:
            logits = logits.masked_fill(~keep, -math.inf)
        return log_sum_exp(logits, 1), log_sum_exp(logits, 0) if bidirectional else logits.new_empty(0)


def log_sum_exp(logits: Tensor, dim: int) -> Tensor:
    """Log of the summed exponentials along a dimension; -inf, with derivatives of 0, where all logits are -inf."""
    nothing = (logits == -math.inf).all(dim, keepdim=True)
    return logits.masked_fill(nothing, 0.0).logsumexp(dim).masked_fill(nothing.squeeze(dim), -math.inf)


def count_above(inputs: Inputs, threshold: Tensor) -> Tensor:
    """Number of kept keys of each query with not (<q_i, k_j> <= threshold_i): NaN counts as above; int64 [N]."""
    with torch.autocast(inputs.query.device.type, enabled=False):
        products = inputs.query.to(threshold.dtype) @ inputs.keys.to(threshold.dtype).T
        above = ~(products <= threshold.unsqueeze(1))
    keep = kept_pairs(inputs.rectangle().pairs)
    return (above if keep is None else above & keep).sum(1)


def _rows(x: Tensor, labels: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Rows in the dtype of the logits; 0 for a negative label, whose row matches nothing and may hold any values."""
    x = x.to(dtype)
    return x if labels is None else x.masked_fill((labels < 0).unsqueeze(1), 0.0)
