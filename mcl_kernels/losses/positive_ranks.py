"""Ranks of the positives among their negatives, which give a batch's accuracy without its logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mcl_kernels._validate import check_flag
from mcl_kernels.backends.table import resolve
from mcl_kernels.logsumexp.inputs import Inputs
from mcl_kernels.logsumexp.ops import count_above
from mcl_kernels.losses.info_nce import check_query_key, query_key_positive
from mcl_kernels.normalize import compute_dtype, row_dot


@torch.no_grad()
def positive_ranks(
    query: Tensor,
    key: Tensor,
    labels: Tensor | None = None,
    key_labels: Tensor | None = None,
    *,
    positive: Tensor | None = None,
    ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    negatives: str = "same",
    normalize: bool = True,
    impl: str = "auto",
) -> Tensor:
    """Number of negatives that score higher than the positive: 0 where the positive is nearest.

        rank_i = #{j: keep_ij and <q_i, k_j> > <q_i, p_i>}

    A key that scores as the positive up to the rounding of the products, 2 sqrt(D) eps |q_i| |p_i|, does not count.
    `(rank < k).float().mean()` is the top-k accuracy that a training loop prints. By tiles; no N x M matrix and
    no gradient. A NaN counts as higher, and so does every key where the positive's score overflows, so a model that has
    diverged does not look perfect.

    Args:
        query, key, labels, key_labels, positive, ids, key_ids, negatives, normalize, impl: as in `masked_info_nce`.

    Returns:
        int64 [N].

    Raises:
        TypeError, ValueError, RuntimeError: as `masked_info_nce`.

    Source: the accuracy of the contrastive task that MoCo's public code prints (He et al. 2020, arXiv 1911.05722).

    Example:
        >>> query = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> positive_ranks(query, query.flip(1))
        tensor([2, 2, 0])
    """
    check_flag("normalize", normalize)
    pairs = check_query_key(query, key, positive, labels, key_labels, ids, key_ids, negatives)
    impl = resolve("logsumexp", impl, query.device)
    query, key, positive = query_key_positive(query, key, positive, normalize, impl)
    dtype = compute_dtype(query, key, positive)
    norms = [torch.linalg.vector_norm(x.to(dtype), dim=1) for x in (query, positive)]
    rounding = 2.0 * math.sqrt(query.shape[1]) * torch.finfo(dtype).eps * norms[0] * norms[1]
    threshold = row_dot(query, positive, dtype) + rounding
    threshold = threshold.masked_fill(threshold == torch.inf, torch.nan)  # nothing is higher than infinity
    return count_above(Inputs(query, key, threshold.new_ones(()), pairs), threshold, impl)
