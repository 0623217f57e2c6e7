"""The losses: O(N D) compositions of `masked_logsumexp` in plain PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mcl_kernels._rows import compute_dtype, joined_views, normalize_rows, row_dot, unit_views
from mcl_kernels._validate import check_choice, check_embeddings, check_positive, check_same_shape, check_same_width
from mcl_kernels.distributed import Ranks, Side, check_alike, gather_vectors, ranks_of, share_queries, share_samples
from mcl_kernels.exchange_plan import EXCHANGES
from mcl_kernels.logsumexp.api import as_pairs, as_scale, masked_logsumexp, resolve_impl
from mcl_kernels.logsumexp.plan import Pairs, count_kept
from mcl_kernels.objectives import Objective, info_nce

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

REDUCTIONS = ("mean", "sum", "none")


def masked_info_nce(
    query: Tensor,
    key: Tensor,
    labels: Tensor | None = None,
    key_labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.07,
    positive: Tensor | None = None,
    ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    negatives: str = "same",
    objective: Objective = info_nce,
    normalize: bool = True,
    reduction: str = "mean",
    impl: str = "auto",
    group: ProcessGroup | None = None,
    exchange: str = "auto",
) -> Tensor:
    """Contrastive loss of each query against its positive and the keys of its own cluster.

        a_i    = <q_i, p_i> / t_i
        b_i    = log sum_{j: y_j = y_i, u_j != u_i} exp(<q_i, k_j> / t_i)
        loss_i = objective(a_i, b_i) = log(1 + exp(b_i - a_i)) by default

    With `positive=None` key i is the positive of query i and keys past N are extra negatives; with
    `positive=p` (the queue form of MoCo) p is not among the keys. **A queue needs `positive=`**: without it its first
    N rows are taken for the positives. Without labels this is plain InfoNCE. An anchor
    without negatives has loss 0 and gradient 0. NaN or infinity in an embedding is never turned into a finite loss.

    Args:
        query: [N, D], float16, bfloat16, float32 or float64, any strides.
        key: [M, D]; M >= N with `positive=None`.
        labels: pseudo labels of the queries, integers [N], on the device of query; None: one cluster. A negative
            label matches nothing. Where M = N and key i belongs to query i they hold for the keys too.
        key_labels: pseudo labels of the keys, integers [M] (-1 for a queue slot that was never filled).
        temperature: t > 0, a float, a 0-d tensor or a vector [N]; tensors get an exact gradient and are not
            checked (a bad one gives NaN).
        positive: p, [N, D], or None.
        ids: identity of the queries' samples, integers [N]; equal ids are never negatives. **A positive among the
            keys must have its query's id**, or it is its own negative too. Default: query i and key i share one,
            keys past N share none; in the queue form nothing is excluded.
        key_ids: identity of the keys' samples, integers [M].
        negatives: "same", "different" or "all": see `masked_logsumexp`.
        objective: a function of `mcl_kernels.objectives`, or your own.
        normalize: L2-normalise all three in fp32, rounded once to the dtype they came in.
        reduction: "mean" over all N anchors (those without negatives included; 0 for N = 0), "sum" or "none".
        impl: see `masked_logsumexp`.

    Returns:
        A scalar, or [N] with `reduction="none"`; fp32, or fp64 where an input is fp64.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, lengths, devices or options that do not fit; each message names the argument.

    Source: "Learning the Unlearned" (ECCV 2024, arXiv 2402.11816), the loss L_j of stage j.

    Example:
        >>> query, key = torch.eye(4), torch.eye(4)
        >>> masked_info_nce(query, key, labels=torch.tensor([0, 0, 1, 1]), temperature=1.0)
        tensor(0.3133)
    """
    ranks = _ranks(group, exchange, reduction)
    described: dict[str, Any] = {
        "query": query, "key": key, "labels": labels, "key_labels": key_labels, "positive": positive, "ids": ids,
        "key_ids": key_ids, "temperature": temperature, "normalize": normalize,
    }  # fmt: skip
    query, key, positive, pairs = query_key_positive(
        query, key, labels, key_labels, positive, ids, key_ids, negatives, normalize, impl, ranks
    )
    scale = _inverse_temperature(temperature, query, compute_dtype(query, key, positive))
    if ranks is None:
        return _reduce(_one_way(query, positive, key, pairs, scale, objective, impl), reduction)
    exchange = _agreed(ranks, "masked_info_nce", described, exchange, negatives, objective, reduction)
    loss, total = _one_way_over(query, positive, key, pairs, scale, objective, impl, ranks, exchange)
    return _reduce(loss, reduction, total, ranks)


def nt_xent(
    view_a: Tensor,
    view_b: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.5,
    ids: Tensor | None = None,
    negatives: str = "same",
    objective: Objective = info_nce,
    normalize: bool = True,
    reduction: str = "mean",
    impl: str = "auto",
    group: ProcessGroup | None = None,
    exchange: str = "auto",
) -> Tensor:
    """SimCLR's loss (NT-Xent): 2N anchors, each against its other view and all views of its own cluster.

        z      = [view_a; view_b]                                                 [2N, D]
        a_i    = <z_i, z_(i+N mod 2N)> / t_i
        b_i    = log sum_{j: y_j = y_i, u_j != u_i} exp(<z_i, z_j> / t_i)
        loss_i = objective(a_i, b_i) = log(1 + exp(b_i - a_i)) by default

    Without labels this is SimCLR's loss. An anchor without negatives has loss 0 and gradient 0.

    Args:
        view_a, view_b: two views of N samples, [N, D] each, row i of both of sample i.
        labels: pseudo labels of the samples, integers [N]; None: one cluster. A negative label matches nothing.
        temperature: t > 0, a float, a 0-d tensor or a vector [2N], view_a first; see `masked_info_nce`.
        ids: identity of the samples, integers [N]; equal ids are never negatives. Default: every row its own.
        negatives, objective, normalize, impl: as in `masked_info_nce`.
        reduction: "mean" over all 2N anchors (0 for N = 0), "sum" or "none".

    Returns:
        A scalar, or [2N] with `reduction="none"`, view_a first; fp32, or fp64 where an input is fp64.

    Raises:
        TypeError, ValueError: as `masked_info_nce`.

    Source: Chen et al. 2020 (arXiv 2002.05709), equation 1, with the negatives of arXiv 2402.11816.

    Example:
        >>> view = torch.eye(4)
        >>> nt_xent(view, view, labels=torch.tensor([0, 0, 1, 1]), temperature=1.0)
        tensor(0.5514)
    """
    ranks = _ranks(group, exchange, reduction)
    check_embeddings("view_a", view_a)
    check_embeddings("view_b", view_b)
    check_same_shape("view_b", view_b, "view_a", view_a)
    described = {
        "view_a": view_a, "view_b": view_b, "labels": labels, "ids": ids, "temperature": temperature,
        "normalize": normalize,
    }  # fmt: skip
    if ids is None:
        ids = _row_ids(view_a, ranks)
    names = ("view_a", "view_b", "labels")
    of_sample = as_pairs(view_a, view_b, labels, labels, ids, ids, negatives, key_is_query=True, names=names)
    impl = resolve_impl(impl, view_a.device)
    views, cosine = unit_views(view_a, view_b, impl) if normalize else joined_views(view_a, view_b)
    scale = _inverse_temperature(temperature, views, compute_dtype(views))
    if ranks is None:
        return _reduce(_all_views(views, cosine, of_sample, scale, objective, impl), reduction)
    exchange = _agreed(ranks, "nt_xent", described, exchange, negatives, objective, reduction)
    columns = *views.chunk(2), *(scale.chunk(2) if scale.ndim else ())
    share = share_samples(Side(columns, of_sample.labels, of_sample.ids), "nt_xent", exchange, ranks)
    losses = []
    if share.whole is not None:
        part_a, part_b, *scales = share.whole.columns
        pairs = Pairs(share.whole.labels, share.whole.labels, share.whole.ids, share.whole.ids, negatives)
        own_scale = torch.cat(scales) if scales else scale
        losses.append(_all_views(*joined_views(part_a, part_b), pairs, own_scale, objective, impl))
    if share.blocks is not None:
        part_a, part_b, *scales = share.blocks.anchors.columns
        query, positive = torch.cat((part_a, part_b)), torch.cat((part_b, part_a))
        key = torch.cat(share.blocks.keys.columns[:2])
        pairs = share.blocks.pairs(negatives).repeated(2)
        own_scale = torch.cat(scales) if scales else scale
        losses.append(_one_way(query, positive, key, pairs, own_scale, objective, impl, ranks))
    return _reduce(torch.cat(losses), reduction, 2 * share.total, ranks)


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    labels: Tensor | None = None,
    *,
    logit_scale: float | Tensor,
    text_labels: Tensor | None = None,
    ids: Tensor | None = None,
    negatives: str = "same",
    objective: Objective = info_nce,
    normalize: bool = False,
    reduction: str = "mean",
    impl: str = "auto",
    group: ProcessGroup | None = None,
    exchange: str = "auto",
) -> Tensor:
    """CLIP's loss: images against captions and captions against images, each within its own cluster.

        s_ij   = logit_scale * <image_i, text_j>,    a_i = s_ii
        b_i    = log sum_{j: y_j = y_i, u_j != u_i} exp(s_ij)            images, in one pass with
        c_j    = log sum_{i: y_i = y_j, u_i != u_j} exp(s_ij)            captions
        loss_i = (objective(a_i, b_i) + objective(a_i, c_i)) / 2

    Without labels this is CLIP's loss. An anchor without negatives has loss 0 and gradient 0.

    Args:
        image_features, text_features: [N, D] each, caption i of image i; normalised by the model, as in CLIP,
            or here with `normalize=True`.
        labels: pseudo labels of the images, integers [N]; None: one cluster. A negative label matches nothing.
        logit_scale: already exponentiated, a float or a tensor [] or [1] (learnable; exact gradient).
        text_labels: pseudo labels of the captions, integers [N]; None: those of the images.
        ids: identity of the pairs, integers [N]; equal ids are never negatives. Default: every pair its own.
        negatives, objective, impl: as in `masked_info_nce`.
        normalize: L2-normalise both in fp32, rounded once to the dtype they came in.
        reduction: "mean" over the N pairs (0 for N = 0), "sum" or "none".

    Returns:
        A scalar, or [N] with `reduction="none"`; fp32, or fp64 where an input is fp64.

    Raises:
        TypeError, ValueError: as `masked_info_nce`.

    Source: Radford et al. 2021 (arXiv 2103.00020), figure 3, with the negatives of arXiv 2402.11816.

    Example:
        >>> features = torch.eye(4)
        >>> clip_loss(features, features, labels=torch.tensor([0, 0, 1, 1]), logit_scale=1.0)
        tensor(0.3133)
    """
    ranks = _ranks(group, exchange, reduction)
    check_embeddings("image_features", image_features)
    check_embeddings("text_features", text_features)
    check_same_shape("text_features", text_features, "image_features", image_features)
    described = {
        "image_features": image_features, "text_features": text_features, "labels": labels, "text_labels": text_labels,
        "ids": ids, "logit_scale": logit_scale, "normalize": normalize,
    }  # fmt: skip
    if ids is None:
        ids = _row_ids(image_features, ranks)
    names = ("image_features", "text_features", "text_labels")
    pairs = as_pairs(
        image_features, text_features, labels, text_labels, ids, ids, negatives, key_is_query=True, names=names
    )
    impl = resolve_impl(impl, image_features.device)
    if normalize:
        image_features, text_features = normalize_rows(image_features, impl), normalize_rows(text_features, impl)
    dtype = compute_dtype(image_features, text_features)
    if isinstance(logit_scale, Tensor):
        if logit_scale.numel() != 1:
            raise ValueError(f"logit_scale must be one number: got shape {list(logit_scale.shape)}")
        logit_scale = logit_scale.reshape(())
    else:
        check_positive("logit_scale", logit_scale)
    scale = as_scale("logit_scale", logit_scale, image_features, dtype)
    if ranks is None:
        return _reduce(_both_ways(image_features, text_features, pairs, scale, objective, impl), reduction)
    exchange = _agreed(ranks, "clip_loss", described, exchange, negatives, objective, reduction)
    if text_labels is not None:  # an image and its caption may be compared on different ranks
        ways = ((image_features, text_features, pairs), (text_features, image_features, pairs.swapped()))
        both = [_one_way_over(x, y, y, of_x, scale, objective, impl, ranks, exchange) for x, y, of_x in ways]
        (image_loss, total), (text_loss, _) = both
        if reduction == "none":
            return (image_loss + text_loss) / 2
        return _reduce(torch.cat((image_loss, text_loss)) / 2, reduction, total, ranks)
    share = share_samples(Side((image_features, text_features), pairs.labels, pairs.ids), "clip_loss", exchange, ranks)
    losses = []
    if share.whole is not None:
        image, text = share.whole.columns
        of_whole = Pairs(share.whole.labels, share.whole.labels, share.whole.ids, share.whole.ids, negatives)
        losses.append(_both_ways(image, text, of_whole, scale, objective, impl))
    if share.blocks is not None:
        image, text = share.blocks.anchors.columns
        all_images, all_texts = share.blocks.keys.columns
        of_block = share.blocks.pairs(negatives)
        image_loss = _one_way(image, text, all_texts, of_block, scale, objective, impl, ranks)
        text_loss = _one_way(text, image, all_images, of_block, scale, objective, impl, ranks)
        losses.append((image_loss + text_loss) / 2)
    return _reduce(torch.cat(losses), reduction, share.total, ranks)


def query_key_positive(
    query: Tensor,
    key: Tensor,
    labels: Tensor | None,
    key_labels: Tensor | None,
    positive: Tensor | None,
    ids: Tensor | None,
    key_ids: Tensor | None,
    negatives: str,
    normalize: bool,
    impl: str,
    ranks: Ranks | None = None,
) -> tuple[Tensor, Tensor, Tensor, Pairs]:
    """The checked arguments of the query-key form, its positives [N, D] and who may be a negative of whom."""
    check_embeddings("query", query)
    check_embeddings("key", key)
    check_same_width("key", key, "query", query)
    n, m = len(query), len(key)
    if positive is not None:
        check_embeddings("positive", positive)
        check_same_shape("positive", positive, "query", query)
    elif m < n:
        raise ValueError(f"key must hold a positive for each query where positive=None: got {m} keys for {n} queries")
    elif ids is None and key_ids is None:
        ids, key_ids = _row_ids(query, ranks), _row_ids(key, ranks)
    key_is_query = positive is None and m == n
    pairs = as_pairs(query, key, labels, key_labels, ids, key_ids, negatives, key_is_query=key_is_query)
    if normalize:
        impl = resolve_impl(impl, query.device)
        query, key = normalize_rows(query, impl), normalize_rows(key, impl)
        positive = None if positive is None else normalize_rows(positive, impl)
    return query, key, key[:n] if positive is None else positive, pairs


def _one_way(
    query: Tensor, positive: Tensor, key: Tensor, pairs: Pairs, scale: Tensor, objective: Objective, impl: str,
    ranks: Ranks | None = None,
) -> Tensor:  # fmt: skip
    """The loss of each query, [N]."""
    positive_logit = scale * row_dot(query, positive, scale.dtype)
    factors, counts = _needs(objective)
    lse = [_logsumexp(query, key, pairs, scale * factor, impl) for factor in factors]
    count = count_kept(query, key, pairs) if counts else None
    return _per_anchor(objective, positive_logit, lse, count, scale, ranks)


def _all_views(
    views: Tensor, cosine: Tensor, of_sample: Pairs, scale: Tensor, objective: Objective, impl: str
) -> Tensor:
    """The loss of each row of both views, [2N]; `cosine` are their positive similarities, [N]."""
    pairs = of_sample.repeated(2)
    positive_logit = scale * torch.cat((cosine, cosine))
    factors, counts = _needs(objective)
    lse = [_logsumexp(views, None, pairs, scale * factor, impl) for factor in factors]
    count = count_kept(views, views, pairs) if counts else None
    return _per_anchor(objective, positive_logit, lse, count, scale)


def _both_ways(image: Tensor, text: Tensor, pairs: Pairs, scale: Tensor, objective: Objective, impl: str) -> Tensor:
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
    of_image = count_kept(image, text, pairs) if counts else None
    of_text = count_kept(text, image, pairs.swapped()) if counts else None
    image_loss = _per_anchor(objective, positive_logit, [b for b, _ in both], of_image, scale)
    text_loss = _per_anchor(objective, positive_logit, [c for _, c in both], of_text, scale)
    return (image_loss + text_loss) / 2


def _one_way_over(
    query: Tensor, positive: Tensor, key: Tensor, pairs: Pairs, scale: Tensor, objective: Objective, impl: str,
    ranks: Ranks, exchange: str,
) -> tuple[Tensor, int]:  # fmt: skip
    """The loss of each query that this rank computes, and the number of queries of all ranks."""
    columns = (query, positive, scale) if scale.ndim else (query, positive)
    queries, keys = Side(columns, pairs.labels, pairs.ids), Side((key,), pairs.key_labels, pairs.key_ids)
    blocks, total = share_queries(queries, keys, exchange, ranks)
    query, positive, *scales = blocks.anchors.columns
    (key,), scale = blocks.keys.columns, scales[0] if scales else scale
    return _one_way(query, positive, key, blocks.pairs(pairs.negatives), scale, objective, impl, ranks), total


def _row_ids(rows: Tensor, ranks: Ranks | None) -> Tensor:
    return torch.arange(len(rows), device=rows.device) if ranks is None else ranks.row_ids(rows)


def _ranks(group: ProcessGroup | None, exchange: str, reduction: str) -> Ranks | None:
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("exchange", exchange, EXCHANGES)
    return None if group is None else ranks_of(group)


def _agreed(
    ranks: Ranks,
    loss: str,
    arguments: dict[str, Any],
    exchange: str,
    negatives: str,
    objective: Objective,
    reduction: str,
) -> str:
    """The exchange of a call that is the same on all ranks: "gather" where an anchor needs more than its cluster."""
    options = {"exchange": exchange, "negatives": negatives, "objective": objective, "reduction": reduction}
    device = next(x.device for x in arguments.values() if isinstance(x, Tensor))
    check_alike(ranks, device, {"loss": loss, **arguments, **options})
    needing_all = {
        f"negatives={negatives!r}": negatives != "same",
        "reduction='none'": reduction == "none",
        f"{objective}, which mixes anchors,": getattr(objective, "mixes_anchors", False),
    }
    reasons = [what for what, holds in needing_all.items() if holds]
    if reasons and exchange == "cluster":
        raise ValueError(f"exchange='cluster' keeps each cluster by itself: {reasons[0]} needs exchange='gather'")
    return "gather" if reasons else exchange


def _inverse_temperature(temperature: float | Tensor, query: Tensor, dtype: torch.dtype) -> Tensor:
    if isinstance(temperature, Tensor):
        return as_scale("temperature", temperature, query, dtype).reciprocal()
    check_positive("temperature", temperature)
    return as_scale("temperature", 1.0 / temperature, query, dtype)


def _needs(objective: Objective) -> tuple[tuple[float, ...], bool]:
    """The factors of the scale that an objective wants a log-sum-exp for, and whether it wants the count."""
    if not callable(objective) or isinstance(objective, type):
        expected = (
            "a function of mcl_kernels.objectives or your own, settings given: hard_negative(), not hard_negative"
        )
        raise TypeError(f"objective must be {expected}: got {objective!r}")
    return getattr(objective, "scales", (1.0,)), getattr(objective, "counts", False)


def _logsumexp(query: Tensor, key: Tensor | None, pairs: Pairs, scale: Tensor, impl: str) -> Tensor:
    labels, key_labels, ids, key_ids, negatives = pairs
    if key is None:
        return masked_logsumexp(query, labels=labels, scale=scale, ids=ids, negatives=negatives, impl=impl)
    return masked_logsumexp(
        query, key, labels, key_labels, scale=scale, ids=ids, key_ids=key_ids, negatives=negatives, impl=impl
    )


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


def _reduce(loss: Tensor, reduction: str, anchors: int | None = None, ranks: Ranks | None = None) -> Tensor:
    """Over ranks the loss holds this rank's share of the anchors: what it gives has the reduction as its mean."""
    if reduction == "none":
        return loss
    total = loss.sum() if ranks is None else loss.sum() * ranks.world_size
    n = loss.shape[0] if anchors is None else anchors
    return total / max(n, 1) if reduction == "mean" else total


