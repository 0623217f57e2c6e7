"""The loss of each anchor, from rows on this process: compositions of the masked log-sum-exp in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mcl_kernels._traced import is_traced
from mcl_kernels.logsumexp.inputs import Inputs
from mcl_kernels.logsumexp.ops import compute
from mcl_kernels.logsumexp.pairs import Pairs, count_kept, repeat
from mcl_kernels.losses.lonely import watch
from mcl_kernels.losses.negatives import Negatives
from mcl_kernels.normalize import row_dot
from mcl_kernels.objectives import ObjectiveLike, info_nce, needs_of

# Concatenates vectors of this rank's anchors with those of all other ranks; also returns the slice of this rank's.
GatherVectors = Callable[[Sequence[Tensor]], tuple[list[Tensor], slice]]


def query_to_key(
    negatives: Negatives,
    positive: Tensor,
    objective: ObjectiveLike,
    impl: str,
    *,
    is_queue: bool = False,
    gather: GatherVectors | None = None,
) -> Tensor:
    """The loss of each query, [N].

    Args:
        negatives: queries, keys and further negatives of the queries.
        positive: [N, D].
        objective: loss of each anchor.
        impl: name of a backend.
        is_queue: the positives are not among the keys.
        gather: gathers vectors of all anchors, for an objective that mixes anchors; None: these queries are all.
    """
    inputs = negatives.inputs
    lse = [negatives.log_sum_exp(factor, impl) for factor in needs_of(objective).scales or (None,)]
    watch(lse[0], inputs.pairs, is_queue=is_queue)
    if _has_kernel(objective, impl, inputs.query, positive, inputs.scale):
        return _info_nce_kernels().info_nce_of_rows(inputs.query, positive, inputs.scale, lse[0])  # type: ignore[no-any-return]
    positive_logit = inputs.scale * row_dot(inputs.query, positive, inputs.scale.dtype)
    counts = negatives.counts() if needs_of(objective).counts else None
    return _anchor_losses(objective, positive_logit, lse, counts, inputs.scale, gather)


def views(inputs: Inputs, cosine: Tensor, objective: ObjectiveLike, impl: str) -> Tensor:
    """The loss of each row of both views, [2N]; `inputs` is the self form, `cosine` [N] the positives' products."""
    lse = [b for b, _ in _log_sum_exps(inputs, objective, impl)]
    watch(lse[0], inputs.pairs)
    if _has_kernel(objective, impl, cosine, inputs.scale):
        return _info_nce_kernels().info_nce(cosine, inputs.scale, lse[0])  # type: ignore[no-any-return]
    positive_logit = inputs.scale * torch.cat((cosine, cosine))
    return _anchor_losses(objective, positive_logit, lse, _counts(inputs, objective), inputs.scale)


def bidirectional(inputs: Inputs, objective: ObjectiveLike, impl: str) -> Tensor:
    """The mean of both directions for each pair, [N]: key i is the positive of query i."""
    row_lse, column_lse = zip(*_log_sum_exps(inputs, objective, impl), strict=True)
    watch(row_lse[0], inputs.pairs)
    query, key, scale, *_ = inputs
    if key is not None and _has_kernel(objective, impl, query, key, scale):
        return _info_nce_kernels().info_nce_of_rows(query, key, scale, row_lse[0], column_lse[0])  # type: ignore[no-any-return]
    positive_logit = scale * row_dot(query, inputs.keys, scale.dtype)
    row_counts, column_counts = _counts(inputs, objective), _counts(inputs.swapped(), objective)
    row_loss = _anchor_losses(objective, positive_logit, row_lse, row_counts, inputs.scale)
    column_loss = _anchor_losses(objective, positive_logit, column_lse, column_counts, inputs.scale)
    return (row_loss + column_loss) / 2


def is_whole(objective: ObjectiveLike, impl: str, pairs: Pairs, *arguments: Tensor | float | None) -> bool:
    """Returns whether `whole_query_to_key` and the like compute a loss, from rows that are not normalised yet."""
    if impl != "triton" or objective is not info_nce or forward_ad._current_level >= 0:
        return False
    return not is_traced(*pairs[:4], *(x for x in arguments if isinstance(x, Tensor)))


