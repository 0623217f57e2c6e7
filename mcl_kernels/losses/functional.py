"""The losses as functions: O(N D) compositions of `masked_logsumexp` in plain PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mcl_kernels._validate import (
    check_choice,
    check_embeddings,
    check_flag,
    check_positive,
    check_same_shape,
    check_same_width,
)
from mcl_kernels.distributed.cost_model import EXCHANGES
from mcl_kernels.distributed.group import Ranks, ranks_of
from mcl_kernels.logsumexp.api import as_pairs, as_scale, resolve_impl
from mcl_kernels.logsumexp.pairs import Pairs
from mcl_kernels.losses import per_anchor
from mcl_kernels.losses import sharded as over_ranks
from mcl_kernels.normalize import compute_dtype, joined_views, normalize_rows, unit_views
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
        temperature: t > 0, a float, a tensor [] or [1], or a vector [N]; tensors get an exact gradient and are
            not checked, which would wait for a GPU: keep a learned one positive.
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
        group: None: the batch is that of this process. Or a process group whose ranks hold a shard each, of any length
            (`torch.distributed.group.WORLD`: all ranks); equal labels, and equal ids, mean the same on all of them, and
            default ids differ. Every rank calls, and gets W / N times the sum over its share of the N anchors of all
            W ranks: the mean of what they get is the loss of the whole batch, and so are, once averaged as
            `DistributedDataParallel` does, the gradients of parameters and temperature (those of embeddings are
            W times as large). "sum" is spread in the same way; "none" gives the losses of this rank's rows.
            An error before anything is exchanged, such as an argument that is refused on one rank, is raised on every
            rank in that call: there the error itself, elsewhere a ValueError that names the rank. The ranks stay in
            step, and may go on. Only this rank hears of an error in `group` itself, in the objective, or in the
            backward pass: end the process then, or the others wait until the group's timeout.
        exchange: "cluster" sends the rows of each cluster to the rank that compares them, or to several if the cluster
            is large: with clusters, about its own batch for each rank. "gather" sends all keys to all ranks. "auto"
            takes what is done first (`plan_exchange`); it gathers where an anchor needs more than its cluster: other
            `negatives`, `reduction="none"`, an objective that mixes anchors.

    Returns:
        A scalar, or [N] with `reduction="none"`; fp32, or fp64 where an input is fp64.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, lengths, devices or options that do not fit, or that are not alike on all ranks; each
            message names the argument. With `group`, an error of another rank too.
        RuntimeError: a rank that is gone, or did not come within the timeout of the group.

    Source: "Learning the Unlearned" (ECCV 2024, arXiv 2402.11816), the loss L_j of stage j.

    Example:
        >>> query, key = torch.eye(4), torch.eye(4)
        >>> masked_info_nce(query, key, labels=torch.tensor([0, 0, 1, 1]), temperature=1.0)
        tensor(0.3133)
    """
    ranks = None if group is None else ranks_of(group)
    described: dict[str, Any] = {
        "query": query, "key": key, "labels": labels, "key_labels": key_labels, "positive": positive, "ids": ids,
        "key_ids": key_ids, "temperature": temperature, "normalize": normalize, "exchange": exchange,
        "negatives": negatives, "objective": objective, "reduction": reduction,
    }  # fmt: skip
    is_queue = positive is not None
    with over_ranks.agreed_call(ranks, "masked_info_nce", described):
        check_options(exchange, reduction, normalize)
        query, key, positive, pairs, impl = query_key_positive(
            query, key, labels, key_labels, positive, ids, key_ids, negatives, normalize, impl, ranks
        )
        scale = _inverse_temperature(temperature, query, compute_dtype(query, key, positive))
    if ranks is None:
        loss = per_anchor.one_way(query, positive, key, pairs, scale, objective, impl, is_queue=is_queue)
        return _reduce(loss, reduction)
    if isinstance(temperature, Tensor) and temperature.ndim:
        # On a rank with one row [1] may also be its part of a vector: over ranks it is one everywhere.
        scale = scale.expand(query.shape[0])
    exchange = over_ranks.needed_exchange(exchange, negatives, objective, reduction)
    loss, total = over_ranks.one_way(
        query, positive, key, pairs, scale, objective, impl, ranks, exchange, is_queue=is_queue
    )
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
        temperature: t > 0, a float, a tensor [] or [1], or a vector [2N], view_a first; see `masked_info_nce`.
        ids: identity of the samples, integers [N]; equal ids are never negatives. Default: every row its own.
        negatives, objective, normalize, impl, group, exchange: as in `masked_info_nce`.
        reduction: "mean" over all 2N anchors (0 for N = 0), "sum" or "none".

    Returns:
        A scalar, or [2N] with `reduction="none"`, view_a first; fp32, or fp64 where an input is fp64.

    Raises:
        TypeError, ValueError, RuntimeError: as `masked_info_nce`.

    Source: Chen et al. 2020 (arXiv 2002.05709), equation 1, with the negatives of arXiv 2402.11816.

    Example:
        >>> view = torch.eye(4)
        >>> nt_xent(view, view, labels=torch.tensor([0, 0, 1, 1]), temperature=1.0)
        tensor(0.5514)
    """
    ranks = None if group is None else ranks_of(group)
    # [1] is one number as [] is, and not the vector [2N] of another rank, which is described alike.
    compared = temperature
    if isinstance(temperature, Tensor) and temperature.shape == (1,):
        compared = temperature.reshape(())
    described = {
        "view_a": view_a, "view_b": view_b, "labels": labels, "ids": ids, "temperature": compared,
        "normalize": normalize, "exchange": exchange, "negatives": negatives, "objective": objective,
        "reduction": reduction,
    }  # fmt: skip
    with over_ranks.agreed_call(ranks, "nt_xent", described):
        check_options(exchange, reduction, normalize)
        check_embeddings("view_a", view_a)
        check_embeddings("view_b", view_b)
        check_same_shape("view_b", view_b, "view_a", view_a)
        if ids is None:
            ids = _row_ids(view_a, ranks)
        names = ("view_a", "view_b", "labels")
        of_sample = as_pairs(view_a, view_b, labels, labels, ids, ids, negatives, key_is_query=True, names=names)
        impl = resolve_impl(impl, view_a.device)
        views, cosine = unit_views(view_a, view_b, impl) if normalize else joined_views(view_a, view_b)
        scale = _inverse_temperature(temperature, views, compute_dtype(views))
    if ranks is None:
        return _reduce(per_anchor.all_views(views, cosine, of_sample, scale, objective, impl), reduction)
    exchange = over_ranks.needed_exchange(exchange, negatives, objective, reduction)
    part_a, part_b = views.chunk(2)
    loss, total = over_ranks.all_views(part_a, part_b, of_sample, scale, objective, impl, ranks, exchange)
    return _reduce(loss, reduction, 2 * total, ranks)


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
        negatives, objective, impl, group, exchange: as in `masked_info_nce`.
        normalize: L2-normalise both in fp32, rounded once to the dtype they came in.
        reduction: "mean" over the N pairs (0 for N = 0), "sum" or "none".

    Returns:
        A scalar, or [N] with `reduction="none"`; fp32, or fp64 where an input is fp64.

    Raises:
        TypeError, ValueError, RuntimeError: as `masked_info_nce`.

    Source: Radford et al. 2021 (arXiv 2103.00020), figure 3, with the negatives of arXiv 2402.11816.

    Example:
        >>> features = torch.eye(4)
        >>> clip_loss(features, features, labels=torch.tensor([0, 0, 1, 1]), logit_scale=1.0)
        tensor(0.3133)
    """
    ranks = None if group is None else ranks_of(group)
    described = {
        "image_features": image_features, "text_features": text_features, "labels": labels, "text_labels": text_labels,
        "ids": ids, "logit_scale": logit_scale, "normalize": normalize, "exchange": exchange, "negatives": negatives,
        "objective": objective, "reduction": reduction,
    }  # fmt: skip
    with over_ranks.agreed_call(ranks, "clip_loss", described):
        check_options(exchange, reduction, normalize)
        check_embeddings("image_features", image_features)
        check_embeddings("text_features", text_features)
        check_same_shape("text_features", text_features, "image_features", image_features)
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
        return _reduce(per_anchor.both_ways(image_features, text_features, pairs, scale, objective, impl), reduction)
    exchange = over_ranks.needed_exchange(exchange, negatives, objective, reduction)
    both_ways = over_ranks.both_ways if labels is None or text_labels is None else over_ranks.each_way
    loss, total = both_ways(image_features, text_features, pairs, scale, objective, impl, ranks, exchange)
    return _reduce(loss, reduction, total, ranks)


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
) -> tuple[Tensor, Tensor, Tensor, Pairs, str]:
    """The checked arguments of the query-key form, its positives [N, D], who may be a negative of whom, and `impl`."""
    check_flag("normalize", normalize)
    check_embeddings("query", query)
    check_embeddings("key", key)
    check_same_width("key", key, "query", query)
    n, m = query.shape[0], key.shape[0]
    if positive is not None:
        check_embeddings("positive", positive)
        check_same_shape("positive", positive, "query", query)
    elif m < n:
        raise ValueError(f"key must hold a positive for each query where positive=None: got {m} keys for {n} queries")
    elif ids is None and key_ids is None:
        ids, key_ids = _row_ids(query, ranks), _row_ids(key, ranks)
    key_is_query = positive is None and m == n
    pairs = as_pairs(query, key, labels, key_labels, ids, key_ids, negatives, key_is_query=key_is_query)
    impl = resolve_impl(impl, query.device)
    if normalize:
        query, key = normalize_rows(query, impl), normalize_rows(key, impl)
        positive = None if positive is None else normalize_rows(positive, impl)
    return query, key, key[:n] if positive is None else positive, pairs, impl


