"""The loss of each anchor, of rows that are at hand: compositions of `masked_logsumexp` in plain PyTorch.

`ranks` is given where the anchors are those of one rank: only an objective that mixes anchors needs the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mcl_kernels._validate import check_objective
from mcl_kernels.distributed.exchange import gather_vectors
from mcl_kernels.distributed.group import Ranks
from mcl_kernels.logsumexp.api import masked_logsumexp
from mcl_kernels.logsumexp.pairs import Pairs, count_kept
from mcl_kernels.losses.lonely import watch
from mcl_kernels.normalize import row_dot
from mcl_kernels.objectives import Objective


def one_way(
    query: Tensor, positive: Tensor, key: Tensor, pairs: Pairs, scale: Tensor, objective: Objective, impl: str,
    ranks: Ranks | None = None, *, is_queue: bool = False,
) -> Tensor:  # fmt: skip
    """The loss of each query, [N]; `is_queue`: its positive is not among the keys."""
    positive_logit = scale * row_dot(query, positive, scale.dtype)
    factors, counts = _needs(objective)
    lse = [_logsumexp(query, key, pairs, scale * factor, impl) for factor in factors]
    watch(lse[0], pairs, is_queue=is_queue)
    count = count_kept(query, key, pairs) if counts else None
    return _per_anchor(objective, positive_logit, lse, count, scale, ranks)


def all_views(
    views: Tensor, cosine: Tensor, of_sample: Pairs, scale: Tensor, objective: Objective, impl: str
) -> Tensor:
    """The loss of each row of both views, [2N]; `cosine` are their positive similarities, [N]."""
    pairs = of_sample.repeated(2)
    positive_logit = scale * torch.cat((cosine, cosine))
    factors, counts = _needs(objective)
    lse = [_logsumexp(views, None, pairs, scale * factor, impl) for factor in factors]
    watch(lse[0], pairs)
    count = count_kept(views, views, pairs) if counts else None
    return _per_anchor(objective, positive_logit, lse, count, scale)


def both_ways(image: Tensor, text: Tensor, pairs: Pairs, scale: Tensor, objective: Objective, impl: str) -> Tensor:
    """The mean of both directions for each pair, [N]."""
    positive_logit = scale * row_dot(image, text, scale.dtype)
    factors, counts = _needs(objective)
    both = [
        masked_logsumexp(
            image, text, pairs.labels, pairs.key_labels, scale=scale * factor, ids=pairs.ids, key_ids=pairs.key_ids,
            negatives=pairs.negatives, bidirectional=True, impl=impl,
        )
        for factor in factors
    ]  # fmt: skip
    watch(both[0][0], pairs)
    of_image = count_kept(image, text, pairs) if counts else None
    of_text = count_kept(text, image, pairs.swapped()) if counts else None
    image_loss = _per_anchor(objective, positive_logit, [b for b, _ in both], of_image, scale)
    text_loss = _per_anchor(objective, positive_logit, [c for _, c in both], of_text, scale)
    return (image_loss + text_loss) / 2


def _per_anchor(
    objective: Objective, a: Tensor, lse: list[Tensor], count: Tensor | None, scale: Tensor, ranks: Ranks | None = None
) -> Tensor:
    """The objective, [N]; where there are no negatives the loss is 0 and its gradient exactly 0."""
    if ranks is not None and getattr(objective, "mixes_anchors", False):
        optional = [x for x in (count, scale) if x is not None and x.ndim]
        (a, *gathered), here = gather_vectors([a, *lse, *optional], ranks)
        scale = gathered.pop() if scale.ndim else scale
        count = None if count is None else gathered.pop()
        return _per_anchor(objective, a, gathered, count, scale)[here]
    lonely = lse[0].detach() == -torch.inf
    # Twice `where`: the objective sees values that are safe to differentiate, then its result is dropped.
    safe_lse = tuple(b.masked_fill(lonely, 0.0) for b in lse)
    safe_a = torch.where(lonely, a.detach(), a)
    n = None if count is None else count.clamp(min=1).to(a.dtype)
    mixed = (~lonely,) if getattr(objective, "mixes_anchors", False) else ()
    loss = objective(safe_a, safe_lse if hasattr(objective, "scales") else safe_lse[0], n, scale, *mixed)
    # 0 * a is 0, but NaN where the embedding held NaN or infinity: that must not pass for a loss of 0.
    return torch.where(lonely, 0.0 * a.detach(), loss)


def _needs(objective: Objective) -> tuple[tuple[float, ...], bool]:
    """The factors of the scale that an objective wants a log-sum-exp for, and whether it wants the count."""
    check_objective(objective)
    return getattr(objective, "scales", (1.0,)), getattr(objective, "counts", False)


def _logsumexp(query: Tensor, key: Tensor | None, pairs: Pairs, scale: Tensor, impl: str) -> Tensor:
    labels, key_labels, ids, key_ids, negatives = pairs
    if key is None:
        return masked_logsumexp(query, labels=labels, scale=scale, ids=ids, negatives=negatives, impl=impl)
    return masked_logsumexp(
        query, key, labels, key_labels, scale=scale, ids=ids, key_ids=key_ids, negatives=negatives, impl=impl
    )