def whole_query_to_key(
    query: Tensor, key: Tensor, positive: Tensor | None, scale: Tensor, pairs: Pairs, *, normalize: bool
) -> Tensor:  # fmt: skip
    """`query_to_key`, normalisation included."""
    loss, lse = _whole_loss().whole_loss(query, key, positive, scale, pairs, normalize=normalize)
    watch(lse, pairs, is_queue=positive is not None)
    return loss  # type: ignore[no-any-return]


def whole_views(view_a: Tensor, view_b: Tensor, scale: Tensor, pairs: Pairs) -> Tensor:
    """`views`, normalisation included; labels and ids are those of the samples."""
    labels, _, ids, _, negatives, n_views = pairs
    pairs = Pairs(repeat(labels, 2), None, repeat(ids, 2), None, negatives, 2 * n_views)
    loss, lse = _whole_loss().whole_loss(view_a, view_b, None, scale, pairs, is_joined=True)
    watch(lse, pairs)
    return loss  # type: ignore[no-any-return]


def whole_bidirectional(query: Tensor, key: Tensor, scale: Tensor, pairs: Pairs, *, normalize: bool) -> Tensor:
    """`bidirectional`, normalisation included."""
    loss, lse = _whole_loss().whole_loss(query, key, None, scale, pairs, bidirectional=True, normalize=normalize)
    watch(lse, pairs)
    return loss  # type: ignore[no-any-return]


@cache
def _whole_loss() -> ModuleType:
    return import_module("mcl_kernels.losses.triton.whole_loss")


def _has_kernel(objective: ObjectiveLike, impl: str, *tensors: Tensor) -> bool:
    """Returns whether a kernel computes the losses; a compiler fuses the plain composition by itself."""
    return objective is info_nce and impl == "triton" and not is_traced(*tensors)


@cache
def _info_nce_kernels() -> ModuleType:
    return import_module("mcl_kernels.losses.triton.info_nce")


def _log_sum_exps(inputs: Inputs, objective: ObjectiveLike, impl: str) -> list[tuple[Tensor, Tensor]]:
    """The log-sum-exps of rows and columns, for each factor of the scale that the objective asks for."""
    factors = needs_of(objective).scales
    if factors is None:
        return [compute(inputs, impl)]
    return [compute(inputs.scaled(factor), impl) for factor in factors]


def _counts(inputs: Inputs, objective: ObjectiveLike) -> Tensor | None:
    """Number of negatives of each query, int64 [N], if the objective asks for it."""
    if not needs_of(objective).counts:
        return None
    inputs = inputs.rectangle()
    return count_kept(inputs.query, inputs.keys, inputs.pairs)


def _anchor_losses(
    objective: ObjectiveLike,
    a: Tensor,
    lse: Sequence[Tensor],
    counts: Tensor | None,
    scale: Tensor,
    gather: GatherVectors | None = None,
) -> Tensor:
    """The objective, [N]; where there are no negatives the loss is 0 and its gradient exactly 0."""
    needs = needs_of(objective)
    if gather is not None and needs.mixes_anchors:
        optional = [x for x in (counts, scale) if x is not None and x.ndim]
        (a, *gathered), here = gather([a, *lse, *optional])
        scale = gathered.pop() if scale.ndim else scale
        counts = None if counts is None else gathered.pop()
        return _anchor_losses(objective, a, gathered, counts, scale)[here]
    lonely = lse[0].detach() == -torch.inf
    # Twice `where`: the objective gets values that are safe to differentiate, then its result is dropped.
    safe_lse = tuple(b.masked_fill(lonely, 0.0) for b in lse)
    safe_a = torch.where(lonely, a.detach(), a)
    n = None if counts is None else counts.clamp(min=1).to(a.dtype)
    has_negatives = (~lonely,) if needs.mixes_anchors else ()
    loss = objective(safe_a, safe_lse[0] if needs.scales is None else safe_lse, n, scale, *has_negatives)
    # 0 * a is 0, but NaN where the embedding held NaN or infinity: that must not pass for a loss of 0.
    return torch.where(lonely, 0.0 * a.detach(), loss)