def _row_ids(rows: Tensor, ranks: Ranks | None) -> Tensor:
    return torch.arange(rows.shape[0], device=rows.device) if ranks is None else ranks.row_ids(rows)


def check_options(exchange: str, reduction: str, normalize: bool) -> None:
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("exchange", exchange, EXCHANGES)
    check_flag("normalize", normalize)


def _inverse_temperature(temperature: float | Tensor, query: Tensor, dtype: torch.dtype) -> Tensor:
    if isinstance(temperature, Tensor):
        return as_scale("temperature", temperature, query, dtype).reciprocal()
    check_positive("temperature", temperature)
    inverse = 1.0 / temperature
    if inverse > torch.finfo(dtype).max:
        raise ValueError(f"temperature is too small for logits of {dtype}: got {temperature}")
    return as_scale("temperature", inverse, query, dtype)


def _reduce(loss: Tensor, reduction: str, anchors: int | None = None, ranks: Ranks | None = None) -> Tensor:
    """Over ranks the loss holds this rank's share of the anchors: what it gives has the reduction as its mean."""
    if reduction == "none":
        return loss
    total = loss.sum() if ranks is None else loss.sum() * ranks.world_size
    n = loss.shape[0] if anchors is None else anchors
    return total / max(n, 1) if reduction == "mean" else total