class _Loss(nn.Module):
    """The options that the three losses share; labels and ids are given to `forward`."""

    def __init__(
        self,
        *,
        negatives: str = "same",
        objective: Objective = info_nce,
        normalize: bool = True,
        reduction: str = "mean",
        impl: str = "auto",
        group: ProcessGroup | None = None,
        exchange: str = "auto",
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {
            "negatives": negatives,
            "objective": objective,
            "normalize": normalize,
            "reduction": reduction,
            "impl": impl,
            "group": group,
            "exchange": exchange,
        }

    def extra_repr(self) -> str:
        objective = self.options["objective"]
        options = {**self.options, "objective": getattr(objective, "__name__", objective)}
        return ", ".join(f"{name}={value}" for name, value in options.items())


class MaskedInfoNCE(_Loss):
    """`masked_info_nce` as a module: its options here, tensors in `forward`. A Parameter as temperature is learned."""

    def __init__(self, temperature: float | Tensor = 0.07, **options: Any) -> None:
        super().__init__(**options)
        self.temperature = temperature

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        labels: Tensor | None = None,
        key_labels: Tensor | None = None,
        *,
        positive: Tensor | None = None,
        ids: Tensor | None = None,
        key_ids: Tensor | None = None,
    ) -> Tensor:
        return masked_info_nce(
            query, key, labels, key_labels, temperature=self.temperature, positive=positive, ids=ids, key_ids=key_ids,
            **self.options,
        )  # fmt: skip


class NTXentLoss(_Loss):
    """`nt_xent` as a module: its options here, tensors in `forward`. A Parameter as temperature is learned."""

    def __init__(self, temperature: float | Tensor = 0.5, **options: Any) -> None:
        super().__init__(**options)
        self.temperature = temperature

    def forward(
        self, view_a: Tensor, view_b: Tensor, labels: Tensor | None = None, *, ids: Tensor | None = None
    ) -> Tensor:
        return nt_xent(view_a, view_b, labels, temperature=self.temperature, ids=ids, **self.options)


class ClipLoss(_Loss):
    """`clip_loss` as a module: its options here, tensors and the model's logit_scale in `forward`."""

    def __init__(self, *, normalize: bool = False, **options: Any) -> None:
        super().__init__(normalize=normalize, **options)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        labels: Tensor | None = None,
        *,
        text_labels: Tensor | None = None,
        ids: Tensor | None = None,
    ) -> Tensor:
        return clip_loss(
            image_features, text_features, labels, logit_scale=logit_scale, text_labels=text_labels, ids=ids,
            **self.options,
        )  # fmt: skip
